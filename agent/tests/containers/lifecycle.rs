//! How processes end, and that nothing of them stays.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rvm_protocol::agent::{ContainerRef, NamespaceType, Process, ProcessInfo};

use crate::{
    cases::signal,
    fixture::{Machine, Running, container, program, read_until, shell},
};

async fn end(machine: &Machine, id: &str, running: Running) {
    machine.sandbox.signal_process(&signal(id, libc::SIGKILL, false)).unwrap();
    assert_eq!(running.wait().await.code, 137);
    running.delete().await.unwrap();
}

/// Children of this process: `(pid, state)`.
fn children() -> Vec<(u32, String)> {
    let own = std::process::id();
    let list = fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap();
    let state = |pid: &str| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let state = stat.rsplit(") ").next()?.split(' ').next()?.to_owned();
        Some((pid.parse().ok()?, state))
    };
    list.split_whitespace().filter_map(state).collect()
}

/// Waits until `true`, however busy the machine.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

fn listed(machine: &Machine, id: &str) -> Vec<ProcessInfo> {
    let reference = ContainerRef { container_id: id.into(), ..Default::default() };
    machine.sandbox.list_processes(&reference).unwrap()
}

pub async fn signals_as_for_any_init(machine: &Machine) {
    // Without a handler PID 1 of a pid namespace does not even get SIGTERM.
    let running = machine.create(container("init", program(&["sleep", "1000"]))).await.unwrap();
    let pid = running.start().await.unwrap();
    assert_eq!(listed(machine, "init")[0].pid, pid, "one and the same pid");
    machine.sandbox.signal_process(&signal("init", libc::SIGTERM, false)).unwrap();
    let added = machine.create_exec("init", "e", program(&["sleep", "1000"])).unwrap();
    let pid = added.start().await.unwrap();
    let of_added = listed(machine, "init").into_iter().find(|process| process.exec_id == "e");
    assert_eq!(of_added.map(|process| process.pid), Some(pid));
    // To all: the added one is no init and ends, the first one stays.
    machine.sandbox.signal_process(&signal("init", libc::SIGTERM, true)).unwrap();
    assert_eq!(added.wait().await.code, 128 + libc::SIGTERM as u32);
    assert_eq!(listed(machine, "init").len(), 1);
    // A real-time signal is one like the others.
    let added = machine.create_exec("init", "rt", program(&["sleep", "1000"])).unwrap();
    added.start().await.unwrap();
    machine.sandbox.signal_process(&signal("init", 40, true)).unwrap();
    assert_eq!(added.wait().await.code, 128 + 40);
    end(machine, "init", running).await;
}

pub async fn a_signal_to_a_process_that_is_being_made(machine: &Machine) {
    let running = machine.create(container("making", program(&["sleep", "1000"]))).await.unwrap();
    running.start().await.unwrap();
    for n in 0..40_u32 {
        let signal = signal("making", if n % 2 == 0 { libc::SIGKILL } else { libc::SIGTERM }, false);
        let (number, exec) = (signal.signal, format!("e{n}"));
        let mut signal = signal;
        signal.process.mut_or_insert_default().exec_id.clone_from(&exec);
        let added = machine.create_exec("making", &exec, program(&["sleep", "1000"])).unwrap();
        // Before it moves, while it does, and after.
        let later = async {
            tokio::time::sleep(Duration::from_micros(u64::from(n / 2) * 200)).await;
            machine.sandbox.signal_process(&signal)
        };
        // The start is under way when the signal comes; whether it is one is a matter of time.
        let (_, sent) = tokio::join!(added.start(), later);
        sent.unwrap();
        assert_eq!(added.wait().await.code, 128 + number, "{exec}");
        added.delete().await.unwrap();
    }
    assert_eq!(listed(machine, "making").len(), 1);
    end(machine, "making", running).await;
}

