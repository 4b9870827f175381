//! A sandbox on this machine, and clients of it.

use std::{fs, path::Path, sync::Arc, time::Duration};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use protobuf::MessageField;
use rvm_agent::{
    container::shared::Wanted,
    error::Error,
    init::mounts::MOUNT_POINT,
    io,
    reaper::Exit,
    sandbox::{Sandbox, network::Network},
};
use rvm_protocol::{
    agent::{
        Capabilities, ConsoleSize, CreateContainerRequest, CreateExecRequest, Mount, Namespace,
        NamespaceType, Process, ProcessRef, Rootfs,
    },
    guest::{self, Stream, StreamHeader},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use crate::network::Veths;

/// Path below the layers of the image.
const IMAGE: &str = "image/rootfs";
/// What containerd gives a container by default.
const DEFAULT_CAPABILITIES: u64 = 0xa804_25fb;

/// As much of [`rvm_agent::init::boot`] as a test needs: mount and network namespaces, with a cgroup hierarchy, a share and room for the scratch.
pub fn prepare_machine() {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).expect("mount and network namespaces");
    rvm_agent::sys::process::raise_descriptor_limit().expect("many descriptors");
    // As of PID 1, orphans become children of this process.
    // SAFETY: takes an integer.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }, 0, "a subreaper");
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).expect("a private mount namespace");
    // The image: this machine's own root file system, without what is mounted on it.
    let image = Path::new("/tmp").join(format!("rvm-agent-test-{}", std::process::id()));
    fs::create_dir_all(&image).expect("a directory");
    mount(Some("/"), &image, none, MsFlags::MS_BIND, none).expect("the root file system a second time");
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).expect("a fresh /run");
    let layers = Path::new(guest::LAYERS_DIR).join(IMAGE);
    fs::create_dir_all(&layers).expect("a place for layers");
    mount(Some(&image), &layers, none, MsFlags::MS_MOVE, none).expect("the image as layers");
    fs::remove_dir(&image).expect("an empty directory");
    fs::create_dir_all(MOUNT_POINT).expect("a place for root file systems");
    rvm_agent::storage::prepare().expect("a place for scratches");
    mount(Some("cgroup2"), "/sys/fs/cgroup", Some("cgroup2"), MsFlags::empty(), none).expect("cgroup v2");
}

/// Kernel parameters of the sandbox's namespaces, as no namespace has them by itself.
pub const SYSCTL: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "81"), ("kernel.shm_rmid_forced", "1")];

/// The sandbox, with the tasks the agent runs beside it.
pub struct Machine {
    pub sandbox: Arc<Sandbox>,
}

impl Machine {
    pub fn new() -> Self {
        let network = Network::new(Box::new(Veths));
        let sysctl = SYSCTL.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let wanted = Wanted { pid: true, sysctl, ..Wanted::default() };
        let sandbox = Sandbox::already_set_up(wanted).with_network(network);
        let sandbox = Arc::new(sandbox);
        let reaping = Arc::clone(&sandbox);
        tokio::spawn(async move { reaping.reaper().run().await });
        Self { sandbox }
    }

    /// Makes a container and attaches its output.
    pub async fn create(&self, request: CreateContainerRequest) -> Result<Running, Error> {
        let (id, spec) = (request.container_id.clone(), (*request.process).clone());
        self.sandbox.create_container(request).await?;
        Ok(self.attach(reference(&id, ""), &spec))
    }

    /// Registers an added process and attaches its output.
    pub fn create_exec(&self, container: &str, exec: &str, process: Process) -> Result<Running, Error> {
        self.sandbox.create_exec(CreateExecRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            process: MessageField::some(process.clone()),
            ..Default::default()
        })?;
        Ok(self.attach(reference(container, exec), &process))
    }

    fn attach(&self, process: ProcessRef, spec: &Process) -> Running {
        let connect = |stream| self.connect(&process, stream);
        Running {
            sandbox: Arc::clone(&self.sandbox),
            terminal: spec.terminal.then(|| connect(Stream::Terminal)),
            stdin: (spec.stdin && !spec.terminal).then(|| connect(Stream::Stdin)),
            stdout: (spec.stdout && !spec.terminal).then(|| connect(Stream::Stdout)),
            stderr: (spec.stderr && !spec.terminal).then(|| connect(Stream::Stderr)),
            process,
        }
    }

    /// A connection as the host makes it.
    fn connect(&self, process: &ProcessRef, stream: Stream) -> UnixStream {
        let (host, guest) = UnixStream::pair().expect("a socket pair");
        let sandbox = Arc::clone(&self.sandbox);
        tokio::spawn(async move { io::serve(guest, |header| sandbox.attach(header)).await });
        let header = StreamHeader {
            container_id: process.container_id.clone(),
            exec_id: process.exec_id.clone(),
            stream,
        };
        host.try_write(header.to_line().as_bytes()).expect("room for a line");
        host
    }

    /// Makes and runs a container whose program is `sh -c script`, to its end and deletion.
    pub async fn run(&self, id: &str, script: &str) -> Output {
        self.run_request(container(id, shell(script))).await.expect("the container runs")
    }

    /// Makes and runs a container to its end and deletion.
    pub async fn run_request(&self, request: CreateContainerRequest) -> Result<Output, Error> {
        let mut running = self.create(request).await?;
        running.start().await?;
        let output = running.finish().await;
        running.delete().await?;
        Ok(output)
    }
}

