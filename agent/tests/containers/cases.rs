//! What must hold of containers.

use std::{fs, panic, path::Path, time::Duration};

use protobuf::MessageField;
use rvm_agent::error::Error;
use rvm_protocol::agent::{NamespaceType, Process, ProcessRef, Rlimit, SignalProcessRequest, User};
use tokio::io::AsyncWriteExt;

use crate::{
    confinement::*,
    fixture::{Machine, container, mount_of, program, read_all, read_until, shell, within, write_all},
    hooks::*,
    isolation::*,
    lifecycle::*,
    limits::*,
    network::*,
    sandbox::*,
};

use crate::mounts::{
    destinations, flags_of_mounts, mounts_that_are_refused, propagation_of_the_root, tmpfs_that_copies_up,
};

/// Only a case that hangs takes this long, on however busy a machine.
const LIMIT: Duration = Duration::from_secs(180);

macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        /// How many cases there are.
        pub const COUNT: usize = [$(stringify!($name)),*].len();

        /// Runs every case whose name contains one of `filter`; returns how many passed, and which failed.
        pub async fn run_all(filter: &[String]) -> (usize, Vec<&'static str>) {
            let machine = Machine::new();
            let mut passed = 0;
            let mut failed = Vec::new();
            $(
                let name = stringify!($name);
                if filter.is_empty() || filter.iter().any(|part| name.contains(part.as_str())) {
                    let ended = within(LIMIT, CatchPanic(Box::pin($name(&machine)))).await;
                    let result = match ended { Some(true) => "ok", Some(false) => "FAILED", None => "FAILED (hangs)" };
                    println!("test {name} ... {result}");
                    if result == "ok" { passed += 1 } else { failed.push(name) }
                }
            )*
            if !nothing_is_left() {
                failed.push("nothing_is_left");
            }
            (passed, failed)
        }
    };
}

cases![
    output_and_exit_code,
    input_arrives_whole,
    what_the_program_sees,
    mounts_and_paths,
    user_and_limits,
    files_of_the_image_stay_as_they_are,
    read_only_root,
    bind_mounts,
    flags_of_mounts,
    tmpfs_that_copies_up,
    destinations,
    mounts_that_are_refused,
    propagation_of_the_root,
    a_terminal,
    added_processes,
    an_added_terminal,
    signals,
    end_of_first_process_ends_all,
    end_of_first_process_ends_all_in_a_shared_pid_namespace,
    output_of_a_dying_process_is_whole,
    unattached_streams_hang_nothing,
    failures_name_the_step,
    failures_leave_nothing,
    deletion,
    standard_output_can_be_opened_again,
    closing_stdin,
    many_added_processes_leak_nothing,
    signals_as_for_any_init,
    a_signal_to_a_process_that_is_being_made,
    orphans_are_collected,
    a_deletion_that_cannot_end_is_given_up,
    an_added_process_without_its_caller,
    processes_in_the_guests_pid_namespace,
    devices_are_filtered,
    a_paused_container_stands_still,
    a_paused_container_can_be_killed,
    limits_are_applied_and_changed,
    wrong_limits_are_refused_by_field,
    statistics,
    the_hierarchy_as_seen_inside,
    user_namespace,
    user_namespace_joined,
    time_namespace,
    namespaces_differ,
    seccomp_filter,
    process_attributes,
    hooks_inside,
    hooks_that_fail,
    hooks_under_a_filter,
    a_working_directory_that_is_not_there,
    a_created_container_that_died_does_not_start,
    two_hundred_at_once,
    namespaces_of_the_sandbox,
    memory_volumes_of_the_sandbox,
    what_the_sandbox_does_not_hold,
    a_pid_namespace_of_the_sandbox,
    nothing_of_the_agent_is_in_sight,
    the_network_is_what_the_host_says,
    interfaces_come_go_and_change_names,
    what_a_container_adds_to_the_network_stays,
    a_network_that_cannot_be_names_what,
];

/// `true` unless the future panicked.
struct CatchPanic<F>(std::pin::Pin<Box<F>>);

impl<F: Future<Output = ()>> Future for CatchPanic<F> {
    type Output = bool;

