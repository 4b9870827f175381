//! What a request asks for, checked and in the kernel's terms. Interfaces are
//! named by their slots here, which stay when a name changes.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
};

use rvm_protocol::agent;

use super::{
    PROC_SYS_NET,
    address::Address,
    interfaces::{self, KEPT_FLAGS, LOOPBACK},
    neighbour::Neighbour,
    object::{family, ip},
    route::{Hop, Prefix, Route, unspecified},
    rule::Rule,
};
use crate::error::Error;

/// linux/fib_rules.h
const FR_ACT_GOTO: u32 = 2;

/// The whole state of a network namespace.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// By slot, but for lo.
    pub interfaces: BTreeMap<u32, interfaces::Wanted>,
    /// Of lo too where that is named.
    pub addresses: Vec<Address>,
    /// Permanent ones.
    pub neighbours: Vec<Neighbour>,
    /// In an order in which each can be reached when it is made.
    pub routes: Vec<Route>,
    /// A family without any is left as it is.
    pub rules: Vec<Rule>,
    /// By path below `/proc/sys/net`, in the order they are to be set in.
    pub sysctl: Vec<(String, String)>,
}

/// Names an interface may have: what the kernel takes (`dev_valid_name`).
fn is_interface_name(name: &str) -> bool {
    let plain = |c: char| !c.is_whitespace() && !matches!(c, '/' | ':' | '\0');
    (1..libc::IFNAMSIZ).contains(&name.len()) && name.chars().all(plain) && !matches!(name, "." | "..")
}

/// A number that the kernel keeps in one byte.
fn byte(field: &str, value: u32) -> Result<u8, Error> {
    value.try_into().map_err(|_| Error::invalid(field, format!("{value} must be at most 255")))
}

fn address(field: &str, bytes: &[u8]) -> Result<IpAddr, Error> {
    let v4 = ip(libc::AF_INET as u8, bytes);
    v4.or_else(|| ip(libc::AF_INET6 as u8, bytes))
        .ok_or_else(|| Error::invalid(field, format!("must have 4 or 16 bytes, has {}", bytes.len())))
}

fn optional_address(field: &str, bytes: &[u8]) -> Result<Option<IpAddr>, Error> {
    if bytes.is_empty() { Ok(None) } else { address(field, bytes).map(Some) }
}

fn prefix_len(field: &str, length: u32, of: IpAddr) -> Result<u8, Error> {
    let most = if of.is_ipv4() { 32 } else { 128 };
    match u8::try_from(length) {
        Ok(length) if length <= most => Ok(length),
        _ => Err(Error::invalid(field, format!("{length} must be at most {most}"))),
    }
}

/// The prefix in a field and in the field of its length.
fn prefix(field: &str, bytes: &[u8], length: u32, any: IpAddr) -> Result<Prefix, Error> {
    let start = optional_address(field, bytes)?.unwrap_or(any);
    if family(start) != family(any) {
        return Err(Error::invalid(field, format!("{start} must be of the family of its message")));
    }
    Ok((start, prefix_len(&format!("{field}_len"), length, start)?))
}

/// The address that stands for all of a family.
fn any_of(field: &str, number: u32) -> Result<IpAddr, Error> {
    let known = u8::try_from(number).ok().and_then(unspecified);
    known.ok_or_else(|| {
        let (inet, inet6) = (libc::AF_INET, libc::AF_INET6);
        Error::invalid(field, format!("{number} must be {inet} (AF_INET) or {inet6} (AF_INET6)"))
    })
}

/// Slots by name.
struct Names(HashMap<String, u32>);

impl Names {
    fn slot(&self, field: &str, name: &str) -> Result<u32, Error> {
        let known = self.0.get(name).copied();
        known.ok_or_else(|| Error::invalid(field, format!("{name:?} must be one of the interfaces, or lo")))
    }
}

impl State {
    /// Checks a request.
    pub fn new(request: &agent::SyncNetworkRequest) -> Result<Self, Error> {
        let mut state = Self::default();
        let mut names = Names(HashMap::from([("lo".to_owned(), LOOPBACK)]));
        for (index, interface) in request.interfaces.iter().enumerate() {
            let field = format!("interfaces[{index}]");
            state.add_interface(&field, interface, &mut names)?;
        }
        for (index, neighbour) in request.neighbours.iter().enumerate() {
            let field = format!("neighbours[{index}]");
            state.neighbours.push(Neighbour {
                interface: names.slot(&format!("{field}.interface"), &neighbour.interface)?,
                address: address(&format!("{field}.address"), &neighbour.address)?,
                mac: neighbour.mac.clone(),
                flags: Neighbour::flags(neighbour.flags),
            });
        }
        for (index, route) in request.routes.iter().enumerate() {
            state.routes.push(self::route(&format!("routes[{index}]"), route, &names)?);
        }
        state.routes.retain(|route| !route.is_the_kernels());
        // Stable: what a gateway is reached by comes before it.
        state.routes.sort_by_key(Route::has_gateway);
        for (index, rule) in request.rules.iter().enumerate() {
            state.rules.push(self::rule(&format!("rules[{index}]"), rule)?);
        }
        state.sysctl = sysctl(&request.sysctl)?;
        Ok(state)
    }

