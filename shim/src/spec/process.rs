//! `process`: of the container, and of an exec.

use std::collections::{BTreeSet, HashMap};

use oci_spec::runtime::{self as oci, IOPriorityClass, PosixRlimitType};
use rvm_protocol::agent::{Capabilities, ConsoleSize, IoPriority, Process, Rlimit, User};

use super::{SpecError, absolute_path, labels, resources::list, scheduling, text};
use crate::config::Compat;

/// Resources Linux limits (`RLIM_NLIMITS`).
const RESOURCES: u32 = 16;
/// Linux's default for fs.nr_open, above which nobody may raise RLIMIT_NOFILE.
const GUEST_NR_OPEN: u64 = 1 << 20;

/// Capabilities by number (capabilities(7), linux/capability.h).
pub(crate) const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Checks a process; `at` is its path in the document.
pub(super) fn translate(
    at: &str,
    process: &oci::Process,
    compat: &Compat,
    not_applied: &mut Vec<String>,
) -> Result<Process, SpecError> {
    if process.command_line().as_ref().is_some_and(|line| !line.is_empty()) {
        return Err(SpecError::unsupported(format!("{at}.commandLine"), "it is for Windows; use args"));
    }
    labels::apparmor(&format!("{at}.apparmorProfile"), process.apparmor_profile(), compat, not_applied)?;
    labels::selinux(&format!("{at}.selinuxLabel"), process.selinux_label(), compat, not_applied)?;

    let args = strings(&format!("{at}.args"), process.args().as_deref())?;
    match args.first() {
        None => {
            return Err(SpecError::field(
                format!("{at}.args"),
                "is missing or empty; its first element is the program to run",
            ));
        }
        Some(program) if program.is_empty() => {
            return Err(SpecError::field(format!("{at}.args[0]"), "is empty; it must be the program to run"));
        }
        Some(_) => {}
    }
    let user = process.user();
    let affinity = process.exec_cpu_affinity().clone().unwrap_or_default();
    Ok(Process {
        args,
        env: environment(&format!("{at}.env"), process.env().as_deref())?,
        cwd: absolute_path(&format!("{at}.cwd"), process.cwd())?,
        terminal: process.terminal().unwrap_or(false),
        console_size: process.console_size().map(console_size).into(),
        user: Some(User {
            uid: user.uid(),
            gid: user.gid(),
            additional_gids: user.additional_gids().clone().unwrap_or_default(),
            umask: umask(at, user.umask())?,
            ..Default::default()
        })
        .into(),
        // Left out, an exec has those of its container and a first process none, as with runc.
        capabilities: process.capabilities().as_ref().map(capabilities).into(),
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        rlimits: with_inherited(rlimits(at, process.rlimits().as_deref().unwrap_or_default())?),
        oom_score_adj: oom_score_adj(at, process.oom_score_adj())?,
        io_priority: process.io_priority().as_ref().map(|io| io_priority(at, io)).transpose()?.into(),
        scheduler: process
            .scheduler()
            .as_ref()
            .map(|scheduler| scheduling::translate(&format!("{at}.scheduler"), scheduler))
            .transpose()?
            .into(),
        initial_cpus: list(&format!("{at}.execCPUAffinity.initial"), affinity.initial().as_deref())?,
        final_cpus: list(&format!("{at}.execCPUAffinity.final"), affinity.cpu_affinity_final().as_deref())?,
        ..Default::default()
    })
}

fn strings(field: &str, values: Option<&[String]>) -> Result<Vec<String>, SpecError> {
    values
        .unwrap_or_default()
        .iter()
        .enumerate()
        .map(|(n, value)| text(format!("{field}[{n}]"), Some(value)))
        .collect()
}

/// Variables, each once and with its last value: a program finds the first of
/// two, while whoever added the second meant to replace it. runc does the same.
fn environment(field: &str, values: Option<&[String]>) -> Result<Vec<String>, SpecError> {
    let mut environment = strings(field, values)?;
    let mut last = HashMap::new();
    for (n, variable) in environment.iter().enumerate() {
        match variable.split_once('=') {
            Some((name, _)) if !name.is_empty() => last.insert(name.to_owned(), variable.clone()),
            _ => {
                let problem = format!("must be NAME=VALUE, is {variable:?}");
                return Err(SpecError::field(format!("{field}[{n}]"), problem));
            }
        };
    }
    // Where it first stood.
    environment.retain_mut(|variable| {
        let name = variable.split('=').next().unwrap_or_default();
        match last.remove(name) {
            Some(value) => {
                *variable = value;
                true
            }
            None => false,
        }
    });
    Ok(environment)
}

