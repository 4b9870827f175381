//! The monitor as a program, with guests of a few instructions: they run on
//! any `/dev/kvm`, also one that only emulates kernels.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "monitor/nets.rs"]
mod nets;
#[path = "monitor/sandbox.rs"]
mod sandbox;

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rvm_protocol::vmm::{Call, MAX_MESSAGE_LEN, Reply, Request, Response, exit_code};
use rvm_vmm::arch::vendor::Vendor;
use rvm_vmm::kvm::probe;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use sandbox::*;

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
    let metrics = control.metrics();
    assert_eq!(metrics.exits.serial, 3);
    assert!(metrics.exits.interrupted >= 3, "{metrics:?}");
    assert_eq!(control.ask(Request::Pause), Response::Ok);
    assert_eq!(control.ask(Request::Stop), Response::Ok, "a paused guest can be stopped too");
    let output = finish(child);
    assert_eq!(output.status.code(), Some(exit_code::OK), "{}", stderr(&output));
    assert_eq!(sandbox.left(), [""; 0]);
}

#[test]
fn others_can_look_and_do_nothing_else() {
    let sandbox = Sandbox::new(HANG);
    let (child, mut control) = sandbox.start();
    let at_path = |request| ask_at_path(&sandbox.path("vmm.sock"), &request);
    assert!(matches!(at_path(Request::Metrics), Response::Metrics(_)));
    for request in [
        Request::Pause,
        Request::Resume,
        Request::Stop,
        Request::AddDisk { serial: "s".into(), readonly: true },
        Request::RemoveDisk { serial: "s".into() },
        Request::SetHotplugMemory { mib: 2 },
        Request::SetVcpus { count: 2 },
        Request::RemoveNet { slot: 24 },
        Request::SetLink { slot: 24, up: false },
        Request::Save,
    ] {
        match at_path(request) {
            Response::Error { message } => assert!(message.contains("its owner's"), "{message}"),
            other => panic!("{other:?}"),
        }
    }
    control.metrics_of_running();
    assert_eq!(control.ask(Request::Stop), Response::Ok);
    assert_eq!(finish(child).status.code(), Some(exit_code::OK));
}

/// Reads the vendor of the PCI function in slot 1, behind vsock, until there is one.
const WAIT_FOR_SLOT_1: &[u8] = &[
    0x66, 0xba, 0xf8, 0x0c, // mov dx, 0xcf8
    0xb8, 0x00, 0x08, 0x00, 0x80, // mov eax, enable | 1 << 11
    0xef, // out dx, eax
    0x66, 0xba, 0xfc, 0x0c, // mov dx, 0xcfc
    0xed, // in eax, dx
    0x83, 0xf8, 0xff, // cmp eax, -1
    0x74, 0xec, // je to the first
];

/// The same until there is none.
const WAIT_FOR_NO_SLOT_1: &[u8] = &[
    0x66, 0xba, 0xf8, 0x0c, 0xb8, 0x00, 0x08, 0x00, 0x80, 0xef, 0x66, 0xba, 0xfc, 0x0c, 0xed, 0x83, 0xf8,
    0xff, 0x75, 0xec, // jne to the first
];

fn disk(serial: &str) -> Request {
    Request::AddDisk { serial: serial.into(), readonly: true }
}

#[test]
fn a_disk_is_plugged_into_the_running_machine_and_taken_out() {
    let code =
        [WAIT_FOR_SLOT_1, &print("found\n"), WAIT_FOR_NO_SLOT_1, &print("gone\n"), RESET, HANG].concat();
    let sandbox = Sandbox::new(&code);
    let (child, mut control) = sandbox.start();
    control.metrics_of_running();
    let printed = || std::fs::read_to_string(sandbox.path("console.log")).unwrap();
    assert!(control.refused(disk("s"), None).contains("no descriptor"));
    let null = File::open("/dev/null").unwrap();
    let message = control.refused(disk("s"), Some(&null));
    assert_eq!(message, "disk s: it must be a regular file or a block device");
    assert!(control.refused(Request::Pause, Some(&null)).contains("takes no descriptor"));
    let remove = || Request::RemoveDisk { serial: "s".into() };
    assert!(control.refused(remove(), None).contains("there is no disk s"));
    assert_eq!(printed(), "");
    let file = File::create_new(sandbox.path("disk")).unwrap();
    file.set_len(512).unwrap();
    let file = File::open(sandbox.path("disk")).unwrap();
    assert_eq!(control.ask_with(disk("s"), Some(&file)), Response::Ok);
    assert_eq!(control.refused(disk("s"), Some(&file)), "disk s is there already");
    wait_for(|| printed() == "found\n");
    // The guest ends when it sees that, and the monitor with it.
    assert_eq!(control.ask(remove()), Response::Ok);
    let output = finish(child);
    assert_eq!(output.status.code(), Some(exit_code::OK), "{}", stderr(&output));
    assert_eq!(printed(), "found\ngone\n");
}

