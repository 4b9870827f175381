//! Every file of a root file system, whatever it is made of.

use anyhow::{Result, ensure};
use rvm_tests::{ctr::Run, host, images, job::Input, parity::probe_at, scale, world::World};

use super::{IMAGE, case, timed};
use crate::{images::LOWER, rootfs};

const LAYERS: &str = "example.org/layers:all";

/// A container that tells of each of its files. The program is on a file system of its own, which it passes by.
fn walk(run: Run) -> Result<Vec<String>> {
    let mount = probe_at("/run/probe")?;
    let job = run.with(&["--mount", &mount]).start(&["/run/probe", "walk"], Input::Nothing)?;
    let walked = job.finish(scale::container() * 10)?.success()?;
    // Runtimes make the places of mounts in the root directory, where they are not there.
    Ok(walked.text().lines().filter(|line| !line.starts_with("\"\" ")).map(str::to_owned).collect())
}

fn compare(root: &str, expected: &[String], found: &[String]) -> Result<()> {
    let different: Vec<_> = expected.iter().zip(found).filter(|(a, b)| a != b).take(5).collect();
    ensure!(
        expected == found && !expected.is_empty(),
        "{root}: {} and {} files, of which {different:#?}",
        expected.len(),
        found.len()
    );
    println!("{root}: {} files, all the same", found.len());
    Ok(())
}

/// Beside runc's: layers that are shared, and the image file made of them, as memory and as a disk.
fn all(world: &World, image: &str) -> Result<()> {
    for file in images::files(world)? {
        std::fs::remove_file(file)?;
    }
    let run = || world.ctr().container("walk").with_image(image);
    let runc = timed("under runc", || walk(run_under_runc(world, image)))?;
    host::remove_runcs_parent();
    world.set_config(&world.config().set("images", "enabled", "false"))?;
    let shared = timed("layers that are shared", || walk(run()))?;
    compare("layers", &runc, &shared)?;
    let with_images = || world.config().with_images();
    world.set_config(&with_images())?;
    run().run(&["true"])?.success()?;
    let files = images::wait_for(world, 1)?;
    for (root, limit, memories) in [("memory", "2048", "1\n"), ("disk", "1", "0\n")] {
        world.set_config(&with_images().set("images", "memory_limit_mib", limit))?;
        let lower = run().shell(&format!("{LOWER}; ls /sys/block | grep -c pmem || true"))?.success()?.text();
        ensure!(lower.starts_with("/run/rvm/images/img-") && lower.ends_with(memories), "{root}: {lower}");
        let found = timed(root, || walk(run()))?;
        compare(root, &runc, &found)?;
    }
    files.iter().try_for_each(std::fs::remove_file)?;
    Ok(())
}

fn run_under_runc(world: &World, image: &str) -> Run {
    world.ctr().under("io.containerd.runc.v2").container("walk").with_image(image)
}

#[test]
fn every_file_is_as_under_runc() {
    case(|world| {
        if !world.stage().is_rvm() {
            return Ok(());
        }
        all(world, IMAGE)?;
        rootfs::import(world, LAYERS, rootfs::special_layers(), 100)?;
        let result = all(world, LAYERS);
        rootfs::remove(world, LAYERS)?;
        result
    });
}
