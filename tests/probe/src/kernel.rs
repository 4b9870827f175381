//! What the kernel is to the process: names, namespaces, cgroup, sysctls.

use std::{
    fs::{File, read_dir, read_link, read_to_string},
    path::Path,
};

use crate::{calls::shown, out::Out};

/// The section.
pub fn print(out: &mut Out) {
    names(out);
    namespaces(out);
    cgroup(out);
    sysctls(out);
    network(out);
}

fn names(out: &mut Out) {
    out.section("uname");
    if let Ok(name) = nix::sys::utsname::uname() {
        out.put("system", name.sysname().to_string_lossy());
        out.put("node", name.nodename().to_string_lossy());
        out.put("release", name.release().to_string_lossy());
        out.put("version", name.version().to_string_lossy());
        out.put("machine", name.machine().to_string_lossy());
        out.put("domain", name.domainname().to_string_lossy());
    }
    out.section("");
}

fn namespaces(out: &mut Out) {
    /// Numbers of the kernel's first namespaces (include/linux/proc_ns.h); those
    /// of mount and network namespaces are not fixed.
    const FIRST: [(&str, u32); 6] = [
        ("ipc", 0xefff_ffff),
        ("uts", 0xefff_fffe),
        ("user", 0xefff_fffd),
        ("pid", 0xefff_fffc),
        ("cgroup", 0xefff_fffb),
        ("time", 0xefff_fffa),
    ];
    out.section("namespace");
    for (name, first) in FIRST {
        let is = match read_link(format!("/proc/self/ns/{name}")) {
            Ok(to) if to.as_os_str() == format!("{name}:[{first}]").as_str() => {
                "the kernel's first".to_owned()
            }
            Ok(_) => "its own".to_owned(),
            Err(error) => shown::<()>(Err(error)),
        };
        out.put(name, is);
    }
    for name in ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"] {
        let of = |process: &str| read_link(format!("/proc/{process}/ns/{name}")).ok();
        out.put(format_args!("{name}.same_as_init"), of("self") == of("1"));
    }
    for (name, children) in [("pid", "pid_for_children"), ("time", "time_for_children")] {
        let of = |name: &str| read_link(format!("/proc/self/ns/{name}")).ok();
        out.put(format_args!("{children}_is_own"), of(name) == of(children));
    }
    for file in ["uid_map", "gid_map", "setgroups", "timens_offsets", "projid_map"] {
        let text = read_to_string(format!("/proc/self/{file}"));
        let text = text.unwrap_or_else(|error| shown::<()>(Err(error)));
        let lines: Vec<String> =
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        out.put(file, lines.join("; "));
    }
    out.section("");
}

fn cgroup(out: &mut Out) {
    const FILES: [&str; 23] = [
        "cgroup.controllers",
        "cgroup.freeze",
        "cgroup.max.depth",
        "cgroup.max.descendants",
        "cgroup.procs",
        "cgroup.subtree_control",
        "cgroup.type",
        "cpu.idle",
        "cpu.max",
        "cpu.max.burst",
        "cpu.weight",
        "cpuset.cpus",
        "cpuset.mems",
        "hugetlb.2MB.max",
        "io.max",
        "io.weight",
        "memory.high",
        "memory.low",
        "memory.max",
        "memory.min",
        "memory.oom.group",
        "memory.swap.max",
        "pids.max",
    ];
    out.section("cgroup");
    let path = read_to_string("/proc/self/cgroup").unwrap_or_default();
    out.put("path", path.trim());
    let root = Path::new("/sys/fs/cgroup");
    let below = path.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let dir = root.join(below);
    for file in FILES {
        let value = read_to_string(dir.join(file));
        out.put(file, value.unwrap_or_else(|error| shown::<()>(Err(error))).trim());
    }
    out.put("write_procs", shown(File::options().write(true).open(dir.join("cgroup.procs"))));
    let mut children: Vec<String> = read_dir(&dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    children.sort();
    out.put("children", children.join(" "));
    out.section("");
}

fn sysctls(out: &mut Out) {
    const NAMES: [&str; 60] = [
        "fs/file-max",
        "fs/inotify/max_queued_events",
        "fs/inotify/max_user_instances",
        "fs/mqueue/msg_default",
        "fs/mqueue/msg_max",
        "fs/mqueue/msgsize_default",
        "fs/mqueue/msgsize_max",
        "fs/mqueue/queues_max",
        "fs/nr_open",
        "fs/pipe-max-size",
        "fs/protected_fifos",
        "fs/protected_hardlinks",
        "fs/protected_regular",
        "fs/protected_symlinks",
        "fs/suid_dumpable",
        "kernel/cap_last_cap",
        "kernel/core_pattern",
        "kernel/core_uses_pid",
        "kernel/dmesg_restrict",
        "kernel/domainname",
        "kernel/hostname",
        "kernel/keys/maxkeys",
        "kernel/kptr_restrict",
        "kernel/msgmax",
        "kernel/msgmnb",
        "kernel/msgmni",
        "kernel/ngroups_max",
        "kernel/overflowuid",
        "kernel/panic",
        "kernel/panic_on_oops",
        "kernel/perf_event_paranoid",
        "kernel/pid_max",
        "kernel/print-fatal-signals",
        "kernel/randomize_va_space",
        "kernel/sched_rt_runtime_us",
        "kernel/sem",
        "kernel/shm_rmid_forced",
        "kernel/shmall",
        "kernel/shmmax",
        "kernel/shmmni",
        "kernel/sysrq",
        "kernel/threads-max",
        "kernel/unprivileged_bpf_disabled",
        "net/core/somaxconn",
        "net/ipv4/ip_default_ttl",
        "net/ipv4/ip_forward",
        "net/ipv4/ip_local_port_range",
        "net/ipv4/ip_nonlocal_bind",
        "net/ipv4/ip_unprivileged_port_start",
        "net/ipv4/ping_group_range",
        "net/ipv4/tcp_congestion_control",
        "net/ipv4/tcp_fin_timeout",
        "net/ipv4/tcp_keepalive_time",
        "net/ipv4/tcp_syncookies",
        "net/ipv6/conf/all/disable_ipv6",
        "net/unix/max_dgram_qlen",
        "vm/max_map_count",
        "vm/mmap_min_addr",
        "vm/overcommit_memory",
        "vm/swappiness",
    ];
    out.section("sysctl");
    for name in NAMES {
        let value = read_to_string(Path::new("/proc/sys").join(name));
        let value = value.unwrap_or_else(|error| shown::<()>(Err(error)));
        out.put(name.replace('/', "."), value.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    out.section("");
}

fn network(out: &mut Out) {
    out.section("network");
    let mut names: Vec<String> = read_to_string("/proc/self/net/dev")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split_once(':').map(|(name, _)| name.trim().to_owned()))
        .collect();
    names.sort();
    out.put("interfaces", names.join(" "));
    for file in ["flags", "mtu", "operstate"] {
        let value = read_to_string(format!("/sys/class/net/lo/{file}"));
        out.put(format_args!("lo.{file}"), value.unwrap_or_else(|error| shown::<()>(Err(error))).trim());
    }
    let routes = read_to_string("/proc/self/net/route").unwrap_or_default();
    out.put("routes", routes.lines().skip(1).count());
    let addresses = read_to_string("/proc/self/net/if_inet6").unwrap_or_default();
    let addresses: Vec<&str> = addresses.lines().filter_map(|line| line.split(' ').next()).collect();
    out.put("ipv6_addresses", addresses.join(" "));
    out.section("");
}
