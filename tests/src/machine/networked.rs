//! A machine with busybox in its guest: for what the monitor does with a real kernel
//! that drives its interfaces, and no container.

use std::{
    fs::File,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rootfs_builder::cpio::CpioWriter;
use rvm_protocol::{
    guest::DEFAULT_CMDLINE,
    vmm::{InheritedNet, Metrics, Request, Response, VmConfig},
};
use tempfile::TempDir;

use super::{Control, inherits};
use crate::{programs::BUSYBOX_INIT, scale, world::World};

/// What the guest runs: a shell, a sink that answers with the sum of what it took, and a
/// source, each at a port. An interface in PCI slot N has the address 10.0.N.2.
const INIT: &str = "interfaces
echo 0123456789abcde > /tmp/source
for i in $(seq 20); do cat /tmp/source /tmp/source > /tmp/twice; mv /tmp/twice /tmp/source; done
nc -ll -p 99 -e sh &
nc -ll -p 100 -e md5sum &
nc -ll -p 101 -e source &
echo '<0>up' > /dev/kmsg
while :; do sleep 1000; done
";
const INTERFACES: &str = r#"#!/bin/sh
for dev in /sys/bus/pci/devices/0000:00:*/virtio*/net/*; do
  slot=${dev#*0000:00:}
  ip addr add 10.0.$((0x${slot%%.*})).2/24 dev ${dev##*/}
  ip link set ${dev##*/} up
done 2>/dev/null
true
"#;
/// What [`Machine::download`] expects.
const SOURCE: &str = "#!/bin/sh\nexec cat /tmp/source\n";
const LINE: &[u8; 16] = b"0123456789abcde\n";
/// Bytes a source gives.
pub const DOWNLOAD: usize = 16 << 20;

/// A running monitor. Dropping it ends it.
pub struct Machine {
    dir: TempDir,
    child: Child,
    control: Control,
}

/// What a machine is to be.
pub struct Shape<'a> {
    /// MiB.
    pub memory: u64,
    /// MiB that can be plugged in.
    pub more: u64,
    /// vCPUs.
    pub vcpus: u8,
    /// Interfaces that are there from the start.
    pub nets: Vec<InheritedNet>,
    /// A machine that was saved, to go on with.
    pub restore: Option<&'a Path>,
}

