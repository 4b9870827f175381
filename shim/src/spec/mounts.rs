//! `mounts`: what the guest mounts by itself, and what comes from the host.

use std::{
    cell::LazyCell,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use oci_spec::runtime as oci;
use rvm_protocol::agent::{CreateContainerRequest, IdMapping, Mount, Submount};

use super::{
    HOST_FILES, HostDisk, Shm, SpecError, empty_dir, memory_volume, namespaces::mappings, path_text,
    submounts, text,
};
use crate::{
    mountinfo::MountTable,
    user_namespace::{IdMap, IdRange},
};

/// Options that mean something to a mount whatever its file system is; the
/// others are the file system's own.
pub(crate) const MOUNT_OPTIONS: [&str; 60] = [
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "remount",
    "rexec",
    "ridmap",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "tmpcopyup",
    "unbindable",
];

/// What the agent itself mounts, so that no guest comes up without them.
const ALWAYS_THERE: [&str; 8] =
    ["cgroup2", "devpts", "devtmpfs", "mqueue", "overlay", "proc", "sysfs", "tmpfs"];

/// Propagation by which mounts of the host arrive. None leave the guest.
const FOLLOWING: [&str; 4] = ["slave", "rslave", "shared", "rshared"];

/// Something of the host that the container sees, by way of the share.
#[derive(Clone, Debug, PartialEq)]
pub struct Volume {
    /// The field that asked for it, for errors.
    pub field: String,
    /// Which of the container's mounts shows it; its source is to be what [`crate::share::Share::add`] says.
    pub mount: usize,
    /// File or directory of the host.
    pub source: PathBuf,
    /// What is mounted below it and has to be seen.
    pub submounts: Vec<Submount>,
    /// With everything mounted below it.
    pub recursive: bool,
    /// Held read-only by the host.
    pub readonly: bool,
    /// And everything mounted below it too.
    pub readonly_below: bool,
    /// What the host mounts and unmounts below it later is followed.
    pub follows_host: bool,
    /// How its files' owners are mapped, and whether in the mounts below it too.
    pub idmap: Option<(IdMap, bool)>,
}

/// What a bundle's mounts need of the host.
#[derive(Debug, Default)]
pub(super) struct FromHost {
    /// By way of the share.
    pub(super) volumes: Vec<Volume>,
    /// As virtio-blk devices.
    pub(super) disks: Vec<HostDisk>,
}

/// What the agent knows the sandbox's `/dev/shm` by.
const SHM: &str = "shm";

/// The `/dev/shm` that a pod's first container is given, to be shared.
pub(super) fn shm(mounts: &[oci::Mount]) -> Option<Shm> {
    let mount = mounts.iter().rfind(|mount| mount.destination() == Path::new(Shm::DESTINATION))?;
    Shm::at(mount.source().as_deref()?)
}

/// The `/dev/shm` of a pod that nobody has made one for on the host: in the place of one of a container's own, or of a
/// place where a client has it looked for and nothing is. Something that is there is a volume.
pub(super) fn shm_of_nobody(mounts: &[oci::Mount]) -> Option<Shm> {
    let mount = mounts.iter().rfind(|mount| mount.destination() == Path::new(Shm::DESTINATION))?;
    let source = mount.source().clone()?;
    let own = mount.typ().as_deref() == Some("tmpfs");
    (own || !source.exists()).then_some(Shm { source, bytes: 0 })
}

/// Adds the mounts to `container`, which has its user namespace's mappings, and
/// returns what they need of the host.
pub(super) fn translate(
    bundle: &Path,
    mounts: &[oci::Mount],
    shm: Option<&Shm>,
    container: &mut CreateContainerRequest,
) -> Result<FromHost, SpecError> {
    let mut from_host = FromHost::default();
    let table = LazyCell::new(MountTable::read);
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
        let bind = is_bind(&message);
        let idmap = idmap(&at, &mut message, container, bind)?;
        let has = |name: &str| message.options.iter().any(|option| option == name);
        if has("remount") {
            // Changes what is mounted in the guest already.
        } else if message.destination == Shm::DESTINATION
            && shm.is_some_and(|shm| mount.source().as_ref() == Some(&shm.source))
        {
            if !bind {
                // Of a file system, not of a place.
                message.options.retain(|option| MOUNT_OPTIONS.contains(&option.as_str()));
            }
            message.type_ = "bind".into();
            message.source = SHM.into();
            message.from_sandbox = true;
        } else if bind {
            let source = mount.source().as_deref().filter(|source| !source.as_os_str().is_empty());
            let source = source.ok_or_else(|| {
                SpecError::field(format!("{at}.source"), "is missing; a bind mount needs a path of the host")
            })?;
            let source = bundle.join(source);
            let follows_host = FOLLOWING.into_iter().any(has);
            let map = idmap.as_ref().map(|(map, _)| map);
            let memory = if follows_host { None } else { memory_volume::at(&table, &source, map) };
            if let Some((name, volume)) = memory {
                // Its own options come after, and win.
                message.options.splice(0..0, submounts::flags_of(&source));
                message.type_ = "bind".into();
                message.source = name;
                message.from_sandbox = true;
                message.memory = Some(volume).into();
                container.mounts.push(message);
                continue;
            }
            let (recursive, readonly_below) = (has("rbind"), has("rro"));
            // Its own options come after, and win.
            message.options.splice(0..0, submounts::flags_of(&source));
            let whole =
                if idmap.is_none() && !follows_host { empty_dir::whole(&table, &source) } else { None };
            let (source, path) = whole.unwrap_or((source, String::new()));
            if recursive {
                message.submounts = submounts::below(&table, &source);
            }
            from_host.volumes.push(Volume {
                field: format!("{at}.source"),
                mount: container.mounts.len(),
                source,
                submounts: message.submounts.clone(),
                recursive,
                readonly: is_readonly(&message.options),
                readonly_below,
                follows_host,
                idmap,
            });
            message.type_ = "bind".into();
            message.source.clear();
            message.volume_path = path;
            message.from_share = true;
        } else if message.type_.is_empty() {
            return Err(SpecError::field(
                format!("{at}.type"),
                "is missing; it names a file system or \"bind\"",
            ));
        } else if let Some(disk) = HostDisk::at(&format!("{at}.source"), Path::new(&message.source)) {
            let readonly = disk.readonly || is_readonly(&message.options);
            let disk = HostDisk { readonly, ..disk };
            message.block_serial = disk.serial();
            from_host.disks.push(disk);
        }
        container.mounts.push(message);
    }
    Ok(from_host)
}

