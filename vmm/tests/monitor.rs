//! The monitor as a program, with guests of a few instructions: they run on
//! any `/dev/kvm`, also one that only emulates kernels.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rvm_protocol::vmm::{DiskConfig, Metrics, Request, Response, exit_code};
use rvm_vmm::kvm::probe;

const LOAD_ADDRESS: u64 = 0x100_0000;
/// hlt; jmp to it
const HANG: &[u8] = &[0xf4, 0xeb, 0xfd];
/// mov al, 0xfe; out 0x64, al
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64];
/// ud2, with no interrupt table to handle it
const CRASH: &[u8] = &[0x0f, 0x0b];

/// An ELF file whose only segment is `code`, as long mode code.
fn kernel(code: &[u8]) -> Vec<u8> {
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
fn print(text: &str) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
    text.bytes().for_each(|byte| code.extend([0xb0, byte, 0xee])); // mov al, byte; out dx, al
    code
}

struct Sandbox {
    dir: tempfile::TempDir,
    config: serde_json::Value,
}

impl Sandbox {
    fn new(code: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("vmlinux"), kernel(code)).unwrap();
        let config = serde_json::json!({
            "id": "t", "vcpus": 1, "memory_mib": 64, "kernel": "vmlinux", "cmdline": "",
            "console_log": "console.log", "control_socket": "vmm.sock",
            "vsock": {"guest_cid": 3, "socket": "vsock.sock"},
        });
        Self { dir, config }
    }

    fn set(mut self, field: &str, value: serde_json::Value) -> Self {
        self.config[field] = value;
        self
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self) -> Command {
        std::fs::write(self.path("vm.json"), self.config.to_string()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_rvm-vmm"));
        // It ends with the thread of its test, which may panic.
        let parent = std::process::id().to_string();
        command.args(["--config", "vm.json", "--any-kvm", "--parent", &parent]);
        command.current_dir(self.dir.path());
        command.stderr(Stdio::piped()).stdout(Stdio::piped());
        command
    }

    fn run(&self) -> Output {
        finish(self.command().spawn().unwrap())
    }

    fn start(&self) -> (Child, Control) {
        let child = self.command().spawn().unwrap();
        (child, Control::connect(&self.path("vmm.sock")))
    }

    /// What is in the directory beside what the test put there.
    fn left(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| !["vm.json", "vmlinux", "initramfs", "console.log"].contains(&name.as_str()));
        names
    }
}

