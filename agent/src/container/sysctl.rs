//! Kernel parameters of a container's namespaces.
//!
//! runc refuses those that belong to no namespace, for the host's sake. Here
//! the kernel is the sandbox's own, and they are set.

use std::{collections::HashMap, path::PathBuf};

use crate::error::{Error, Step, StepResult};

/// Checks `sysctl` of a request.
pub fn check(parameters: &HashMap<String, String>) -> Result<(), Error> {
    for (name, value) in parameters {
        if path(name).is_none() || value.contains('\0') {
            let reason = "must be a name such as \"net.core.somaxconn\" and a value without NUL";
            return Err(Error::invalid(format!("sysctl[{name:?}]"), reason));
        }
    }
    Ok(())
}

/// The file of a parameter; none where it is no name of one.
pub fn path(name: &str) -> Option<PathBuf> {
    let path = name.replace('.', "/");
    let plain = !path.contains('\0') && path.split('/').all(|part| !part.is_empty());
    plain.then(|| PathBuf::from("/proc/sys").join(path))
}

/// Sets them in the namespaces of this process, while the agent's `/proc` is in sight.
pub fn apply(parameters: &HashMap<String, String>) -> StepResult<()> {
    for (name, value) in parameters {
        let Some(path) = path(name) else { continue };
        std::fs::write(path, value).step(|| format!("set sysctl {name} to {value:?}"))?;
    }
    Ok(())
}

/// Sets those of the guest as a whole; the error names the one that cannot be.
/// With a `-` before its name one that cannot be is left out, as in sysctl.d(5).
pub fn apply_to_guest(parameters: &HashMap<String, String>) -> Result<(), Error> {
    check(parameters)?;
    for (given, value) in parameters {
        let name = given.strip_prefix('-').unwrap_or(given);
        let Some(path) = path(name) else { continue };
        match std::fs::write(path, value) {
            Err(error) if name == given => {
                let reason = match error.kind() {
                    std::io::ErrorKind::NotFound => "the guest's kernel has no such parameter".to_owned(),
                    _ => format!("cannot be set to {value:?}: {error}"),
                };
                return Err(Error::invalid(format!("sysctl[{name:?}]"), reason));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_the_kernel_lacks_is_named() {
        let error = apply_to_guest(&HashMap::from([("fs.no_such".to_owned(), "1".to_owned())])).unwrap_err();
        assert_eq!(error.to_string(), "sysctl[\"fs.no_such\"]: the guest's kernel has no such parameter");
        apply_to_guest(&HashMap::from([("-fs.no_such".to_owned(), "1".to_owned())])).unwrap();
    }

    #[test]
    fn names_stay_below_proc_sys() {
        assert_eq!(path("net.core.somaxconn"), Some("/proc/sys/net/core/somaxconn".into()));
        // A dot is a separator, so there is no way to write "..".
        for name in ["", "net..core", "../x", "/etc/passwd", "net.", "a\0"] {
            assert_eq!(path(name), None, "{name}");
            assert!(check(&HashMap::from([(name.to_owned(), String::new())])).is_err());
        }
    }
}
