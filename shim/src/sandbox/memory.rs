//! The machine's memory while it runs: it grows with its container's limit and
//! shrinks with it (docs/decisions/0621).

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rvm_protocol::agent::Resources;
use tokio::time::sleep;

use super::{Room, Sandbox, SandboxError, Size};
use crate::{
    agent::AgentError,
    cgroup::{Ceiling, CgroupError},
    vmm::{self, MonitorError},
};

/// How often, and in which intervals, it is looked whether the guest has given
/// back what it said it would.
const LOOKS: u32 = 10;
const MOMENT: Duration = Duration::from_millis(10);

/// Why the machine did not grow.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// The host's ceiling.
    #[error(transparent)]
    Ceiling(#[from] CgroupError),
    /// The monitor.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The guest did not plug it all in.
    #[error("the guest has taken {got_mib} MiB of {wanted_mib} MiB")]
    Short {
        /// What it took.
        got_mib: u64,
        /// What it was offered.
        wanted_mib: u64,
    },
}

/// What is known of the machine's memory.
#[derive(Debug)]
pub(super) struct Memory {
    /// What it started with and may become.
    room: Room,
    now: Mutex<Now>,
    /// Held while it changes.
    changing: tokio::sync::Mutex<()>,
}

#[derive(Clone, Copy, Debug)]
struct Now {
    /// MiB the guest should have plugged in.
    wanted_mib: u64,
    /// MiB it has plugged in, or at least once had and did not give back.
    plugged_mib: u64,
    /// Whether the host holds the machine to a ceiling.
    ceiling: bool,
}

impl Memory {
    /// Of a machine that has just been started for `resources`.
    pub(super) fn new(room: Room, resources: &Resources) -> Self {
        let now = Now { wanted_mib: 0, plugged_mib: 0, ceiling: is_limited(resources) };
        Self { room, now: Mutex::new(now), changing: tokio::sync::Mutex::default() }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mib(&self) -> u64 {
        self.room.boot_mib + self.now().plugged_mib
    }
}

/// Whether the host has to hold a machine for `resources` to a ceiling.
fn is_limited(resources: &Resources) -> bool {
    resources.memory_max.is_some_and(|limit| limit > 0)
}

impl Sandbox {
    /// What the machine has.
    pub fn size(&self) -> Size {
        Size { vcpus: self.vcpus, memory_mib: self.memory.mib() }
    }

    /// Makes the machine large enough for a container that may use `limit` bytes;
    /// no limit (negative) asks for nothing. On an error it is as it was.
    pub async fn make_room(&self, limit: i64) -> Result<(), SandboxError> {
        if limit < 0 {
            return Ok(());
        }
        let _changing = self.memory.changing.lock().await;
        let room = self.memory.room;
        let target = room.plugged_for(limit).ok_or(SandboxError::NoRoom {
            limit,
            boot_mib: room.boot_mib,
            most_mib: room.boot_mib + room.hotplug_mib,
        })?;
        let before = *self.memory.now();
        if target <= before.wanted_mib.min(before.plugged_mib) {
            return Ok(());
        }
        let grown = self.grow(target, before).await;
        if grown.is_err() {
            self.shrink(before.wanted_mib).await;
        }
        grown.map_err(|source| SandboxError::Grow { limit, source })
    }

    async fn grow(&self, target_mib: u64, before: Now) -> Result<(), GrowError> {
        if before.ceiling {
            self.set_memory_ceiling(self.memory.room.boot_mib + target_mib.max(before.plugged_mib))?;
        }
        self.memory.now().wanted_mib = target_mib;
        vmm::set_hotplug_memory(&self.dir, target_mib).await?;
        let got_mib = self.agent.wait_memory(target_mib << 20).await? >> 20;
        if got_mib < target_mib {
            return Err(GrowError::Short { got_mib, wanted_mib: target_mib });
        }
        self.note_plugged(target_mib.max(before.plugged_mib));
        Ok(())
    }

    /// Makes the machine as small as it may be for a container that may use
    /// `limit` bytes, as far as the guest can free memory.
    pub async fn give_back(&self, limit: i64) {
        let _changing = self.memory.changing.lock().await;
        let Some(target) = self.memory.room.plugged_for(limit) else { return };
        let now = *self.memory.now();
        if target < now.wanted_mib.max(now.plugged_mib) {
            self.shrink(target).await;
        }
    }

    /// MiB the guest should have beside what it started with, for
    /// [`Sandbox::return_to`].
    pub fn wanted_memory(&self) -> u64 {
        self.memory.now().wanted_mib
    }

    /// Undoes a [`Sandbox::make_room`] that was for nothing.
    pub async fn return_to(&self, wanted_mib: u64) {
        let _changing = self.memory.changing.lock().await;
        if wanted_mib < self.wanted_memory() {
            self.shrink(wanted_mib).await;
        }
    }

    /// The guest keeps what it cannot free; so does the ceiling, which would
    /// otherwise kill the machine.
    async fn shrink(&self, target_mib: u64) {
        let shrunk = async {
            vmm::set_hotplug_memory(&self.dir, target_mib).await?;
            self.memory.now().wanted_mib = target_mib;
            let said = self.agent.wait_memory(target_mib << 20).await?.max(target_mib << 20);
            // What counts is what the guest has given back. It stops using a
            // block a moment before, and says so.
            let mut plugged = vmm::metrics(&self.dir).await?.memory_plugged_bytes;
            for _ in 0..LOOKS {
                if plugged <= said {
                    break;
                }
                sleep(MOMENT).await;
                plugged = vmm::metrics(&self.dir).await?.memory_plugged_bytes;
            }
            Ok::<u64, GrowError>(plugged.div_ceil(1 << 20))
        };
        match shrunk.await {
            Ok(plugged_mib) => {
                if plugged_mib > target_mib {
                    log::info!(
                        "the guest keeps {plugged_mib} MiB, not {target_mib} MiB, of memory plugged in"
                    );
                }
                self.note_plugged(plugged_mib.max(target_mib));
                let ceiling = self.memory.now().ceiling;
                if ceiling && let Err(error) = self.set_memory_ceiling(self.memory.mib()) {
                    log::warn!("the ceiling stays: {error}");
                }
            }
            Err(error) => log::warn!("the machine's memory stays as it is: {error}"),
        }
    }

    fn note_plugged(&self, plugged_mib: u64) {
        self.memory.now().plugged_mib = plugged_mib;
        if let Some(owned) = self.owned().as_mut() {
            owned.state.memory_mib = self.memory.mib();
            owned.save();
        }
    }

    fn set_memory_ceiling(&self, memory_mib: u64) -> Result<(), CgroupError> {
        self.set_ceiling(&Ceiling::memory(memory_mib))
    }

    /// Holds the machine to other limits on the host; what `resources` leaves
    /// out stays.
    pub fn update_ceiling(&self, resources: &Resources) -> Result<(), CgroupError> {
        self.set_ceiling(&Ceiling::of(resources, self.memory.mib()))?;
        self.memory.now().ceiling |= is_limited(resources);
        Ok(())
    }

    fn set_ceiling(&self, ceiling: &Ceiling) -> Result<(), CgroupError> {
        self.owned().as_ref().map_or(Ok(()), |owned| owned.cgroup.update(ceiling))
    }
}
