//! Seccomp filters and the attributes of processes.

use std::fs;

use protobuf::MessageField;
use rvm_protocol::agent::{Capabilities, IoPriority, Process, Rlimit, Scheduler, Seccomp};

use crate::{
    cases::signal,
    fixture::{Machine, container, program, read_until, shell},
};

const LOAD_NUMBER: (u16, u8, u8, u32) = (0x20, 0, 0, 0);
const ALLOW: (u16, u8, u8, u32) = (0x06, 0, 0, 0x7fff_0000);
/// What no program fails with by itself.
const NO_MEDIUM: (u16, u8, u8, u32) = (0x06, 0, 0, 0x0005_0000 | libc::ENOMEDIUM as u32);

/// A filter by which these system calls fail, and the others work.
pub fn without(calls: &[libc::c_long]) -> Seccomp {
    let mut program = vec![LOAD_NUMBER];
    for (index, call) in calls.iter().enumerate() {
        let to_the_end = (calls.len() - index) as u8;
        program.push((0x15, to_the_end, 0, *call as u32));
    }
    program.extend([ALLOW, NO_MEDIUM]);
    let program = program.into_iter().flat_map(|(code, jt, jf, k)| {
        let mut bytes = code.to_ne_bytes().to_vec();
        bytes.extend([jt, jf]);
        bytes.extend(k.to_ne_bytes());
        bytes
    });
    Seccomp { program: program.collect(), ..Default::default() }
}

pub async fn seccomp_filter(machine: &Machine) {
    for no_new_privileges in [true, false] {
        let process = Process {
            no_new_privileges,
            ..shell("mkdir /run/x; grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status; exec sleep 1000")
        };
        let mut request = container("seccomp", process.clone());
        // The sockets' calls as well, with which the agent and its child speak.
        request.seccomp = MessageField::some(without(&[
            libc::SYS_mkdir,
            libc::SYS_mkdirat,
            libc::SYS_sendmsg,
            libc::SYS_sendto,
            libc::SYS_recvfrom,
            libc::SYS_recvmsg,
        ]));
        let mut running = machine.create(request).await.unwrap();
        running.start().await.unwrap();
        let mut stdout = running.stdout.take().unwrap();
        let expected = format!("ok\nNoNewPrivs:\t{}\nSeccomp:\t2\n", u8::from(no_new_privileges));
        assert_eq!(read_until(&mut stdout, "Seccomp:\t2\n").await, expected);
        let mut stderr = running.stderr.take().unwrap();
        read_until(&mut stderr, "No medium found\n").await;

        let mut added =
            machine.create_exec("seccomp", "e", Process { no_new_privileges, ..shell("mkdir /run/y") });
        let added = added.as_mut().unwrap();
        added.start().await.unwrap();
        let output = added.finish().await;
        assert!(output.code == 1 && output.stderr.contains("No medium found"), "{output:?}");
        // A failure is told through the filter.
        let added =
            machine.create_exec("seccomp", "f", Process { no_new_privileges, ..program(&["nope"]) }).unwrap();
        let error = added.start().await.unwrap_err().to_string();
        assert_eq!(error, "exec: \"nope\": executable file not found in $PATH");
        machine.sandbox.signal_process(&signal("seccomp", libc::SIGKILL, false)).unwrap();
        running.wait().await;
        running.delete().await.unwrap();

        // A filter that does not end is none to the kernel.
        let mut request = container("seccomp", process);
        let mut endless = without(&[]);
        endless.program.truncate(8);
        request.seccomp = MessageField::some(endless);
        let error = match machine.create(request).await {
            Ok(running) => {
                let error = running.start().await.unwrap_err();
                running.wait().await;
                running.delete().await.unwrap();
                error
            }
            Err(error) => error,
        };
        assert_eq!(error.to_string(), "load the seccomp filter: invalid argument");
    }
}

pub async fn process_attributes(machine: &Machine) {
    let cap = |set| MessageField::some(Capabilities { ..set });
    let (chown, net_bind, setuid) = (1u64 << 0, 1u64 << 10, 1u64 << 7);
    let process = Process {
        io_priority: MessageField::some(IoPriority { class: 2, priority: 6, ..Default::default() }),
        scheduler: MessageField::some(Scheduler { policy: 3, nice: 5, ..Default::default() }),
        rlimits: vec![
            Rlimit { resource: libc::RLIMIT_CORE, soft: 0, hard: 0, ..Default::default() },
            Rlimit { resource: libc::RLIMIT_NPROC, soft: 500, hard: 600, ..Default::default() },
        ],
        capabilities: cap(Capabilities {
            bounding: chown | net_bind | setuid,
            permitted: chown | net_bind,
            effective: net_bind,
            inheritable: net_bind | setuid,
            ambient: net_bind,
            ..Default::default()
        }),
        no_new_privileges: false,
        // Of root execve makes more than the spec gives.
        user: MessageField::some(rvm_protocol::agent::User { uid: 9, gid: 9, ..Default::default() }),
        ..shell(
            "cut -d' ' -f19,41 /proc/self/stat; ionice -p $$; uname -m; cat /proc/sys/kernel/domainname; \
             ulimit -c; grep -o 'Max processes.*' /proc/self/limits | tr -s ' '; grep -E '^Cap' /proc/self/status; sleep 1000",
        )
    };
    let mut request = container("attributes", process);
    // PER_LINUX32
    request.personality = Some(8);
    request.domainname = "example".into();
    let mut running = machine.create(request).await.unwrap();
    running.start().await.unwrap();
    let mut stdout = running.stdout.take().unwrap();
    let seen = read_until(&mut stdout, "CapAmb:\t0000000000000400\n").await;
    let expected = "ok\n5 3\nbest-effort: prio 6\ni686\nexample\n0\nMax processes 500 600 processes \n\
                    CapInh:\t0000000000000480\nCapPrm:\t0000000000000400\nCapEff:\t0000000000000400\n\
                    CapBnd:\t0000000000000481\nCapAmb:\t0000000000000400\n";
    assert_eq!(seen, expected);

    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
    let last = online.trim().rsplit(['-', ',']).next().unwrap().to_owned();
    let process = Process {
        initial_cpus: "0".into(),
        final_cpus: last.clone(),
        oom_score_adj: Some(5),
        ..shell("grep Cpus_allowed_list /proc/self/status; uname -m; cat /proc/self/oom_score_adj")
    };
    let mut added = machine.create_exec("attributes", "e", process).unwrap();
    added.start().await.unwrap();
    let output = added.finish().await;
    assert_eq!(output.stdout, format!("Cpus_allowed_list:\t{last}\ni686\n5\n"), "{}", output.stderr);

    // Refused by the kernel: nothing is left half made.
    let process = Process {
        scheduler: MessageField::some(Scheduler { policy: 1, priority: 1000, ..Default::default() }),
        ..shell("")
    };
    let added = machine.create_exec("attributes", "s", process).unwrap();
    let error = added.start().await.unwrap_err().to_string();
    assert_eq!(error, "set scheduler policy 1 with nice 0 and priority 1000: invalid argument");
    added.wait().await;
    added.delete().await.unwrap();
    machine.sandbox.signal_process(&signal("attributes", libc::SIGKILL, false)).unwrap();
    running.wait().await;
    running.delete().await.unwrap();
}
