//! What the project boots and runs without any registry: the guest's
//! initramfs and small OCI images made from Debian's packages.

pub mod bootstrap;
pub mod cpio;
pub mod debian;
pub mod image;
pub mod initramfs;
pub mod layer;
pub mod split;
