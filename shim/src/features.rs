//! What `-info` says of the runtime: OCI's features document, from which
//! containerd 2.x and CRI learn what they may ask for.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

use crate::spec::{CAPABILITIES, MOUNT_OPTIONS};

/// How containerd's typeurl names the document's type.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The answer to `-info`.
///
/// It has no `containerd.io/runtime-allow-mounts`: every mount of a root file
/// system is one of the host's kernel, which containerd may prepare as it does
/// for runc.
pub fn info() -> RuntimeInfo {
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..Default::default() };
    let features =
        Any { type_url: FEATURES.into(), value: document().to_string().into_bytes(), ..Default::default() };
    RuntimeInfo {
        name: "io.rvm.v2".into(),
        version: Some(version).into(),
        features: Some(features).into(),
        ..Default::default()
    }
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
