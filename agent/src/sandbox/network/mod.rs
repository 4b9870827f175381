//! The sandbox's network namespace: what the host's looks like is what its
//! containers find here.
//!
//! The host says all there is to be ([`State`]); here it is compared with what is
//! there, and what differs is changed. Containers may change it too: what they
//! added stays, and what the host says again stays as they left it.
//!
//! A child does it ([`crate::helper`]): devices are found and let go of, and it
//! takes being in the namespace.

mod address;
mod interfaces;
mod neighbour;
mod object;
mod request;
mod route;
mod rule;
mod slots;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

pub use interfaces::Link;
use interfaces::{Interfaces, links};
use nix::sched::{CloneFlags, setns};
use object::{Object, present, reconcile};
pub use request::State;
use route::Route;
use rule::Rule;
use rvm_protocol::netlink::Socket;
pub use slots::{PciSlots, Slots};
use tokio::sync::Mutex;

use crate::{
    error::{Step, StepError, StepResult},
    helper::{self, Outcome},
    reaper::Reaper,
};

const PROC_SYS_NET: &str = "/proc/sys/net";
/// The file that says which link-local address the kernel gives an interface.
const ADDR_GEN_MODE: &str = "addr_gen_mode";
/// In it: none.
const GENERATE_NONE: &str = "1";

/// The network of a sandbox.
#[derive(Debug)]
pub struct Network {
    slots: Box<dyn Slots>,
    applied: Mutex<Applied>,
}

impl Default for Network {
    fn default() -> Self {
        Self::new(Box::new(PciSlots))
    }
}

/// What has been asked for so far.
#[derive(Debug, Default)]
struct Applied {
    state: State,
    /// Once it has been done.
    once: bool,
}

impl Applied {
    /// What was asked for could not be done: parts of it may be in force.
    fn add_failed(&mut self, state: State) {
        self.state.addresses.extend(state.addresses);
        self.state.neighbours.extend(state.neighbours);
        self.state.routes.extend(state.routes);
        self.state.rules.extend(state.rules);
        // Interfaces and parameters are seen to again.
        self.state.interfaces.clear();
        self.state.sysctl.clear();
    }
}

impl Network {
    /// One whose interfaces are plugged into `slots`.
    pub fn new(slots: Box<dyn Slots>) -> Self {
        Self { slots, applied: Mutex::default() }
    }

    /// Makes a network namespace what `state` says.
    pub async fn sync(&self, state: State, namespace: &OwnedFd, reaper: &Reaper) -> StepResult<()> {
        let mut applied = self.applied.lock().await;
        let change = Change { slots: &*self.slots, wanted: &state, applied: &applied };
        let apply = || change.apply(namespace.as_fd()).map(|()| Outcome::default());
        let done = helper::run_keeping(reaper, "set up the network", &[namespace.as_raw_fd()], apply).await;
        match done {
            Ok(_) => *applied = Applied { state, once: true },
            Err(_) => applied.add_failed(state),
        }
        done.map(drop)
    }
}

/// In the child: from what is there to what is wanted.
struct Change<'a> {
    slots: &'a dyn Slots,
    wanted: &'a State,
    applied: &'a Applied,
}

