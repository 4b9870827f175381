//! Docker with rvm as its runtime: what a container writes, builds, a daemon that is gone.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rvm_tests::{
    docker::{Docker, IMAGE, RUNTIME_ALIAS, case},
    host, scale,
};
use serde_json::json;

/// A shell script with `$R` for the options of every container; its output.
fn script(docker: &Docker, script: &str) -> Result<String> {
    let options = format!("--runtime {} --network none", docker.runtime());
    let script = format!("set -e\n{script}");
    let finished =
        docker.script(docker.world().dir(), &[("R", &options), ("I", IMAGE)], &script)?.success()?;
    println!("{finished}");
    Ok(finished.text())
}

#[test]
fn what_a_container_writes_is_dockers() {
    case(|docker| {
        script(
            docker,
            "docker run -d --name writer $R $I sh -c 'echo first >> /root/log; sleep 1000' >/dev/null
             until docker exec writer test -s /root/log; do :; done
             docker exec writer sh -c 'dd if=/dev/zero of=/root/big bs=1M count=32 2>/dev/null; rm /etc/group'",
        )?;
        // What lies in /run but in Docker's own directory: sockets, logs and the like.
        let outside =
            script(docker, "du -sk /run/rvm /run/docker /run/containerd | awk '{n += $1} END {print n}'")?;
        ensure!(outside.trim().parse::<u64>()? < 16 << 10, "{outside} KiB lie in /run");
        // A machine that dies at once has told the host of everything that was written.
        kill_the_monitor(docker)?;
        let told = script(
            docker,
            "docker wait writer; docker start writer >/dev/null; docker exec writer cat /root/log
             docker exec writer stat -c %s /root/big; docker exec writer ls /etc/group || echo gone
             docker stop -t 0 writer >/dev/null; docker start writer >/dev/null
             docker exec writer sh -c 'wc -l </root/log'
             docker diff writer | sort; docker rm -f writer >/dev/null",
        )?;
        let lines: Vec<&str> = told.lines().collect();
        ensure!(lines.first() == Some(&"137"), "{told}");
        ensure!(
            lines.get(1..4) == Some(&["first", "33554432", "gone"][..])
                || lines.get(1..5) == Some(&["first", "first", "33554432", "gone"][..]),
            "{told}"
        );
        for changed in ["A /root/big", "A /root/log", "C /root", "D /etc/group"] {
            ensure!(lines.contains(&changed), "{changed}: {told}");
        }
        Ok(())
    });
}

/// Kills the only sandbox's machine, as a crash would.
fn kill_the_monitor(docker: &Docker) -> Result<()> {
    let monitor = docker.world().stage().monitor().canonicalize()?;
    let process = host::sandbox_processes(docker.world().stage())
        .into_iter()
        .find(|process| {
            std::fs::read_link(format!("/proc/{}/exe", process.pid)).is_ok_and(|exe| exe == monitor)
        })
        .context("no monitor runs")?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(process.pid), Signal::SIGKILL)?;
    Ok(())
}

#[test]
fn a_build_runs_its_steps_in_machines() {
    case(|docker| {
        docker.reload(&json!({"default-runtime": RUNTIME_ALIAS}), "{{.DefaultRuntime}}", RUNTIME_ALIAS)?;
        let built = script(
            docker,
            "mkdir build; trap 'rm -r build; docker rmi -f built >/dev/null' EXIT; echo copied > build/file
             printf '%s\\n' 'FROM busybox' 'COPY file /file' 'ENV KEY=value' 'WORKDIR /work' \
                 'RUN uname -v > kernel && cat /file >> out && echo $KEY >> out' \
                 'RUN rm /file && ln -s out link && chown user out' 'USER user' 'CMD cat kernel link' > build/Dockerfile
             DOCKER_BUILDKIT=0 docker build -q --network none -t built build >/dev/null
             docker run --rm --network none --runtime runc built; uname -v
             docker run --rm --network none --runtime runc built stat -c %U out
             docker run --rm --network none --runtime runc built ls /file 2>/dev/null || echo removed",
        );
        docker.reload(&json!({}), "{{.DefaultRuntime}}", "runc")?;
        let built = built?;
        let lines: Vec<&str> = built.lines().collect();
        ensure!(
            lines.get(1..3) == Some(&["copied", "value"][..])
                && lines.get(4..) == Some(&["user", "removed"][..]),
            "{built}"
        );
        ensure!(
            !docker.world().stage().is_rvm() || lines.first() != lines.get(3),
            "the host's kernel built it: {built}"
        );
        Ok(())
    });
}