    fn poll(mut self: std::pin::Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> std::task::Poll<bool> {
        match panic::catch_unwind(panic::AssertUnwindSafe(|| self.0.as_mut().poll(cx))) {
            Ok(std::task::Poll::Ready(())) => std::task::Poll::Ready(true),
            Ok(std::task::Poll::Pending) => std::task::Poll::Pending,
            Err(_) => std::task::Poll::Ready(false),
        }
    }
}

fn nothing_is_left() -> bool {
    let cgroup = format!("/sys/fs/cgroup/rvm-agent-test-{}", std::process::id());
    let layers = fs::read_dir("/run/rvm/scratch").map_or(0, Iterator::count);
    let left = Path::new(&cgroup).exists() || layers > 0;
    println!("nothing is left ... {}", if left { "FAILED" } else { "ok" });
    !left
}

pub fn signal(container: &str, signal: i32, all: bool) -> SignalProcessRequest {
    SignalProcessRequest {
        process: MessageField::some(crate::fixture::reference(container, "")),
        signal: signal as u32,
        all,
        ..Default::default()
    }
}

async fn output_and_exit_code(machine: &Machine) {
    let output = machine.run("exit", "echo out; echo err >&2; exit 42").await;
    assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (42, "out\n", "err\n"));
    let output = machine.run("signal", "kill -9 $$; sleep 5; exit 3").await;
    // The kernel protects PID 1 of a namespace from itself.
    assert_eq!(output.code, 3);
}

async fn input_arrives_whole(machine: &Machine) {
    let process = Process { stdin: true, ..program(&["sha256sum"]) };
    let mut running = machine.create(container("input", process)).await.unwrap();
    running.start().await.unwrap();
    let mut stdin = running.stdin.take().unwrap();
    let zeros = vec![0; 8 << 20];
    let (output, ()) = tokio::join!(running.finish(), write_all(&mut stdin, &zeros));
    assert_eq!(output.stdout, "2daeb1f36095b44b318410b3f4e8b5d989dcc7bb023d1426c492dab0a3053e74  -\n");
    assert_eq!(output.code, 0);
    running.delete().await.unwrap();
}

async fn what_the_program_sees(machine: &Machine) {
    let script = "echo pid=$$; hostname; pwd; echo home=$HOME; umask; ls /proc/self/fd | tr '\\n' ' '; echo; \
                  cat /proc/self/cgroup | tail -1; ip -o link 2>/dev/null | wc -l; \
                  grep -E '^(Cap|NoNewPrivs|SigBlk|SigIgn|SigCgt)' /proc/self/status | tr '\\t\\n' '  '; echo; \
                  cut -d' ' -f6 /proc/1/stat; env | sort | tr '\\n' ' '";
    let output = machine.run("sees", script).await;
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(lines[..5], ["pid=1", "inside", "/", "home=/root", "0022"], "{output:?}");
    // `ls` itself has 3 open on the directory.
    assert_eq!(lines[5], "0 1 2 3 ");
    assert_eq!(lines[6], "0::/");
    let status = lines[8];
    for expected in [
        "CapInh: 0000000000000000",
        "CapPrm: 00000000a80425fb",
        "CapEff: 00000000a80425fb",
        "CapBnd: 00000000a80425fb",
        "CapAmb: 0000000000000000",
        "NoNewPrivs: 1",
        "SigBlk: 0000000000000000",
        "SigIgn: 0000000000000000",
    ] {
        assert!(status.contains(expected), "{expected}: {status}");
    }
    assert_eq!(lines[9], "1", "a session of its own");
    assert!(lines[10].contains("HOME=/root PATH=/usr/local/sbin"), "{}", lines[10]);
}

