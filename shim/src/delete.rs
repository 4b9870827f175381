//! `delete`: what containerd calls when a shim is dead, however it died.

use std::{
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use containerd_shim_protos::api::DeleteResponse;

use crate::{
    bootstrap::ADDRESS_FILE, config::Config, events::timestamp, flags::Flags, hooks, process::Exit, sandbox,
    task::SANDBOX_DIR_FILE,
};

/// Kills what is left, removes what is left, and reports the container as
/// killed. Calling it again, or with nothing there, does the same nothing.
pub fn delete(flags: &Flags) -> DeleteResponse {
    let bundle = if flags.bundle.as_os_str().is_empty() { Path::new(".") } else { &flags.bundle };
    for dir in sandbox_dirs(bundle, flags) {
        sandbox::clean_up(&dir);
    }
    hooks::after_dead_shim(bundle, &flags.id);
    if let Ok(address) = fs::read_to_string(bundle.join(ADDRESS_FILE)) {
        let socket = address.trim();
        let _ = fs::remove_file(socket.strip_prefix("unix://").unwrap_or(socket));
    }
    DeleteResponse {
        exit_status: Exit::KILLED,
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..Default::default()
    }
}

/// Where the sandbox may be: where its shim noted, and where the configuration
/// of today puts it.
fn sandbox_dirs(bundle: &Path, flags: &Flags) -> Vec<PathBuf> {
    let name = Path::new(&flags.namespace).join(&flags.id);
    let mut dirs = Vec::new();
    if let Ok(noted) = fs::read_to_string(bundle.join(SANDBOX_DIR_FILE)) {
        let noted = PathBuf::from(noted);
        // Not a path somebody else put there.
        if noted.is_absolute() && noted.ends_with(&name) {
            dirs.push(noted);
        }
    }
    if let Ok(config) = Config::load(None).or_else(|_| Config::defaults()) {
        let dir = config.host.state_dir.join(&name);
        if !dirs.contains(&dir) {
            dirs.push(dir);
        }
    }
    dirs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        flags::Action,
        process_id::ProcessId,
        state::{Phase, State},
    };
    use std::process::Command;

    #[test]
    fn leftovers_go_twice_in_a_row() {
        let root = tempfile::tempdir().unwrap();
        let (bundle, socket) = (root.path().join("bundle"), root.path().join("socket"));
        let dir = root.path().join("state/default/web");
        fs::create_dir_all(&bundle).unwrap();
        fs::create_dir_all(dir.join("share/web/rootfs")).unwrap();
        fs::create_dir_all(dir.join("share/web/mounts/2")).unwrap();
        fs::write(dir.join("console.log"), "booting").unwrap();
        fs::write(&socket, "").unwrap();
        fs::write(bundle.join(ADDRESS_FILE), format!("unix://{}", socket.display())).unwrap();
        fs::write(bundle.join(SANDBOX_DIR_FILE), dir.to_str().unwrap()).unwrap();
        let mut monitor = Command::new("sleep").arg("1000").spawn().unwrap();
        let mut shim = ProcessId::of_self().unwrap();
        shim.start_ticks += 1;
        State {
            id: "web".into(),
            namespace: "default".into(),
            phase: Phase::Running,
            bundle: bundle.clone(),
            shim,
            monitor: Some(ProcessId::of(monitor.id()).unwrap()),
            created_ms: 0,
            vcpus: 1,
            memory_mib: 64,
            cgroups: Default::default(),
            timeline: vec![],
            not_applied: vec![],
        }
        .write(&dir)
        .unwrap();

        let flags = Flags {
            action: Action::Delete,
            namespace: "default".into(),
            id: "web".into(),
            address: String::new(),
            bundle,
            debug: false,
        };
        for _ in 0..2 {
            assert_eq!(delete(&flags).exit_status, 137);
            assert!(!root.path().join("state").exists());
            assert!(!socket.exists());
        }
        assert!(!monitor.wait().unwrap().success());
    }
}
