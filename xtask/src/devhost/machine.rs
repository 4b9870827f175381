//! One run of QEMU and the streams to and from the guest.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::qemu::Qemu;
use super::terminal::RawTerminal;
use super::{Options, Stdio, Stream, tail};
use crate::progress::Step;

/// The kernel's self-tests of its ciphers take a second here. Emulated TSCs are
/// one, which Linux does not believe of several processors without being told;
/// without it every look at the clock would be an exit. Whether the timer interrupts is
/// tried for some milliseconds, in which a busy machine may not run QEMU at all.
const KERNEL_PARAMETERS: &str =
    "console=ttyS0 loglevel=5 panic=-1 mitigations=off cryptomgr.notests tsc=reliable no_timer_check";
/// From QEMU's start to the guest's "ready".
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// From the command's exit code to the end of QEMU.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(20);
/// How long an interrupt that QEMU has lost may stay lost; see [`Heartbeat`].
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Everything QEMU is started with.
pub struct Machine<'a> {
    /// Size and limits.
    pub options: &'a Options,
    /// What runs it.
    pub qemu: &'a Qemu,
    /// Kernel image.
    pub kernel: &'a Path,
    /// Initramfs with the files of this run.
    pub initrd: &'a Path,
    /// The directory the guest can write to.
    pub out: &'a Path,
    /// Where the guest's console goes.
    pub console: &'a Path,
}

enum Event {
    /// A line from PID 1.
    Control(String),
    /// Bytes of one of the command's streams.
    Output(Stream, Vec<u8>),
    /// One of the guest's streams is closed.
    Closed,
}

impl Machine<'_> {
    /// Boots, connects the command's streams, waits. Returns its exit code.
    pub fn run(&self, mut stdio: Stdio<'_>) -> Result<i32> {
        let terminal = matches!(stdio, Stdio::Terminal);
        if terminal {
            RawTerminal::block_resize()?;
        }
        let mut ports = Ports::default();
        let control = ports.add("rvm.control")?;
        let (stdin, outputs) = if terminal {
            let tty = ports.add_terminal()?;
            (tty.try_clone()?, vec![(Stream::Stdout, tty)])
        } else {
            let stdin = ports.add("rvm.stdin")?;
            (
                stdin,
                vec![(Stream::Stdout, ports.add("rvm.stdout")?), (Stream::Stderr, ports.add("rvm.stderr")?)],
            )
        };
        let _heartbeat = Heartbeat::start(ports.add("rvm.heartbeat")?)?;
        // Elsewhere standard error is the command's alone, and who takes lines may run several machines.
        let shown = std::io::stderr().is_terminal() && !matches!(stdio, Stdio::Lines(_));
        let booting = shown.then(|| Step::start("Booting the devhost"));
        let process = Process::spawn(self, ports)?;

        let (events, received) = sync_channel(64);
        let mut open = 1;
        for (stream, port) in outputs {
            open += 1;
            let events = events.clone();
            std::thread::spawn(move || read_output(stream, port, &events));
        }
        let lines = BufReader::new(control.try_clone()?);
        std::thread::spawn(move || read_control(lines, &events));

        let mut session = Session { stdio: &mut stdio, partial: Default::default(), open, exit: None };
        let started = Instant::now();
        let booted = session.until(&received, Some(started + BOOT_LIMIT), |line| line == "ready");
        booted.map_err(|error| self.failure(error, "the devhost did not boot"))?;

        if let Some(step) = booting {
            step.done("");
        }

        // From here on the user's input is the guest's.
        let _raw = if terminal { Some(RawTerminal::enter(control)?) } else { None };
        let _feeder = match session.stdio {
            Stdio::Lines(_) => {
                stdin.shutdown(Shutdown::Write)?;
                None
            }
            Stdio::Inherit | Stdio::Terminal => Some(Feeder::start(stdin)?),
        };
        let deadline = self.options.timeout.map(|limit| Instant::now() + limit);
        if let Err(error) = session.until(&received, deadline, |line| line.starts_with("exit ")) {
            // What it was at is in the line it did not finish.
            session.flush();
            return Err(self.failure(error, "the devhost did not finish the command"));
        }
        let code = session.exit.context("no exit code")?;
        // What is still on its way; a machine that does not power off is ended.
        while session.open > 0 {
            let limit = Some(Instant::now() + POWER_OFF_LIMIT);
            if session.step(&received, limit).is_err() {
                break;
            }
        }
        session.flush();
        drop(process);
        Ok(code)
    }

    fn failure(&self, error: anyhow::Error, what: &str) -> anyhow::Error {
        let console = tail(self.console, 30);
        anyhow!("{what}: {error:#}\nits console ({}) ends with:\n{console}", self.console.display())
    }
}

