//! A 16550A serial port that only sends: the guest's console.
//!
//! Every byte is sent as soon as it is written, so the transmitter is always
//! empty; that is also the only interrupt. Received data there is none.

use std::io;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::console_log::ConsoleLog;

// Registers, by offset from the first port.
const DATA: u16 = 0;
const INTERRUPT_ENABLE: u16 = 1;
const INTERRUPT_ID: u16 = 2;
const LINE_CONTROL: u16 = 3;
const MODEM_CONTROL: u16 = 4;
const LINE_STATUS: u16 = 5;
const MODEM_STATUS: u16 = 6;
const SCRATCH: u16 = 7;

const ENABLE_TRANSMITTER_EMPTY: u8 = 0x02;
const ID_NONE: u8 = 0x01;
const ID_TRANSMITTER_EMPTY: u8 = 0x02;
const ID_FIFOS: u8 = 0xc0;
const FIFO_ENABLE: u8 = 0x01;
const DIVISOR_LATCH: u8 = 0x80;
const LOOPBACK: u8 = 0x10;
const TRANSMITTER_IDLE: u8 = 0x60;
/// Carrier detect, data set ready, clear to send.
const MODEM_READY: u8 = 0xb0;

/// Number of ports.
pub const PORTS: u16 = 8;

/// The port's registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    divisor: [u8; 2],
    fifos: bool,
    /// The transmitter-empty interrupt has been raised and not yet read.
    interrupt_pending: bool,
}

/// The serial port.
pub struct Serial {
    state: SerialState,
    output: Option<ConsoleLog>,
    interrupt: EventFd,
}

impl Serial {
    /// A port that writes to `output`, or nowhere, and raises `interrupt`.
    pub fn new(output: Option<ConsoleLog>, interrupt: EventFd) -> Self {
        Self { state: SerialState::default(), output, interrupt }
    }

    /// The registers.
    pub fn save(&self) -> SerialState {
        self.state.clone()
    }

    /// Continues from saved registers.
    pub fn restore(&mut self, state: SerialState) {
        self.state = state;
    }

    /// Gives up the output: its file failed, and a guest that goes on printing
    /// must not fill the monitor's own log with that.
    pub fn discard_output(&mut self, cause: &io::Error) {
        if self.output.take().is_some() {
            log::error!("console log: {cause}; the console is discarded from here on");
        }
    }

    /// Reads the register at `offset`.
    pub fn read(&mut self, offset: u16) -> u8 {
        let state = &mut self.state;
        let latch = state.line_control & DIVISOR_LATCH != 0;
        match offset {
            DATA if latch => state.divisor[0],
            INTERRUPT_ENABLE if latch => state.divisor[1],
            DATA => 0,
            INTERRUPT_ENABLE => state.interrupt_enable,
            INTERRUPT_ID => {
                let fifos = if state.fifos { ID_FIFOS } else { 0 };
                let pending = std::mem::take(&mut state.interrupt_pending);
                fifos | if pending { ID_TRANSMITTER_EMPTY } else { ID_NONE }
            }
            LINE_CONTROL => state.line_control,
            MODEM_CONTROL => state.modem_control,
            LINE_STATUS => TRANSMITTER_IDLE,
            MODEM_STATUS if state.modem_control & LOOPBACK != 0 => looped(state.modem_control),
            MODEM_STATUS => MODEM_READY,
            SCRATCH => state.scratch,
            _ => 0xff,
        }
    }

    /// Writes the register at `offset`.
    pub fn write(&mut self, offset: u16, value: u8) -> io::Result<()> {
        let state = &mut self.state;
        let latch = state.line_control & DIVISOR_LATCH != 0;
        match offset {
            DATA if latch => state.divisor[0] = value,
            INTERRUPT_ENABLE if latch => state.divisor[1] = value,
            DATA => {
                // In loopback the byte comes back to the receiver, which is not there.
                if state.modem_control & LOOPBACK == 0
                    && let Some(output) = &mut self.output
                {
                    output.put(value)?;
                }
                self.raise_if_enabled()?;
            }
            INTERRUPT_ENABLE => {
                state.interrupt_enable = value & 0x0f;
                self.raise_if_enabled()?;
            }
            INTERRUPT_ID => state.fifos = value & FIFO_ENABLE != 0,
            LINE_CONTROL => state.line_control = value,
            MODEM_CONTROL => state.modem_control = value & 0x1f,
            SCRATCH => state.scratch = value,
            _ => {}
        }
        Ok(())
    }

