//! The guest's side of the monitor: devices through their queues, everything else through ports and
//! device memory.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use rvm_protocol::vmm::{CachePolicy, NetConfig, ShareConfig, VsockConfig};
use rvm_vmm::buses::Buses;
use rvm_vmm::devices::legacy::serial::Serial;
use rvm_vmm::devices::virtio::balloon::Balloon;
use rvm_vmm::devices::virtio::blk::Blk;
use rvm_vmm::devices::virtio::fs::Fs;
use rvm_vmm::devices::virtio::mem::Mem;
use rvm_vmm::devices::virtio::net::Net;
use rvm_vmm::devices::virtio::pmem::Pmem;
use rvm_vmm::devices::virtio::vsock::Vsock;
use rvm_vmm::kvm::{Host, Vm};
use rvm_vmm::memory;
use rvm_vmm::pci::virtio::function;
use rvm_vmm::pci::{PciBus, bar_address};
use tempfile::TempDir;

use crate::driver::drive;
use crate::input::Input;

const SECTOR: u64 = 512;
const SECTORS: u64 = 64;
const DISK: &str = "disk";

thread_local! {
    static DIR: RefCell<Option<TempDir>> = const { RefCell::new(None) };
}

/// Runs with a directory that is removed when the process ends in order.
fn with_dir(run: impl FnOnce(&Path)) {
    DIR.with_borrow_mut(|dir| {
        if dir.is_none() {
            *dir = tempfile::Builder::new().prefix("rvm-fuzz").tempdir_in("/dev/shm").ok();
        }
        if let Some(dir) = dir.as_ref() {
            run(dir.path());
        }
    });
}

/// Names as a guest may choose them.
const NAMES: [&[u8]; 10] =
    [b"a\0", b"b\0", b"dir\0", b"link\0", b"..\0", b".\0", b"\0", b"a/b\0", b"/etc/passwd\0", b"no end"];

fn name(input: &mut Input<'_>) -> Vec<u8> {
    match input.u8() {
        // Longer than any file system's.
        255 => [vec![b'x'; usize::from(input.u16())], vec![0]].concat(),
        byte => NAMES.get(usize::from(byte) % NAMES.len()).copied().unwrap_or_default().to_vec(),
    }
}

/// FUSE's requests: what follows their header, as sizes of numbers, and names behind them.
const OPERATIONS: [(u32, usize, usize); 36] = [
    (1, 0, 1),
    (2, 8, 0),
    (3, 16, 0),
    (4, 88, 0),
    (5, 0, 0),
    (6, 0, 2),
    (8, 16, 1),
    (9, 8, 1),
    (10, 0, 1),
    (11, 0, 1),
    (12, 8, 2),
    (13, 8, 1),
    (14, 8, 0),
    (15, 40, 0),
    (16, 40, 1),
    (17, 0, 0),
    (18, 24, 0),
    (20, 16, 0),
    (21, 8, 2),
    (22, 8, 1),
    (23, 8, 0),
    (24, 0, 1),
    (25, 24, 0),
    (26, 16, 0),
    (27, 8, 0),
    (28, 40, 0),
    (29, 24, 0),
    (30, 16, 0),
    (35, 16, 1),
    (39, 32, 0),
    (42, 8, 0),
    (43, 32, 0),
    (44, 40, 0),
    (45, 16, 2),
    (46, 24, 0),
    (51, 16, 1),
];

fn fuse(input: &mut Input<'_>) -> Vec<u8> {
    let (opcode, numbers, names) = match input.u8() {
        250.. => (input.u32(), usize::from(input.u8()), 0),
        byte => OPERATIONS.get(usize::from(byte) % OPERATIONS.len()).copied().unwrap_or_default(),
    };
    let node = match input.u8() {
        250.. => input.u64(),
        byte => u64::from(byte % 8),
    };
    let mut body = input.bytes(numbers).to_vec();
    body.resize(numbers, 0);
    if numbers >= 8 && input.u8() % 4 != 3 {
        // Handles that were given out are small.
        let handle = u64::from(input.u8() % 8).to_le_bytes();
        body.splice(..8, handle);
    }
    (0..names).for_each(|_| body.extend(name(input)));
    let length = if input.u8() == 255 { input.u32() } else { 40 + body.len() as u32 };
    let mut message = Vec::with_capacity(40 + body.len());
    message.extend(length.to_le_bytes());
    message.extend(opcode.to_le_bytes());
    message.extend(1_u64.to_le_bytes());
    message.extend(node.to_le_bytes());
    let owner = u32::from(input.u8() % 2) * 1000;
    [owner, owner, 1, 0].iter().for_each(|number| message.extend(number.to_le_bytes()));
    message.extend(body);
    message
}

