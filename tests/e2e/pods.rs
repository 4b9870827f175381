//! Pods by containerd's CRI plugin, each under runc and under rvm: what is seen has to be the same.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use k8s_cri::v1::{
    ContainerConfig, ContainerState, ContainerStats, DnsConfig, LinuxContainerResources, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxState,
};
use rvm_tests::{
    case_with,
    cri::{Container, Cri, Pod},
    scale,
    world::shell,
};

/// What was seen, line by line.
#[derive(Default)]
pub struct Seen(Vec<String>);

impl Seen {
    pub fn add(&mut self, what: &str, value: impl std::fmt::Debug) {
        self.0.push(format!("{what}: {value:?}"));
    }
}

/// Runs `act` with pods under every handler, and compares what it saw.
pub fn same(act: impl Fn(&Cri, &mut Seen) -> Result<()>) {
    case_with(Cri::prepare, |world| {
        let all = Cri::compare(world, |cri| {
            let mut seen = Seen::default();
            act(cri, &mut seen)?;
            Ok(seen.0)
        })?;
        let ((_, runc), others) = all.split_first().context("nothing ran")?;
        for (handler, lines) in others {
            for (runc, line) in runc.iter().zip(lines) {
                println!("{handler}: {} {line}", if runc == line { "same" } else { "runc" });
                ensure!(runc == line, "under runc:\n{runc}\nunder {handler}:\n{line}");
            }
            ensure!(
                runc.len() == lines.len() && !runc.is_empty(),
                "{} things seen and {}",
                runc.len(),
                lines.len()
            );
            // All that is not equal has failed by now.
            println!("{} equal, 0 intended, 0 wrong", lines.len());
        }
        Ok(())
    });
}

pub fn plain(_: &mut PodSandboxConfig) {}

/// A container with these limits.
pub fn limited(resources: LinuxContainerResources) -> impl FnOnce(&mut ContainerConfig) {
    move |config| {
        if let Some(linux) = config.linux.as_mut() {
            linux.resources = Some(resources);
        }
    }
}

pub fn memory(mib: i64) -> LinuxContainerResources {
    LinuxContainerResources { memory_limit_in_bytes: mib << 20, ..Default::default() }
}

/// A pod whose namespaces `edit` changes.
pub fn with_namespaces(config: &mut PodSandboxConfig, edit: impl FnOnce(&mut NamespaceOption)) {
    let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    if let Some(options) = security.and_then(|security| security.namespace_options.as_mut()) {
        edit(options);
    }
}

#[test]
fn containers_of_a_pod_share_what_pods_share() {
    same(|cri, seen| {
        let pod = Pod::run(cri, "shared", |config| {
            config.dns_config = Some(DnsConfig {
                servers: vec!["192.0.2.53".into()],
                searches: vec!["svc.cluster.local".into()],
                options: vec!["ndots:5".into()],
            });
        })?;
        let status = pod.status()?;
        seen.add("state", status.state());
        seen.add("handler", status.runtime_handler == cri.handler());
        let address = status.network.context("no network")?.ip;
        seen.add("address", address.starts_with("10.85.0."));

        let init = pod.start("init", &["sh", "-c", "echo from init; echo wrong >&2; exit 3"], |_| {})?;
        let ended = init.ended()?;
        // CRI notes the start once it is answered, by when the container may have ended: of the two, neither is always first.
        let noted = ended.started_at > 0 && ended.finished_at > 0;
        seen.add("init", (ended.exit_code, &ended.reason, noted));
        let mut log: Vec<_> = init.log()?.lines().map(str::to_owned).collect();
        log.sort();
        seen.add("its log", log);

        let sleeping = ["sh", "-c", "echo started; exec sleep 100000"];
        let (one, two) = (pod.start("one", &sleeping, |_| {})?, pod.start("two", &sleeping, |_| {})?);
        seen.add("log", one.printed("started")?);
        seen.add("exec", one.exec(&["sh", "-c", "echo hi; echo no >&2; exit 7"])?);
        for (what, script) in [
            ("hostname", "hostname; cat /etc/hostname"),
            ("resolv.conf", "cat /etc/resolv.conf"),
            ("hosts", "grep -c localhost /etc/hosts"),
            ("pid 1", "tr '\\0' ' ' < /proc/1/cmdline"),
            (
                "processes",
                "for process in /proc/[0-9]*; do tr '\\0' ' ' < $process/cmdline | grep sleep; done",
            ),
            ("links", "ls /sys/class/net"),
            ("shm", "df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f 2"),
            ("environment", "env | grep -v -e HOSTNAME -e SHLVL | sort"),
        ] {
            seen.add(what, one.sh(script)?);
        }
        let own = one.sh("ip -4 -o addr show eth0 | tr -s ' ' | cut -d' ' -f 4")?;
        seen.add("own address", own.trim() == format!("{address}/24"));
        one.sh("echo of one > /dev/shm/file; nc -l -p 8080 -e cat /etc/hostname > /dev/null 2>&1 &")?;
        seen.add("shared memory", two.sh("cat /dev/shm/file")?);
        let until = Instant::now() + scale::container();
        let hello = loop {
            let answer = two.exec(&["sh", "-c", "nc 127.0.0.1 8080 < /dev/null"])?;
            if answer.code == 0 || Instant::now() > until {
                break answer;
            }
        };
        seen.add("by the loopback", hello);
        let space =
            |container: &Container<'_>, kind: &str| container.sh(&format!("readlink /proc/self/ns/{kind}"));
        for kind in ["net", "ipc", "uts", "pid", "mnt", "cgroup"] {
            seen.add(kind, space(&one, kind)? == space(&two, kind)?);
        }

        one.stop(1)?;
        let ended = one.ended()?;
        seen.add("stopped", (ended.exit_code, &ended.reason));
        one.remove()?;
        seen.add("two", two.status()?.state() == ContainerState::ContainerRunning);
        seen.add("pod", pod.status()?.state() == PodSandboxState::SandboxReady);
        pod.remove()
    });
}

