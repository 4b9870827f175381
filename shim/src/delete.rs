//! `delete`: what containerd calls when a shim is dead, however it died.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::api::DeleteResponse;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use crate::{
    background,
    bootstrap::ADDRESS_FILE,
    config::Config,
    events::timestamp,
    fault,
    flags::Flags,
    hooks, own_file,
    process::Exit,
    process_id::ProcessId,
    sandbox::{self, Member},
    spec::{Role, role_in},
    state::State,
};

/// How long containerd is kept waiting: after five seconds it kills a `delete`.
const LIMIT: Duration = Duration::from_secs(4);
/// How long the end of a killed process may take.
const MEMBER_LIMIT: Duration = Duration::from_secs(1);
/// Written into the bundle: see [`Note`].
const NOTE_FILE: &str = "rvm-sandbox";

/// Which sandbox a shim made for its bundle. Another containerd's bundle may be
/// of the same name: a sandbox belongs to the shim that its state names.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    /// The sandbox's directory, which a configuration may put anywhere.
    dir: PathBuf,
    /// The shim.
    shim: ProcessId,
}

/// Notes in a bundle that this process is about to make the sandbox in `dir`.
pub fn note(bundle: &Path, dir: &Path) {
    let path = bundle.join(NOTE_FILE);
    let written = ProcessId::of_self().and_then(|shim| {
        let note = Note { dir: dir.to_owned(), shim };
        own_file::write(&path, serde_json::to_vec(&note)?)
    });
    if let Err(error) = written {
        log::warn!("{}: {error}", path.display());
    }
}

/// Removes what is left, as far as it can be done while containerd waits; the
/// rest goes on without it.
pub fn delete(flags: &Flags) -> DeleteResponse {
    let name = format!("{}/{}", flags.namespace, flags.id);
    match background::within(LIMIT, || clean_up(flags)) {
        Ok(None) => {}
        Ok(Some(child)) => {
            eprintln!("{name}: not all is removed within {} s; process {child} goes on", LIMIT.as_secs());
        }
        Err(error) => {
            eprintln!("{name}: without a process of its own: {error}");
            clean_up(flags);
        }
    }
    DeleteResponse {
        exit_status: Exit::KILLED,
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..Default::default()
    }
}

/// Kills what is left and removes it. Calling it again, or with nothing there,
/// does the same nothing.
fn clean_up(flags: &Flags) {
    let bundle = if flags.bundle.as_os_str().is_empty() { Path::new(".") } else { &flags.bundle };
    let note = read_note(bundle).ok();
    fault::point("delete: note read");
    if let Ok(Role::Member { sandbox }) = role_in(bundle) {
        return end_member(flags, &sandbox, note.as_ref(), bundle);
    }
    for dir in sandbox_dirs(note.as_ref(), &flags.namespace, &flags.id) {
        if is_ours(&dir, note.as_ref(), bundle) {
            sandbox::clean_up(&dir);
        } else if dir.exists() {
            log::warn!("{} stays: it is not of this bundle's shim", dir.display());
        }
    }
    fault::point("delete: sandbox removed");
    hooks::after_dead_shim(bundle, &flags.id);
    if let Ok(address) = fs::read_to_string(bundle.join(ADDRESS_FILE)) {
        let socket = address.trim();
        let _ = fs::remove_file(socket.strip_prefix("unix://").unwrap_or(socket));
    }
}

/// Ends a container in a sandbox that is not its own to remove: its shim, where it
/// lives, ends it when the process that stands for it has gone.
fn end_member(flags: &Flags, sandbox: &str, note: Option<&Note>, bundle: &Path) {
    for dir in sandbox_dirs(note, &flags.namespace, sandbox) {
        // Without a note nobody can say whose it is; with the shim it would have ended.
        if !State::read(&dir).is_ok_and(|state| note.is_some_and(|note| note.shim == state.shim)) {
            continue;
        }
        let is_ours = |member: &Member| member.id == flags.id && is_same(&member.bundle, bundle);
        for member in Member::list(&dir).into_iter().filter(is_ours) {
            if let Err(error) = member.holder.kill_and_wait(Signal::SIGKILL, MEMBER_LIMIT) {
                log::warn!("killing process {}: {error}", member.holder.pid);
            }
        }
    }
    hooks::after_dead_shim(bundle, &flags.id);
}

fn read_note(bundle: &Path) -> io::Result<Note> {
    Ok(serde_json::from_slice(&fs::read(bundle.join(NOTE_FILE))?)?)
}

/// Where the sandbox may be: where its shim noted, and where the configuration
/// of today puts it.
fn sandbox_dirs(note: Option<&Note>, namespace: &str, id: &str) -> Vec<PathBuf> {
    let name = Path::new(namespace).join(id);
    let mut dirs = Vec::new();
    if let Some(note) = note
        // Not a path somebody else put there.
        && note.dir.is_absolute()
        && note.dir.ends_with(&name)
    {
        dirs.push(note.dir.clone());
    }
    if let Ok(config) = Config::load(None).or_else(|_| Config::defaults()) {
        let dir = config.host.state_dir.join(&name);
        if !dirs.contains(&dir) {
            dirs.push(dir);
        }
    }
    dirs
}

