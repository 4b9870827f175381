//! The host's pool of huge pages of 2 MiB (`vm.nr_hugepages`), of which pods get theirs.

use std::fs;

/// Bytes of one.
pub const BYTES: u64 = 2 << 20;
const DIR: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// What there is of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    /// Pages in it.
    pub total: u64,
    /// Those that nobody has, and that are promised to nobody.
    pub free: u64,
}

impl Pool {
    /// This host's, as it is now; nothing where the kernel has none.
    pub fn read() -> Self {
        let file = |name: &str| fs::read_to_string(format!("{DIR}/{name}")).ok()?.trim().parse::<u64>().ok();
        let pages = |name| file(name).unwrap_or_default();
        let total = pages("nr_hugepages");
        match total {
            0 => Self::default(),
            _ => Self { total, free: pages("free_hugepages").saturating_sub(pages("resv_hugepages")) },
        }
    }
}
