//! What a network namespace of the host looks like: its interfaces, and what the
//! agent is asked to make of them in the guest.

mod addresses;
mod links;
mod neighbours;
mod parameters;
mod routes;
mod rules;

use std::collections::BTreeMap;

use rvm_protocol::{
    agent::{Address, Neighbour, Route, Rule, SyncNetworkRequest},
    netlink::{Refusal, Socket},
};

pub use links::{Kind, Link};

use super::{Namespace, NetworkError, resolver};

/// A namespace as it was at one moment.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Interfaces that can be carried into the guest, by their numbers.
    pub links: BTreeMap<u32, Link>,
    /// Taps of a sandbox's, with their numbers.
    pub taps: Vec<u32>,
    /// Whether Docker's name server listens there.
    pub resolver: bool,
    addresses: BTreeMap<u32, Vec<Address>>,
    routes: Vec<Route>,
    rules: Vec<Rule>,
    neighbours: Vec<Neighbour>,
    parameters: BTreeMap<String, String>,
}

impl Observed {
    /// Reads the namespace, to whose kernel `socket` speaks.
    pub fn read(namespace: &Namespace, socket: &Socket) -> Result<Self, NetworkError> {
        let failed = |what| move |source: Refusal| NetworkError::Read { what, source };
        let all = links::read(socket).map_err(failed("interfaces"))?;
        let addresses = addresses::read(socket).map_err(failed("addresses"))?;
        let taps = all.iter().filter(|link| link.is_our_tap()).map(|link| link.index).collect();
        let links = links::carried(all, |index| addresses.contains_key(&index))?;
        let routes = routes::read(socket, &links).map_err(failed("routes"))??;
        let rules = rules::read(socket).map_err(failed("rules"))??;
        let neighbours = neighbours::read(socket, &links).map_err(failed("neighbours"))?;
        let carried = links.values().filter(|link| link.kind == Kind::Ethernet);
        let names: Vec<&str> = carried.map(|link| link.name.as_str()).collect();
        let (parameters, resolver) = match names.is_empty() {
            true => Default::default(),
            false => {
                let read = || (parameters::read(names.into_iter()), resolver::is_there());
                let (parameters, resolver) = namespace.run(read).map_err(NetworkError::Enter)?;
                (parameters.map_err(NetworkError::Parameters)?, resolver.map_err(NetworkError::Enter)?)
            }
        };
        Ok(Self { links, taps, resolver, addresses, routes, rules, neighbours, parameters })
    }

    /// What the guest's namespace is to be, where interfaces have these slots.
    pub fn wanted(&self, slots: &BTreeMap<u32, u8>) -> SyncNetworkRequest {
        let interface = |link: &Link| {
            let slot = match link.kind {
                Kind::Loopback => 0,
                Kind::Ethernet => *slots.get(&link.index)?,
            };
            let addresses = self.addresses.get(&link.index).cloned().unwrap_or_default();
            Some(link.wanted(slot, addresses))
        };
        SyncNetworkRequest {
            interfaces: self.links.values().filter_map(interface).collect(),
            routes: self.routes.clone(),
            rules: self.rules.clone(),
            neighbours: self.neighbours.clone(),
            sysctl: self.parameters.clone().into_iter().collect(),
            ..Default::default()
        }
    }

    /// Whether a guest that was told nothing is like it: there is `lo` alone.
    pub fn is_bare(&self) -> bool {
        let lo = |link: &Link| link.kind == Kind::Loopback && self.addresses_of_lo_are_usual(link.index);
        self.links.values().all(lo) && rules::are_usual(&self.rules)
    }

    fn addresses_of_lo_are_usual(&self, index: u32) -> bool {
        let usual = |address: &Address| match address.address.as_slice() {
            [127, 0, 0, 1] => address.prefix_len == 8,
            other => address.prefix_len == 128 && other == std::net::Ipv6Addr::LOCALHOST.octets(),
        };
        self.addresses.get(&index).into_iter().flatten().all(usual)
    }
}

/// Every interface there is.
pub fn every_link(socket: &Socket) -> Result<Vec<Link>, Refusal> {
    links::read(socket)
}

/// The names by which other parts refer to interfaces.
type Links = BTreeMap<u32, Link>;