    fn raise_if_enabled(&mut self) -> io::Result<()> {
        if self.state.interrupt_enable & ENABLE_TRANSMITTER_EMPTY == 0 {
            return Ok(());
        }
        self.state.interrupt_pending = true;
        self.interrupt.write(1)
    }
}

/// Modem status in loopback: RTS, DTR, OUT1, OUT2 as CTS, DSR, RI, DCD.
fn looped(modem_control: u8) -> u8 {
    let bit = |from: u8, to: u8| if modem_control & (1 << from) != 0 { 1 << to } else { 0 };
    bit(1, 4) | bit(0, 5) | bit(2, 6) | bit(3, 7)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serial(path: &std::path::Path) -> Serial {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Serial::new(Some(ConsoleLog::open(path).unwrap()), interrupt)
    }

    #[test]
    fn output_reaches_the_log_and_interrupts_only_when_asked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut port = serial(&path);
        b"hello\n".iter().for_each(|b| port.write(DATA, *b).unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"hello\n");
        assert_eq!(port.read(INTERRUPT_ID), ID_NONE);
        assert!(port.interrupt.read().is_err(), "no interrupt was enabled");

        port.write(INTERRUPT_ENABLE, ENABLE_TRANSMITTER_EMPTY).unwrap();
        assert_eq!(port.interrupt.read().unwrap(), 1);
        assert_eq!(port.read(INTERRUPT_ID), ID_TRANSMITTER_EMPTY);
        assert_eq!(port.read(INTERRUPT_ID), ID_NONE, "reading acknowledges");
        port.write(DATA, b'x').unwrap();
        assert_eq!(port.read(INTERRUPT_ID), ID_TRANSMITTER_EMPTY);
    }

    /// What Linux's 8250 driver does to tell a 16550A from nothing.
    #[test]
    fn looks_like_a_16550a() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut port = serial(&path);
        port.write(INTERRUPT_ENABLE, 0x0f).unwrap();
        assert_eq!(port.read(INTERRUPT_ENABLE), 0x0f);
        port.write(INTERRUPT_ENABLE, 0).unwrap();
        assert_eq!(port.read(INTERRUPT_ENABLE), 0);
        port.write(MODEM_CONTROL, LOOPBACK | 0x0a).unwrap();
        assert_eq!(port.read(MODEM_STATUS) & 0xf0, 0x90);
        port.write(INTERRUPT_ID, FIFO_ENABLE).unwrap();
        assert_eq!(port.read(INTERRUPT_ID) >> 6, 3);
        port.write(DATA, b'x').unwrap();
        drop(port);
        assert_eq!(std::fs::read(&path).unwrap(), b"", "loopback sends nothing");
    }

    #[test]
    fn state_round_trip() {
        let dir = tempfile::tempdir().unwrap();
        let mut port = serial(&dir.path().join("a"));
        for (offset, value) in [(LINE_CONTROL, 0x83), (DATA, 1), (INTERRUPT_ENABLE, 2), (LINE_CONTROL, 3)] {
            port.write(offset, value).unwrap();
        }
        port.write(INTERRUPT_ENABLE, ENABLE_TRANSMITTER_EMPTY).unwrap();
        port.write(SCRATCH, 0x5a).unwrap();
        let saved = serde_json::to_string(&port.save()).unwrap();
        let mut other = serial(&dir.path().join("b"));
        other.restore(serde_json::from_str(&saved).unwrap());
        assert_eq!(other.save(), port.save());
        assert_eq!(other.read(SCRATCH), 0x5a);
        assert_eq!(other.read(INTERRUPT_ID), ID_TRANSMITTER_EMPTY);
    }
}