async fn mounts_and_paths(machine: &Machine) {
    let script = "cat /proc/self/mountinfo; echo ===; \
                  for d in null zero full tty random urandom ptmx; do stat -L -c '%n %F %t:%T %a' /dev/$d; done; \
                  for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done; \
                  stat -c '%a' /dev/shm; wc -c < /proc/version; \
                  echo x > /proc/sys/kernel/domainname && echo WRITABLE; ls /sys/firmware | wc -l; true";
    let output = machine.run("mounts", script).await;
    let (mountinfo, rest) = output.stdout.split_once("===\n").expect("both parts");
    let mounted: Vec<(&str, &str, &str)> = mountinfo
        .lines()
        .map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let dash = fields.iter().position(|field| *field == "-").unwrap();
            (fields[4], fields[5], fields[dash + 1])
        })
        .collect();
    let find = |path: &str| mounted.iter().rev().find(|(target, ..)| *target == path).copied();
    assert_eq!(find("/").map(|m| m.2), Some("overlay"), "{mountinfo}");
    assert_eq!(find("/proc"), Some(("/proc", "rw,nosuid,nodev,noexec,relatime", "proc")));
    assert_eq!(find("/dev"), Some(("/dev", "rw,nosuid", "tmpfs")));
    assert_eq!(find("/dev/pts"), Some(("/dev/pts", "rw,nosuid,noexec,relatime", "devpts")));
    assert_eq!(find("/dev/shm"), Some(("/dev/shm", "rw,nosuid,nodev,noexec,relatime", "tmpfs")));
    assert_eq!(find("/dev/mqueue").map(|m| m.2), Some("mqueue"));
    assert_eq!(find("/sys"), Some(("/sys", "ro,nosuid,nodev,noexec,relatime", "sysfs")));
    assert_eq!(
        find("/sys/fs/cgroup"),
        Some(("/sys/fs/cgroup", "ro,nosuid,nodev,noexec,relatime", "cgroup2"))
    );
    assert_eq!(find("/proc/sys").map(|m| m.1), Some("ro,nosuid,nodev,noexec,relatime"));
    assert_eq!(find("/proc/version").map(|m| m.2), Some("tmpfs"));
    // Nothing of the machine around the container is in sight.
    let known = ["/", "/proc", "/dev", "/sys", "/run"];
    assert!(
        mounted
            .iter()
            .all(|(path, ..)| known.iter().any(|k| path == k || path.starts_with(&format!("{k}/")))),
        "{mountinfo}"
    );
    assert_eq!(mounted.iter().filter(|(path, ..)| *path == "/").count(), 1, "{mountinfo}");
    let expected = "/dev/null character special file 1:3 666\n\
                    /dev/zero character special file 1:5 666\n\
                    /dev/full character special file 1:7 666\n\
                    /dev/tty character special file 5:0 666\n\
                    /dev/random character special file 1:8 666\n\
                    /dev/urandom character special file 1:9 666\n\
                    /dev/ptmx character special file 5:2 666\n\
                    /proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\n\
                    1777\n0\n0\n";
    assert_eq!(rest, expected, "{}", output.stderr);
}

async fn user_and_limits(machine: &Machine) {
    let process = Process {
        user: MessageField::some(User {
            uid: 1234,
            gid: 56,
            additional_gids: vec![7, 8],
            umask: Some(0o027),
            ..Default::default()
        }),
        cwd: "/usr/share".into(),
        rlimits: vec![Rlimit { resource: libc::RLIMIT_NOFILE, soft: 100, hard: 200, ..Default::default() }],
        oom_score_adj: Some(321),
        ..shell(
            "id -u; id -g; id -G; umask; pwd; ulimit -Sn; ulimit -Hn; cat /proc/self/oom_score_adj; echo $HOME; grep CapEff /proc/self/status; touch /x",
        )
    };
    let output = machine.run_request(container("user", process)).await.unwrap();
    let expected = "1234\n56\n56 7 8\n0027\n/usr/share\n100\n200\n321\n/\nCapEff:\t0000000000000000\n";
    assert_eq!(output.stdout, expected, "{}", output.stderr);
    assert!(output.stderr.contains("Permission denied"), "{}", output.stderr);
}

async fn files_of_the_image_stay_as_they_are(machine: &Machine) {
    let before = fs::metadata("/").unwrap().modified().unwrap();
    let script = "rm -r /usr/share/doc && echo changed > /etc/hostname && mkdir /new && stat -c %a / && cat /etc/hostname";
    let output = machine.run("writes", script).await;
    assert_eq!((output.code, output.stdout.as_str()), (0, "755\nchanged\n"), "{}", output.stderr);
    assert!(Path::new("/usr/share/doc").exists() && !Path::new("/new").exists());
    assert_eq!(fs::metadata("/").unwrap().modified().unwrap(), before);
}

async fn read_only_root(machine: &Machine) {
    let mut request =
        container("readonly", shell("touch /x; echo $?; touch /run/x; echo $?; touch /dev/x; echo $?"));
    request.rootfs.mut_or_insert_default().readonly = true;
    request.mounts[1].options.push("ro".into());
    let output = machine.run_request(request).await.unwrap();
    assert_eq!(output.stdout, "1\n0\n1\n", "{}", output.stderr);
}

