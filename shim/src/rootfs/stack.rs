//! Root file systems out of file systems in files, as containerd's EROFS snapshotter describes them
//! (containerd 2.2 and later): a list of mounts of which each may name the ones before, with what has
//! to be done first in front of its type (`mkfs/ext4`, `format/mkdir/overlay`).
//!
//! containerd would make all of them on the host. It leaves them to a runtime that says it can
//! ([`crate::features`]): the guest mounts the files, and the host's kernel none. See docs/decisions/0425.

use std::path::{Path, PathBuf};

use super::{
    Layer, RootfsError, mount_flag, split_lower,
    template::{Earlier, Place, filled, shown},
    unescape,
};

/// More mounts than any image has layers.
const MAX_MOUNTS: usize = 256;
/// What options begin with that are containerd's own.
const MKDIR: &str = "X-containerd.mkdir.";
const MKFS: &str = "X-containerd.mkfs.";
const DMVERITY: &str = "X-containerd.dmverity";
/// The value of that which asks for nothing.
const NO_DMVERITY: &str = "off";

/// A root file system out of files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stack {
    /// Its layers, topmost first.
    pub lower: Vec<ErofsFile>,
    /// Where what is written goes on the host.
    pub upper: Upper,
    /// Nothing can be written to it.
    pub readonly: bool,
}

impl Stack {
    /// All its files but a disk.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.lower
            .iter()
            .flat_map(|file| std::iter::once(&file.source).chain(&file.devices))
            .map(PathBuf::as_path)
    }

    /// Whether there is something in its upper directory.
    pub(super) fn is_written(&self, is_empty: impl Fn(&Path) -> bool) -> bool {
        matches!(&self.upper, Upper::Dirs { upper, .. } if !is_empty(upper))
    }
}

/// An EROFS file system in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErofsFile {
    /// Which of the mounts it is.
    pub index: usize,
    /// The file.
    pub source: PathBuf,
    /// Further ones that it names, in its order.
    pub devices: Vec<PathBuf>,
    /// What says how it is checked as it is read (dm-verity), in a file of its own.
    pub verity: Option<PathBuf>,
}

/// Where what a container writes goes on the host, in a client's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upper {
    /// Nowhere.
    None,
    /// To directories of an overlay.
    Dirs {
        /// What is written.
        upper: PathBuf,
        /// OverlayFS's own.
        work: PathBuf,
    },
    /// To the directory `upper` of a file system in a file.
    Disk(Disk),
}

/// A file with an ext4 file system, to be made where it is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Which of the mounts it is.
    pub index: usize,
    /// The file.
    pub path: PathBuf,
    /// How large to make it; none where it has to be there.
    pub size_bytes: Option<u64>,
    /// What the file system is to be known by.
    pub uuid: Option<String>,
}

/// What a list of mounts is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mounts {
    /// Mounts of the host's kernel, each on top of the one before.
    Plain(Vec<Layer>),
    /// File systems in files.
    Stack(Stack),
}

