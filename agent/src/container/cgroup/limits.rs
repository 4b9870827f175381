//! Limits: what of a request is written to which file, and in which order.

use std::{borrow::Cow, io::ErrorKind};

use nix::errno::Errno;
use rvm_protocol::agent::Resources;

use super::{Cgroup, devices::Filter, files, io};
use crate::{
    error::{Error, describe},
    storage::Scratch,
};

/// A checked set of limits.
#[derive(Debug, Default)]
pub struct Limits {
    writes: Vec<Write>,
    devices: Option<Filter>,
    /// Refuse a memory limit below what is in use.
    memory_in_use: Option<u64>,
}

/// One value to be written.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Write {
    /// Of the request.
    pub field: Cow<'static, str>,
    pub file: Cow<'static, str>,
    pub value: Value,
    /// Another write of the same value follows if this one fails.
    pub retried: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Value {
    Text(String),
    /// The quota stays as it is.
    CpuPeriod(u64),
}

/// Files that are no limits: they move processes, end them, or belong to pause
/// and resume.
const NO_LIMITS: &[&str] = &["cgroup.procs", "cgroup.threads", "cgroup.kill", "cgroup.freeze"];

impl Limits {
    /// Checks limits; `field` names them in errors.
    pub fn plan(field: &str, resources: &Resources, scratch: &Scratch) -> Result<Self, Error> {
        let mut writes = plain(field, resources);
        io::plan(field, resources, scratch, &mut writes)?;
        for (name, value) in sorted(&resources.unified) {
            let field = format!("{field}.unified[{name:?}]");
            let reason = match name {
                "" | "." | ".." => Some("must be the name of a file"),
                name if name.contains(['/', '\0']) => Some("must be the name of a file, without \"/\""),
                name if NO_LIMITS.contains(&name) => Some("is no limit"),
                _ => None,
            };
            if let Some(reason) = reason {
                return Err(Error::invalid(field, reason));
            }
            writes.push(write(field, name.to_owned(), value));
        }
        let rules = &resources.device_rules;
        let devices = match rules.is_empty() {
            true => None,
            false => Some(Filter::plan(&format!("{field}.device_rules"), rules)?),
        };
        let memory_in_use = resources.memory_max.filter(|_| resources.memory_check_before_update);
        Ok(Self { writes, devices, memory_in_use: memory_in_use.and_then(|limit| limit.try_into().ok()) })
    }

    /// With the device rules every container is made with.
    pub fn with_devices(mut self) -> Result<Self, Error> {
        if self.devices.is_none() {
            self.devices = Some(Filter::plan("device_rules", &[])?);
        }
        Ok(self)
    }

    /// Puts the limits in force for a new cgroup, which is of no use if that fails.
    pub fn apply(&self, cgroup: &Cgroup) -> Result<(), Error> {
        self.apply_noting(cgroup, |_| {})
    }

    /// Puts the limits in force, all or, as far as the kernel takes the old
    /// values back, none.
    pub fn update(&self, cgroup: &Cgroup) -> Result<(), Error> {
        self.check_memory(cgroup)?;
        let mut before = Vec::new();
        let applied = self.apply_noting(cgroup, |file| {
            before.push((file.to_owned(), files::read(cgroup.dir(), file).unwrap_or_default()));
        });
        if applied.is_err() {
            for (file, content) in before.iter().rev() {
                io::restore(cgroup, file, content);
            }
        }
        applied
    }

    fn check_memory(&self, cgroup: &Cgroup) -> Result<(), Error> {
        let Some(limit) = self.memory_in_use else { return Ok(()) };
        let content = files::read(cgroup.dir(), "memory.current").unwrap_or_default();
        match content.trim().parse::<u64>() {
            Ok(used) if used > limit => {
                let reason = format!("{limit} bytes are less than the {used} in use");
                Err(Error::invalid("resources.memory_max", reason))
            }
            _ => Ok(()),
        }
    }

    fn apply_noting(&self, cgroup: &Cgroup, mut note: impl FnMut(&str)) -> Result<(), Error> {
        for write in &self.writes {
            note(&write.file);
            match write.carry_out(cgroup) {
                Err(_) if write.retried => {}
                result => result?,
            }
        }
        if let Some(devices) = &self.devices {
            cgroup.set_device_filter(devices)?;
        }
        Ok(())
    }
}

