//! Volumes of pods as kubelet makes them, under runc and under rvm: what is seen has to be the same.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use k8s_cri::v1::{ContainerConfig, ImageSpec, Mount, MountPropagation};
use rvm_tests::{
    cri::{
        Container, Pod,
        later::{self, CdiDevice, More},
    },
    parity::PROBE_ENV,
    scale,
    world::{IMAGE, shell},
};
use serde_json::json;

use crate::pods::{plain, same};

/// Where kubelet keeps what pods are given.
const KUBELET: &str = "/run/rvm-tests/cri/kubelet";

/// The volumes of one pod; gone with it.
pub struct Volumes(pub PathBuf);

impl Volumes {
    pub fn new(pod: &str) -> Result<Self> {
        let dir = Path::new(KUBELET).join("pods").join(pod);
        fs::create_dir_all(&dir)?;
        Ok(Self(dir))
    }

    /// A directory where kubelet has volumes of this kind, for everybody to write to.
    pub fn dir(&self, kind: &str, name: &str) -> Result<PathBuf> {
        let dir = self.0.join("volumes").join(format!("kubernetes.io~{kind}")).join(name);
        fs::create_dir_all(&dir)?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777))?;
        Ok(dir)
    }

    /// The same with a file system of which owners can be mapped, which this kernel's tmpfs is not.
    pub fn disk(&self, kind: &str, name: &str) -> Result<PathBuf> {
        let (dir, image) = (self.dir(kind, name)?, self.0.join(format!("{name}.image")));
        shell(&format!(
            "truncate -s 32M {0}; /sbin/mkfs.ext4 -q -F {0}; mount -o loop {0} {1}; chmod 777 {1}",
            image.display(),
            dir.display()
        ))?;
        Ok(dir)
    }

    /// The same, as `emptyDir: {medium: HugePages-2Mi}`.
    pub fn huge_pages(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir("empty-dir", name)?;
        shell(&format!("mount -t hugetlbfs -o pagesize=2M,mode=777 nodev {}", dir.display()))?;
        Ok(dir)
    }

    /// The same, as `emptyDir: {medium: Memory, sizeLimit: 8Mi}`.
    pub fn memory(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir("empty-dir", name)?;
        shell(&format!("mount -t tmpfs -o size=8m,mode=777 tmpfs {}", dir.display()))?;
        Ok(dir)
    }
}

impl Drop for Volumes {
    fn drop(&mut self) {
        let dir = self.0.display();
        let removed = shell(&format!(
            "awk -v dir={dir} 'index($5, dir) == 1 {{ print $5 }}' /proc/self/mountinfo | sort -r | xargs -r umount; \
             rm -rf --one-file-system {dir}; rmdir {KUBELET}/pods {KUBELET}"
        ));
        if let Err(error) = removed {
            println!("removing {dir}: {error:#}");
        }
    }
}

pub fn mount(from: &Path, to: &str) -> Mount {
    Mount {
        container_path: to.to_owned(),
        host_path: from.to_string_lossy().into_owned(),
        ..Default::default()
    }
}

fn with(mounts: &[Mount]) -> impl FnOnce(&mut ContainerConfig) {
    let mounts = mounts.to_vec();
    move |config| config.mounts = mounts
}

/// What a script prints, as soon as it is that.
fn becomes(container: &Container<'_>, script: &str, wanted: &str) -> Result<bool> {
    let until = Instant::now() + scale::seconds(2.0);
    loop {
        if container.exec(&["sh", "-c", script])?.stdout.trim() == wanted {
            return Ok(true);
        }
        if Instant::now() > until {
            return Ok(false);
        }
    }
}

pub const SLEEP: [&str; 2] = ["sleep", "100000"];

#[test]
fn directories_are_shared_and_hold_their_limits() {
    same(|cri, seen| {
        let volumes = Volumes::new("directories")?;
        let pod = Pod::run(cri, "directories", plain)?;
        let (disk, memory) = (volumes.dir("empty-dir", "cache")?, volumes.memory("scratch")?);
        let both = [mount(&disk, "/cache"), mount(&memory, "/scratch")];
        let one = pod.start("one", &SLEEP, with(&both))?;
        let two = pod.start("two", &SLEEP, with(&both))?;
        for place in ["/cache", "/scratch"] {
            one.sh(&format!("echo of one > {place}/file; mkdir {place}/dir; ln -s file {place}/link"))?;
            seen.add("shared", two.sh(&format!("cat {place}/link; ls {place}; stat -c '%a %u %g' {place}"))?);
            two.sh(&format!("rm -r {place}/dir; echo of two >> {place}/file"))?;
            seen.add("both ways", one.sh(&format!("cat {place}/file; ls {place}"))?);
        }
        seen.add("size", one.sh("df -k /scratch | tail -1 | tr -s ' ' | cut -d' ' -f 2")?);
        seen.add("kind", one.sh("stat -f -c %T /scratch")?);
        let full = one.exec(&[
            "sh",
            "-c",
            "dd if=/dev/zero of=/scratch/big bs=1M count=9 2>&1 | grep -o 'No space.*'",
        ])?;
        seen.add("full", full);
        one.sh("rm /scratch/big")?;
        // As kubelet has a `subPath`: a directory of the volume, mounted somewhere else.
        let (sub, elsewhere) = (memory.join("sub"), volumes.0.join("volume-subpaths/scratch/three/0"));
        fs::create_dir(&sub)?;
        fs::create_dir_all(&elsewhere)?;
        shell(&format!("mount --bind {} {}", sub.display(), elsewhere.display()))?;
        let three = pod.start("three", &SLEEP, with(&[mount(&elsewhere, "/sub")]))?;
        three.sh("echo of three > /sub/file")?;
        seen.add("a directory of it", one.sh("cat /scratch/sub/file; stat -c %a /scratch/sub")?);
        // What ended is there when it comes back.
        one.stop(1)?;
        one.remove()?;
        let again = pod.start("again", &SLEEP, with(&both))?;
        seen.add("still there", again.sh("cat /cache/file /scratch/file")?);
        pod.remove()
    });
}

