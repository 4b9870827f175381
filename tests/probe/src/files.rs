//! `/dev`, the root, what is masked, and what new files are like.

use std::{
    fs::{self, File, read_dir, read_link},
    io::Read,
    os::unix::fs::{FileTypeExt, MetadataExt, symlink},
    path::Path,
};

use crate::{
    calls::{in_child, shown, text},
    out::Out,
};

/// The section.
pub fn print(out: &mut Out) {
    out.section("dev");
    devices(out, Path::new("/dev"), "");
    out.section("root");
    for path in ["/", "/bin", "/etc", "/etc/passwd", "/tmp", "/root", "/proc", "/sys", "/dev/shm", "/nested"]
    {
        out.put(path, describe(Path::new(path)));
    }
    let mut names: Vec<String> = read_dir("/")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    out.put("entries", names.join(" "));
    for path in ["/data/file", "/data/new", "/volume/file", "/volume/below/file", "/single", "/etc/hosts"] {
        let content = fs::read_to_string(path);
        out.put(format_args!("{path}.content"), content.unwrap_or_else(|e| shown::<()>(Err(e))));
    }
    out.section("new");
    new_files(out);
    out.section("program");
    programs(out);
    out.section("");
}

/// What `/proc` and `/sys` hide or protect. Apart from the others, because it
/// wants a process that may see what is not hidden.
pub fn print_masked(out: &mut Out) {
    const MASKED: [&str; 11] = [
        "/proc/acpi",
        "/proc/asound",
        "/proc/kcore",
        "/proc/keys",
        "/proc/latency_stats",
        "/proc/sched_debug",
        "/proc/scsi",
        "/proc/timer_list",
        "/proc/timer_stats",
        "/sys/devices/virtual/powercap",
        "/sys/firmware",
    ];
    const PROTECTED: [&str; 17] = [
        "/proc/sys/fs/file-max",
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/domainname",
        "/proc/sys/kernel/hostname",
        "/proc/sys/kernel/shmmax",
        "/proc/sys/net/ipv4/ip_forward",
        "/proc/sys/vm/overcommit_memory",
        "/proc/sysrq-trigger",
        "/proc/self/oom_score_adj",
        "/proc/self/setgroups",
        "/proc/self/uid_map",
        "/proc/self/attr/current",
        "/proc/self/coredump_filter",
        "/sys/fs/cgroup/cgroup.procs",
        "/sys/kernel/uevent_seqnum",
        "/sys/power/state",
        "/sys/class/net/lo/mtu",
    ];
    out.section("masked");
    for path in MASKED {
        out.put(path, masked(Path::new(path)));
    }
    out.section("write");
    for path in PROTECTED {
        out.put(path, shown(File::options().write(true).open(path)));
    }
    for dir in ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/sys", "/sys/fs/cgroup", "/"] {
        out.put(dir, shown(nix::unistd::access(dir, nix::unistd::AccessFlags::W_OK).map_err(Into::into)));
    }
    out.section("");
}

fn devices(out: &mut Out, dir: &Path, prefix: &str) {
    let mut entries: Vec<_> = read_dir(dir).into_iter().flatten().flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    let mut names = Vec::new();
    for entry in entries {
        let path = entry.path();
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        out.put(&name, describe(&path));
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && prefix.len() < 32 {
            devices(out, &path, &format!("{name}/"));
        }
        names.push(name);
    }
    if prefix.is_empty() {
        out.put("names", names.join(" "));
    }
}

/// Type, device number or link, mode, owner.
fn describe(path: &Path) -> String {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) => return shown::<()>(Err(error)),
    };
    let kind = meta.file_type();
    let number = || format!("{}:{}", nix::sys::stat::major(meta.rdev()), nix::sys::stat::minor(meta.rdev()));
    let what = if kind.is_symlink() {
        let to = read_link(path).unwrap_or_default();
        return format!("link to {} {}:{}", to.display(), meta.uid(), meta.gid());
    } else if kind.is_char_device() {
        format!("character {}", number())
    } else if kind.is_block_device() {
        format!("block {}", number())
    } else if kind.is_dir() {
        "directory".to_owned()
    } else if kind.is_fifo() {
        "fifo".to_owned()
    } else if kind.is_socket() {
        "socket".to_owned()
    } else {
        "file".to_owned()
    };
    format!("{what} {:o} {}:{}", meta.mode() & 0o7777, meta.uid(), meta.gid())
}