impl Write {
    fn carry_out(&self, cgroup: &Cgroup) -> Result<(), Error> {
        let value: Cow<'_, str> = match &self.value {
            Value::Text(text) => text.into(),
            Value::CpuPeriod(period) => {
                let now = files::read(cgroup.dir(), &self.file).unwrap_or_default();
                format!("{} {period}", now.split_whitespace().next().unwrap_or("max")).into()
            }
        };
        match files::write(cgroup.dir(), &self.file, &value) {
            // CRI allows none of every size its host has; of one that the guest
            // does not have none can be used.
            Err(error)
                if error.kind() == ErrorKind::NotFound
                    && value == "0"
                    && self.file.starts_with("hugetlb.") =>
            {
                Ok(())
            }
            result => result.map_err(|error| self.refused(&value, &error)),
        }
    }

    fn refused(&self, value: &str, error: &std::io::Error) -> Error {
        let file = &self.file;
        let reason = match error.kind() {
            ErrorKind::NotFound => format!("the guest's kernel has no cgroup file {file:?}"),
            _ => {
                let reason = error.raw_os_error().map(|errno| describe(Errno::from_raw(errno)));
                format!("write {value:?} to {file}: {}", reason.unwrap_or_else(|| error.to_string()))
            }
        };
        Error::invalid(self.field.clone(), reason)
    }
}

/// A write of a number or a text.
pub(super) fn write(
    field: impl Into<Cow<'static, str>>,
    file: impl Into<Cow<'static, str>>,
    value: impl ToString,
) -> Write {
    Write { field: field.into(), file: file.into(), value: Value::Text(value.to_string()), retried: false }
}

/// A limit as the kernel spells it.
fn limit(value: i64) -> String {
    if value < 0 { "max".into() } else { value.to_string() }
}

/// Maps have no order; limits are written in one.
fn sorted(map: &std::collections::HashMap<String, String>) -> Vec<(&str, &str)> {
    let mut entries: Vec<_> = map.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    entries.sort_unstable();
    entries
}

/// Everything that is one value in one file.
fn plain(field: &str, resources: &Resources) -> Vec<Write> {
    let mut writes = Vec::new();
    let mut put = |name: &str, file: &'static str, value: Option<String>| {
        writes.extend(value.map(|value| write(format!("{field}.{name}"), file, value)));
    };
    put("pids_max", "pids.max", resources.pids_max.map(limit));
    put("memory_swap_max", "memory.swap.max", resources.memory_swap_max.map(limit));
    put("memory_max", "memory.max", resources.memory_max.map(limit));
    put("memory_low", "memory.low", resources.memory_low.map(limit));
    put("cpu_idle", "cpu.idle", resources.cpu_idle.map(|idle| u8::from(idle).to_string()));
    // What runs only on idle processors has no weight; the kernel refuses one.
    let weight = resources.cpu_weight.filter(|_| resources.cpu_idle != Some(true));
    put("cpu_weight", "cpu.weight", weight.map(|weight| weight.to_string()));
    writes.extend(cpu_max(field, resources));
    for (name, value) in [("cpus", &resources.cpus), ("mems", &resources.mems)] {
        if !value.is_empty() {
            writes.push(write(format!("{field}.{name}"), format!("cpuset.{name}"), value));
        }
    }
    for (index, huge) in resources.hugepage_limits.iter().enumerate() {
        let field = format!("{field}.hugepage_limits[{index}]");
        // A size is part of a file's name, and of no path.
        let size = huge.page_size.replace(['/', '\0'], "?");
        writes.push(write(field.clone(), format!("hugetlb.{size}.max"), huge.limit));
        // What is reserved counts as well, or a mapping would be granted and its
        // first touch killed (as runc does).
        writes.push(write(field, format!("hugetlb.{size}.rsvd.max"), huge.limit));
    }
    writes
}

