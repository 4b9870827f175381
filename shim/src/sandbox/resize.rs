//! The machine's size while it runs: it grows with what its containers claim, and
//! shrinks with it (docs/decisions/0621).

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rvm_protocol::agent::Resources;
use tokio::time::sleep;

use super::{Claim, Ledger, Room, Sandbox, SandboxError, Size};
use crate::{
    agent::AgentError,
    background::off_thread,
    cgroup::{Ceiling, CgroupError},
    huge_pages::{self, Pool},
    vmm::MonitorError,
};

/// How often, and in which intervals, it is looked whether the guest has given
/// back what it said it would.
const LOOKS: u32 = 10;
const MOMENT: Duration = Duration::from_millis(10);
/// MiB of a huge page.
const HUGE_PAGE_MIB: u64 = huge_pages::BYTES >> 20;

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

/// How large the machine is, and whether it is being changed.
pub(super) struct Sizing {
    /// Memory it started with and may come to have.
    room: Room,
    /// vCPUs it may come to have.
    max_vcpus: u8,
    now: Mutex<Now>,
    ledger: Mutex<Ledger>,
    /// Held while it changes.
    changing: tokio::sync::Mutex<()>,
}

#[derive(Clone, Copy, Debug)]
struct Now {
    /// vCPUs the guest uses.
    vcpus: u8,
    /// MiB the guest should have plugged in.
    wanted_mib: u64,
    /// MiB it has plugged in, or at least once had and did not give back.
    plugged_mib: u64,
    /// Whether the host holds the machine to a ceiling.
    ceiling: bool,
    /// Whether its quota of processor time is yet to be set.
    quota_lifted: bool,
    /// Huge pages it was offered, and those of the host's that it has.
    wanted_huge_pages: u64,
    huge_pages: u64,
}

impl Sizing {
    /// Of a machine that has just been started with `vcpus`, for what is in
    /// `ledger`, and is held to `total` by the host, but for its quota of processor time.
    pub(super) fn new(room: Room, size: Size, max_vcpus: u8, ledger: Ledger, total: &Resources) -> Self {
        let now = Now {
            vcpus: size.vcpus,
            wanted_mib: 0,
            plugged_mib: 0,
            ceiling: is_limited(total),
            quota_lifted: total.cpu_quota_us.is_some_and(|quota| quota > 0),
            wanted_huge_pages: 0,
            huge_pages: 0,
        };
        let (now, ledger) = (Mutex::new(now), Mutex::new(ledger));
        Self { room, max_vcpus, now, ledger, changing: tokio::sync::Mutex::default() }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn memory_mib(&self) -> u64 {
        self.room.boot_mib + self.now().plugged_mib
    }

    /// MiB to plug in for what is claimed now; as much as there can be where that
    /// is more.
    fn target(&self) -> u64 {
        let needed = self.ledger().size().memory_mib;
        self.room.plugged_for(needed).unwrap_or(self.room.hotplug_mib)
    }
}

/// Whether the host has to hold a machine for `resources` to a ceiling.
fn is_limited(resources: &Resources) -> bool {
    resources.memory_max.is_some_and(|limit| limit > 0)
}

impl Sandbox {
    /// What the machine has.
    pub fn size(&self) -> Size {
        let vcpus = self.sizing.now().vcpus;
        Size { vcpus, memory_mib: self.sizing.memory_mib() }
    }

    /// The guest's CPUs that stand for a container's list of the host's.
    pub fn guest_cpus(&self, list: &str) -> String {
        let vcpus = self.sizing.now().vcpus;
        self.sizing.ledger().guest_cpus(list, vcpus)
    }

    /// Has the host hold the machine to its quota of processor time, which was lifted for its start.
    pub async fn hold_to_quota(&self) -> Result<(), SandboxError> {
        if !self.sizing.now().quota_lifted {
            return Ok(());
        }
        let _changing = self.sizing.changing.lock().await;
        Ok(self.tell_host().await?)
    }