#[test]
fn a_container_outlives_the_daemon() {
    case(|docker| {
        script(
            docker,
            "docker run -d --name lives --restart always $R $I sh -c 'i=0; while sleep 1; do i=$((i+1)); echo $i; done' >/dev/null",
        )?;
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            let before = script(docker, "docker inspect --format '{{.State.Pid}} {{.RestartCount}}' lives")?;
            docker.without_daemon(signal, || {
                std::thread::sleep(scale::seconds(0.1));
                Ok(())
            })?;
            let after = script(
                docker,
                "docker inspect --format '{{.State.Pid}} {{.RestartCount}}' lives; docker exec lives echo in it",
            )?;
            ensure!(after == format!("{before}in it\n"), "{signal}: {before} became {after}");
        }
        // Its end is heard of by the daemon that came later.
        let ended = script(
            docker,
            "docker update --restart no lives >/dev/null; docker kill lives >/dev/null; docker wait lives; docker logs --tail 1 lives; docker rm lives",
        )?;
        ensure!(ended.starts_with("137\n"), "{ended}");
        Ok(())
    });
}

#[test]
fn where_writes_go_can_be_said() {
    case(|docker| {
        let told = script(
            docker,
            "docker run --name fast --annotation io.rvm.writes=guest $R $I sh -c 'echo a > /a; grep \" / \" /proc/mounts'
             docker diff fast | grep -v /etc/ || echo end; docker rm fast >/dev/null",
        )?;
        ensure!(
            told.starts_with("overlay / ") && told.ends_with("end\n") && !told.contains("/a\n"),
            "{told}"
        );
        Ok(())
    });
}

#[test]
fn what_cannot_be_shared_is_refused_by_name() {
    case(|docker| {
        script(docker, "docker run -d --name other $R --ipc shareable $I sleep 1000 >/dev/null")?;
        for (options, words) in [
            ("--network none --ipc container:other", &["linux.namespaces", "--ipc container:"][..]),
            ("--network none --pid container:other", &["linux.namespaces", "--pid container:"]),
            ("--network container:other", &["linux.namespaces", "--network container:"]),
            ("--network host", &["linux.namespaces", "host's network"]),
        ] {
            let refused = format!("docker run --rm --runtime $RUNTIME {options} $I true");
            let finished =
                docker.script(Path::new("/"), &[("RUNTIME", docker.runtime()), ("I", IMAGE)], &refused)?;
            println!("{finished}");
            ensure!(finished.code() == 125, "{finished}");
            ensure!(words.iter().all(|word| finished.errors().contains(word)), "{finished}");
        }
        script(docker, "docker rm -f other >/dev/null")?;
        Ok(())
    });
}

#[test]
fn what_a_host_with_apparmor_names() {
    case(|docker| {
        let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
        let named = if enabled.is_ok_and(|text| text.trim() == "Y") { "docker-default" } else { "" };
        let told = script(
            docker,
            "docker run -d --name named $R $I sleep 1000 >/dev/null
             docker inspect -f '{{.AppArmorProfile}}' named; docker exec named echo in it",
        )?;
        ensure!(told == format!("{named}\nin it\n"), "{told}");
        if docker.world().stage().is_rvm() {
            let listed = rvm_tests::job::run(
                docker.world().rvmctl(&["ps", "--json"]),
                rvm_tests::job::Input::Nothing,
                scale::command(),
            )?;
            let said = listed.text().contains("process.apparmorProfile");
            ensure!(said != named.is_empty(), "{listed}");
        }
        script(docker, "docker rm -f named >/dev/null")?;
        if named.is_empty() {
            return Ok(());
        }
        // A profile of the user's own: not one that is loaded, which only runc would have to find.
        let options = ["run", "--rm", "--network", "none", "--security-opt", "apparmor=my-own", "--runtime"];
        let refused = docker.run(&[&options[..], &[docker.runtime(), IMAGE, "true"]].concat())?;
        ensure!(refused.code() == 125 && refused.errors().contains("my-own"), "{refused}");
        Ok(())
    });
}