async fn bind_mounts(machine: &Machine) {
    let share = Path::new(rvm_protocol::guest::VOLUMES_DIR).join("binds");
    fs::create_dir_all(share.join("dir")).unwrap();
    fs::write(share.join("dir/inside"), "in a directory\n").unwrap();
    fs::write(share.join("file"), "a file\n").unwrap();
    let mut request = container(
        "binds",
        shell(
            "cat /new/place/inside /etc/hosts; echo more >> /new/place/inside; echo x > /etc/hosts || echo refused; \
             cat /through/link/inside; stat -f -c '%T %b %S' /tmp/sized",
        ),
    );
    let bind = |destination: &str, source: &str, options: &[&str]| {
        let mut mount = mount_of(destination, "bind", source, options);
        mount.from_share = true;
        mount
    };
    request.mounts.push(bind("/new/place", "binds/dir", &["rbind", "rw"]));
    request.mounts.push(bind("/etc/hosts", "binds/file", &["bind", "ro", "nosuid"]));
    request.mounts.push(bind("/through/link", "binds/dir", &["rbind", "rprivate"]));
    request.mounts.push(mount_of("/tmp/sized", "tmpfs", "tmpfs", &["size=1m", "nr_inodes=16", "noexec"]));
    let output = machine.run_request(request).await.unwrap();
    let expected = "in a directory\na file\nrefused\nin a directory\nmore\ntmpfs 256 4096\n";
    assert_eq!(output.stdout, expected, "{}", output.stderr);
    assert_eq!(fs::read_to_string(share.join("dir/inside")).unwrap(), "in a directory\nmore\n");
    fs::remove_dir_all(&share).unwrap();
}

async fn a_terminal(machine: &Machine) {
    let process = Process {
        terminal: true,
        stdin: true,
        ..shell(
            "tty; stty size; test -c /dev/console && echo console; read line; echo got $line; trap 'stty size; exit 7' WINCH; echo waiting; while :; do sleep 0.05; done",
        )
    };
    let mut running = machine.create(container("terminal", process)).await.unwrap();
    let mut terminal = running.terminal.take().unwrap();
    running.start().await.unwrap();
    let seen = read_until(&mut terminal, "console").await;
    assert!(seen.starts_with("ok\n/dev/pts/0\r\n17 91\r\n"), "{seen:?}");
    terminal.write_all(b"typed\n").await.unwrap();
    read_until(&mut terminal, "waiting").await;
    let size = rvm_protocol::agent::ConsoleSize { width: 100, height: 40, ..Default::default() };
    machine
        .sandbox
        .resize_pty(&rvm_protocol::agent::ResizePtyRequest {
            process: MessageField::some(running.process.clone()),
            size: MessageField::some(size),
            ..Default::default()
        })
        .unwrap();
    let mut rest = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut terminal, &mut rest).await.unwrap();
    assert!(rest.ends_with("40 100\r\n"), "{rest:?}");
    assert_eq!(running.wait().await.code, 7);
    running.delete().await.unwrap();
}

async fn added_processes(machine: &Machine) {
    let running = machine
        .create(container("host", shell("echo secret > /tmp/shared; sleep 1000; exit 0")))
        .await
        .unwrap();
    running.start().await.unwrap();
    let process = Process {
        env: vec!["A=b".into(), "PATH=/bin:/usr/bin".into()],
        user: MessageField::some(User { uid: 33, gid: 33, ..Default::default() }),
        cwd: "/tmp".into(),
        ..shell(
            "while ! test -s shared; do sleep 0.01; done; cat shared; hostname; id -u; echo $A; tail -1 /proc/1/cgroup; tr '\\0' ' ' < /proc/1/cmdline; grep CapBnd /proc/self/status; ls /proc/self/fd | tr '\\n' ' '; exit 9",
        )
    };
    let mut added = machine.create_exec("host", "e1", process.clone()).unwrap();
    assert!(matches!(machine.create_exec("host", "e1", process), Err(Error::AlreadyExists(_))));
    let pid = added.start().await.unwrap();
    assert!(Path::new(&format!("/proc/{pid}")).exists(), "pids are those of the guest: {pid}");
    let output = added.finish().await;
    let expected = "secret\ninside\n33\nb\n0::/\n/bin/sh -c echo secret > /tmp/shared; sleep 1000; exit 0 CapBnd:\t00000000a80425fb\n0 1 2 3 ";
    assert_eq!((output.code, output.stdout.as_str()), (9, expected), "{}", output.stderr);
    assert!(matches!(added.start().await, Err(Error::Precondition(_))));
    added.delete().await.unwrap();
    assert!(matches!(added.delete().await, Err(Error::NotFound(_))));

    for (exec, process, expected) in [
        ("e2", program(&["nope"]), "exec: \"nope\": executable file not found in $PATH"),
        (
            "e3",
            Process { cwd: "/nope".into(), ..shell("") },
            "chdir to cwd (\"/nope\") set in config.json failed: no such file or directory",
        ),
    ] {
        let added = machine.create_exec("host", exec, process).unwrap();
        assert_eq!(added.start().await.unwrap_err().to_string(), expected);
        added.wait().await;
        added.delete().await.unwrap();
    }

    let listed = machine.create_exec("host", "listed", program(&["sleep", "1000"])).unwrap();
    listed.start().await.unwrap();
    let reference = rvm_protocol::agent::ContainerRef { container_id: "host".into(), ..Default::default() };
    let processes = machine.sandbox.list_processes(&reference).unwrap();
    let names: Vec<&str> = processes.iter().map(|process| process.exec_id.as_str()).collect();
    assert!(names.contains(&"listed") && names.contains(&""), "{names:?}");

    machine.sandbox.signal_process(&signal("host", libc::SIGKILL, true)).unwrap();
    assert_eq!(running.wait().await.code, 137);
    assert_eq!(listed.wait().await.code, 137);
    assert!(matches!(machine.create_exec("host", "late", shell("")), Err(Error::Precondition(_))));
    running.delete().await.unwrap();
}

