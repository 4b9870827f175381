//! The process itself: `/proc/self`, environment, descriptors, limits, scheduling.

use std::{
    fs::{read_dir, read_link, read_to_string},
    os::unix::ffi::OsStrExt,
};

use crate::{
    calls::{Shown, call, signed},
    out::Out,
};

/// Lines of `/proc/self/status` that say what the process may do; the others are
/// counters (proc_pid_status(5)).
const STATUS: &[&str] = &[
    "Name",
    "Umask",
    "Tgid",
    "Pid",
    "PPid",
    "TracerPid",
    "Uid",
    "Gid",
    "Groups",
    "NStgid",
    "NSpid",
    "NSpgid",
    "NSsid",
    "CoreDumping",
    "THP_enabled",
    "Threads",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "Speculation_Store_Bypass",
    "SpeculationIndirectBranch",
    "Cpus_allowed_list",
    "Mems_allowed_list",
];

/// The section.
pub fn print(out: &mut Out) {
    identity(out);
    descriptors(out);
    environment(out);
    limits(out);
    scheduling(out);
    settings(out);
}

/// Who the process is and what it may do.
pub fn identity(out: &mut Out) {
    out.section("status");
    let status = read_to_string("/proc/self/status").unwrap_or_default();
    for line in status.lines() {
        let Some((name, value)) = line.split_once(':') else { continue };
        if STATUS.contains(&name) {
            out.put(name, value.split_whitespace().collect::<Vec<_>>().join(" "));
        }
    }
    out.section("");
}

fn environment(out: &mut Out) {
    out.section("environment");
    out.put("args", std::env::args().collect::<Vec<_>>().join(" "));
    out.put("cwd", std::env::current_dir().map_or_else(|e| e.to_string(), |dir| dir.display().to_string()));
    let link = |path: &str| read_link(path).map_or_else(|e| e.to_string(), |to| to.display().to_string());
    out.put("proc_cwd", link("/proc/self/cwd"));
    out.put("proc_root", link("/proc/self/root"));
    let names: Vec<String> = std::env::vars_os()
        .map(|(name, value)| {
            let (name, value) = (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned());
            out.put(format_args!("variable.{name}"), value);
            name
        })
        .collect();
    out.put("variables", names.join(" "));
    out.section("");
}

fn descriptors(out: &mut Out) {
    out.section("fd");
    let mut numbers: Vec<u32> = Vec::new();
    if let Ok(entries) = read_dir("/proc/self/fd") {
        for entry in entries.flatten() {
            // The one this listing is read from is not the process's.
            let to = read_link(entry.path()).unwrap_or_default();
            if !to.as_os_str().as_bytes().ends_with(b"/fd")
                && let Ok(number) = entry.file_name().to_string_lossy().parse()
            {
                numbers.push(number);
            }
        }
    }
    numbers.sort_unstable();
    out.put("open", numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(" "));
    for number in numbers {
        let to = read_link(format!("/proc/self/fd/{number}")).unwrap_or_default();
        let to = to.to_string_lossy();
        // The number in `pipe:[123]` means nothing.
        out.put(format_args!("{number}.is"), to.split_once(":[").map_or(&*to, |(kind, _)| kind));
        let info = read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        out.put(format_args!("{number}.flags"), flags.unwrap_or("none").trim());
        let stat = nix::sys::stat::fstat(std::os::fd::AsFd::as_fd(&std::io::stdin()));
        if number == 0
            && let Ok(stat) = stat
        {
            out.put("0.mode", format_args!("{:o} {}:{}", stat.st_mode, stat.st_uid, stat.st_gid));
        }
    }
    out.section("");
}

fn limits(out: &mut Out) {
    out.section("limit");
    for line in read_to_string("/proc/self/limits").unwrap_or_default().lines().skip(1) {
        // Columns of 26, 21 and 21 characters (fs/proc/base.c, proc_pid_limits).
        if let (Some(name), Some(values)) = (line.get(..26), line.get(26..)) {
            let values: Vec<&str> = values.split_whitespace().take(2).collect();
            out.put(name.trim().replace(' ', "_"), values.join(" "));
        }
    }
    out.section("");
}

fn scheduling(out: &mut Out) {
    out.section("scheduling");
    let number = |result: crate::calls::Outcome| {
        result.map_or_else(|error| format!("{error:?}"), |number| number.to_string())
    };
    out.put("policy", number(call(libc::SYS_sched_getscheduler, [0])));
    // The system call's answer is 20 minus the nice value (getpriority(2)).
    out.put("priority", number(call(libc::SYS_getpriority, [libc::PRIO_PROCESS as usize, 0])));
    const IOPRIO_WHO_PROCESS: usize = 1;
    out.put("io_priority", number(call(libc::SYS_ioprio_get, [IOPRIO_WHO_PROCESS, 0])));
    out.put("personality", number(call(libc::SYS_personality, [0xffff_ffff])));
    for file in ["oom_score_adj", "coredump_filter", "timerslack_ns", "loginuid"] {
        let value = read_to_string(format!("/proc/self/{file}"));
        out.put(file, value.unwrap_or_else(|error| crate::calls::shown::<()>(Err(error))).trim());
    }
    out.section("");
}

fn settings(out: &mut Out) {
    out.section("setting");
    let prctl = |option: i32| {
        call(libc::SYS_prctl, [option as usize]).map_or_else(|error| format!("{error:?}"), |n| n.to_string())
    };
    for (name, option) in [
        ("dumpable", libc::PR_GET_DUMPABLE),
        ("keep_capabilities", libc::PR_GET_KEEPCAPS),
        ("secure_bits", libc::PR_GET_SECUREBITS),
        ("no_new_privileges", libc::PR_GET_NO_NEW_PRIVS),
        ("timer_slack", libc::PR_GET_TIMERSLACK),
        ("huge_pages_disabled", libc::PR_GET_THP_DISABLE),
    ] {
        out.put(name, prctl(option));
    }
    for (name, option) in
        [("parent_death_signal", libc::PR_GET_PDEATHSIG), ("child_subreaper", libc::PR_GET_CHILD_SUBREAPER)]
    {
        let mut value = -1i32;
        let result = call(libc::SYS_prctl, [option as usize, crate::calls::address_mut(&mut value)]);
        out.put(name, if result.is_ok() { value.to_string() } else { Shown(result).to_string() });
    }
    let (group, session) = (call(libc::SYS_getpgid, [0]), call(libc::SYS_getsid, [0]));
    out.put("leads_its_process_group", group == call(libc::SYS_getpid, []));
    out.put("leads_its_session", session == call(libc::SYS_getpid, []));
    keyring(out);
    out.section("");
}

/// runc gives every container a session keyring of its own name.
fn keyring(out: &mut Out) {
    const KEYCTL_DESCRIBE: usize = 6;
    const SESSION: i64 = -3;
    let mut text = [0u8; 256];
    let result =
        call(libc::SYS_keyctl, [KEYCTL_DESCRIBE, signed(SESSION), text.as_mut_ptr() as usize, text.len()]);
    match result {
        Ok(length) => {
            let length = usize::try_from(length).unwrap_or(0).saturating_sub(1).min(text.len());
            out.put("session_keyring", String::from_utf8_lossy(&text[..length]));
        }
        Err(error) => out.put("session_keyring", format_args!("{error:?}")),
    }
}
