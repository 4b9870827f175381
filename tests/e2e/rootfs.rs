//! Images of one, twenty and a hundred layers, and everything a layer can hold.

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{ttrpc::Status, types::mount::Mount};
use rootfs_builder::{
    image::Image,
    layer::{self, Layer},
};
use rvm_tests::{
    bare::Bare,
    bundle, case, scale,
    world::{ADDRESS, World, shell},
};
use serde_json::json;

/// `struct vfs_cap_data` of revision 2 (capabilities(7)): CAP_CHOWN, permitted
/// and effective.
const CAP_CHOWN: [u8; 20] = [1, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Imports an image of `count` layers: busybox, `special`, and then one file each.
pub(crate) fn import(world: &World, name: &str, special: Vec<Layer>, count: usize) -> Result<()> {
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

pub(crate) fn remove(world: &World, name: &str) -> Result<()> {
    world.ctr().run(&["images", "rm", "--sync", name], scale::container())?.success()?;
    Ok(())
}

/// What layers say about each other.
pub(crate) fn special_layers() -> Vec<Layer> {
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

/// Layers as a snapshotter gives them whose owners the kernel is to map, as it is for pods with a user namespace.
#[test]
fn owners_in_layers_are_mapped() {
    case(|world| {
        if !world.stage().is_rvm() {
            return Ok(());
        }
        let dir = world.dir().join("mapped");
        let at = dir.display();
        // A tmpfs of this kernel's cannot be idmapped.
        shell(&format!(
            "mkdir {at}; truncate -s 64M {at}.image; /sbin/mkfs.ext4 -q -F {at}.image; mount -o loop {at}.image {at}; \
             mkdir -p {at}/1/tmp {at}/1/dev {at}/1/proc {at}/1/out {at}/2 {at}/out; chmod 777 {at}/out; \
             cp -a {}/bin {at}/1; echo x > {at}/2/seven; chown 7:8 {at}/2/seven",
            world.rootfs()?.display()
        ))?;
        let all = || {
            for (writes, upper) in [("guest", "full"), ("guest", "empty"), ("host", "host")] {
                // What the container writes stays with the snapshot, so each is one of its own.
                shell(&format!(
                    "mkdir -p {at}/{upper}/fs {at}/{upper}/work; chown 100000:100000 {at}/{upper}/fs"
                ))?;
                if upper == "full" {
                    shell(&format!("cd {at}/full/fs; echo x > five; chown 100005:100006 five"))?;
                }
                let seen =
                    mapped(world, &dir, writes, upper).with_context(|| format!("{writes}, {upper}"))?;
                let five = if upper == "full" { "/five 5:6\n" } else { "" };
                let expected = format!("/ 0:0\n/bin/busybox 0:0\n/seven 7:8\n{five}/new 0:0\n/seven 9:10\n");
                ensure!(seen == expected, "{writes}, {upper}: {seen:?}, expected {expected:?}");
            }
            let stored = shell(&format!("cd {at}; stat -c '%n %u:%g' 2/seven host/fs/new host/fs/seven"))?;
            ensure!(
                stored == "2/seven 7:8\nhost/fs/new 100000:100000\nhost/fs/seven 100009:100010\n",
                "{stored}"
            );
            Ok(())
        };
        let result = all();
        shell(&format!("umount {at}; rmdir {at}; rm {at}.image"))?;
        result
    });
}

/// What a container in a user namespace says of its files.
fn mapped(world: &World, dir: &std::path::Path, writes: &str, upper: &str) -> Result<String> {
    let script = "for f in / /bin/busybox /seven /five; do [ -e $f ] && stat -c '%n %u:%g' $f; done > /out/seen; \
                  echo x > /new; chown 9:10 /seven; stat -c '%n %u:%g' /new /seven >> /out/seen; \
                  echo > /out/done; exec sleep 1000";
    let mut spec = bundle::spec(dir, &["/bin/busybox", "sh", "-c", script]);
    let capabilities = json!(["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER"]);
    spec["process"]["capabilities"] =
        json!({"bounding": capabilities, "effective": capabilities, "permitted": capabilities});
    let mappings = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    spec["linux"]["uidMappings"] = mappings.clone();
    spec["linux"]["gidMappings"] = mappings;
    spec["linux"]["namespaces"].as_array_mut().context("namespaces")?.push(json!({"type": "user"}));
    let out =
        json!({"destination": "/out", "type": "bind", "source": dir.join("out"), "options": ["rbind", "rw"]});
    spec["mounts"].as_array_mut().context("mounts")?.push(out);
    spec["annotations"] = json!({ "io.rvm.writes": writes });
    let at = dir.display();
    let options = [
        format!("workdir={at}/{upper}/work"),
        format!("upperdir={at}/{upper}/fs"),
        format!("lowerdir={at}/2:{at}/1"),
        "uidmap=0:100000:65536".into(),
        "gidmap=0:100000:65536".into(),
    ];
    let rootfs = Mount {
        type_: "overlay".into(),
        source: "overlay".into(),
        options: options.to_vec(),
        ..Default::default()
    };
    let shim = Bare::start(world, ADDRESS, "mapped", &spec)?;
    let ran = || {
        let said = |status: Status| anyhow::anyhow!("{}", status.message);
        shim.create_on(vec![rootfs], None).map_err(said)?;
        let seen = shim.start_task().map_err(said).and_then(|()| {
            let until = std::time::Instant::now() + scale::container();
            while !dir.join("out/done").exists() {
                ensure!(std::time::Instant::now() < until, "it says nothing");
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            Ok(std::fs::read_to_string(dir.join("out/seen"))?)
        });
        shim.end_task()?;
        shell(&format!("rm -f {at}/out/*"))?;
        seen
    };
    let seen = ran();
    shim.shut_down()?;
    seen
}