/// Consumes events on the calling thread.
struct Session<'s, 'c> {
    stdio: &'s mut Stdio<'c>,
    /// Bytes of unfinished lines, for [`Stdio::Lines`].
    partial: [Vec<u8>; 2],
    /// Streams not closed yet.
    open: usize,
    exit: Option<i32>,
}

impl Session<'_, '_> {
    /// Handles events until a control line satisfies `done`.
    fn until(
        &mut self,
        events: &Receiver<Event>,
        deadline: Option<Instant>,
        done: impl Fn(&str) -> bool,
    ) -> Result<()> {
        loop {
            match self.step(events, deadline)? {
                Some(line) if done(&line) => return Ok(()),
                _ if self.open == 0 => bail!("QEMU ended"),
                _ => {}
            }
        }
    }

    /// Handles one event; returns it if it is a control line.
    fn step(&mut self, events: &Receiver<Event>, deadline: Option<Instant>) -> Result<Option<String>> {
        let event = match deadline {
            None => events.recv().context("QEMU ended")?,
            Some(deadline) => match events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => bail!("it took too long"),
                Err(RecvTimeoutError::Disconnected) => bail!("QEMU ended"),
            },
        };
        match event {
            Event::Control(line) => {
                if let Some(reason) = line.strip_prefix("fail ") {
                    bail!("{reason}");
                }
                if let Some(code) = line.strip_prefix("exit ") {
                    self.exit = Some(code.trim().parse().with_context(|| format!("exit code {code:?}"))?);
                }
                return Ok(Some(line));
            }
            Event::Output(stream, bytes) => self.output(stream, &bytes)?,
            Event::Closed => self.open -= 1,
        }
        Ok(None)
    }

    fn output(&mut self, stream: Stream, bytes: &[u8]) -> Result<()> {
        if let Stdio::Lines(callback) = self.stdio {
            let partial = &mut self.partial[stream as usize];
            partial.extend_from_slice(bytes);
            while let Some(end) = partial.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = partial.drain(..=end).collect();
                callback(stream, &String::from_utf8_lossy(&line[..end]));
            }
            return Ok(());
        }
        let written = match stream {
            Stream::Stdout => write_through(std::io::stdout(), bytes),
            Stream::Stderr => write_through(std::io::stderr(), bytes),
        };
        written.context("write the command's output")
    }

    /// Hands out lines that never got their newline.
    fn flush(&mut self) {
        if let Stdio::Lines(callback) = self.stdio {
            for (stream, partial) in [Stream::Stdout, Stream::Stderr].into_iter().zip(&self.partial) {
                if !partial.is_empty() {
                    callback(stream, &String::from_utf8_lossy(partial));
                }
            }
        }
    }
}

fn write_through(mut to: impl Write, bytes: &[u8]) -> std::io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

fn read_control(mut lines: BufReader<UnixStream>, events: &SyncSender<Event>) {
    let mut line = String::new();
    while matches!(lines.read_line(&mut line), Ok(n) if n > 0) {
        if events.send(Event::Control(line.trim_end().to_owned())).is_err() {
            return;
        }
        line.clear();
    }
    let _ = events.send(Event::Closed);
}

fn read_output(stream: Stream, mut port: UnixStream, events: &SyncSender<Event>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n @ 1..) = port.read(&mut buffer) {
        if events.send(Event::Output(stream, buffer[..n].to_vec())).is_err() {
            return;
        }
    }
    let _ = events.send(Event::Closed);
}

/// Copies standard input to the guest until dropped.
struct Feeder {
    /// Closing it ends the thread.
    _stop: UnixStream,
    /// Half-closed at the end of standard input, it lets QEMU read what is
    /// left; closed, QEMU would drop that.
    _port: UnixStream,
}

