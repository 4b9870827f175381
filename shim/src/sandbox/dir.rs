//! A sandbox's directory, `STATE_DIR/NAMESPACE/ID`.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{SandboxError, network, record::MEMBERS};
use crate::{mount, mountinfo::MountTable, name, own_file, state::State};

/// Name of the directory with the files that a pod's containers find in `/etc`.
const FILES: &str = "files";

/// Where those are of the sandbox in `dir`.
pub fn files(dir: &Path) -> PathBuf {
    dir.join(FILES)
}

/// A sandbox's directory. Dropping it removes it with the files in it.
#[derive(Debug)]
pub struct SandboxDir {
    path: PathBuf,
    fd: Arc<File>,
}

impl SandboxDir {
    /// Makes the directory of the sandbox `namespace`/`id`. What a sandbox of
    /// that name left behind is removed first; one that runs is an error.
    pub fn create(state_dir: &Path, namespace: &str, id: &str) -> Result<Self, SandboxError> {
        name::check("namespace", namespace)?;
        name::check("id", id)?;
        let path = state_dir.join(namespace).join(id);
        let failed = |source| SandboxError::Directory { path: path.clone(), source };
        let exists = || SandboxError::Exists { namespace: namespace.into(), id: id.into() };
        match make(&path) {
            // A link, or a file: nothing of ours, and what it leads to is not looked at.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !own_file::is_own_dir(&path) => {
                fs::remove_file(&path).and_then(|()| make(&path)).map_err(failed)?;
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if is_held(&path) || State::read(&path).is_ok_and(|state| state.is_alive()) {
                    return Err(exists());
                }
                clean_up(&path);
                make(&path).map_err(failed)?;
            }
            made => made.map_err(failed)?,
        }
        // Another containerd's shim may be making the same one: who holds the
        // directory has it, before there is a state that says so.
        let fd = File::open(&path).map_err(failed)?;
        let held = fd.try_lock().is_ok() && is_still(&path, &fd);
        if !held {
            return Err(exists());
        }
        Ok(Self { path, fd: Arc::new(fd) })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets the members of `group`, which is a monitor's own, get at what is in it by name.
    pub fn let_in(&self, group: u32) -> io::Result<()> {
        if group == 0 {
            return Ok(());
        }
        std::os::unix::fs::fchown(&self.fd, None, Some(group))?;
        self.fd.set_permissions(fs::Permissions::from_mode(0o710))
    }

    /// The open directory.
    pub fn fd(&self) -> &Arc<File> {
        &self.fd
    }
}

impl Drop for SandboxDir {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Makes the directory and those above it. Another sandbox may be removing the
/// namespace's directory, with the last one in it, at the same time.
fn make(path: &Path) -> io::Result<()> {
    const ATTEMPTS: usize = 100;
    let mut result = Ok(());
    for _ in 0..ATTEMPTS {
        if let Some(parent) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o711).create(parent)?;
        }
        result = fs::DirBuilder::new().mode(0o700).create(path);
        match &result {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            _ => break,
        }
    }
    result
}

/// Whether a shim has the sandbox in `path`, as each does while it runs.
pub fn is_held(path: &Path) -> bool {
    File::open(path).is_ok_and(|dir| matches!(dir.try_lock(), Err(fs::TryLockError::WouldBlock)))
}

/// Whether `path` is still what was opened there.
fn is_still(path: &Path, dir: &File) -> bool {
    let of = |found: io::Result<fs::Metadata>| found.map(|found| (found.dev(), found.ino())).ok();
    of(fs::metadata(path)).is_some_and(|found| Some(found) == of(dir.metadata()))
}

/// Ends and removes what is left of the sandbox in `dir`: processes, mounts,
/// files. It is fine that there is nothing.
pub fn clean_up(dir: &Path) {
    if !own_file::is_own_dir(dir) {
        return;
    }
    if let Ok(state) = State::read(dir) {
        state.kill();
        state.cgroups.remove();
        if let Some(path) = &state.network
            && let Err(error) = network::clean_up(path)
        {
            log::warn!("{}: {error}", path.display());
        }
    }
    // The latest first.
    for mounted in MountTable::read().within(dir).rev() {
        if let Err(error) = mount::detach(&mounted.place) {
            log::warn!("unmounting {}: {error}", mounted.place.display());
        }
    }
    remove(dir);
}

