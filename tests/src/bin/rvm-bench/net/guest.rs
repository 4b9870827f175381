//! A guest on the benchmark's bridge: a container under runc or rvm, or QEMU's `microvm`.
//! In each the same programs serve: iperf3, an echo and a shell.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rootfs_builder::cpio::CpioWriter;
use rvm_tests::{
    cni::Namespace,
    ctr::Run,
    job::{Input, Job},
    programs::{self, BUSYBOX_INIT},
    sandbox::Sandbox,
    scale,
    stage::RUNTIME,
    world::{World, shell},
};
use tempfile::TempDir;

use crate::{RUNC, peer};

/// The bridge, with the host's address on it.
const BRIDGE: &str = "rvmbench";
/// Ports of the guests' servers.
const ECHO_PORT: u16 = 5207;
const SHELL_PORT: u16 = 5299;
/// Where guests have [`Programs`].
const DIR: &str = "/net";
/// What every guest runs, its interface being up.
const SERVE: &str =
    "nc -ll -p 5207 -e cat < /dev/null & nc -ll -p 5299 -e sh < /dev/null & exec /net/iperf3 -s";
/// QEMU's guest: the kernel hands `address` on from its command line.
const INIT: &str = "ip addr add $address dev eth0
ip link set eth0 up
";

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A container's own veth.
    Runc,
    /// Frames moved by the host's kernel.
    RvmVhost,
    /// Frames moved by the monitor.
    RvmUserSpace,
    /// The same kernel in QEMU's `microvm`, with vhost-net.
    Qemu,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Runc, Self::RvmVhost, Self::RvmUserSpace, Self::Qemu];

    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::RvmVhost => "rvm, vhost",
            Self::RvmUserSpace => "rvm, user space",
            Self::Qemu => "qemu, vhost",
        }
    }
}

/// iperf3 with the libraries it needs, in a directory that containers are given, and in an
/// initramfs for QEMU.
pub struct Programs {
    dir: PathBuf,
    initramfs: PathBuf,
    kernel: PathBuf,
}

impl Programs {
    pub fn collect(world: &World, kernel: PathBuf) -> Result<Self> {
        let dir = world.dir().join("net");
        fs::create_dir_all(&dir)?;
        programs::copy(Path::new("/usr/bin/iperf3"), &dir, DIR)?;
        let initramfs = world.dir().join("net.cpio");
        fs::write(&initramfs, pack(&dir, &world.rootfs()?.join("bin/busybox"))?)?;
        Ok(Self { dir, initramfs, kernel })
    }
}

fn pack(dir: &Path, busybox: &Path) -> Result<Vec<u8>> {
    let mut cpio = CpioWriter::new(Vec::new());
    for dir in ["bin", "dev", "net", "net/lib", "proc", "sys", "tmp"] {
        cpio.dir(dir, 0o755)?;
    }
    cpio.char_device("dev/console", 0o600, 5, 1)?;
    cpio.file("bin/busybox", 0o755, &fs::read(busybox)?)?;
    cpio.symlink("bin/sh", "busybox")?;
    cpio.file("init", 0o755, format!("{BUSYBOX_INIT}{INIT}{SERVE}\n").as_bytes())?;
    for below in ["", "lib/"] {
        for entry in fs::read_dir(dir.join(below))? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                let name = format!("net/{below}{}", entry.file_name().to_string_lossy());
                cpio.file(&name, 0o755, &fs::read(entry.path())?)?;
            }
        }
    }
    Ok(cpio.finish()?)
}

/// The bridge; it goes with the value.
pub struct Bridge;

impl Bridge {
    pub fn new() -> Result<Self> {
        shell(&format!(
            "ip link add {BRIDGE} type bridge; ip link set {BRIDGE} up; ip address add 10.90.0.1/24 dev {BRIDGE}"
        ))?;
        Ok(Self)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = shell(&format!("ip link delete {BRIDGE}"));
    }
}

/// A running guest.
pub struct Guest<'a> {
    pub kind: Kind,
    /// Its address on the bridge.
    pub address: String,
    /// Its port of the bridge.
    link: String,
    /// The process whose VM it is in.
    pub machine: Option<libc::pid_t>,
    /// Where its monitor tells its counters.
    pub counters: Option<PathBuf>,
    held: Held<'a>,
}

enum Held<'a> {
    Container { world: &'a World, run: Run, _namespace: Namespace },
    Qemu { job: Job, dir: TempDir },
}

impl<'a> Guest<'a> {
    /// Starts one with the address 10.90.0.`number` and waits until it serves.
    pub fn start(world: &'a World, programs: &Programs, kind: Kind, number: u8) -> Result<Self> {
        let address = format!("10.90.0.{number}");
        let link = format!("rvmb{number}");
        let guest = match kind {
            Kind::Qemu => Self::qemu(programs, address, link)?,
            _ => Self::container(world, programs, kind, (address, link))?,
        };
        guest.connect(SHELL_PORT).with_context(|| format!("{}: {}", kind.name(), guest.console()))?;
        Ok(guest)
    }

