//! Pods with a user namespace (`hostUsers: false`), under rvm alone: containerd 2.x idmaps their layers and volumes, and
//! asks for a runc that knows how, which this Debian's is too old for. What is seen is said here instead.

use std::os::unix::fs::{MetadataExt, chown};

use anyhow::{Result, ensure};
use k8s_cri::v1::{IdMapping, NamespaceMode, PodSandboxConfig, UserNamespace};
use rvm_tests::{
    case_with,
    cri::{
        Container, Cri, Pod,
        later::{More, Mount},
    },
};

use crate::{pod_volumes::Volumes, pods::with_namespaces};

const SLEEP: [&str; 2] = ["sleep", "100000"];

/// As kubelet has it: a range of the pod's own.
fn ids() -> Vec<IdMapping> {
    vec![IdMapping { host_id: 100_000, container_id: 0, length: 65536 }]
}

fn mapped(config: &mut PodSandboxConfig) {
    with_namespaces(config, |options| {
        options.userns_options =
            Some(UserNamespace { mode: NamespaceMode::Pod.into(), uids: ids(), gids: ids() });
    });
}

#[test]
fn users_of_a_pod_are_its_own() {
    case_with(Cri::prepare, |world| {
        let tried = Cri::compare(world, |cri| {
            let can = cri.is_rvm() && cri.containerd_major()? >= 2;
            if can {
                users(cri)?;
                users_and_processes(cri)?;
            }
            Ok(can)
        })?;
        println!("{tried:?}");
        Ok(())
    });
}

/// With `shareProcessNamespace`.
fn users_and_processes(cri: &Cri) -> Result<()> {
    let pod = Pod::run(cri, "processes", |config| {
        mapped(config);
        with_namespaces(config, |options| options.pid = NamespaceMode::Pod.into());
    })?;
    let one = pod.start("one", &["sleep", "11111"], |_| ())?;
    let two = pod.start("two", &["sleep", "22222"], |_| ())?;
    let seen = two.sh("id -u; ps | grep -c '[s]leep 11111'; tr '\\0' ' ' < /proc/1/cmdline")?;
    ensure!(seen.starts_with("0\n1\n") && !seen.contains("22222"), "{seen:?}");
    two.sh("kill -9 $(ps | grep '[s]leep 11111' | awk '{print $1}')")?;
    let ended = one.ended()?;
    ensure!(ended.exit_code == 137, "{ended:?}");
    pod.remove()
}

fn users(cri: &Cri) -> Result<()> {
    let volumes = Volumes::new("users")?;
    let pod = Pod::run(cri, "users", mapped)?;
    let (claim, memory) = (volumes.disk("csi", "claim")?, volumes.memory("scratch")?);
    std::fs::write(claim.join("file"), "seven\n")?;
    chown(claim.join("file"), Some(7), Some(8))?;
    let mount = |path: &str, source: &std::path::Path| Mount {
        container_path: path.into(),
        host_path: source.to_string_lossy().into_owned(),
        uid_mappings: ids(),
        gid_mappings: ids(),
        ..Default::default()
    };
    let start = |name: &str| -> Result<Container<'_>> {
        let mounts = vec![mount("/claim", &claim), mount("/scratch", &memory)];
        let container = pod.create_with(name, &SLEEP, More { mounts, ..Default::default() }, |_| ())?;
        container.start()?;
        Ok(container)
    };
    let is = |container: &Container<'_>, script: &str, wanted: &str| -> Result<()> {
        let said = container.sh(script)?;
        ensure!(said == wanted, "{script}: {said:?}, not {wanted:?}");
        Ok(())
    };
    let (one, two) = (start("one")?, start("two")?);
    for container in [&one, &two] {
        is(
            container,
            "tr -s ' ' < /proc/self/uid_map; tr -s ' ' < /proc/self/gid_map",
            " 0 100000 65536\n 0 100000 65536\n",
        )?;
        is(
            container,
            "id -u; stat -c '%n %u %g' / /bin /bin/busybox /etc /dev /dev/null",
            "0\n/ 0 0\n/bin 0 0\n/bin/busybox 0 0\n/etc 0 0\n/dev 0 0\n/dev/null 65534 65534\n",
        )?;
        is(container, "echo x > /f; chown 5:6 /f; stat -c '%u %g' /f", "5 6\n")?;
        is(container, "chown 70000 /f 2> /dev/null || echo nobody", "nobody\n")?;
        is(container, "stat -c '%u %g' /claim /claim/file; cat /claim/file", "0 0\n7 8\nseven\n")?;
        is(container, "stat -c '%u %g' /scratch; stat -f -c %T /scratch", "0 0\ntmpfs\n")?;
    }
    let namespaces = "for n in user net ipc uts; do readlink /proc/self/ns/$n; done";
    is(&two, namespaces, &one.sh(namespaces)?)?;
    one.sh("cd /claim; echo of root > new; echo of nine > nine; chown 9:10 nine; cp -a * /scratch")?;
    for place in ["/claim", "/scratch"] {
        is(
            &two,
            &format!("cd {place}; stat -c '%n %u %g' new nine; cat new"),
            "new 0 0\nnine 9 10\nof root\n",
        )?;
    }
    for (name, owner) in [("new", (0, 0)), ("nine", (9, 10))] {
        let found = claim.join(name).metadata()?;
        ensure!((found.uid(), found.gid()) == owner, "{name} on the host: {}:{}", found.uid(), found.gid());
    }
    is(&one, "ip -o -4 addr show dev eth0 | wc -l", "1\n")?;
    is(
        &one,
        "(echo served | nc -l -p 80 > /dev/null) & until echo | nc 127.0.0.1 80; do :; done 2> /dev/null",
        "served\n",
    )?;
    is(
        &one,
        "hostname; echo x > /dev/shm/x; mount -t tmpfs none /mnt 2> /dev/null || echo no mount",
        "users\nno mount\n",
    )?;
    one.stop(1)?;
    one.remove()?;
    let again = start("again")?;
    is(&again, "stat -c '%n %u %g' / /claim/nine /dev/shm/x", "/ 0 0\n/claim/nine 9 10\n/dev/shm/x 0 0\n")?;
    pod.remove()
}
