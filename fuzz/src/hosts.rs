//! What is read on the host: images, snapshots, what owners, clients, containerd and users say; and, of
//! the agent, what the shim says to it.

use std::ffi::CStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use oci_spec::runtime::LinuxSeccomp;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, SpecialFields};
use rvm_agent::container::seccomp::Filter;
use rvm_agent::container::{cgroup, create, devices, hooks, mounts, namespaces, rootfs, sysctl};
use rvm_agent::sandbox::network::State;
use rvm_protocol::agent;
use rvm_protocol::guest::{RelayTarget, StreamHeader};
use rvm_protocol::vmm::Response;
use rvm_shim::config::{Compat, Config};
use rvm_shim::mountinfo::MountTable;
use rvm_shim::options::Options;
use rvm_shim::rootfs::Layer;
use rvm_shim::rootfs::stack::{self, Mounts, Upper};
use rvm_shim::spec::{self, Bundle, PodConfig};
use rvm_shim::user_namespace::IdRange;
use rvm_shim::{metrics, seccomp};
use rvm_vmm::boot::{initramfs, kernel};
use rvm_vmm::control::socket::ReadOnlySocket;
use rvm_vmm::{memory, snapshot};

use crate::input::Input;

/// A file without a name that holds `data`.
fn file(data: &[u8]) -> Option<File> {
    const NAME: &CStr = c"rvm-fuzz";
    // SAFETY: a C string.
    let fd = unsafe { libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return None;
    }
    // SAFETY: it was just made.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(data).ok()?;
    Some(file)
}

/// A kernel, and an initramfs behind it.
pub fn image(data: &[u8]) {
    const MEMORY: u64 = 32 << 20;
    let (Some(file), Ok(memory)) = (file(data), memory::create(MEMORY)) else { return };
    if let Ok(loaded) = kernel::load(&memory, &file, MEMORY) {
        let _ = initramfs::load(&memory, &file, loaded.end, MEMORY);
    }
}

/// A saved machine.
pub fn saved(data: &[u8]) {
    const MEMORY: u64 = 32 << 20;
    let (Some(file), Ok(memory)) = (file(data), memory::create(MEMORY)) else { return };
    if let Ok(opened) = snapshot::open(file) {
        let _ = opened.map_memory(&memory);
    }
}

/// Lines of those who ask a monitor for its metrics.
pub fn control(data: &[u8]) {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else { return };
    let path = dir.path().join("control.sock");
    let Ok(mut socket) = ReadOnlySocket::bind(&path) else { return };
    let Ok(mut client) = UnixStream::connect(&path) else { return };
    let Some(fd) = socket.accept() else { return };
    let _ = client.set_nonblocking(true);
    for piece in data.chunks(4096) {
        let _ = client.write_all(piece);
        let mut metrics = || Response::Ok;
        if socket.serve(fd, &mut metrics) == rvm_vmm::control::Served::Closed {
            return;
        }
    }
}

/// A container's specification.
pub fn oci_spec(data: &[u8]) {
    let _ = Bundle::parse(Path::new("/nonexistent"), "fuzz", data, &Compat { ignore_labels: false });
}

/// A root file system's mounts as containerd sends them: types, sources and options, each a line, a mount a paragraph.
pub fn mounts(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let layer = |paragraph: &str| {
        let mut lines = paragraph.lines().map(str::to_owned);
        let (kind, source) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        Layer { kind, source, target: String::new(), options: lines.collect() }
    };
    let layers: Vec<Layer> = text.split("\n\n").map(layer).collect();
    let Ok(Mounts::Stack(stack)) = stack::read(&layers) else { return };
    for file in stack.files() {
        let text = file.to_str().unwrap_or_default();
        assert!(file.is_absolute() && !text.contains('\0'), "{file:?} is a file of the host's");
    }
    if let Upper::Disk(disk) = &stack.upper {
        assert!(disk.path.is_absolute() && disk.size_bytes.is_none_or(|bytes| bytes <= 16 << 40), "{disk:?}");
    }
    // Nothing that is written to is a layer of its own.
    assert!(stack.lower.len() < layers.len().max(2), "{stack:?}");
}

/// A process that is added, and limits that are changed.
pub fn exec(data: &[u8]) {
    let _ = spec::exec_process(data, &Compat { ignore_labels: true });
    let _ = spec::resources(data, &[]);
}

/// A seccomp profile, and what the agent says to what it becomes.
pub fn profile(data: &[u8]) {
    let Ok(profile) = serde_json::from_slice::<LinuxSeccomp>(data) else { return };
    if let Ok(compiled) = seccomp::compile(&profile) {
        // What the shim compiles the agent takes.
        Filter::new(&compiled).unwrap_or_else(|error| panic!("the agent refuses it: {error}"));
    }
}

/// Options of a runtime, and a pod's configuration, as containerd passes them.
pub fn options(data: &[u8]) {
    const TYPES: [&str; 5] = [
        "containerd.runc.v1.Options",
        "types.containerd.io/containerd.runc.v1.Options",
        "runtimeoptions.v1.Options",
        "runtime.v1.PodSandboxConfig",
        "anything",
    ];
    let mut input = Input::new(data);
    let type_url = input.one(&TYPES).unwrap_or_default().to_owned();
    let any = Any { type_url, value: input.rest().to_vec(), special_fields: SpecialFields::default() };
    let _ = Options::parse(Some(&any));
    let _ = PodConfig::parse("fuzz", Some(&any));
}

/// Configuration files, and what the host's kernel and its administrator's files say.
pub fn texts(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = Config::parse(text, "fuzz.toml");
    let _ = IdRange::parse_all(text);
    let mounts = MountTable::parse(text);
    let _ = mounts.holding(Path::new("/a/b"));
    let _ = mounts.within(Path::new("/a")).count();
}

/// What the shim asks of the agent for a container.
pub fn container_request(data: &[u8]) {
    let Ok(request) = agent::CreateContainerRequest::parse_from_bytes(data) else { return };
    let _ = create::check_process("process", &request.process);
    let _ = cgroup::check(&request.cgroup_path);
    let _ = rootfs::check(&request);
    let _ = sysctl::check(&request.sysctl);
    let _ = hooks::check("hooks", &request.create_container_hooks);
    let _ = request.seccomp.as_ref().map(Filter::new);
    let _ = namespaces::Namespaces::plan(&request, None);
    (0..).zip(&request.mounts).for_each(|(index, mount)| drop(mounts::Mount::plan(index, mount)));
    let planned: Result<Vec<_>, _> =
        (0..).zip(&request.devices).map(|(index, device)| devices::Device::plan(index, device)).collect();
    if let (Ok(planned), Some(mut resources)) = (planned, request.resources.clone().into_option()) {
        devices::renumber(&mut resources.device_rules, &request.devices, &planned);
    }
}

/// What the shim asks of the agent for a network.
pub fn network_request(data: &[u8]) {
    if let Ok(request) = agent::SyncNetworkRequest::parse_from_bytes(data) {
        let _ = State::new(&request);
    }
}

/// What a guest tells of a container, as containerd is told it.
pub fn statistics(data: &[u8]) {
    if let Ok(stats) = agent::ContainerStats::parse_from_bytes(data) {
        let _ = metrics::encode(&stats);
    }
}

/// The first lines of connections between shim and agent.
pub fn headers(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Some(header) = StreamHeader::parse(text) {
        assert_eq!(StreamHeader::parse(header.to_line().trim_end_matches('\n')), Some(header));
    }
    if let Some(target) = RelayTarget::parse(text) {
        assert!(target.address().ip().is_loopback());
    }
}