/// A process with its streams as the host has them.
pub struct Running {
    sandbox: Arc<Sandbox>,
    pub process: ProcessRef,
    pub stdin: Option<UnixStream>,
    pub stdout: Option<UnixStream>,
    pub stderr: Option<UnixStream>,
    pub terminal: Option<UnixStream>,
}

/// What a process left.
#[derive(Debug)]
pub struct Output {
    pub code: u32,
    pub stdout: String,
    pub stderr: String,
}

impl Running {
    pub async fn start(&self) -> Result<u32, Error> {
        self.sandbox.start_process(&self.process).await
    }

    pub async fn wait(&self) -> Exit {
        self.sandbox.wait_process(&self.process).await.expect("an exit")
    }

    pub async fn delete(&self) -> Result<(), Error> {
        self.sandbox.delete_process(&self.process).await
    }

    /// Reads everything to its end and waits.
    pub async fn finish(&mut self) -> Output {
        let (stdout, stderr) = tokio::join!(read_all(self.stdout.take()), read_all(self.stderr.take()));
        let exit = self.wait().await;
        Output { code: exit.code, stdout, stderr }
    }
}

/// Everything a stream carries after the agent's `ok`.
pub async fn read_all(stream: Option<UnixStream>) -> String {
    let Some(mut stream) = stream else { return String::new() };
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.expect("a stream");
    let all = String::from_utf8_lossy(&all).into_owned();
    match all.strip_prefix("ok\n") {
        Some(content) => content.to_owned(),
        None => panic!("the agent answered {all:?}"),
    }
}

/// Reads until `wanted` has been seen.
pub async fn read_until(stream: &mut UnixStream, wanted: &str) -> String {
    let mut seen = String::new();
    let mut buffer = [0; 4096];
    while !seen.contains(wanted) {
        let read = tokio::time::timeout(Duration::from_secs(30), stream.read(&mut buffer)).await;
        let Ok(read) = read else { panic!("the stream stands still after {seen:?}, before {wanted:?}") };
        let length = read.expect("a stream");
        assert!(length > 0, "the stream ended after {seen:?}, before {wanted:?}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
    seen
}

/// Writes everything and half-closes.
pub async fn write_all(stream: &mut UnixStream, bytes: &[u8]) {
    stream.write_all(bytes).await.expect("a stream");
    stream.shutdown().await.expect("a half-close");
}

pub fn reference(container: &str, exec: &str) -> ProcessRef {
    ProcessRef { container_id: container.into(), exec_id: exec.into(), ..Default::default() }
}

/// `sh -c script` with all output asked for and containerd's default capabilities.
pub fn shell(script: &str) -> Process {
    program(&["/bin/sh", "-c", script])
}

pub fn program(args: &[&str]) -> Process {
    Process {
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        env: vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into()],
        cwd: "/".into(),
        console_size: MessageField::some(ConsoleSize { width: 91, height: 17, ..Default::default() }),
        capabilities: MessageField::some(Capabilities {
            bounding: DEFAULT_CAPABILITIES,
            effective: DEFAULT_CAPABILITIES,
            permitted: DEFAULT_CAPABILITIES,
            ..Default::default()
        }),
        no_new_privileges: true,
        stdout: true,
        stderr: true,
        ..Default::default()
    }
}

pub fn namespace(kind: NamespaceType) -> Namespace {
    Namespace { type_: kind.into(), ..Default::default() }
}

pub fn mount_of(destination: &str, fs_type: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        destination: destination.into(),
        type_: fs_type.into(),
        source: source.into(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Default::default()
    }
}

/// What containerd asks for by default.
pub fn container(id: &str, process: Process) -> CreateContainerRequest {
    use NamespaceType::{CGROUP, IPC, MOUNT, NETWORK, PID, UTS};
    CreateContainerRequest {
        container_id: id.into(),
        rootfs: MessageField::some(Rootfs { share_path: IMAGE.into(), ..Default::default() }),
        mounts: vec![
            mount_of("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount_of("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount_of(
                "/dev/pts",
                "devpts",
                "devpts",
                &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            ),
            mount_of("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount_of("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount_of("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount_of("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
            mount_of("/run", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ],
        namespaces: [PID, IPC, UTS, MOUNT, NETWORK, CGROUP].into_iter().map(namespace).collect(),
        hostname: "inside".into(),
        process: MessageField::some(process),
        masked_paths: vec![
            "/proc/version".into(),
            "/proc/keys".into(),
            "/sys/firmware".into(),
            "/nonexistent".into(),
        ],
        readonly_paths: vec!["/proc/sys".into(), "/proc/bus".into()],
        cgroup_path: format!("/rvm-agent-test-{}/{id}", std::process::id()),
        ..Default::default()
    }
}

/// Fails a case that hangs.
pub async fn within<T>(limit: Duration, case: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(limit, case).await.ok()
}