pub async fn orphans_are_collected(machine: &Machine) {
    // In the guest's own pid namespace orphans become children of the agent.
    let script = "(sh -c 'exec sleep 0.05' &) ; (sh -c 'exit 3' &) ; echo left; exec sleep 1000";
    let mut request = container("orphans", shell(script));
    request.namespaces.retain(|namespace| namespace.type_ != NamespaceType::PID.into());
    let mut running = machine.create(request).await.unwrap();
    running.start().await.unwrap();
    read_until(running.stdout.as_mut().unwrap(), "left").await;
    eventually("only the container's process is left", || {
        let children = children();
        children.len() == 1 && children[0].1 == "S"
    })
    .await;
    end(machine, "orphans", running).await;
    eventually("nothing is left", || children().is_empty()).await;
}

pub async fn an_added_process_without_its_caller(machine: &Machine) {
    let running = machine.create(container("alone", program(&["sleep", "1000"]))).await.unwrap();
    running.start().await.unwrap();
    // Whoever asked for it is gone before the answer, and so are its streams.
    let process = Process { stdin: true, ..shell("sleep 0.1; touch /run/done; exit 5") };
    let added = machine.create_exec("alone", "e", process).unwrap();
    let reference = added.process.clone();
    drop(added);
    let sandbox = std::sync::Arc::clone(&machine.sandbox);
    let start = tokio::spawn(async move { sandbox.start_process(&reference).await });
    start.await.unwrap().unwrap();
    let reference = crate::fixture::reference("alone", "e");
    assert_eq!(machine.sandbox.wait_process(&reference).await.unwrap().code, 5);
    machine.sandbox.delete_process(&reference).await.unwrap();

    // One that leaves a child with its output open has ended all the same.
    let mut added = machine.create_exec("alone", "f", shell("sleep 1000 & echo started; exit 6")).unwrap();
    added.start().await.unwrap();
    read_until(added.stdout.as_mut().unwrap(), "started").await;
    assert_eq!(added.wait().await.code, 6);
    added.delete().await.unwrap();
    assert_eq!(listed(machine, "alone").len(), 2);
    assert!(listed(machine, "alone").iter().all(|process| process.exec_id.is_empty()));
    end(machine, "alone", running).await;
}

pub async fn processes_in_the_guests_pid_namespace(machine: &Machine) {
    let mut request = container("shared", shell("echo $$; setsid sleep 1000 & exec sleep 1000"));
    request.namespaces.retain(|namespace| namespace.type_ != NamespaceType::PID.into());
    let mut running = machine.create(request).await.unwrap();
    let pid = running.start().await.unwrap();
    let seen = read_until(running.stdout.as_mut().unwrap(), &format!("{pid}\n")).await;
    assert_eq!(seen, format!("ok\n{pid}\n"), "it knows its pid in the guest");
    let added = machine.create_exec("shared", "e", program(&["sleep", "1000"])).unwrap();
    added.start().await.unwrap();
    // It is no init: SIGTERM ends it, and with it all that it and others left.
    machine.sandbox.signal_process(&signal("shared", libc::SIGTERM, false)).unwrap();
    assert_eq!(running.wait().await.code, 143);
    assert_eq!(added.wait().await.code, 137);
    assert!(listed(machine, "shared").is_empty());
    assert!(machine.create_exec("shared", "late", shell("")).is_err());
    running.delete().await.unwrap();
}

/// Resident memory of this process.
fn resident_kib() -> i64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

