//! From a configuration to a machine that can run, in boot order.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ScopedJoinHandle;

use rvm_protocol::vmm::{DiskConfig, ShareConfig};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::arch::{layout, mptable};
use crate::boot::initramfs::{self, InitramfsError};
use crate::boot::kernel::{self, KernelError};
use crate::boot::params::{self, ParamsError};
use crate::buses::Buses;
use crate::config::{CheckedConfig, NetFiles};
use crate::control::socket::ReadOnlySocket;
use crate::devices::legacy::console_log::ConsoleLog;
use crate::devices::legacy::serial::Serial;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::blk::{Blk, BlkError};
use crate::devices::virtio::fs::{Fs, FsError, FsMeter};
use crate::devices::virtio::net::{Net, NetControl, NetError};
use crate::devices::virtio::vsock::{Vsock, VsockError};
use crate::jail::Jail;
use crate::kvm::irq::IrqError;
use crate::kvm::probe::{self, ProbeError};
use crate::kvm::{Host, KvmError, Vm};
use crate::machine::Machine;
use crate::memory::{self, GuestRam, MemoryError, Resident, Shape};
use crate::pci::virtio::function::{self, FunctionError};
use crate::pci::{BusFull, CONFIG_ADDRESS_PORT, PciBus, TABLE_MAGIC};
use crate::snapshot::{self, MachineState, SnapshotError};
use crate::timeline::Timeline;
use crate::vcpu::{BootEntry, Vcpu, VcpuError, VcpuFactory};