/// Whether there is anything to see.
fn masked(path: &Path) -> String {
    let described = describe(path);
    if path.is_dir() {
        let count = read_dir(path).into_iter().flatten().count();
        return format!("{described}, {}", if count == 0 { "empty" } else { "not empty" });
    }
    match File::open(path) {
        Ok(file) => {
            let mut bytes = [0; 16];
            let read = file.take(16).read(&mut bytes);
            let seen = read.map(|count| if count == 0 { "nothing" } else { "something" });
            format!("{described}, reads {}", seen.map_or_else(|e| shown::<()>(Err(e)), str::to_owned))
        }
        Err(error) => format!("{described}, {}", shown::<()>(Err(error))),
    }
}

fn new_files(out: &mut Out) {
    for dir in ["/tmp", "/data", "/volume", "/root", "/dev/shm", "/run"] {
        let at = |name: &str| Path::new(dir).join(name);
        out.put(format_args!("{dir}.file"), shown(File::create(at("probe-file"))));
        if fs::symlink_metadata(at("probe-file")).is_err() {
            continue;
        }
        out.put(format_args!("{dir}.file.is"), describe(&at("probe-file")));
        out.put(format_args!("{dir}.dir"), shown(fs::create_dir(at("probe-dir"))));
        out.put(format_args!("{dir}.dir.is"), describe(&at("probe-dir")));
        out.put(format_args!("{dir}.link"), shown(fs::hard_link(at("probe-file"), at("probe-link"))));
        out.put(format_args!("{dir}.symlink"), shown(symlink("probe-file", at("probe-symlink"))));
        out.put(format_args!("{dir}.rename"), shown(fs::rename(at("probe-link"), at("probe-name"))));
        for name in ["probe-file", "probe-link", "probe-symlink", "probe-name"] {
            // Whichever were made.
            let _ = fs::remove_file(at(name));
        }
        out.put(format_args!("{dir}.remove"), shown(fs::remove_dir(at("probe-dir"))));
    }
}

/// What set-user-id and file capabilities do: each program is this one.
fn programs(out: &mut Out) {
    for path in
        ["/bin/probe-suid", "/bin/probe-caps", "/volume/probe-suid", "/noexec/probe", "/nosuid/probe-suid"]
    {
        if fs::symlink_metadata(path).is_err() {
            continue;
        }
        out.put(format_args!("{path}.is"), describe(Path::new(path)));
        out.put(format_args!("{path}.capability"), capability(path));
        let output = std::process::Command::new(path).arg("capabilities").output();
        match output {
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                for line in text.lines() {
                    let Some((key, value)) = line.split_once(" = ") else { continue };
                    let key = key.trim_start_matches("status.");
                    if ["Uid", "Gid", "CapPrm", "CapEff", "CapAmb", "CapInh"].contains(&key) {
                        out.put(format_args!("{path}.{key}"), value);
                    }
                }
            }
            Err(error) => out.put(format_args!("{path}.run"), shown::<()>(Err(error))),
        }
    }
    out.put("child", in_child(|| "runs".to_owned()));
}

fn capability(path: &str) -> String {
    let Ok(path) = std::ffi::CString::new(path) else { return String::new() };
    let mut value = [0u8; 64];
    let args = [text(&path), text(c"security.capability"), value.as_mut_ptr() as usize, value.len()];
    match crate::calls::call(libc::SYS_getxattr, args) {
        Ok(length) => {
            let length = usize::try_from(length).unwrap_or(0).min(value.len());
            value[..length].iter().map(|byte| format!("{byte:02x}")).collect()
        }
        Err(error) => format!("{error:?}"),
    }
}