#[test]
fn containers_meet_in_a_volume() {
    let probe = std::env::var(PROBE_ENV).expect("`cargo xtask test` sets it");
    same(|cri, seen| {
        let volumes = Volumes::new("meeting")?;
        let pod = Pod::run(cri, "meeting", plain)?;
        let (disk, memory) = (volumes.dir("empty-dir", "cache")?, volumes.memory("scratch")?);
        let programs = volumes.dir("configmap", "programs")?;
        fs::copy(&probe, programs.join("probe"))?;
        let programs = Mount { readonly: true, ..mount(&programs, "/programs") };
        // As kubelet has a `subPath`, of which it has made the directory.
        let part = |n: u32| -> Result<PathBuf> {
            let (sub, elsewhere) = (disk.join("sub"), volumes.0.join(format!("volume-subpaths/cache/{n}/0")));
            fs::create_dir_all(&sub)?;
            fs::create_dir_all(&elsewhere)?;
            shell(&format!("mount --bind {} {}", sub.display(), elsewhere.display()))?;
            Ok(elsewhere)
        };
        let readonly = Mount { readonly: true, ..mount(&disk, "/cache") };
        let reader = pod.start("reader", &SLEEP, with(&[readonly]))?;
        let whole = [mount(&disk, "/cache"), mount(&memory, "/scratch"), programs.clone()];
        let serve = ["/programs/probe", "serve", "/cache", "/cache/sub", "/scratch"];
        let parts = [mount(&part(1)?, "/sub"), programs.clone()];
        let one = pod.start("one", &serve, with(&whole))?;
        one.printed("serving")?;
        let two = pod.start("two", &SLEEP, with(&whole))?;
        let three = pod.start("three", &SLEEP, with(&parts))?;
        for (container, place) in
            [(&two, "/cache"), (&two, "/scratch"), (&two, "/cache/sub"), (&three, "/sub")]
        {
            seen.add(place, container.exec(&["/programs/probe", "meet", place])?);
        }
        for n in 0..2 {
            one.sh(&format!("echo {n} >> /cache/log; mkdir /cache/dir{n}"))?;
            seen.add("read at once", reader.sh("cat /cache/log; ls /cache")?);
            seen.add("written to a part", three.sh(&format!("echo {n} >> /sub/log"))?);
            seen.add("and to the whole", reader.sh("cat /cache/sub/log")?);
        }
        seen.add("the reader's writing", reader.exec(&["sh", "-c", "echo > /cache/new"])?.code);
        one.stop(1)?;
        one.remove()?;
        seen.add("after the writer", reader.sh("cat /cache/log")?);
        seen.add("and another", two.sh("echo more >> /cache/log; cat /cache/log")?);
        pod.remove()
    });
}

