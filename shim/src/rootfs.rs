//! The root file system's mounts as containerd hands them over, turned into one
//! tree.
//!
//! Where what the container writes stays in the guest, it gets the image's layers
//! merged and read-only: of an overlay only the lower layers are mounted, by the
//! host's kernel, which resolves whiteouts and opaque directories once for
//! everybody. Where it goes to the host, the mounts are made as they are.

mod on_host;
pub mod stack;
mod template;

use std::{
    env,
    ffi::OsStr,
    fmt, fs, io, iter,
    os::fd::{AsFd, BorrowedFd},
    path::{Component, Path, PathBuf},
};

use nix::mount::MsFlags;

use self::stack::{Mounts, Stack, Upper};
use crate::{
    mount::{self, Identity, Tree},
    scratch,
    user_namespace::{IdMap, IdRange, user_namespace},
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
    /// File systems in files, which the host's kernel mounts where the guest's cannot.
    Stack {
        /// These.
        stack: Stack,
        /// There is something in the upper directory already, which is above the others.
        written: bool,
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
    let layers = match stack::read(layers)? {
        Mounts::Plain(layers) => layers,
        Mounts::Stack(stack) => {
            let written = access == Access::ReadOnly && stack.is_written(is_empty);
            return Ok(vec![Step::Stack { stack, written }]);
        }
    };
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
    Some(snapshot_upper(layers)?.parent()?.to_owned())
}

/// The upper directory of containerd's overlay snapshot: what containerd takes for what the container has written.
pub(crate) fn snapshot_upper(layers: &[Layer]) -> Option<PathBuf> {
    let layers = match stack::read(layers).ok()? {
        Mounts::Plain(layers) => layers,
        Mounts::Stack(stack) => match stack.upper {
            Upper::Dirs { upper, work } => return (work.parent()? == upper.parent()?).then_some(upper),
            Upper::None | Upper::Disk(_) => return None,
        },
    };
    let [layer] = layers.as_slice() else { return None };
    let dir_of = |key: &str| {
        let value = layer.options.iter().find_map(|option| option.strip_prefix(key)?.strip_prefix('='))?;
        Some(PathBuf::from(unescape(value)))
    };
    let (upper, work) = (dir_of("upperdir")?, dir_of("workdir")?);
    (layer.kind == "overlay" && upper.is_absolute() && work.parent()? == upper.parent()?).then_some(upper)
}

/// The disk that a client has for what a container writes.
pub(crate) fn disk(layers: &[Layer]) -> Option<stack::Disk> {
    match stack::read(layers).ok()? {
        Mounts::Stack(Stack { upper: Upper::Disk(disk), .. }) => Some(disk),
        Mounts::Stack(_) | Mounts::Plain(_) => None,
    }
}

/// Splits at colons that no backslash escapes, and keeps the escapes.
pub(crate) fn split_lower(dirs: &str) -> Vec<String> {
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

/// Spells a path as an element of `lowerdir`.
pub(crate) fn escape(path: &str) -> String {
    path.replace('\\', "\\\\").replace(':', "\\:")
}

pub(crate) fn unescape(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    let mut chars = path.chars();
    while let Some(c) = chars.next() {
        out.push(if c == '\\' { chars.next().unwrap_or(c) } else { c });
    }
    out
}

/// Whether an option of an overlay says nothing of what is seen in it.
pub(crate) fn is_no_matter(option: &str) -> bool {
    matches!(option, "index=off" | "nfs_export=off" | "xino=off" | "xino=auto" | "redirect_dir=off")
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

/// Makes the mounts of `layers`, or of the directory `root` where there are none: each belongs on top of the one before.
/// Those that are [`Access::Writable`] have with them what is mounted below. `stage` is some directory, which stays as it is.
/// Owners are mapped as in the user namespace `users`, as far as they [can be](can_be_mapped).
pub(crate) fn mounts(
    layers: &[Layer],
    root: &Path,
    access: Access,
    stage: &Path,
    users: Option<BorrowedFd>,
) -> Result<Vec<Tree>, RootfsError> {
    if layers.is_empty() && !root.is_dir() {
        let source = fs::metadata(root).err().unwrap_or_else(|| io::ErrorKind::NotADirectory.into());
        return Err(RootfsError::Root { path: root.to_owned(), source });
    }
    let steps = plan(layers, root, access, is_empty_dir)?;
    let made = steps.iter().enumerate().map(|(index, step)| {
        let asked = match step {
            Step::Stack { stack, .. } => stack.readonly,
            _ => layers.get(index).is_some_and(|layer| layer.options.iter().any(|option| option == "ro")),
        };
        let settled = |tree: Tree| {
            match access {
                Access::ReadOnly => tree.seal(false).and_then(|()| tree.make_readonly(false))?,
                Access::Writable if asked => tree.make_readonly(false)?,
                Access::Writable => {}
            }
            Ok(tree)
        };
        let made = step.mount(access, stage, users).and_then(settled);
        made.map_err(|source| RootfsError::Mount { what: step.to_string(), source })
    });
    made.collect()
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Bind { source, .. } | Self::Mounted(source) => source.display().fmt(f),
            Self::Overlay { written, lower, .. } => {
                write!(f, "an overlay of {} layers", lower.len() + usize::from(written.is_some()))
            }
            Self::FileSystem { kind, source, .. } => write!(f, "{source} ({kind})"),
            Self::Stack { stack, .. } => write!(f, "a stack of {} EROFS files", stack.lower.len()),
        }
    }
}

impl Step {
    fn mount(&self, access: Access, stage: &Path, users: Option<BorrowedFd>) -> io::Result<Tree> {
        let readonly = access == Access::ReadOnly;
        let own = match self {
            Self::Bind { idmap: Some(map), .. } | Self::Overlay { idmap: Some(map), .. } => {
                Some(user_namespace(map)?)
            }
            _ => None,
        };
        let users = own.as_ref().map(AsFd::as_fd).or(users);
        match self {
            Self::Bind { source, .. } | Self::Mounted(source) => {
                let tree = Tree::of(source, !readonly)?;
                users.into_iter().try_for_each(|users| tree.map_ids(users, false))?;
                Ok(tree)
            }
            Self::Overlay { written, lower, options, .. } => match users {
                None => {
                    let lower: Vec<String> = written.iter().chain(lower).cloned().collect();
                    overlay_of(&lower, options, readonly, stage)
                }
                Some(users) => idmapped_overlay(written.as_deref(), lower, users, options, readonly, stage),
            },
            Self::FileSystem { kind, source, flags, data } => {
                let flags = *flags | if readonly { MsFlags::MS_RDONLY } else { MsFlags::empty() };
                mount::staged(stage, |stage| mount::mount_fs(kind, source, stage, flags, Some(data)))
            }
            Self::Stack { stack, written } => on_host::mount(stack, *written, readonly, stage),
        }
    }
}

/// Whether owners of all these layers, of whom nobody has mapped any, can be mapped as in the user namespace `users`; why not.
pub(crate) fn can_be_mapped(layers: &[Layer], root: &Path, users: BorrowedFd) -> Result<(), String> {
    let steps = plan(layers, root, Access::ReadOnly, is_empty_dir).map_err(|error| error.to_string())?;
    let mapped = |path: &Path| file_can_be_mapped(path, users);
    let tried = |step: &Step| {
        let dir = match step {
            Step::Bind { source, idmap: None } | Step::Mounted(source) => source.clone(),
            Step::Overlay { written: None, lower, idmap: None, .. } => {
                let (dir, lower) =
                    relative_to_common(lower).ok_or("its layers have no directory in common")?;
                let dir = PathBuf::from(unescape(&dir));
                let seen =
                    |path: &Path| Identity::of(path).map_err(|error| format!("{}: {error}", path.display()));
                let common = seen(&dir)?;
                for layer in lower {
                    if !seen(&dir.join(unescape(&layer)))?.is_on_the_mount_of(&common) {
                        return Err(format!("layer {layer} is a mount of its own"));
                    }
                }
                dir
            }
            Step::Overlay { written: Some(_), .. } => {
                return Err("somebody has written to its own layer".into());
            }
            Step::Bind { .. } | Step::Overlay { .. } => {
                return Err("the owners in its layers are mapped already".into());
            }
            Step::FileSystem { kind, .. } => return Err(format!("its layers are on {kind}")),
            Step::Stack { written: true, .. } => {
                return Err("somebody has written to its own layer".into());
            }
            Step::Stack { stack, .. } => return stack.files().try_for_each(mapped),
        };
        mapped(&dir)
    };
    steps.iter().try_for_each(tried)
}

/// The same of one file or directory.
pub(crate) fn file_can_be_mapped(path: &Path, users: BorrowedFd) -> Result<(), String> {
    let tried = Tree::of(path, false).and_then(|tree| tree.map_ids(users, false));
    tried.map_err(|error| format!("{}: owners cannot be mapped: {error}", path.display()))
}

/// Whether an upper directory holds nothing, but perhaps a container's own scratch.
pub(crate) fn is_empty_dir(dir: &Path) -> bool {
    let is_ours = |name: &OsStr| name.as_encoded_bytes().starts_with(scratch::FILE_NAME.as_bytes());
    fs::read_dir(dir)
        .is_ok_and(|mut entries| entries.all(|entry| entry.is_ok_and(|entry| is_ours(&entry.file_name()))))
}

/// An overlay of these layers, named from the directory they have in common, as there is not much room for their names.
fn overlay_of(lower: &[String], options: &[String], readonly: bool, stage: &Path) -> io::Result<Tree> {
    let Some((dir, relative)) = relative_to_common(lower) else {
        let data = overlay_data(lower, options);
        if data.len() > MAX_MOUNT_DATA {
            return Err(apart("are too long and"));
        }
        return mount::staged(stage, |stage| mount_overlay(&data, stage, readonly));
    };
    let dir = unescape(&dir);
    let taken: Vec<String> =
        iter::once(format!("lowerdir={}", relative.join(":"))).chain(options.iter().cloned()).collect();
    match mount::from(Path::new(&dir), || Tree::overlay(&taken, readonly).transpose())? {
        Some(tree) => Ok(tree),
        None => mount::staged(stage, |stage| {
            env::set_current_dir(&dir)?;
            mount_overlay(&overlay_data(&relative, options), stage, readonly)
        }),
    }
}

/// The same with layers whose owners are mapped. OverlayFS cannot map them itself, only be given layers that are mapped
/// already, at some place: all of them are, with the directory they have in common.
fn idmapped_overlay(
    written: Option<&str>,
    lower: &[String],
    users: BorrowedFd,
    options: &[String],
    readonly: bool,
    stage: &Path,
) -> io::Result<Tree> {
    let (dir, relative) = relative_to_common(lower).ok_or_else(|| apart("are to be idmapped and"))?;
    let lower: Vec<String> = written.map(str::to_owned).into_iter().chain(relative).collect();
    let mapped = Tree::of(Path::new(&unescape(&dir)), false)?;
    mapped.map_ids(users, false)?;
    mount::staged(stage, |stage| {
        mapped.attach(stage)?;
        env::set_current_dir(stage)?;
        mount_overlay(&overlay_data(&lower, options), stage, readonly)
    })
}

/// Mounts an overlay with these options on `target`.
fn mount_overlay(data: &str, target: &Path, readonly: bool) -> io::Result<()> {
    if data.len() > MAX_MOUNT_DATA {
        let length = data.len();
        let problem = format!("the layers' paths are {length} bytes long, {MAX_MOUNT_DATA} are possible");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    }
    let flags = if readonly { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    mount::mount_fs("overlay", "overlay", target, flags, Some(data))
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
mod tests;
