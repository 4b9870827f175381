//! The command line containerd gives a shim (containerd docs/runtime-v2.md).

use std::path::PathBuf;

use crate::name;

/// What containerd wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start a shim and print its address.
    Start,
    /// Remove what a dead shim left.
    Delete,
    /// Describe the runtime (`-info`).
    Info,
    /// Print the version (`-v`).
    Version,
}

/// The parsed command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flags {
    /// What to do.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub id: String,
    /// containerd's own address.
    pub address: String,
    /// The bundle, where that is not the working directory.
    pub bundle: PathBuf,
    /// Whether containerd logs at debug level.
    pub debug: bool,
}

/// A command line nobody but a person at a terminal would give.
#[derive(Debug, thiserror::Error)]
#[error("{0}; this program is started by containerd, as in: ctr run --runtime io.rvm.v2 IMAGE ID")]
pub struct FlagsError(String);

impl Flags {
    /// Parses what follows the program's name, in the form of Go's flag package.
    pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Self, FlagsError> {
        let mut flags = Self {
            action: Action::Start,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            bundle: PathBuf::new(),
            debug: false,
        };
        let mut action = None;
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let Some(name) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
                action = Some(match arg.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    other => return Err(FlagsError(format!("{other}: there are start and delete"))),
                });
                break;
            };
            let (name, inline) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (name, None),
            };
            match name {
                "debug" => flags.debug = inline.is_none_or(|value| value == "true"),
                "v" | "version" => action = Some(Action::Version),
                "info" => action = Some(Action::Info),
                _ => {
                    let value = inline
                        .or_else(|| args.next())
                        .ok_or_else(|| FlagsError(format!("-{name}: lacks a value")))?;
                    match name {
                        "namespace" => flags.namespace = value,
                        "id" => flags.id = value,
                        "address" => flags.address = value,
                        "bundle" => flags.bundle = value.into(),
                        "publish-binary" | "socket" => {}
                        _ => return Err(FlagsError(format!("-{name}: is not known"))),
                    }
                }
            }
        }
        flags.action = action.ok_or_else(|| FlagsError("nothing to do".into()))?;
        if matches!(flags.action, Action::Start | Action::Delete) {
            for (value, name) in [(&flags.namespace, "-namespace"), (&flags.id, "-id")] {
                if value.is_empty() {
                    return Err(FlagsError(format!("{name}: is missing")));
                }
                name::check(name, value).map_err(|error| FlagsError(error.to_string()))?;
            }
        }
        Ok(flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Flags, String> {
        Flags::parse(args.iter().map(|arg| (*arg).to_owned())).map_err(|error| error.to_string())
    }

    #[test]
    fn as_containerd_calls() {
        let flags = parse(&[
            "-namespace",
            "default",
            "-address",
            "/run/containerd/containerd.sock",
            "-publish-binary",
            "/usr/bin/containerd",
            "-id",
            "web",
            "-bundle=/b",
            "-debug",
            "delete",
        ])
        .unwrap();
        assert_eq!(flags.action, Action::Delete);
        assert_eq!((flags.namespace.as_str(), flags.id.as_str()), ("default", "web"));
        assert_eq!(flags.address, "/run/containerd/containerd.sock");
        assert_eq!(flags.bundle, PathBuf::from("/b"));
        assert!(flags.debug);
        assert_eq!(parse(&["-v"]).unwrap().action, Action::Version);
        assert_eq!(parse(&["-info"]).unwrap().action, Action::Info);
    }

    #[test]
    fn names_are_no_paths() {
        for (namespace, id) in [("default", "/etc"), ("default", ".."), ("../x", "web"), ("default", "a\tb")]
        {
            for action in ["start", "delete"] {
                let error = parse(&["-namespace", namespace, "-id", id, action]).unwrap_err();
                assert!(error.contains("letters, digits"), "{error}");
            }
        }
    }

    #[test]
    fn as_people_call() {
        for args in [&[][..], &["start"], &["-id", "x", "start"], &["-id"], &["-colour", "red"], &["stop"]] {
            let error = parse(args).unwrap_err();
            assert!(error.contains("started by containerd"), "{args:?}: {error}");
        }
    }
}
