//! CPUs that are brought up and down in the running guest.

use std::{fs, ops::RangeInclusive, path::Path};

use crate::error::{Error, Step, StepError, StepResult};

const SYS_CPU: &str = "/sys/devices/system/cpu";

/// Checks how many are asked for.
pub fn check(wanted: u32) -> Result<(), Error> {
    match wanted {
        0 => Err(Error::invalid("count", "must be at least 1")),
        _ => Ok(()),
    }
}

/// How many are online.
pub fn online() -> StepResult<u32> {
    Ok(count(&list(Path::new(SYS_CPU), "online")?))
}

/// Brings CPUs up, the first ones first, or down, the last ones first, until
/// `wanted` are online or no more can be.
pub fn bring_online(wanted: u32) -> StepResult<()> {
    let sys_cpu = Path::new(SYS_CPU);
    let present = list(sys_cpu, "present")?;
    let is_online =
        |cpu: u32, online: &[RangeInclusive<u32>]| online.iter().any(|range| range.contains(&cpu));
    let cpus = || present.iter().cloned().flatten();
    let mut online = list(sys_cpu, "online")?;
    for cpu in cpus() {
        if count(&online) < wanted && !is_online(cpu, &online) {
            set(sys_cpu, cpu, true)?;
            online = list(sys_cpu, "online")?;
        }
    }
    // The first one has no switch.
    for cpu in cpus().collect::<Vec<_>>().into_iter().skip(1).rev() {
        if count(&online) > wanted && is_online(cpu, &online) {
            set(sys_cpu, cpu, false)?;
            online = list(sys_cpu, "online")?;
        }
    }
    Ok(())
}

fn count(ranges: &[RangeInclusive<u32>]) -> u32 {
    ranges.iter().map(|range| range.end().saturating_sub(*range.start()).saturating_add(1)).sum()
}

fn set(sys_cpu: &Path, cpu: u32, online: bool) -> StepResult<()> {
    let (value, verb) = if online { ("1", "bring up") } else { ("0", "take down") };
    fs::write(sys_cpu.join(format!("cpu{cpu}/online")), value).step(|| format!("{verb} CPU {cpu}"))
}

/// A list of CPUs such as `0-3,7`.
fn list(sys_cpu: &Path, name: &str) -> StepResult<Vec<RangeInclusive<u32>>> {
    let text = fs::read_to_string(sys_cpu.join(name)).step(|| format!("read which CPUs are {name}"))?;
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    let ranges: Option<_> = text.trim().split(',').map(range).collect();
    ranges.ok_or_else(|| StepError::Refused(format!("read which CPUs are {name}: {text:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        for (text, expected) in [("0\n", 1), ("0-3\n", 4), ("0-1,5,7-8\n", 5)] {
            fs::write(dir.path().join("online"), text).unwrap();
            assert_eq!(count(&list(dir.path(), "online").unwrap()), expected, "{text}");
        }
        fs::write(dir.path().join("online"), "x\n").unwrap();
        assert!(list(dir.path(), "online").is_err());
        assert!(online().unwrap() > 0);
        assert!(check(0).unwrap_err().to_string().starts_with("count: ") && check(1).is_ok());
    }
}
