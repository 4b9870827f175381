//! Builds what the other tasks need: binaries, guest kernel, initramfs, images.