    /// Leaves kernel parameters as they are that a pod or a container sets by these names
    /// (`net.core.somaxconn`).
    pub fn leave_out<'a>(&mut self, names: impl Iterator<Item = &'a String>) {
        let files: HashSet<PathBuf> = names.filter_map(|name| crate::container::sysctl::path(name)).collect();
        self.sysctl.retain(|(path, _)| !files.contains(&Path::new(PROC_SYS_NET).join(path)));
    }

    fn add_interface(
        &mut self,
        field: &str,
        interface: &agent::Interface,
        names: &mut Names,
    ) -> Result<(), Error> {
        let slot = interface.slot;
        let name = &interface.name;
        if !is_interface_name(name) || (slot == LOOPBACK) != (name == "lo") {
            let reason =
                format!("{name:?} must be an interface's name of 1 to 15 bytes, \"lo\" in slot 0 alone");
            return Err(Error::invalid(format!("{field}.name"), reason));
        }
        if !matches!(interface.mac.len(), 0 | 6) {
            return Err(Error::invalid(
                format!("{field}.mac"),
                format!("must have 6 bytes, has {}", interface.mac.len()),
            ));
        }
        if slot != LOOPBACK {
            if names.0.insert(name.clone(), slot).is_some() {
                return Err(Error::invalid(format!("{field}.name"), format!("{name:?} is given twice")));
            }
            let wanted = interfaces::Wanted {
                slot,
                name: name.clone(),
                mac: interface.mac.clone(),
                mtu: interface.mtu,
                up: interface.up,
                flags: interface.flags & KEPT_FLAGS,
                alias: interface.alias.clone(),
                tx_queue_len: interface.tx_queue_len,
                group: interface.group,
                index: interface.index,
            };
            if self.interfaces.insert(slot, wanted).is_some() {
                return Err(Error::invalid(format!("{field}.slot"), format!("{slot} is given twice")));
            }
        }
        for (index, address) in interface.addresses.iter().enumerate() {
            let field = format!("{field}.addresses[{index}]");
            self.addresses.push(self::interface_address(&field, address, interface)?);
        }
        Ok(())
    }
}

fn interface_address(
    field: &str,
    address: &agent::Address,
    interface: &agent::Interface,
) -> Result<Address, Error> {
    let local = self::address(&format!("{field}.address"), &address.address)?;
    let broadcast = match optional_address(&format!("{field}.broadcast"), &address.broadcast)? {
        Some(IpAddr::V4(broadcast)) if local.is_ipv4() => Some(broadcast),
        None => None::<Ipv4Addr>,
        Some(_) => {
            return Err(Error::invalid(format!("{field}.broadcast"), "must be IPv4, of an IPv4 address"));
        }
    };
    let peer = optional_address(&format!("{field}.peer"), &address.peer)?;
    if peer.is_some_and(|peer| family(peer) != family(local)) {
        return Err(Error::invalid(format!("{field}.peer"), "must be of the address's family"));
    }
    let named = !address.label.is_empty() && address.label != interface.name && local.is_ipv4();
    Ok(Address {
        interface: interface.slot,
        local,
        prefix_len: prefix_len(&format!("{field}.prefix_len"), address.prefix_len, local)?,
        peer: peer.filter(|&peer| peer != local),
        broadcast,
        scope: byte(&format!("{field}.scope"), address.scope)?,
        flags: Address::flags(address.flags),
        label: named.then(|| address.label.clone()),
        route_metric: address.route_metric,
    })
}