/// With the files that a pod's containers find where nobody mounts others, in whose place a client mounts those of a
/// pause container.
pub(super) fn with_host_files(mounts: &[oci::Mount], files: &Path) -> Vec<oci::Mount> {
    let mut all = mounts.to_vec();
    for name in HOST_FILES {
        let destination = Path::new("/etc").join(name);
        if mounts.iter().any(|mount| *mount.destination() == destination) {
            continue;
        }
        let mut mount = oci::Mount::default();
        mount
            .set_destination(destination)
            .set_typ(Some("bind".into()))
            .set_source(Some(files.join(name)))
            .set_options(Some(["rbind", "rprivate", "rw"].map(str::to_owned).to_vec()));
        all.push(mount);
    }
    all
}

/// Refuses mounts of a pod's that are to reach the host, which Kubernetes calls `Bidirectional`: whoever asks for that
/// counts on what the guest mounts being there. Of containers that are none of a pod's the host's mounts arrive.
pub(super) fn refuse_bidirectional(mounts: &[oci::Mount]) -> Result<(), SpecError> {
    for (n, mount) in mounts.iter().enumerate() {
        for (k, option) in mount.options().iter().flatten().enumerate() {
            if option == "shared" || option == "rshared" {
                return Err(SpecError::unsupported(
                    format!("mounts[{n}].options[{k}]"),
                    format!(
                        "{option:?} would have what the container mounts at {:?} appear on the host, which a microVM \
                         cannot (Kubernetes: mountPropagation: HostToContainer or None)",
                        mount.destination()
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// Refuses a file system that the guest's `kernel` does not have.
///
/// A kernel finds a file system by its name, so the name is in its image; that
/// something else may be called the same is for the guest to find out.
pub(super) fn check_file_systems(container: &CreateContainerRequest, kernel: &Path) -> Result<(), SpecError> {
    for (n, mount) in container.mounts.iter().enumerate() {
        let has = |name: &str| mount.options.iter().any(|option| option == name);
        // After a dot follows who implements it in user space.
        let name = mount.type_.split('.').next().unwrap_or_default();
        let known = ALWAYS_THERE.contains(&name) || name == "cgroup";
        if known || is_bind(mount) || has("remount") {
            continue;
        }
        let found = contains(kernel, name.as_bytes())
            .map_err(|source| SpecError::Read { path: kernel.to_owned(), source })?;
        if !found {
            return Err(SpecError::field(
                format!("mounts[{n}].type"),
                format!("{:?} is no file system of the guest's kernel; is \"bind\" meant?", mount.type_),
            ));
        }
    }
    Ok(())
}

/// Whether a file contains `name` as a C string or the end of one.
fn contains(path: &Path, name: &[u8]) -> io::Result<bool> {
    const STEP: usize = 1 << 20;
    let wanted = [name, &[0]].concat();
    let mut file = File::open(path)?;
    let mut buffer = Vec::with_capacity(STEP + wanted.len());
    loop {
        if (&mut file).take(STEP as u64).read_to_end(&mut buffer)? == 0 {
            return Ok(false);
        }
        if buffer.windows(wanted.len()).any(|bytes| bytes == wanted) {
            return Ok(true);
        }
        // It may begin at the end of this step.
        buffer.drain(..buffer.len().saturating_sub(wanted.len() - 1));
    }
}

/// How a mount's ids are mapped, and whether in those below it too: as it says
/// itself, or as the container's user namespace does. The host does it, so that
/// the guest is told nothing of it.
fn idmap(
    at: &str,
    mount: &mut Mount,
    container: &CreateContainerRequest,
    bind: bool,
) -> Result<Option<(IdMap, bool)>, SpecError> {
    let has = |name: &str| mount.options.iter().any(|option| option == name);
    let recursive = has("ridmap");
    let wanted = recursive || has("idmap");
    let (mut uids, mut gids) =
        (std::mem::take(&mut mount.uid_mappings), std::mem::take(&mut mount.gid_mappings));
    if !wanted && uids.is_empty() {
        return Ok(None);
    }
    if !bind {
        return Err(SpecError::field(format!("{at}.options"), "only a bind mount can be idmapped"));
    }
    if uids.is_empty() {
        (uids, gids) = (container.uid_mappings.clone(), container.gid_mappings.clone());
    }
    for (mappings, field) in [(&uids, "uidMappings"), (&gids, "gidMappings")] {
        if mappings.is_empty() {
            return Err(SpecError::field(
                format!("{at}.{field}"),
                "is missing: an idmapped mount needs uidMappings and gidMappings, its own or linux's",
            ));
        }
    }
    let ranges = |mappings: Vec<IdMapping>| -> Vec<IdRange> {
        let range =
            |map: IdMapping| IdRange { inside: map.container_id, outside: map.host_id, count: map.size };
        mappings.into_iter().map(range).collect()
    };
    Ok(Some((IdMap { uids: ranges(uids), gids: ranges(gids) }, recursive)))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_the_kernel_does_not_have_is_refused() {
        let kernel = tempfile::NamedTempFile::new().unwrap();
        // A name across the end of what is read at once, and no others.
        let mut image = vec![b'x'; (1 << 20) - 3];
        image.extend(b"\0ext4\0");
        std::fs::write(kernel.path(), image).unwrap();
        let check = |kind: &str, options: &[&str]| {
            let options = options.iter().map(|&option| option.to_owned()).collect();
            let mount = Mount { type_: kind.into(), options, ..Default::default() };
            let container = CreateContainerRequest { mounts: vec![mount], ..Default::default() };
            check_file_systems(&container, kernel.path()).map_err(|error| error.to_string())
        };
        for kind in ["tmpfs", "proc", "cgroup", "ext4", "bind"] {
            check(kind, &[]).unwrap();
        }
        check("none", &["rbind"]).unwrap();
        check("none", &["remount"]).unwrap();
        let error = check("ext5", &[]).unwrap_err();
        assert!(error.starts_with("mounts[0].type: \"ext5\" is no file system"), "{error}");
    }
}
