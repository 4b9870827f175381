//! Loading Linux: kernel, initramfs and the parameters the kernel starts from.
//!
//! The kernel is entered at its 64-bit entry point (Linux boot protocol,
//! "64-bit boot protocol"), see `docs/decisions/0301-direct-64-bit-entry.md`.

pub mod elf;
pub mod initramfs;
pub mod kernel;
pub mod params;
