//! Writes the busybox image, for trying it out by hand:
//! `cargo run -p rootfs-builder --example busybox-image -- BUSYBOX OUT.tar`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use rootfs_builder::{image::Image, layer};

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (busybox, out) =
        arguments.next().zip(arguments.next()).context("usage: busybox-image BUSYBOX OUT.tar")?;
    let image = Image::new("docker.io/library/busybox:latest", vec![layer::busybox(&busybox)?])?;
    std::fs::write(&out, image.archive()?).with_context(|| format!("write {}", out.display()))
}
