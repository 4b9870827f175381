//! The mounts that containerd 2.2 and later sends, given to a shim as it gives them.

use std::{
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{
    api::KillRequest,
    ttrpc::{Code, Status},
    types::mount::Mount,
};
use rvm_tests::{
    bare::Bare,
    bundle, case,
    ctr::unique_id,
    host,
    pod_shim::{PodShim, said},
    world::{ADDRESS, World, shell},
};
use serde_json::json;

use super::{RUNC, WALK};
use crate::{
    images::set_attribute,
    sandbox_api::{self, NETWORK},
};

fn mount(kind: &str, source: impl Into<String>, options: &[&str]) -> Mount {
    Mount {
        type_: kind.into(),
        source: source.into(),
        options: options.iter().map(|&option| option.to_owned()).collect(),
        ..Default::default()
    }
}

/// Layers in files, as the snapshotter has them: `N/layer.erofs`, of which 5 is the top; and a writable one at 9.
struct Layers<'w> {
    world: &'w World,
    dir: PathBuf,
}

impl<'w> Layers<'w> {
    fn new(world: &'w World) -> Result<Self> {
        let dir = world.dir().join("erofs");
        let layers = Self { world, dir };
        shell(&format!(
            "mkdir {0}; cd {0}; mkdir 1 2 3 4 5 9 9/fs 9/work out t; cp -a {1} t/1
            mkdir -p t/1/home t/1/root t/1/tmp t/1/usr t/1/var t/1/data/opaque t/2/data t/3/data/opaque t/4/etc t/5
            cd t/1/data; echo low > low; echo low > opaque/low; echo gone > gone; echo low > changed; mkfifo -m 640 fifo
            mknod -m 600 disk b 259 70000; echo linked > one; ln one two; ln -s /nowhere link; : > empty
            echo x > setuid; chown 100000:70000 setuid; chmod 6755 setuid; touch -d '2001-02-03 04:05:06.123456789 UTC' low
            cd ../../2/data; mknod gone c 0 0; echo second > changed; cd ../../3/data
            chown 7:8 opaque; chmod 751 opaque
            cd ../../4; mknod etc/group c 0 0; mkdir data; head -c 3000001 /dev/urandom > data/large; cd ../5
            mkdir data; echo top > data/top",
            layers.at(""),
            world.rootfs()?.display(),
        ))?;
        set_attribute(&layers.dir.join("t/3/data/opaque"), c"trusted.overlay.opaque", b"y")?;
        let capability = [1, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        set_attribute(&layers.dir.join("t/4/data/large"), c"security.capability", &capability)?;
        shell(&format!(
            "cd {}; for n in 1 2 3 4 5; do mkfs.erofs --quiet $n/layer.erofs t/$n; done",
            layers.at("")
        ))?;
        Ok(layers)
    }

    fn at(&self, path: &str) -> String {
        self.dir.join(path).display().to_string()
    }

    fn erofs(&self, number: u32) -> Mount {
        mount("erofs", self.at(&format!("{number}/layer.erofs")), &["ro", "loop"])
    }

    fn on_host(&self, lower: &str) -> Mount {
        let (work, upper) =
            (format!("workdir={}", self.at("9/work")), format!("upperdir={}", self.at("9/fs")));
        mount("format/mkdir/overlay", "overlay", &[&work, &upper, lower])
    }

    /// What containerd 2.2 and 2.4 send for a container with a disk of its own.
    fn on_disk(&self, lower: &[u32]) -> Vec<Mount> {
        let size = "X-containerd.mkfs.size=25165824";
        let disk =
            mount("mkfs/ext4", self.at("9/rwlayer.img"), &["X-containerd.mkfs.fs=ext4", size, "rw", "loop"]);
        let layers = lower.iter().map(|&number| self.erofs(number));
        let lowerdir = match lower.len() {
            1 => "lowerdir={{ mount 1 }}".to_owned(),
            count => format!("lowerdir={{{{ overlay 1 {count} }}}}"),
        };
        let overlay = mount(
            "format/mkdir/overlay",
            "overlay",
            &[
                "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
                "workdir={{ mount 0 }}/work",
                "upperdir={{ mount 0 }}/upper",
                &lowerdir,
            ],
        );
        [disk].into_iter().chain(layers).chain([overlay]).collect()
    }

    /// Runs a script on these mounts, with `/out` to write to; what is in `/out/seen` then.
    fn run(&self, mounts: Vec<Mount>, writes: &str, script: &str) -> Result<String> {
        let seen = self.dir.join("out/seen");
        let _ = std::fs::remove_file(&seen);
        let shim = self.shim(writes, &format!("{{ {script}\n}} > /out/seen 2>&1"))?;
        let ran = (|| {
            let said = |status: Status| anyhow::anyhow!("{}", status.message);
            shim.create_on(mounts, None).map_err(said)?;
            shim.start_task().map_err(said)?;
            let code = shim.wait()?;
            shim.delete_task()?;
            let seen = std::fs::read_to_string(&seen).context("it says nothing")?;
            ensure!(code == 0, "ends with {code}: {seen}");
            Ok(seen)
        })();
        shim.shut_down()?;
        ran
    }

    fn shim(&self, writes: &str, script: &str) -> Result<Bare> {
        let id = unique_id("erofs");
        let mut spec = bundle::spec(&self.dir.join("rootfs"), &["/bin/busybox", "sh", "-c", script]);
        let all = json!(["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_MKNOD"]);
        spec["process"]["capabilities"] = json!({"bounding": all, "effective": all, "permitted": all});
        let out = json!({"destination": "/out", "type": "bind", "source": self.at("out"), "options": ["rbind", "rw"]});
        spec["mounts"].as_array_mut().context("mounts")?.push(out);
        if !writes.is_empty() {
            spec["annotations"] = json!({ "io.rvm.writes": writes });
        }
        Bare::start(self.world, ADDRESS, &id, &spec)
    }

    /// The same walk under runc, on what the host's kernel makes of the layers.
    fn under_runc(&self, numbers: &[u32]) -> Result<String> {
        let places: Vec<String> = numbers.iter().map(|number| format!("m/{number}")).collect();
        let mounts = numbers
            .iter()
            .map(|n| format!("mkdir -p m/{n}; mount -t erofs -o ro,loop {n}/layer.erofs m/{n}\n"));
        shell(&format!(
            "cd {}; {} mkdir -p m/fs m/work m/root; mount -t overlay -o lowerdir={},upperdir=m/fs,workdir=m/work overlay m/root",
            self.at(""),
            mounts.collect::<String>(),
            places.join(":"),
        ))?;
        let ctr = self.world.ctr().under(RUNC);
        let run = ctr.container("erofs").with(&["--env", "PATH=/bin", "--rootfs", &self.at("m/root")]);
        let walked = run.run(&["/bin/busybox", "sh", "-c", WALK]);
        host::remove_runcs_parent();
        shell(&format!("cd {}; umount m/root {}; rm -r m", self.at(""), places.join(" ")))?;
        Ok(walked?.success()?.text())
    }
}

impl Drop for Layers<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// What loop devices the host has.
fn loops() -> String {
    shell("cat /sys/block/loop*/loop/backing_file 2>/dev/null || true").unwrap_or_default()
}

fn with_layers(test: impl FnOnce(&Layers) -> Result<()>) {
    case(|world| {
        if !world.stage().is_rvm() {
            return Ok(());
        }
        let layers = Layers::new(world)?;
        let before = loops();
        test(&layers)?;
        ensure!(loops() == before, "{before}then {}", loops());
        Ok(())
    });
}

fn same(expected: &str, found: &str) -> Result<()> {
    let different: Vec<_> = expected.lines().zip(found.lines()).filter(|(a, b)| a != b).take(5).collect();
    ensure!(found == expected && found.lines().count() > 50, "under runc and rvm: {different:?}");
    Ok(())
}

/// Five layers of which four are memory of the guest's and one a disk, with writes to a scratch, and to the host.
#[test]
fn five_layers_are_what_the_host_makes_of_them() {
    with_layers(|layers| {
        let expected = layers.under_runc(&[5, 4, 3, 2, 1])?;
        let mounts = || {
            let mut mounts: Vec<_> = [5, 4, 3, 2, 1].map(|number| layers.erofs(number)).into();
            mounts.push(layers.on_host("lowerdir={{ overlay 0 4 }}"));
            mounts
        };
        same(&expected, &layers.run(mounts(), "", WALK)?)?;
        ensure!(
            Path::new(&layers.at("9/rvm-scratch.ext4")).exists(),
            "the scratch is not beside the snapshot"
        );
        let left = shell(&format!("ls -A {}", layers.at("9/fs")))?;
        ensure!(left.is_empty(), "{left}");

        let script =
            format!("{WALK}; echo more > /data/new; rm /data/top; rm -r /data/opaque; mkdir /data/opaque");
        same(&expected, &layers.run(mounts(), "host", &script)?)?;
        let upper =
            shell(&format!("cd {}; find data | sort; stat -c '%F %t:%T' data/top", layers.at("9/fs")))?;
        ensure!(upper == "data\ndata/new\ndata/opaque\ndata/top\ncharacter special file 0:0\n", "{upper}");

        // What is there already is what the next one finds, in whatever mode.
        let found = layers.run(mounts(), "", "cat /data/new; ls /data/top /data/opaque; cat /data/low")?;
        ensure!(found == "more\nls: /data/top: No such file or directory\n/data/opaque:\nlow\n", "{found}");
        Ok(())
    });
}

/// A disk that containerd names is made, filled, found again, and what its snapshotter commits.
#[test]
fn what_is_written_is_on_containerds_disk() {
    with_layers(|layers| {
        let expected = layers.under_runc(&[1])?;
        same(
            &expected,
            &layers.run(layers.on_disk(&[1]), "", &format!("{WALK}; echo kept > /data/new; rm /data/low"))?,
        )?;
        let script = "cat /data/new; ls /data/low; mib=$(($(stat -f -c %b /) * $(stat -f -c %S /) >> 20)); [ $mib -gt 12 -a $mib -le 24 ] && echo sized
            dd if=/dev/zero of=/data/all bs=1M 2>&1 | grep -o 'No space left'; rm /data/all; echo two > /data/two";
        let found = layers.run(layers.on_disk(&[1]), "host", script)?;
        ensure!(found == "kept\nls: /data/low: No such file or directory\nsized\nNo space left\n", "{found}");
        let disk = shell(&format!(
            "cd {}; mkdir m; mount -o ro,loop,noload 9/rwlayer.img m; (cd m/upper; find data | sort; cat data/new data/two
            stat -c '%F %t:%T' data/low; stat -c %a .); umount m; rmdir m; ls -A 9/fs; stat -c '%s %a' 9/rwlayer.img",
            layers.at("")
        ))?;
        let committed =
            "data\ndata/low\ndata/new\ndata/two\nkept\ntwo\ncharacter special file 0:0\n755\n25165824 600\n";
        ensure!(disk == committed, "{disk}");
        Ok(())
    });
}

