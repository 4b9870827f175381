//! Images of one, twenty and a hundred layers, and everything a layer can hold.

use anyhow::{Context, Result, ensure};
use rootfs_builder::{
    image::Image,
    layer::{self, Layer},
};
use rvm_tests::{case, scale, world::World};

/// `struct vfs_cap_data` of revision 2 (capabilities(7)): CAP_CHOWN, permitted
/// and effective.
const CAP_CHOWN: [u8; 20] = [1, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Imports an image of `count` layers: busybox, `special`, and then one file each.
fn import(world: &World, name: &str, special: Vec<Layer>, count: usize) -> Result<()> {
    let busybox = world.rootfs()?.join("bin/busybox");
    let mut base = layer::busybox(&busybox)?;
    base.file("caps/chown", 0o755, std::fs::read(&busybox)?).xattr("security.capability", CAP_CHOWN);
    let mut layers = vec![base];
    layers.extend(special);
    for n in layers.len()..count {
        let mut layer = Layer::new();
        layer.file(&format!("layers/{n}"), 0o644, format!("{n}\n"));
        // Each replaces what the one below has.
        layer.file("top", 0o644, format!("{n}\n"));
        layers.push(layer);
    }
    let archive = world.write_file("layers.tar", Image::new(name, layers)?.archive()?)?;
    let imported = world.ctr().run(&["images", "import", &archive], scale::container() * 4);
    std::fs::remove_file(archive)?;
    imported?.success()?;
    Ok(())
}

fn remove(world: &World, name: &str) -> Result<()> {
    world.ctr().run(&["images", "rm", "--sync", name], scale::container())?.success()?;
    Ok(())
}

/// What layers say about each other.
fn special_layers() -> Vec<Layer> {
    let mut lower = Layer::new();
    lower.file("gone", 0o644, "lower");
    lower.file("dir/low", 0o644, "lower");
    lower.file("tree/deep/low", 0o644, "lower");
    lower.file("becomes-dir", 0o644, "lower");
    lower.file("becomes-file/low", 0o644, "lower");
    lower.file("kept", 0o600, "lower").owner(12, 34);
    lower.file("hard/one", 0o644, "linked");
    lower.hard_link("hard/two", "hard/one");
    lower.file("setuid", 0o4755, "x");
    lower.fifo("fifo", 0o640);
    lower.char_device("null", 0o666, 1, 3);
    lower.symlink("link", "kept");
    let mut upper = Layer::new();
    upper.whiteout("gone");
    upper.opaque("dir");
    upper.file("dir/high", 0o644, "upper");
    upper.whiteout("tree/deep");
    upper.file("becomes-dir/high", 0o644, "upper");
    upper.file("becomes-file", 0o644, "upper");
    vec![lower, upper]
}

/// The same under runc: containerd's own layers, the same kernel of overlays.
#[test]
fn twenty_layers() {
    const NAME: &str = "example.org/layers:20";
    case(|world| {
        import(world, NAME, special_layers(), 20)?;
        let script = "ls -d /gone /dir/low /tree/deep /becomes-file/low 2>/dev/null; \
            cat /dir/high /becomes-dir/high /becomes-file; echo; (ls /dir; ls /becomes-dir) | tr '\\n' ' '; echo; \
            stat -c '%a %u %g %s' /kept; readlink /link; cat /link; echo; \
            stat -c '%h' /hard/one /hard/two; test /hard/one -ef /hard/two && echo same; \
            stat -c '%a %F' /setuid /fifo /null; stat -c '%t:%T' /null; \
            cat /top; ls /layers | wc -l; \
            echo more >> /dir/high; rm /becomes-file; mkdir /becomes-file; echo z > /becomes-file/z; \
            mv /dir/high /dir/moved; cat /dir/moved; rm -r /layers && mkdir /layers && ls /layers | wc -l; \
            mv /tree /tree2 2>/dev/null || cp -a /tree /tree2; ls /tree2 | wc -l; \
            dd if=/dev/zero of=/sparse bs=1 count=1 seek=1073741823 2>/dev/null; stat -c %s /sparse; \
            test $(du -k /sparse | cut -f1) -lt 100 && echo sparse; \
            mkfifo /f && mknod /n c 1 3 && stat -c '%F' /f /n; ln /dir/moved /dir/linked; stat -c %h /dir/linked; \
            (echo through > /fifo &); cat /fifo";
        let run = world.ctr().container("layers").with_image(NAME);
        let finished = run.shell(script)?.success()?;
        let expected = "upperupperupper\nhigh high \n600 12 34 5\nkept\nlower\n2\n2\nsame\n\
            4755 regular file\n640 fifo\n666 character special file\n1:3\n19\n17\n\
            uppermore\n0\n0\n1073741824\nsparse\nfifo\ncharacter special file\n2\nthrough\n";
        ensure!(finished.text() == expected, "expected {expected}\ngot {finished}");

        // A capability of a file, through overlay and share, for an ordinary user.
        let run = world.ctr().container("caps").with_image(NAME).with(&["--allow-new-privs"]);
        let script = "su user -c 'echo > /tmp/mine; chown 77 /tmp/mine 2>/dev/null && echo without; \
                      /caps/chown 77 /tmp/mine && stat -c %u /tmp/mine'";
        let finished = run.shell(script)?.success()?;
        ensure!(finished.text() == "77\n", "{finished}");
        remove(world, NAME)
    });
}

#[test]
fn a_hundred_layers() {
    const NAME: &str = "example.org/layers:100";
    case(|world| {
        import(world, NAME, Vec::new(), 100)?;
        let run = world.ctr().container("layers").with_image(NAME);
        let finished = run.shell(
            "cat /top; ls /layers | wc -l; cat /layers/1 /layers/50; grep -c . /proc/self/mountinfo",
        )?;
        let text = finished.text();
        let lines: Vec<&str> = text.lines().collect();
        ensure!(lines[..4] == ["99", "99", "1", "50"], "{finished}");
        let mounts: usize = lines.get(4).context("mounts")?.parse()?;
        ensure!(mounts < 40, "the guest pays for layers: {mounts} mounts");
        remove(world, NAME)
    });
}