    /// Makes the machine large enough for a container that comes. One the machine
    /// was started for finds it so. On an error it is as it was.
    pub(super) async fn admit(&self, container: &str, claim: Claim) -> Result<(), SandboxError> {
        let _changing = self.sizing.changing.lock().await;
        if self.sizing.ledger().claim(container).is_some() {
            // The machine was made for it, and has the host's huge pages yet to get.
            return self.grow_huge_pages().await;
        }
        let limit = claim.memory_limit();
        self.sizing.ledger().set(container, claim);
        let result = match self.grow(limit).await {
            Ok(()) => Ok(self.tell_host().await?),
            Err(error) => Err(error),
        };
        if result.is_err() {
            self.sizing.ledger().remove(container);
            self.settle().await;
        }
        result
    }

    /// Strikes a container off that has gone. The machine gets smaller behind the
    /// caller's back: the guest frees memory at its own pace.
    pub(super) fn release(self: &Arc<Self>, container: &str) {
        let known = self.sizing.ledger().claim(container).is_some();
        self.sizing.ledger().remove(container);
        if !known {
            return;
        }
        let sandbox = self.clone();
        tokio::spawn(async move {
            let _changing = sandbox.sizing.changing.lock().await;
            if sandbox.is_closed() {
                return;
            }
            sandbox.settle().await;
            if let Err(error) = sandbox.tell_host().await {
                log::warn!("the ceiling stays: {error}");
            }
        });
    }

    /// Makes the machine large enough for what a container's limits will be with
    /// `changed`; [`Sandbox::update_done`] must follow. On an error it is as it was.
    pub async fn update_begun(&self, container: &str, changed: &Resources) -> Result<Update, SandboxError> {
        let _changing = self.sizing.changing.lock().await;
        let before = self.sizing.ledger().claim(container).cloned();
        if let Some(before) = &before {
            self.sizing.ledger().set(container, before.with(changed));
        }
        let limit = changed.memory_max.and_then(|limit| u64::try_from(limit).ok()).filter(|limit| *limit > 0);
        let room = self.sizing.room;
        let fits = room.plugged_for(self.sizing.ledger().wanted_memory_mib()).is_some();
        let grown = match limit {
            Some(limit) if !fits => Err(SandboxError::NoRoom {
                limit,
                boot_mib: room.boot_mib,
                most_mib: room.boot_mib + room.hotplug_mib,
            }),
            limit => self.grow(limit).await,
        };
        let update = Update { container: container.to_owned(), before };
        match grown {
            Ok(()) => Ok(update),
            Err(error) => {
                self.undo(update);
                self.settle().await;
                Err(error)
            }
        }
    }

    /// Ends an update: the container has its new limits, or where not `done` still
    /// the old ones.
    pub async fn update_done(&self, update: Update, done: bool) -> Result<(), SandboxError> {
        let _changing = self.sizing.changing.lock().await;
        if !done {
            self.undo(update);
        }
        self.settle().await;
        Ok(self.tell_host().await?)
    }

    /// Enters again what a container claimed, unless it has been deleted meanwhile.
    fn undo(&self, Update { container, before }: Update) {
        let mut ledger = self.sizing.ledger();
        if let Some(before) = before
            && ledger.claim(&container).is_some()
        {
            ledger.set(&container, before);
        }
    }

    /// Makes the machine as large as the ledger says, where it is smaller.
    async fn grow(&self, limit: Option<u64>) -> Result<(), SandboxError> {
        let target = self.sizing.target();
        let before = *self.sizing.now();
        if target > before.wanted_mib.min(before.plugged_mib) {
            let grown = self.grow_memory(target, before).await;
            grown.map_err(|source| SandboxError::Grow { limit: limit.unwrap_or_default(), source })?;
        }
        self.grow_huge_pages().await?;
        let vcpus = self.sizing.ledger().size().vcpus.max(before.vcpus);
        self.set_vcpus(vcpus).await
    }

    async fn grow_memory(&self, target_mib: u64, before: Now) -> Result<(), GrowError> {
        if before.ceiling {
            let memory_mib = self.sizing.room.boot_mib + target_mib.max(before.plugged_mib);
            self.set_ceiling(Ceiling::memory(memory_mib)).await?;
        }
        self.sizing.now().wanted_mib = target_mib;
        self.machine.offer_memory(target_mib).await?;
        let got_mib = self.wait_memory(target_mib).await?;
        if got_mib < target_mib {
            return Err(GrowError::Short { got_mib, wanted_mib: target_mib });
        }
        self.note_plugged(target_mib.max(before.plugged_mib));
        Ok(())
    }

