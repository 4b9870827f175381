//! `linux.resources`: limits in cgroup v1's terms or v2's, converted to v2's as
//! runc does on a host that has only v2.

use oci_spec::runtime::{self as oci, LinuxDeviceType};
use rvm_protocol::agent::{Device, DeviceRule, HugepageLimit, IoLimit, Resources};

use super::{SpecError, text};

/// Number of a rule that stands for every device.
const ALL_DEVICES: i64 = -1;

/// Converts `resources`, whose path in its document is `field`.
///
/// `devices` are the container's, by which a limit or a rule finds the guest's
/// device for a number of the host. What cgroup v2 has no counterpart for, and
/// runc ignores there, is added to `not_applied`.
pub(crate) fn translate(
    field: &str,
    resources: &oci::LinuxResources,
    devices: &[Device],
    not_applied: &mut Vec<String>,
) -> Result<Resources, SpecError> {
    let mut out = Resources::new();
    if let Some(memory) = resources.memory() {
        self::memory(&format!("{field}.memory"), memory, &mut out, not_applied)?;
    }
    if let Some(cpu) = resources.cpu() {
        self::cpu(&format!("{field}.cpu"), cpu, &mut out, not_applied)?;
    }
    if let Some(pids) = resources.pids() {
        out.pids_max = limit(&format!("{field}.pids.limit"), Some(pids.limit()))?;
    }
    if let Some(block_io) = resources.block_io() {
        self::block_io(&format!("{field}.blockIO"), block_io, devices, &mut out, not_applied)?;
    }
    for (n, limit) in resources.hugepage_limits().iter().flatten().enumerate() {
        out.hugepage_limits.push(hugepages(&format!("{field}.hugepageLimits[{n}]"), limit)?);
    }
    for (n, rule) in resources.devices().iter().flatten().enumerate() {
        out.device_rules.extend(device_rule(&format!("{field}.devices[{n}]"), rule, devices)?);
    }
    for (file, value) in resources.unified().iter().flatten() {
        let at = format!("{field}.unified[{file:?}]");
        if file.contains('/') || !file.contains('.') || file.starts_with('.') {
            return Err(SpecError::field(at, "must be a cgroup v2 file, CONTROLLER.PARAMETER"));
        }
        out.unified.insert(text(&at, Some(file))?, text(&at, Some(value))?);
    }
    if resources.rdma().iter().flatten().next().is_some() {
        return Err(SpecError::unsupported(format!("{field}.rdma"), "the guest has no RDMA device"));
    }
    if let Some(network) = resources.network() {
        let labels = network.class_id().is_some_and(|id| id > 0);
        if labels || network.priorities().iter().flatten().next().is_some() {
            not_applied.push(format!("{field}.network"));
        }
    }
    Ok(out)
}

fn memory(
    at: &str,
    memory: &oci::LinuxMemory,
    out: &mut Resources,
    not_applied: &mut Vec<String>,
) -> Result<(), SpecError> {
    out.memory_max = limit(&format!("{at}.limit"), memory.limit())?;
    out.memory_check_before_update = memory.check_before_update() == Some(true);
    out.memory_low = limit(&format!("{at}.reservation"), memory.reservation())?;
    let both = limit(&format!("{at}.swap"), memory.swap())?;
    out.memory_swap_max = match (both, out.memory_max) {
        // Nothing was said about swap: without a limit for memory there is none
        // for swap either.
        (None, Some(-1)) => Some(-1),
        (None, _) => None,
        (Some(-1), _) => Some(-1),
        (Some(_), None | Some(-1)) => {
            return Err(SpecError::field(
                format!("{at}.swap"),
                "limits memory and swap together and needs memory.limit beside it",
            ));
        }
        (Some(both), Some(memory)) if both < memory => {
            return Err(SpecError::field(
                format!("{at}.swap"),
                format!(
                    "limits memory and swap together and must not be below memory.limit, is {both} below {memory}"
                ),
            ));
        }
        (Some(both), Some(memory)) => Some(both - memory),
    };
    for (ignored, name) in [
        (memory.kernel().is_some_and(|limit| limit != 0), "kernel"),
        (memory.kernel_tcp().is_some_and(|limit| limit != 0), "kernelTCP"),
        (memory.swappiness().is_some(), "swappiness"),
        (memory.disable_oom_killer() == Some(true), "disableOOMKiller"),
        (memory.use_hierarchy() == Some(false), "useHierarchy"),
    ] {
        if ignored {
            not_applied.push(format!("{at}.{name}"));
        }
    }
    Ok(())
}