impl Feeder {
    fn start(mut port: UnixStream) -> Result<Self> {
        let (stop, stopped) = UnixStream::pair()?;
        let kept = port.try_clone()?;
        std::thread::spawn(move || {
            let stdin = std::io::stdin();
            let mut buffer = vec![0; 64 << 10];
            loop {
                let mut fds = [
                    PollFd::new(stdin.as_fd(), PollFlags::POLLIN),
                    PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
                ];
                if poll(&mut fds, PollTimeout::NONE).is_err() || fds[1].any() == Some(true) {
                    return;
                }
                match nix::unistd::read(&stdin, &mut buffer) {
                    Ok(n @ 1..) if port.write_all(&buffer[..n]).is_ok() => {}
                    _ => break,
                }
            }
            let _ = port.shutdown(Shutdown::Write);
        });
        Ok(Self { _stop: stop, _port: kept })
    }
}

/// Interrupts the machine once per [`HEARTBEAT`] until dropped.
///
/// QEMU's emulation of `VMRUN` and `#VMEXIT` changes the processor's pending
/// requests without its lock (`do_vmexit`: `interrupt_request &= ~CPU_INTERRUPT_VIRQ`,
/// in 7.2 and 10.0). A timer's request that another thread sets in the same
/// moment is lost: the interrupt stays raised in the local APIC, and a processor
/// that halts then never looks there again, until another interrupt makes it look.
struct Heartbeat {
    /// Closing it ends the thread.
    _stop: UnixStream,
}

impl Heartbeat {
    fn start(mut port: UnixStream) -> Result<Self> {
        let (stop, stopped) = UnixStream::pair()?;
        stopped.set_read_timeout(Some(HEARTBEAT))?;
        // Before the guest reads its port, and after the machine has ended, nobody takes the bytes.
        port.set_nonblocking(true)?;
        std::thread::spawn(move || {
            while (&stopped).read(&mut [0]).is_err() {
                let _ = port.write(&[0]);
            }
        });
        Ok(Self { _stop: stop })
    }
}

/// The far ends of the guest's ports, and QEMU's arguments for them.
#[derive(Default)]
struct Ports {
    fds: Vec<OwnedFd>,
    arguments: Vec<String>,
}

impl Ports {
    /// A byte stream the guest finds by `name`.
    fn add(&mut self, name: &str) -> Result<UnixStream> {
        self.connect(|id| format!("virtserialport,chardev={id},name={name}"))
    }

    /// The guest's hvc0.
    fn add_terminal(&mut self) -> Result<UnixStream> {
        self.connect(|id| format!("virtconsole,chardev={id}"))
    }

    fn connect(&mut self, device: impl Fn(&str) -> String) -> Result<UnixStream> {
        let (near, far) = UnixStream::pair()?;
        let id = format!("port{}", self.fds.len());
        let far = OwnedFd::from(far);
        self.arguments.extend(["-chardev".into(), format!("socket,id={id},fd={}", far.as_raw_fd())]);
        self.arguments.extend(["-device".into(), device(&id)]);
        self.fds.push(far);
        Ok(near)
    }
}

/// The QEMU process; ends with this value and with this process.
struct Process(Child);