    /// Waits until so much memory is plugged in, its huge pages apart, or no more can be;
    /// returns how much is. In MiB.
    async fn wait_memory(&self, target_mib: u64) -> Result<u64, GrowError> {
        let huge_mib = self.sizing.now().huge_pages * HUGE_PAGE_MIB;
        let got = self.machine.agent().wait_memory((target_mib + huge_mib) << 20).await?;
        Ok((got >> 20).saturating_sub(huge_mib))
    }

    /// Gives the machine as many of the host's huge pages as the ledger says, where it has fewer.
    pub(super) async fn grow_huge_pages(&self) -> Result<(), SandboxError> {
        let wanted = self.sizing.ledger().huge_pages();
        let before = *self.sizing.now();
        if wanted <= before.wanted_huge_pages.min(before.huge_pages) {
            return Ok(());
        }
        let Pool { total, free } = Pool::read();
        let missing = wanted.saturating_sub(before.huge_pages);
        let most = self.sizing.room.hugetlb_mib / HUGE_PAGE_MIB;
        if missing > free || wanted > most {
            return Err(SandboxError::NoHugePages { missing, free, total, most });
        }
        let grown = async {
            self.set_ceiling(Ceiling::default().with_huge_pages(wanted.max(before.huge_pages))).await?;
            self.sizing.now().wanted_huge_pages = wanted;
            self.machine.offer_hugetlb(wanted * HUGE_PAGE_MIB).await?;
            let all_mib = before.plugged_mib + wanted.max(before.huge_pages) * HUGE_PAGE_MIB;
            self.machine.agent().wait_memory(all_mib << 20).await?;
            // What counts is what the host has given.
            let got = self.machine.hugetlb_bytes().await? / huge_pages::BYTES;
            self.sizing.now().huge_pages = got;
            let ready = if got < wanted { got } else { self.machine.agent().set_huge_pages(wanted).await? };
            match ready < wanted {
                false => Ok(()),
                true => Err(GrowError::Short {
                    got_mib: ready.saturating_mul(HUGE_PAGE_MIB),
                    wanted_mib: wanted * HUGE_PAGE_MIB,
                }),
            }
        };
        grown.await.map_err(|source| SandboxError::HugePages { wanted, source })
    }

    /// The other way round. Pages in use, as by a file in a volume that others still have, stay.
    async fn shrink_huge_pages(&self) {
        let wanted = self.sizing.ledger().huge_pages();
        let now = *self.sizing.now();
        if wanted >= now.wanted_huge_pages.max(now.huge_pages) {
            return;
        }
        let shrunk = async {
            self.machine.agent().set_huge_pages(wanted).await?;
            self.machine.offer_hugetlb(wanted * HUGE_PAGE_MIB).await?;
            self.sizing.now().wanted_huge_pages = wanted;
            let all =
                self.machine.agent().wait_memory((now.plugged_mib + wanted * HUGE_PAGE_MIB) << 20).await?;
            let said = all.saturating_sub(now.plugged_mib << 20).max(wanted * huge_pages::BYTES);
            given_back(said, || self.machine.hugetlb_bytes()).await
        };
        match shrunk.await {
            Ok(plugged) => {
                let pages = plugged.div_ceil(huge_pages::BYTES);
                self.sizing.now().huge_pages = pages;
                if pages > wanted {
                    log::info!("the guest keeps {pages}, not {wanted}, of the host's huge pages");
                }
            }
            Err(error) => log::warn!("the machine's huge pages stay as they are: {error}"),
        }
    }

