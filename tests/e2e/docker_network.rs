//! Docker's networks with rvm as its runtime: published ports, networks that come and
//! go while a container runs, containers under both kernels on one.

mod services;

use anyhow::{Result, bail, ensure};
use rvm_tests::docker::{Docker, IMAGE, SERVICES, case};

/// A shell script with `$RUNTIME`, `$R` for `docker run` and it, `$I` for the small
/// image and `$S` for that of services; its output.
fn script(docker: &Docker, script: &str) -> Result<String> {
    let run = format!("docker run --runtime {}", docker.runtime());
    let variables = [("R", run.as_str()), ("RUNTIME", docker.runtime()), ("I", IMAGE), ("S", SERVICES)];
    let finished = docker.script(docker.world().dir(), &variables, &format!("set -e\n{script}"))?;
    println!("{finished}");
    Ok(finished.success()?.text())
}

/// A case with user-defined networks of both families, which go with all containers that are named.
fn with_networks(docker: &Docker, names: &str, test: impl FnOnce() -> Result<()>) -> Result<()> {
    script(
        docker,
        "docker network create --ipv6 --subnet 10.91.0.0/24 --subnet fd91::/64 front >/dev/null
         docker network create --ipv6 --subnet 10.92.0.0/24 --subnet fd92::/64 back >/dev/null",
    )?;
    let result = test();
    // Docker gives a killed container ten seconds, which runc's may need on a busy machine.
    let removed = script(
        docker,
        &format!(
            "docker rm -f {names} >/dev/null || docker rm -f {names} >/dev/null; docker network rm front back >/dev/null"
        ),
    );
    result.and(removed.map(drop))
}

#[test]
fn a_published_port() {
    case(|docker| {
        let page = script(
            docker,
            "docker run -d --name web -p 8080:80 --runtime $RUNTIME $I httpd -f -p 80 -h /etc >/dev/null
             curl -s --retry 100 --retry-all-errors --retry-delay 1 localhost:8080/hostname
             docker exec web hostname; curl -s 'http://[::1]:8080/hostname'; docker port web
             docker rm -f web >/dev/null; curl -s localhost:8080 || echo refused",
        )?;
        let lines: Vec<&str> = page.lines().collect();
        let [v4, name, v6, port, .., last] = lines.as_slice() else { bail!("{page}") };
        ensure!(
            v4 == name && v6 == name && *port == "80/tcp -> 0.0.0.0:8080" && *last == "refused",
            "{page}"
        );
        Ok(())
    });
}

#[test]
fn networks_come_and_go() {
    case(|docker| with_networks(docker, "ours theirs", || under_both_kernels(docker)));
}

fn under_both_kernels(docker: &Docker) -> Result<()> {
    script(
        docker,
        "$R -d --name ours --network front --ip 10.91.0.5 --ip6 fd91::5 $I sleep 1000 >/dev/null
         docker run -d --runtime runc --name theirs --network front --ip 10.91.0.6 --ip6 fd91::6 $I sleep 1000 >/dev/null",
    )?;
    reach_each_other(docker, 91)?;
    script(
        docker,
        "docker network connect --ip 10.92.0.6 --ip6 fd92::6 back theirs
         docker network connect --ip 10.92.0.5 --ip6 fd92::5 back ours
         until docker exec ours ip route | grep -q 10.92; do :; done",
    )?;
    reach_each_other(docker, 92)?;
    let seen = seen_by_both(docker)?;
    let addresses = ["eth0 10.91.0.5/24", "eth0 fd91::5/64", "eth1 10.92.0.5/24", "eth1 fd92::5/64"];
    ensure!(addresses.iter().all(|part| seen.contains(part)), "{seen}");
    script(
        docker,
        "docker network disconnect front ours; docker network disconnect front theirs
         while docker exec ours ip address | grep -q 10.91; do :; done",
    )?;
    reach_each_other(docker, 92)?;
    let seen = seen_by_both(docker)?;
    ensure!(seen.contains("10.92.0.5/24") && seen.contains("fd92::5/64"), "{seen}");
    ensure!(!seen.contains("10.91") && !seen.contains("fd91"), "{seen}");
    Ok(())
}

/// By both families, both ways.
fn reach_each_other(docker: &Docker, network: u8) -> Result<()> {
    for (from, host) in [("theirs", 5), ("ours", 6)] {
        for to in [format!("10.{network}.0.{host}"), format!("fd{network}::{host}")] {
            script(docker, &format!("docker exec {from} ping -c 1 -w 60 {to}"))?;
        }
    }
    Ok(())
}

/// Interfaces, addresses and routes, which have to be the same in both.
fn seen_by_both(docker: &Docker) -> Result<String> {
    let seen = |name| {
        let list = "ip -o address | grep -v fe80 | awk '{print $2, $4}'; ip -o link | grep -o 'mtu [0-9]*'
                    ip route; ip -6 route";
        script(docker, &format!("docker exec {name} sh -c \"{}\"", list.replace('$', "\\$")))
    };
    let (ours, theirs) = (seen("ours")?, seen("theirs")?);
    let theirs = theirs.replace(".0.6", ".0.5").replace("::6", "::5");
    ensure!(ours == theirs, "{ours}instead of\n{theirs}");
    Ok(ours)
}