/// What has no writable layer is read-only; a file may name others (`device=`); the rest of many layers are files.
#[test]
fn layers_that_are_looked_at_and_files_that_name_others() {
    with_layers(|layers| {
        shell(&format!(
            "cd {}; mkdir 8; truncate -s 64M 8/blob; mkfs.erofs --quiet --chunksize=4096 --blobdev=8/blob 8/fsmeta.erofs t/1",
            layers.at("")
        ))?;
        let device = format!("device={}", layers.at("8/blob"));
        let merged = || mount("erofs", layers.at("8/fsmeta.erofs"), &["ro", "loop", &device]);
        let script = "sha256sum /bin/busybox /data/setuid; echo x > /data/new";
        let expected = shell(&format!("cd {}; sha256sum bin/busybox data/setuid", layers.at("t/1")))?;
        let expected = expected.replace("bin/", "/bin/").replace("data/", "/data/");
        let found = layers.run(vec![merged()], "", &format!("{script} || true"))?;
        ensure!(found.starts_with(&expected) && found.contains("Read-only file system"), "{found}");

        // Ten files are two more than a machine has devices for.
        let mut mounts: Vec<_> = [5, 4, 3, 2, 1].map(|number| layers.erofs(number)).into();
        shell(&format!(
            "cd {}; for n in 11 12 13 14; do mkdir $n; mkdir -p t/$n/data; echo $n > t/$n/data/$n; mkfs.erofs --quiet $n/layer.erofs t/$n; done",
            layers.at("")
        ))?;
        mounts.extend([11, 12, 13, 14].map(|number| layers.erofs(number)));
        mounts.push(merged());
        mounts.push(layers.on_host("lowerdir={{ overlay 0 9 }}"));
        let script = "cat /data/11 /data/14 /data/top; sha256sum /bin/busybox; ls /data | wc -l; \
                      sed -n 's/.* overlay .*lowerdir=\\([^,]*\\).*/\\1/p' /proc/self/mounts | tr : '\\n' | wc -l";
        let found = layers.run(mounts, "", script)?;
        let busybox = expected.lines().next().unwrap_or_default();
        ensure!(
            found.starts_with(&format!("11\n14\ntop\n{busybox}\n")) && found.ends_with("\n10\n"),
            "{found}"
        );
        Ok(())
    });
}