#[test]
fn a_pod_with_one_process_namespace() {
    same(|cri, seen| {
        let pod = Pod::run(cri, "processes", |config| {
            with_namespaces(config, |options| options.pid = NamespaceMode::Pod.into());
        })?;
        let one = pod.start("one", &["sleep", "11111"], |_| {})?;
        let two = pod.start("two", &["sleep", "22222"], |_| {})?;
        seen.add("others are seen", two.sh("ps | grep -c '[s]leep 11111'")?);
        seen.add("and killed", two.sh("kill -9 $(ps | grep '[s]leep 11111' | awk '{print $1}')")?);
        let ended = one.ended()?;
        seen.add("how it ended", (ended.exit_code, ended.reason));
        seen.add("the other", two.status()?.state() == ContainerState::ContainerRunning);
        seen.add("no pid of its own", two.sh("tr '\\0' ' ' < /proc/1/cmdline")? != "sleep 22222 ");
        pod.remove()
    });
}

#[test]
fn limits_are_a_containers() {
    same(|cri, seen| {
        let pod = Pod::run(cri, "limits", plain)?;
        let one = pod.start(
            "one",
            &["sleep", "100000"],
            limited(LinuxContainerResources {
                cpu_period: 100_000,
                cpu_quota: 50_000,
                cpu_shares: 512,
                oom_score_adj: 900,
                ..memory(64)
            }),
        )?;
        for file in ["cpu.max", "memory.max"] {
            seen.add(file, one.sh(&format!("cat /sys/fs/cgroup/{file}"))?);
        }
        seen.add("score", one.sh("cat /proc/1/oom_score_adj")?);
        let eats =
            pod.start("eats", &["sh", "-c", "x=x; while true; do x=$x$x; done"], limited(memory(32)))?;
        let ended = eats.ended()?;
        seen.add("out of memory", (ended.exit_code, ended.reason));
        seen.add("the other", one.status()?.state() == ContainerState::ContainerRunning);
        seen.add("answers", one.exec(&["echo", "here"])?);
        pod.remove()
    });
}

/// `podPidsLimit` is a limit of the pod's cgroup, which kubelet has made.
#[test]
fn a_pods_processes_have_a_limit_together() {
    const SPAWN: &str =
        "n=0; while [ $n -lt $1 ]; do sleep 100000 & n=$((n + 1)); echo $n > /tmp/n; done; wait";
    same(|cri, seen| {
        let limit = "cd /sys/fs/cgroup; echo +pids > cgroup.subtree_control; cd kubepods; \
                     echo +pids > cgroup.subtree_control; echo 60 > pod-processes/pids.max";
        let pod = Pod::run(cri, "processes", |_| drop(shell(limit)))?;
        ensure!(pod.cgroup_file("pids.max")?.trim() == "60");
        let spawn = |name, most| pod.start(name, &["sh", "-c", SPAWN, "sh", most], |_| {});
        let one = spawn("one", "20")?;
        one.sh("until [ \"$(cat /tmp/n)\" = 20 ]; do sleep 0.05; done")?;
        let two = spawn("two", "1000")?;
        let ended = two.ended()?;
        seen.add("two", (ended.exit_code, two.log()?.contains("can't fork")));
        seen.add("one", one.status()?.state() == ContainerState::ContainerRunning);
        pod.remove()
    });
}

