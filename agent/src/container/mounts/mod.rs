//! The mounts of a container, in the order of its spec.

mod copy_up;
mod memory;
mod options;

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
};

use memory::MemoryVolume;
use nix::{
    errno::Errno,
    fcntl::AT_FDCWD,
    sys::{
        stat::{SFlag, fstat},
        statfs::{PROC_SUPER_MAGIC, fstatfs},
    },
};
pub use options::Options;
use rvm_protocol::agent;

use super::{
    paths::{Place, Root, clean, kind},
    shared::SHM_DIR,
};
use crate::{
    error::{Error, Step, StepError, StepResult, check_relative},
    helper::{self, Outcome},
    init::mounts::CGROUP_ROOT,
    reaper::Reaper,
    storage::{BlockDevice, share},
    sys::mount::{Attributes, FsContext, attach, clone_tree, open_path, set_attributes},
};

/// Files below `/proc` that may be covered, as with runc: what lxcfs provides,
/// and what hides more than the kernel does.
const ALLOWED_IN_PROC: &[&str] = &[
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

/// One mount to be made.
#[derive(Debug)]
pub struct Mount {
    destination: PathBuf,
    kind: Kind,
    options: Options,
}

#[derive(Debug)]
enum Kind {
    /// A file system of its own.
    New { fs_type: String, source: String },
    /// The file system on a block device, mounted at no place yet: for the agent,
    /// whom neither device rules nor a user namespace keep from it.
    Block { fs_type: String, device: PathBuf, mount: Option<OwnedFd> },
    /// What the sandbox's containers share in memory, open as that of a block device is.
    Memory { volume: MemoryVolume, mount: Option<OwnedFd> },
    /// A place of the guest, seen at a second place.
    Bind { source: PathBuf, recursive: bool },
    /// A volume, or what is at `path` in it, with what the host has mounted below the volume.
    Volume { source: PathBuf, path: PathBuf, recursive: bool, submounts: Vec<Submount> },
    /// What is mounted there already, with other flags; and where `whole`, with
    /// other options of its file system.
    Remount { whole: bool },
}

/// A mount of the host's below a volume.
#[derive(Debug)]
struct Submount {
    path: PathBuf,
    attributes: Attributes,
}

/// Whether something else may be mounted at this place of `/proc`.
fn allowed_in_proc(path: &Path) -> bool {
    !path.starts_with("/proc")
        || path == Path::new("/proc")
        || ALLOWED_IN_PROC.iter().any(|allowed| path == Path::new(allowed))
}

fn inside_proc(path: &Path) -> String {
    format!("{path:?} cannot be mounted because it is inside /proc")
}

/// Gives a bind mount the attributes that its options name.
fn set_all(mount: &OwnedFd, options: &Options) -> nix::Result<()> {
    for (attributes, recursive) in [(options.attributes, false), (options.recursive, true)] {
        if !attributes.is_empty() {
            set_attributes(mount.as_fd(), attributes, recursive)?;
        }
    }
    Ok(())
}

impl Submount {
    /// Walks into it, which makes the mount. It may have gone meanwhile, and a
    /// file has none of its own.
    fn make(&self, volume: &Path) {
        let place = volume.join(&self.path).join(".");
        let made = open_path(&place).and_then(|mount| {
            if self.attributes.is_empty() {
                return Ok(());
            }
            set_attributes(mount.as_fd(), self.attributes, false)
        });
        if let Err(errno) = made {
            log::debug!("mount {place:?}: {errno}");
        }
    }
}

impl Mount {
    /// Checks the mount `mounts[index]` of a request.
    pub fn plan(index: usize, mount: &agent::Mount) -> Result<Self, Error> {
        let field = |name: &str| format!("mounts[{index}].{name}");
        if mount.destination.is_empty()
            || [&mount.destination, &mount.source].iter().any(|path| path.contains('\0'))
        {
            return Err(Error::invalid(field("destination"), "must be a path without NUL"));
        }
        let destination = clean(&mount.destination);
        if !allowed_in_proc(&destination) {
            return Err(Error::invalid(field("destination"), inside_proc(&destination)));
        }
        if destination == Path::new("/") {
            return Err(Error::invalid(field("destination"), "must be below the root"));
        }
        let options =
            Options::parse(&mount.options).map_err(|reason| Error::invalid(field("options"), reason))?;
        let bind = options.bind.or((mount.type_ == "bind").then_some(false));
        let kind = match bind {
            _ if options.remount => Kind::Remount { whole: bind.is_none() },
            Some(recursive) if mount.from_share => {
                check_relative(&field("source"), &mount.source)?;
                if !mount.volume_path.is_empty() {
                    check_relative(&field("volume_path"), &mount.volume_path)?;
                }
                let submounts = mount.submounts.iter().map(|submount| {
                    check_relative(&field("submounts"), &submount.path)?;
                    let options = Options::parse(&submount.options);
                    let options = options.map_err(|reason| Error::invalid(field("submounts"), reason))?;
                    Ok(Submount { path: submount.path.clone().into(), attributes: options.attributes })
                });
                Kind::Volume {
                    source: share::volume(&mount.source),
                    path: PathBuf::from(&mount.volume_path),
                    recursive,
                    submounts: submounts.collect::<Result<_, Error>>()?,
                }
            }
            Some(_) if mount.from_sandbox && mount.memory.is_some() => {
                Kind::Memory { volume: MemoryVolume::plan(mount, field)?, mount: None }
            }
            Some(recursive) if mount.from_sandbox => match mount.source.as_str() {
                "shm" => Kind::Bind { source: SHM_DIR.into(), recursive },
                _ => return Err(Error::invalid(field("source"), "the sandbox shares \"shm\" only")),
            },
            Some(recursive) if mount.source.starts_with('/') => {
                Kind::Bind { source: PathBuf::from(&mount.source), recursive }
            }
            Some(_) => return Err(Error::invalid(field("source"), "must be an absolute path of the guest")),
            None if mount.from_sandbox => {
                return Err(Error::invalid(field("from_sandbox"), "is for a bind mount"));
            }
            None if mount.from_share => {
                return Err(Error::invalid(
                    field("from_share"),
                    "only a bind mount has its source on the share",
                ));
            }
            None if mount.type_.is_empty() => {
                return Err(Error::invalid(field("type"), "must be given, or the option \"bind\""));
            }
            None if options.idmap => {
                return Err(Error::invalid(field("options"), "only a bind mount can be idmapped"));
            }
            None if mount.block_serial.is_empty() => {
                // The guest has cgroup v2 only, whatever the spec's author had.
                let fs_type = if mount.type_ == "cgroup" { "cgroup2" } else { &mount.type_ };
                Kind::New { fs_type: fs_type.to_owned(), source: mount.source.clone() }
            }
            None => {
                let device = BlockDevice::with_serial(&mount.block_serial)?.path;
                Kind::Block { fs_type: mount.type_.clone(), device, mount: None }
            }
        };
        if options.copy_up && mount.type_ != "tmpfs" {
            return Err(Error::invalid(field("options"), "\"tmpcopyup\" is for a tmpfs"));
        }
        Ok(Self { destination, kind, options })
    }

    /// For a container in the guest's own cgroup namespace: the hierarchy as it
    /// is mounted already. A new mount of it, made there, would change the
    /// options of the hierarchy for all.
    pub fn in_the_guests_cgroup_namespace(mut self) -> Self {
        if matches!(&self.kind, Kind::New { fs_type, .. } if fs_type == "cgroup2") {
            self.kind = Kind::Bind { source: CGROUP_ROOT.into(), recursive: false };
        }
        self
    }

    /// The descriptor the child needs, if any.
    pub fn descriptor(&self) -> Option<RawFd> {
        match &self.kind {
            Kind::Block { mount, .. } | Kind::Memory { mount, .. } => mount.as_ref().map(AsRawFd::as_raw_fd),
            _ => None,
        }
    }

    /// Makes what it shows where that is not a place of the guest's yet: a memory volume, or the file system of a block
    /// device, as long as that may take.
    pub async fn open(&mut self, reaper: &Reaper) -> StepResult<()> {
        if let Kind::Memory { volume, mount } = &mut self.kind {
            let opened = volume.open()?;
            set_all(&opened, &self.options)
                .step(|| format!("set flags of the memory volume at {:?}", self.destination))?;
            *mount = Some(opened);
            return Ok(());
        }
        let Kind::Block { fs_type, device, .. } = &self.kind else { return Ok(()) };
        let mount = || {
            let context = FsContext::new(fs_type).step(|| self.describe())?;
            let mount = self.configure(&context, &device.to_string_lossy(), None, false)?;
            Ok(Outcome { flag: true, fd: Some(mount) })
        };
        let mounted = helper::run(reaper, &self.describe(), mount).await?.fd;
        if let Kind::Block { mount, .. } = &mut self.kind {
            *mount = mounted;
        }
        Ok(())
    }

    /// Whether this mount brings a `/dev` that is complete already.
    pub fn brings_devices(&self) -> bool {
        self.destination == Path::new("/dev") && matches!(self.kind, Kind::Bind { .. } | Kind::Volume { .. })
    }

    fn make(&self, source: Option<OwnedFd>, root: &Root) -> StepResult<Option<OwnedFd>> {
        match (&self.kind, source) {
            (Kind::New { fs_type, source }, _) => self.make_new(root, fs_type, source),
            (Kind::Remount { whole }, _) => self.remount(root, *whole).map(|()| None),
            (Kind::Block { mount: Some(mount), .. } | Kind::Memory { mount: Some(mount), .. }, _) => {
                self.put(root, mount).map(|()| None)
            }
            (Kind::Block { mount: None, .. } | Kind::Memory { mount: None, .. }, _) => {
                refused(|| self.describe(), "it has not been mounted")
            }
            (Kind::Bind { .. } | Kind::Volume { .. }, Some(mount)) => self.put(root, &mount).map(|()| None),
            (Kind::Bind { .. } | Kind::Volume { .. }, None) => {
                refused(|| self.describe(), "it has no source")
            }
        }
    }

    /// Walks into a volume and what is mounted below it, which makes their mounts.
    fn reach(&self) -> StepResult<()> {
        let Kind::Volume { source, submounts, .. } = &self.kind else { return Ok(()) };
        match open_path(&source.join(".")) {
            // A file, whose directory is the mount.
            Ok(_) | Err(Errno::ENOTDIR) => {}
            Err(errno) => return Err(errno).step(|| self.describe()),
        }
        submounts.iter().for_each(|submount| submount.make(source));
        Ok(())
    }

    /// A mount of what a bind mount shows, with its attributes, at no place yet.
    fn open_source(&self) -> StepResult<Option<OwnedFd>> {
        let mount = match &self.kind {
            Kind::Bind { source, recursive } => clone_tree(AT_FDCWD, source, *recursive),
            Kind::Volume { source, path, recursive, .. } if path.as_os_str().is_empty() => {
                clone_tree(AT_FDCWD, source, *recursive)
            }
            // Its containers may have put links into it.
            Kind::Volume { source, path, recursive, .. } => {
                Root::open(source).and_then(|root| clone_tree(root.find(path)?, Path::new(""), *recursive))
            }
            _ => return Ok(None),
        }
        .step(|| self.describe())?;
        set_all(&mount, &self.options).step(|| self.describe())?;
        Ok(Some(mount))
    }

    fn describe(&self) -> String {
        match &self.kind {
            Kind::New { fs_type, .. } | Kind::Block { fs_type, .. } => {
                format!("mount {fs_type:?} at {:?}", self.destination)
            }
            Kind::Bind { source, .. } | Kind::Volume { source, .. } => {
                format!("bind mount {source:?} at {:?}", self.destination)
            }
            Kind::Memory { .. } => format!("bind mount a memory volume at {:?}", self.destination),
            Kind::Remount { .. } => format!("remount {:?}", self.destination),
        }
    }

    /// Returns the mount where it is to become read-only once all is mounted:
    /// later mounts may need directories in it.
    fn make_new(&self, root: &Root, fs_type: &str, source: &str) -> StepResult<Option<OwnedFd>> {
        let describe = || self.describe();
        // The directory it covers lends a tmpfs its mode, unless the spec names
        // one; a directory that is made for it, below, does not.
        let covered = (fs_type == "tmpfs").then(|| root.find(&self.destination).ok()).flatten();
        let mode = match covered {
            Some(covered) => Some(fstat(&covered).step(describe)?.st_mode & 0o7777),
            None => None,
        };
        let place = self.place(root, SFlag::S_IFDIR, describe)?;
        if matches!(fs_type, "proc" | "sysfs") {
            // A link in an image must not lead what follows to other files.
            if place.path != self.destination {
                return refused(describe, &format!("{fs_type:?} must be mounted on an ordinary directory"));
            }
        } else if place.path == Path::new("/proc") {
            return refused(describe, "\"/proc\" cannot be mounted because it is not of type proc");
        }
        let target = place.fd;
        let context = FsContext::new(fs_type).step(describe)?;
        let later = fs_type == "tmpfs" && self.options.read_only();
        let mount = self.configure(&context, source, mode, later)?;
        if self.options.copy_up {
            copy_up::copy(&target, &mount).step(|| format!("copy up into {:?}", self.destination))?;
        }
        attach(&mount, &target).step(describe)?;
        self.propagate(&mount)?;
        Ok(later.then_some(mount))
    }

    /// A mount of the file system with the options, but for the one to be
    /// read-only where that comes `later`.
    fn configure(
        &self,
        context: &FsContext,
        source: &str,
        mode: Option<u32>,
        later: bool,
    ) -> StepResult<OwnedFd> {
        let fail = |errno: Errno| complaint(context, || self.describe(), errno);
        if !source.is_empty() {
            context.set("source", Some(source)).map_err(fail)?;
        }
        if let Some(mode) = mode {
            context.set("mode", Some(&format!("{mode:o}"))).map_err(fail)?;
        }
        for (key, value) in &self.options.data {
            context.set(key, value.as_deref()).map_err(fail)?;
        }
        if self.options.read_only() && !later {
            context.set("ro", None).map_err(fail)?;
        }
        let mut set = self.options.attributes.set | self.options.recursive.set;
        if later {
            set &= !libc::MOUNT_ATTR_RDONLY;
        }
        context.mount(set).map_err(fail)
    }

    fn put(&self, root: &Root, mount: &OwnedFd) -> StepResult<()> {
        let describe = || self.describe();
        let place = self.place(root, kind(mount).step(describe)?, describe)?;
        if place.path == Path::new("/proc")
            && fstatfs(mount).step(describe)?.filesystem_type() != PROC_SUPER_MAGIC
        {
            return refused(describe, "\"/proc\" cannot be mounted because it is not of type proc");
        }
        attach(mount, &place.fd).step(describe)?;
        self.propagate(mount)
    }

    /// As `mount -o remount`: flags that are not named are cleared, but for the
    /// one of access times.
    fn remount(&self, root: &Root, whole: bool) -> StepResult<()> {
        let describe = || self.describe();
        let target = root.find(&self.destination).step(describe)?;
        if whole {
            let context = FsContext::of_mount(&target).step(describe)?;
            let fail = |errno: Errno| complaint(&context, describe, errno);
            context.set(if self.options.read_only() { "ro" } else { "rw" }, None).map_err(fail)?;
            for (key, value) in &self.options.data {
                context.set(key, value.as_deref()).map_err(fail)?;
            }
            context.reconfigure().map_err(fail)?;
        }
        let named = self.options.attributes;
        let attributes = Attributes { clear: named.clear | FLAGS, ..named };
        set_attributes(target.as_fd(), attributes, false).step(describe)?;
        if !self.options.recursive.is_empty() {
            set_attributes(target.as_fd(), self.options.recursive, true).step(describe)?;
        }
        self.propagate(&target)
    }

    /// The place to mount at, made as a directory or file where it does not exist.
    fn place(&self, root: &Root, kind: SFlag, describe: impl Fn() -> String) -> StepResult<Place> {
        let place = match kind {
            SFlag::S_IFDIR => root.make_dir_place(&self.destination),
            _ => root.make_file_place(&self.destination),
        };
        // A link of the image may lead where the spec must not. What is said of
        // it comes before what making something there failed with.
        let resolved = match &place {
            Ok(place) => Ok(place.path.clone()),
            Err(_) => root.resolve(&self.destination),
        };
        match resolved {
            Ok(path) if !allowed_in_proc(&path) => refused(describe, &inside_proc(&path)),
            _ => place.step(describe),
        }
    }

    fn propagate(&self, mount: &OwnedFd) -> StepResult<()> {
        for (propagation, recursive) in &self.options.propagation {
            let attributes = Attributes { propagation: *propagation, ..Attributes::default() };
            set_attributes(mount.as_fd(), attributes, *recursive)
                .step(|| format!("set the propagation of {:?}", self.destination))?;
        }
        Ok(())
    }
}

/// Everything `mount -o remount` sets or clears, access times apart.
const FLAGS: u64 = libc::MOUNT_ATTR_RDONLY
    | libc::MOUNT_ATTR_NOSUID
    | libc::MOUNT_ATTR_NODEV
    | libc::MOUNT_ATTR_NOEXEC
    | libc::MOUNT_ATTR_NODIRATIME
    | libc::MOUNT_ATTR_NOSYMFOLLOW;

fn refused<T>(describe: impl Fn() -> String, reason: &str) -> StepResult<T> {
    Err(StepError::Refused(format!("{}: {reason}", describe())))
}

/// The file system's own words for a failure, where it has some.
fn complaint(context: &FsContext, describe: impl Fn() -> String, errno: Errno) -> StepError {
    match context.complaint() {
        Some(complaint) => StepError::Refused(format!("{}: {complaint}", describe())),
        None => StepError::Kernel { step: describe(), errno },
    }
}

/// Mounts that still have to become read-only.
#[derive(Debug)]
pub struct Unfinished(Vec<OwnedFd>);

/// Makes the mounts of all volumes, in the agent's own mount namespace: two containers that came to one each in a
/// namespace of its own would have two file systems.
pub fn reach_volumes(mounts: &[Mount]) -> StepResult<()> {
    let reach = |(n, mount): (usize, &Mount)| mount.reach().map_err(|error| named(n, &error));
    mounts.iter().enumerate().try_for_each(reach)
}

/// What takes the guest's root to open, in the mounts' order.
pub fn open_sources(mounts: &[Mount]) -> StepResult<Vec<Option<OwnedFd>>> {
    let open = |(n, mount): (usize, &Mount)| mount.open_source().map_err(|error| named(n, &error));
    mounts.iter().enumerate().map(open).collect()
}

/// The error with the field it is about.
fn named(n: usize, error: &StepError) -> StepError {
    StepError::Refused(format!("mounts[{n}]: {error}"))
}

/// Makes all mounts, in order, of what [`open_sources`] returned for them, or
/// else of what is opened now.
pub fn make_all(
    mounts: &[Mount],
    sources: Option<Vec<Option<OwnedFd>>>,
    root: &Root,
) -> StepResult<Unfinished> {
    let mut unfinished = Vec::new();
    let mut sources = sources.map(Vec::into_iter);
    for (n, mount) in mounts.iter().enumerate() {
        let source = match &mut sources {
            Some(sources) => Ok(sources.next().flatten()),
            None => mount.open_source(),
        };
        let made = source.and_then(|source| mount.make(source, root));
        unfinished.extend(made.map_err(|error| named(n, &error))?);
    }
    Ok(Unfinished(unfinished))
}

impl Unfinished {
    /// Makes those read-only that were asked to be.
    pub fn finish(self) -> StepResult<()> {
        for mount in self.0 {
            set_attributes(mount.as_fd(), Attributes::READ_ONLY, false).step(|| "make a mount read-only")?;
        }
        Ok(())
    }
}