async fn an_added_terminal(machine: &Machine) {
    let running = machine.create(container("host2", program(&["sleep", "1000"]))).await.unwrap();
    running.start().await.unwrap();
    let process = Process { terminal: true, stdin: true, ..shell("stty size; tty; cat") };
    let mut added = machine.create_exec("host2", "t", process).unwrap();
    let mut terminal = added.terminal.take().unwrap();
    added.start().await.unwrap();
    let seen = read_until(&mut terminal, "/dev/pts/0\r\n").await;
    assert!(seen.contains("17 91\r\n"), "{seen:?}");
    // End of input as a user types it.
    terminal.write_all(b"hello\n\x04").await.unwrap();
    let mut rest = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut terminal, &mut rest).await.unwrap();
    assert_eq!(rest.replace("^D\x08\x08", ""), "hello\r\nhello\r\n");
    assert_eq!(added.wait().await.code, 0);
    machine.sandbox.signal_process(&signal("host2", libc::SIGKILL, false)).unwrap();
    running.wait().await;
    running.delete().await.unwrap();
}

async fn signals(machine: &Machine) {
    let script = "trap 'echo term; exit 5' TERM; echo ready; while :; do sleep 0.05; done";
    let mut running = machine.create(container("signals", shell(script))).await.unwrap();
    running.start().await.unwrap();
    let mut stdout = running.stdout.take().unwrap();
    read_until(&mut stdout, "ready").await;
    machine.sandbox.signal_process(&signal("signals", libc::SIGTERM, false)).unwrap();
    assert_eq!(running.wait().await.code, 5);
    // Everyone who asks is answered, again and again.
    assert_eq!(running.wait().await.code, 5);
    let error = machine.sandbox.signal_process(&signal("signals", libc::SIGTERM, false)).unwrap_err();
    assert!(matches!(&error, Error::NotFound(text) if text == "process already finished"), "{error}");
    let error = machine.sandbox.signal_process(&signal("signals", 65, false)).unwrap_err();
    assert!(error.to_string().starts_with("signal: 65"), "{error}");
    running.delete().await.unwrap();
    assert!(matches!(running.delete().await, Err(Error::NotFound(_))));
}

async fn end_of_first_process_ends_all(machine: &Machine) {
    let output = machine.run("children", "sleep 1000 & sleep 1000 & echo started; exit 3").await;
    assert_eq!((output.code, output.stdout.as_str()), (3, "started\n"));
}

