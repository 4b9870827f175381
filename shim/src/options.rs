//! The options a client sends with a task: rvm's own, and those of runc's shim,
//! which clients send to whatever runtime they have.
//!
//! What has a meaning for a microVM is taken, what changes nothing here is
//! ignored, and the rest is refused by its field's name
//! (docs/decisions/0613).

use std::path::{Component, Path, PathBuf};

use protobuf::{CodedInputStream, rt::WireType, well_known_types::any::Any};

use crate::{
    cgroup::{self, Hierarchies},
    config::{Config, ConfigError},
    error::Error,
    spec::Bundle,
};

/// `runtimeoptions.v1.Options`: what `ctr --runtime-config-path` sends, and CRI
/// for a runtime it does not know.
const GENERIC: &str = "runtimeoptions.v1.Options";
/// Of runc's shim.
const RUNC: &str = "containerd.runc.v1.Options";
/// Of runc's first shim: what containerd 1.x's client sends to any other
/// runtime, for example with the owner of a remapped container's streams.
const LINUX: &str = "containerd.linux.runc.CreateOptions";

/// Nothing is restored here, so what says how is without effect.
const RESTORE: Meaning = Meaning::Nothing;

/// The fields of [`RUNC`] by number, from containerd's `runc/options/oci.proto`.
const RUNC_FIELDS: [(u32, &str, Meaning); 13] = [
    (1, "NoPivotRoot", Meaning::Nothing),
    (2, "NoNewKeyring", Meaning::Nothing),
    (3, "ShimCgroup", Meaning::ShimCgroup),
    // The pipes are the guest's, and there the process's user's.
    (4, "IoUid", Meaning::Nothing),
    (5, "IoGid", Meaning::Nothing),
    (6, "BinaryName", Meaning::Refused("no other runtime's program is run for a microVM; leave it out")),
    // Where runc would keep its state.
    (7, "Root", Meaning::Nothing),
    (8, "CriuPath", RESTORE),
    (9, "SystemdCgroup", Meaning::SystemdCgroup),
    (10, "CriuImagePath", RESTORE),
    (11, "CriuWorkPath", RESTORE),
    // Of its sandbox's shim, to which this was sent.
    (12, "TaskApiAddress", Meaning::Nothing),
    (13, "TaskApiVersion", Meaning::Nothing),
];

/// The fields of [`LINUX`] by number, from containerd 1.x's `linux/runctypes/runc.proto`.
const LINUX_FIELDS: [(u32, &str, Meaning); 13] = [
    (1, "NoPivotRoot", Meaning::Nothing),
    (2, "OpenTcp", RESTORE),
    (3, "ExternalUnixSockets", RESTORE),
    (4, "Terminal", RESTORE),
    (5, "FileLocks", RESTORE),
    (6, "EmptyNamespaces", RESTORE),
    (7, "CgroupsMode", RESTORE),
    (8, "NoNewKeyring", Meaning::Nothing),
    (9, "ShimCgroup", Meaning::ShimCgroup),
    (10, "IoUid", Meaning::Nothing),
    (11, "IoGid", Meaning::Nothing),
    (12, "CriuWorkPath", RESTORE),
    (13, "CriuImagePath", RESTORE),
];

/// What a field of runc's means for a microVM.
#[derive(Clone, Copy)]
enum Meaning {
    /// Nothing is different with it.
    Nothing,
    /// The cgroup of the shim itself.
    ShimCgroup,
    /// `linux.cgroupsPath` is systemd's.
    SystemdCgroup,
    /// It cannot be, for this reason.
    Refused(&'static str),
}

/// What a client's options ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    source: Source,
    shim_cgroup: Option<PathBuf>,
    systemd_cgroup: bool,
}

/// Where the configuration is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Source {
    /// Where it always is.
    #[default]
    Usual,
    /// In a file instead.
    File(PathBuf),
    /// Keys that are laid over the usual one.
    Over(String),
}

impl Options {
    /// Decodes what came with a request; nothing asks for nothing.
    pub fn parse(options: Option<&Any>) -> Result<Self, Error> {
        let Some(any) = options.filter(|any| !any.type_url.is_empty() && !any.value.is_empty()) else {
            return Ok(Self::default());
        };
        let kind = any.type_url.rsplit('/').next().unwrap_or_default();
        let wrong = |problem: &str| Error::InvalidArgument(format!("options: {}: {problem}", any.type_url));
        let fields = decode(&any.value).ok_or_else(|| wrong("cannot be decoded"))?;
        match kind {
            GENERIC => Self::generic(fields),
            RUNC => Self::runc(&RUNC_FIELDS, fields),
            LINUX => Self::runc(&LINUX_FIELDS, fields),
            _ => Err(wrong(&format!("is not known; there are {GENERIC}, {RUNC} and {LINUX}"))),
        }
    }