/// What kubelet reckons its containers will use is there when the first one starts.
#[test]
fn a_pods_machine_has_at_once_what_it_will_need() {
    same(|cri, seen| {
        let pod = Pod::run(cri, "announced", |config| {
            if let Some(linux) = config.linux.as_mut() {
                linux.resources = Some(LinuxContainerResources {
                    cpu_period: 100_000,
                    cpu_quota: 50_000,
                    cpu_shares: 512,
                    ..memory(768)
                });
            }
        })?;
        let one = pod.start("one", &["sleep", "100000"], |_| {})?;
        let total = one.sh("awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo")?;
        let total: u64 = total.trim().parse().with_context(|| total.clone())?;
        // As much as was asked for, and less than with another's claim beside it.
        seen.add("memory", total >= 768);
        if cri.is_rvm() {
            ensure!((768..900).contains(&total), "{total} MiB");
        }
        let two = pod.start("two", &["sleep", "100000"], limited(memory(256)))?;
        seen.add("limit", two.sh("cat /sys/fs/cgroup/memory.max")?);
        pod.remove()
    });
}

#[test]
fn limits_change_while_it_runs_and_what_is_used_is_told() {
    same(|cri, seen| {
        // What is written is where containerd looks for it.
        let pod = Pod::run(cri, "changes", |config| {
            config.annotations.insert("io.rvm.writes".into(), "host".into());
        })?;
        let one = pod.start("one", &["sleep", "100000"], limited(memory(96)))?;
        // In place, as of Kubernetes 1.35: beyond what its machine was made for, and back.
        for mib in [640, 128] {
            one.update(LinuxContainerResources {
                cpu_period: 100_000,
                cpu_quota: 10_000 + mib * 10,
                cpu_shares: 256,
                ..memory(mib)
            })?;
            for file in ["memory.max", "cpu.max"] {
                seen.add(file, one.sh(&format!("cat /sys/fs/cgroup/{file}"))?);
            }
            if mib == 640 {
                seen.add(
                    "holds it",
                    one.sh("dd if=/dev/zero of=/dev/shm/big bs=1M count=60 2>/dev/null && echo whole")?,
                );
            }
        }
        one.sh("dd if=/dev/zero of=/written bs=1M count=8 2>/dev/null; sync")?;
        let stats = wait_for_written(&one, |mib| mib >= 8)?;
        // What cAdvisor and exporters of metrics find; what is 0 is left out of the message.
        let metrics = one.metrics()?;
        for (part, fields) in [
            ("pids", &["current", "limit"][..]),
            ("cpu", &["usage_usec", "user_usec", "system_usec", "nr_periods", "psi"]),
            (
                "memory",
                &["usage", "usage_limit", "swap_limit", "anon", "file", "shmem", "slab", "pgfault", "psi"],
            ),
            ("io", &["psi"]),
        ] {
            for field in fields {
                seen.add(&format!("{part} {field}"), !metrics[part][field].is_null());
            }
        }
        seen.add("memory's limit", metrics["memory"]["usage_limit"].to_string());
        seen.add("most processes", metrics["pids"]["limit"].to_string());
        let value = |value: Option<k8s_cri::v1::UInt64Value>| value.map_or(0, |value| value.value);
        let (layer, used) = (stats.writable_layer.unwrap_or_default(), stats.memory.unwrap_or_default());
        seen.add("written", (8..12).contains(&(value(layer.used_bytes) >> 20)));
        seen.add("memory", (60 << 20..128 << 20).contains(&value(used.working_set_bytes)));
        seen.add("processor", value(stats.cpu.unwrap_or_default().usage_core_nano_seconds) > 0);
        seen.add("name", stats.attributes.and_then(|of| of.metadata).map(|of| of.name));
        pod.remove()
    });
}

/// Waits until containerd counts so many MiB as written; it looks every ten seconds.
fn wait_for_written(container: &Container, is_enough: impl Fn(u64) -> bool) -> Result<ContainerStats> {
    let until = Instant::now() + scale::container();
    loop {
        let stats = container.stats()?;
        let written = stats.writable_layer.as_ref().and_then(|layer| layer.used_bytes);
        if is_enough(written.map_or(0, |of| of.value) >> 20) || Instant::now() > until {
            return Ok(stats);
        }
        std::thread::sleep(scale::seconds(0.05));
    }
}