impl Change<'_> {
    fn apply(&self, namespace: BorrowedFd<'_>) -> StepResult<()> {
        let open = || Socket::open().step(|| "open a netlink socket");
        let outside = open()?;
        setns(namespace, CloneFlags::CLONE_NEWNET).step(|| "enter the sandbox's network namespace")?;
        let inside = open()?;
        let was = &self.applied.state;

        let placed = self.place_interfaces(&outside, &inside, namespace)?;
        let there = Interfaces::read(&inside, &placed.indexes)?;
        let is_new = |slot: &u32| placed.moved.contains(slot) || !was.interfaces.contains_key(slot);
        let new: BTreeSet<u32> = self
            .wanted
            .interfaces
            .keys()
            .filter(|slot| is_new(slot))
            .filter_map(|&slot| there.index(slot))
            .collect();
        let changed: Vec<_> = self
            .wanted
            .interfaces
            .iter()
            .filter(|(slot, wanted)| is_new(slot) || was.interfaces.get(slot) != Some(wanted))
            .map(|(&slot, wanted)| Ok((wanted, there.in_slot(slot)?)))
            .collect::<StepResult<_>>()?;
        for (wanted, link) in &changed {
            wanted.apply(&inside, link)?;
        }
        let (last, first): (Vec<_>, Vec<_>) =
            self.wanted.sysctl.iter().partition(|(path, _)| path.ends_with(ADDR_GEN_MODE));
        self.set_parameters(&first)?;

        let before = present::<Route>(&inside, &there)?;
        without_generated(new.iter().filter_map(|&index| there.name(index)), || {
            changed.iter().try_for_each(|(wanted, link)| wanted.apply_state(&inside, link))?;
            let (wanted, applied) = placed_lists(&self.wanted.addresses, &was.addresses, &there);
            reconcile(&inside, &there, &wanted, |found| {
                applied.contains(found) || new.contains(&found.interface)
            })
        })?;
        self.set_parameters(&last)?;

        let (wanted, applied) = placed_lists(&self.wanted.neighbours, &was.neighbours, &there);
        reconcile(&inside, &there, &wanted, |found| {
            applied.contains(found) || new.contains(&found.interface)
        })?;

        let (wanted, applied) = placed_lists(&self.wanted.routes, &was.routes, &there);
        let ours: BTreeSet<u32> = placed.indexes.values().copied().collect();
        let is_on = |found: &Route, interfaces: &BTreeSet<u32>| {
            found.hops.iter().any(|hop| interfaces.contains(&hop.interface))
        };
        reconcile(&inside, &there, &wanted, |found| {
            // What an address brought along that has just come.
            let brought =
                || found.protocol == libc::RTPROT_KERNEL && !before.contains(found) && is_on(found, &ours);
            !found.is_the_kernels() && (applied.contains(found) || is_on(found, &new) || brought())
        })?;

        let (wanted, applied) = placed_lists(&self.wanted.rules, &was.rules, &there);
        reconcile(&inside, &there, &wanted, |found: &Rule| {
            // The host has none of a family it does not know.
            let is_known = wanted.iter().any(|rule| rule.is_ipv6() == found.is_ipv6());
            is_known && (applied.contains(found) || !self.applied.once)
        })
    }

    /// Lets go of the interfaces that are no longer wanted, and brings the others
    /// into the namespace under their names.
    fn place_interfaces(
        &self,
        outside: &Socket,
        inside: &Socket,
        namespace: BorrowedFd<'_>,
    ) -> StepResult<Placed> {
        let wanted = &self.wanted.interfaces;
        let slots: Vec<u32> = wanted.keys().copied().collect();
        self.slots.keep_only(&slots)?;

        let (there, mut plugged) = (links(inside)?, links(outside)?);
        let is_known = |slot: u32, plugged: &[Link]| -> StepResult<bool> {
            Ok(self.slots.find(slot, &there)?.is_some() || self.slots.find(slot, plugged)?.is_some())
        };
        for &slot in &slots {
            if !is_known(slot, &plugged)? {
                self.slots.scan()?;
                plugged = links(outside)?;
                break;
            }
        }

        // Two that change names could be in each other's way.
        let mut to_rename = Vec::new();
        for (&slot, wanted) in wanted {
            if let Some(link) = self.slots.find(slot, &there)?
                && link.name != wanted.name
            {
                interfaces::rename(inside, link, &format!("rvm{slot}"))?;
                to_rename.push((link, wanted));
            }
        }
        for (link, wanted) in to_rename {
            interfaces::rename(inside, link, &wanted.name)?;
        }
        let mut moved = BTreeSet::new();
        for (&slot, wanted) in wanted {
            if self.slots.find(slot, &there)?.is_some() {
                continue;
            }
            let link = self.slots.find(slot, &plugged)?.ok_or_else(|| {
                let name = &wanted.name;
                StepError::Refused(format!(
                    "interface {name}: slot {slot}: no network interface is in this PCI slot"
                ))
            })?;
            let is_free = there.iter().all(|other| other.index != wanted.index);
            let index = if is_free { wanted.index } else { 0 };
            interfaces::move_to(outside, link, namespace.as_raw_fd(), &wanted.name, index)?;
            moved.insert(slot);
        }

        let there = links(inside)?;
        let mut indexes = BTreeMap::new();
        for slot in slots {
            indexes.extend(self.slots.find(slot, &there)?.map(|link| (slot, link.index)));
        }
        Ok(Placed { indexes, moved })
    }

    /// Sets kernel parameters that were not set to the same before.
    fn set_parameters(&self, parameters: &[&(String, String)]) -> StepResult<()> {
        let applied = &self.applied.state.sysctl;
        for (path, value) in parameters.iter().filter(|parameter| !applied.contains(parameter)) {
            let file = Path::new(PROC_SYS_NET).join(path);
            let present = match fs::read_to_string(&file) {
                // The guest's kernel may have fewer, and some can only be written.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(_) => None,
                Ok(present) => Some(present),
            };
            let same = |present: String| present.split_whitespace().eq(value.split_whitespace());
            if !present.is_some_and(same) {
                fs::write(&file, value).step(|| format!("sysctl {path:?}: set it to {value:?}"))?;
            }
        }
        Ok(())
    }
}

/// Interfaces in their place.
struct Placed {
    /// Their numbers, by slot.
    indexes: BTreeMap<u32, u32>,
    /// Slots of those that have just come.
    moved: BTreeSet<u32>,
}

/// What is wanted and what was applied before, as the kernel tells it.
fn placed_lists<T: Object>(wanted: &[T], applied: &[T], there: &Interfaces) -> (Vec<T>, Vec<T>) {
    let place = |objects: &[T]| objects.iter().filter_map(|object| object.placed(there)).collect();
    (place(wanted), place(applied))
}

/// Does something while interfaces get no link-local address of the kernel's own:
/// the host's has one already, which would be asked for and waited for anew.
fn without_generated<'a>(
    names: impl Iterator<Item = &'a str>,
    work: impl FnOnce() -> StepResult<()>,
) -> StepResult<()> {
    let mut before = Vec::new();
    for name in names {
        let file: PathBuf = [PROC_SYS_NET, "ipv6/conf", name, ADDR_GEN_MODE].iter().collect();
        // A kernel without IPv6 has none.
        let Ok(value) = fs::read_to_string(&file) else { continue };
        fs::write(&file, GENERATE_NONE).step(|| format!("write {GENERATE_NONE} to {file:?}"))?;
        before.push((file, value));
    }
    let done = work();
    for (file, value) in before {
        fs::write(&file, value.trim_end()).step(|| format!("write {value:?} to {file:?}"))?;
    }
    done
}
