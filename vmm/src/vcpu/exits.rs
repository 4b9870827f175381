//! Returns of `KVM_RUN` to user space, handled and counted.

use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use rvm_protocol::vmm::ExitCounts;
use vmm_sys_util::errno;

use crate::buses::{Access, Buses};

/// Why a guest has come to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It reset or powered off the machine.
    PoweredOff,
    /// It cannot go on; the reason in one line.
    Crashed(String),
}

/// One vCPU's counters. Only its own thread writes them, so no locked
/// instruction is needed.
#[derive(Debug, Default)]
pub struct ExitCounters {
    pci_config: AtomicU64,
    serial: AtomicU64,
    other_pio: AtomicU64,
    mmio: AtomicU64,
    interrupted: AtomicU64,
    other: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

impl ExitCounters {
    /// Adds this vCPU's counts to `sum`.
    pub fn add_to(&self, sum: &mut ExitCounts) {
        sum.pci_config += self.pci_config.load(Ordering::Relaxed);
        sum.serial += self.serial.load(Ordering::Relaxed);
        sum.other_pio += self.other_pio.load(Ordering::Relaxed);
        sum.mmio += self.mmio.load(Ordering::Relaxed);
        sum.interrupted += self.interrupted.load(Ordering::Relaxed);
        sum.other += self.other.load(Ordering::Relaxed);
    }

    fn count_access(&self, access: Access) {
        count(match access {
            Access::PciConfig => &self.pci_config,
            Access::Serial => &self.serial,
            Access::OtherPort | Access::Reset => &self.other_pio,
        });
    }
}

/// What a vCPU's thread does after an exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Enter the guest again.
    Run,
    /// See what the monitor wants first.
    Check,
    /// Nothing more.
    End(End),
}

/// Enters the guest once and does what its exit asks for.
pub fn run_once(vcpu: &mut VcpuFd, buses: &Buses, counters: &ExitCounters) -> Next {
    let exit = vcpu.run();
    buses.catch_up();
    let failure = match exit {
        Ok(VcpuExit::MmioRead(address, data)) => {
            buses.read_memory(address, data);
            count(&counters.mmio);
            return Next::Run;
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            buses.write_memory(address, data);
            count(&counters.mmio);
            return Next::Run;
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            counters.count_access(buses.read_port(port, data));
            return Next::Run;
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            let access = buses.write_port(port, data);
            counters.count_access(access);
            return if access == Access::Reset { Next::End(End::PoweredOff) } else { Next::Run };
        }
        Ok(VcpuExit::Intr) => {
            count(&counters.interrupted);
            return Next::Check;
        }
        Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
            count(&counters.interrupted);
            return Next::Check;
        }
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET | KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
            count(&counters.other);
            return Next::End(End::PoweredOff);
        }
        Ok(exit) => describe(&exit),
        Err(e) => describe_errno(e),
    };
    count(&counters.other);
    let cause = if failure == INTERNAL_ERROR { internal_error(vcpu) } else { failure };
    let place = vcpu.get_regs().map(|r| format!(" at rip {:#x}", r.rip)).unwrap_or_default();
    Next::End(End::Crashed(format!("{cause}{place}")))
}

const INTERNAL_ERROR: &str = "KVM internal error";

fn describe(exit: &VcpuExit<'_>) -> String {
    match exit {
        VcpuExit::Shutdown => "triple fault".to_owned(),
        VcpuExit::InternalError => INTERNAL_ERROR.to_owned(),
        VcpuExit::FailEntry(reason, cpu) => {
            format!("the CPU refused to enter the guest (reason {reason:#x}, CPU {cpu})")
        }
        VcpuExit::MemoryFault { gpa, .. } => format!("guest memory at {gpa:#x} cannot be accessed"),
        other => format!("KVM returned {other:?}, which this machine never asks for"),
    }
}

fn describe_errno(e: errno::Error) -> String {
    match e.errno() {
        libc::EFAULT => {
            "guest memory cannot be accessed (has the kernel's file, the initramfs's or an image's shrunk, or does the \
             host fail to read it?)"
                .to_owned()
        }
        libc::ENOMEM => "the host has no memory left for the guest".to_owned(),
        _ => format!("KVM_RUN: {e}"),
    }
}

