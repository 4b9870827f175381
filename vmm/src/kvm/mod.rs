//! KVM: the host's device, one VM, its interrupts.

pub mod coalesced;
pub mod irq;
pub mod probe;
pub mod state;

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_PMU_CAPABILITY, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY,
    KVM_PMU_CAP_DISABLE, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{
    Cap, IoEventAddress, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd,
};
use thiserror::Error;
use vm_memory::GuestMemoryRegion;
use vmm_sys_util::errno;

use crate::arch::layout::{KVM_IDENTITY_MAP_START, KVM_TSS_START};
use crate::arch::vendor::Vendor;
use crate::memory::GuestRam;
use crate::memory::ram::Region;
use crate::memory::windows::Window;
use coalesced::PostedWrites;
use irq::IrqRoutes;

/// Why KVM cannot be used, or a VM not be made.
#[derive(Debug, Error)]
pub enum KvmError {
    /// `/dev/kvm` does not exist.
    #[error("there is no /dev/kvm: this kernel has no KVM, or kvm_intel or kvm_amd is not loaded")]
    NoDevice,
    /// `/dev/kvm` could not be opened.
    #[error("/dev/kvm cannot be opened")]
    Open(#[source] errno::Error),
    /// Not the stable API.
    #[error("/dev/kvm has API version {0}, not {KVM_API_VERSION}")]
    ApiVersion(i32),
    /// A capability is missing.
    #[error("this host's KVM lacks {0}")]
    NoCapability(&'static str),
    /// More vCPUs than the host can run in one VM.
    #[error("vcpus: {asked} asked for; this host's KVM allows {most}")]
    TooManyVcpus {
        /// Number in the configuration.
        asked: u8,
        /// Largest number.
        most: usize,
    },
    /// One of KVM's requests failed.
    #[error("KVM refused {request}")]
    Request {
        /// Its name.
        request: &'static str,
        /// The system's answer.
        #[source]
        source: errno::Error,
    },
}

impl KvmError {
    /// For `map_err`: names the request that failed.
    pub fn request(request: &'static str) -> impl FnOnce(errno::Error) -> Self {
        move |source| Self::Request { request, source }
    }
}

/// What the monitor cannot do without; all of it is older than Linux 5.10.
const REQUIRED: [(Cap, &str); 14] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IoeventfdNoLength, "KVM_CAP_IOEVENTFD_NO_LENGTH"),
    (Cap::Clocksource, "KVM_CAP_CLOCKSOURCE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::InternalErrorData, "KVM_CAP_INTERNAL_ERROR_DATA"),
];

/// The host's KVM, checked.
pub struct Host {
    kvm: Kvm,
    /// The CPU's vendor.
    pub vendor: Vendor,
}

impl Host {
    /// Opens `/dev/kvm` and checks that it can do what the monitor needs.
    pub fn open() -> Result<Self, KvmError> {
        let kvm = open_device()?;
        for (capability, name) in REQUIRED {
            if !kvm.check_extension(capability) {
                return Err(KvmError::NoCapability(name));
            }
        }
        Ok(Self { kvm, vendor: Vendor::of_host() })
    }

    /// What CPUID can say to a guest.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::request("KVM_GET_SUPPORTED_CPUID"))
    }

    /// Every MSR a vCPU's state consists of on this host.
    pub fn msr_indices(&self) -> Result<Vec<u32>, KvmError> {
        let list = self.kvm.get_msr_index_list().map_err(KvmError::request("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(list.as_slice().to_vec())
    }

    /// Whether the in-kernel local APIC has the TSC deadline timer.
    pub fn has_tsc_deadline(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// Whether writes to ports and to device memory can wait for the next exit.
    pub fn can_post_writes(&self) -> bool {
        self.kvm.check_extension(Cap::CoalescedPio) && self.kvm.check_extension(Cap::CoalescedMmio)
    }

    /// Creates a VM with in-kernel interrupt controllers, for `vcpus` vCPUs.
    ///
    /// No PIT: a guest with KVM's clock calibrates nothing against it, and
    /// creating one starts a kernel thread.
    pub fn create_vm(&self, vcpus: u8) -> Result<Vm, KvmError> {
        let most = self.kvm.get_max_vcpus();
        if usize::from(vcpus) > most {
            return Err(KvmError::TooManyVcpus { asked: vcpus, most });
        }
        // EINTR is real: creating a VM can be interrupted while the host's MMU
        // notifiers settle.
        let fd = loop {
            match self.kvm.create_vm() {
                Err(e) if e.errno() == libc::EINTR => {}
                created => break created.map_err(KvmError::request("KVM_CREATE_VM"))?,
            }
        };
        if self.vendor.needs_tss() {
            fd.set_identity_map_address(KVM_IDENTITY_MAP_START)
                .map_err(KvmError::request("KVM_SET_IDENTITY_MAP_ADDR"))?;
            fd.set_tss_address(KVM_TSS_START as usize).map_err(KvmError::request("KVM_SET_TSS_ADDR"))?;
        }
        fd.create_irq_chip().map_err(KvmError::request("KVM_CREATE_IRQCHIP"))?;
        disable_pmu(&fd)?;
        Ok(Vm::new(Arc::new(fd)))
    }
}

/// CPUID already says that there is no performance monitoring; this also keeps
/// KVM from emulating its registers (AMD's oldest counters are not announced).
fn disable_pmu(fd: &VmFd) -> Result<(), KvmError> {
    if fd.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into()) & KVM_PMU_CAP_DISABLE as i32 == 0 {
        return Ok(());
    }
    let mut cap = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
    cap.args[0] = KVM_PMU_CAP_DISABLE.into();
    fd.enable_cap(&cap).map_err(KvmError::request("KVM_CAP_PMU_CAPABILITY"))
}

fn open_device() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|source| match source.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::NoDevice,
        _ => KvmError::Open(source),
    })?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(KvmError::ApiVersion(version));
    }
    Ok(kvm)
}