impl Process {
    fn spawn(machine: &Machine<'_>, ports: Ports) -> Result<Self> {
        fs::create_dir_all(machine.out)?;
        fs::write(machine.console, "")?;
        let mut command = Command::new(&machine.qemu.program);
        command.args(machine.arguments()).args(&ports.arguments);
        command.stdin(std::process::Stdio::null());
        let fds: Vec<i32> = ports.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let parent = nix::unistd::getpid();
        let prepare = move || {
            // Ctrl-C is for us (or for the guest's terminal); QEMU goes when we go.
            nix::unistd::setpgid(nix::unistd::Pid::from_raw(0), nix::unistd::Pid::from_raw(0))?;
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            if nix::unistd::getppid() != parent {
                return Err(nix::errno::Errno::ESRCH.into());
            }
            for &fd in &fds {
                // SAFETY: the descriptors are open as long as `ports` lives,
                // which is until after the spawn.
                let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
                nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
            }
            Ok(())
        };
        // SAFETY: the closure makes system calls only; it neither allocates nor locks.
        unsafe { command.pre_exec(prepare) };
        Ok(Self(command.spawn().with_context(|| format!("start {}", machine.qemu.program.display()))?))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Machine<'_> {
    fn arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |option: &str, value: OsString| {
            arguments.push(option.into());
            arguments.push(value);
        };
        if let Some(firmware) = &self.qemu.firmware {
            add("-L", firmware.into());
        }
        // A processor without ERMS and FSRM keeps Linux from `rep movsb`, which
        // QEMU executes byte by byte; without LA57 page tables have four levels.
        if self.options.instructions {
            add("-accel", "tcg,thread=single".into());
            add("-icount", "shift=0,sleep=off".into());
        } else {
            add("-accel", "tcg,thread=multi".into());
        }
        add("-cpu", "max,-erms,-fsrm,-la57".into());
        add("-smp", self.options.cpus.to_string().into());
        add("-m", format!("{}M", self.options.memory_mib).into());
        add("-M", "q35".into());
        add("-display", "none".into());
        add("-serial", join("file:", self.console));
        add("-kernel", self.kernel.into());
        add("-initrd", self.initrd.into());
        let apparmor = u8::from(self.options.apparmor);
        add("-append", format!("{KERNEL_PARAMETERS} apparmor={apparmor}").into());
        if let Some(trace) = &self.options.trace {
            add("-d", "in_asm".into());
            add("-dfilter", "0xffffffff81000000+0x2000000".into());
            add("-D", trace.into());
        }
        add("-device", "virtio-rng-pci".into());
        for (id, path, readonly) in [("host", Path::new("/"), "on"), ("out", self.out, "off")] {
            let prefix =
                format!("local,id={id},security_model=none,multidevs=remap,readonly={readonly},path=");
            add("-fsdev", join(&prefix, path));
            add("-device", format!("virtio-9p-pci,fsdev={id},mount_tag={id}").into());
        }
        add("-device", "virtio-serial-pci,event_idx=off".into());
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            arguments.push(flag.into());
        }
        arguments
    }
}

/// QEMU's option syntax takes a doubled comma for one in a value.
fn join(prefix: &str, path: &Path) -> OsString {
    let mut value = OsString::from(prefix);
    match path.to_str() {
        Some(text) => value.push(text.replace(',', ",,")),
        None => value.push(path),
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_whatever_pieces_arrive() {
        let mut lines = Vec::new();
        let mut callback = |stream, line: &str| lines.push((stream, line.to_owned()));
        let mut stdio = Stdio::Lines(&mut callback);
        let mut session = Session { stdio: &mut stdio, partial: Default::default(), open: 0, exit: None };
        session.output(Stream::Stdout, b"a\nb").unwrap();
        session.output(Stream::Stderr, b"other\n").unwrap();
        session.output(Stream::Stdout, b"c\n\nd").unwrap();
        session.flush();
        let expected = [
            (Stream::Stdout, "a"),
            (Stream::Stderr, "other"),
            (Stream::Stdout, "bc"),
            (Stream::Stdout, ""),
            (Stream::Stdout, "d"),
        ];
        assert_eq!(lines, expected.map(|(stream, line)| (stream, line.to_owned())));
    }

    #[test]
    fn events_lead_to_the_exit_code_or_a_reason() {
        let (events, received) = sync_channel(8);
        let mut stdio = Stdio::Inherit;
        let mut session = Session { stdio: &mut stdio, partial: Default::default(), open: 1, exit: None };
        events.send(Event::Control("ready".into())).unwrap();
        events.send(Event::Control("exit 42".into())).unwrap();
        session.until(&received, None, |line| line == "ready").unwrap();
        session.until(&received, None, |line| line.starts_with("exit ")).unwrap();
        assert_eq!(session.exit, Some(42));

        events.send(Event::Control("fail cannot mount x".into())).unwrap();
        let failed = session.until(&received, None, |_| false).unwrap_err();
        assert_eq!(failed.to_string(), "cannot mount x");
        let late = session.until(&received, Some(Instant::now()), |_| false).unwrap_err();
        assert_eq!(late.to_string(), "it took too long");
        events.send(Event::Closed).unwrap();
        assert_eq!(session.until(&received, None, |_| false).unwrap_err().to_string(), "QEMU ended");
    }

    #[test]
    fn commas_in_paths_are_qemus() {
        assert_eq!(join("file:", Path::new("/a,b")), "file:/a,,b");
    }
}
