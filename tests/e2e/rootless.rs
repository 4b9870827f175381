//! A containerd without power over its host (rootlesskit): what works there, beside runc.

use std::{os::unix::fs::MetadataExt, path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    case,
    ctr::Ctr,
    job::{self, Input},
    rootless::{FIRST_SUB_ID, Options, Rootless, USER},
    scale,
    world::World,
};

const RUNC: &str = "io.containerd.runc.v2";

/// Does `test` with a rootless containerd, and ends that.
fn rootless(options: Options, test: impl FnOnce(&World, &Rootless) -> Result<()>) {
    case(|world| {
        let begun = Instant::now();
        let rootless = Rootless::start(world, options)?;
        println!("up after {} ms", begun.elapsed().as_millis());
        let tested = test(world, &rootless)
            .with_context(|| format!("its log ends with:\n{}", rootless.log_tail(world)));
        let left = rootless.processes();
        let ending = Instant::now();
        let ended = rootless.end(world);
        println!("and gone within {} ms", ending.elapsed().as_millis());
        tested?;
        ensure!(left.is_empty(), "left: {left:?}");
        ended
    });
}

/// What a container and its volume look like, in lines that do not depend on the runtime.
fn session(rootless: &Rootless, ctr: &Ctr) -> Result<String> {
    let volume = rootless.home().join("volume");
    let outside = rootless.home_from_outside().join("volume");
    std::fs::create_dir(&outside)?;
    std::os::unix::fs::chown(&outside, Some(USER), Some(USER))?;
    let mount = format!("type=bind,src={},dst=/v,options=rbind:rw", volume.display());
    let run = ctr.container("stays").with(&["--mount", &mount]).detached();
    run.run(&["sleep", "100000"])?.success()?;
    let script = "id; stat -c '%u %g %a' /etc/passwd; touch /v/of-root; touch /v/of-other && chown 70:71 /v/of-other; \
                  stat -c '%u %g' /v/of-other; chown 100000 /v/of-root 2>&1 || echo refused; ls /v; \
                  ip -o link | wc -l; exit 42";
    let finished = ctr.exec(&run.id, &[], &["sh", "-c", script], Input::Nothing)?.finish(scale::command())?;
    let mut seen = format!("{}\n{}{}", finished.code(), finished.text(), finished.errors());
    for name in ["of-root", "of-other"] {
        let found = outside.join(name).metadata().with_context(|| finished.to_string())?;
        seen += &format!("{name} {} {}\n", found.uid(), found.gid());
    }
    seen += &format!("{:?}\n", ctr.task_state(&run.id));
    end(ctr, &run.id)?;
    std::fs::remove_dir_all(&outside)?;
    Ok(seen)
}

