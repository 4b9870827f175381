//! What `-info` says of the runtime: OCI's features document, from which
//! containerd 2.x and CRI learn what they may ask for.

use std::collections::HashMap;

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{
    Message, UnknownFields,
    well_known_types::{any::Any, empty::Empty},
};
use serde_json::{Value, json};

use crate::spec::{CAPABILITIES, MOUNT_OPTIONS};

/// How containerd's typeurl names the document's type.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Types of mounts that are left to the guest where they are of files ([`crate::rootfs::stack`]).
const MOUNT_TYPES: [&str; 1] = ["erofs"];
/// What in front of a mount's type is done here, or by the guest.
const MOUNT_TRANSFORMS: [&str; 3] = ["format", "mkdir", "mkfs"];
/// How containerd 2.2 and 2.3 learn of both.
const ALLOW_MOUNTS: &str = "containerd.io/runtime-allow-mounts";

/// How containerd 2.4 learns of both: an extension of what `start` answers, as the encoded message
/// `containerd.types.MountCapabilities`, in an Any, in a `runtime.bootstrap.v1.Extension`.
pub fn mount_capabilities() -> protobuf::Result<Vec<u8>> {
    let mut capabilities = UnknownFields::new();
    for (number, names) in [(1, MOUNT_TYPES.as_slice()), (2, MOUNT_TRANSFORMS.as_slice())] {
        for name in names {
            capabilities.add_length_delimited(number, name.as_bytes().to_vec());
        }
    }
    // Messages that this version of the protocol's crate does not have.
    let encoded = |fields: UnknownFields| {
        let mut message = Empty::new();
        *message.special_fields.mut_unknown_fields() = fields;
        message.write_to_bytes()
    };
    let any = Any {
        type_url: "containerd.types.MountCapabilities".into(),
        value: encoded(capabilities)?,
        ..Default::default()
    };
    let mut extension = UnknownFields::new();
    extension.add_length_delimited(1, any.write_to_bytes()?);
    encoded(extension)
}

/// The answer to `-info`.
pub fn info() -> RuntimeInfo {
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..Default::default() };
    let features =
        Any { type_url: FEATURES.into(), value: document().to_string().into_bytes(), ..Default::default() };
    RuntimeInfo {
        name: "io.rvm.v2".into(),
        version: Some(version).into(),
        features: Some(features).into(),
        annotations: HashMap::from([(ALLOW_MOUNTS.to_owned(), allowed_mounts())]),
        ..Default::default()
    }
}

fn allowed_mounts() -> String {
    let transforms = MOUNT_TRANSFORMS.iter().map(|name| format!("{name}/*"));
    let types = MOUNT_TYPES.iter().map(|name| (*name).to_owned());
    transforms.chain(types).collect::<Vec<_>>().join(",")
}

/// The features document (runtime-spec, features.md).
fn document() -> Value {
    let capabilities: Vec<String> = CAPABILITIES.iter().map(|name| format!("CAP_{name}")).collect();
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.3.0",
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": MOUNT_OPTIONS.as_slice(),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "capabilities": capabilities,
            // In the specification's terms, whatever the host has.
            "cgroup": {"v1": true, "v2": true, "systemd": true, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE",
                ],
                "archs": ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"],
                "knownFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC",
                ],
                "supportedFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC",
                ],
            },
            // Rules of the host's kernel (docs/decisions/0610).
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": true}},
            "netDevices": {"enabled": false},
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::Features;

    /// As containerd 2.2 reads the annotation, and 2.4 the extension.
    #[test]
    fn containerd_learns_what_mounts_are_left_to_us() {
        assert_eq!(info().annotations[ALLOW_MOUNTS], "format/*,mkdir/*,mkfs/*,erofs");
        let extension = mount_capabilities().unwrap();
        let any = Any::parse_from_bytes(&extension[2..]).unwrap();
        assert_eq!((extension[0], usize::from(extension[1])), (0x0a, extension.len() - 2));
        assert_eq!(any.type_url, "containerd.types.MountCapabilities");
        assert_eq!(any.value, b"\x0a\x05erofs\x12\x06format\x12\x05mkdir\x12\x04mkfs");
    }

    /// containerd 2.x: `supportsCRIUserns` wants user and idmap, CRI's recursive
    /// read-only mounts want rro.
    #[test]
    fn cri_learns_of_user_namespaces_idmapped_and_recursive_readonly_mounts() {
        let info = info();
        assert_eq!(info.features.type_url, FEATURES);
        let features: Features = serde_json::from_slice(&info.features.value).unwrap();
        assert_eq!(features.oci_version_min(), "1.0.0");
        assert!(features.mount_options().as_ref().unwrap().iter().any(|option| option == "rro"));
        let linux = features.linux().as_ref().unwrap();
        let namespaces = linux.namespaces().as_ref().unwrap();
        assert!(namespaces.iter().any(|namespace| namespace.to_string() == "user"));
        let idmap = linux.mount_extensions().as_ref().unwrap().idmap().as_ref().unwrap();
        assert_eq!(*idmap.enabled(), Some(true));
        assert!(linux.capabilities().as_ref().unwrap().iter().any(|name| name == "CAP_CHECKPOINT_RESTORE"));
    }
}
