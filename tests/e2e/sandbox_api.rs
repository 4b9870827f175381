//! containerd's Sandbox API, call by call: what a shim answers to a containerd whose sandboxer is `shim`.

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{
    api::ShutdownRequest,
    cgroups_v2::metrics::Metrics,
    protobuf::Message,
    sandbox_api::{
        PingRequest, PlatformRequest, PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse,
        ShutdownSandboxRequest, StopSandboxRequest,
    },
    ttrpc::{Code, Status},
};
use k8s_cri::v1::{
    DnsConfig, LinuxContainerResources, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode,
    NamespaceOption, PodSandboxConfig,
};
use rvm_tests::{
    case,
    pod_shim::{PodShim, said},
    sandbox::Sandbox,
    world::{World, shell},
};

pub(crate) const NETWORK: &str = "/run/netns/sandbox-api";

/// A network namespace as somebody would prepare it for a pod.
pub(crate) fn with_network(test: impl FnOnce() -> Result<()>) -> Result<()> {
    shell(
        "ip netns add sandbox-api; ip -n sandbox-api link set lo up; ip -n sandbox-api link add eth0 type dummy; \
         ip -n sandbox-api link set eth0 up; ip -n sandbox-api addr add 10.86.0.2/24 dev eth0",
    )?;
    let result = test();
    // ip(8) has made a mount of the directory.
    let removed = shell("ip netns delete sandbox-api; umount /run/netns; rmdir /run/netns");
    result.and(removed.map(drop))
}