pub async fn many_added_processes_leak_nothing(machine: &Machine) {
    let request = container("many", program(&["sleep", "1000"]));
    let cgroup = format!("/sys/fs/cgroup{}", request.cgroup_path);
    let running = machine.create(request).await.unwrap();
    running.start().await.unwrap();
    let run = async |n: usize| {
        let exec = format!("e{n}");
        let mut added = match n % 3 {
            // Every way in which one can end.
            0 => machine.create_exec("many", &exec, shell("echo hi")).unwrap(),
            1 => {
                let process = Process { terminal: true, ..shell("echo hi") };
                let mut added = machine.create_exec("many", &exec, process).unwrap();
                added.stdout = added.terminal.take();
                added
            }
            _ => {
                let added = machine.create_exec("many", &exec, program(&["nope"])).unwrap();
                added.start().await.unwrap_err();
                added.wait().await;
                return added.delete().await.unwrap();
            }
        };
        added.start().await.unwrap();
        assert_eq!(added.finish().await.stdout.trim_end(), "hi");
        added.delete().await.unwrap();
    };
    for n in 0..30 {
        run(n).await;
    }
    // The last connection's task may still be about to end.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let (before, memory) = (descriptors(), resident_kib());
    for n in 0..200 {
        run(n).await;
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(descriptors(), before);
    let grown = resident_kib() - memory;
    // 200 of anything of 2 KiB would show.
    assert!(grown < 400, "{grown} KiB more");
    assert_eq!(children().len(), 1, "the container's first process: {:?}", children());
    assert_eq!(listed(machine, "many").len(), 1);
    let below = fs::read_dir(Path::new(&cgroup)).unwrap();
    let below = below.filter(|entry| entry.as_ref().unwrap().file_type().unwrap().is_dir());
    assert_eq!(below.count(), 0, "no cgroup for added processes");
    end(machine, "many", running).await;
}

/// A file system whose server takes a request and keeps it: who waits for the answer cannot
/// even be killed.
struct Silent {
    server: File,
    place: tempfile::TempDir,
}

impl Silent {
    fn mount() -> Self {
        let place = tempfile::tempdir().unwrap();
        let server = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        mount(Some("silent"), place.path(), Some("fuse"), MsFlags::empty(), Some(options.as_str())).unwrap();
        let silent = Self { server, place };
        let request = silent.request();
        // fuse_out_header, then fuse_init_out of version 7.31 with 4096 bytes per write.
        let unique = &request[8..16];
        let mut answer = [&80u32.to_ne_bytes()[..], &[0; 4], unique].concat();
        for word in [7u32, 31, 0, 0, 0, 4096] {
            answer.extend(word.to_ne_bytes());
        }
        answer.resize(80, 0);
        (&silent.server).write_all(&answer).unwrap();
        silent
    }

    /// Takes the next request.
    fn request(&self) -> Vec<u8> {
        let mut request = vec![0; 64 << 10];
        let length = (&self.server).read(&mut request).unwrap();
        request.truncate(length);
        request
    }

    /// The place of a file that nobody ever hears of.
    fn file(&self) -> PathBuf {
        self.place.path().join("file")
    }

    /// Ends the server: who waits is told.
    fn end(self) {
        drop(self.server);
        umount2(self.place.path(), MntFlags::MNT_DETACH).unwrap();
    }
}

pub async fn a_deletion_that_cannot_end_is_given_up(machine: &Machine) {
    let request = container("stuck", program(&["sleep", "1000"]));
    let cgroup = format!("/sys/fs/cgroup{}/cgroup.procs", request.cgroup_path);
    let running = machine.create(request).await.unwrap();
    running.start().await.unwrap();
    let silent = Silent::mount();
    let mut waiting = std::process::Command::new("cat").arg(silent.file()).spawn().unwrap();
    silent.request();
    fs::write(cgroup, waiting.id().to_string()).unwrap();
    machine.sandbox.signal_process(&signal("stuck", libc::SIGKILL, false)).unwrap();
    assert_eq!(running.wait().await.code, 137);

    // Half a minute passes at once where nothing else happens.
    tokio::time::pause();
    let error = running.delete().await.unwrap_err().to_string();
    tokio::time::resume();
    assert!(error.starts_with("killed processes are still there after 30 s: "), "{error}");
    assert!(error.contains("cat"), "{error}");
    silent.end();
    // The agent's reaper may be faster.
    let _ = waiting.wait();
    running.delete().await.unwrap();
}
