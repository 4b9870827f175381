//! What is mounted, and how (proc_pid_mountinfo(5)).

use std::{collections::HashMap, fs::read_to_string, os::unix::fs::MetadataExt};

use crate::{calls::shown, out::Out};

/// The section.
pub fn print(out: &mut Out) {
    out.section("mount");
    let text = read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut seen: HashMap<String, u32> = HashMap::new();
    for line in text.lines() {
        let Some((head, tail)) = line.split_once(" - ") else { continue };
        let head: Vec<&str> = head.split(' ').collect();
        let tail: Vec<&str> = tail.split(' ').collect();
        let (&[_, _, _, root, point, options, ref optional @ ..], &[kind, source, super_options]) =
            (head.as_slice(), tail.as_slice())
        else {
            out.put("unreadable", line);
            continue;
        };
        let times = seen.entry(point.to_owned()).or_default();
        *times += 1;
        let name = if *times > 1 { format!("{point}#{times}") } else { point.to_owned() };
        // `shared:12 master:3`: the numbers are the kernel's.
        let propagation: Vec<&str> =
            optional.iter().map(|field| field.split_once(':').map_or(*field, |(kind, _)| kind)).collect();
        out.put(format_args!("{name}.type"), kind);
        out.put(format_args!("{name}.source"), source);
        out.put(format_args!("{name}.root"), root);
        out.put(format_args!("{name}.options"), options);
        out.put(
            format_args!("{name}.propagation"),
            if propagation.is_empty() { "private".to_owned() } else { propagation.join(" ") },
        );
        let mut of_super: Vec<&str> = super_options.split(',').collect();
        of_super.sort_unstable();
        out.put(format_args!("{name}.super"), of_super.join(","));
        if kind == "tmpfs" {
            out.put(format_args!("{name}.size"), size(point));
        }
    }
    out.section("");
}

/// Bytes and mode of a file system's root.
fn size(point: &str) -> String {
    let bytes = match nix::sys::statfs::statfs(point) {
        Ok(data) => data.blocks() * u64::try_from(data.block_size()).unwrap_or(0),
        Err(error) => return format!("{error:?}"),
    };
    match std::fs::metadata(point) {
        Ok(meta) => format!("{bytes} {:o} {}:{}", meta.mode() & 0o7777, meta.uid(), meta.gid()),
        Err(error) => shown::<()>(Err(error)),
    }
}
