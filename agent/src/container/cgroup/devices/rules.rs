//! Device rules with the meaning they have for runc, which is that of cgroup
//! v1: a default, and exceptions to it.

use std::collections::BTreeMap;

use rvm_protocol::agent::DeviceRule;

use crate::{error::Error, storage::BlockDevice};

/// A set of `BPF_DEVCG_ACC_*`.
pub type Access = u32;
/// `BPF_DEVCG_ACC_MKNOD`.
pub const MKNOD: Access = 1;
/// `BPF_DEVCG_ACC_READ`.
pub const READ: Access = 2;
/// `BPF_DEVCG_ACC_WRITE`.
pub const WRITE: Access = 4;
/// Everything.
pub const ALL: Access = MKNOD | READ | WRITE;

/// `BPF_DEVCG_DEV_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Block devices.
    Block = 1,
    /// Character devices.
    Char = 2,
}

/// The devices an exception is about; `None` stands for all numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Devices {
    pub kind: Kind,
    pub major: Option<u32>,
    pub minor: Option<u32>,
}

/// What is allowed but for exceptions, or forbidden but for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Whether everything is allowed that no exception forbids.
    pub default_allow: bool,
    /// What the default does not hold for.
    pub exceptions: BTreeMap<Devices, Access>,
}

/// What every container may use, as with runc: making any node, and using null,
/// random, full, tty, zero, urandom, terminals, ptmx and net/tun.
const DEFAULT: &[(Kind, Option<u32>, Option<u32>, Access)] = &[
    (Kind::Char, None, None, MKNOD),
    (Kind::Block, None, None, MKNOD),
    (Kind::Char, Some(1), Some(3), ALL),
    (Kind::Char, Some(1), Some(8), ALL),
    (Kind::Char, Some(1), Some(7), ALL),
    (Kind::Char, Some(5), Some(0), ALL),
    (Kind::Char, Some(1), Some(5), ALL),
    (Kind::Char, Some(1), Some(9), ALL),
    (Kind::Char, Some(136), None, ALL),
    (Kind::Char, Some(5), Some(2), ALL),
    (Kind::Char, Some(10), Some(200), ALL),
];

impl Rules {
    /// The rules of a request, with what every container may use at the end.
    pub fn parse(field: &str, requested: &[DeviceRule]) -> Result<Self, Error> {
        let mut rules = Self::default();
        for (index, rule) in requested.iter().enumerate() {
            let field = |name: &str| format!("{field}[{index}]{name}");
            let access = access(&rule.access).map_err(|reason| Error::invalid(field(".access"), reason))?;
            let kind = match rule.type_.as_str() {
                // All devices, whatever else the rule says.
                "a" => {
                    rules = Self { default_allow: rule.allow, exceptions: BTreeMap::new() };
                    continue;
                }
                "b" => Kind::Block,
                "c" => Kind::Char,
                other => {
                    let reason = format!("{other:?} must be \"a\", \"b\" or \"c\"");
                    return Err(Error::invalid(field(".type"), reason));
                }
            };
            let devices = match rule.block_serial.as_str() {
                "" => Devices { kind, major: rule.major, minor: rule.minor },
                serial => {
                    let device = BlockDevice::with_serial(serial)
                        .map_err(|error| Error::invalid(field(".block_serial"), error.to_string()))?;
                    Devices { kind, major: Some(device.major), minor: Some(device.minor) }
                }
            };
            rules.apply(rule.allow, devices, access).map_err(|reason| Error::invalid(field(""), reason))?;
        }
        for (kind, major, minor, access) in DEFAULT {
            let devices = Devices { kind: *kind, major: *major, minor: *minor };
            // Where a wider exception forbids it, the spec has been explicit.
            let _ = rules.apply(true, devices, *access);
        }
        Ok(rules)
    }