/// Waits for the end, at most half a minute.
fn finish(mut child: Child) -> Output {
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

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

struct Control(BufReader<UnixStream>);

impl Control {
    /// Connects once the socket is there.
    fn connect(path: &Path) -> Self {
        let started = Instant::now();
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Self(BufReader::new(stream)),
                Err(e) if started.elapsed() > Duration::from_secs(30) => panic!("{}: {e}", path.display()),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    fn ask(&mut self, request: Request) -> Response {
        let line = serde_json::to_string(&request).unwrap() + "\n";
        self.0.get_mut().write_all(line.as_bytes()).unwrap();
        let mut answer = String::new();
        self.0.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    fn metrics(&mut self) -> Metrics {
        match self.ask(Request::Metrics) {
            Response::Metrics(metrics) => metrics,
            other => panic!("{other:?}"),
        }
    }

    /// Asks until the boot vCPU has entered the guest.
    fn metrics_of_running(&mut self) -> Metrics {
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

#[test]
fn output_reaches_the_log_and_reset_ends_the_monitor() {
    let sandbox = Sandbox::new(&[print("hello from ring 0\n").as_slice(), RESET, HANG].concat());
    let output = sandbox.run();
    assert_eq!(output.status.code(), Some(exit_code::OK), "{}", stderr(&output));
    assert_eq!(std::fs::read_to_string(sandbox.path("console.log")).unwrap(), "hello from ring 0\n");
    assert_eq!(sandbox.left(), [""; 0]);
}

#[test]
fn triple_fault_is_a_crash_with_one_line() {
    let sandbox = Sandbox::new(&[print("unfinished").as_slice(), CRASH].concat());
    let output = sandbox.run();
    assert_eq!(output.status.code(), Some(exit_code::GUEST_CRASHED));
    let reason = stderr(&output);
    assert!(reason.contains("the guest crashed: vCPU 0: "), "{reason}");
    assert_eq!(reason.lines().count(), 1, "{reason}");
    assert_eq!(std::fs::read_to_string(sandbox.path("console.log")).unwrap(), "unfinished");
    assert_eq!(sandbox.left(), [""; 0]);
}

#[test]
fn owner_can_pause_resume_measure_and_stop() {
    let sandbox = Sandbox::new(&[print("up\n").as_slice(), HANG].concat()).set("vcpus", 3.into());
    let (child, mut control) = sandbox.start();
    let metrics = control.metrics_of_running();
    let steps: Vec<_> = metrics.start_us.iter().map(|(step, _)| step.as_str()).collect();
    assert_eq!(steps.first(), Some(&"main"));
    assert_eq!(steps.last(), Some(&"first_run"));
    assert_eq!(metrics.memory_bytes, 64 << 20);
    assert!((1..16 << 20).contains(&metrics.memory_resident_bytes), "{metrics:?}");

    for _ in 0..3 {
        assert_eq!(control.ask(Request::Pause), Response::Ok);
        assert_eq!(control.ask(Request::Pause), Response::Ok);
        assert_eq!(control.ask(Request::Resume), Response::Ok);
    }
    let mut second = Control::connect(&sandbox.path("vmm.sock"));
    let metrics = second.metrics();
    assert_eq!(metrics.exits.serial, 3);
    assert!(metrics.exits.interrupted >= 3, "{metrics:?}");
    assert_eq!(control.ask(Request::Pause), Response::Ok);
    assert_eq!(second.ask(Request::Stop), Response::Ok, "a paused guest can be stopped too");
    let output = finish(child);
    assert_eq!(output.status.code(), Some(exit_code::OK), "{}", stderr(&output));
    assert_eq!(sandbox.left(), [""; 0]);
}

/// Reads the vendor of the PCI function in slot 2, behind rng and vsock, until there is one.
const WAIT_FOR_SLOT_2: &[u8] = &[
    0x66, 0xba, 0xf8, 0x0c, // mov dx, 0xcf8
    0xb8, 0x00, 0x10, 0x00, 0x80, // mov eax, enable | 2 << 11
    0xef, // out dx, eax
    0x66, 0xba, 0xfc, 0x0c, // mov dx, 0xcfc
    0xed, // in eax, dx
    0x83, 0xf8, 0xff, // cmp eax, -1
    0x74, 0xec, // je to the first
];

#[test]
fn a_disk_is_plugged_into_the_running_machine() {
    let sandbox = Sandbox::new(&[WAIT_FOR_SLOT_2, &print("found\n"), RESET, HANG].concat());
    let (child, mut control) = sandbox.start();
    control.metrics_of_running();
    let disk =
        |path: PathBuf| Request::AddDisk { disk: DiskConfig { serial: "s".into(), path, readonly: true } };
    match control.ask(disk(sandbox.path("missing"))) {
        Response::Error { message } => {
            assert!(message.contains("missing\" cannot be opened: No such"), "{message}")
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(std::fs::read_to_string(sandbox.path("console.log")).unwrap(), "");
    std::fs::write(sandbox.path("disk"), [0; 512]).unwrap();
    assert_eq!(control.ask(disk(sandbox.path("disk"))), Response::Ok);
    let output = finish(child);
    assert_eq!(output.status.code(), Some(exit_code::OK), "{}", stderr(&output));
    assert_eq!(std::fs::read_to_string(sandbox.path("console.log")).unwrap(), "found\n");
}

#[test]
fn memory_is_plugged_into_the_running_machine() {
    let code = [WAIT_FOR_SLOT_2, &print("found\n"), HANG].concat();
    let sandbox = Sandbox::new(&code).set("hotplug_memory_mib", 1024.into());
    let (child, mut control) = sandbox.start();
    control.metrics_of_running();
    let set = |mib| Request::SetHotplugMemory { mib };
    for mib in [1026, 127, u64::MAX] {
        match control.ask(set(mib)) {
            Response::Error { message } => assert!(message.contains("multiple of 2 up to 1024"), "{message}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(control.ask(set(0)), Response::Ok);
    assert_eq!(std::fs::read_to_string(sandbox.path("console.log")).unwrap(), "");
    assert_eq!(control.ask(set(256)), Response::Ok);
    let printed = || std::fs::read_to_string(sandbox.path("console.log")).unwrap();
    let started = Instant::now();
    while printed() != "found\n" {
        assert!(started.elapsed() < Duration::from_secs(30), "{:?}", printed());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(control.ask(set(128)), Response::Ok);
    // It has no driver.
    let metrics = control.metrics_of_running();
    assert_eq!((metrics.memory_bytes, metrics.memory_plugged_bytes), (64 << 20, 0));
    assert_eq!(control.ask(Request::Stop), Response::Ok);
    assert_eq!(finish(child).status.code(), Some(exit_code::OK));
    assert_eq!(sandbox.left(), [""; 0]);
}

#[test]
fn termination_signal_ends_in_order() {
    let sandbox = Sandbox::new(HANG);
    let (child, mut control) = sandbox.start();
    control.metrics_of_running();
    // SAFETY: the child has not been waited for, so its id is its own.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) }, 0);
    assert_eq!(finish(child).status.code(), Some(exit_code::OK));
    assert_eq!(sandbox.left(), [""; 0]);
}

#[test]
fn monitor_ends_with_its_parent() {
    let sandbox = Sandbox::new(HANG);
    std::fs::write(sandbox.path("vm.json"), sandbox.config.to_string()).unwrap();
    let script = format!("{} --config vm.json --any-kvm --parent $$ & wait", env!("CARGO_BIN_EXE_rvm-vmm"));
    let mut parent = Command::new("sh");
    parent.args(["-c", &script]).current_dir(sandbox.dir.path()).stdout(Stdio::piped()).process_group(0);
    let mut parent = parent.spawn().unwrap();
    let mut control = Control::connect(&sandbox.path("vmm.sock"));
    control.metrics_of_running();
    parent.kill().unwrap();
    parent.wait().unwrap();
    // The monitor holds the other end of the shell's stdout until it is gone.
    let mut rest = String::new();
    parent.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
    assert_eq!(sandbox.left(), [""; 0]);
}

#[test]
fn mistakes_give_one_line_and_leave_nothing() {
    let hang = || Sandbox::new(HANG);
    let initramfs = |bytes: &[u8]| {
        let sandbox = hang().set("initramfs", "initramfs".into());
        std::fs::write(sandbox.path("initramfs"), bytes).unwrap();
        sandbox
    };
    let kernel = |bytes: &[u8]| {
        let sandbox = hang();
        std::fs::write(sandbox.path("vmlinux"), bytes).unwrap();
        sandbox
    };
    let missing_share = serde_json::json!([{"tag": "rvm", "dir": "/nonexistent/dir"}]);
    let missing_disk = serde_json::json!([{"serial": "s", "path": "/nonexistent/disk"}]);
    for (sandbox, code, says) in [
        (hang().set("kernel", "/nonexistent/vmlinux".into()), exit_code::BAD_CONFIG, "kernel: /nonexistent"),
        (hang().set("memory_mib", 1.into()), exit_code::BAD_CONFIG, "memory_mib: 1 given"),
        (hang().set("surprise", 1.into()), exit_code::BAD_CONFIG, "unknown field `surprise`"),
        (kernel(b"#!/bin/sh\n"), exit_code::BUILD_FAILED, "kernel: vmlinux: it is not an ELF file"),
        (kernel(&kernel_at(1 << 40)), exit_code::BUILD_FAILED, "outside the memory a kernel may use"),
        (initramfs(b"garbage"), exit_code::BUILD_FAILED, "initramfs: initramfs: it is neither"),
        (initramfs(b"070701"), exit_code::BUILD_FAILED, "archive is damaged at byte 0"),
        (hang().set("shares", missing_share), exit_code::BUILD_FAILED, "shares: rvm: "),
        (hang().set("disks", missing_disk), exit_code::BUILD_FAILED, "disks: s: "),
        (hang().set("control_socket", "no/dir".into()), exit_code::BUILD_FAILED, "control_socket: no/dir: "),
    ] {
        let output = sandbox.run();
        let reason = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{reason}");
        assert!(reason.contains(says) && reason.lines().count() == 1, "{says:?} not in {reason}");
        assert_eq!(sandbox.left(), [""; 0], "{reason}");
    }
}

fn kernel_at(address: u64) -> Vec<u8> {
    let mut elf = kernel(HANG);
    elf[24..32].copy_from_slice(&address.to_le_bytes());
    elf[88..96].copy_from_slice(&address.to_le_bytes());
    elf
}

#[test]
fn emulated_kvm_is_refused_in_bounded_time() {
    let sandbox = Sandbox::new(RESET);
    std::fs::write(sandbox.path("vm.json"), sandbox.config.to_string()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_rvm-vmm"));
    command.args(["--config", "vm.json"]).current_dir(sandbox.dir.path());
    let output = finish(command.stderr(Stdio::piped()).spawn().unwrap());
    match probe::check() {
        Ok(()) => assert_eq!(output.status.code(), Some(exit_code::OK), "{}", stderr(&output)),
        Err(e) => {
            assert_eq!(output.status.code(), Some(exit_code::BUILD_FAILED));
            let reason = stderr(&output);
            assert!(reason.contains("only emulates kernels"), "{reason}, {e}");
            assert_eq!(reason.lines().count(), 1, "{reason}");
        }
    }
}