    /// Has the guest use so many CPUs, or as many as there can be.
    async fn set_vcpus(&self, vcpus: u8) -> Result<(), SandboxError> {
        let vcpus = vcpus.min(self.sizing.max_vcpus);
        let before = self.sizing.now().vcpus;
        if vcpus == before {
            return Ok(());
        }
        let changed = async {
            if vcpus > before {
                self.machine.set_vcpus(vcpus).await?;
            }
            Ok::<u32, GrowError>(self.machine.agent().online_cpus(vcpus).await?)
        };
        let online = changed.await.map_err(|source| SandboxError::Vcpus { vcpus, source })?;
        // The guest is not trusted with more than it was given.
        let online = u8::try_from(online).unwrap_or(vcpus).clamp(1, vcpus.max(before));
        self.sizing.now().vcpus = online;
        self.record(|state| state.vcpus = online);
        if online < vcpus {
            log::warn!("the guest uses {online} CPUs, not {vcpus}");
        }
        Ok(())
    }

    /// Makes the machine as large as the ledger says, where it is larger and as
    /// far as the guest can free memory.
    async fn settle(&self) {
        self.shrink_huge_pages().await;
        let target = self.sizing.target();
        let now = *self.sizing.now();
        if target < now.wanted_mib.max(now.plugged_mib) {
            self.shrink_memory(target).await;
        }
        let vcpus = self.sizing.ledger().size().vcpus;
        if vcpus < now.vcpus
            && let Err(error) = self.set_vcpus(vcpus).await
        {
            log::warn!("the machine keeps its CPUs: {error}");
        }
    }

    /// The guest keeps what it cannot free; so does the ceiling, which would
    /// otherwise kill the machine.
    async fn shrink_memory(&self, target_mib: u64) {
        let shrunk = async {
            self.machine.offer_memory(target_mib).await?;
            self.sizing.now().wanted_mib = target_mib;
            let said = self.wait_memory(target_mib).await?.max(target_mib) << 20;
            let plugged = given_back(said, || self.machine.plugged_bytes()).await?;
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
                let ceiling = self.sizing.now().ceiling;
                let memory_mib = self.sizing.memory_mib();
                if ceiling && let Err(error) = self.set_ceiling(Ceiling::memory(memory_mib)).await {
                    log::warn!("the ceiling stays: {error}");
                }
            }
            Err(error) => log::warn!("the machine's memory stays as it is: {error}"),
        }
    }

    fn note_plugged(&self, plugged_mib: u64) {
        self.sizing.now().plugged_mib = plugged_mib;
        let memory_mib = self.sizing.memory_mib();
        self.record(|state| state.memory_mib = memory_mib);
    }

    /// Has the host hold the machine to what the ledger comes to.
    async fn tell_host(&self) -> Result<(), CgroupError> {
        let total = self.sizing.ledger().total();
        let limits = Ceiling::of(&total, self.sizing.memory_mib());
        let has = self.sizing.now().huge_pages;
        let limits = {
            let ledger = self.sizing.ledger();
            ceiling(&ledger, limits, ledger.huge_pages().max(has))
        };
        self.set_ceiling(limits).await?;
        let mut now = self.sizing.now();
        now.ceiling |= is_limited(&total);
        now.quota_lifted = false;
        Ok(())
    }

    /// On another thread: the kernel may have to make room first.
    async fn set_ceiling(&self, ceiling: Ceiling) -> Result<(), CgroupError> {
        let cgroup = self.owned().as_ref().map(|owned| owned.cgroup.clone());
        let Some(cgroup) = cgroup else { return Ok(()) };
        off_thread(move || cgroup.update(&ceiling)).await
    }
}

/// `limits`, and for so many huge pages where the host has any: else nobody is asked.
pub(super) fn ceiling(ledger: &Ledger, limits: Ceiling, huge_pages: u64) -> Ceiling {
    if ledger.host_has_huge_pages() { limits.with_huge_pages(huge_pages) } else { limits }
}

/// Bytes that are `plugged`, once the guest has given back what it says it has. It stops using
/// a block a moment before.
async fn given_back<F: Future<Output = Result<u64, MonitorError>>>(
    said: u64,
    plugged: impl Fn() -> F,
) -> Result<u64, GrowError> {
    let mut now = plugged().await?;
    for _ in 0..LOOKS {
        if now <= said {
            break;
        }
        sleep(MOMENT).await;
        now = plugged().await?;
    }
    Ok(now)
}

/// A container's limits that are being changed.
#[derive(Debug)]
#[must_use]
pub struct Update {
    container: String,
    /// None where it had been deleted already.
    before: Option<Claim>,
}