async fn end_of_first_process_ends_all_in_a_shared_pid_namespace(machine: &Machine) {
    let mut request = container("shared", shell("setsid sleep 1000 > /dev/null 2>&1 & echo started; exit 4"));
    request.namespaces.retain(|namespace| namespace.type_ != NamespaceType::PID.into());
    let output = machine.run_request(request).await.unwrap();
    assert_eq!((output.code, output.stdout.as_str()), (4, "started\n"));

    // Joining one: the second container sees the first one's processes.
    let first = machine.create(container("first", program(&["sleep", "1000"]))).await.unwrap();
    first.start().await.unwrap();
    let reference = rvm_protocol::agent::ContainerRef { container_id: "first".into(), ..Default::default() };
    let pid = machine.sandbox.list_processes(&reference).unwrap()[0].pid;
    let mut request = container(
        "second",
        shell(
            "tr '\\0' ' ' < /proc/1/cmdline; readlink /proc/1/ns/net > /tmp/a; readlink /proc/self/ns/net | cmp - /tmp/a && echo same",
        ),
    );
    for namespace in &mut request.namespaces {
        match namespace.type_.enum_value() {
            Ok(NamespaceType::PID) => namespace.path = format!("/proc/{pid}/ns/pid"),
            Ok(NamespaceType::NETWORK) => namespace.path = format!("/proc/{pid}/ns/net"),
            _ => {}
        }
    }
    // A process may be looked at across containers by one that may trace.
    let ptrace = 1 << 19;
    let capabilities = request.process.mut_or_insert_default().capabilities.mut_or_insert_default();
    for set in [&mut capabilities.bounding, &mut capabilities.permitted, &mut capabilities.effective] {
        *set |= ptrace;
    }
    let output = machine.run_request(request).await.unwrap();
    assert_eq!(output.stdout, "sleep 1000 same\n", "{}", output.stderr);
    machine.sandbox.signal_process(&signal("first", libc::SIGKILL, false)).unwrap();
    first.wait().await;
    first.delete().await.unwrap();
}

async fn output_of_a_dying_process_is_whole(machine: &Machine) {
    let mut running =
        machine.create(container("output", program(&["head", "-c", "20000000", "/dev/zero"]))).await.unwrap();
    running.start().await.unwrap();
    let stdout = running.stdout.take();
    // The last bytes are still in the pipe when it is gone.
    let output = read_all(stdout).await;
    assert_eq!(output.len(), 20_000_000);
    assert_eq!(running.wait().await.code, 0);
    running.delete().await.unwrap();
}

async fn unattached_streams_hang_nothing(machine: &Machine) {
    let request = container("unattached", shell("echo nobody reads this; exit 6"));
    machine.sandbox.create_container(request).await.unwrap();
    let reference = crate::fixture::reference("unattached", "");
    machine.sandbox.start_process(&reference).await.unwrap();
    assert_eq!(machine.sandbox.wait_process(&reference).await.unwrap().code, 6);
    machine.sandbox.delete_process(&reference).await.unwrap();
}

async fn failures_name_the_step(machine: &Machine) {
    let missing_mount = {
        let mut request = container("fails", shell(""));
        let mut mount = mount_of("/x", "bind", "not/there", &["rbind"]);
        mount.from_share = true;
        request.mounts.push(mount);
        request
    };
    let bad_option = {
        let mut request = container("fails", shell(""));
        request.mounts.push(mount_of("/x", "tmpfs", "tmpfs", &["sise=1m"]));
        request
    };
    let no_such_type = {
        let mut request = container("fails", shell(""));
        request.mounts.push(mount_of("/x", "nofs", "nofs", &[]));
        request
    };
    let no_image = {
        let mut request = container("fails", shell(""));
        request.rootfs.mut_or_insert_default().share_path = "nothing/here".into();
        request
    };
    for (request, expected) in [
        (container("fails", program(&["nope"])), "exec: \"nope\": executable file not found in $PATH"),
        (container("fails", program(&["/nope"])), "exec: \"/nope\": stat /nope: no such file or directory"),
        (container("fails", program(&["/etc"])), "exec: \"/etc\": is a directory"),
        (
            container("fails", Process { cwd: "/etc/passwd/x".into(), ..shell("") }),
            "make the working directory \"/etc/passwd/x\": not a directory",
        ),
        (missing_mount, "bind mount \"/run/rvm/volumes/not/there\" at \"/x\": no such file or directory"),
        (bad_option, "mount \"tmpfs\" at \"/x\": tmpfs: Unknown parameter 'sise'"),
        (no_such_type, "mount \"nofs\" at \"/x\": no such device"),
        (no_image, "find the image's layers at \"/run/rvm/layers/nothing/here\": no such file or directory"),
    ] {
        let error = machine.create(request).await.map(|_| ()).unwrap_err();
        let error = error.to_string();
        // The mounts of every container come before the request's own.
        let text =
            error.strip_prefix("mounts[").and_then(|rest| rest.split_once("]: ")).map(|(_, text)| text);
        assert_eq!(text.unwrap_or(&error), expected);
    }
    let mut request = container("fails", shell(""));
    request.process.mut_or_insert_default().args[0] = "/etc/passwd".into();
    let error = machine.create(request).await.map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "exec: \"/etc/passwd\": permission denied");
}