/// Whether the sandbox in `dir` was made by this bundle's shim.
fn is_ours(dir: &Path, note: Option<&Note>, bundle: &Path) -> bool {
    match State::read(dir) {
        Ok(state) if note.is_some_and(|note| note.shim == state.shim) => true,
        // The note may be lost; a shim that lives is another containerd's.
        Ok(state) => is_same(&state.bundle, bundle) && !state.shim.is_alive(),
        // Killed before it wrote a state.
        Err(_) => note.is_some_and(|note| note.dir == dir) && !sandbox::is_held(dir),
    }
}

fn is_same(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{flags::Action, state::Phase};
    use std::process::Command;

    fn flags(bundle: PathBuf) -> Flags {
        Flags {
            action: Action::Delete,
            namespace: "default".into(),
            id: "web".into(),
            address: String::new(),
            bundle,
            debug: false,
        }
    }

    /// A sandbox `web` of `shim`, for `bundle`.
    fn state(bundle: &Path, shim: ProcessId) -> State {
        State {
            id: "web".into(),
            namespace: "default".into(),
            phase: Phase::Running,
            bundle: bundle.to_owned(),
            shim,
            monitor: None,
            created_ms: 0,
            vcpus: 1,
            memory_mib: 64,
            cgroups: Default::default(),
            network: None,
            timeline: vec![],
            not_applied: vec![],
            ids: String::new(),
        }
    }

    /// A process that does nothing.
    fn sleeping() -> (std::process::Child, ProcessId) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        (child, id)
    }

    /// Two containerds, one namespace and id: the second one's creation failed.
    #[test]
    fn another_containerds_sandbox_stays() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("state/default/web");
        let (first, second) = (root.path().join("first"), root.path().join("second"));
        for bundle in [&dir, &first, &second] {
            fs::create_dir_all(bundle).unwrap();
        }
        let (mut theirs, shim) = sleeping();
        let mut state = state(&first, shim);
        state.write(&dir).unwrap();
        note(&second, &dir);
        clean_up(&flags(second.clone()));
        assert!(State::read(&dir).is_ok() && shim.is_alive());
        // Even where both call their bundles the same, each in a mount namespace of its own.
        state.bundle = second.clone();
        state.write(&dir).unwrap();
        clean_up(&flags(second.clone()));
        assert!(State::read(&dir).is_ok() && shim.is_alive());
        theirs.kill().unwrap();
        theirs.wait().unwrap();
        clean_up(&flags(second));
        assert!(!dir.exists());
    }

    /// A container that has joined is ended where its own shim's sandbox holds it, and
    /// nowhere else, whatever the bundles are called.
    #[test]
    fn another_containerds_member_stays() {
        let root = tempfile::tempdir().unwrap();
        let (dir, bundle) = (root.path().join("state/default/pod"), root.path().join("bundle"));
        for made in [&dir.join("containers"), &bundle] {
            fs::create_dir_all(made).unwrap();
        }
        let annotations = serde_json::json!({ "annotations": {
            "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod",
        }});
        fs::write(bundle.join("config.json"), annotations.to_string()).unwrap();
        let (mut theirs, holder) = sleeping();
        let mut shim = ProcessId::of_self().unwrap();
        let member =
            Member { id: "web".into(), bundle: bundle.clone(), phase: Phase::Running, holder, created_ms: 0 };
        fs::write(dir.join("containers/web.json"), serde_json::to_vec(&member).unwrap()).unwrap();
        note(&bundle, &dir);
        shim.start_ticks += 1;
        state(&root.path().join("pod"), shim).write(&dir).unwrap();
        clean_up(&flags(bundle.clone()));
        assert!(holder.is_alive());
        shim.start_ticks -= 1;
        state(&root.path().join("pod"), shim).write(&dir).unwrap();
        clean_up(&flags(bundle));
        assert!(!holder.is_alive());
        assert!(!theirs.wait().unwrap().success());
    }

    #[test]
    fn leftovers_go_twice_in_a_row() {
        let root = tempfile::tempdir().unwrap();
        let (bundle, socket) = (root.path().join("bundle"), root.path().join("socket"));
        let dir = root.path().join("state/default/web");
        fs::create_dir_all(&bundle).unwrap();
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("console.log"), "booting").unwrap();
        fs::write(&socket, "").unwrap();
        fs::write(bundle.join(ADDRESS_FILE), format!("unix://{}", socket.display())).unwrap();
        let (mut monitor, monitor_id) = sleeping();
        let mut shim = ProcessId::of_self().unwrap();
        shim.start_ticks += 1;
        let note = Note { dir: dir.clone(), shim };
        fs::write(bundle.join(NOTE_FILE), serde_json::to_vec(&note).unwrap()).unwrap();
        State { monitor: Some(monitor_id), ..state(&bundle, shim) }.write(&dir).unwrap();

        let flags = flags(bundle);
        for _ in 0..2 {
            clean_up(&flags);
            assert!(!root.path().join("state").exists());
            assert!(!socket.exists());
        }
        assert!(!monitor.wait().unwrap().success());
    }
}