/// A mount, filled in.
#[derive(Debug)]
struct Filled {
    transforms: Transforms,
    /// Its type, without what is in front.
    kind: String,
    source: String,
    target: String,
    options: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Transforms {
    format: bool,
    mkdir: bool,
    mkfs: bool,
}

/// What is wrong with which mount.
fn wrong<T>(index: usize, field: &'static str, problem: impl Into<String>) -> Result<T, RootfsError> {
    Err(RootfsError::Layer { index, field, problem: problem.into() })
}

/// The same of an option or a path, as the client has written it.
fn wrong_text<T>(index: usize, field: &'static str, text: &str, problem: &str) -> Result<T, RootfsError> {
    wrong(index, field, format!("{:?}: {problem}", shown(text)))
}

/// What `layers` are. Looks at no file.
pub fn read(layers: &[Layer]) -> Result<Mounts, RootfsError> {
    let is_ours = |layer: &Layer| {
        layer.kind.contains('/')
            || (layer.kind == "erofs" && layer.options.iter().any(|option| is_of_a_file(option)))
    };
    if !layers.iter().any(is_ours) {
        return Ok(Mounts::Plain(layers.to_vec()));
    }
    if layers.len() > MAX_MOUNTS {
        return wrong(MAX_MOUNTS, "type", format!("{} mounts; must be {MAX_MOUNTS} at most", layers.len()));
    }
    let mut all: Vec<Filled> = Vec::new();
    for (index, layer) in layers.iter().enumerate() {
        let earlier: Vec<Earlier> =
            all.iter().map(|mount| Earlier { source: &mount.source, target: &mount.target }).collect();
        let mount = fill(index, layer, &earlier)?;
        all.push(mount);
    }
    List { all: &all, used: vec![false; all.len()] }.read()
}

/// Whether an option says that an `erofs` mount is one of a file.
fn is_of_a_file(option: &str) -> bool {
    option == "loop" || option.starts_with(DMVERITY)
}

fn fill(index: usize, layer: &Layer, earlier: &[Earlier]) -> Result<Filled, RootfsError> {
    let texts = [("type", &layer.kind), ("source", &layer.source), ("target", &layer.target)];
    let texts = texts.into_iter().chain(layer.options.iter().map(|option| ("options", option)));
    for (field, text) in texts {
        if text.contains('\0') {
            return wrong(index, field, format!("{text:?}: must not contain a NUL"));
        }
    }
    let mut transforms = Transforms::default();
    let mut kind = layer.kind.as_str();
    while let Some((transform, rest)) = kind.split_once('/') {
        let done = match transform {
            "format" => &mut transforms.format,
            "mkdir" => &mut transforms.mkdir,
            "mkfs" => &mut transforms.mkfs,
            _ => {
                let problem =
                    format!("{:?}: {transform:?} must be \"format\", \"mkdir\" or \"mkfs\"", layer.kind);
                return wrong(index, "type", problem);
            }
        };
        if std::mem::replace(done, true) {
            return wrong(index, "type", format!("{:?}: has {transform:?} twice", layer.kind));
        }
        kind = rest;
    }
    let text = |field: &'static str, text: &String| match (transforms.format, text.contains("{{")) {
        (true, _) => filled(text, earlier).or_else(|problem| wrong(index, field, problem)),
        (false, true) => {
            wrong(index, field, format!("{text:?}: a template needs \"format/\" in front of the type"))
        }
        (false, false) => Ok(text.clone()),
    };
    let options = layer.options.iter().map(|option| text("options", option)).collect::<Result<_, _>>()?;
    let target = text("target", &layer.target)?;
    if !matches!(target.as_str(), "" | "/") {
        return wrong(index, "target", "mounts below the root are not supported");
    }
    Ok(Filled { transforms, kind: kind.to_owned(), source: text("source", &layer.source)?, target, options })
}

/// All mounts, and which of them another one names.
struct List<'a> {
    all: &'a [Filled],
    used: Vec<bool>,
}

/// What a mount is that others name.
enum Named {
    Layer(ErofsFile),
    Disk(Disk),
    /// A directory of the host's.
    Directory(String),
}