/// Makes a network namespace of the user's, with one end of a wire to it, and takes both away again.
fn with_network<T>(rootless: &Rootless, act: impl FnOnce(&str) -> Result<T>) -> Result<T> {
    let sh = |script: &str| {
        let command = rootless.command(Path::new("/bin/sh"), &["-ec", script]);
        job::run(command, Input::Nothing, scale::command())?.success()
    };
    sh("ip netns add rl; ip -n rl link set lo up; ip link add rl0 type veth peer name eth0 netns rl
        ip -n rl addr add 10.77.0.2/24 dev eth0; ip -n rl link set eth0 up
        ip addr add 10.77.0.1/24 dev rl0; ip link set rl0 up")?;
    let result = act("network:/run/netns/rl");
    sh("ip netns delete rl")?;
    result
}

/// Where the user has no cgroup of its own. runc takes a container there whose specification names no cgroup and no limit.
#[test]
fn a_container_of_an_ordinary_user() {
    rootless(Options::default(), |world, rootless| {
        let ctr = rootless.ctr();
        let seen = session(rootless, &ctr)?;
        println!("{seen}");
        ensure!(seen.starts_with("42\n"), "{seen}");
        let once = ctr
            .container("once")
            .run_with(&["sh", "-c", "cat; exit 7"], Input::Bytes(b"its input\n".to_vec()))?;
        ensure!((once.code(), once.text().as_str()) == (7, "its input\n"), "{once}");
        ensure!(seen.contains(&format!("of-root {USER} {USER}\n")), "{seen}");
        ensure!(seen.contains(&format!("of-other {} {}\n", FIRST_SUB_ID + 69, FIRST_SUB_ID + 70)), "{seen}");

        let run = ctr.container("seen").detached();
        run.run(&["sleep", "100000"])?.success()?;
        let processes = rootless.processes();
        let named = |name: &str| processes.iter().filter(|process| process.name.starts_with(name)).count();
        let all = ["containerd-shim", "rvm-vmm", "rvm-container"];
        ensure!(all.map(named) == [1; 3], "{processes:?}");
        // The user's, and the monitor one of its own inside that.
        let users = |name: &str| {
            let process = processes.iter().find(|process| process.name.starts_with(name)).context("gone")?;
            Ok::<_, anyhow::Error>(std::fs::read_link(format!("/proc/{}/ns/user", process.pid))?)
        };
        let [shim, monitor, holder] = [users(all[0])?, users(all[1])?, users(all[2])?];
        let own = std::fs::read_link("/proc/self/ns/user")?;
        ensure!(shim == holder && shim != own && ![&shim, &own].contains(&&monitor), "{shim:?} {monitor:?}");
        let ps = job::run(rootless.rvmctl(&["ps"]), Input::Nothing, scale::command())?.success()?;
        ensure!(ps.text().contains(&run.id) && ps.text().contains("running"), "{ps}");
        ensure!(rootless.state_dir().join("default").join(&run.id).is_dir(), "{ps}");
        end(&ctr, &run.id)?;
        ensure!(!rootless.state_dir().exists(), "{} stays", rootless.state_dir().display());
        let warnings = rootless.log_tail(world);
        ensure!(warnings.matches("the sandbox has no cgroup on the host").count() == 3, "{warnings}");

        let refused = ctr.container("net").with(&["--net-host"]).run(&["true"])?;
        ensure!(refused.code() != 0 && refused.errors().contains("the host's network"), "{refused}");
        let check = job::run(rootless.rvmctl(&["check"]), Input::Nothing, scale::command())?.success()?;
        println!("{check}");
        ensure!(check.text().contains("root of a user namespace with 65537 ids; without cgroups"), "{check}");
        Ok(())
    });
}

/// Where the user has one, as from systemd: limits hold on the host too, as under root.
#[test]
fn beside_runc_in_a_delegated_cgroup() {
    rootless(Options { delegated: true }, |_, rootless| {
        let (ours, runcs) = (rootless.ctr(), rootless.ctr().under(RUNC));
        let seen = [session(rootless, &ours)?, session(rootless, &runcs)?];
        ensure!(seen[0] == seen[1], "rvm:\n{}\nrunc:\n{}", seen[0], seen[1]);
        let cgroup = rootless.cgroup().context("none is delegated")?.join("default");
        // runc leaves it, and what was there before is not rvm's to remove.
        std::fs::remove_dir(&cgroup)?;
        let mut seen = Vec::new();
        for (ctr, is_rvm) in [(ours, true), (runcs, false)] {
            let run = ctr.container("limited").with(&["--memory-limit", "67108864"]).detached();
            let reached = with_network(rootless, |namespace| {
                run.clone().with(&["--with-ns", namespace]).run(&["sleep", "100000"])?.success()?;
                let script = "ip -o -4 addr show eth0 | tr -s ' ' | cut -d' ' -f2-6; \
                              ping -c 1 -w 30 10.77.0.1 >/dev/null && echo reached";
                let reached = ctr.exec(&run.id, &[], &["sh", "-c", script], Input::Nothing)?;
                let reached = reached.finish(scale::command())?.success()?.text();
                check_cgroup(rootless, &cgroup.join(&run.id), is_rvm)?;
                end(&ctr, &run.id)?;
                Ok(reached)
            })?;
            ensure!(!cgroup.join(&run.id).exists(), "the container's cgroup stays");
            ensure!(cgroup.exists() != is_rvm, "{} after {}", cgroup.display(), run.id);
            seen.push(reached);
        }
        println!("{}", seen[0]);
        ensure!(seen[0] == seen[1] && seen[0].contains("reached"), "{seen:?}");
        Ok(std::fs::remove_dir(cgroup)?)
    });
}

/// A container of 64 MiB: runc holds it to that on the host, rvm the machine to what that takes in all.
fn check_cgroup(rootless: &Rootless, dir: &Path, is_rvm: bool) -> Result<()> {
    let of = |file: &str| std::fs::read_to_string(dir.join(file)).with_context(|| file.to_owned());
    let limit: u64 = of("memory.max")?.trim().parse().context("no limit on the host")?;
    ensure!(if is_rvm { limit > 64 << 20 } else { limit == 64 << 20 }, "memory.max is {limit}");
    let members = of("cgroup.procs")?;
    let monitor = rootless.processes().into_iter().find(|process| process.name == "rvm-vmm");
    let is_member = |pid: i32| members.lines().any(|member| member == pid.to_string());
    ensure!(monitor.is_some_and(|monitor| is_member(monitor.pid)) == is_rvm, "{members}");
    Ok(())
}

/// Ends a detached container.
fn end(ctr: &Ctr, id: &str) -> Result<()> {
    ctr.run(&["task", "kill", "-s", "SIGKILL", id], scale::command())?.success()?;
    ctr.run(&["task", "rm", "-f", id], scale::container())?.success()?;
    ctr.run(&["containers", "rm", id], scale::command())?.success()?;
    Ok(())
}