/// One VM.
pub struct Vm {
    /// The VM's descriptor.
    pub fd: Arc<VmFd>,
    /// Its interrupt routes.
    pub routes: Arc<IrqRoutes>,
    posted: OnceLock<PostedWrites>,
}

impl Vm {
    fn new(fd: Arc<VmFd>) -> Self {
        Self { routes: Arc::new(IrqRoutes::new(Arc::clone(&fd))), fd, posted: OnceLock::new() }
    }

    /// Lets writes be posted from now on; whoever handles exits must look at
    /// [`posted`](Self::posted) first. `vcpu` is any of the VM's.
    pub fn start_posting(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let _ = self.posted.set(PostedWrites::map(vcpu)?);
        Ok(())
    }

    /// Writes that have not taken effect yet; `None` where none are posted.
    pub fn posted(&self) -> Option<&PostedWrites> {
        self.posted.get()
    }

    /// Lets writes to the four ports from `port` wait for the next exit.
    pub fn post_port_writes(&self, port: u16) -> Result<(), KvmError> {
        self.post(IoEventAddress::Pio(port.into()), 4)
    }

    /// Lets writes to `range` of device memory wait for the next exit.
    pub fn post_memory_writes(&self, range: Range<u64>) -> Result<(), KvmError> {
        self.post(IoEventAddress::Mmio(range.start), (range.end - range.start) as u32)
    }

    fn post(&self, address: IoEventAddress, size: u32) -> Result<(), KvmError> {
        if self.posted.get().is_none() {
            return Ok(());
        }
        let request = KvmError::request("KVM_REGISTER_COALESCED_MMIO");
        self.fd.register_coalesced_mmio(address, size).map_err(request)
    }

    /// Undoes [`post_memory_writes`](Self::post_memory_writes).
    pub fn unpost_memory_writes(&self, range: Range<u64>) -> Result<(), KvmError> {
        if self.posted.get().is_none() {
            return Ok(());
        }
        let request = KvmError::request("KVM_UNREGISTER_COALESCED_MMIO");
        let size = (range.end - range.start) as u32;
        self.fd.unregister_coalesced_mmio(IoEventAddress::Mmio(range.start), size).map_err(request)
    }

    /// Makes AMD's oldest performance counters fault. No CPUID leaf says that they
    /// are there, so Linux tries them, and KVM without a PMU writes a line to the
    /// host's log for the first that is written to.
    ///
    /// KVM waits for its readers here: not to be called before the guest runs.
    pub fn deny_old_counters(&self) -> Result<(), KvmError> {
        if !self.fd.check_extension(Cap::X86MsrFilter) {
            return Ok(());
        }
        // Four event selectors, then four counters.
        let counters = MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: 0xc001_0000,
            msr_count: 8,
            bitmap: &[0],
        };
        self.fd
            .set_msr_filter(MsrFilterDefaultAction::ALLOW, &[counters])
            .map_err(KvmError::request("KVM_X86_SET_MSR_FILTER"))
    }

    /// Gives the VM the memory it starts with, a slot for each region.
    pub fn set_memory(&self, memory: &GuestRam) -> Result<(), KvmError> {
        for (slot, region) in memory.boot_regions().iter().enumerate() {
            self.add_memory(slot as u32, region, 0..region.len())?;
        }
        Ok(())
    }

    /// Gives the VM the bytes `range` of `region` as its slot number `slot`,
    /// which must be free.
    pub fn add_memory(&self, slot: u32, region: &Region, range: Range<u64>) -> Result<(), KvmError> {
        assert!(range.start < range.end && range.end <= region.mapped(), "not a part of the region");
        let memory = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0 + range.start,
            memory_size: range.end - range.start,
            userspace_addr: region.as_ptr() as u64 + range.start,
        };
        // SAFETY: the range is within the region's own mapping. KVM takes its
        // pages through that mapping, so a region that were unmapped too early
        // would give the guest EFAULT, not someone else's memory; the monitor
        // keeps the memory until the vCPUs have stopped.
        unsafe { self.fd.set_user_memory_region(memory) }
            .map_err(KvmError::request("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Lets the guest read the first `bytes` of `window`, whole pages, as slot number `slot`,
    /// which must be free. Its writes are accesses to device memory.
    pub fn add_window(&self, slot: u32, window: &Window, bytes: u64) -> Result<(), KvmError> {
        assert!(bytes > 0, "a slot of no bytes is none");
        self.set_window(slot, window, bytes)
    }

    /// Undoes [`add_window`](Self::add_window): when it returns, no vCPU reads there any more.
    pub fn remove_window(&self, slot: u32, window: &Window) -> Result<(), KvmError> {
        self.set_window(slot, window, 0)
    }

    fn set_window(&self, slot: u32, window: &Window, bytes: u64) -> Result<(), KvmError> {
        let memory = kvm_userspace_memory_region {
            slot,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: window.start().0,
            memory_size: bytes,
            userspace_addr: window.as_ptr() as u64,
        };
        // SAFETY: what is in a window is its own mapping's, for good; KVM writes nothing there.
        unsafe { self.fd.set_user_memory_region(memory) }
            .map_err(KvmError::request("KVM_SET_USER_MEMORY_REGION"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn vm_takes_memory_on_both_sides_of_the_hole() {
        let vm = Host::open().unwrap().create_vm(1).unwrap();
        vm.set_memory(&memory::create(4 << 30).unwrap()).unwrap();
    }
}
