//! `rvmctl ps`: sandboxes with their state, age and memory, and who has joined them.

use std::{fs, path::Path};

use rvm_shim::{sandbox::Member, state::Phase};
use serde::Serialize;

use crate::sandbox::{self, Sandbox, SandboxError};

/// What is going on with a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Its guest is not ready yet.
    Starting,
    /// It has a container that is not started.
    Created,
    /// Its container was started.
    Running,
    /// Its container stands still.
    Paused,
    /// Its container has ended.
    Stopped,
    /// The monitor runs and does not answer.
    Hung,
    /// The monitor runs, its shim is gone.
    Orphaned,
    /// The monitor is gone, its directory is not.
    Dead,
    /// What it says of itself cannot be read.
    Unreadable,
}

impl From<Phase> for Status {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Starting => Self::Starting,
            Phase::Created => Self::Created,
            Phase::Running => Self::Running,
            Phase::Paused => Self::Paused,
            Phase::Stopped => Self::Stopped,
        }
    }
}

impl Status {
    fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Hung => "hung",
            Self::Orphaned => "orphaned",
            Self::Dead => "dead",
            Self::Unreadable => "unreadable",
        }
    }
}

/// One line of the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// containerd's namespace.
    pub namespace: String,
    /// The id within it.
    pub id: String,
    /// What is going on.
    pub status: Status,
    /// Seconds since its start.
    pub age_s: Option<u64>,
    /// The monitor's process.
    pub monitor_pid: Option<u32>,
    /// The process that runs it: a shim, or `rvmctl run`.
    pub shim_pid: Option<u32>,
    /// Memory the guest has.
    pub guest_memory_bytes: Option<u64>,
    /// Memory of it that it has touched.
    pub guest_resident_bytes: Option<u64>,
    /// The monitor's proportional share of resident memory, the guest's included.
    pub vm_pss_bytes: Option<u64>,
    /// The shim's.
    pub shim_pss_bytes: Option<u64>,
    /// Fields of its specification that have no effect.
    pub not_applied: Vec<String>,
    /// Which of the host's ids its monitor has: its own, or the host's and why.
    pub monitor_ids: Option<String>,
    /// The containers that have joined it.
    pub containers: Vec<Joined>,
}

/// A container that has joined a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Joined {
    /// Its id.
    pub id: String,
    /// What is going on with it.
    pub status: Status,
    /// Seconds since it was made.
    pub age_s: u64,
    /// Its task's process on the host, as long as it is there.
    pub pid: Option<u32>,
}

impl Joined {
    fn of(member: &Member) -> Self {
        let pid = member.holder.is_alive().then_some(member.holder.pid);
        // Its process ends before anybody says so.
        let status = if pid.is_some() { member.phase.into() } else { Status::Stopped };
        Self { id: member.id.clone(), status, age_s: member.age().as_secs(), pid }
    }
}

/// Looks at every sandbox below `state_dir`.
pub fn rows(state_dir: &Path) -> Result<Vec<Row>, SandboxError> {
    Ok(sandbox::list(state_dir)?.iter().map(Row::of).collect())
}

impl Row {
    fn of(sandbox: &Sandbox) -> Self {
        let mut row = Self {
            namespace: sandbox.namespace.clone(),
            id: sandbox.id.clone(),
            status: Status::Unreadable,
            age_s: None,
            monitor_pid: None,
            shim_pid: None,
            guest_memory_bytes: None,
            guest_resident_bytes: None,
            vm_pss_bytes: None,
            shim_pss_bytes: None,
            not_applied: Vec::new(),
            monitor_ids: None,
            containers: Member::list(&sandbox.dir).iter().map(Joined::of).collect(),
        };
        let Ok(state) = &sandbox.state else { return row };
        row.age_s = Some(state.age().as_secs());
        row.guest_memory_bytes = state.memory_mib.checked_mul(1 << 20);
        row.not_applied.clone_from(&state.not_applied);
        row.monitor_ids = Some(state.ids.clone()).filter(|ids| !ids.is_empty());
        if state.shim.is_alive() {
            row.shim_pid = Some(state.shim.pid);
            row.shim_pss_bytes = pss(state.shim.pid);
        }
        let monitor = state.monitor.filter(|monitor| monitor.is_alive());
        row.status = match (monitor, row.shim_pid) {
            (Some(_), None) => Status::Orphaned,
            // Between two states of the file, or about to be cleaned up.
            (None, Some(_)) if state.monitor.is_none() => Status::Starting,
            (None, _) => Status::Dead,
            (Some(_), Some(_)) => state.phase.into(),
        };
        let Some(monitor) = monitor else { return row };
        row.monitor_pid = Some(monitor.pid);
        row.vm_pss_bytes = pss(monitor.pid);
        match sandbox.metrics() {
            Ok(metrics) => row.guest_resident_bytes = Some(metrics.memory_resident_bytes),
            // One that is starting may not listen yet.
            Err(_) if matches!(row.status, Status::Starting | Status::Orphaned) => {}
            Err(_) => row.status = Status::Hung,
        }
        row
    }
}