fn wait_for(mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Descriptors and threads of a process.
fn holdings(child: &Child) -> [usize; 2] {
    ["fd", "task"].map(|what| std::fs::read_dir(format!("/proc/{}/{what}", child.id())).unwrap().count())
}

#[test]
fn a_monitor_without_descriptors_goes_on() {
    let sandbox = Sandbox::new(HANG);
    let (child, mut control) = sandbox.start();
    control.metrics_of_running();
    // A few more than it has, so that some of the clients still find room.
    let most = holdings(&child)[0] as u64 + 3;
    let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
    let pid = child.id() as libc::pid_t;
    // SAFETY: a valid rlimit that the call only reads.
    let set = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(set, 0);
    let connect = || UnixStream::connect(sandbox.path("vmm.sock")).unwrap();
    let mut clients: Vec<_> = (0..12).map(|_| connect()).collect();
    // Those without room are turned away, and nobody waits for them.
    let mut turned_away = 0;
    for client in &mut clients {
        client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        turned_away += usize::from(matches!(client.read(&mut [0]), Ok(0)));
    }
    assert!((6..12).contains(&turned_away), "{turned_away}");
    let file = tempfile::tempfile().unwrap();
    let message = control.refused(disk("s"), Some(&file));
    assert!(message.contains("too many files are open"), "{message}");
    assert_eq!(control.ask(Request::Pause), Response::Ok);
    assert_eq!(control.ask(Request::Resume), Response::Ok);
    drop(clients);
    wait_for(|| matches!(ask_at_path(&sandbox.path("vmm.sock"), &Request::Metrics), Response::Metrics(_)));
    assert_eq!(control.ask(Request::Stop), Response::Ok);
    assert_eq!(finish(child).status.code(), Some(exit_code::OK));
}

/// Prints another letter each time something is plugged into slot 1, and a dash when
/// it is gone: the letter is in a register, the code in memory.
fn count_plugs() -> Vec<u8> {
    let mut code = vec![0xbb, 0x61, 0, 0, 0]; // mov ebx, 'a'
    let again = code.len();
    code.extend(WAIT_FOR_SLOT_1);
    // mov dx, 0x3f8; mov al, bl; out dx, al; mov al, 10; out dx, al; inc ebx
    code.extend([0x66, 0xba, 0xf8, 0x03, 0x88, 0xd8, 0xee, 0xb0, 0x0a, 0xee, 0xff, 0xc3]);
    code.extend(WAIT_FOR_NO_SLOT_1);
    code.extend(print("-\n"));
    code.push(0xe9); // jmp
    code.extend((again as i32 - (code.len() as i32 + 4)).to_le_bytes());
    code
}

#[test]
fn a_saved_machine_goes_on_where_it_was() {
    let first = Sandbox::new(&count_plugs()).set("max_vcpus", 2.into());
    let (child, mut control) = first.start();
    control.metrics_of_running();
    let file = tempfile::tempfile().unwrap();
    file.set_len(512).unwrap();
    let printed =
        |sandbox: &Sandbox| std::fs::read_to_string(sandbox.path("console.log")).unwrap_or_default();
    let plug = |control: &mut Control, sandbox: &Sandbox, letter: char| {
        let before = printed(sandbox);
        assert_eq!(control.ask_with(disk("s"), Some(&file)), Response::Ok);
        wait_for(|| printed(sandbox) == format!("{before}{letter}\n"));
        assert_eq!(control.ask(Request::RemoveDisk { serial: "s".into() }), Response::Ok);
        wait_for(|| printed(sandbox) == format!("{before}{letter}\n-\n"));
    };
    plug(&mut control, &first, 'a');
    plug(&mut control, &first, 'b');

    let snapshot =
        File::options().read(true).write(true).create_new(true).open(first.path("snapshot")).unwrap();
    assert!(control.refused(Request::Save, Some(&snapshot)).contains("it is not paused"));
    assert_eq!(control.ask(Request::Pause), Response::Ok);
    assert!(control.refused(Request::Save, None).contains("no descriptor"));
    assert_eq!(control.ask_with(Request::Save, Some(&snapshot)), Response::Ok);
    // Most of 64 MiB was never touched.
    let blocks = std::os::unix::fs::MetadataExt::blocks(&snapshot.metadata().unwrap());
    assert!(snapshot.metadata().unwrap().len() > 64 << 20 && blocks * 512 < 4 << 20, "{blocks}");
    assert_eq!(control.ask(Request::Resume), Response::Ok);
    plug(&mut control, &first, 'c');
    assert_eq!(control.ask(Request::Stop), Response::Ok);
    assert_eq!(finish(child).status.code(), Some(exit_code::OK));

    // More than once, and no kernel is looked at.
    for _ in 0..2 {
        let second = Sandbox::new(HANG).set("max_vcpus", 2.into());
        let (child, mut control) =
            second.start_with(&["--restore", first.path("snapshot").to_str().unwrap()]);
        control.metrics_of_running();
        plug(&mut control, &second, 'c');
        plug(&mut control, &second, 'd');
        assert_eq!(control.ask(Request::Stop), Response::Ok);
        let output = finish(child);
        assert_eq!(output.status.code(), Some(exit_code::OK), "{}", stderr(&output));
        assert_eq!(second.left(), [""; 0]);
    }

    let good = std::fs::read(first.path("snapshot")).unwrap();
    let refuse = |sandbox: Sandbox, bytes: &[u8], says: &str| {
        std::fs::write(sandbox.path("vmlinux.snapshot"), bytes).unwrap();
        let mut command = sandbox.command();
        let output = finish(command.args(["--restore", "vmlinux.snapshot"]).spawn().unwrap());
        let reason = stderr(&output);
        assert_eq!(output.status.code(), Some(exit_code::BUILD_FAILED), "{reason}");
        assert!(reason.contains(says) && reason.lines().count() == 1, "{says:?} not in {reason}");
    };
    let same = || Sandbox::new(HANG).set("max_vcpus", 2.into());
    refuse(same(), b"", "it is too short");
    refuse(same(), &[0xff; 8192], "its header");
    refuse(same(), &good[..good.len() - 4096], "its memory is not all there");
    refuse(same(), &good[..100], "its length");
    for at in [8, 16, 23, 24, 40, 1000] {
        let mut damaged = good.clone();
        damaged[at] ^= 0x10;
        refuse(same(), &damaged, "damaged");
    }
    refuse(Sandbox::new(HANG), &good, "1 of 2 vCPUs instead of 1 of 1");
    refuse(same().set("memory_mib", 65.into()), &good, "bytes instead of");
    let mut without_vsock = same();
    without_vsock.config.as_object_mut().unwrap().remove("vsock");
    refuse(without_vsock, &good, "PCI slot 0: ");
    let other_cid = serde_json::json!({"guest_cid": 4, "socket": "vsock.sock"});
    refuse(same().set("vsock", other_cid), &good, "guest_cid 4 is not that of the snapshot, 3");
}

#[test]
fn a_share_keeps_a_machine_from_being_saved() {
    let share = serde_json::json!([{"tag": "rvm", "dir": "."}]);
    let sandbox = Sandbox::new(HANG).set("shares", share);
    let (child, mut control) = sandbox.start();
    control.metrics_of_running();
    assert_eq!(control.ask(Request::Pause), Response::Ok);
    let file = tempfile::tempfile().unwrap();
    let message = control.refused(Request::Save, Some(&file));
    assert_eq!(message, "this machine cannot be saved: slot 1: a fs device cannot be saved");
    assert_eq!(control.ask(Request::Stop), Response::Ok);
    assert_eq!(finish(child).status.code(), Some(exit_code::OK));
}

/// mov ecx, 0xc0010007; xor eax, eax; xor edx, edx; wrmsr
const WRITE_OLD_COUNTER: &[u8] = &[0xb9, 0x07, 0x00, 0x01, 0xc0, 0x31, 0xc0, 0x31, 0xd2, 0x0f, 0x30];

#[test]
fn old_performance_counters_fault_instead_of_reaching_the_hosts_log() {
    if Vendor::of_host() != Vendor::Amd {
        return;
    }
    // Denied a moment after the guest has started, and long before Linux tries them.
    let code = [WAIT_FOR_SLOT_1, &print("tries\n"), WRITE_OLD_COUNTER, &print("has them\n"), RESET, HANG];
    let sandbox = Sandbox::new(&code.concat());
    let (child, mut control) = sandbox.start();
    control.metrics_of_running();
    let file = tempfile::NamedTempFile::new_in(sandbox.dir.path()).unwrap();
    file.as_file().set_len(512).unwrap();
    assert_eq!(control.ask_with(disk("s"), Some(file.as_file())), Response::Ok);
    assert_eq!(finish(child).status.code(), Some(exit_code::GUEST_CRASHED));
    assert_eq!(std::fs::read_to_string(sandbox.path("console.log")).unwrap(), "tries\n");
}

#[test]
fn a_hundred_disks_that_come_and_go_leave_nothing() {
    let sandbox = Sandbox::new(HANG);
    let (child, mut control) = sandbox.start();
    control.metrics_of_running();
    let file = tempfile::NamedTempFile::new_in(sandbox.dir.path()).unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let file = File::open(file.path()).unwrap();
    let before = holdings(&child);
    for _ in 0..100 {
        for serial in ["a", "b", "c"] {
            assert_eq!(control.ask_with(disk(serial), Some(&file)), Response::Ok);
        }
        for serial in ["b", "a", "c"] {
            assert_eq!(control.ask(Request::RemoveDisk { serial: serial.into() }), Response::Ok);
        }
    }
    assert_eq!(holdings(&child), before);
    // As many as there are slots beside vsock and network interfaces.
    for number in 0..23 {
        assert_eq!(control.ask_with(disk(&number.to_string()), Some(&file)), Response::Ok);
    }
    assert!(control.refused(disk("one-more"), Some(&file)).contains("room for 24"));
    assert_eq!(control.ask(Request::Stop), Response::Ok);
    assert_eq!(finish(child).status.code(), Some(exit_code::OK));
}

#[test]
fn vcpus_are_added_up_to_the_possible_ones() {
    let sandbox = Sandbox::new(HANG).set("max_vcpus", 3.into());
    let (child, mut control) = sandbox.start();
    control.metrics_of_running();
    let threads = || holdings(&child)[1];
    let before = threads();
    for count in [0, 4, 255] {
        let message = control.refused(Request::SetVcpus { count }, None);
        assert_eq!(message, format!("count: {count} given; must be 1 to 3 (max_vcpus)"));
    }
    assert_eq!(control.ask(Request::SetVcpus { count: 2 }), Response::Ok);
    assert_eq!(threads(), before + 1);
    // Also of a machine that stands still; fewer than there are is no change.
    assert_eq!(control.ask(Request::Pause), Response::Ok);
    for count in [3, 1, 3] {
        assert_eq!(control.ask(Request::SetVcpus { count }), Response::Ok);
        assert_eq!(threads(), before + 2);
    }
    assert_eq!(control.ask(Request::Resume), Response::Ok);
    assert_eq!(control.ask(Request::Stop), Response::Ok);
    let output = finish(child);
    assert_eq!(output.status.code(), Some(exit_code::OK), "{}", stderr(&output));
}

#[test]
fn memory_is_plugged_into_the_running_machine() {
    let code = [WAIT_FOR_SLOT_1, &print("found\n"), HANG].concat();
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
    wait_for(|| printed() == "found\n");
    assert_eq!(control.ask(set(128)), Response::Ok);
    // It has no driver.
    let metrics = control.metrics_of_running();
    assert_eq!((metrics.memory_bytes, metrics.memory_plugged_bytes), (64 << 20, 0));
    assert_eq!(control.ask(Request::Stop), Response::Ok);
    assert_eq!(finish(child).status.code(), Some(exit_code::OK));
    assert_eq!(sandbox.left(), [""; 0]);
}

fn terminate(child: &Child) {
    // SAFETY: the child has not been waited for, so its id is its own.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) }, 0);
}

#[test]
fn termination_signal_ends_what_nobody_owns_in_order() {
    let sandbox = Sandbox::new(HANG);
    let child = sandbox.command().spawn().unwrap();
    ask_at_path(&sandbox.path("vmm.sock"), &Request::Metrics);
    terminate(&child);
    assert_eq!(finish(child).status.code(), Some(exit_code::OK));
    assert_eq!(sandbox.left(), [""; 0]);
}

/// A host that shuts down tells all processes to end; the owner's guest still has to write.
#[test]
fn termination_signal_is_its_owners_business() {
    let sandbox = Sandbox::new(HANG);
    let (child, mut control) = sandbox.start();
    control.metrics_of_running();
    terminate(&child);
    control.metrics_of_running();
    assert_eq!(control.ask(Request::Stop), Response::Ok);
    assert_eq!(finish(child).status.code(), Some(exit_code::OK));
}

#[test]
fn monitor_ends_with_its_owner() {
    let sandbox = Sandbox::new(HANG);
    let (child, mut control) = sandbox.start();
    control.metrics_of_running();
    drop(control);
    assert_eq!(finish(child).status.code(), Some(exit_code::OK));
    assert_eq!(sandbox.left(), [""; 0]);
}

#[test]
fn a_control_descriptor_that_is_none_is_refused() {
    for fd in ["99", "0", "x", "-1"] {
        let output = finish(Sandbox::new(HANG).command().args(["--control-fd", fd]).spawn().unwrap());
        let reason = stderr(&output);
        assert_eq!(output.status.code(), Some(exit_code::BAD_CONFIG), "{reason}");
        assert!(reason.contains("--control-fd: ") && reason.lines().count() == 1, "{reason}");
    }
}

#[test]
fn who_has_nobody_to_tell_ends_as_ever() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let sandbox = Sandbox::new(HANG).set("memory_mib", 1.into());
    let output = finish(sandbox.command().stderr(writer).spawn().unwrap());
    assert_eq!(output.status.code(), Some(exit_code::BAD_CONFIG), "{}", output.status);
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
