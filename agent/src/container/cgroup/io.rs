//! `io.weight` and `io.max`, which name devices by their numbers in the guest.

use nix::sys::stat::{major, minor};
use rvm_protocol::agent::{IoLimit, Resources};

use super::{
    Cgroup, files,
    limits::{Write, write},
};
use crate::{
    error::Error,
    storage::{BlockDevice, Scratch},
};

/// Adds the writes for what `resources` says of block devices.
pub(super) fn plan(
    field: &str,
    resources: &Resources,
    scratch: &Scratch,
    writes: &mut Vec<Write>,
) -> Result<(), Error> {
    if let Some(weight) = resources.io_weight {
        writes.push(write(format!("{field}.io_weight"), "io.weight", format!("default {weight}")));
    }
    for (index, limit) in resources.io_limits.iter().enumerate() {
        let field = format!("{field}.io_limits[{index}]");
        let device = device(&field, limit, scratch)?;
        if let Some(rates) = rates(limit) {
            writes.push(write(field.clone(), "io.max", format!("{device} {rates}")));
        }
        if let Some(weight) = limit.weight {
            writes.push(write(format!("{field}.weight"), "io.weight", format!("{device} {weight}")));
        }
    }
    Ok(())
}

fn device(field: &str, limit: &IoLimit, scratch: &Scratch) -> Result<String, Error> {
    let invalid = |reason: String| Error::invalid(format!("{field}.serial"), reason);
    if !limit.serial.is_empty() {
        let device = BlockDevice::with_serial(&limit.serial).map_err(|error| invalid(error.to_string()))?;
        return Ok(format!("{}:{}", device.major, device.minor));
    }
    let scratch = scratch.device().ok_or_else(|| {
        let reason =
            "the scratch is in memory, whose rate nothing limits; one on a block device can be limited";
        invalid(reason.into())
    })?;
    Ok(format!("{}:{}", major(scratch), minor(scratch)))
}

/// The rates that are set; as in cgroup v1, 0 takes a limit away.
fn rates(limit: &IoLimit) -> Option<String> {
    let rates = [
        ("rbps", limit.read_bps),
        ("wbps", limit.write_bps),
        ("riops", limit.read_iops),
        ("wiops", limit.write_iops),
    ];
    let rates: Vec<String> = rates
        .into_iter()
        .filter_map(|(name, rate)| match rate? {
            0 => Some(format!("{name}=max")),
            rate => Some(format!("{name}={rate}")),
        })
        .collect();
    (!rates.is_empty()).then(|| rates.join(" "))
}

/// Writes back what was read of a file before an update failed. A file of one
/// line for each device is written by line.
pub(super) fn restore(cgroup: &Cgroup, file: &str, content: &str) {
    let by_line = file.starts_with("io.");
    let mut values: Vec<String> = if by_line {
        content.lines().map(str::to_owned).collect()
    } else {
        vec![content.trim_end().to_owned()]
    };
    if file == "io.max" {
        // A device without limits has no line.
        let now = files::read(cgroup.dir(), file).unwrap_or_default();
        let devices = now.lines().filter_map(|line| line.split_once(' ').map(|(device, _)| device));
        let new =
            devices.filter(|device| !content.lines().any(|line| line.starts_with(&format!("{device} "))));
        values.extend(new.map(|device| format!("{device} rbps=max wbps=max riops=max wiops=max")));
    }
    for value in values {
        if let Err(error) = files::write(cgroup.dir(), file, &value) {
            log::warn!("write {value:?} back to {file}: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rates_that_are_set_are_written() {
        assert_eq!(rates(&IoLimit::default()), None);
        let limit = IoLimit { read_bps: Some(1 << 20), write_iops: Some(0), ..Default::default() };
        assert_eq!(rates(&limit).unwrap(), "rbps=1048576 wiops=max");
    }
}
