//! What CRI-O asks of a shim with `runtime_type = "vm"` (`internal/oci/runtime_vm.go`), call by call: Debian has no
//! CRI-O to run it with. It gives no address and takes no events, mounts the root file system itself, runs `start` for
//! every container of a pod, and has made the pod's namespaces before any of them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    bare::Bare,
    bundle, case,
    pod_shim::said,
    sandbox::Sandbox,
    world::{World, shell},
};
use serde_json::{Value, json};

/// What CRI-O has of a pod on the host: namespaces at paths, the pod's `/dev/shm`, root file systems.
struct Pod {
    dir: PathBuf,
    id: &'static str,
}

impl Pod {
    fn new(world: &World, id: &'static str) -> Result<Self> {
        let pod = Self { dir: world.dir().join("crio"), id };
        let dir = pod.dir.display();
        // `pinns` keeps each at a file of its own.
        shell(&format!(
            "mkdir -p {dir}; mount --bind {dir} {dir}; mount --make-private {dir}; cd {dir}; \
             mkdir shm; mount -t tmpfs -o size=1m,mode=1777 shm shm; touch ipc uts other; \
             unshare --ipc=ipc --uts=uts hostname of-the-pod; unshare --ipc=other true; \
             ip netns add crio; ip -n crio link set lo up"
        ))?;
        Ok(pod)
    }

    /// A specification as CRI-O writes it for a container, its root file system an overlay that is mounted.
    fn spec(&self, world: &World, id: &str, script: &str) -> Result<Value> {
        let dir = self.dir.join(id);
        let (root, lower) = (dir.join("merged"), world.rootfs()?);
        shell(&format!(
            "mkdir -p {dir}/merged {dir}/diff {dir}/work; \
             mount -t overlay -o lowerdir={lower},upperdir={dir}/diff,workdir={dir}/work overlay {dir}/merged",
            dir = dir.display(),
            lower = lower.display()
        ))?;
        let mut spec = bundle::spec(&root, &["sh", "-c", script]);
        let kind = if id == self.id { "sandbox" } else { "container" };
        spec["hostname"] = "of-the-pod".into();
        spec["annotations"] = json!({
            "io.kubernetes.cri-o.ContainerType": kind,
            "io.kubernetes.cri-o.SandboxID": self.id,
            "io.kubernetes.cri-o.ContainerID": id,
        });
        let at = |name: &str| self.dir.join(name);
        spec["linux"]["namespaces"] = json!([
            {"type": "pid"}, {"type": "mount"},
            {"type": "ipc", "path": at("ipc")},
            {"type": "uts", "path": at("uts")},
            {"type": "network", "path": "/run/netns/crio"},
        ]);
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.push(json!({"destination": "/dev/shm", "type": "bind", "source": at("shm"), "options": ["rw", "bind"]}));
        }
        Ok(spec)
    }

    /// What a container has written to a file.
    fn written(&self, id: &str, file: &str) -> Result<String> {
        let path = self.dir.join(id).join("merged").join(file);
        std::fs::read_to_string(&path).with_context(|| path.display().to_string())
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let dir = self.dir.display();
        let removed = shell(&format!(
            "ip netns delete crio; umount /run/netns; rmdir /run/netns; cd /; umount {dir}/*/merged || true; \
             umount {dir}/shm {dir}/ipc {dir}/uts {dir}/other; umount {dir}; rm -r {dir}"
        ));
        if let Err(error) = removed {
            println!("{error:#}");
        }
    }
}

fn member(world: &World, pod: &Pod, first: &Bare, id: &str, script: &str) -> Result<Bare> {
    let mut spec = pod.spec(world, id, script)?;
    // What it writes is looked at on the host.
    spec["annotations"]["io.rvm.writes"] = "host".into();
    let member = Bare::start(world, "", id, &spec)?;
    ensure!(member.address() == first.address(), "{} is not {}", member.address(), first.address());
    Ok(member)
}

#[test]
fn a_pod_as_cri_o_makes_it() {
    case(|world| {
        let pod = Pod::new(world, "crio-pod")?;
        let first = Bare::start(world, "", "crio-pod", &pod.spec(world, "crio-pod", "sleep 100000")?)?;
        first.create(None).map_err(said)?;
        first.start_task().map_err(said)?;
        let sandbox = Sandbox::find(world.stage(), "crio-pod")?;

        let look = "hostname; for kind in ipc uts net; do readlink /proc/self/ns/$kind; done";
        let writes = member(
            world,
            &pod,
            &first,
            "writes",
            &format!("echo shared > /dev/shm/file; ({look}) > /out; exit 3"),
        )?;
        writes.create(None).map_err(said)?;
        writes.start_task().map_err(said)?;
        ensure!(writes.wait()? == 3);
        writes.delete_task()?;
        let reads = member(world, &pod, &first, "reads", &format!("({look}; cat /dev/shm/file) > /out"))?;
        reads.create(None).map_err(said)?;
        reads.start_task().map_err(said)?;
        ensure!(reads.wait()? == 0);
        reads.delete_task()?;
        let seen = pod.written("writes", "out")?;
        ensure!(pod.written("reads", "out")? == format!("{seen}shared\n"), "{seen}");
        ensure!(seen.starts_with("of-the-pod\n") && seen.lines().count() == 4, "{seen}");

        // Another's namespaces are not the pod's, and the host's are not a pod's.
        for (place, path, why) in [
            (2, pod.dir.join("other").as_path(), "is not the namespace that the pod was made with"),
            (3, Path::new("/proc/self/ns/uts"), "is not the namespace that the pod was made with"),
        ] {
            let mut spec = pod.spec(world, "wrong", "true")?;
            spec["linux"]["namespaces"][place]["path"] = json!(path);
            let wrong = Bare::start(world, "", "wrong", &spec)?;
            let refused = wrong.create(None).err().context("it is created")?;
            let field = format!("linux.namespaces[{place}].path: not supported");
            ensure!(refused.message.contains(why) && refused.message.contains(&field), "{refused:?}");
            shell(&format!("umount {}/wrong/merged", pod.dir.display()))?;
        }
        shell(&format!("rm -r {}/wrong", pod.dir.display()))?;

        first.end_task()?;
        // The other bundles are beside its own.
        first.shut_down()?;
        sandbox.wait_until_gone(rvm_tests::scale::container())?;
        Ok(())
    });
}

#[test]
fn the_hosts_namespaces_make_no_pod() {
    case(|world| {
        let pod = Pod::new(world, "crio-host")?;
        let mut spec = pod.spec(world, "crio-host", "true")?;
        spec["linux"]["namespaces"][2]["path"] = "/proc/1/ns/ipc".into();
        let first = Bare::start(world, "", "crio-host", &spec)?;
        let refused = first.create(None).err().context("it is created")?;
        ensure!(refused.message.contains("linux.namespaces[2].path: not supported"), "{refused:?}");
        first.shut_down()?;
        Ok(())
    });
}