impl List<'_> {
    fn read(mut self) -> Result<Mounts, RootfsError> {
        let Some(last) = self.all.len().checked_sub(1) else { return Ok(Mounts::Plain(Vec::new())) };
        let Some(mount) = self.all.get(last) else { return Ok(Mounts::Plain(Vec::new())) };
        let mounts = match mount.kind.as_str() {
            "overlay" => self.overlay(last, mount)?,
            "bind" => self.bind(last, mount)?,
            "erofs" => {
                let lower = vec![erofs(last, mount)?];
                Mounts::Stack(Stack { lower, upper: Upper::None, readonly: true })
            }
            "" => return wrong(last, "type", "is missing"),
            other => {
                let problem = format!("{other:?}: the last mount must be \"overlay\", \"bind\" or \"erofs\"");
                return wrong(last, "type", problem);
            }
        };
        if let Some(unused) = self.used.iter().take(last).position(|used| !used) {
            return wrong(unused, "type", format!("no later mount names it as {{{{ mount {unused} }}}}"));
        }
        Ok(mounts)
    }

    /// The mount of this number, which another one names.
    fn named(&mut self, index: usize) -> Result<Named, RootfsError> {
        // Templates name only what comes before.
        let Some(mount) = self.all.get(index) else { return wrong(index, "type", "there is no such mount") };
        if let Some(used) = self.used.get_mut(index) {
            *used = true;
        }
        match mount.kind.as_str() {
            "erofs" => erofs(index, mount).map(Named::Layer),
            "ext4" => disk(index, mount).map(Named::Disk),
            "bind" => {
                plain_options(index, mount)?;
                match Place::parse(&mount.source) {
                    Some(Place::Host(path)) if path.starts_with('/') => Ok(Named::Directory(path)),
                    _ => wrong_text(index, "source", &mount.source, "must be an absolute path"),
                }
            }
            "" => wrong(index, "type", "is missing"),
            other => wrong(
                index,
                "type",
                format!("{other:?}: a mount that others name must be \"erofs\", \"ext4\" or \"bind\""),
            ),
        }
    }

    /// An overlay of the mounts before it.
    fn overlay(&mut self, index: usize, mount: &Filled) -> Result<Mounts, RootfsError> {
        let mut lower = None;
        let (mut upper, mut work) = (None, None);
        let mut others = Vec::new();
        for option in &mount.options {
            let once = match option.split_once('=') {
                Some(("lowerdir", value)) => (&mut lower, value),
                Some(("upperdir", value)) => (&mut upper, value),
                Some(("workdir", value)) => (&mut work, value),
                Some(("uidmap" | "gidmap", _)) => {
                    return wrong_text(index, "options", option, "owners in EROFS files cannot be mapped");
                }
                _ if option.starts_with(MKDIR) => {
                    self.made_directory(index, mount.transforms, option)?;
                    continue;
                }
                _ => {
                    others.push(option.clone());
                    continue;
                }
            };
            if once.0.replace(once.1).is_some() {
                return wrong_text(index, "options", option, "is there twice");
            }
        }
        let Some(lower) = lower.filter(|lower| !lower.is_empty()) else {
            return wrong(index, "options", "\"lowerdir\" is missing: an overlay needs layers");
        };
        let mut files: Vec<ErofsFile> = Vec::new();
        let mut dirs = Vec::new();
        for text in split_lower(lower) {
            match Place::parse(&text) {
                Some(Place::Host(path)) => dirs.push(path),
                Some(Place::Mount(number, below)) => match self.named(number)? {
                    Named::Layer(file) if files.iter().any(|other| other.source == file.source) => {
                        let problem = format!("lowerdir: {} is there twice", file.source.display());
                        return wrong(index, "options", problem);
                    }
                    Named::Layer(file) if below.is_empty() => files.push(file),
                    Named::Directory(path) => dirs.push(super::escape(&joined(&path, &below))),
                    _ => {
                        let problem = format!(
                            "lowerdir: {{{{ mount {number} }}}}/{below} must be a whole \"erofs\" mount"
                        );
                        return wrong(index, "options", problem);
                    }
                },
                None => return wrong(index, "options", misplaced("lowerdir")),
            }
        }
        let upper = self.upper(index, upper, work)?;
        if files.is_empty() {
            return plain_overlay(index, &dirs, upper, others);
        }
        if !dirs.is_empty() {
            return wrong(index, "options", "lowerdir: EROFS files and directories cannot be mixed");
        }
        if let Some(option) = others.iter().find(|option| !super::is_no_matter(option) && !is_flag(option)) {
            return wrong_text(index, "options", option, "is not supported over EROFS files");
        }
        let readonly = upper == Upper::None || others.iter().any(|option| option == "ro");
        Ok(Mounts::Stack(Stack { lower: files, upper, readonly }))
    }

    /// Where an overlay has its writable layer.
    fn upper(&mut self, index: usize, upper: Option<&str>, work: Option<&str>) -> Result<Upper, RootfsError> {
        let (upper, work) = match (upper, work) {
            (None, None) => return Ok(Upper::None),
            (Some(upper), Some(work)) => (upper, work),
            (Some(_), None) => return wrong(index, "options", "\"upperdir\" without \"workdir\""),
            (None, Some(_)) => return wrong(index, "options", "\"workdir\" without \"upperdir\""),
        };
        match (Place::parse(upper), Place::parse(work)) {
            (Some(Place::Host(upper)), Some(Place::Host(work)))
                if upper.starts_with('/') && work.starts_with('/') =>
            {
                Ok(Upper::Dirs { upper: unescape(&upper).into(), work: unescape(&work).into() })
            }
            (Some(Place::Mount(one, upper)), Some(Place::Mount(other, work)))
                if one == other && upper == "upper" && work == "work" =>
            {
                self.disk(index, one).map(Upper::Disk)
            }
            _ => wrong(
                index,
                "options",
                "upperdir and workdir must be absolute paths, or {{ mount N }}/upper and {{ mount N }}/work of \
                 one \"ext4\" mount",
            ),
        }
    }

    /// The mount of this number, which has to be a disk.
    fn disk(&mut self, index: usize, number: usize) -> Result<Disk, RootfsError> {
        match self.named(number)? {
            Named::Disk(disk) => Ok(disk),
            Named::Layer(_) | Named::Directory(_) => {
                let problem = format!("{{{{ mount {number} }}}} is written to, and must be \"ext4\"");
                wrong(index, "options", problem)
            }
        }
    }

    /// Checks what directory is to be made: the guest makes `upper` and `work` of a disk, and nobody others.
    fn made_directory(
        &mut self,
        index: usize,
        transforms: Transforms,
        option: &str,
    ) -> Result<(), RootfsError> {
        let path = option.strip_prefix(MKDIR).and_then(|option| option.strip_prefix("path="));
        let Some(path) = path.filter(|_| transforms.mkdir) else {
            let problem =
                format!("must be {MKDIR}path=DIR[:MODE[:UID:GID]], with \"mkdir/\" in front of the type");
            return wrong_text(index, "options", option, &problem);
        };
        let parts: Vec<&str> = path.split(':').collect();
        let is_number = |text: &&str| text.parse::<u32>().is_ok();
        let is_mode = |text: &str| u32::from_str_radix(text, 8).is_ok_and(|mode| mode <= 0o777);
        let (place, rest) = parts.split_first().unwrap_or((&"", &[]));
        let sound = match rest {
            [] => true,
            [mode] => is_mode(mode),
            [mode, ids @ ..] => is_mode(mode) && ids.len() == 2 && ids.iter().all(is_number),
        };
        if !sound {
            let problem = format!("must be {MKDIR}path=DIR[:MODE[:UID:GID]], the mode octal, at most 777");
            return wrong_text(index, "options", option, &problem);
        }
        match Place::parse(place) {
            Some(Place::Mount(number, below)) if matches!(below.as_str(), "upper" | "work") => {
                self.disk(index, number).map(drop)
            }
            _ => wrong(
                index,
                "options",
                format!(
                    "{MKDIR}path: only {{{{ mount N }}}}/upper and {{{{ mount N }}}}/work of an \"ext4\" mount are made"
                ),
            ),
        }
    }

    /// A bind mount of one that comes before.
    fn bind(&mut self, index: usize, mount: &Filled) -> Result<Mounts, RootfsError> {
        let mut others = Vec::new();
        for option in &mount.options {
            match option.starts_with(MKDIR) {
                true => self.made_directory(index, mount.transforms, option)?,
                false if matches!(option.as_str(), "bind" | "rbind") || is_flag(option) => {
                    others.push(option.clone())
                }
                false => return wrong_text(index, "options", option, "is no option of a bind mount here"),
            }
        }
        let readonly = others.iter().any(|option| option == "ro");
        let of_host = |source: String| {
            let layer = Layer { kind: "bind".into(), source, target: String::new(), options: others.clone() };
            Mounts::Plain(vec![layer])
        };
        match Place::parse(&mount.source) {
            Some(Place::Host(path)) => Ok(of_host(path)),
            Some(Place::Mount(number, below)) => match (self.named(number)?, below.as_str()) {
                (Named::Layer(file), "") => {
                    Ok(Mounts::Stack(Stack { lower: vec![file], upper: Upper::None, readonly: true }))
                }
                (Named::Disk(disk), "upper") => {
                    Ok(Mounts::Stack(Stack { lower: Vec::new(), upper: Upper::Disk(disk), readonly }))
                }
                (Named::Directory(path), below) => Ok(of_host(joined(&path, below))),
                (Named::Layer(_) | Named::Disk(_), _) => {
                    let problem = format!(
                        "{{{{ mount {number} }}}}/{below}: must be a whole \"erofs\" mount, or \"upper\" of an \"ext4\" one"
                    );
                    wrong(index, "source", problem)
                }
            },
            None => wrong(index, "source", misplaced("source")),
        }
    }
}

