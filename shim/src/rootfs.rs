//! The root file system's mounts as containerd hands them over, turned into one
//! tree.
//!
//! Where what the container writes stays in the guest, it gets the image's layers
//! merged and read-only: of an overlay only the lower layers are mounted, by the
//! host's kernel, which resolves whiteouts and opaque directories once for
//! everybody. Where it goes to the host, the mounts are made as they are.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use nix::mount::MsFlags;

use crate::{
    mount,
    user_namespace::{IdMap, IdRange},
};

/// mount(2) takes one page of options.
const MAX_MOUNT_DATA: usize = 4095;

/// One mount of containerd's list (containerd.types.Mount).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layer {
    /// File system type, or "bind".
    pub kind: String,
    /// Device or directory.
    pub source: String,
    /// Directory below the root file system; empty for the root.
    pub target: String,
    /// As for mount(8).
    pub options: Vec<String>,
}

/// Why there is no root file system.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// A mount that cannot be used.
    #[error("rootfs[{index}].{field}: {problem}")]
    Layer {
        /// Which of the mounts.
        index: usize,
        /// Which part of it.
        field: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// The bundle's own root file system is not there.
    #[error("root.path: {}: {source}", path.display())]
    Root {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel refused.
    #[error("mounting {what}: {source}")]
    Mount {
        /// What was mounted.
        what: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// One mount to make on the container's directory in the share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// A directory as it is, but for its owners.
    Bind {
        /// The directory.
        source: PathBuf,
        /// How its owners are mapped.
        idmap: Option<IdMap>,
    },
    /// A root file system that the client has mounted on the host.
    Mounted(PathBuf),
    /// Two or more layers merged, topmost first, as overlayfs spells them.
    Overlay {
        /// What is in the upper directory already, above the others.
        written: Option<String>,
        /// `lowerdir`'s elements.
        lower: Vec<String>,
        /// How the owners in these are mapped.
        idmap: Option<IdMap>,
        /// Further options.
        options: Vec<String>,
    },
    /// Any other file system, read-only.
    FileSystem {
        /// Its type.
        kind: String,
        /// Its device.
        source: String,
        /// Flags besides read-only.
        flags: MsFlags,
        /// Options that are not flags.
        data: String,
    },
}

/// Whether what a container writes goes to its mounts on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// No: the layers alone are mounted.
    ReadOnly,
    /// Yes: they are mounted as they are.
    Writable,
}

/// What to mount for containerd's `layers`; `root` is used where there are
/// none, `is_empty` tells whether an upper directory holds nothing.
pub(crate) fn plan(
    layers: &[Layer],
    root: &Path,
    access: Access,
    is_empty: impl Fn(&Path) -> bool,
) -> Result<Vec<Step>, RootfsError> {
    if layers.is_empty() {
        return Ok(vec![Step::Mounted(root.to_owned())]);
    }
    layers.iter().enumerate().map(|(index, layer)| step(index, layer, access, &is_empty)).collect()
}

fn step(
    index: usize,
    layer: &Layer,
    access: Access,
    is_empty: &impl Fn(&Path) -> bool,
) -> Result<Step, RootfsError> {
    let wrong = |field, problem: &str| Err(RootfsError::Layer { index, field, problem: problem.to_owned() });
    if !matches!(layer.target.as_str(), "" | "/") {
        return wrong("target", "mounts below the root are not supported");
    }
    let has = |name: &str| layer.options.iter().any(|option| option == name);
    if layer.kind.is_empty() && !has("bind") && !has("rbind") {
        return wrong("type", "is missing");
    }
    if layer.kind == "bind" || layer.kind.is_empty() || has("bind") || has("rbind") {
        if layer.source.is_empty() {
            return wrong("source", "is missing; a bind mount needs a directory");
        }
        return Ok(Step::Bind { source: layer.source.clone().into(), idmap: idmap(index, &layer.options)? });
    }
    if layer.kind == "overlay" {
        return overlay(index, &layer.options, access, is_empty);
    }
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in &layer.options {
        if option == "loop" {
            return wrong("options", "\"loop\" is not supported: a block device is needed");
        }
        match mount_flag(option) {
            Some(flag) => flags |= flag,
            None => data.push(option.as_str()),
        }
    }
    Ok(Step::FileSystem {
        kind: layer.kind.clone(),
        source: layer.source.clone(),
        flags,
        data: data.join(","),
    })
}

fn overlay(
    index: usize,
    options: &[String],
    access: Access,
    is_empty: &impl Fn(&Path) -> bool,
) -> Result<Step, RootfsError> {
    let wrong = |problem: String| RootfsError::Layer { index, field: "options", problem };
    let mut lower = Vec::new();
    let mut upper = None;
    let mut others = Vec::new();
    for option in options {
        match option.split_once('=') {
            Some(("lowerdir", dirs)) => lower = split_lower(dirs),
            Some(("upperdir" | "workdir", _)) if access == Access::Writable => others.push(option.clone()),
            Some(("upperdir", dir)) => upper = Some(dir.to_owned()),
            Some(("workdir" | "uidmap" | "gidmap", _)) => {}
            _ if mount_flag(option).is_some() => {}
            _ if option == "volatile" && access == Access::ReadOnly => {}
            _ => others.push(option.clone()),
        }
    }
    // What somebody put into the writable layer before the start is part of
    // what the container finds. Its owners are those of the container.
    let written = upper.filter(|upper| !is_empty(Path::new(&unescape(upper))));
    let idmap = idmap(index, options)?;
    let writable = others.iter().any(|option| option.starts_with("upperdir="));
    match (lower.as_slice(), &written) {
        ([], None) => Err(wrong("\"lowerdir\" is missing: an overlay needs layers".into())),
        // Overlayfs without an upper layer wants two.
        ([only], None) if !writable => Ok(Step::Bind { source: unescape(only).into(), idmap }),
        ([], Some(only)) if !writable => Ok(Step::Bind { source: unescape(only).into(), idmap: None }),
        _ => Ok(Step::Overlay { written, lower, idmap, options: others }),
    }
}

/// What a snapshotter has the owners in the layers mapped by: `uidmap=` and `gidmap=`, both or none.
fn idmap(index: usize, options: &[String]) -> Result<Option<IdMap>, RootfsError> {
    let wrong = |problem: String| RootfsError::Layer { index, field: "options", problem };
    let ranges = |key: &str| {
        let found = options.iter().find_map(|option| option.strip_prefix(key));
        found.map(|text| {
            IdRange::parse_all(text).ok_or_else(|| {
                wrong(format!("{key}{text}: must be INSIDE:OUTSIDE:COUNT, several with commas between them"))
            })
        })
    };
    match (ranges("uidmap=").transpose()?, ranges("gidmap=").transpose()?) {
        (None, None) => Ok(None),
        (Some(uids), Some(gids)) => Ok(Some(IdMap { uids, gids })),
        (Some(_), None) => Err(wrong("uidmap= without gidmap=".into())),
        (None, Some(_)) => Err(wrong("gidmap= without uidmap=".into())),
    }
}

/// The directory of containerd's overlay snapshot: what holds both the upper and
/// the work directory, and is removed with them.
pub(crate) fn snapshot_dir(layers: &[Layer]) -> Option<PathBuf> {
    let [layer] = layers else { return None };
    let dir_of = |key: &str| {
        let value = layer.options.iter().find_map(|option| option.strip_prefix(key)?.strip_prefix('='))?;
        Path::new(&unescape(value)).parent().map(Path::to_owned)
    };
    let dir = dir_of("upperdir")?;
    (layer.kind == "overlay" && dir.is_absolute() && dir_of("workdir")? == dir).then_some(dir)
}

/// Splits at colons that no backslash escapes, and keeps the escapes.
fn split_lower(dirs: &str) -> Vec<String> {
    let mut out = vec![String::new()];
    let mut escaped = false;
    for c in dirs.chars() {
        if c == ':' && !escaped {
            out.push(String::new());
        } else if let Some(last) = out.last_mut() {
            last.push(c);
        }
        escaped = c == '\\' && !escaped;
    }
    out.retain(|dir| !dir.is_empty());
    out
}

fn unescape(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    let mut chars = path.chars();
    while let Some(c) = chars.next() {
        out.push(if c == '\\' { chars.next().unwrap_or(c) } else { c });
    }
    out
}

/// The flag a mount(8) option stands for; `ro` and `rw` are none of it, as
/// every mount here is read-only.
fn mount_flag(option: &str) -> Option<MsFlags> {
    Some(match option {
        "ro" | "rw" | "defaults" => MsFlags::empty(),
        "nosuid" => MsFlags::MS_NOSUID,
        "nodev" => MsFlags::MS_NODEV,
        "noexec" => MsFlags::MS_NOEXEC,
        "noatime" => MsFlags::MS_NOATIME,
        "nodiratime" => MsFlags::MS_NODIRATIME,
        "relatime" => MsFlags::MS_RELATIME,
        "strictatime" => MsFlags::MS_STRICTATIME,
        "sync" => MsFlags::MS_SYNCHRONOUS,
        "dirsync" => MsFlags::MS_DIRSYNC,
        _ => return None,
    })
}

/// Mounts `layers`, or the directory `root` where there are none, read-only on
/// `target`: one mount on top of the other where there are several.
pub(crate) fn mount_readonly(layers: &[Layer], root: &Path, target: &Path) -> Result<(), RootfsError> {
    mount_all(layers, root, target, Access::ReadOnly)
}

/// The same as the client would mount it, with what is mounted below it.
pub(crate) fn mount_writable(layers: &[Layer], root: &Path, target: &Path) -> Result<(), RootfsError> {
    mount_all(layers, root, target, Access::Writable)
}

fn mount_all(layers: &[Layer], root: &Path, target: &Path, access: Access) -> Result<(), RootfsError> {
    if layers.is_empty() && !root.is_dir() {
        let source = fs::metadata(root).err().unwrap_or_else(|| io::ErrorKind::NotADirectory.into());
        return Err(RootfsError::Root { path: root.to_owned(), source });
    }
    let flag = match access {
        Access::ReadOnly => MsFlags::MS_RDONLY,
        Access::Writable => MsFlags::empty(),
    };
    for (index, step) in plan(layers, root, access, is_empty_dir)?.iter().enumerate() {
        let (what, result) = match step {
            Step::Bind { source, idmap } => {
                let recursive = access == Access::Writable;
                let bound = match idmap {
                    None => mount::bind(source, target, recursive),
                    Some(idmap) => mount::bind_idmapped(source, target, recursive, idmap, false),
                };
                (source.display().to_string(), bound)
            }
            Step::Mounted(root) => {
                let recursive = access == Access::Writable;
                (root.display().to_string(), mount::bind_of_the_host(root, target, recursive))
            }
            Step::Overlay { written, lower, idmap, options } => {
                let what = format!("an overlay of {} layers", lower.len() + usize::from(written.is_some()));
                let mounted = match idmap {
                    None => {
                        let lower: Vec<String> = written.iter().chain(lower).cloned().collect();
                        mount_overlay(&lower, options, target, flag)
                    }
                    Some(idmap) => {
                        mount_idmapped_overlay(written.as_deref(), lower, idmap, options, target, flag)
                    }
                };
                (what, mounted)
            }
            Step::FileSystem { kind, source, flags, data } => (
                format!("{source} ({kind})"),
                mount::mount_fs(kind, source, target, *flags | flag, Some(data)),
            ),
        };
        let asked = layers.get(index).is_some_and(|layer| layer.options.iter().any(|option| option == "ro"));
        result
            .and_then(|()| match access {
                Access::ReadOnly => mount::seal_readonly(target, false),
                Access::Writable if asked => mount::make_readonly(target, false),
                Access::Writable => Ok(()),
            })
            .map_err(|source| RootfsError::Mount { what, source })?;
    }
    Ok(())
}

fn is_empty_dir(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none())
}