    fn container(
        world: &'a World,
        programs: &Programs,
        kind: Kind,
        (address, link): (String, String),
    ) -> Result<Self> {
        let vhost = if kind == Kind::RvmUserSpace { "off" } else { "on" };
        world.set_config(&world.config().text("network", "vhost", vhost))?;
        let namespace = Namespace::new(&format!("rvm-{link}"))?;
        shell(&format!(
            "ip link add {link} type veth peer name eth0 netns rvm-{link}; ip link set {link} master {BRIDGE} up"
        ))?;
        namespace.run(&format!("ip link set eth0 up; ip address add {address}/24 dev eth0"))?;
        let ctr = world.ctr().under(if kind == Kind::Runc { RUNC } else { RUNTIME });
        let mount = format!("type=bind,src={},dst={DIR},options=rbind:ro", programs.dir.display());
        let options = ["--with-ns", &namespace.option(), "--mount", &mount];
        let run = ctr.container("net").detached().with(&options);
        run.run(&["sh", "-c", &format!("mkdir -p /tmp; {SERVE}")])?.success()?;
        let sandbox = if kind == Kind::Runc { None } else { Some(Sandbox::find(world.stage(), &run.id)?) };
        Ok(Self {
            kind,
            address,
            link,
            machine: sandbox.as_ref().map(|sandbox| sandbox.monitor.pid),
            counters: sandbox.map(|sandbox| sandbox.dir().join("vmm.sock")),
            held: Held::Container { world, run, _namespace: namespace },
        })
    }

    fn qemu(programs: &Programs, address: String, link: String) -> Result<Self> {
        shell(&format!("ip tuntap add {link} mode tap vnet_hdr; ip link set {link} master {BRIDGE} up"))?;
        let dir = tempfile::Builder::new().prefix("rvm-bench").tempdir()?;
        let mut command = Command::new("qemu-system-x86_64");
        command.current_dir(dir.path()).args([
            "-M",
            peer::MACHINE,
            "-cpu",
            "host",
            "-m",
            "512M",
            "-smp",
            "1",
        ]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-serial", "file:console.log", "-global", "virtio-mmio.force-legacy=false"]);
        command.arg("-kernel").arg(&programs.kernel).arg("-initrd").arg(&programs.initramfs);
        command.args(["-append", &format!("{} address={address}/24", rvm_protocol::guest::DEFAULT_CMDLINE)]);
        command.args(["-netdev", &format!("tap,id=net,ifname={link},script=no,downscript=no,vhost=on")]);
        // An address of its own on the bridge.
        let last: u8 = address.rsplit('.').next().context("an address")?.parse()?;
        command.args(["-device", &format!("virtio-net-device,netdev=net,mac=02:00:00:00:00:{last:02x}")]);
        let job = Job::start(command, Input::Nothing)?;
        let machine = Some(job.pid());
        Ok(Self { kind: Kind::Qemu, address, link, machine, counters: None, held: Held::Qemu { job, dir } })
    }

    /// Connects to one of its servers, which may not be there yet.
    fn connect(&self, port: u16) -> Result<TcpStream> {
        let address: SocketAddr = format!("{}:{port}", self.address).parse()?;
        let until = Instant::now() + scale::container();
        loop {
            match TcpStream::connect_timeout(&address, Duration::from_secs(1)) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(scale::container()))?;
                    return Ok(stream);
                }
                Err(error) => ensure!(Instant::now() < until, "{address}: {error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A connection on which everything comes back.
    pub fn echo(&self) -> Result<TcpStream> {
        self.connect(ECHO_PORT)
    }

    /// Runs a script in it; its output.
    pub fn shell(&self, script: &str) -> Result<String> {
        let mut stream = self.connect(SHELL_PORT)?;
        stream.write_all(format!("{{ {script}\n}} 2>&1; exit\n").as_bytes())?;
        let mut output = String::new();
        stream.read_to_string(&mut output).with_context(|| format!("{script}: {output}"))?;
        Ok(output)
    }

    /// Frames that have passed its port of the bridge, in both directions. One that is yet to be cut
    /// into segments is one.
    pub fn frames(&self) -> Result<u64> {
        let mut frames = 0;
        for name in ["rx_packets", "tx_packets"] {
            let path = format!("/sys/class/net/{}/statistics/{name}", self.link);
            frames += fs::read_to_string(&path).with_context(|| path.clone())?.trim().parse::<u64>()?;
        }
        Ok(frames)
    }

    /// The end of what QEMU and its guest have said.
    fn console(&self) -> String {
        match &self.held {
            Held::Container { .. } => String::new(),
            Held::Qemu { job, dir } => {
                format!("{}; {}", job.stderr(), crate::monitor::console(dir.path()))
            }
        }
    }

    /// Ends it.
    pub fn stop(self) -> Result<()> {
        match self.held {
            Held::Container { world, run, .. } => world.end(&run.id)?,
            Held::Qemu { job, dir } => {
                job.signal(nix::sys::signal::Signal::SIGKILL)?;
                job.finish(scale::command())?;
                drop(dir);
                shell(&format!("ip link delete {}", self.link))?;
            }
        }
        Ok(())
    }
}