fn misplaced(what: &str) -> String {
    format!("{what}: {{{{ mount N }}}} must be at the beginning of a path")
}

fn joined(path: &str, below: &str) -> String {
    match below {
        "" => path.to_owned(),
        below => format!("{path}/{below}"),
    }
}

/// An overlay of directories of the host, as other snapshotters have it.
fn plain_overlay(
    index: usize,
    dirs: &[String],
    upper: Upper,
    mut options: Vec<String>,
) -> Result<Mounts, RootfsError> {
    match upper {
        Upper::None => {}
        Upper::Dirs { upper, work } => {
            options.push(format!("upperdir={}", upper.display()));
            options.push(format!("workdir={}", work.display()));
        }
        Upper::Disk(_) => {
            return wrong(index, "options", "upperdir: a disk over directories of the host is not supported");
        }
    }
    options.push(format!("lowerdir={}", dirs.join(":")));
    let (kind, source) = ("overlay".to_owned(), "overlay".to_owned());
    Ok(Mounts::Plain(vec![Layer { kind, source, target: String::new(), options }]))
}

/// An option that changes nothing of what a guest sees in its root.
fn is_flag(option: &str) -> bool {
    option == "volatile" || mount_flag(option).is_some()
}

/// No option but flags.
fn plain_options(index: usize, mount: &Filled) -> Result<(), RootfsError> {
    match mount.options.iter().find(|option| !is_flag(option) && !matches!(option.as_str(), "bind" | "rbind"))
    {
        Some(option) => wrong_text(index, "options", option, "is no option of a bind mount here"),
        None => Ok(()),
    }
}