#[test]
fn what_kubelet_changes_is_seen() {
    same(|cri, seen| {
        let volumes = Volumes::new("projected")?;
        let pod = Pod::run(cri, "projected", plain)?;
        // As kubelet's atomic writer has it: a name is a link by way of `..data`, which is put in place at once.
        let map = volumes.dir("configmap", "settings")?;
        let write = |version: &str| -> Result<()> {
            let dir = map.join(format!("..{version}"));
            fs::create_dir(&dir)?;
            fs::write(dir.join("color"), format!("{version}\n"))?;
            symlink(format!("..{version}"), map.join("..data_tmp"))?;
            Ok(fs::rename(map.join("..data_tmp"), map.join("..data"))?)
        };
        write("first")?;
        symlink("..data/color", map.join("color"))?;
        let below = volumes.dir("empty-dir", "below")?;
        let message = volumes.0.join("termination-log");
        fs::write(&message, "")?;
        let hosts = volumes.0.join("etc-hosts");
        fs::write(&hosts, "127.0.0.1 localhost\n10.85.0.99 kubelet.says\n")?;
        let sub = below.join("sub");
        fs::create_dir(&sub)?;
        fs::write(sub.join("file"), "in a subdirectory\n")?;
        let mounts = [
            Mount { readonly: true, ..mount(&map, "/etc/settings") },
            mount(&sub, "/sub"),
            mount(&sub.join("file"), "/one-file"),
            mount(&message, "/dev/termination-log"),
            mount(&hosts, "/etc/hosts"),
            Mount {
                propagation: MountPropagation::PropagationHostToContainer.into(),
                ..mount(&below, "/below")
            },
        ];
        let one = pod.start("one", &SLEEP, with(&mounts))?;
        seen.add("first", one.sh("cat /etc/settings/color; ls -a /etc/settings")?);
        write("second")?;
        fs::remove_dir_all(map.join("..first"))?;
        seen.add("second", becomes(&one, "cat /etc/settings/color", "second")?);
        seen.add("names", one.sh("ls -a /etc/settings")?);
        seen.add("read-only", one.exec(&["sh", "-c", "echo > /etc/settings/new"])?.code != 0);
        seen.add(
            "subdirectory",
            one.sh("ls /sub; cat /sub/file /one-file; echo changed > /sub/file; cat /one-file")?,
        );
        seen.add("on the host", fs::read_to_string(sub.join("file"))?);
        seen.add("hosts", one.sh("cat /etc/hosts")?);
        one.sh("echo last words > /dev/termination-log")?;
        seen.add("message", fs::read_to_string(&message)?);
        let later = below.join("later");
        fs::create_dir(&later)?;
        shell(&format!("mount -t tmpfs -o size=1m tmpfs {0}; echo mounted > {0}/file", later.display()))?;
        seen.add("mounted later", becomes(&one, "cat /below/later/file", "mounted")?);
        shell(&format!("umount {}", later.display()))?;
        seen.add("and gone", becomes(&one, "ls /below/later | wc -l", "0")?);
        pod.remove()
    });
}

/// Mounts and devices that only newer releases of containerd know.
#[test]
fn what_newer_clients_ask_for() {
    same(|cri, seen| {
        let newer = cri.containerd_major()? >= 2;
        seen.add("newer", newer);
        if !newer {
            return Ok(());
        }
        let volumes = Volumes::new("newer")?;
        let pod = Pod::run(cri, "newer", plain)?;
        let dir = volumes.dir("csi", "claim")?;
        let below = dir.join("below");
        fs::create_dir(&below)?;
        shell(&format!("mount -t tmpfs -o size=1m tmpfs {0}; echo x > {0}/file", below.display()))?;
        let cdi = Path::new("/run/cdi");
        fs::create_dir(cdi)?;
        let device = json!({
            "cdiVersion": "0.5.0", "kind": "rvm.test/thing",
            "devices": [{"name": "one", "containerEdits": {
                "env": ["THING=one"],
                "deviceNodes": [{"path": "/dev/thing", "hostPath": "/dev/zero", "permissions": "rw"}],
                "mounts": [{"hostPath": dir, "containerPath": "/thing", "options": ["rbind", "ro"]}],
                "hooks": [{"hookName": "createContainer", "path": "/bin/sh", "args": ["sh", "-c", "exit 0"]}],
            }}],
        });
        fs::write(cdi.join("thing.json"), device.to_string())?;
        let mount =
            |path: &str| later::Mount { container_path: path.into(), readonly: true, ..Default::default() };
        let image = ImageSpec { image: IMAGE.into(), ..Default::default() };
        let more = More {
            mounts: vec![
                later::Mount { host_path: dir.to_string_lossy().into_owned(), ..mount("/one") },
                later::Mount { image: Some(image), ..mount("/image") },
            ],
            cdi_devices: vec![CdiDevice { name: "rvm.test/thing=one".into() }],
        };
        let one = pod.create_with("one", &SLEEP, more, |_| ())?;
        let looked = one.start().and_then(|()| {
            for place in ["/one/new", "/one/below/new", "/thing/new", "/image/new"] {
                let code = one.exec(&["sh", "-c", &format!("echo x > {place}")])?.code;
                seen.add("written", (place, code == 0));
            }
            seen.add("read", one.sh("cat /one/below/file; ls /thing /image")?);
            seen.add("device", one.sh("echo $THING; head -c 3 /dev/thing 2> /dev/null | od -c")?);
            Ok(())
        });
        shell(&format!("umount {}; rm -r {}", below.display(), cdi.display()))?;
        looked?;
        pod.remove()
    });
}

#[test]
fn a_mount_that_is_to_reach_the_host_is_refused() {
    same(|cri, seen| {
        let volumes = Volumes::new("reaching")?;
        let pod = Pod::run(cri, "reaching", plain)?;
        let dir = volumes.dir("empty-dir", "shared")?;
        shell(&format!("mount --bind {0} {0}; mount --make-shared {0}", dir.display()))?;
        let reaching = Mount {
            propagation: MountPropagation::PropagationBidirectional.into(),
            ..mount(&dir, "/shared")
        };
        let started = pod.start("one", &SLEEP, with(&[reaching])).map(|container| container.id);
        if cri.is_rvm() {
            let error = format!("{:#}", started.err().context("it is started")?);
            ensure!(error.contains("mounts[") && error.contains("shared"), "{error}");
        } else {
            started?;
        }
        seen.add("still there", pod.start("two", &SLEEP, |_| {})?.sh("echo here")?);
        pod.remove()
    });
}
