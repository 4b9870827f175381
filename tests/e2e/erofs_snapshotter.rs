//! containerd's EROFS snapshotter (2.1 and later), beside runc; and, of every release's shim, the mounts that
//! containerd 2.2 and later sends for it.

mod mounts;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rootfs_builder::{
    image::Image,
    layer::{self, Layer},
};
use rvm_tests::{
    case_with,
    cri::{Cri, Pod},
    ctr::Run,
    host, job, scale, tree,
    world::World,
    world::shell,
};

const NAME: &str = "example.org/erofs:5";
const ONE: &str = "example.org/erofs:1";
const RUNC: &str = "io.containerd.runc.v2";
const WITH: [&str; 2] = ["--snapshotter", "erofs"];

/// All of the image but what the runtimes put there.
pub(crate) const WALK: &str = "cd /; for f in $(find bin data etc home root tmp usr var 2>/dev/null | sort); do \
                    [ -d $f ] && [ ! -L $f ] && stat -c '%n %f %u %g %y' $f || stat -c '%n %f %h %u %g %s %t:%T %y' $f; \
                    [ -L $f ] && readlink $f; [ -f $f ] && [ $(stat -c %h $f) = 1 ] && sha256sum $f; done; \
                    sha256sum bin/busybox";

/// The file systems that a container's root lies on, as it sees them.
const LOWER: &str = "sed -n 's/.* overlay .*lowerdir=\\([^,]*\\).*/\\1/p' /proc/self/mounts | head -1";

/// Runs a case with an image of one layer and one of five, where containerd has the snapshotter.
fn with_images(test: impl FnOnce(&World) -> Result<()>) {
    case_with(prepare, |world| {
        if !has_snapshotter(world) {
            println!("skipped: this containerd has no EROFS snapshotter");
            return Ok(());
        }
        let busybox = world.rootfs()?.join("bin/busybox");
        let mut one = layer::busybox(&busybox)?;
        one.file("data/only", 0o604, "only\n").owner(3, 4);
        import(world, ONE, vec![one])?;
        import(world, NAME, layers(layer::busybox(&busybox)?))?;
        let result = test(world);
        for name in [NAME, ONE] {
            world.ctr().run(&["images", "rm", "--sync", name], scale::container())?.success()?;
        }
        result
    });
}

/// What stays when there is nothing in it: the snapshotter's database, which is made once.
fn prepare(world: &World) -> Result<()> {
    if !has_snapshotter(world) {
        return Ok(());
    }
    for step in ["prepare", "rm"] {
        let command = ["snapshots", "--snapshotter", "erofs", step, "first"];
        world.ctr().run(&command, scale::command())?.success()?;
    }
    until_empty(world)
}

