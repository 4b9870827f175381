//! The machine the guest sees: addresses, CPUs, tables.

pub mod cpuid;
pub mod lapic;
pub mod layout;
pub mod mptable;
pub mod msr;
pub mod registers;
pub mod vendor;