fn config(pid: NamespaceMode) -> PodSandboxConfig {
    let namespaces = NamespaceOption { pid: pid.into(), ..Default::default() };
    PodSandboxConfig {
        hostname: "pod-of-tests".into(),
        dns_config: Some(DnsConfig { servers: vec!["192.0.2.53".into()], ..Default::default() }),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: "/sandbox-api".into(),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn is<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code) -> Result<()> {
    ensure!(answer.as_ref().is_err_and(|status| status.code() == code), "{answer:?} is not {code:?}");
    Ok(())
}

pub(crate) fn stop(shim: &PodShim) -> Result<(), Status> {
    let request = StopSandboxRequest { sandbox_id: shim.id.clone(), timeout_secs: 10, ..Default::default() };
    shim.ask("StopSandbox", &request).map(drop)
}

fn ping(shim: &PodShim) -> Result<(), Status> {
    shim.ask("PingSandbox", &PingRequest { sandbox_id: shim.id.clone(), ..Default::default() }).map(drop)
}

/// Ends the sandbox, and the shim with it.
pub(crate) fn shut_down(shim: PodShim) -> Result<()> {
    let request = ShutdownSandboxRequest { sandbox_id: shim.id.clone(), ..Default::default() };
    shim.ask("ShutdownSandbox", &request).map_err(said)?;
    shim.gone()
}

fn api(test: impl FnOnce(&World) -> Result<()>) {
    case(|world| if world.stage().is_rvm() { with_network(|| test(world)) } else { Ok(()) });
}

#[test]
fn a_sandbox_lives_without_a_container() {
    api(|world| {
        let shim = PodShim::start(world, "pod")?;
        is(shim.start_sandbox(), Code::FAILED_PRECONDITION)?;
        is(shim.status(), Code::NOT_FOUND)?;
        is(stop(&shim), Code::NOT_FOUND)?;
        is(ping(&shim), Code::NOT_FOUND)?;
        shim.create(NETWORK, Some(&config(NamespaceMode::Container))).map_err(said)?;
        is(shim.create(NETWORK, None), Code::ALREADY_EXISTS)?;
        let created = shim.status().map_err(said)?;
        ensure!(created.state == "SANDBOX_NOTREADY" && created.created_at.seconds > 0, "{created:?}");
        is(ping(&shim), Code::FAILED_PRECONDITION)?;

        let pid = shim.start_sandbox().map_err(said)?;
        is(shim.start_sandbox(), Code::FAILED_PRECONDITION)?;
        let status = shim.status().map_err(said)?;
        ensure!(status.state == "SANDBOX_READY" && status.pid == pid && pid != 0, "{status:?}");
        ensure!(
            status.info["pid"] == pid.to_string() && status.info["state"] == "SANDBOX_READY",
            "{status:?}"
        );
        ensure!(status.created_at == created.created_at, "{status:?}");
        ping(&shim).map_err(said)?;
        let platform = shim.ask("Platform", &PlatformRequest::new()).map_err(said)?;
        let platform = PlatformResponse::parse_from_bytes(&platform)?.platform;
        ensure!((&*platform.os, &*platform.architecture) == ("linux", "amd64"), "{platform:?}");
        let request = SandboxMetricsRequest { sandbox_id: "pod".into(), ..Default::default() };
        let metrics =
            SandboxMetricsResponse::parse_from_bytes(&shim.ask("SandboxMetrics", &request).map_err(said)?)?;
        let used = Metrics::parse_from_bytes(&metrics.metrics.data.value)?;
        ensure!(used.memory.usage > 1 << 20 && used.cpu.usage_usec > 0, "{used:?}");
        ensure!(
            std::path::Path::new("/sys/fs/cgroup/sandbox-api/pod").is_dir(),
            "it is not in the pod's cgroup"
        );

        // containerd asks for that after every task; the sandbox is still there.
        shim.ask_task("Shutdown", &ShutdownRequest { id: "x".into(), ..Default::default() }).map_err(said)?;
        ping(&shim).map_err(said)?;
        stop(&shim).map_err(said)?;
        stop(&shim).map_err(said)?;
        ensure!(shim.wait().map_err(said)? == 0, "it did not end in order");
        let status = shim.status().map_err(said)?;
        ensure!(status.state == "SANDBOX_NOTREADY" && status.exited_at.seconds > 0, "{status:?}");
        is(ping(&shim), Code::FAILED_PRECONDITION)?;
        is(shim.start_sandbox(), Code::FAILED_PRECONDITION)?;
        ensure!(shim.is_there(), "the shim is gone before it is told to");
        shut_down(shim)
    });
}

#[test]
fn containers_join_it_and_share_what_pods_share() {
    api(|world| {
        let shim = PodShim::start(world, "pod")?;
        let mut config = config(NamespaceMode::Pod);
        if let Some(linux) = config.linux.as_mut() {
            linux.resources =
                Some(LinuxContainerResources { memory_limit_in_bytes: 768 << 20, ..Default::default() });
        }
        shim.create(NETWORK, Some(&config)).map_err(said)?;
        let pid = shim.start_sandbox().map_err(said)?;
        let share_pids = |spec: &mut serde_json::Value| {
            spec["linux"]["namespaces"][0]["path"] = format!("/proc/{pid}/ns/pid").into();
        };
        let by_path = |spec: &mut serde_json::Value| {
            share_pids(spec);
            spec["linux"]["namespaces"][4]["path"] = NETWORK.into();
        };
        shim.run(world, "first", "echo of the first > /dev/shm/file; exec sleep 54321", share_pids)?;
        let look = "exec > /tmp/out; until [ -s /dev/shm/file ]; do :; done; cat /dev/shm/file /etc/hostname /etc/resolv.conf; hostname; grep -c localhost /etc/hosts; \
                    ip -4 -o addr show eth0 | tr -s ' ' | cut -d' ' -f 4; ps | grep -c '[s]leep 54321'";
        shim.run(world, "second", look, by_path)?;
        let expected =
            "of the first\npod-of-tests\nnameserver 192.0.2.53\npod-of-tests\n1\n10.86.0.2/24\n1\n";
        let found = shim.output("second")?;
        ensure!(found == expected, "{found}");
        let memory = "awk '/MemTotal/ { print int($2 / 1024) > \"/tmp/out\" }' /proc/meminfo";
        shim.run(world, "third", memory, share_pids)?;
        let memory: u64 = shim.output("third")?.trim().parse()?;
        ensure!((768..900).contains(&memory), "{memory} MiB");

        // One that is left goes with the sandbox.
        stop(&shim).map_err(said)?;
        ensure!(shim.exit("first")? == 137, "it was not killed");
        shim.delete("first")?;
        shut_down(shim)
    });
}

#[test]
fn what_it_cannot_be_is_refused_by_its_name() {
    api(|world| {
        let shim = PodShim::start(world, "pod")?;
        let mut host = config(NamespaceMode::Node);
        let refused = shim.create(NETWORK, Some(&host)).err().context("it is created")?;
        let field = "options.linux.security_context.namespace_options.pid: ";
        ensure!(refused.message.starts_with(field), "{refused:?}");
        host.hostname = "x".repeat(65);
        ensure!(shim.create(NETWORK, Some(&host)).is_err(), "a name too long is taken");
        // A refusal takes no name.
        shim.create("/run/netns/nothing", None).map_err(said)?;
        let refused = shim.start_sandbox().err().context("it is started")?;
        ensure!(refused.message.contains("/run/netns/nothing"), "{refused:?}");
        let status = shim.status().map_err(said)?;
        ensure!(status.state == "SANDBOX_NOTREADY" && status.pid == 0, "{status:?}");
        ensure!(shim.wait().map_err(said)? == 137, "a start that failed is no end");
        stop(&shim).map_err(said)?;
        shut_down(shim)
    });
}

#[test]
fn its_end_is_told_whoever_ends_it() {
    api(|world| {
        let shim = PodShim::start(world, "pod")?;
        shim.create(NETWORK, None).map_err(said)?;
        // Two at once: one of them starts it.
        let both = std::thread::scope(|scope| {
            let one = scope.spawn(|| shim.start_sandbox());
            let other = shim.start_sandbox();
            [one.join().unwrap_or(Ok(0)), other]
        });
        ensure!(both.iter().filter(|answer| answer.is_ok()).count() == 1, "{both:?}");
        shim.run(world, "member", "exec sleep 100000", |_| {})?;
        let ended = std::thread::scope(|scope| {
            let waiter = scope.spawn(|| shim.wait());
            let monitor = Sandbox::find(world.stage(), "pod").map(|sandbox| sandbox.monitor.pid);
            let killed = monitor.and_then(|pid| shell(&format!("kill -9 {pid}")));
            killed.and_then(|_| waiter.join().unwrap_or(Ok(0)).map_err(said))
        })?;
        ensure!(ended == 137, "exit code {ended}");
        ensure!(shim.exit("member")? == 137, "the container did not end with it");
        ensure!(shim.status().map_err(said)?.state == "SANDBOX_NOTREADY", "it is ready");
        // Nobody deletes the container.
        shut_down(shim)?;

        // An end in the middle of a start.
        let shim = PodShim::start(world, "pod")?;
        shim.create(NETWORK, None).map_err(said)?;
        std::thread::scope(|scope| {
            let starting = scope.spawn(|| shim.start_sandbox());
            std::thread::sleep(rvm_tests::scale::seconds(0.01));
            let stopped = stop(&shim);
            let started = starting.join();
            stopped.map_err(said).map(|()| println!("the start: {started:?}"))
        })?;
        ensure!(shim.status().map_err(said)?.state == "SANDBOX_NOTREADY", "it is ready");
        shut_down(shim)
    });
}