/// dm-verity: what is read is what the root hash says, or an error; of layers that are devices and of those that are
/// files in the share.
#[test]
fn layers_are_checked_as_they_are_read() {
    with_layers(|layers| {
        let at = |path: &str| layers.at(path);
        // As containerd's differ does it: the hashes are behind the file system.
        shell(&format!(
            "cd {}; for n in 11 12 13 14 15; do mkdir $n; mkdir -p t/$n/data; echo $n > t/$n/data/$n; mkfs.erofs --quiet $n/layer.erofs t/$n; done
            for n in 1 2 3 4 5 11 12 13 14 15; do f=$n/layer.erofs; truncate -s %4096 $f; size=$(stat -c %s $f)
            root=$(veritysetup format --data-blocks=$((size / 4096)) --hash-offset=$size $f $f | sed -n 's/^Root hash:[ \t]*//p')
            printf '{{\"roothash\": \"%s\", \"hashoffset\": %s}}' $root $size > $f.dmverity; done",
            at("")
        ))?;
        let checked = |number: u32| {
            let metadata = at(&format!("{number}/layer.erofs.dmverity"));
            mount(
                "erofs",
                at(&format!("{number}/layer.erofs")),
                &["ro", "loop", &format!("X-containerd.dmverity={metadata}")],
            )
        };
        let over = |numbers: &[u32]| {
            let mut mounts: Vec<_> = numbers.iter().map(|&number| checked(number)).collect();
            let last = mounts.len() - 1;
            mounts.push(layers.on_host(&format!("lowerdir={{{{ overlay 0 {last} }}}}")));
            mounts
        };
        same(&layers.under_runc(&[5, 4, 3, 2, 1])?, &layers.run(over(&[5, 4, 3, 2, 1]), "", WALK)?)?;
        let many = [15, 14, 13, 12, 11, 5, 4, 3, 2, 1];
        let script =
            "cat /data/11 /data/15 /data/top; cut -d' ' -f1 /proc/self/mounts | grep -c ^/dev/dm- || true";
        let found = layers.run(over(&many), "", script)?;
        ensure!(found == "11\n15\ntop\n0\n", "{found}");

        // The middle of what is nearly all of that layer.
        let large = std::fs::File::options().write(true).open(at("4/layer.erofs"))?;
        large.write_all_at(b"changed", large.metadata()?.len() / 2)?;
        let script = "cat /data/large > /dev/null && echo read; cat /data/low /data/top";
        let found = layers.run(over(&[5, 4, 3, 2, 1]), "", script)?;
        ensure!(found == "cat: read error: Input/output error\nlow\ntop\n", "{found}");

        let refused = |writes: &str, mounts: Vec<Mount>, expected: &str| -> Result<()> {
            let shim = layers.shim(writes, "true")?;
            let answer = shim.create_on(mounts, None);
            shim.shut_down()?;
            let message = answer.err().with_context(|| format!("taken: {expected}"))?.message;
            ensure!(message.contains(expected), "{expected}\n{message}");
            println!("{message}");
            Ok(())
        };
        refused("host", over(&[2, 1]), "dm-verity is the guest's")?;
        shell(&format!("cp {} {}", at("1/layer.erofs.dmverity"), at("2/layer.erofs.dmverity")))?;
        refused("", over(&[2, 1]), "rootfs[0].options: ")?;
        shell(&format!(
            "cd {}; sed -i 's/roothash\": \"..../roothash\": \"0000/' 1/layer.erofs.dmverity",
            at("")
        ))?;
        refused("", vec![checked(1)], &format!("rootfs[0].source: {}: ", at("1/layer.erofs")))
    });
}