/// What kubelet evicts by, wherever it is written to.
#[test]
fn what_is_written_is_counted() {
    same(|cri, seen| {
        let pod = Pod::run(cri, "written", plain)?;
        let one = pod.start("one", &["sleep", "100000"], |_| {})?;
        let mut counted = |what: &str, script: &str, range: std::ops::Range<u64>| -> Result<()> {
            one.sh(script)?;
            let stats = wait_for_written(&one, |mib| range.contains(&mib))?;
            let bytes = stats.writable_layer.and_then(|layer| layer.used_bytes).map_or(0, |of| of.value);
            println!("{what}: {bytes} bytes");
            seen.add(what, range.contains(&(bytes >> 20)));
            Ok(())
        };
        counted("written", "dd if=/dev/zero of=/written bs=1M count=24 2>/dev/null; sync", 24..40)?;
        counted("removed", "rm /written; sync", 0..16)?;
        pod.remove()
    });
}

#[test]
fn a_debugger_joins_its_targets_processes() {
    same(|cri, seen| {
        let pod = Pod::run(cri, "debugged", plain)?;
        let target = pod.start("target", &["sleep", "33333"], |_| {})?;
        let other = pod.start("other", &["sleep", "44444"], |_| {})?;
        let debugger = pod.start("debugger", &["sleep", "100000"], |config| {
            let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
            if let Some(options) = security.and_then(|security| security.namespace_options.as_mut()) {
                options.pid = NamespaceMode::Target.into();
                options.target_id = target.id.clone();
            }
        })?;
        seen.add("target", debugger.sh("tr '\\0' ' ' < /proc/1/cmdline")?);
        seen.add("other", debugger.sh("ps | grep -c '[s]leep 44444' || true")?);
        seen.add("by the target", target.sh("ps | grep -c '[s]leep 100000'")?);
        debugger.stop(1)?;
        seen.add("states", [&target, &other].map(|of| of.status().map(|status| status.state() as i32).ok()));
        pod.remove()
    });
}

#[test]
fn parameters_of_a_pod_hold_in_its_containers() {
    same(|cri, seen| {
        const LOOK: &str = "cd /proc/sys; for p in net/ipv4/ip_unprivileged_port_start net/ipv4/ping_group_range \
                            kernel/shm_rmid_forced net/core/somaxconn; do echo $p $(cat $p); done";
        for (name, parameters) in [
            ("unsaid", &[][..]),
            (
                "said",
                &[
                    ("net.ipv4.ip_unprivileged_port_start", "81"),
                    ("kernel.shm_rmid_forced", "1"),
                    ("net.core.somaxconn", "99"),
                ][..],
            ),
        ] {
            let pod = Pod::run(cri, name, |config| {
                if let Some(linux) = config.linux.as_mut() {
                    linux.sysctls =
                        parameters.iter().map(|&(name, value)| (name.into(), value.into())).collect();
                }
            })?;
            for container in ["one", "two"] {
                let container = pod.start(container, &["sleep", "100000"], |_| ())?;
                seen.add(name, container.sh(LOOK)?);
            }
            pod.remove()?;
        }
        Ok(())
    });
}

/// What a pod cannot share with the host is refused by its name, and nothing is left.
#[test]
fn what_is_the_hosts_is_refused() {
    same(|cri, seen| {
        for (what, name) in [("network", "hostnetwork"), ("pid", "hostpid"), ("ipc", "hostipc")] {
            let edit = |config: &mut PodSandboxConfig| {
                if what == "network" {
                    // The host has its own name.
                    config.hostname.clear();
                }
                with_namespaces(config, |options| match what {
                    "network" => options.network = NamespaceMode::Node.into(),
                    "pid" => options.pid = NamespaceMode::Node.into(),
                    _ => options.ipc = NamespaceMode::Node.into(),
                });
            };
            // containerd 2.1.9 dies of a pod that is its shim's and has the host's network, before it asks the shim.
            let dies = what == "network" && cri.handler() == "rvm-sandbox";
            if dies {
                println!("{what}: not tried with {}", cri.handler());
            } else if cri.is_rvm() {
                let error = Pod::refused(cri, name, edit)?;
                println!("{what}: {error}");
                let field = [format!("\"{what}\" namespace"), format!("namespace_options.{what}:")];
                ensure!(field.iter().any(|field| error.contains(field)), "{what}: {error}");
            } else {
                Pod::run(cri, name, edit)?.remove()?;
            }
            seen.add(what, "as expected");
        }
        Ok(())
    });
}
