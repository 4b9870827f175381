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
            "guest memory cannot be accessed (has the kernel or initramfs file shrunk?)".to_owned()
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
