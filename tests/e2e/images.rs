//! Image files in place of layers: what is in them, who has them, and their end.

pub mod memory;

use std::{
    ffi::OsStr,
    os::unix::{ffi::OsStrExt, fs::FileExt, net::UnixListener, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use rootfs_builder::{
    image::Image,
    layer::{self, Layer},
};
use rvm_tests::{
    case,
    ctr::Run,
    host, images,
    job::Input,
    scale, tree,
    world::{World, shell},
};

const NAME: &str = "example.org/images:2";

/// Layers made by hand, with whatever a layer may hold: `N/fs`, of which the last is the top.
fn odd_layers(dir: &Path) -> Result<Vec<PathBuf>> {
    shell(&format!(
        "set -e; mkdir -p {0}/1/fs {0}/1/work {0}/2/fs {0}/2/work; cd {0}/1/fs
        mkdir dir tree opaque; echo low > dir/low; echo low > opaque/low; echo gone > gone; echo low > changed
        mkdir -m 1777 tree/sticky; mkfifo -m 640 fifo; mknod -m 666 null c 1 3; mknod -m 600 disk b 259 70000
        echo linked > one; ln one two; ln one tree/three; ln -s /nowhere link; ln -s $(printf 'x%.0s' $(seq 300)) long
        echo x > setuid; chown 100000:70000 setuid; chmod 6755 setuid; : > empty
        truncate -s 3M sparse; printf end >> sparse; head -c 300001 /dev/urandom > random
        touch -d '1969-12-31 23:59:58 UTC' old; touch -d '2001-02-03 04:05:06.123456789 UTC' times tree
        touch -d '2200-01-01 UTC' far; echo x > '  a  name '
        mkdir many; for n in $(seq 600); do echo $n > many/file-with-a-name-of-some-length-$n; done
        cd ../../2/fs; mknod gone c 0 0; echo high > changed; mkdir dir opaque; echo high > dir/high
        mknod tree c 0 0; chown 7:8 opaque; chmod 751 opaque",
        dir.display()
    ))?;
    let at = |path: &str| dir.join(path);
    drop(UnixListener::bind(at("1/fs/socket"))?);
    std::fs::write(at("1/fs").join(OsStr::from_bytes(b"not\xc3\x28utf8\n")), "x")?;
    set_attribute(&at("2/fs/opaque"), c"trusted.overlay.opaque", b"y")?;
    set_attribute(&at("1/fs/times"), c"user.said", b"something")?;
    set_attribute(&at("1/fs/times"), c"trusted.said", &[0, 1, 2])?;
    set_attribute(&at("1/fs/dir"), c"user.of-a-directory", &[b'x'; 2000])?;
    let capability = [1, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    set_attribute(&at("1/fs/random"), c"security.capability", &capability)?;
    Ok(vec![at("2/fs"), at("1/fs")])
}

/// Sets an extended attribute, also of a link.
pub(crate) fn set_attribute(path: &Path, name: &std::ffi::CStr, value: &[u8]) -> Result<()> {
    let c_path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: both names end with a NUL, and the value is as long as is said.
    let done =
        unsafe { libc::lsetxattr(c_path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    let error = std::io::Error::last_os_error();
    ensure!(done == 0, "{name:?} of {}: {error}", path.display());
    Ok(())
}

/// A maker as the shim starts it.
fn maker(world: &World, (limit, free): (u64, u64), file: &Path, layers: &[PathBuf]) -> Command {
    let lower: Vec<_> = layers.iter().map(|dir| dir.to_string_lossy()).collect();
    let mut command = Command::new(world.stage().shim());
    command
        .args(["make-image", &limit.to_string(), &free.to_string()])
        .arg(world.dir().join("cache"))
        .arg(file)
        .arg(lower.join(":"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// On a file system as hosts have it (not every kernel's tmpfs knows all attributes), which `mkfs` makes.
fn on_a_disk(world: &World, mkfs: &str, test: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let dir = world.dir().join("layers");
    let at = dir.display();
    // mkfs.xfs makes none of less.
    shell(&format!(
        "mkdir {at} {at}.a {at}.b; truncate -s 320M {at}.disk; /sbin/mkfs.{mkfs} {at}.disk; mount -o loop {at}.disk {at}"
    ))?;
    let result = test(&dir);
    let cleaned = shell(&format!(
        "umount {at}.a {at}.b 2>/dev/null || true; umount {at}; rmdir {at} {at}.a {at}.b; rm -rf {at}.disk {}",
        world.dir().join("cache").display()
    ));
    result.and(cleaned.map(drop))
}

const MANY: u64 = 1 << 40;

/// The image, beside what the host's kernel makes of the layers; and whoever is killed, has no room or comes second
/// leaves nothing that could be taken for one.
#[test]
fn an_image_has_all_that_its_layers_have() {
    case(|world| {
        if !world.stage().is_rvm() {
            return Ok(());
        }
        on_a_disk(world, "ext4 -q -F -b 4096", |dir| {
            let layers = odd_layers(dir)?;
            let file = dir.join("2/rvm-image-odd");
            let made = |limits| -> Result<String> {
                let output = maker(world, limits, &file, &layers).output()?;
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                ensure!(output.status.success() == said.is_empty(), "{}: {said}", output.status);
                Ok(said)
            };
            let names = || shell(&format!("ls {}", dir.join("2").display()));

            // No room on the disk: nothing is kept of that.
            let said = made((MANY, MANY))?;
            ensure!(said.contains("images.free_mib leaves"), "{said}");
            let left: u64 =
                shell(&format!("df -B1 --output=avail {} | tail -1", dir.display()))?.trim().parse()?;
            let said = made((MANY, left - (1 << 20)))?;
            ensure!(said.contains("would be larger than"), "{said}");
            ensure!(names()? == "fs\nwork\n", "{}", names()?);

            // Killed at twenty points of the time it takes, which is another each time.
            let started = Instant::now();
            ensure!(made((MANY, 0))?.is_empty(), "not made");
            let mut takes = started.elapsed();
            let (mut killed, mut tries) = (0, 0);
            while killed < 20 {
                tries += 1;
                ensure!(tries <= 60, "killed {killed} times");
                if file.exists() {
                    std::fs::remove_file(&file)?;
                }
                let mut child = maker(world, (MANY, 0), &file, &layers).spawn()?;
                std::thread::sleep(takes * killed / 20);
                let _ = child.kill();
                let status = child.wait()?;
                // mkfs.erofs works for nobody then.
                shell("while pgrep -x mkfs.erofs > /dev/null; do sleep 0.01; done")?;
                if status.signal() == Some(libc::SIGKILL) && !file.exists() {
                    killed += 1;
                    ensure!(names()? == "fs\nwork\n", "{}", names()?);
                } else {
                    takes = takes * 9 / 10;
                }
            }
            println!("killed {killed} times in {tries}, of {} ms", takes.as_millis());
            let _ = std::fs::remove_file(&file);

            // Two at once: one works, the other leaves it that.
            let two: Vec<_> = [1, 2]
                .map(|_| maker(world, (MANY, 0), &file, &layers).spawn())
                .into_iter()
                .collect::<Result<_, _>>()?;
            for child in two {
                let output = child.wait_with_output()?;
                ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            }
            ensure!(names()? == "fs\nrvm-image-odd\nwork\n", "{}", names()?);

            let (a, b) = (dir.with_extension("a"), dir.with_extension("b"));
            shell(&format!(
                "mount -t overlay -o ro,lowerdir={0}/2/fs:{0}/1/fs overlay {1}; mount -o loop,ro -t erofs {2} {3}",
                dir.display(),
                a.display(),
                file.display(),
                b.display()
            ))?;
            let same = tree::same(&a, &b);
            shell(&format!("umount {} {}", a.display(), b.display()))?;
            same?;

            std::fs::remove_file(&file)?;
            the_host_unmounts_meanwhile(&dir.with_extension("c"), maker(world, (MANY, 0), &file, &layers))?;

            // To read all of a layer that is a file system by itself may be to fetch it from far away.
            std::fs::remove_file(&file)?;
            shell(&format!("mount --bind {0} {0}", layers[1].display()))?;
            let said = made((MANY, 0));
            shell(&format!("umount {}", layers[1].display()))?;
            ensure!(said?.contains(&format!("{}: is a mount", layers[1].display())), "not refused");
            let refused = format!("{}.refused", file.display());
            ensure!(shell(&format!("cat {refused}; rm {refused}"))?.contains("is a mount"), "not for good");

            // Too large is too large the next time too.
            let said = made((64 << 10, 0))?;
            ensure!(said.contains("would be larger than 65536 bytes"), "{said}");
            let refused = shell(&format!("cat {}.refused", file.display()))?;
            ensure!(refused == "the image would be larger than 65536 bytes", "{refused}");
            Ok(())
        })
    });
}

/// What the host unmounts while an image is made is unmounted, and no file system stays in use by the maker.
fn the_host_unmounts_meanwhile(at: &Path, mut maker: Command) -> Result<()> {
    shell(&format!("mkdir {0}; mount -t tmpfs tmpfs {0}", at.display()))?;
    let child = maker.spawn()?;
    let pid = child.id();
    let mounts = || std::fs::read_to_string(format!("/proc/{pid}/mountinfo"));
    let until = Instant::now() + scale::command();
    // It has its own mounts now.
    while !mounts()?.contains("/tree ") {
        ensure!(Instant::now() < until, "no tree");
    }
    shell(&format!("kill -STOP {pid}"))?;
    let before = mounts()?;
    shell(&format!("umount {0}; rmdir {0}", at.display()))?;
    let after = mounts()?;
    shell(&format!("kill -CONT {pid}"))?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let has = |mounts: &str| mounts.contains(&format!(" {} ", at.display()));
    ensure!(has(&before) && !has(&after), "before: {before}after: {after}");
    Ok(())
}

/// Bytes of a file in the image that is worth reading, whole pages.
const LARGE: usize = 12 << 20;

/// No two pages of it are the same.
fn large() -> Vec<u8> {
    (0..LARGE as u32 / 4).flat_map(|word| word.wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

/// An image of two layers, for a case.
fn import(world: &World) -> Result<()> {
    let busybox = world.rootfs()?.join("bin/busybox");
    let mut upper = Layer::new();
    upper.file("top", 0o640, "top\n").owner(70000, 8);
    upper.file("large", 0o644, large());
    upper.whiteout("etc/group");
    let layers = vec![layer::busybox(&busybox)?, upper];
    let archive = world.write_file("images.tar", Image::new(NAME, layers)?.archive()?)?;
    let imported = world.ctr().run(&["images", "import", &archive], scale::container());
    std::fs::remove_file(archive)?;
    imported?.success()?;
    Ok(())
}

/// Runs a case with an image of its own; no other's is made meanwhile.
fn with_image(test: impl FnOnce(&World) -> Result<()>) {
    case(|world| {
        if !world.stage().is_rvm() {
            return Ok(());
        }
        for file in images::files(world)? {
            std::fs::remove_file(file)?;
        }
        world.set_config(&world.config().with_images())?;
        import(world)?;
        let result = test(world);
        world.ctr().run(&["images", "rm", "--sync", NAME], scale::container())?.success()?;
        // It goes with the snapshot of its top layer.
        result.and_then(|()| images::wait_for(world, 0).map(drop))
    });
}

/// All of the image but what the runtimes put there; what is one file is read once.
const WALK: &str = "cd /; sha256sum bin/busybox; \
                    for f in $(find bin etc home root sbin tmp top usr var 2>/dev/null | sort); do \
                    [ -d $f ] && [ ! -L $f ] && stat -c '%n %f %u %g %y' $f || stat -c '%n %f %h %u %g %s %t:%T %y' $f; \
                    [ -f $f ] && [ $(stat -c %h $f) = 1 ] && sha256sum $f; done; sha256sum /large; cat /top";

fn run(world: &World) -> Run {
    world.ctr().container("images").with_image(NAME)
}

/// The image that a container's root file system lies on, as the container sees it.
pub(crate) const LOWER: &str =
    "sed -n 's/.* overlay .*lowerdir=\\([^,]*\\).*/\\1/p' /proc/self/mounts | head -1";

#[test]
fn the_next_container_has_an_image() {
    with_image(|world| {
        let first = run(world).shell(LOWER)?.success()?;
        ensure!(first.text().starts_with("/run/rvm/layers/"), "{first}");
        let files = images::wait_for(world, 1)?;
        let shared = world
            .ctr()
            .under("io.containerd.runc.v2")
            .container("images")
            .with_image(NAME)
            .shell(WALK)?
            .success()?;
        host::remove_runcs_parent();
        let second = run(world).shell(&format!("{LOWER}; {WALK}"))?.success()?;
        let text = second.text();
        let (lower, walked) = text.split_once('\n').context("lines")?;
        ensure!(lower.starts_with("/run/rvm/images/img-"), "{lower}");
        let under_runc = shared.text();
        let different: Vec<_> =
            under_runc.lines().zip(walked.lines()).filter(|(a, b)| a != b).take(5).collect();
        ensure!(walked == under_runc && walked.lines().count() > 50, "under runc and rvm: {different:?}");

        // Changes stay the container's own.
        let script = "echo more >> /top; rm -r /bin; ls /top";
        run(world).shell(script)?;
        let again = run(world).shell("cat /top; ls /bin | wc -l")?.success()?;
        ensure!(again.text().starts_with("top\n") && !again.text().ends_with("\n0\n"), "{again}");

        let listed = shell(&format!(
            "{} --config {} images",
            world.stage().rvmctl().display(),
            world.config_path().display()
        ))?;
        ensure!(listed.contains(&*files[0].to_string_lossy()), "{listed}");

        // Where writes go to the host, and where images are switched off, the layers are what they were.
        world.set_config(&world.config().set("images", "enabled", "false"))?;
        let without = run(world).shell(LOWER)?.success()?;
        ensure!(without.text().starts_with("/run/rvm/layers/"), "{without}");
        Ok(())
    });
}

#[test]
fn an_image_that_goes_is_kept_by_who_has_it() {
    with_image(|world| {
        run(world).shell("true")?.success()?;
        let files = images::wait_for(world, 1)?;
        let mut job = run(world)
            .start(&["sh", "-c", "echo ready; read x; cat /bin/busybox | wc -c; cat /top"], Input::Open)?;
        job.wait_for("ready", scale::container())?;
        std::fs::remove_file(&files[0])?;
        // The host may forget what it has of the file.
        shell("echo 3 > /proc/sys/vm/drop_caches")?;
        job.write(b"go\n")?;
        let finished = job.finish(scale::container())?.success()?;
        ensure!(finished.text().ends_with("\ntop\n"), "{finished}");
        images::wait_for(world, 0).map(drop)
    });
}

/// What is no image is not taken for one; what is broken inside is told once.
#[test]
fn a_damaged_image_is_made_once_more() {
    with_image(|world| {
        run(world).shell("true")?.success()?;
        let file = images::wait_for(world, 1)?.remove(0);
        for what in ["no superblock", "cut off"] {
            let image = std::fs::File::options().write(true).open(&file)?;
            match what {
                "cut off" => image.set_len(8192)?,
                _ => image.write_all_at(&[0; 64], 1024)?,
            }
            let finished = run(world).shell(LOWER)?.success()?;
            ensure!(finished.text().starts_with("/run/rvm/layers/"), "{what}: {finished}");
            ensure!(images::wait_for(world, 1)? == [file.clone()], "{what}");
        }
        // A feature that no kernel knows: by accident once, by its maker the second time.
        for time in 1..=2 {
            std::fs::File::options().write(true).open(&file)?.write_all_at(&[0xff; 4], 1024 + 80)?;
            let refused = run(world).shell("true")?;
            ensure!(refused.code() != 0 && refused.errors().contains("mount the image"), "{refused}");
            images::wait_for(world, 0)?;
            let finished = run(world).shell(LOWER)?.success()?;
            ensure!(finished.text().starts_with("/run/rvm/layers/"), "{finished}");
            if time == 1 {
                images::wait_for(world, 1)?;
            }
        }
        let said = shell(&format!("cat {}.refused", file.display()))?;
        ensure!(said.contains("mount the image"), "{said}");
        images::wait_for(world, 0).map(drop)
    });
}