fn route(field: &str, route: &agent::Route, names: &Names) -> Result<Route, Error> {
    let name = |name: &str| format!("{field}.{name}");
    let any = any_of(&name("family"), route.family)?;
    let number = |field: &str, value| byte(&name(field), value);
    let preferred_source = optional_address(&name("preferred_source"), &route.preferred_source)?;
    if preferred_source.is_some_and(|source| family(source) != family(any)) {
        return Err(Error::invalid(name("preferred_source"), "must be of the route's family"));
    }
    let kind = number("type", route.type_)?;
    let mut hops = Vec::new();
    for (index, hop) in route.next_hops.iter().enumerate().filter(|_| !Route::leads_nowhere(kind)) {
        let name = |field: &str| name(&format!("next_hops[{index}].{field}"));
        hops.push(Hop {
            interface: names.slot(&name("interface"), &hop.interface)?,
            gateway: optional_address(&name("gateway"), &hop.gateway)?,
            weight: byte(&name("weight"), hop.weight.saturating_sub(1))?,
            on_link: hop.on_link,
        });
    }
    if hops.is_empty() && !Route::leads_nowhere(kind) {
        return Err(Error::invalid(name("next_hops"), "must not be empty"));
    }
    let metrics = route.metrics.iter().map(|(&kind, &value)| {
        let kind =
            kind.try_into().map_err(|_| Error::invalid(name("metrics"), format!("{kind} is no metric")))?;
        Ok((kind, value))
    });
    Ok(Route {
        destination: prefix(&name("destination"), &route.destination, route.destination_len, any)?,
        source: prefix(&name("source"), &route.source, route.source_len, any)?,
        table: route.table,
        kind,
        protocol: number("protocol", route.protocol)?,
        scope: number("scope", route.scope)?,
        tos: number("tos", route.tos)?,
        metric: route.metric,
        preferred_source,
        preference: number("preference", route.preference)?,
        metrics: metrics.collect::<Result<_, Error>>()?,
        hops,
    })
}

fn ports(field: &str, range: Option<&agent::Range>) -> Result<Option<(u16, u16)>, Error> {
    let port = |value: u32| {
        value.try_into().map_err(|_| Error::invalid(field, format!("{value} must be at most 65535")))
    };
    range.map(|range| Ok((port(range.first)?, port(range.last)?))).transpose()
}

fn rule(field: &str, rule: &agent::Rule) -> Result<Rule, Error> {
    let name = |name: &str| format!("{field}.{name}");
    let any = any_of(&name("family"), rule.family)?;
    let number = |field: &str, value| byte(&name(field), value);
    for (field, interface) in
        [("input_interface", &rule.input_interface), ("output_interface", &rule.output_interface)]
    {
        if !interface.is_empty() && !is_interface_name(interface) {
            return Err(Error::invalid(name(field), format!("{interface:?} must be an interface's name")));
        }
    }
    Ok(Rule {
        source: prefix(&name("source"), &rule.source, rule.source_len, any)?,
        destination: prefix(&name("destination"), &rule.destination, rule.destination_len, any)?,
        tos: number("tos", rule.tos)?,
        priority: rule.priority,
        action: number("action", rule.action)?,
        table: rule.table,
        goto: (rule.action == FR_ACT_GOTO).then_some(rule.goto_priority),
        invert: rule.invert,
        input_interface: rule.input_interface.clone(),
        output_interface: rule.output_interface.clone(),
        mark: rule.mark,
        mark_mask: rule.mark_mask,
        suppress_prefix_len: rule.suppress_prefix_len,
        suppress_group: rule.suppress_group,
        protocol: number("protocol", rule.protocol)?,
        ip_protocol: number("ip_protocol", rule.ip_protocol)?,
        uids: rule.uids.as_ref().map(|range| (range.first, range.last)),
        source_ports: ports(&name("source_ports"), rule.source_ports.as_ref())?,
        destination_ports: ports(&name("destination_ports"), rule.destination_ports.as_ref())?,
    })
}