/// Containers of a sandbox have one device of a layer, whoever comes first and goes last.
#[test]
fn containers_of_a_sandbox_have_a_layer_once() {
    const DISKS: &str = "tail -n +3 /proc/partitions | wc -l > /tmp/out; cat /data/low >> /tmp/out";
    with_layers(|layers| {
        let on = |numbers: &[u32], own: u32| -> Result<Vec<Mount>> {
            let dir = layers.at(&own.to_string());
            shell(&format!("mkdir -p {dir}/fs {dir}/work"))?;
            let mut mounts: Vec<_> = numbers.iter().map(|&number| layers.erofs(number)).collect();
            let lower = match numbers.len() {
                1 => "lowerdir={{ mount 0 }}".to_owned(),
                count => format!("lowerdir={{{{ overlay 0 {} }}}}", count - 1),
            };
            let (work, upper) = (format!("workdir={dir}/work"), format!("upperdir={dir}/fs"));
            mounts.push(mount("format/mkdir/overlay", "overlay", &[&work, &upper, &lower]));
            Ok(mounts)
        };
        sandbox_api::with_network(|| {
            let shim = PodShim::start(layers.world, "pod")?;
            let ran = (|| {
                shim.create(NETWORK, None).map_err(said)?;
                shim.start_sandbox().map_err(said)?;
                let disks_of = |id: &str| -> Result<i32> {
                    let text = shim.output(id)?;
                    let (disks, low) = text.split_once('\n').context("lines")?;
                    ensure!(low == "low\n", "{text}");
                    Ok(disks.parse()?)
                };
                let run =
                    |id: &str, mounts, script: &str| shim.run_on(layers.world, id, mounts, script, |_| {});
                run("first", on(&[5, 4, 3, 2, 1], 9)?, &format!("{DISKS}; exec sleep 54321"))?;
                run("second", on(&[4, 2, 1], 10)?, DISKS)?;
                // Five layers, and a scratch each.
                let both = disks_of("second")?;
                run("third", on(&[3, 1], 11)?, &format!("{DISKS}; exec sleep 54321"))?;
                let kill = KillRequest { id: "first".into(), signal: 9, all: true, ..Default::default() };
                shim.ask_task("Kill", &kill).map_err(said)?;
                ensure!(shim.exit("first")? == 137, "it ends by itself");
                shim.delete("first")?;
                run("fourth", on(&[1], 12)?, DISKS)?;
                // Two layers are the third's still, of which the fourth has one.
                let after = disks_of("fourth")?;
                ensure!((both, after) == (5 + 2, 2 + 2), "{both} disks, then {after}");
                Ok(())
            })();
            sandbox_api::stop(&shim).map_err(said)?;
            sandbox_api::shut_down(shim)?;
            ran
        })
    });
}