/// The path of a file.
fn file(index: usize, field: &'static str, text: &str) -> Result<PathBuf, RootfsError> {
    match Place::parse(text) {
        Some(Place::Host(path)) if path.starts_with('/') => Ok(path.into()),
        _ => wrong_text(index, field, text, "must be the absolute path of a file"),
    }
}

fn erofs(index: usize, mount: &Filled) -> Result<ErofsFile, RootfsError> {
    if mount.transforms.mkdir || mount.transforms.mkfs {
        return wrong(index, "type", "an \"erofs\" mount has nothing but \"format/\" in front");
    }
    let mut devices = Vec::new();
    let mut verity = None;
    for option in &mount.options {
        match option.split_once('=') {
            Some(("device", path)) => devices.push(file(index, "options", path)?),
            Some((DMVERITY, NO_DMVERITY)) => {}
            Some((DMVERITY, path)) => verity = Some(file(index, "options", path)?),
            _ if option.starts_with(DMVERITY) => {
                let problem =
                    format!("must be {DMVERITY}=FILE, or {NO_DMVERITY:?}: there are no keys in a guest");
                return wrong_text(index, "options", option, &problem);
            }
            _ if option == "rw" => return wrong(index, "options", "\"rw\": EROFS is read-only"),
            _ if option == "loop" || is_flag(option) => {}
            _ => return wrong_text(index, "options", option, "is no option of EROFS here"),
        }
    }
    if verity.is_some() && !devices.is_empty() {
        return wrong(index, "options", format!("{DMVERITY}: not supported of a file with \"device=\""));
    }
    Ok(ErofsFile { index, source: file(index, "source", &mount.source)?, devices, verity })
}

fn disk(index: usize, mount: &Filled) -> Result<Disk, RootfsError> {
    if mount.transforms.mkdir {
        return wrong(index, "type", "an \"ext4\" mount has no \"mkdir/\" in front");
    }
    let path = file(index, "source", &mount.source)?;
    let mut disk = Disk { index, path, size_bytes: None, uuid: None };
    for option in &mount.options {
        let refused = |problem: &str| wrong_text(index, "options", option, problem);
        match option.strip_prefix(MKFS).map(|option| option.split_once('=').unwrap_or((option, ""))) {
            Some(_) if !mount.transforms.mkfs => return refused("needs \"mkfs/\" in front of the type"),
            Some(("fs", "ext4")) => {}
            Some(("fs", _)) => return refused("must be ext4"),
            Some(("size", value)) => match bytes(value) {
                Some(size) => disk.size_bytes = Some(size),
                None => return refused("must be a number of bytes, from 1 MiB to 16 TiB, as 64MiB"),
            },
            Some(("uuid", value)) if is_uuid(value) => disk.uuid = Some(value.to_owned()),
            Some(("uuid", _)) => return refused("must be a UUID"),
            Some(_) => return refused("must be one of size, fs and uuid"),
            None if option == "ro" => return refused("what is written has to go somewhere"),
            None if option == "loop" || is_flag(option) => {}
            None => return refused("is no option of ext4 here"),
        }
    }
    match (mount.transforms.mkfs, disk.size_bytes) {
        (true, None) => wrong(index, "options", format!("{MKFS}size= is missing")),
        _ => Ok(disk),
    }
}

/// A size as containerd reads it: a number, and perhaps a unit, which is binary.
fn bytes(text: &str) -> Option<u64> {
    const LIMITS: std::ops::RangeInclusive<u64> = 1 << 20..=16 << 40;
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits)?;
    let shift = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return None,
    };
    let bytes = number.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    LIMITS.contains(&bytes).then_some(bytes)
}

fn is_uuid(text: &str) -> bool {
    let parts: Vec<usize> = text.split('-').map(str::len).collect();
    parts == [8, 4, 4, 4, 12] && text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
}

#[cfg(test)]
mod tests;