impl Machine {
    /// Starts a monitor, which inherits the descriptors that `shape` names.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(world: &World, shape: Shape<'_>) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("rvm-machine").tempdir()?;
        let busybox = std::fs::read(world.rootfs()?.join("bin/busybox"))?;
        std::fs::write(dir.path().join("initramfs"), initramfs(&busybox)?)?;
        let inherited: Vec<RawFd> =
            shape.nets.iter().flat_map(|net| net.taps.iter().chain(&net.vhost)).copied().collect();
        let config = VmConfig {
            id: "bare".into(),
            vcpus: shape.vcpus,
            max_vcpus: 0,
            memory_mib: shape.memory,
            hotplug_memory_mib: shape.more,
            hugetlb_memory_mib: 0,
            pmem_mib: 0,
            huge_pages: false,
            free_page_reporting: false,
            kernel: world.stage().kernel(),
            cmdline: DEFAULT_CMDLINE.into(),
            initramfs: Some("initramfs".into()),
            console_log: Some("console.log".into()),
            control_socket: None,
            vsock: None,
            shares: Vec::new(),
            disks: Vec::new(),
            nets: shape.nets,
            jail: None,
        };
        std::fs::write(dir.path().join("vm.json"), serde_json::to_vec(&config)?)?;
        let (control, monitors) = Control::pair()?;
        let mut command = Command::new(world.stage().monitor());
        command.args(["--config", "vm.json", "--log-level", "info"]);
        command.args(["--control-fd", &monitors.as_raw_fd().to_string()]);
        if let Some(snapshot) = shape.restore {
            command.arg("--restore").arg(snapshot);
        }
        command.current_dir(dir.path()).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(dir.path().join("log"))?);
        let mut fds = inherited;
        fds.push(monitors.as_raw_fd());
        inherits(&mut command, fds);
        Ok(Self { dir, child: command.spawn()?, control })
    }

    /// Waits until the guest has set itself up.
    ///
    /// # Errors
    /// When it does not.
    pub fn wait_up(&mut self) -> Result<()> {
        let started = Instant::now();
        loop {
            let console = self.read("console.log");
            if console.lines().any(|line| line.ends_with("] up")) {
                return Ok(());
            }
            let ended = self.child.try_wait()?;
            if ended.is_some() || started.elapsed() > scale::container() {
                bail!("the guest is not up ({ended:?}): {console}\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What the monitor logged.
    pub fn log(&self) -> String {
        self.read("log")
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default()
    }

    /// The monitor's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks the monitor, with descriptors attached.
    ///
    /// # Errors
    /// When it refuses or does not answer.
    pub fn ask(&mut self, request: Request, fds: &[OwnedFd]) -> Result<Response> {
        let answer = self.control.ask(request, fds, scale::command());
        let answer = answer.with_context(|| format!("{}\n{}", self.read("console.log"), self.log()))?;
        match answer {
            Response::Error { message } => bail!("the monitor: {message}"),
            response => Ok(response),
        }
    }

    /// The monitor's counters.
    ///
    /// # Errors
    /// When it does not tell.
    pub fn metrics(&mut self) -> Result<Metrics> {
        match self.ask(Request::Metrics, &[])? {
            Response::Metrics(metrics) => Ok(metrics),
            other => bail!("{other:?}"),
        }
    }

    /// Runs a script in the guest, reached at an interface; its output.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub fn shell(&self, slot: u8, script: &str) -> Result<String> {
        let mut stream = connect(slot, 99)?;
        stream.write_all(format!("{{ {script}\n}} 2>&1; exit\n").as_bytes())?;
        let mut output = String::new();
        stream.read_to_string(&mut output).with_context(|| format!("{script}: {output}"))?;
        Ok(output)
    }

    /// Sends so many bytes to the guest and compares what it says it got; the time it took.
    ///
    /// # Errors
    /// When something is lost.
    pub fn upload(&self, slot: u8, bytes: usize) -> Result<Duration> {
        let mut stream = connect(slot, 100)?;
        let sent: Vec<u8> = LINE.iter().copied().cycle().take(bytes).collect();
        let started = Instant::now();
        stream.write_all(&sent)?;
        stream.shutdown(Shutdown::Write)?;
        let mut sum = String::new();
        stream.read_to_string(&mut sum)?;
        let took = started.elapsed();
        let expected = md5(&sent)?;
        ensure!(sum.split_whitespace().next() == Some(expected.as_str()), "{sum:?} instead of {expected}");
        Ok(took)
    }

    /// Takes [`DOWNLOAD`] bytes from the guest, each as it should be; the time it took.
    ///
    /// # Errors
    /// When something is lost.
    pub fn download(&self, slot: u8) -> Result<Duration> {
        let started = Instant::now();
        self.begin_download(slot)?.finish()?;
        Ok(started.elapsed())
    }

    /// Begins to take [`DOWNLOAD`] bytes from the guest.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub fn begin_download(&self, slot: u8) -> Result<Download> {
        Ok(Download { stream: connect(slot, 101)?, received: Vec::new() })
    }
}

/// Bytes that come from the guest.
pub struct Download {
    stream: TcpStream,
    received: Vec<u8>,
}

impl Download {
    /// Waits for the first of them.
    ///
    /// # Errors
    /// When none come.
    pub fn some(&mut self) -> Result<()> {
        let mut some = [0; 4096];
        let count = self.stream.read(&mut some)?;
        self.received.extend_from_slice(&some[..count]);
        Ok(())
    }

    /// Takes the rest.
    ///
    /// # Errors
    /// When something is lost.
    pub fn finish(&mut self) -> Result<()> {
        self.stream.read_to_end(&mut self.received)?;
        ensure!(self.received.len() == DOWNLOAD, "{} bytes", self.received.len());
        ensure!(self.received.chunks(LINE.len()).all(|line| line == LINE), "other bytes than were sent");
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection to the guest through the interface in a slot.
fn connect(slot: u8, port: u16) -> Result<TcpStream> {
    let address = SocketAddr::from(([10, 0, slot, 2], port));
    let started = Instant::now();
    loop {
        match TcpStream::connect_timeout(&address, scale::command()) {
            Ok(stream) => {
                stream.set_read_timeout(Some(scale::container()))?;
                stream.set_write_timeout(Some(scale::container()))?;
                return Ok(stream);
            }
            // The guest's server begins to listen a moment after it said so.
            Err(_) if started.elapsed() < scale::command() => std::thread::sleep(Duration::from_millis(20)),
            Err(error) => return Err(error).with_context(|| address.to_string()),
        }
    }
}

fn md5(bytes: &[u8]) -> Result<String> {
    let mut child =
        Command::new("md5sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("md5sum")?;
    child.stdin.take().context("md5sum")?.write_all(bytes)?;
    let output = child.wait_with_output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().next().context("md5sum says nothing")?.to_owned())
}

fn initramfs(busybox: &[u8]) -> Result<Vec<u8>> {
    let mut cpio = CpioWriter::new(Vec::new());
    for dir in ["bin", "dev", "proc", "sys", "tmp"] {
        cpio.dir(dir, 0o755)?;
    }
    cpio.char_device("dev/console", 0o600, 5, 1)?;
    cpio.file("bin/busybox", 0o755, busybox)?;
    cpio.symlink("bin/sh", "busybox")?;
    cpio.file("init", 0o755, format!("{BUSYBOX_INIT}{INIT}").as_bytes())?;
    cpio.file("bin/interfaces", 0o755, INTERFACES.as_bytes())?;
    cpio.file("bin/source", 0o755, SOURCE.as_bytes())?;
    Ok(cpio.finish()?)
}
