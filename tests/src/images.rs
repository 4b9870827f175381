//! The image files that are made in place of layers.

use std::{path::PathBuf, time::Instant};

use anyhow::{Result, ensure};

use crate::{scale, world::World};

/// Those in containerd's snapshots that are whole.
///
/// # Errors
/// When containerd's root cannot be read.
pub fn files(world: &World) -> Result<Vec<PathBuf>> {
    world.in_snapshots(|name| name.starts_with("rvm-image-") && !name.contains('.'))
}

/// Waits until there are so many.
///
/// # Errors
/// When there are not after as long as a container may take.
pub fn wait_for(world: &World, count: usize) -> Result<Vec<PathBuf>> {
    let until = Instant::now() + scale::container();
    loop {
        let files = files(world)?;
        if files.len() == count {
            return Ok(files);
        }
        ensure!(Instant::now() < until, "not {count} images: {files:?}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// Has one made of an image's layers, which a container's first start does; `count` of them are there then.
///
/// # Errors
/// When the container fails or nothing is made of its image.
pub fn make_of(world: &World, image: &str, count: usize) -> Result<()> {
    world.ctr().container("first").with_image(image).run(&["true"])?.success()?;
    wait_for(world, count).map(drop)
}