/// FUSE over a tree of real files.
pub fn fs(data: &[u8]) {
    let (mode, data) = data.split_first().unwrap_or((&0, &[]));
    with_dir(|dir| {
        let share = dir.join("share");
        let _ = fs::remove_dir_all(&share);
        let made = fs::create_dir_all(share.join("dir"))
            .and_then(|()| fs::write(share.join("a"), "content"))
            .and_then(|()| fs::write(dir.join("secret"), "secret"))
            .and_then(|()| std::os::unix::fs::symlink("../secret", share.join("link")));
        let cache = if mode & 2 == 0 { CachePolicy::Auto } else { CachePolicy::Always };
        let config = ShareConfig { tag: "fuzz".into(), dir: share.clone(), readonly: mode & 1 != 0, cache };
        let (Ok(()), Ok(mut device)) = (made, Fs::new(&config)) else { return };
        // The driver asks first what both can do.
        let init =
            [&[0; 9][..], &[0, 0, 0, 0, 23, 1], &[7, 0, 0, 0, 38, 0, 0, 0, 0, 0, 2, 0, 255, 255, 255, 191]]
                .concat();
        drive(&mut device, &[0, 1], fuse, &[&init, data].concat());
        let secret = fs::read(dir.join("secret")).unwrap_or_default();
        assert_eq!(secret, b"secret", "a file beside the share was changed");
        if mode & 1 != 0 {
            let content = fs::read(share.join("a")).unwrap_or_default();
            assert_eq!(content, b"content", "a file of a share that is read-only was changed");
        }
    });
}

fn block(input: &mut Input<'_>) -> Vec<u8> {
    let kind = [0_u32, 1, 4, 8, 11, 13, 99];
    let kind = input.one(&kind).unwrap_or_default();
    let sector = if input.u8() == 255 { input.u64() } else { u64::from(input.u8() % 80) };
    let mut message = [kind.to_le_bytes(), [0; 4]].concat();
    message.extend(sector.to_le_bytes());
    if matches!(kind, 11 | 13) {
        let count = usize::from(input.u8() % 3);
        for _ in 0..count {
            message.extend(u64::from(input.u16()).to_le_bytes());
            message.extend(input.u32().to_le_bytes());
            message.extend(u32::from(input.u8()).to_le_bytes());
        }
    } else {
        message.extend(input.bytes(usize::from(kind == 1) * 512));
    }
    message
}

/// An empty disk.
fn disk(dir: &Path) -> Option<File> {
    let file =
        File::options().read(true).write(true).create(true).truncate(true).open(dir.join(DISK)).ok()?;
    file.set_len(SECTORS * SECTOR).ok()?;
    Some(file)
}

/// Requests to a disk.
pub fn blk(data: &[u8]) {
    let (mode, data) = data.split_first().unwrap_or((&0, &[]));
    with_dir(|dir| {
        let Some(file) = disk(dir) else { return };
        let readonly = mode & 1 != 0;
        let Ok(mut device) = Blk::new("fuzz", file, readonly) else { return };
        drive(&mut device, &[0], block, data);
        let content = fs::read(dir.join(DISK)).unwrap_or_default();
        assert_eq!(content.len() as u64, SECTORS * SECTOR, "the disk has another size");
        assert!(
            !readonly || content.iter().all(|byte| *byte == 0),
            "a disk that is read-only was written to"
        );
    });
}

