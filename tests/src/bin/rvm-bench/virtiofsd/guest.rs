//! QEMU's `microvm` with a root file system and a volume that `virtiofsd` serves.

use std::{
    fs,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use rootfs_builder::cpio::CpioWriter;
use rvm_protocol::guest::DEFAULT_CMDLINE;
use rvm_tests::{
    job::{self, Input, Job},
    programs::BUSYBOX_INIT,
    scale,
    world::shell,
};

use super::{MEMORY_MIB, VCPUS, VOLUME};
use crate::peer;

/// How the line with the script's exit code begins, and the one after it, a guest's last.
const CODE: &str = "@code ";
const END: &str = "@end";

/// What the comparison takes.
pub struct Files {
    /// virtiofsd.
    pub server: PathBuf,
    /// The libraries it was made for, its loader among them: another C library than this machine's.
    pub libraries: PathBuf,
    /// rvm's kernel with the entry and the drivers that QEMU's machine needs.
    pub kernel: PathBuf,
    /// Linux as it is, where that is to be compared too.
    pub unpatched: Option<PathBuf>,
}

/// What the threads of the server that do what a guest asks are called.
pub const SERVER_THREAD: &str = "vring_worker";

/// The directories that are served.
pub struct Shares<'a> {
    pub root: &'a Path,
    pub volume: &'a Path,
}

/// Runs one guest after another.
pub struct Machine<'a> {
    files: &'a Files,
    busybox: PathBuf,
    /// A tmpfs for guests' memory.
    memory: PathBuf,
}

impl<'a> Machine<'a> {
    /// With a statically linked busybox, and a place for guests' memory below `dir`.
    pub fn new(dir: &Path, files: &'a Files, busybox: PathBuf) -> Result<Self> {
        // As rvm's own: a memfd has pages of 4 KiB only, where the administrator has not said otherwise.
        let memory = dir.join("memory");
        fs::create_dir(&memory)?;
        shell(&format!("mount -t tmpfs -o size=0,huge=advise tmpfs {}", memory.display()))?;
        Ok(Self { files, busybox, memory })
    }

    /// Whether there is a kernel as Linux has it.
    pub fn has_unpatched(&self) -> bool {
        self.files.unpatched.is_some()
    }

    /// What virtiofsd says of itself.
    pub fn server_version(&self) -> Result<String> {
        let mut command = self.server();
        command.arg("--version");
        Ok(job::run(command, Input::Nothing, scale::command())?.success()?.text().trim().to_owned())
    }

    /// Runs a script in a guest of its own, with this caching of the volume; what it said.
    pub fn run(&self, shares: &Shares<'_>, cache: &str, unpatched: bool, script: &str) -> Result<String> {
        let kernel = if unpatched { self.files.unpatched.as_ref() } else { Some(&self.files.kernel) };
        let dir = tempfile::Builder::new().prefix("rvm-bench").tempdir()?;
        let initramfs = dir.path().join("initramfs");
        fs::write(&initramfs, pack(&self.busybox, script)?)?;
        let mut command = Command::new("qemu-system-x86_64");
        command.current_dir(dir.path());
        command.args(["-M", &format!("{},memory-backend=memory", peer::MACHINE), "-cpu", "host"]);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ]);
        command.args(["-m", &format!("{MEMORY_MIB}M"), "-smp", &VCPUS.to_string()]);
        let memory = format!("size={MEMORY_MIB}M,share=on,mem-path={}", self.memory.display());
        command.args(["-object", &format!("memory-backend-file,id=memory,{memory}")]);
        command.arg("-kernel").arg(kernel.context("no kernel")?).arg("-initrd").arg(&initramfs);
        command.args(["-append", DEFAULT_CMDLINE, "-global", "virtio-mmio.force-legacy=false"]);
        let mut servers = Vec::new();
        // As rvm's layers, the root never changes.
        for (tag, shared, cache) in [("root", shares.root, "always"), ("volume", shares.volume, cache)] {
            let socket = dir.path().join(tag);
            servers.push(self.serve(shared, &socket, cache)?);
            command.args(["-chardev", &format!("socket,id={tag},path={}", socket.display())]);
            let device = format!("vhost-user-fs-device,queue-size=1024,chardev={tag},tag={tag}");
            command.args(["-device", &device]);
        }
        let guest = Job::start(command, Input::Nothing)?;
        let ended = guest.wait_for(END, scale::container() * 10);
        let said = guest.stdout();
        if !guest.has_ended() {
            guest.signal(nix::sys::signal::Signal::SIGKILL)?;
        }
        let errors = guest.finish(scale::command())?.errors();
        // Each ends with its connection; one that never had one is killed.
        let served: Vec<String> = servers
            .into_iter()
            .map(|server| match server.finish(scale::command()) {
                Ok(finished) => finished.errors(),
                Err(error) => format!("{error:#}"),
            })
            .collect();
        let what = || format!("{said}\nQEMU: {errors}\nvirtiofsd: {served:?}");
        ended.with_context(what)?;
        let code = said.lines().find_map(|line| line.strip_prefix(CODE));
        ensure!(code == Some("0"), "{}", what());
        Ok(said)
    }

    /// Starts a server that listens at `socket` for one guest.
    fn serve(&self, shared: &Path, socket: &Path, cache: &str) -> Result<Job> {
        let listener = UnixListener::bind(socket).with_context(|| format!("{}", socket.display()))?;
        let mut command = self.server();
        command.args(["--fd", "0", "--log-level", "warn", "--cache", cache]).arg("--shared-dir").arg(shared);
        Job::start_by(command, Input::Nothing, |command| command.stdin(OwnedFd::from(listener)).spawn())
    }

    fn server(&self) -> Command {
        let Files { server, libraries, .. } = self.files;
        let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
        // The others are the same in both releases of Debian.
        let path = format!("{}:/usr/lib/x86_64-linux-gnu:/lib/x86_64-linux-gnu", libraries.display());
        command.args(["--library-path", &path]).arg(server);
        command
    }
}

/// An initramfs with a script, that changes to the shared root for it. What the script says is kept until
/// its end: a character on the console is an exit.
fn pack(busybox: &Path, script: &str) -> Result<Vec<u8>> {
    let init = format!(
        "{BUSYBOX_INIT}
mount -t virtiofs -o ro root /root && mount -t virtiofs volume /root{VOLUME} &&
mount -t proc proc /root/proc && mount -o bind /dev /root/dev && mount -t tmpfs tmpfs /root/tmp &&
env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \\
    chroot /root bash -c \"$(cat /script)\" > /said 2>&1
code=$?
cat /said
echo \"{CODE}$code\"
echo {END}
exec sleep 1000000
"
    );
    let mut cpio = CpioWriter::new(Vec::new());
    for dir in ["bin", "dev", "proc", "root", "sys", "tmp"] {
        cpio.dir(dir, 0o755)?;
    }
    cpio.char_device("dev/console", 0o600, 5, 1)?;
    cpio.file("bin/busybox", 0o755, &fs::read(busybox)?)?;
    cpio.symlink("bin/sh", "busybox")?;
    cpio.file("script", 0o644, script.as_bytes())?;
    cpio.file("init", 0o755, init.as_bytes())?;
    Ok(cpio.finish()?)
}