/// Waits until containerd has collected what was removed.
fn until_empty(world: &World) -> Result<()> {
    let root = world.dir().join("containerd/io.containerd.snapshotter.v1.erofs/snapshots");
    let until = Instant::now() + scale::container();
    while std::fs::read_dir(&root)?.next().is_some() {
        ensure!(Instant::now() < until, "{} is not empty", root.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn has_snapshotter(world: &World) -> bool {
    world.stage().is_rvm() && world.ctr().has_snapshotter("erofs")
}

fn layers(base: Layer) -> Vec<Layer> {
    let mut second = Layer::new();
    for name in ["low", "gone", "changed"] {
        second.file(&format!("data/{name}"), 0o640, "second\n").owner(70000, 8);
    }
    second.file("data/opaque/low", 0o644, "second\n");
    let mut third = Layer::new();
    third.whiteout("data/gone");
    third.opaque("data/opaque");
    third.file("data/opaque/high", 0o600, "third\n");
    third.file("data/changed", 0o4755, "third\n").owner(1, 2);
    let mut fourth = Layer::new();
    fourth.whiteout("etc/group");
    fourth.file("data/large", 0o644, vec![7; 3 << 20]);
    let mut top = Layer::new();
    top.file("top", 0o644, "top\n");
    vec![base, second, third, fourth, top]
}

fn import(world: &World, name: &str, layers: Vec<Layer>) -> Result<()> {
    let archive = world.write_file("erofs.tar", Image::new(name, layers)?.archive()?)?;
    // Who runs it unpacks it, with the snapshotter that is asked for.
    let imported = world.ctr().run(&["images", "import", "--no-unpack", &archive], scale::container());
    std::fs::remove_file(archive)?;
    imported?.success()?;
    Ok(())
}

fn run(world: &World, image: &str) -> Run {
    world.ctr().container("erofs").with_image(image).with(&WITH)
}

fn under_runc(world: &World, image: &str) -> Run {
    world.ctr().under(RUNC).container("erofs").with_image(image).with(&WITH)
}

/// The mounts of a snapshot, as containerd has them.
fn mounts_of(world: &World, key: &str) -> Result<String> {
    let said =
        world.ctr().run(&["snapshots", "--snapshotter", "erofs", "mounts", "/at", key], scale::command())?;
    Ok(said.success()?.text())
}

/// One layer and five, each under both.
#[test]
fn containers_are_the_same_under_both() {
    with_images(|world| {
        for (image, count) in [(ONE, 1), (NAME, 5)] {
            let expected = under_runc(world, image).shell(WALK)?.success()?.text();
            host::remove_runcs_parent();
            let kept = run(world, image).kept();
            let found = kept.shell(&format!("{LOWER}; {WALK}"))?.success()?.text();
            println!("{}", mounts_of(world, &kept.id)?);
            world.ctr().run(&["containers", "rm", &kept.id], scale::command())?.success()?;
            let (lower, found) = found.split_once('\n').context("lines")?;
            let names: Vec<&str> = lower.split(':').collect();
            ensure!(
                names.len() == count && names.iter().all(|name| name.starts_with("/run/rvm/images/img-")),
                "{lower}"
            );
            let different: Vec<_> =
                expected.lines().zip(found.lines()).filter(|(a, b)| a != b).take(5).collect();
            ensure!(found == expected && found.lines().count() > 50, "under runc and rvm: {different:?}");

            // What is written is each container's own, and nothing where it may not be.
            let again = run(world, image).shell("echo x > /new; rm -r /bin/ls; echo done")?.success()?;
            ensure!(again.text() == "done\n", "{again}");
            let write = "echo x > /new";
            let refused = [run(world, image), under_runc(world, image)]
                .map(|run| run.with(&["--read-only"]).shell(write));
            host::remove_runcs_parent();
            for refused in refused {
                let refused = refused?;
                ensure!(
                    refused.code() != 0 && refused.errors().contains("Read-only file system"),
                    "{refused}"
                );
            }
        }
        Ok(())
    });
}

/// Pods as kubelet has them: a first container, and one that joins it, of one image.
#[test]
fn pods_are_the_same_under_all() {
    let prepare = |world: &World| Cri::prepare(world).and_then(|()| prepare(world));
    case_with(prepare, |world| {
        if !has_snapshotter(world) {
            println!("skipped: this containerd has no EROFS snapshotter");
            return Ok(());
        }
        // What the plugin puts there is each pod's own.
        let walk = WALK.replace(" etc ", " ");
        let all = Cri::compare_on(world, "erofs", |cri| {
            let pod = Pod::run(cri, "erofs", |_| {})?;
            let sleeping = ["sh", "-c", "exec sleep 100000"];
            let (one, two) = (pod.start("one", &sleeping, |_| {})?, pod.start("two", &sleeping, |_| {})?);
            let seen = [
                one.sh(&walk)?,
                two.sh("echo x > /new; rm /bin/ls; echo /* /bin/l*")?,
                one.sh("echo /* /bin/l*")?,
            ];
            let lower = one.sh(LOWER)?;
            ensure!(lower.starts_with("/run/rvm/images/img-") == cri.is_rvm(), "{lower}");
            pod.remove()?;
            Ok(seen)
        });
        // What the plugin unpacked, topmost first.
        let snapshots = ["--namespace", "k8s.io", "snapshots", "--snapshotter", "erofs"];
        let listed = world.ctr().list(&[&snapshots[..], &["ls"]].concat());
        let names = listed.iter().skip(1).filter_map(|line| line.split_whitespace().next());
        let mut names: Vec<&str> = names.collect();
        while !names.is_empty() {
            let before = names.len();
            names.retain(|name| {
                let removed = world.ctr().run(&[&snapshots[..], &["rm", name]].concat(), scale::command());
                removed.and_then(job::Finished::success).is_err()
            });
            ensure!(names.len() < before, "{names:?} cannot be removed");
        }
        until_empty(world)?;
        let all = all?;
        let ((_, runc), others) = all.split_first().context("nothing ran")?;
        for (handler, seen) in others {
            ensure!(seen == runc, "under runc:\n{runc:#?}\nunder {handler}:\n{seen:#?}");
        }
        Ok(())
    });
}

/// What a container writes, committed to a snapshot of its own, and one made of that.
#[test]
fn what_is_committed_is_the_same_under_both() {
    const CHANGES: &str = "cd /data && echo more >> low && rm changed && mkdir new && echo x > new/file && \
                           rm -r opaque && mkdir opaque && chown 5:6 opaque && ln -s low link && mknod fifo p && \
                           touch -h -d '2001-02-03 04:05:06' low new/file . new opaque link fifo /";
    with_images(|world| {
        let snapshots = |args: &[&str]| {
            let all = [&["snapshots", "--snapshotter", "erofs"], args].concat();
            world.ctr().run(&all, scale::container())?.success()
        };
        let mut views = Vec::new();
        for (who, made) in [
            ("runc", under_runc(world, NAME)),
            ("rvm", run(world, NAME).with(&["--annotation", "io.rvm.writes=host"])),
        ] {
            let made = made.kept();
            made.shell(CHANGES)?.success()?;
            host::remove_runcs_parent();
            let committed = format!("committed-by-{who}");
            snapshots(&["commit", &committed, &made.id])?;
            world
                .ctr()
                .run(&["containers", "rm", "--keep-snapshot", &made.id], scale::command())?
                .success()?;
            let (view, place) = (format!("view-{who}"), world.dir().join(who));
            snapshots(&["view", &view, &committed])?;
            // Else containerd collects it at the next run, and takes what it was made of for something with a child for ever.
            snapshots(&["label", &view, "containerd.io/gc.root=case"])?;
            let mounts = mounts_of(world, &view)?;
            println!("{mounts}");
            std::fs::create_dir(&place)?;
            shell(&mounts.replace("/at", &place.to_string_lossy()))?;
            views.push((view, committed, place));
        }
        let same = tree::same(&views[0].2, &views[1].2);
        for (view, committed, place) in views {
            shell(&format!("umount {0}; rmdir {0}", place.display()))?;
            for key in [view, committed] {
                let removed = world
                    .ctr()
                    .run(&["snapshots", "--snapshotter", "erofs", "rm", &key], scale::command())?;
                removed.success()?;
            }
        }
        same
    });
}