fn cpu(
    at: &str,
    cpu: &oci::LinuxCpu,
    out: &mut Resources,
    not_applied: &mut Vec<String>,
) -> Result<(), SpecError> {
    out.cpu_weight = cpu.shares().filter(|shares| *shares != 0).map(weight_of_shares);
    out.cpu_quota_us = cpu.quota().filter(|quota| *quota != 0).map(|quota| quota.max(-1));
    out.cpu_period_us = cpu.period().filter(|period| *period != 0);
    out.cpu_burst_us = cpu.burst();
    out.cpu_idle = match cpu.idle() {
        None => None,
        Some(idle @ (0 | 1)) => Some(idle == 1),
        Some(idle) => {
            return Err(SpecError::field(format!("{at}.idle"), format!("must be 0 or 1, is {idle}")));
        }
    };
    out.cpus = list(&format!("{at}.cpus"), cpu.cpus().as_deref())?;
    out.mems = list(&format!("{at}.mems"), cpu.mems().as_deref())?;
    for (ignored, name) in [
        (cpu.realtime_runtime().is_some_and(|runtime| runtime != 0), "realtimeRuntime"),
        (cpu.realtime_period().is_some_and(|period| period != 0), "realtimePeriod"),
    ] {
        if ignored {
            not_applied.push(format!("{at}.{name}"));
        }
    }
    Ok(())
}

fn block_io(
    at: &str,
    io: &oci::LinuxBlockIo,
    devices: &[Device],
    out: &mut Resources,
    not_applied: &mut Vec<String>,
) -> Result<(), SpecError> {
    out.io_weight = io_weight(&format!("{at}.weight"), io.weight())?;
    let mut leaf = io.leaf_weight().is_some_and(|weight| weight != 0);
    let limits = &mut out.io_limits;
    for (n, device) in io.weight_device().iter().flatten().enumerate() {
        leaf |= device.leaf_weight().is_some_and(|weight| weight != 0);
        if let Some(weight) = io_weight(&format!("{at}.weightDevice[{n}].weight"), device.weight())? {
            io_limit(limits, devices, device.major(), device.minor()).weight = Some(weight);
        }
    }
    if leaf {
        not_applied.push(format!("{at}.leafWeight"));
    }
    let throttles: [(_, Slot); 4] = [
        (io.throttle_read_bps_device(), |limit| &mut limit.read_bps),
        (io.throttle_write_bps_device(), |limit| &mut limit.write_bps),
        (io.throttle_read_iops_device(), |limit| &mut limit.read_iops),
        (io.throttle_write_iops_device(), |limit| &mut limit.write_iops),
    ];
    for (throttles, slot) in throttles {
        for throttle in throttles.iter().flatten().filter(|throttle| throttle.rate() != 0) {
            let slot = slot(io_limit(limits, devices, throttle.major(), throttle.minor()));
            // Several devices of the host may all stand for the scratch.
            *slot = Some(slot.map_or(throttle.rate(), |rate| rate.min(throttle.rate())));
        }
    }
    Ok(())
}

/// One of a device's rates.
type Slot = fn(&mut IoLimit) -> &mut Option<u64>;

/// The entry for a device of the host.
fn io_limit<'a>(limits: &'a mut Vec<IoLimit>, devices: &[Device], major: i64, minor: i64) -> &'a mut IoLimit {
    let serial =
        block_device(devices, major, minor).map(|device| device.block_serial.clone()).unwrap_or_default();
    let n = limits.iter().position(|limit| limit.serial == serial).unwrap_or_else(|| {
        limits.push(IoLimit { serial, ..Default::default() });
        limits.len() - 1
    });
    &mut limits[n]
}

/// The block device of the container that has this number on the host.
fn block_device(devices: &[Device], major: i64, minor: i64) -> Option<&Device> {
    devices.iter().find(|device| {
        !device.block_serial.is_empty()
            && (i64::from(device.major), i64::from(device.minor)) == (major, minor)
    })
}

