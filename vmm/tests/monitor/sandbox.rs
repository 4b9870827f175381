//! A monitor that is run, with a guest of a few instructions, and its owner's end of the control socket.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rvm_protocol::vmm::{Call, MAX_MESSAGE_LEN, Metrics, Reply, Request, Response};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub(super) const LOAD_ADDRESS: u64 = 0x100_0000;
/// hlt; jmp to it
pub(super) const HANG: &[u8] = &[0xf4, 0xeb, 0xfd];
/// mov al, 0xfe; out 0x64, al
pub(super) const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64];
/// ud2, with no interrupt table to handle it
pub(super) const CRASH: &[u8] = &[0x0f, 0x0b];

/// An ELF file whose only segment is `code`, as long mode code.
pub(super) fn kernel(code: &[u8]) -> Vec<u8> {
    let mut elf = vec![0; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0]);
    put(24, &LOAD_ADDRESS.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &[56, 0, 1, 0]);
    put(64, &1u32.to_le_bytes());
    put(72, &0x1000u64.to_le_bytes());
    put(88, &LOAD_ADDRESS.to_le_bytes());
    put(96, &(code.len() as u64).to_le_bytes());
    put(104, &(code.len() as u64).to_le_bytes());
    elf.extend(code);
    elf
}

/// Code that writes `text` to the serial port.
pub(super) fn print(text: &str) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
    text.bytes().for_each(|byte| code.extend([0xb0, byte, 0xee])); // mov al, byte; out dx, al
    code
}

pub(super) struct Sandbox {
    pub(super) dir: tempfile::TempDir,
    pub(super) config: serde_json::Value,
}

impl Sandbox {
    pub(super) fn new(code: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("vmlinux"), kernel(code)).unwrap();
        let config = serde_json::json!({
            "id": "t", "vcpus": 1, "memory_mib": 64, "kernel": "vmlinux", "cmdline": "",
            "console_log": "console.log", "control_socket": "vmm.sock",
            "vsock": {"guest_cid": 3, "socket": "vsock.sock"},
        });
        Self { dir, config }
    }

    pub(super) fn set(mut self, field: &str, value: serde_json::Value) -> Self {
        self.config[field] = value;
        self
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn command(&self) -> Command {
        std::fs::write(self.path("vm.json"), self.config.to_string()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_rvm-vmm"));
        command.args(["--config", "vm.json", "--any-kvm"]);
        command.current_dir(self.dir.path());
        command.stderr(Stdio::piped()).stdout(Stdio::piped());
        command
    }

    pub(super) fn run(&self) -> Output {
        finish(self.command().spawn().unwrap())
    }

    /// Its end is that of the connection, too: of a test that panics nothing is left.
    pub(super) fn start(&self) -> (Child, Control) {
        self.start_with(&[])
    }

    pub(super) fn start_with(&self, options: &[&str]) -> (Child, Control) {
        let mut command = self.command();
        command.args(options);
        let (control, monitors_end) = Control::pair();
        let fd = monitors_end.as_raw_fd();
        command.args(["--control-fd", &fd.to_string()]);
        // SAFETY: the closure makes one system call.
        unsafe { command.pre_exec(move || inherit(fd)) };
        (command.spawn().unwrap(), control)
    }

    /// What is in the directory beside what the test put there.
    pub(super) fn left(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        let stays = ["vm.json", "vmlinux", "initramfs", "console.log", "console.log.1"];
        names.retain(|name| !stays.contains(&name.as_str()));
        names
    }
}

/// Waits for the end, at most half a minute.
pub(super) fn finish(mut child: Child) -> Output {
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > Duration::from_secs(30) {
            child.kill().unwrap();
            panic!("the monitor did not end: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    child.wait_with_output().unwrap()
}

pub(super) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

pub(super) fn inherit(fd: libc::c_int) -> std::io::Result<()> {
    // SAFETY: plain system call; 0 clears FD_CLOEXEC.
    match unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// The owner's end.
pub(super) struct Control {
    pub(super) socket: UnixDatagram,
    pub(super) id: u64,
}

impl Control {
    pub(super) fn pair() -> (Self, OwnedFd) {
        let mut fds = [-1; 2];
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        // SAFETY: an array of two descriptors, as the call wants.
        assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) }, 0);
        // SAFETY: both were just made for us.
        let [ours, monitors] = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        let socket = UnixDatagram::from(ours);
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        (Self { socket, id: 0 }, monitors)
    }

    pub(super) fn ask(&mut self, request: Request) -> Response {
        self.ask_with(request, None)
    }

    pub(super) fn ask_with(&mut self, request: Request, file: Option<&File>) -> Response {
        self.id += 1;
        let call = serde_json::to_vec(&Call { id: self.id, request }).unwrap();
        match file {
            Some(file) => self.socket.send_with_fd(call.as_slice(), file.as_raw_fd()).unwrap(),
            None => self.socket.send(&call).unwrap(),
        };
        let mut text = vec![0; MAX_MESSAGE_LEN];
        let count = self.socket.recv(&mut text).unwrap();
        let reply: Reply = serde_json::from_slice(&text[..count]).unwrap();
        assert_eq!(reply.id, self.id);
        reply.response
    }

    pub(super) fn refused(&mut self, request: Request, file: Option<&File>) -> String {
        match self.ask_with(request, file) {
            Response::Error { message } => message,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn metrics(&mut self) -> Metrics {
        match self.ask(Request::Metrics) {
            Response::Metrics(metrics) => metrics,
            other => panic!("{other:?}"),
        }
    }

    /// Asks until the boot vCPU has entered the guest.
    pub(super) fn metrics_of_running(&mut self) -> Metrics {
        let started = Instant::now();
        loop {
            let metrics = self.metrics();
            if metrics.start_us.iter().any(|(step, _)| step == "first_run") {
                return metrics;
            }
            assert!(started.elapsed() < Duration::from_secs(30), "{metrics:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Asks at the path, once there is something.
pub(super) fn ask_at_path(path: &Path, request: &Request) -> Response {
    let started = Instant::now();
    let mut stream = loop {
        match UnixStream::connect(path) {
            Ok(stream) => break stream,
            Err(e) if started.elapsed() > Duration::from_secs(30) => panic!("{}: {e}", path.display()),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    let line = serde_json::to_string(request).unwrap() + "\n";
    stream.write_all(line.as_bytes()).unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}