/// A burst must not be above the quota, before or after: where it is to be
/// raised together with the quota it has to wait, where it is to be lowered
/// with it, it must not.
fn cpu_max(field: &str, resources: &Resources) -> Vec<Write> {
    let mut writes = Vec::new();
    let max = match (resources.cpu_quota_us, resources.cpu_period_us) {
        (Some(quota), Some(period)) => {
            Some(("cpu_quota_us", Value::Text(format!("{} {period}", limit(quota)))))
        }
        (Some(quota), None) => Some(("cpu_quota_us", Value::Text(limit(quota)))),
        (None, Some(period)) => Some(("cpu_period_us", Value::CpuPeriod(period))),
        (None, None) => None,
    };
    let burst =
        resources.cpu_burst_us.map(|burst| write(format!("{field}.cpu_burst_us"), "cpu.max.burst", burst));
    match (max, burst) {
        (None, burst) => writes.extend(burst),
        (Some((name, value)), burst) => {
            let again = resources.cpu_burst_us;
            writes.extend(burst.map(|burst| Write { retried: true, ..burst }));
            let field_name = format!("{field}.{name}").into();
            writes.push(Write { field: field_name, file: "cpu.max".into(), value, retried: false });
            writes.extend(again.map(|burst| write(format!("{field}.cpu_burst_us"), "cpu.max.burst", burst)));
        }
    }
    writes
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use rvm_protocol::agent::HugepageLimit;

    use super::*;

    fn plan(resources: &Resources) -> Result<Limits, Error> {
        Limits::plan("resources", resources, &Scratch::none())
    }

    /// A directory with these files stands for a cgroup.
    fn cgroup(dir: &Path, existing: &[(&str, &str)]) -> Cgroup {
        for (name, content) in existing {
            fs::write(dir.join(name), content).unwrap();
        }
        Cgroup::at(dir.to_owned()).unwrap()
    }

    #[test]
    fn limits_become_values_of_files() {
        let resources = Resources {
            cpu_weight: Some(79),
            cpu_quota_us: Some(50_000),
            cpu_period_us: Some(100_000),
            cpus: "0-1".into(),
            memory_max: Some(1 << 20),
            memory_swap_max: Some(-1),
            pids_max: Some(0),
            hugepage_limits: vec![HugepageLimit { page_size: "2MB".into(), limit: 4, ..Default::default() }],
            unified: [("memory.high".to_owned(), "max".to_owned())].into(),
            ..Default::default()
        };
        let limits = plan(&resources).unwrap();
        let written: Vec<(&str, &Value)> =
            limits.writes.iter().map(|write| (&*write.file, &write.value)).collect();
        let text = |text: &str| Value::Text(text.to_owned());
        assert_eq!(
            written,
            [
                ("pids.max", &text("0")),
                ("memory.swap.max", &text("max")),
                ("memory.max", &text("1048576")),
                ("cpu.weight", &text("79")),
                ("cpu.max", &text("50000 100000")),
                ("cpuset.cpus", &text("0-1")),
                ("hugetlb.2MB.max", &text("4")),
                ("hugetlb.2MB.rsvd.max", &text("4")),
                ("memory.high", &text("max")),
            ]
        );
        assert!(plan(&Resources::default()).unwrap().writes.is_empty());
    }

    #[test]
    fn huge_pages_the_guest_does_not_have_can_be_forbidden_and_not_granted() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = cgroup(dir.path(), &[]);
        let apply = |limit| {
            let limits = vec![HugepageLimit { page_size: "1GB".into(), limit, ..Default::default() }];
            plan(&Resources { hugepage_limits: limits, ..Default::default() }).unwrap().apply(&cgroup)
        };
        apply(0).unwrap();
        let error = apply(1 << 30).unwrap_err().to_string();
        assert!(error.ends_with("no cgroup file \"hugetlb.1GB.max\""), "{error}");
    }

    #[test]
    fn a_period_alone_leaves_the_quota() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = cgroup(dir.path(), &[("cpu.max", "30000 100000\n")]);
        let limits = plan(&Resources { cpu_period_us: Some(50_000), ..Default::default() }).unwrap();
        limits.update(&cgroup).unwrap();
        // A plain file keeps what was longer.
        assert!(fs::read_to_string(dir.path().join("cpu.max")).unwrap().starts_with("30000 50000"));
    }

    #[test]
    fn a_burst_is_tried_before_and_after_the_quota() {
        let resources = Resources { cpu_quota_us: Some(1000), cpu_burst_us: Some(500), ..Default::default() };
        let writes = plan(&resources).unwrap().writes;
        let order: Vec<(&str, bool)> = writes.iter().map(|write| (&*write.file, write.retried)).collect();
        assert_eq!(order, [("cpu.max.burst", true), ("cpu.max", false), ("cpu.max.burst", false)]);
    }

    #[test]
    fn names_of_files_are_checked() {
        for (name, reason) in [
            ("../pids.max", "must be the name of a file, without \"/\""),
            ("a/b", "must be the name of a file, without \"/\""),
            ("..", "must be the name of a file"),
            ("", "must be the name of a file"),
            ("cgroup.procs", "is no limit"),
        ] {
            let unified = [(name.to_owned(), "1".to_owned())].into();
            let error = plan(&Resources { unified, ..Default::default() }).unwrap_err().to_string();
            assert_eq!(error, format!("resources.unified[{name:?}]: {reason}"));
        }
    }

    #[test]
    fn a_failed_update_leaves_what_was() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = cgroup(dir.path(), &[("pids.max", "100\n")]);
        let resources = Resources { pids_max: Some(200), memory_max: Some(1), ..Default::default() };
        let error = plan(&resources).unwrap().update(&cgroup).unwrap_err().to_string();
        assert_eq!(error, "resources.memory_max: the guest's kernel has no cgroup file \"memory.max\"");
        assert_eq!(fs::read_to_string(dir.path().join("pids.max")).unwrap().trim(), "100");
    }

    #[test]
    fn a_memory_limit_below_the_usage_is_refused_where_asked() {
        let dir = tempfile::tempdir().unwrap();
        let files = [("memory.current", "5000\n"), ("memory.max", "max\n")];
        let cgroup = cgroup(dir.path(), &files);
        let mut resources = Resources { memory_max: Some(4096), ..Default::default() };
        resources.memory_check_before_update = true;
        let error = plan(&resources).unwrap().update(&cgroup).unwrap_err().to_string();
        assert_eq!(error, "resources.memory_max: 4096 bytes are less than the 5000 in use");
        resources.memory_check_before_update = false;
        plan(&resources).unwrap().update(&cgroup).unwrap();
    }
}
