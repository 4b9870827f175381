//! `mounts`: what the guest mounts by itself, and what comes from the host.

use std::path::{Path, PathBuf};

use oci_spec::runtime as oci;
use rvm_protocol::agent::Mount;

use super::{SpecError, namespaces::mappings, path_text, text};

/// Something of the host that the container sees, by way of the share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// The field that asked for it, for errors.
    pub field: String,
    /// File or directory of the host.
    pub source: PathBuf,
    /// Where in the share it is bound, relative to the share.
    pub share_path: String,
    /// With everything mounted below it.
    pub recursive: bool,
    /// Held read-only by the host.
    pub readonly: bool,
}

/// Appends the mounts to `out` and returns what they need from the host.
pub(super) fn translate(
    bundle: &Path,
    id: &str,
    mounts: &[oci::Mount],
    out: &mut Vec<Mount>,
) -> Result<Vec<Volume>, SpecError> {
    let mut volumes = Vec::new();
    for (n, mount) in mounts.iter().enumerate() {
        let at = format!("mounts[{n}]");
        let options = mount
            .options()
            .iter()
            .flatten()
            .enumerate()
            .map(|(k, option)| text(format!("{at}.options[{k}]"), Some(option)))
            .collect::<Result<Vec<_>, _>>()?;
        let mut message = Mount {
            destination: destination(&at, mount.destination())?,
            type_: text(format!("{at}.type"), mount.typ().as_deref())?,
            source: path_text(&format!("{at}.source"), mount.source().as_deref().unwrap_or(Path::new("")))?,
            options,
            uid_mappings: mappings(&format!("{at}.uidMappings"), mount.uid_mappings())?,
            gid_mappings: mappings(&format!("{at}.gidMappings"), mount.gid_mappings())?,
            ..Default::default()
        };
        check_mappings(&at, &message)?;
        let has = |name: &str| message.options.iter().any(|option| option == name);
        if is_bind(&message) {
            let source = mount.source().as_deref().filter(|source| !source.as_os_str().is_empty());
            let source = source.ok_or_else(|| {
                SpecError::field(format!("{at}.source"), "is missing; a bind mount needs a path of the host")
            })?;
            let share_path = format!("{id}/mounts/{n}");
            volumes.push(Volume {
                field: format!("{at}.source"),
                source: bundle.join(source),
                share_path: share_path.clone(),
                recursive: has("rbind"),
                readonly: is_readonly(&message.options),
            });
            message.type_ = "bind".into();
            message.source = share_path;
            message.from_share = true;
        } else if message.type_.is_empty() {
            return Err(SpecError::field(
                format!("{at}.type"),
                "is missing; it names a file system or \"bind\"",
            ));
        }
        out.push(message);
    }
    Ok(volumes)
}

/// Ids are mapped on bind mounts, users and groups together.
fn check_mappings(at: &str, mount: &Mount) -> Result<(), SpecError> {
    let (uids, gids) = (!mount.uid_mappings.is_empty(), !mount.gid_mappings.is_empty());
    let (given, missing) = match (uids, gids) {
        (false, false) => return Ok(()),
        (true, false) => ("uidMappings", Some("gidMappings")),
        (false, true) => ("gidMappings", Some("uidMappings")),
        (true, true) => ("uidMappings", None),
    };
    if let Some(missing) = missing {
        return Err(SpecError::field(format!("{at}.{missing}"), format!("is missing beside {given}")));
    }
    if !is_bind(mount) {
        return Err(SpecError::field(format!("{at}.{given}"), "can be mapped on bind mounts only"));
    }
    Ok(())
}

fn is_bind(mount: &Mount) -> bool {
    mount.type_ == "bind" || mount.options.iter().any(|option| option == "bind" || option == "rbind")
}

/// A relative destination counts from the container's root, as with runc.
fn destination(at: &str, path: &Path) -> Result<String, SpecError> {
    let field = format!("{at}.destination");
    let text = path_text(&field, path)?;
    if text.is_empty() {
        return Err(SpecError::field(field, "is empty; it must be a path in the container"));
    }
    Ok(if path.is_absolute() { text } else { format!("/{text}") })
}

/// The later option wins, as in mount(8).
fn is_readonly(options: &[String]) -> bool {
    options
        .iter()
        .rev()
        .find(|option| ["ro", "rro", "rw"].contains(&option.as_str()))
        .is_some_and(|option| option != "rw")
}