fn packet(input: &mut Input<'_>) -> Vec<u8> {
    let cid = |input: &mut Input<'_>, usual: u64| if input.u8() == 255 { input.u64() } else { usual };
    let (source, destination) = (cid(input, 3), cid(input, 2));
    let ports = [input.u8() % 4, input.u8() % 4].map(|port| 1024 + u32::from(port));
    let op = u16::from(input.u8() % 9);
    let count = usize::from(input.u8());
    let payload = input.bytes(count).to_vec();
    let length = if input.u8() == 255 { input.u32() } else { payload.len() as u32 };
    let mut message = [source.to_le_bytes(), destination.to_le_bytes()].concat();
    ports.iter().for_each(|port| message.extend(port.to_le_bytes()));
    message.extend(length.to_le_bytes());
    message.extend(if input.u8() == 255 { 2_u16 } else { 1 }.to_le_bytes());
    message.extend(op.to_le_bytes());
    message.extend(u32::from(input.u8() % 4).to_le_bytes());
    let credit = if input.u8() & 1 == 0 { [65536, 0] } else { [input.u32(), input.u32()] };
    credit.iter().for_each(|number| message.extend(number.to_le_bytes()));
    message.extend(payload);
    message
}

/// Packets of vsock, with a program of the host's that listens and says something.
pub fn vsock(data: &[u8]) {
    with_dir(|dir| {
        let dir = dir.join("vsock");
        let _ = fs::remove_dir_all(&dir);
        let config = VsockConfig { guest_cid: 3, socket: dir.join("v.sock") };
        if fs::create_dir(&dir).is_err() {
            return;
        }
        let Ok(listener) = UnixListener::bind(dir.join("v.sock_1024")) else { return };
        let _ = listener.set_nonblocking(true);
        let Ok(mut device) = Vsock::new(&config) else { return };
        drive(&mut device, &[1], packet, data);
        while let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.write_all(b"hello");
        }
    });
}

fn frame(input: &mut Input<'_>) -> Vec<u8> {
    let mut message;
    if input.u8() % 3 == 2 {
        // To the control queue: class, command, and what it says.
        message = vec![input.u8() % 7, input.u8() % 4];
        message.extend(input.bytes(64));
    } else {
        message = vec![input.u8() % 4, input.u8() % 8];
        [input.u16(), input.u16(), input.u16(), input.u16(), 0]
            .iter()
            .for_each(|n| message.extend(n.to_le_bytes()));
        message.extend([0xff; 6]);
        message.extend([2, 0, 0, 0, 0, 9]);
        message.extend(input.one(&[[8, 0], [8, 6], [0x86, 0xdd], [0x81, 0]]).unwrap_or_default());
        message.extend(input.bytes(200));
    }
    message
}

/// A tap in a network namespace of this process's, made once; none where it cannot be made.
fn tap() -> Option<File> {
    static TAP: OnceLock<Option<File>> = OnceLock::new();
    TAP.get_or_init(make_tap).as_ref()?.try_clone().ok()
}

fn make_tap() -> Option<File> {
    // SAFETY: takes flags.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return None;
    }
    let tap = File::options().read(true).write(true).open("/dev/net/tun").ok()?;
    // SAFETY: a C structure of integers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: a request of the size it reads and fills.
    let set = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    (set == 0).then_some(tap)
}

/// Frames and commands to a network interface.
pub fn net(data: &[u8]) {
    let Some(tap) = tap() else { return };
    let config = NetConfig {
        slot: 24,
        mac: [2, 0, 0, 0, 0, 9],
        mtu: 1500,
        queue_pairs: 1,
        receive: None,
        transmit: None,
    };
    let Ok(mut device) = Net::new(&config, vec![tap], Vec::new()) else { return };
    drive(&mut device, &[1, 2], frame, data);
}

fn blocks(input: &mut Input<'_>) -> Vec<u8> {
    let mut message = u64::from(input.u8() % 5).to_le_bytes().to_vec();
    let address = if input.u8() == 255 { input.u64() } else { (4 << 30) + u64::from(input.u8()) * (2 << 20) };
    message.extend(address.to_le_bytes());
    message.extend(input.u16().to_le_bytes());
    message.extend([0; 6]);
    message
}