    /// Adds an exception, or takes one back.
    fn apply(&mut self, allow: bool, devices: Devices, access: Access) -> Result<(), String> {
        if allow != self.default_allow {
            *self.exceptions.entry(devices).or_default() |= access;
            return Ok(());
        }
        let wider = [
            Devices { major: None, ..devices },
            Devices { minor: None, ..devices },
            Devices { major: None, minor: None, ..devices },
        ];
        let overlaps = |wide: &Devices| {
            *wide != devices && self.exceptions.get(wide).is_some_and(|excepted| excepted & access != 0)
        };
        if wider.iter().any(overlaps) {
            let (earlier, this) = if allow { ("forbids", "allow") } else { ("allows", "forbid") };
            return Err(format!(
                "cannot {this} a part of what an earlier rule {earlier} for all numbers; put it as rules that need no hole"
            ));
        }
        if let Some(excepted) = self.exceptions.get_mut(&devices) {
            *excepted &= !access;
            if *excepted == 0 {
                self.exceptions.remove(&devices);
            }
        }
        Ok(())
    }
}

fn access(letters: &str) -> Result<Access, String> {
    let one = |letter| match letter {
        'm' => Some(MKNOD),
        'r' => Some(READ),
        'w' => Some(WRITE),
        _ => None,
    };
    let access = letters.chars().try_fold(0, |all, letter| Some(all | one(letter)?));
    access.filter(|access| *access != 0).ok_or_else(|| format!("{letters:?} must be one or more of \"rwm\""))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn rule(allow: bool, kind: &str, major: i64, minor: i64, access: &str) -> DeviceRule {
        DeviceRule {
            allow,
            type_: kind.into(),
            major: u32::try_from(major).ok(),
            minor: u32::try_from(minor).ok(),
            access: access.into(),
            ..Default::default()
        }
    }

    fn char(major: u32, minor: u32) -> Devices {
        Devices { kind: Kind::Char, major: Some(major), minor: Some(minor) }
    }

    #[test]
    fn defaults_come_last() {
        let none = Rules::parse("r", &[]).unwrap();
        let deny_null = Rules::parse("r", &[rule(false, "c", 1, 3, "rwm")]).unwrap();
        assert_eq!(none, deny_null);
        assert!(!none.default_allow);
        assert_eq!(none.exceptions.len(), DEFAULT.len());
    }

    #[test]
    fn a_rule_for_all_starts_afresh() {
        let all = Rules::parse("r", &[rule(true, "c", 10, 229, "rw"), rule(true, "a", 7, 7, "r")]).unwrap();
        assert_eq!(all, Rules { default_allow: true, exceptions: BTreeMap::new() });
        let all_but = Rules::parse("r", &[rule(true, "a", -1, -1, "rwm"), rule(false, "c", 10, 229, "w")]);
        let all_but = all_but.unwrap();
        assert_eq!(all_but.exceptions, BTreeMap::from([(char(10, 229), WRITE)]));
    }

    #[test]
    fn the_later_rule_wins() {
        let rules = [rule(true, "c", 10, 229, "rwm"), rule(false, "c", 10, 229, "w")];
        let rules = Rules::parse("r", &rules).unwrap();
        assert_eq!(rules.exceptions.get(&char(10, 229)), Some(&(READ | MKNOD)));
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_field() {
        for (rules, expected) in [
            (vec![rule(true, "c", 1, 1, "")], "r[0].access: \"\" must be one or more of \"rwm\""),
            (vec![rule(true, "c", 1, 1, "rx")], "r[0].access: \"rx\" must be one or more of \"rwm\""),
            (vec![rule(true, "p", 1, 1, "r")], "r[0].type: \"p\" must be \"a\", \"b\" or \"c\""),
            (
                vec![DeviceRule { block_serial: "none".into(), ..rule(true, "b", 8, 0, "r") }],
                "r[0].block_serial: no block device has the serial \"none\"",
            ),
            (
                vec![rule(true, "b", -1, -1, "rw"), rule(false, "b", 8, 0, "w")],
                "r[1]: cannot forbid a part of what an earlier rule allows for all numbers; put it as rules that need no hole",
            ),
        ] {
            assert_eq!(Rules::parse("r", &rules).unwrap_err().to_string(), expected);
        }
        // No overlap, no hole.
        Rules::parse("r", &[rule(true, "b", -1, -1, "m"), rule(false, "b", 8, 0, "w")]).unwrap();
    }
}
