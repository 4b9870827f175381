//! Kernel parameters of the host that hold in the guest too: what its
//! administrator set for every container, which no container can set for itself
//! (docs/decisions/0622).

use std::{collections::HashMap, fs, io, path::Path};

/// Where a kernel has its parameters.
const PROC_SYS: &str = "/proc/sys";
/// Where the kernel writes what is left of a crashed process.
const CORE_PATTERN: &str = "kernel.core_pattern";
/// How much may be promised: a part of the memory, or a number of KiB. Writing
/// either, 0 too, makes the other 0.
const OVERCOMMIT: [&str; 2] = ["vm.overcommit_ratio", "vm.overcommit_kbytes"];

/// A parameter the configuration names and that cannot hold.
#[derive(Debug, thiserror::Error)]
#[error("guest.host_sysctls: {name:?}: {problem}")]
pub struct SysctlError {
    name: String,
    problem: String,
}

/// The values of `names` on this host, for the agent to set. A name with a `-`
/// before it is passed on with it, and left out where the host has no such
/// parameter, as in sysctl.d(5).
pub fn of_host(names: &[String]) -> Result<HashMap<String, String>, SysctlError> {
    below(Path::new(PROC_SYS), names)
}

/// Whether this is a parameter's name, with a `-` before it or without.
pub fn is_name(name: &str) -> bool {
    let name = name.strip_prefix('-').unwrap_or(name);
    let fits = |part: &str| {
        !part.is_empty() && part.bytes().all(|c| c.is_ascii_alphanumeric() || b"_-".contains(&c))
    };
    name.split('.').count() > 1 && name.split('.').all(fits)
}

fn below(root: &Path, names: &[String]) -> Result<HashMap<String, String>, SysctlError> {
    let mut values = HashMap::new();
    for given in names {
        let (name, optional) = match given.strip_prefix('-') {
            Some(name) => (name, true),
            None => (given.as_str(), false),
        };
        let value = match read(root, name) {
            Ok(value) => value,
            Err(_) if optional => continue,
            Err(error) => {
                return Err(SysctlError { name: name.into(), problem: format!("reading it here: {error}") });
            }
        };
        match of_the_host_alone(name, &value) {
            None => {
                values.insert(given.clone(), value);
            }
            Some(_) if optional => {}
            Some(problem) => return Err(SysctlError { name: name.into(), problem: problem.into() }),
        }
    }
    Ok(values)
}

fn read(root: &Path, name: &str) -> io::Result<String> {
    Ok(fs::read_to_string(root.join(name.replace('.', "/")))?.trim_end_matches('\n').to_owned())
}

/// Why a value means nothing in a guest, where it does not.
fn of_the_host_alone(name: &str, value: &str) -> Option<&'static str> {
    if name == CORE_PATTERN && value.starts_with(['|', '@']) {
        return Some("is a program or a socket of the host here, which the guest's kernel cannot reach");
    }
    if OVERCOMMIT.contains(&name) && value == "0" {
        return Some("is 0 here, as the other of vm.overcommit_ratio and vm.overcommit_kbytes holds");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_has_is_read() {
        let root = tempfile::tempdir().unwrap();
        for (name, value) in [
            ("vm/max_map_count", "262144\n"),
            ("kernel/core_pattern", "core.%p\n"),
            ("vm/overcommit_kbytes", "0\n"),
            ("net/ipv4/tcp_rmem", "1\t2\t3\n"),
        ] {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        }
        let read = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            below(root.path(), &names).map_err(|error| error.to_string())
        };
        let values = read(&[
            "-vm.max_map_count",
            "kernel.core_pattern",
            "-vm.overcommit_kbytes",
            "-no.such",
            "net.ipv4.tcp_rmem",
        ]);
        let expected = [
            ("-vm.max_map_count", "262144"),
            ("kernel.core_pattern", "core.%p"),
            ("net.ipv4.tcp_rmem", "1\t2\t3"),
        ];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(values.unwrap(), HashMap::from(expected));

        let error = read(&["vm.no_such"]).unwrap_err();
        assert!(error.starts_with("guest.host_sysctls: \"vm.no_such\": "), "{error}");
        fs::write(root.path().join("kernel/core_pattern"), "|/usr/lib/systemd/systemd-coredump %P\n")
            .unwrap();
        assert!(read(&["-kernel.core_pattern"]).unwrap().is_empty());
        let error = read(&["kernel.core_pattern"]).unwrap_err();
        assert!(error.contains("a program"), "{error}");
    }

    #[test]
    fn names() {
        for name in ["vm.max_map_count", "-fs.aio-max-nr", "net.ipv4.ip_forward"] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", "-", "vm", "vm..x", "vm/x", "../x.y", "vm.x=1", "vm.x y"] {
            assert!(!is_name(name), "{name}");
        }
    }
}