/// Removes the directory with the files in it, and its namespace's directory
/// where it was the last one.
fn remove(dir: &Path) {
    let (members, files) = (dir.join(MEMBERS), files(dir));
    for dir in [&members, &files, dir] {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| !kind.is_dir()) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
    for dir in [members, files] {
        let _ = fs::remove_dir(dir);
    }
    match fs::remove_dir(dir) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => log::warn!("{} stays: {error}", dir.display()),
    }
    if let Some(namespace) = dir.parent() {
        // Fails where other sandboxes are in it, which is how it should be.
        if fs::remove_dir(namespace).is_ok() {
            let _ = namespace.parent().map(fs::remove_dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{process_id::ProcessId, state::Phase};

    #[test]
    fn a_directory_goes_with_its_value() {
        let root = tempfile::tempdir().unwrap();
        let state_dir = root.path().join("rvm");
        let one = SandboxDir::create(&state_dir, "default", "one").unwrap();
        let two = SandboxDir::create(&state_dir, "default", "two").unwrap();
        fs::write(one.path().join("console.log"), "x").unwrap();
        drop(one);
        assert!(state_dir.join("default/two").is_dir());
        assert!(!state_dir.join("default/one").exists());
        drop(two);
        assert!(!state_dir.exists());
    }

    #[test]
    fn leftovers_are_replaced_and_running_ones_are_not() {
        let root = tempfile::tempdir().unwrap();
        let dir = SandboxDir::create(root.path(), "default", "web").unwrap();
        let mut state = State {
            id: "web".into(),
            namespace: "default".into(),
            phase: Phase::Running,
            bundle: "/b".into(),
            shim: ProcessId::of_self().unwrap(),
            monitor: None,
            created_ms: 0,
            vcpus: 1,
            memory_mib: 64,
            cgroups: Default::default(),
            network: None,
            timeline: vec![],
            not_applied: vec![],
            ids: String::new(),
        };
        state.write(dir.path()).unwrap();
        let error = SandboxDir::create(root.path(), "default", "web").unwrap_err();
        assert_eq!(error.to_string(), "sandbox default/web is running already");
        state.shim.start_ticks += 1;
        state.write(dir.path()).unwrap();
        dir.fd.unlock().unwrap();
        std::mem::forget(dir);
        let dir = SandboxDir::create(root.path(), "default", "web").unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn one_that_is_just_being_made_is_not_replaced() {
        let root = tempfile::tempdir().unwrap();
        // Without a state yet.
        let first = SandboxDir::create(root.path(), "default", "web").unwrap();
        fs::write(first.path().join("vm.json"), "{}").unwrap();
        let error = SandboxDir::create(root.path(), "default", "web").unwrap_err();
        assert_eq!(error.to_string(), "sandbox default/web is running already");
        assert!(first.path().join("vm.json").exists());
        let path = first.path().to_owned();
        // Its shim died without a trace.
        let SandboxDir { fd, .. } = &first;
        fd.unlock().unwrap();
        std::mem::forget(first);
        let again = SandboxDir::create(root.path(), "default", "web").unwrap();
        assert_eq!(again.path(), path);
        assert!(!path.join("vm.json").exists());
    }

    #[test]
    fn names_stay_names() {
        let root = tempfile::tempdir().unwrap();
        for name in ["", ".", "..", "a/b", "-x", "a b", &"x".repeat(129)] {
            assert!(SandboxDir::create(root.path(), "default", name).is_err(), "{name:?}");
            assert!(SandboxDir::create(root.path(), name, "web").is_err(), "{name:?}");
        }
    }

    #[test]
    fn cleaning_up_nothing_is_fine() {
        let root = tempfile::tempdir().unwrap();
        clean_up(&root.path().join("default/none"));
        clean_up(&root.path().join("default/none"));
    }
}