fn mount_overlay(lower: &[String], options: &[String], target: &Path, flags: MsFlags) -> io::Result<()> {
    let data = overlay_data(lower, options);
    if data.len() <= MAX_MOUNT_DATA {
        return mount::mount_fs("overlay", "overlay", target, flags, Some(&data));
    }
    // Many layers: name them from the directory they have in common.
    let (dir, relative) = relative_to_common(lower).ok_or_else(|| apart("are too long and"))?;
    mount_overlay_from(Path::new(&unescape(&dir)), &relative, options, target, flags)
}

/// The same with layers whose owners are mapped. OverlayFS cannot map them itself, only be given layers that are mapped
/// already, at some place: all of them are, with the directory they have in common, below `target` for that moment.
fn mount_idmapped_overlay(
    written: Option<&str>,
    lower: &[String],
    idmap: &IdMap,
    options: &[String],
    target: &Path,
    flags: MsFlags,
) -> io::Result<()> {
    let (dir, relative) = relative_to_common(lower).ok_or_else(|| apart("are to be idmapped and"))?;
    mount::bind_idmapped(Path::new(&unescape(&dir)), target, false, idmap, false)?;
    let lower: Vec<String> = written.map(str::to_owned).into_iter().chain(relative).collect();
    let mounted = mount_overlay_from(target, &lower, options, target, flags).and_then(|()| {
        let overlay = mount::clone(target)?;
        mount::detach(target)?;
        Ok(overlay)
    });
    mount::detach(target)?;
    mount::attach(&mounted?, target)
}