/// Requests to plug memory.
pub fn mem(data: &[u8]) {
    let shape = memory::Shape { boot: 2 << 20, more: 64 << 20, ..memory::Shape::default() };
    let Ok(memory) = memory::create_shaped(shape) else { return };
    let mut device = Mem::new(&memory, memory::Room::Memory);
    drive(&mut device, &[0], blocks, data);
}

/// Ranges that are told to be free, the rings' own among them.
pub fn balloon(data: &[u8]) {
    drive(&mut Balloon, &[], |input| input.bytes(16).to_vec(), data);
}

fn flush(input: &mut Input<'_>) -> Vec<u8> {
    let kind = if input.u8().is_multiple_of(4) { input.u32() } else { 0 };
    let count = usize::from(input.u8() % 8);
    [&kind.to_le_bytes()[..], input.bytes(count)].concat()
}

/// Requests to a file that is memory.
pub fn pmem(data: &[u8]) {
    drive(&mut Pmem::new(4 << 30..(4 << 30) + (2 << 20)), &[0], flush, data);
}

/// A VM, made once.
fn vm() -> Option<Arc<Vm>> {
    static VM: OnceLock<Option<Arc<Vm>>> = OnceLock::new();
    VM.get_or_init(|| Host::open().ok()?.create_vm(1).ok().map(Arc::new)).clone()
}

/// Ports, configuration spaces, BARs, MSI-X and the common configuration of a device, in any order;
/// none where there is no KVM.
pub fn buses(data: &[u8]) {
    let Some(vm) = vm() else { return };
    with_dir(|dir| {
        let Some(disk) = disk(dir) else { return };
        let (Ok(memory), Ok(disk), Ok(event)) =
            (memory::create(2 << 20), Blk::new("fuzz", disk, false), vmm_sys_util::eventfd::EventFd::new(0))
        else {
            return;
        };
        let pci = PciBus::default();
        let Ok(slot) = function::attach(&pci, Box::new(disk), &memory, &vm) else { return };
        let buses = Buses { pci, serial: Mutex::new(Serial::new(None, event)), vm: Arc::clone(&vm) };
        access(&buses, slot, data);
        buses.pci.shut_down(Instant::now() + Duration::from_secs(10));
    });
}

fn access(buses: &Buses, slot: usize, data: &[u8]) {
    let mut input = Input::new(data);
    let bar = bar_address(slot);
    while !input.is_over() {
        let what = input.u8();
        let length = 1 << (what >> 4 & 3);
        let mut value = vec![0; length];
        match what & 7 {
            0 | 1 => {
                // A register of the function's configuration space, then what is read or written there.
                let register = 0x8000_0000 | (slot as u32) << 11 | u32::from(input.u8() & !3);
                buses.write_port(0xcf8, &register.to_le_bytes());
                let port = 0xcfc + u16::from(input.u8() & 3);
                if what & 1 == 0 {
                    buses.read_port(port, &mut value);
                } else {
                    buses.write_port(port, input.bytes(length));
                }
            }
            2 | 3 => {
                // The common configuration and what follows it.
                let address = bar + u64::from(input.u16()) % 0x4000;
                if what & 1 == 0 {
                    buses.read_memory(address, &mut value);
                } else {
                    buses.write_memory(address, input.bytes(length));
                }
            }
            4 => {
                // A step of a driver's that starts the device.
                let status = bar + 20;
                buses.write_memory(status, &[input.one(&[0, 1, 3, 11, 15, 0x80]).unwrap_or(0)]);
            }
            5 => {
                let address = input.u64();
                buses.read_memory(address, &mut value);
                buses.write_memory(address, input.bytes(length));
            }
            6 => {
                buses.read_port(input.u16(), &mut value);
            }
            _ => {
                let port = if what & 8 == 0 { 0x3f8 + u16::from(input.u8() & 7) } else { input.u16() };
                buses.write_port(port, input.bytes(length.min(4)));
            }
        }
    }
}