    /// `config_path` is 2, `config_body` 3; 1 is the type of the body, which is ours.
    fn generic(fields: Vec<(u32, Value)>) -> Result<Self, Error> {
        let (mut file, mut body) = (String::new(), String::new());
        for (number, value) in fields {
            match number {
                1 => {}
                2 => file = value.text("ConfigPath")?,
                3 => body = value.text("ConfigBody")?,
                _ => return Err(unknown(number)),
            }
        }
        let source = match (file.is_empty(), body.trim().is_empty()) {
            (true, true) => Source::Usual,
            (false, true) => Source::File(file.into()),
            (true, false) => Source::Over(body),
            (false, false) => {
                return Err(refused("ConfigBody", "cannot be beside ConfigPath; one of them is enough"));
            }
        };
        Ok(Self { source, ..Self::default() })
    }

    fn runc(known: &[(u32, &'static str, Meaning)], fields: Vec<(u32, Value)>) -> Result<Self, Error> {
        let mut options = Self::default();
        for (number, value) in fields.into_iter().filter(|(_, value)| !value.is_zero()) {
            let field = known.iter().find(|(known, ..)| *known == number);
            let &(_, name, meaning) = field.ok_or_else(|| unknown(number))?;
            match meaning {
                Meaning::Nothing => {}
                Meaning::ShimCgroup => options.shim_cgroup = Some(cgroup_path(name, value.text(name)?)?),
                Meaning::SystemdCgroup => options.systemd_cgroup = true,
                Meaning::Refused(reason) => return Err(refused(name, reason)),
            }
        }
        Ok(options)
    }

    /// The configuration they ask for.
    pub fn config(&self) -> Result<Config, ConfigError> {
        match &self.source {
            Source::Usual => Config::load(None),
            Source::File(path) => Config::load(Some(path)),
            Source::Over(body) => Config::load_with(body, "options.ConfigBody"),
        }
    }

    /// Whether a container's specification is what they say of it.
    pub fn check(&self, bundle: &Bundle) -> Result<(), Error> {
        if self.systemd_cgroup && !bundle.systemd_cgroup {
            return Err(Error::InvalidArgument(format!(
                "linux.cgroupsPath: must be SLICE:PREFIX:NAME with options.SystemdCgroup, is {:?}",
                bundle.container.cgroup_path
            )));
        }
        Ok(())
    }

    /// Moves this process into the cgroup they name for it.
    pub fn join_cgroup(&self) -> Result<(), Error> {
        let Some(path) = &self.shim_cgroup else { return Ok(()) };
        let failed = |problem: String| Error::FailedPrecondition(format!("options.ShimCgroup: {problem}"));
        let hierarchies = Hierarchies::of_host().map_err(|error| failed(error.to_string()))?;
        cgroup::join(&hierarchies, path).map_err(|(dir, error)| failed(format!("{}: {error}", dir.display())))
    }
}

fn refused(field: &str, reason: &str) -> Error {
    Error::InvalidArgument(format!("options.{field}: {reason}"))
}

fn unknown(number: u32) -> Error {
    Error::InvalidArgument(format!("options: field {number} is not known"))
}

fn cgroup_path(field: &str, text: String) -> Result<PathBuf, Error> {
    let path = Path::new(&text);
    let parts = || path.components().filter(|part| *part != Component::RootDir);
    if parts().next().is_none() || !parts().all(|part| matches!(part, Component::Normal(_))) {
        return Err(refused(field, &format!("must be a cgroup's path without \"..\", is {text:?}")));
    }
    Ok(parts().collect())
}

/// A field's value, as far as these messages need it.
pub(crate) enum Value {
    /// Of an integer, a boolean or an enumeration.
    Number(u64),
    /// Of a string or a message.
    Bytes(Vec<u8>),
}

impl Value {
    /// Whether it says no more than a field that is not there.
    fn is_zero(&self) -> bool {
        match self {
            Self::Number(number) => *number == 0,
            Self::Bytes(bytes) => bytes.is_empty(),
        }
    }

    fn text(self, field: &str) -> Result<String, Error> {
        match self {
            Self::Bytes(bytes) => String::from_utf8(bytes).map_err(|_| refused(field, "must be UTF-8")),
            Self::Number(_) => Err(refused(field, "must be text")),
        }
    }
}

/// The fields of a message in their order; `None` where it is none.
pub(crate) fn decode(message: &[u8]) -> Option<Vec<(u32, Value)>> {
    let mut input = CodedInputStream::from_bytes(message);
    let mut fields = Vec::new();
    while let Some(tag) = input.read_raw_tag_or_eof().ok()? {
        let value = match WireType::new(tag & 7)? {
            WireType::Varint => Value::Number(input.read_raw_varint64().ok()?),
            WireType::LengthDelimited => Value::Bytes(input.read_bytes().ok()?),
            _ => return None,
        };
        fields.push((tag >> 3, value));
    }
    Some(fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(type_url: &str, value: &[u8]) -> Result<Options, String> {
        let any = Any { type_url: type_url.into(), value: value.into(), ..Default::default() };
        Options::parse(Some(&any)).map_err(|error| {
            assert_eq!(error.code(), ttrpc::Code::INVALID_ARGUMENT, "{error}");
            error.to_string()
        })
    }

    #[test]
    fn runtime_options_name_a_configuration() {
        let value = b"\x0a\x03url\x12\x0b/etc/r.toml";
        for prefix in ["", "type.googleapis.com/"] {
            let options = options(&format!("{prefix}{GENERIC}"), value).unwrap();
            assert_eq!(options.source, Source::File("/etc/r.toml".into()));
        }
        assert_eq!(Options::parse(None).unwrap(), Options::default());
        assert_eq!(options(GENERIC, b"").unwrap(), Options::default());
    }

    #[test]
    fn runtime_options_hold_a_configuration() {
        let body = |text: &str| [&[0x1a, text.len() as u8], text.as_bytes()].concat();
        let given = options(GENERIC, &body("[guest]\nvcpus = 3\n")).unwrap();
        assert_eq!(given.config().unwrap().guest.vcpus, 3);
        // The whole section of CRI's configuration comes as it is.
        let given = options(GENERIC, &body("TypeUrl = \"runtimeoptions.v1.Options\"\n")).unwrap();
        given.config().unwrap();
        let wrong = options(GENERIC, &body("[guest]\nvcpu = 3\n")).unwrap().config().unwrap_err();
        assert!(wrong.to_string().starts_with("options.ConfigBody: guest.vcpu: "), "{wrong}");
        let both = [b"\x12\x02/r".to_vec(), body("[log]")].concat();
        let error = options(GENERIC, &both).unwrap_err();
        assert!(error.starts_with("options.ConfigBody: "), "{error}");
    }

    #[test]
    fn what_runcs_options_change_here_is_taken() {
        // IoUid and IoGid 100000, as ctr sends them with --uidmap.
        let given = options(LINUX, b"\x50\xa0\x8d\x06\x58\xa0\x8d\x06").unwrap();
        assert_eq!(given, Options::default());
        let given = options(RUNC, b"\x08\x01\x10\x01\x20\x07\x28\x07\x3a\x02/r\x48\x01\x1a\x04/a/b").unwrap();
        assert!(given.systemd_cgroup);
        // TaskApiAddress and TaskApiVersion, as CRI sends them for a sandbox of the shim's.
        assert_eq!(options(RUNC, b"\x62\x02/s\x68\x03").unwrap(), Options::default());
        assert_eq!(given.shim_cgroup.as_deref(), Some(Path::new("a/b")));
    }

    #[test]
    fn the_rest_of_runcs_options_is_refused_by_its_name() {
        for (value, name) in [
            (&b"\x32\x04crun"[..], "options.BinaryName: "),
            (b"\x1a\x05/a/..", "options.ShimCgroup: "),
            (b"\xf8\x01\x01", "options: field 31 "),
            (b"\x1a\x05ab", "options: containerd.runc.v1.Options: "),
        ] {
            let error = options(RUNC, value).unwrap_err();
            assert!(error.starts_with(name), "{error}");
        }
        // What is not set is sent by some clients all the same.
        assert_eq!(options(RUNC, b"\x32\x00\x68\x00").unwrap(), Options::default());
    }

    #[test]
    fn other_types_are_refused_by_their_name() {
        let error = options("containerd.runhcs.v1.Options", b"\x08\x01").unwrap_err();
        assert!(error.starts_with("options: containerd.runhcs.v1.Options: "), "{error}");
        assert!(options(GENERIC, b"\x12\xff").is_err());
    }
}