fn mount_overlay_from(
    dir: &Path,
    lower: &[String],
    options: &[String],
    target: &Path,
    flags: MsFlags,
) -> io::Result<()> {
    let data = overlay_data(lower, options);
    if data.len() > MAX_MOUNT_DATA {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("the layers' paths are {} bytes long, {MAX_MOUNT_DATA} are possible", data.len()),
        ));
    }
    mount::mount_fs_from(dir, "overlay", "overlay", target, flags, &data)
}

fn apart(why: &str) -> io::Error {
    let problem = format!("the layers' paths {why} have no directory in common");
    io::Error::new(io::ErrorKind::InvalidInput, problem)
}

fn overlay_data(lower: &[String], options: &[String]) -> String {
    let mut data = format!("lowerdir={}", lower.join(":"));
    for option in options {
        data.push(',');
        data.push_str(option);
    }
    data
}

/// The deepest directory all `paths` are in, and the paths from there.
fn relative_to_common(paths: &[String]) -> Option<(String, Vec<String>)> {
    let absolute = paths.iter().all(|path| path.starts_with('/'));
    let parents: Vec<Vec<Component>> = paths
        .iter()
        .filter_map(|path| Path::new(path).parent())
        .map(|parent| parent.components().collect())
        .collect();
    let first = parents.first().filter(|_| absolute)?;
    let depth = parents
        .iter()
        .map(|other| first.iter().zip(other).take_while(|(a, b)| a == b).count())
        .min()
        .filter(|depth| *depth > 1)?;
    let common: PathBuf = first.iter().take(depth).collect();
    let relative = paths
        .iter()
        .map(|path| Path::new(path).strip_prefix(&common).ok()?.to_str().map(str::to_owned))
        .collect::<Option<Vec<_>>>()?;
    Some((common.to_str()?.to_owned(), relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay_of(options: &[&str], upper_is_empty: bool) -> Result<Vec<Step>, RootfsError> {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        let layer = Layer { kind: "overlay".into(), source: "overlay".into(), options, ..Layer::default() };
        plan(&[layer], Path::new("/unused"), Access::ReadOnly, |_| upper_is_empty)
    }

    fn bind_of(source: &str) -> Step {
        Step::Bind { source: source.into(), idmap: None }
    }

    #[test]
    fn an_overlay_loses_its_writable_layer() {
        let steps = overlay_of(
            &["index=off", "workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs"],
            true,
        );
        assert_eq!(
            steps.unwrap(),
            [Step::Overlay {
                written: None,
                lower: vec!["/s/2/fs".into(), "/s/1/fs".into()],
                idmap: None,
                options: vec!["index=off".into()]
            }]
        );
    }

    #[test]
    fn what_is_in_the_writable_layer_already_is_seen() {
        let steps = overlay_of(&["workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/1/fs"], false);
        assert_eq!(
            steps.unwrap(),
            [Step::Overlay {
                written: Some("/s/3/fs".into()),
                lower: vec!["/s/1/fs".into()],
                idmap: None,
                options: vec![]
            }]
        );
    }

    #[test]
    fn a_single_layer_is_bound() {
        let steps = overlay_of(&["workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s\\:x/1/fs"], true);
        assert_eq!(steps.unwrap(), [bind_of("/s:x/1/fs")]);
        let bind = Layer {
            kind: "bind".into(),
            source: "/s/1/fs".into(),
            options: vec!["rbind".into(), "rw".into()],
            ..Layer::default()
        };
        assert_eq!(
            plan(&[bind], Path::new("/unused"), Access::ReadOnly, |_| true).unwrap(),
            [bind_of("/s/1/fs")]
        );
    }

    #[test]
    fn no_mounts_mean_the_bundles_root() {
        assert_eq!(
            plan(&[], Path::new("/b/rootfs"), Access::ReadOnly, |_| true).unwrap(),
            [Step::Mounted("/b/rootfs".into())]
        );
    }

    #[test]
    fn other_file_systems_keep_their_options() {
        let layer = Layer {
            kind: "ext4".into(),
            source: "/dev/mapper/x".into(),
            options: vec!["rw".into(), "nodev".into(), "discard".into(), "noload".into()],
            ..Layer::default()
        };
        assert_eq!(
            plan(&[layer], Path::new("/unused"), Access::ReadOnly, |_| true).unwrap(),
            [Step::FileSystem {
                kind: "ext4".into(),
                source: "/dev/mapper/x".into(),
                flags: MsFlags::MS_NODEV,
                data: "discard,noload".into()
            }]
        );
    }

    #[test]
    fn errors_name_the_mount() {
        let error = |layer: Layer| {
            plan(&[layer], Path::new("/"), Access::ReadOnly, |_| true).unwrap_err().to_string()
        };
        assert_eq!(error(Layer::default()), "rootfs[0].type: is missing");
        assert_eq!(
            error(Layer { kind: "bind".into(), ..Layer::default() }),
            "rootfs[0].source: is missing; a bind mount needs a directory"
        );
        assert_eq!(
            error(Layer { kind: "erofs".into(), options: vec!["loop".into()], ..Layer::default() }),
            "rootfs[0].options: \"loop\" is not supported: a block device is needed"
        );
        assert_eq!(
            error(Layer { kind: "ext4".into(), target: "data".into(), ..Layer::default() }),
            "rootfs[0].target: mounts below the root are not supported"
        );
        assert_eq!(
            overlay_of(&["lowerdir=/a:/b", "uidmap=0:1000:10"], true).unwrap_err().to_string(),
            "rootfs[0].options: uidmap= without gidmap="
        );
    }

    #[test]
    fn owners_in_the_layers_are_mapped_and_what_was_written_is_not() {
        let options =
            ["lowerdir=/s/2/fs:/s/1/fs", "upperdir=/s/3/fs", "uidmap=0:1000:10,10:5:1", "gidmap=0:7:9"];
        let range = |inside, outside, count| IdRange { inside, outside, count };
        let idmap = IdMap { uids: vec![range(0, 1000, 10), range(10, 5, 1)], gids: vec![range(0, 7, 9)] };
        assert_eq!(
            overlay_of(&options, false).unwrap(),
            [Step::Overlay {
                written: Some("/s/3/fs".into()),
                lower: vec!["/s/2/fs".into(), "/s/1/fs".into()],
                idmap: Some(idmap),
                options: vec![]
            }]
        );
        for wrong in ["uidmap=0:1", "uidmap=0:1:0", "uidmap=0:1:2:3", "uidmap=", "uidmap=0:1:4294967296"] {
            let error = overlay_of(&["lowerdir=/a", wrong, "gidmap=0:7:9"], true).unwrap_err().to_string();
            assert!(error.starts_with(&format!("rootfs[0].options: {wrong}: must be")), "{error}");
        }
    }

    #[test]
    fn what_is_written_to_is_mounted_as_it_is() {
        let options =
            ["index=off", "workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/1/fs", "volatile", "rw"];
        let layer = Layer {
            kind: "overlay".into(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Layer::default()
        };
        assert_eq!(
            plan(&[layer], Path::new("/unused"), Access::Writable, |_| false).unwrap(),
            [Step::Overlay {
                written: None,
                lower: vec!["/s/1/fs".into()],
                idmap: None,
                options: options
                    .iter()
                    .filter(|o| !["lowerdir=/s/1/fs", "rw"].contains(o))
                    .map(|o| (*o).to_owned())
                    .collect(),
            }]
        );
    }

    #[test]
    fn many_layers_are_named_from_their_common_directory() {
        let layers: Vec<String> = (0..100).map(|n| format!("/var/lib/snapshots/{n}/fs")).collect();
        let (dir, relative) = relative_to_common(&layers).unwrap();
        assert_eq!(dir, "/var/lib/snapshots");
        assert_eq!(relative[42], "42/fs");
        assert!(relative_to_common(&["/a/fs".into(), "/b/fs".into()]).is_none());
    }

    #[test]
    fn a_snapshot_is_known_by_its_two_directories() {
        let layer = |kind: &str, options: &[&str]| Layer {
            kind: kind.into(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Layer::default()
        };
        let snapshot = layer("overlay", &["workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/1/fs"]);
        assert_eq!(snapshot_dir(std::slice::from_ref(&snapshot)), Some("/s/3".into()));
        assert_eq!(snapshot_dir(&[layer("overlay", &["workdir=/w/3", "upperdir=/s/3/fs"])]), None);
        assert_eq!(snapshot_dir(&[layer("overlay", &["lowerdir=/s/2/fs:/s/1/fs"])]), None);
        assert_eq!(snapshot_dir(&[layer("bind", &["rbind", "rw"])]), None);
        assert_eq!(snapshot_dir(&[snapshot.clone(), snapshot]), None);
        assert_eq!(snapshot_dir(&[]), None);
    }

    #[test]
    fn colons_may_be_escaped() {
        assert_eq!(split_lower("/a\\:b:/c"), ["/a\\:b", "/c"]);
        assert_eq!(split_lower("/a\\\\:/c"), ["/a\\\\", "/c"]);
    }
}