/// Why a machine could not be built.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each variant is the step it is named after")]
pub enum BuildError {
    #[error(transparent)]
    Probe(#[from] ProbeError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("kernel: {}", path.display())]
    Kernel { path: PathBuf, source: KernelError },
    #[error("initramfs: {}", path.display())]
    Initramfs { path: PathBuf, source: InitramfsError },
    #[error("boot parameters")]
    Params(#[from] ParamsError),
    #[error("what is on the PCI bus could not be written")]
    PciTable(#[source] GuestMemoryError),
    #[error("the MP table could not be written")]
    MpTable(#[source] GuestMemoryError),
    #[error("console_log: {}", path.display())]
    Console { path: PathBuf, source: io::Error },
    #[error("/proc/self/smaps")]
    Smaps(#[source] io::Error),
    #[error("starting a thread")]
    Thread(#[source] io::Error),
    #[error("serial console")]
    Serial(#[source] IrqError),
    #[error("vsock")]
    Vsock(#[source] VsockError),
    #[error("shares: {tag}")]
    Share { tag: String, source: FsError },
    #[error("disks: {serial}")]
    Disk { serial: String, source: BlkError },
    #[error("nets: slot {slot}")]
    Net { slot: u8, source: NetError },
    #[error("PCI")]
    Pci(#[from] FunctionError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error("--restore")]
    Snapshot(#[from] SnapshotError),
    #[error("control_socket: {}", path.display())]
    Control { path: PathBuf, source: io::Error },
}

impl From<BusFull> for BuildError {
    fn from(source: BusFull) -> Self {
        Self::Pci(source.into())
    }
}

/// What a machine is built from: nothing of the host is named by a path any more.
pub struct Opened {
    config: CheckedConfig,
    snapshot: Option<File>,
    host: Host,
    memory: GuestRam,
    vsock: Option<Vsock>,
    shares: Vec<Fs>,
    disks: Vec<(String, Blk)>,
    console: Option<ConsoleLog>,
    socket: Option<ReadOnlySocket>,
}

/// Opens what `config` names. `any_kvm` accepts a `/dev/kvm` that only emulates kernels, for
/// measuring the monitor where there is no better. With a `snapshot` the machine will be the
/// one that was saved, else a new one.
pub fn open(
    config: CheckedConfig,
    jail: Option<&Jail>,
    snapshot: Option<File>,
    any_kvm: bool,
) -> Result<Opened, BuildError> {
    if !any_kvm {
        probe::check()?;
    }
    let host = Host::open()?;
    let vm = &config.vm;
    let vsock = vm.vsock.as_ref().map(Vsock::new).transpose().map_err(BuildError::Vsock)?;
    let share = |share: &ShareConfig| {
        let dir = jail.map_or_else(|| share.dir.clone(), |jail| jail.path(&share.dir));
        let share = ShareConfig { dir, ..share.clone() };
        let opened = Fs::new(&share);
        #[cfg(feature = "record")]
        let opened = opened.and_then(|device| {
            // In the working directory, which is the sandbox's.
            let file = File::create(format!("{}.trace", share.tag));
            file.and_then(|file| device.recorded(file)).map_err(FsError::Share)
        });
        opened.map_err(|source| BuildError::Share { tag: share.tag, source })
    };
    let shares = vm.shares.iter().map(share).collect::<Result<_, _>>()?;
    let disk = |disk: &DiskConfig| match Blk::open(disk) {
        Ok(device) => Ok((disk.serial.clone(), device)),
        Err(source) => Err(BuildError::Disk { serial: disk.serial.clone(), source }),
    };
    let disks = vm.disks.iter().map(disk).collect::<Result<_, _>>()?;
    let console = |path: &PathBuf| {
        ConsoleLog::open(path).map_err(|source| BuildError::Console { path: path.clone(), source })
    };
    let console = vm.console_log.as_ref().map(console).transpose()?;
    // It answers once there is a machine.
    let socket = |path: &PathBuf| {
        ReadOnlySocket::bind(path).map_err(|source| BuildError::Control { path: path.clone(), source })
    };
    let socket = vm.control_socket.as_ref().map(socket).transpose()?;
    // Huge pages take a file system of its own.
    let memory = memory::create_shaped(Shape {
        boot: vm.memory_mib << 20,
        more: vm.hotplug_memory_mib << 20,
        hugetlb: vm.hugetlb_memory_mib << 20,
        window: vm.pmem_mib << 20,
        huge_pages: vm.huge_pages,
    })?;
    Ok(Opened { config, snapshot, host, memory, vsock, shares, disks, console, socket })
}

/// Builds the machine of what was opened.
pub fn build(opened: Opened, timeline: Arc<Timeline>) -> Result<Machine, BuildError> {
    let Opened { mut config, snapshot, host, memory, vsock, shares, disks, console, socket } = opened;
    let snapshot = snapshot.map(snapshot::open).transpose()?;
    let resident = Resident::open().map_err(BuildError::Smaps)?;
    let vm = Arc::new(host.create_vm(config.vm.max_vcpus)?);
    timeline.reached("vm_created");

    // Before KVM takes the memory, and before it makes a vCPU, it waits for all who
    // may still look at what was before, which can last longer than all the rest; so
    // the memory is filled meanwhile.
    let devices = Devices { vsock, shares, disks, nets: std::mem::take(&mut config.nets), console };
    let vmm = std::thread::scope(|scope| {
        // A host has no more processes left now and then.
        let thread = std::thread::Builder::new;
        let taken = thread().spawn_scoped(scope, || vm.set_memory(&memory)).map_err(BuildError::Thread)?;
        let load = || match &snapshot {
            Some(snapshot) => snapshot.map_memory(&memory).map(|()| None).map_err(BuildError::from),
            None => load_guest(&config, &memory).map(Some),
        };
        let loaded = thread().spawn_scoped(scope, load).map_err(BuildError::Thread)?;
        let loaded = || joined(loaded).inspect(|_| timeline.reached("guest_loaded"));
        let built = build_on(&config, devices, (&host, &vm), &memory, loaded, &timeline);
        joined(taken)?;
        timeline.reached("memory_taken");
        let Built { buses, vcpus, more_vcpus, shares, disks, nets } = built?;
        if snapshot.is_none() {
            memory
                .write_slice(TABLE_MAGIC, GuestAddress(layout::PCI_TABLE_START))
                .map_err(BuildError::PciTable)?;
        }
        let (vm, memory) = (Arc::clone(&vm), memory.clone());
        Ok::<_, BuildError>(Machine {
            vm,
            memory,
            buses,
            vcpus,
            more_vcpus,
            shares,
            disks,
            nets,
            socket,
            resident,
            timeline,
        })
    })?;
    if let Some(snapshot) = snapshot {
        restore(snapshot.state, &vmm.buses, &vmm.vcpus, vmm.more_vcpus.possible())?;
    }
    Ok(vmm)
}

/// What is built on a VM and its memory.
struct Built {
    buses: Arc<Buses>,
    vcpus: Vec<Vcpu>,
    more_vcpus: VcpuFactory,
    shares: Vec<FsMeter>,
    disks: HashMap<String, usize>,
    nets: BTreeMap<u8, NetControl>,
}

/// What is put on its buses.
struct Devices {
    vsock: Option<Vsock>,
    shares: Vec<Fs>,
    disks: Vec<(String, Blk)>,
    nets: Vec<NetFiles>,
    console: Option<ConsoleLog>,
}

/// What a thread returned; its panic is ours.
fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// `loaded` waits until memory holds what the first vCPU is to run.
fn build_on(
    config: &CheckedConfig,
    devices: Devices,
    (host, vm): (&Host, &Arc<Vm>),
    memory: &GuestRam,
    loaded: impl FnOnce() -> Result<Option<BootEntry>, BuildError>,
    timeline: &Timeline,
) -> Result<Built, BuildError> {
    let pci = PciBus::default();
    let Devices { vsock, shares, disks, nets, console } = devices;
    let attach = |device: Box<dyn VirtioDevice>| function::attach(&pci, device, memory, vm);
    if let Some(vsock) = vsock {
        attach(Box::new(vsock))?;
    }
    let meters = shares.iter().map(Fs::meter).collect();
    for share in shares {
        // A vCPU waiting for the host's disk does not hold up the others.
        attach(Box::new(share.with_request_queues(config.vm.vcpus.into())))?;
    }
    if config.vm.free_page_reporting {
        attach(Box::new(Balloon))?;
    }
    // Slots, by serial.
    let disk = |(serial, disk): (String, Blk)| {
        Ok((serial, attach(Box::new(disk.with_queues(config.vm.vcpus.into())))?))
    };
    let disks = disks.into_iter().map(disk).collect::<Result<_, FunctionError>>()?;
    let nets = attach_nets(nets, &pci, memory, vm)?;
    let interrupt = vm.routes.connect_line(layout::SERIAL_GSI).map_err(BuildError::Serial)?;
    let serial = Serial::new(console, interrupt);
    timeline.reached("devices_attached");

    let more_vcpus = VcpuFactory::new(host, vm, config.vm.max_vcpus)?;
    let vcpus = create_vcpus(vm, &more_vcpus, config.vm.vcpus, loaded)?;
    if let Some(vcpu) = vcpus.first().filter(|_| host.can_post_writes()) {
        vm.start_posting(&vcpu.fd)?;
        vm.post_port_writes(CONFIG_ADDRESS_PORT)?;
    }
    timeline.reached("vcpus_created");

    let buses = Arc::new(Buses { pci, serial: Mutex::new(serial), vm: Arc::clone(vm) });
    Ok(Built { buses, vcpus, more_vcpus, shares: meters, disks, nets })
}

/// Makes a built machine the one that was saved: the interrupt controllers first,
/// which the vCPUs' local ones and the devices' interrupts rely on.
fn restore(state: MachineState, buses: &Buses, vcpus: &[Vcpu], possible: u8) -> Result<(), SnapshotError> {
    let MachineState { memory: _, max_vcpus, vm, vcpus: saved, pci, serial } = state;
    if (saved.len(), max_vcpus) != (vcpus.len(), possible) {
        return Err(SnapshotError::OtherMachine(format!(
            "{} of {max_vcpus} vCPUs instead of {} of {possible}",
            saved.len(),
            vcpus.len()
        )));
    }
    vm.restore(&buses.vm.fd).map_err(SnapshotError::other)?;
    for (vcpu, state) in vcpus.iter().zip(&saved) {
        state.restore(&vcpu.fd).map_err(SnapshotError::other)?;
    }
    buses.serial.lock().unwrap_or_else(PoisonError::into_inner).restore(serial);
    buses
        .pci
        .restore(pci)
        .map_err(|(slot, error)| SnapshotError::OtherMachine(format!("PCI slot {slot}: {error}")))
}

/// Puts kernel, initramfs, parameters and tables into memory.
fn load_guest(config: &CheckedConfig, memory: &GuestRam) -> Result<BootEntry, BuildError> {
    let size = config.vm.memory_mib << 20;
    let low_memory = size.min(layout::HOLE_START);
    let kernel = kernel::load(memory, &config.kernel, low_memory)
        .map_err(|source| BuildError::Kernel { path: config.vm.kernel.clone(), source })?;
    let initramfs = match (&config.initramfs, &config.vm.initramfs) {
        (Some(file), Some(path)) => {
            let loaded = initramfs::load(memory, file, kernel.end, low_memory);
            Some(loaded.map_err(|source| BuildError::Initramfs { path: path.clone(), source })?)
        }
        _ => None,
    };
    params::write_boot_params(memory, size, &config.cmdline, initramfs)?;
    params::write_gdt(memory)?;
    let pml4 = params::write_page_tables(memory)?;
    memory
        .write_slice(&mptable::table(config.vm.max_vcpus), GuestAddress(layout::MP_TABLE_START))
        .map_err(BuildError::MpTable)?;
    Ok(BootEntry { entry: kernel.entry, pml4 })
}

/// Puts the network interfaces on the bus.
fn attach_nets(
    nets: Vec<NetFiles>,
    pci: &PciBus,
    memory: &GuestRam,
    vm: &Arc<Vm>,
) -> Result<BTreeMap<u8, NetControl>, BuildError> {
    let attach = |NetFiles { config, taps, vhost }: NetFiles| {
        let slot = config.slot;
        let device = Net::new(&config, taps, vhost).map_err(|source| BuildError::Net { slot, source })?;
        let control = device.control();
        function::attach_at(pci, slot.into(), Box::new(device), memory, vm)?;
        Ok((slot, control))
    };
    nets.into_iter().map(attach).collect()
}

fn create_vcpus(
    vm: &Arc<Vm>,
    factory: &VcpuFactory,
    count: u8,
    loaded: impl FnOnce() -> Result<Option<BootEntry>, BuildError>,
) -> Result<Vec<Vcpu>, BuildError> {
    let vcpus = (0..count).map(|index| Vcpu::create(vm, index)).collect::<Result<Vec<_>, _>>()?;
    let boot = loaded()?;
    for vcpu in &vcpus {
        factory.configure(vcpu, boot.filter(|_| vcpu.index == 0))?;
    }
    Ok(vcpus)
}