fn internal_error(vcpu: &mut VcpuFd) -> String {
    let run = vcpu.get_kvm_run();
    // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, so KVM filled in this member.
    let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
    let meaning = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => "an instruction KVM cannot emulate",
        KVM_INTERNAL_ERROR_SIMUL_EX => "simultaneous exceptions",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while an event was being delivered",
        _ => "of an unknown kind",
    };
    format!("{INTERNAL_ERROR} {suberror}: {meaning}")
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::{Arc, Mutex};

    use kvm_bindings::{kvm_regs, kvm_segment};
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::devices::legacy::serial::Serial;
    use crate::kvm::Host;
    use crate::memory::GuestRam;
    use crate::pci::PciBus;
    use crate::vcpu::Vcpu;

    const CODE: u64 = 0x1000;
    const SEEN: u32 = 0x2000;
    const WINDOW: u32 = 2 << 30;

    /// Runs `code` in 32 bits, ring 0, to its end, in a machine that has `file` in a window; what it left at
    /// `SEEN`, and its accesses to device memory.
    fn run(file: &File, code: &[&[u8]]) -> (End, [u8; 4], u64) {
        let vm = Arc::new(Host::open().unwrap().create_vm(1).unwrap());
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).with_window(WINDOW.into(), 4 << 20);
        vm.set_memory(&memory).unwrap();
        let (window, bytes) = memory.map(file).unwrap();
        vm.add_window(9, &memory.windows()[window], bytes).unwrap();
        // The end: the reset line.
        let code = [&code.concat()[..], &[0xb0, 0xfe, 0xe6, 0x64]].concat();
        memory.write_slice(&code, GuestAddress(CODE)).unwrap();
        let mut vcpu = Vcpu::create(&vm, 0).unwrap();
        let mut sregs = vcpu.fd.get_sregs().unwrap();
        let flat = |type_| kvm_segment {
            limit: u32::MAX,
            selector: 8,
            type_,
            s: 1,
            present: 1,
            db: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = flat(0xb);
        (sregs.ds, sregs.es, sregs.ss) = (flat(0x3), flat(0x3), flat(0x3));
        sregs.cr0 |= 1;
        vcpu.fd.set_sregs(&sregs).unwrap();
        vcpu.fd.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() }).unwrap();
        let serial = Serial::new(None, EventFd::new(0).unwrap());
        let buses = Buses { pci: PciBus::default(), serial: Mutex::new(serial), vm: Arc::clone(&vm) };
        let counters = ExitCounters::default();
        let end = loop {
            match run_once(&mut vcpu.fd, &buses, &counters) {
                Next::Run | Next::Check => {}
                Next::End(end) => break end,
            }
        };
        let mut counts = ExitCounts::default();
        counters.add_to(&mut counts);
        let mut seen = [0; 4];
        memory.read_slice(&mut seen, GuestAddress(SEEN.into())).unwrap();
        (end, seen, counts.mmio)
    }

    /// `mov al, [from]; mov [SEEN + index], al`.
    fn look(from: u32, index: u32) -> Vec<u8> {
        [&[0xa0][..], &from.to_le_bytes(), &[0xa2], &(SEEN + index).to_le_bytes()].concat()
    }

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 8192], 0).unwrap();
        file
    }

    #[test]
    fn what_a_guest_writes_to_a_file_is_written_nowhere() {
        let file = file();
        // mov byte [WINDOW + 4096], 0x55
        let write = [&[0xc6, 0x05][..], &(WINDOW + 4096).to_le_bytes(), &[0x55]].concat();
        // mov edi, WINDOW; mov ecx, 16; rep stosb
        let many = [&[0xbf][..], &WINDOW.to_le_bytes(), &[0xb9, 16, 0, 0, 0, 0xf3, 0xaa]].concat();
        let zeroes = look(WINDOW + (2 << 20) - 1, 2);
        let (end, seen, exits) = run(
            &file,
            &[&look(WINDOW, 0), &write, &many, &look(WINDOW + 4096, 1), &zeroes, &look(WINDOW + 15, 3)],
        );
        assert_eq!((end, seen), (End::PoweredOff, [7, 7, 0, 7]));
        assert!((2..=17).contains(&exits), "{exits}");
        let mut bytes = [0; 8192];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [7; 8192]);
    }
}