async fn failures_leave_nothing(machine: &Machine) {
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    for _ in 0..5 {
        machine.create(container("leaves", program(&["nope"]))).await.map(|_| ()).unwrap_err();
    }
    assert_eq!(descriptors(), before);
    assert!(!Path::new(&format!("/sys/fs/cgroup{}", container("leaves", shell("")).cgroup_path)).exists());
    assert!(!Path::new("/run/rvm/scratch/leaves").exists());

    // Neither does one that fails before it has a process.
    let blocker = format!("/sys/fs/cgroup{}", container("leaves", shell("")).cgroup_path);
    fs::create_dir_all(&blocker).unwrap();
    let error = machine.create(container("leaves", shell(""))).await.map(|_| ()).unwrap_err().to_string();
    assert!(error.starts_with("create cgroup ") && error.ends_with(": file exists"), "{error}");
    assert!(!Path::new("/run/rvm/scratch/leaves").exists());
    fs::remove_dir(&blocker).unwrap();
    assert_eq!(descriptors(), before);
    // The id is free again.
    assert_eq!(machine.run("leaves", "exit 8").await.code, 8);
}

async fn deletion(machine: &Machine) {
    let running = machine.create(container("deleted", program(&["sleep", "1000"]))).await.unwrap();
    let again = machine.create(container("deleted", shell(""))).await.map(|_| ());
    assert!(matches!(again, Err(Error::AlreadyExists(_))));
    running.start().await.unwrap();
    assert!(matches!(running.start().await, Err(Error::Precondition(_))));
    assert!(matches!(running.delete().await, Err(Error::Precondition(_))));
    machine.sandbox.signal_process(&signal("deleted", libc::SIGKILL, false)).unwrap();
    running.wait().await;
    running.delete().await.unwrap();

    // One that was never started goes without being stopped first.
    let created = machine.create(container("created", program(&["sleep", "1000"]))).await.unwrap();
    created.delete().await.unwrap();

    // One that is being made goes when it is made: what a volume is mounted from is looked for first.
    let share = Path::new(rvm_protocol::guest::VOLUMES_DIR).join("deletion");
    fs::create_dir_all(&share).unwrap();
    let mut request = container("unwanted", program(&["sleep", "1000"]));
    let mut mount = mount_of("/volume", "bind", "deletion", &["rbind"]);
    mount.from_share = true;
    request.mounts.push(mount);
    let deleted = ProcessRef { container_id: "unwanted".into(), ..Default::default() };
    let (made, early) =
        tokio::join!(machine.sandbox.create_container(request), machine.sandbox.delete_process(&deleted));
    assert!(matches!(early, Err(Error::Precondition(_))), "{early:?}");
    assert!(matches!(made, Err(Error::Precondition(_))), "{made:?}");
    let again = machine.create(container("unwanted", program(&["sleep", "1000"]))).await.unwrap();
    again.delete().await.unwrap();
    fs::remove_dir_all(&share).unwrap();
}

async fn standard_output_can_be_opened_again(machine: &Machine) {
    let process = Process {
        user: MessageField::some(User { uid: 1000, gid: 1000, ..Default::default() }),
        ..shell("echo again > /dev/stdout; echo error > /dev/stderr; readlink /proc/self/fd/0")
    };
    let output = machine.run_request(container("reopen", process)).await.unwrap();
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("again\n/dev/null\n", "error\n"));
}

async fn closing_stdin(machine: &Machine) {
    let process = Process { stdin: true, ..program(&["cat"]) };
    let mut running = machine.create(container("closed", process)).await.unwrap();
    running.start().await.unwrap();
    let mut stdin = running.stdin.take().unwrap();
    // Until it is attached, closing it ends it at once.
    read_until(&mut stdin, "ok\n").await;
    stdin.write_all(b"before").await.unwrap();
    machine.sandbox.close_stdin(&running.process).unwrap();
    let output = running.finish().await;
    assert_eq!((output.code, output.stdout.as_str()), (0, "before"));
    running.delete().await.unwrap();
}