impl Row {
    /// Its own line, and one for each container that has joined.
    fn lines(&self) -> Vec<[String; 6]> {
        let none = || "-".to_owned();
        let own = [
            self.namespace.clone(),
            self.id.clone(),
            self.status.as_str().to_owned(),
            self.age_s.map_or_else(none, duration),
            self.vm_pss_bytes.map_or_else(none, mebibytes),
            self.shim_pss_bytes.map_or_else(none, mebibytes),
        ];
        let joined = self.containers.iter().map(|joined| {
            let (id, status) = (format!("+ {}", joined.id), joined.status.as_str().to_owned());
            [self.namespace.clone(), id, status, duration(joined.age_s), none(), none()]
        });
        std::iter::once(own).chain(joined).collect()
    }
}

fn pss(pid: u32) -> Option<u64> {
    pss_in(&fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?)
}

fn pss_in(smaps_rollup: &str) -> Option<u64> {
    let value = smaps_rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kib.checked_mul(1024)
}

/// The list as people read it.
pub fn table(rows: &[Row]) -> String {
    let header = ["NAMESPACE", "ID", "STATUS", "AGE", "VM", "SHIM"].map(str::to_owned);
    let lines: Vec<[String; 6]> = std::iter::once(header).chain(rows.iter().flat_map(Row::lines)).collect();
    let mut widths = [0; 6];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.len());
        }
    }
    let mut text = String::new();
    for line in &lines {
        let cells: Vec<String> =
            line.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// The two largest units.
fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{:02}s", seconds % 60),
        3600..86400 => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use rvm_shim::{process_id::ProcessId, state::State};

    use super::*;

    #[test]
    fn proc_files_are_read() {
        let rollup =
            "55d0-7ffe ---p 00000000 00:00 0 [rollup]\nRss:   6312 kB\nPss:       2048 kB\nPss_Dirty: 1 kB\n";
        assert_eq!(pss_in(rollup), Some(2048 << 10));
        assert_eq!(pss_in("Rss: 1 kB\n"), None);
        assert_eq!(pss_in("Pss: 99999999999999999999 kB\n"), None);
        assert!(pss(std::process::id()).is_some_and(|bytes| bytes > 1 << 16));
    }

    #[test]
    fn ages_show_two_units() {
        for (seconds, text) in
            [(0, "0s"), (59, "59s"), (61, "1m01s"), (3599, "59m59s"), (3660, "1h01m"), (90000, "1d01h")]
        {
            assert_eq!(duration(seconds), text);
        }
    }

    fn state(monitor: Option<ProcessId>) -> State {
        State {
            id: "c1".into(),
            namespace: "default".into(),
            phase: Phase::Running,
            bundle: "/b".into(),
            shim: ProcessId::of_self().unwrap(),
            monitor,
            created_ms: 0,
            vcpus: 1,
            memory_mib: 128,
            cgroups: Default::default(),
            network: None,
            timeline: vec![],
            not_applied: vec![],
            ids: String::new(),
        }
    }

    /// The row of a sandbox that says `state` of itself.
    fn row(dir: &Path, state: &State) -> Row {
        let sandbox = dir.join("default/c1");
        fs::create_dir_all(&sandbox).unwrap();
        state.write(&sandbox).unwrap();
        rows(dir).unwrap().remove(0)
    }

    #[test]
    fn the_processes_decide_not_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let this = ProcessId::of_self().unwrap();
        let gone = ProcessId { start_ticks: this.start_ticks + 1, ..this };
        assert_eq!(row(dir.path(), &state(None)).status, Status::Starting);
        assert_eq!(row(dir.path(), &state(Some(gone))).status, Status::Dead);
        // Runs, but nobody listens on its control socket.
        let hung = row(dir.path(), &state(Some(this)));
        assert_eq!((hung.status, hung.monitor_pid), (Status::Hung, Some(this.pid)));
        assert_eq!(hung.guest_memory_bytes, Some(128 << 20));
        let orphaned = State { shim: gone, ..state(Some(this)) };
        assert_eq!(row(dir.path(), &orphaned).status, Status::Orphaned);
        fs::write(dir.path().join("default/c1/sandbox.json"), "{").unwrap();
        assert_eq!(rows(dir.path()).unwrap()[0].status, Status::Unreadable);
    }

    #[test]
    fn rows_are_shown_as_a_table_and_as_json() {
        let dir = tempfile::tempdir().unwrap();
        let this = ProcessId::of_self().unwrap();
        let gone = ProcessId { start_ticks: this.start_ticks + 1, ..this };
        let mut row = row(dir.path(), &State { shim: gone, ..state(Some(gone)) });
        row.age_s = Some(61);
        row.vm_pss_bytes = Some(3 << 19);
        let joined = |id: &str, holder| {
            let member =
                Member { id: id.into(), bundle: "/b".into(), phase: Phase::Paused, holder, created_ms: 0 };
            Joined { age_s: 7, ..Joined::of(&member) }
        };
        row.containers = vec![joined("b", this), joined("c", gone)];
        assert_eq!(
            table(&[row.clone()]),
            "NAMESPACE  ID   STATUS   AGE    VM       SHIM\n\
             default    c1   dead     1m01s  1.5 MiB  -\n\
             default    + b  paused   7s     -        -\n\
             default    + c  stopped  7s     -        -\n"
        );
        let json = serde_json::to_value(&row).unwrap();
        assert_eq!(json["status"], "dead");
        assert_eq!(json["guest_memory_bytes"], 128 << 20);
        assert_eq!(json["shim_pid"], serde_json::Value::Null);
        assert_eq!(json["containers"][0]["pid"], this.pid);
    }
}
