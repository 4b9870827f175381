//! The keyboard controller, of which only the reset line is left: with
//! `reboot=k` Linux ends the machine through it.

/// Data port.
pub const DATA_PORT: u16 = 0x60;
/// Status and command port.
pub const COMMAND_PORT: u16 = 0x64;

const COMMAND_RESET: u8 = 0xfe;

/// Whether writing `data` to `port` pulls the CPU's reset line.
pub fn is_reset(port: u16, data: &[u8]) -> bool {
    port == COMMAND_PORT && data.first() == Some(&COMMAND_RESET)
}

/// Reads a port: both buffers are empty, so nobody waits for the controller.
pub fn read(data: &mut [u8]) {
    data.fill(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        assert!(is_reset(COMMAND_PORT, &[0xfe]));
        assert!(!is_reset(COMMAND_PORT, &[0xff]));
        assert!(!is_reset(DATA_PORT, &[0xfe]));
        assert!(!is_reset(COMMAND_PORT, &[]));
    }
}