fn console_size(size: oci::Box) -> ConsoleSize {
    let clamp = |cells: u64| cells.min(u64::from(u16::MAX)) as u32;
    ConsoleSize { width: clamp(size.width()), height: clamp(size.height()), ..Default::default() }
}

fn umask(at: &str, umask: Option<u32>) -> Result<Option<u32>, SpecError> {
    match umask {
        Some(umask) if umask > 0o777 => {
            Err(SpecError::field(format!("{at}.user.umask"), format!("must be 0 to 0777, is {umask:#o}")))
        }
        umask => Ok(umask),
    }
}

fn oom_score_adj(at: &str, value: Option<i32>) -> Result<Option<i32>, SpecError> {
    match value {
        Some(value) if !(-1000..=1000).contains(&value) => {
            Err(SpecError::field(format!("{at}.oomScoreAdj"), format!("must be -1000 to 1000, is {value}")))
        }
        value => Ok(value),
    }
}

fn io_priority(at: &str, io: &oci::LinuxIOPriority) -> Result<IoPriority, SpecError> {
    // linux/ioprio.h
    let class = match io.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    match u32::try_from(io.priority()) {
        Ok(priority @ 0..=7) => Ok(IoPriority { class, priority, ..Default::default() }),
        _ => Err(SpecError::field(
            format!("{at}.ioPriority.priority"),
            format!("must be 0 to 7, is {}", io.priority()),
        )),
    }
}

fn capabilities(sets: &oci::LinuxCapabilities) -> Capabilities {
    let mask = |set: &Option<oci::Capabilities>| set.iter().flatten().fold(0, |mask, cap| mask | bit(*cap));
    Capabilities {
        bounding: mask(sets.bounding()),
        effective: mask(sets.effective()),
        inheritable: mask(sets.inheritable()),
        permitted: mask(sets.permitted()),
        ambient: mask(sets.ambient()),
        ..Default::default()
    }
}

/// The capability's bit in a mask.
pub(super) fn bit(capability: oci::Capability) -> u64 {
    let name = capability.to_string();
    CAPABILITIES.iter().position(|known| *known == name).map_or(0, |number| 1 << number)
}

fn rlimits(at: &str, limits: &[oci::PosixRlimit]) -> Result<Vec<Rlimit>, SpecError> {
    let mut seen = BTreeSet::new();
    let mut out = Vec::with_capacity(limits.len());
    for (n, limit) in limits.iter().enumerate() {
        let field = format!("{at}.rlimits[{n}]");
        let resource = rlimit_number(limit.typ());
        if !seen.insert(resource) {
            return Err(SpecError::field(field, format!("{} is there twice", limit.typ())));
        }
        if limit.soft() > limit.hard() {
            return Err(SpecError::field(
                field,
                format!("soft must not be above hard, is {} above {}", limit.soft(), limit.hard()),
            ));
        }
        out.push(Rlimit { resource, soft: limit.soft(), hard: limit.hard(), ..Default::default() });
    }
    Ok(out)
}

/// Limits the spec does not name are those of whoever starts the container, as
/// with runc: an operator sets them for containerd's service.
fn with_inherited(mut limits: Vec<Rlimit>) -> Vec<Rlimit> {
    let named: BTreeSet<u32> = limits.iter().map(|limit| limit.resource).collect();
    for resource in (0..RESOURCES).filter(|resource| !named.contains(resource)) {
        let mut own = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `own` is a valid rlimit for the call to fill in.
        if unsafe { libc::getrlimit(resource, &raw mut own) } != 0 {
            continue;
        }
        // The host may allow more open files than the guest's kernel does.
        let most = if resource == libc::RLIMIT_NOFILE { GUEST_NR_OPEN } else { u64::MAX };
        let (soft, hard) = (own.rlim_cur.min(most), own.rlim_max.min(most));
        limits.push(Rlimit { resource, soft, hard, ..Default::default() });
    }
    limits
}

fn rlimit_number(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}