/// One error for each, which names the mount and what of it is wrong; nothing is changed, and nothing left.
#[test]
fn what_is_wrong_is_told() {
    with_layers(|layers| {
        let at = |path: &str| layers.at(path);
        shell(&format!(
            "cd {}; mkdir 6; cp 1/layer.erofs 6/short; truncate -s 8192 6/short; cp 1/layer.erofs 6/broken; : > 6/empty
            head -c 100000 /dev/zero > 6/zeroes; mkfifo 6/fifo",
            at("")
        ))?;
        let broken = std::fs::File::options().write(true).open(at("6/broken"))?;
        // A feature that no kernel knows.
        broken.write_all_at(&[0xff; 4], 1024 + 80)?;
        let erofs = |path: &str| vec![mount("erofs", at(path), &["ro", "loop"])];
        let verity = format!("X-containerd.dmverity={}", at("1/layer.erofs.dmverity"));
        let device = format!("device={}", at("6/nowhere"));
        let mut disk = layers.on_disk(&[1]);
        disk[0].source = at("6/zeroes");
        let mut nowhere = layers.on_disk(&[1]);
        nowhere[0].source = at("nowhere/rwlayer.img");
        let cases = [
            (
                vec![layers.erofs(1), layers.on_host("lowerdir={{ mount 7 }}")],
                "rootfs[1].options: \"{{ mount 7 }}\": 7 must be below 1".to_owned(),
            ),
            (
                vec![mount("mkfs/mkdir/fuse", at("x"), &[])],
                "rootfs[0].type: \"fuse\": the last mount must be".into(),
            ),
            (
                vec![mount("erofs", at("1/layer.erofs"), &["ro", "loop", &verity])],
                format!(
                    "rootfs[0].options: {}: dm-verity: No such file or directory",
                    at("1/layer.erofs.dmverity")
                ),
            ),
            (erofs("6/nowhere"), format!("rootfs[0].source: {}: No such file or directory", at("6/nowhere"))),
            (erofs("6"), format!("rootfs[0].source: {}: must be a regular file", at("6"))),
            (erofs("6/fifo"), format!("rootfs[0].source: {}: must be a regular file", at("6/fifo"))),
            (erofs("6/empty"), format!("rootfs[0].source: {}: is empty", at("6/empty"))),
            (
                erofs("6/zeroes"),
                format!("rootfs[0].source: {}: is no whole EROFS file system", at("6/zeroes")),
            ),
            (erofs("6/short"), format!("rootfs[0].source: {}: is no whole EROFS file system", at("6/short"))),
            (
                vec![mount("erofs", at("1/layer.erofs"), &["loop", &device])],
                format!("rootfs[0].options: {}: device=: No such file", at("6/nowhere")),
            ),
            (disk, format!("rootfs[0].source: {}: is no ext4 file system", at("6/zeroes"))),
            (nowhere, format!("rootfs[0].source: {}: scratch: ", at("nowhere/rwlayer.img"))),
            (erofs("6/broken"), format!("rootfs[0].source: {}: ", at("6/broken"))),
        ];
        let before = shell(&format!(
            "cd {}; find . -type f | sort; sha256sum 6/broken 6/zeroes 1/layer.erofs",
            at("")
        ))?;
        for (mounts, expected) in cases {
            let shim = layers.shim("", "true")?;
            let answer = shim.create_on(mounts, None);
            shim.shut_down()?;
            let status = answer.err().with_context(|| format!("taken: {expected}"))?;
            ensure!(status.message.starts_with(&expected), "{expected}\n{}", status.message);
            ensure!(status.code() == Code::INVALID_ARGUMENT, "{status:?}");
            println!("{}", status.message);
        }
        let after = shell(&format!(
            "cd {}; find . -type f | grep -v rvm-scratch | sort; sha256sum 6/broken 6/zeroes 1/layer.erofs",
            at("")
        ))?;
        ensure!(after == before, "{before}then\n{after}");
        Ok(())
    });
}
