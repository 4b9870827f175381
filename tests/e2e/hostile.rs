//! A guest that does with its devices what no guest of ours would.

use anyhow::ensure;
use rvm_tests::{
    case,
    world::{World, shell},
};

use crate::volumes::{Volume, bind};

/// Everything a kernel can do to a tree it was given, from a second mount of it.
/// (Of one with mounts in it, Linux may give the newest of these instead.) What
/// was done is printed.
const ATTACK: &str = r#"
did() { "$@" 2>/dev/null && echo "did: $*"; }
for tag in rvm layers volumes; do
    mkdir -p /m/$tag
    mount -t virtiofs $tag /m/$tag 2>/dev/null || continue
    mount -o remount,rw /m/$tag
    cd /m/$tag && echo "tag $tag" || continue
    for dir in . $(ls | head -n 2); do
        test -e $dir/rw-marker && continue
        did mkdir $dir/x
        did mkdir -p $dir/x/y
        did ln -s HOST $dir/mounts
        did mkdir $dir/sub && did ln -s HOST $dir/sub/mounts
        did touch $dir/file
        did dd if=/dev/zero of=$dir/big bs=1M count=20
        did mknod $dir/node c 1 3
        did chmod 777 $dir
        did chown 1:1 $dir
        did touch -d 2001-01-01 $dir
        for entry in $(ls $dir | head -n 2); do
            did rmdir $dir/$entry
            did rm -f $dir/$entry
            did mv $dir/$entry $dir/moved
        done
    done
    cd /
done
mount -o remount,rw /r
for volume in /r /w; do
    did touch $volume/new; did mkdir $volume/dir
done
"#;

/// Nothing but read-write volumes is a guest's to change, and the shim follows
/// nothing that a guest could have made.
#[test]
fn the_trees_of_mount_points_stay() {
    case(|world| {
        let (writable, readonly) = (Volume::new(world, "writable")?, Volume::new(world, "readonly")?);
        let kept = Volume::new(world, "kept")?;
        std::fs::write(writable.path("rw-marker"), "")?;
        std::fs::write(readonly.path("ro-marker"), "")?;
        std::fs::write(kept.path("empty-file"), "")?;
        std::fs::create_dir(kept.path("empty-dir"))?;
        let free = || shell("df -k --output=used /run | tail -1");
        let before: i64 = free()?.trim().parse()?;
        let script = ATTACK.replace("HOST", &kept.0.display().to_string());
        for _ in 0..2 {
            // The same id again: nothing of it was left.
            let run = attacker(world, &writable, &readonly);
            let finished = run.named("hostile-skeleton").shell(&script)?.success()?;
            let expected = "tag layers\ntag volumes\ndid: touch /w/new\ndid: mkdir /w/dir\n";
            ensure!(finished.text() == expected, "{finished}");
            std::fs::remove_dir(writable.path("dir"))?;
        }
        ensure!(writable.path("new").exists(), "a volume can be written to");
        ensure!(kept.path("empty-file").exists() && kept.path("empty-dir").exists(), "the host's files");
        let names = shell(&format!("ls {}", readonly.0.display()))?;
        ensure!(names == "ro-marker\n", "{names}");
        let grown = free()?.trim().parse::<i64>()? - before;
        ensure!(grown < 4096, "{grown} KiB more in the host's /run");
        Ok(())
    });
}

fn attacker(world: &World, writable: &Volume, readonly: &Volume) -> rvm_tests::ctr::Run {
    world.ctr().container("hostile").with(&[
        "--privileged",
        "--mount",
        &bind(&writable.0, "/w", "rbind:rw"),
        "--mount",
        &bind(&readonly.0, "/r", "rbind:ro"),
    ])
}