fn hugepages(at: &str, limit: &oci::LinuxHugepageLimit) -> Result<HugepageLimit, SpecError> {
    let size = limit.page_size();
    let digits = size.trim_end_matches(|c: char| c.is_ascii_uppercase());
    if digits.is_empty()
        || !digits.bytes().all(|byte| byte.is_ascii_digit())
        || !["KB", "MB", "GB"].contains(&&size[digits.len()..])
    {
        return Err(SpecError::field(
            format!("{at}.pageSize"),
            format!("must be a size in KB, MB or GB, for example \"2MB\", is {size:?}"),
        ));
    }
    let bytes = u64::try_from(limit.limit()).map_err(|_| {
        SpecError::field(format!("{at}.limit"), format!("must not be negative, is {}", limit.limit()))
    })?;
    if bytes > 0 && size != "2MB" {
        let reason =
            format!("the guest has huge pages of 2 MiB only, none of {size} (Kubernetes: hugepages-2Mi)");
        return Err(SpecError::unsupported(at, reason));
    }
    Ok(HugepageLimit { page_size: size.clone(), limit: bytes, ..Default::default() })
}

/// The rule in the guest's terms; none where it is about a block device that the
/// guest does not have: the guest's own may have that number.
fn device_rule(
    at: &str,
    rule: &oci::LinuxDeviceCgroup,
    devices: &[Device],
) -> Result<Option<DeviceRule>, SpecError> {
    let kind = match rule.typ() {
        None | Some(LinuxDeviceType::A) => "a",
        Some(LinuxDeviceType::B) => "b",
        Some(LinuxDeviceType::C) => "c",
        Some(other @ (LinuxDeviceType::U | LinuxDeviceType::P)) => {
            return Err(SpecError::field(
                format!("{at}.type"),
                format!("must be one of a, b, c, is {:?}", other.as_str()),
            ));
        }
    };
    let number = |name: &str, value: Option<i64>| match value {
        None | Some(ALL_DEVICES) => Ok(None),
        Some(value) => u32::try_from(value).map(Some).map_err(|_| {
            SpecError::field(
                format!("{at}.{name}"),
                format!("must be a device number, or -1 for all, is {value}"),
            )
        }),
    };
    let (major, minor) = (number("major", rule.major())?, number("minor", rule.minor())?);
    let access = rule.access().as_deref().unwrap_or_default();
    if access.is_empty() || !access.bytes().all(|letter| b"rwm".contains(&letter)) {
        return Err(SpecError::field(
            format!("{at}.access"),
            format!("must be of the letters r, w and m, is {access:?}"),
        ));
    }
    let block_serial = match (kind, major, minor) {
        ("b", Some(major), Some(minor)) => match block_device(devices, major.into(), minor.into()) {
            Some(device) => device.block_serial.clone(),
            None => return Ok(None),
        },
        _ => String::new(),
    };
    Ok(Some(DeviceRule {
        allow: rule.allow(),
        type_: kind.into(),
        major,
        minor,
        access: access.into(),
        block_serial,
        ..Default::default()
    }))
}

/// A limit where 0 says nothing and -1 that there is none.
fn limit(at: &str, value: Option<i64>) -> Result<Option<i64>, SpecError> {
    match value {
        None | Some(0) => Ok(None),
        Some(value) if value < -1 => {
            Err(SpecError::field(at, format!("must be positive, or -1 for no limit, is {value}")))
        }
        value => Ok(value),
    }
}

/// 2 to 262144 become 1 to 10000 on the curve that also takes v1's default, 1024,
/// to v2's, 100 (runc from 1.3.2 and 1.4 on, crun from 1.23 on); what is outside
/// counts as the nearest, as with cgroup v1.
fn weight_of_shares(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            // At most 10^4, as the curve only rises.
            10f64.powf(exponent).ceil() as u64
        }
    }
}

/// 10 to 1000 become 1 to 10000, as with runc.
fn io_weight(at: &str, weight: Option<u16>) -> Result<Option<u32>, SpecError> {
    match weight {
        None | Some(0) => Ok(None),
        Some(weight @ 10..=1000) => Ok(Some(1 + (u32::from(weight) - 10) * 9_999 / 990)),
        Some(weight) => Err(SpecError::field(at, format!("must be 10 to 1000, is {weight}"))),
    }
}

/// A list of CPUs or memory nodes, for example `0-3,7`.
pub(super) fn list(at: &str, value: Option<&str>) -> Result<String, SpecError> {
    let value = value.unwrap_or_default().trim();
    let number = |text: &str| {
        text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u32>().ok()).flatten()
    };
    let good = |part: &str| match part.split_once('-') {
        None => number(part).is_some(),
        Some((first, last)) => {
            matches!((number(first), number(last)), (Some(first), Some(last)) if first <= last)
        }
    };
    if value.is_empty() || value.split(',').all(good) {
        return Ok(value.to_owned());
    }
    Err(SpecError::field(at, format!("must be a list of numbers and ranges like \"0-3,7\", is {value:?}")))
}