/// In the order in which one does not undo another: what is of the namespace
/// before what is of an interface, and there `all` and `default`, which the kernel
/// copies to the interfaces, before those.
fn sysctl(given: &HashMap<String, String>) -> Result<Vec<(String, String)>, Error> {
    for (path, value) in given {
        let plain = |part: &str| !matches!(part, "" | "." | "..");
        if !path.split('/').all(plain) || path.contains('\0') || value.contains('\0') {
            let reason = "must be a path below /proc/sys/net and a value without NUL";
            return Err(Error::invalid(format!("sysctl[{path:?}]"), reason));
        }
    }
    let mut sorted: Vec<_> = given.iter().map(|(path, value)| (path.clone(), value.clone())).collect();
    sorted.sort_by_cached_key(|(path, _)| {
        let rank = match path.split('/').nth(2) {
            None => 0,
            Some("all") => 1,
            Some("default") => 2,
            Some(_) => 3,
        };
        (rank, path.clone())
    });
    Ok(sorted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> agent::SyncNetworkRequest {
        let address = agent::Address { address: vec![10, 0, 0, 2], prefix_len: 24, ..Default::default() };
        let hop = |gateway: &[u8]| agent::NextHop {
            interface: "eth0".into(),
            gateway: gateway.into(),
            ..Default::default()
        };
        let route = |length, hop| agent::Route {
            family: 2,
            table: 254,
            destination: if length == 0 { vec![] } else { vec![10, 0, 0, 0] },
            destination_len: length,
            next_hops: vec![hop],
            type_: 1,
            ..Default::default()
        };
        agent::SyncNetworkRequest {
            interfaces: vec![agent::Interface {
                slot: 24,
                name: "eth0".into(),
                mac: vec![2, 0, 0, 0, 0, 1],
                addresses: vec![address],
                ..Default::default()
            }],
            routes: vec![route(0, hop(&[10, 0, 0, 1])), route(24, hop(&[]))],
            rules: vec![agent::Rule { family: 2, action: 1, table: 254, ..Default::default() }],
            neighbours: vec![agent::Neighbour {
                interface: "eth0".into(),
                address: vec![10, 0, 0, 1],
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    /// Why a request is refused that was changed like this.
    fn refused(change: impl FnOnce(&mut agent::SyncNetworkRequest)) -> String {
        let mut request = request();
        change(&mut request);
        State::new(&request).unwrap_err().to_string()
    }

    #[test]
    fn gateways_come_after_what_they_are_reached_by() {
        let state = State::new(&request()).unwrap();
        let lengths: Vec<_> = state.routes.iter().map(|route| route.destination.1).collect();
        assert_eq!(lengths, [24, 0]);
        assert_eq!(state.routes[0].hops[0].interface, 24);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            (refused(|r| r.interfaces[0].name = "a/b".into()), "interfaces[0].name: \"a/b\" must"),
            (refused(|r| r.interfaces[0].name = "sixteen-bytes-xx".into()), "interfaces[0].name: "),
            (refused(|r| r.interfaces[0].name = "lo".into()), "interfaces[0].name: \"lo\" must"),
            (refused(|r| r.interfaces[0].slot = 0), "interfaces[0].name: \"eth0\" must"),
            (refused(|r| r.interfaces[0].mac = vec![1]), "interfaces[0].mac: must have 6 bytes, has 1"),
            (
                refused(|r| r.interfaces.push(r.interfaces[0].clone())),
                "interfaces[1].name: \"eth0\" is given twice",
            ),
            (
                refused(|r| r.interfaces[0].addresses[0].address = vec![1, 2, 3]),
                "interfaces[0].addresses[0].address: must have 4 or 16 bytes, has 3",
            ),
            (
                refused(|r| r.interfaces[0].addresses[0].prefix_len = 33),
                "interfaces[0].addresses[0].prefix_len: 33 must be at most 32",
            ),
            (
                refused(|r| r.interfaces[0].addresses[0].peer = vec![0; 16]),
                "interfaces[0].addresses[0].peer: must be of the address's family",
            ),
            (refused(|r| r.routes[1].family = 7), "routes[1].family: 7 must be 2 (AF_INET) or 10 (AF_INET6)"),
            (refused(|r| r.routes[1].destination = vec![0; 16]), "routes[1].destination: :: must be of"),
            (refused(|r| r.routes[0].next_hops.clear()), "routes[0].next_hops: must not be empty"),
            (
                refused(|r| r.routes[0].next_hops[0].interface = "eth1".into()),
                "routes[0].next_hops[0].interface: \"eth1\" must be one of the interfaces, or lo",
            ),
            (refused(|r| r.routes[0].tos = 256), "routes[0].tos: 256 must be at most 255"),
            (refused(|r| r.rules[0].family = 0), "rules[0].family: 0 must"),
            (refused(|r| r.rules[0].source_len = 33), "rules[0].source_len: 33 must be at most 32"),
            (refused(|r| r.neighbours[0].interface.clear()), "neighbours[0].interface: \"\" must"),
            (
                refused(|r| drop(r.sysctl.insert("../kernel/hostname".into(), "x".into()))),
                "sysctl[\"../kernel/hostname\"]: must be a path below /proc/sys/net",
            ),
        ];
        for (error, expected) in cases {
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn what_a_pod_sets_is_not_set_to_what_the_host_has() {
        let given = [("ipv4/ip_unprivileged_port_start", "1024"), ("core/somaxconn", "4096")];
        let sysctl = given.map(|(path, value)| (path.to_owned(), value.to_owned())).into();
        let mut state = State { sysctl, ..State::default() };
        state.leave_out(["net.ipv4.ip_unprivileged_port_start".to_owned()].iter());
        assert_eq!(state.sysctl, [("core/somaxconn".to_owned(), "4096".to_owned())]);
    }

    #[test]
    fn parameters_of_all_interfaces_come_before_those_of_one() {
        let paths = [
            "ipv4/conf/eth0/rp_filter",
            "ipv4/conf/default/rp_filter",
            "ipv6/conf/all/forwarding",
            "core/somaxconn",
            "ipv4/conf/Aeth/rp_filter",
        ];
        let given = paths.iter().map(|path| ((*path).to_owned(), String::new())).collect();
        let order: Vec<_> = sysctl(&given).unwrap().into_iter().map(|(path, _)| path).collect();
        let expected = [paths[3], paths[2], paths[1], paths[4], paths[0]];
        assert_eq!(order, expected);
    }
}
