//! AppArmor profiles and SELinux labels: they name rules of the host's kernel,
//! and the container runs on another; see docs/decisions/0610.

use super::{SpecError, text};
use crate::config::Compat;

/// Profiles that clients name for every container on a host with AppArmor, where
/// nobody has asked for one: Docker's, CRI's, nerdctl's and CRI-O's.
pub const DEFAULT_PROFILES: [&str; 4] =
    ["docker-default", "cri-containerd.apparmor.d", "nerdctl-default", "crio-default"];

/// Refuses a profile that somebody relies on, unless the configuration says
/// that nobody does. What the default profiles keep a container from on its host
/// the microVM keeps from it: they have no effect.
pub(super) fn apparmor(
    field: &str,
    profile: &Option<String>,
    compat: &Compat,
    not_applied: &mut Vec<String>,
) -> Result<(), SpecError> {
    let profile = text(field, profile.as_deref())?;
    if profile == "unconfined" {
        return Ok(());
    }
    if DEFAULT_PROFILES.contains(&profile.as_str()) {
        not_applied.push(field.to_owned());
        return Ok(());
    }
    check(field, &profile, "an AppArmor profile", "apparmor=unconfined", compat, not_applied)
}

/// As [`apparmor`], for a label.
pub(super) fn selinux(
    field: &str,
    label: &Option<String>,
    compat: &Compat,
    not_applied: &mut Vec<String>,
) -> Result<(), SpecError> {
    let label = text(field, label.as_deref())?;
    check(field, &label, "an SELinux label", "label=disable", compat, not_applied)
}

fn check(
    field: &str,
    value: &str,
    kind: &str,
    option: &str,
    compat: &Compat,
    not_applied: &mut Vec<String>,
) -> Result<(), SpecError> {
    if value.is_empty() {
        return Ok(());
    }
    if compat.ignore_labels {
        not_applied.push(field.to_owned());
        return Ok(());
    }
    Err(SpecError::unsupported(
        field,
        format!(
            "{value:?} is {kind} of the host's kernel, on which the container does not run: leave it out \
             (with Docker --security-opt {option}), or set ignore_labels = true below [compat] in rvm's \
             configuration for containers to run without theirs"
        ),
    ))
}
