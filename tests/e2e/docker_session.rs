//! One session with Docker, under runc and under rvm, compared step by step: exit code, both
//! outputs, and what is left at the end.

use std::{
    collections::BTreeMap,
    fmt::Write,
    path::{Path, PathBuf},
};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use rvm_tests::{
    docker::{Docker, case},
    job::Finished,
};

/// Name and shell command. `$R` is `docker run`, `$N` its options: the runtime, no network; `$W` the
/// runtime alone. `$D` is a directory of the session's own. Steps build on the ones before.
const STEPS: &[(&str, &str)] = &[
    // How a container ends.
    ("run: output and exit code", "$R --rm $N busybox sh -c 'echo out; echo err >&2; exit 7'"),
    ("run: no such program", "$R --rm $N busybox nosuch 2>/dev/null"),
    ("run: not a program", "$R --rm $N busybox /etc 2>/dev/null"),
    (
        "run: input, entrypoint, cidfile",
        "printf 'one\\ntwo\\n' | $R -i --rm $N --cidfile $D/cid --entrypoint /bin/sh busybox -c 'kill -9 $$; cat'
         wc -c <$D/cid; rm $D/cid",
    ),
    (
        "run: terminal",
        "script -qec \"$R -it --rm $N busybox sh -c 'tty; stty -a | grep -c icanon; echo err >&2; exit 3'\" /dev/null",
    ),
    ("run: much output", "$R --rm $N --log-driver none busybox sh -c 'yes 0123456789 | head -c 1000000' | md5sum"),
    (
        "create, start -a, wait",
        "docker create --name once $N busybox sh -c 'echo once; exit 3' >/dev/null; docker start -a once; echo $?
         docker wait once; docker inspect -f '{{.State.Status}} {{.State.ExitCode}}' once; docker rm once",
    ),
    // What a container is given.
    (
        "given: nothing",
        "$R --rm $N busybox sh -c 'exec 2>&1; grep -E \"Cap|NoNewPrivs|Seccomp:\" /proc/self/status; echo $$; cat /proc/1/comm
         ls /dev | grep -v core | sort | tr \"\\n\" \" \"; readlink /dev/fd; echo x >/proc/sys/kernel/domainname; echo $?
         env | grep -v HOSTNAME; id; pwd'",
    ),
    (
        "given: by its kernel",
        "$R --rm $N busybox sh -c 'wc -c </proc/kcore; ls -d /proc/acpi /dev/core' 2>/dev/null",
    ),
    (
        "given: names and environment",
        "printf 'C=3\\n' >$D/env
         $R --rm $N -e A=1 -e B --env-file $D/env --hostname box --domainname example.org --add-host db:10.1.2.3 \
         --dns 9.9.9.9 --dns-search example.org --dns-option ndots:3 --user 1000:1001 --group-add 7 -w /made/for/it busybox \
         sh -c 'env | sort; hostname; cat /etc/hostname /proc/sys/kernel/domainname /etc/hosts /etc/resolv.conf; id; pwd; stat -c %U .'",
    ),
    (
        "given: limits and rights",
        "$R --rm $N -m 64m --memory-swap 64m --cpus 0.5 --pids-limit 77 --cpu-shares 512 --ulimit nofile=123:456 --ulimit core=0 \
         --cap-drop all --cap-add chown --security-opt no-new-privileges --sysctl kernel.msgmax=1234 \
         --sysctl net.ipv4.ip_default_ttl=33 --device /dev/null:/dev/nothing:r busybox \
         sh -c 'cd /sys/fs/cgroup; cat memory.max cpu.max pids.max; ulimit -n; ulimit -Hn; ulimit -c
         grep -E \"Cap|NoNewPrivs\" /proc/self/status; cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_default_ttl
         stat -c %t,%T /dev/nothing; cat /dev/nothing; echo x 2>/dev/null >/dev/nothing; echo $?'",
    ),
    ("given: a share of the processor", "$R --rm $N --cpu-shares 512 busybox cat /sys/fs/cgroup/cpu.weight"),
    (
        "given: file systems",
        "$R --rm $N --read-only --tmpfs /t:size=1m,mode=700 --shm-size 16m --mount type=tmpfs,destination=/m,tmpfs-size=65536 busybox \
         sh -c 'touch /a; echo $?; stat -c %a /t; df -k /t /dev/shm /m | awk \"{print \\$2, \\$6}\"
         dd if=/dev/zero of=/t/f bs=64k count=17 2>/dev/null; stat -c %s /t/f'",
    ),
    (
        "given: everything",
        "$R --rm $N --privileged --security-opt seccomp=unconfined --init busybox \
         sh -c 'mount -t tmpfs t /mnt && grep -c /mnt /proc/mounts; grep -E Seccomp: /proc/self/status; cat /proc/1/comm
         sh -c \"sleep 0.1 &\"; sleep 0.5; ps -o stat= | grep -c Z'",
    ),
    (
        "out of memory",
        "$R --name hungry $N -m 48m --memory-swap 48m busybox sh -c 'tail /dev/zero' 2>/dev/null; echo $?
         docker inspect -f '{{.State.OOMKilled}} {{.State.ExitCode}}' hungry; docker rm hungry",
    ),
    // Volumes.
    (
        "bind: directory and file, writable and not",
        "echo host >$D/file; $R --rm $N -v $D:/v -v $D:/ro:ro --mount type=bind,source=$D/file,target=/etc/told busybox \
         sh -c 'cat /v/file; echo guest >/v/new; touch /ro/a; echo $?; echo more >>/etc/told; cat /ro/new'
         cat $D/new $D/file; rm $D/new",
    ),
    ("bind: missing", "$R --rm $N --mount type=bind,source=$D/none,target=/v busybox true 2>&1 | head -n 1 | cut -d. -f1"),
    (
        "volumes",
        "docker volume create kept; docker volume create copied
         $R --name holds $N -v kept:/v -v copied:/etc -v /anonymous busybox \
         sh -c 'echo kept >/v/f; chown 5:6 /v/f; ls /etc | wc -l; touch /etc/mine'; docker volume ls -q | wc -l
         $R --rm $N -v copied:/e --volumes-from holds:ro busybox sh -c 'cat /v/f; stat -c %u:%g /v/f; ls /e/mine; touch /v/g; echo $?'
         docker rm -v holds; docker volume rm copied; docker volume ls -q | wc -l",
    ),
    // A container that lives.
    ("run -d", "$R -d --name main $N --hostname box -l a=b -v kept:/data -e X=1 --stop-signal USR2 busybox sh -c \
         'trap \"echo usr1\" USR1; trap \"echo usr2; exit 5\" USR2; echo out; echo err >&2; while :; do sleep 0.1; done'"),
    ("ps", "docker ps --format '{{.Names}}|{{.Image}}|{{.State}}|{{.Labels}}|{{.Mounts}}'"),
    ("logs", "until docker logs main 2>/dev/null | grep -q out; do :; done; docker logs main"),
    ("logs: streams apart", "docker logs main 2>/dev/null; docker logs main 2>&1 >/dev/null; docker logs -n 1 -t main 2>&1 | cut -c 1-4 | tr 0-9 n"),
    ("inspect", "docker inspect -f '{{.State.Status}} {{.State.Running}} {{.Config.Hostname}} {{.HostConfig.NetworkMode}} {{.Path}} {{len .Mounts}}' main; docker inspect -f '{{.State.Pid}}' main | xargs kill -0"),
    ("exec", "docker exec main sh -c 'hostname; id -u; echo $X; ls /data; cat /proc/1/comm'"),
    ("exec: exit code", "docker exec main sh -c 'exit 9'"),
    ("exec: options", "docker exec -u 1000:1001 -w /tmp -e A=b main sh -c 'id; pwd; echo $A'"),
    ("exec: privileged", "docker exec main grep CapEff /proc/self/status; docker exec --privileged main grep CapEff /proc/self/status"),
    ("exec: standard input", "echo in | docker exec -i main cat"),
    ("exec: terminal", "script -qec \"docker exec -it main sh -c 'tty; exit 4'\" /dev/null"),
    ("exec: no such program", "docker exec main nosuch >/dev/null 2>&1; echo $?"),
    ("exec: detached", "docker exec -d main sh -c 'echo done >/root/flag'; until docker exec main cat /root/flag 2>/dev/null; do :; done"),
    ("kill: a signal of its own", "docker kill -s USR1 main; until docker logs main 2>/dev/null | grep usr1; do :; done"),
    ("top", "docker top main >/dev/null; echo $?"),
    ("stats", "docker stats --no-stream --format '{{.Name}} {{.MemUsage}} {{.PIDs}}' main | awk '{print $1, ($2 != \"0B\"), ($NF > 0)}'"),
    ("cp: in", "mkdir -p $D/tree/sub; echo a >$D/tree/a; echo b >$D/tree/sub/b; ln -s a $D/tree/link; docker cp -q $D/tree main:/root/tree; docker exec main sh -c 'cd /root/tree; find . | sort; cat a sub/b; readlink link'"),
    ("cp: out", "docker exec main sh -c 'echo fresh >/root/fresh'; docker cp -q main:/root/fresh $D/fresh; cat $D/fresh; docker cp main:/root/tree - | tar t | sort"),
    ("cp: what the container has changed since", "docker cp -q $D/tree/a main:/root/renamed; docker exec main sh -c 'echo changed >/root/renamed'; docker cp -q main:/root/renamed $D/r; cat $D/r; echo host >$D/r; docker cp -q $D/r main:/root/renamed; docker exec main cat /root/renamed"),
    ("cp: to a volume", "docker cp -q $D/tree/a main:/data/copied; docker exec main cat /data/copied; $R --rm $N -v kept:/v busybox cat /v/copied"),
    ("cp: archive with owners", "docker exec main sh -c 'echo x >/root/own; chown 11:12 /root/own; chmod 640 /root/own'; docker cp main:/root/own - | tar tvn --numeric-owner | cut -c 1-16"),
    ("cp: missing", "docker cp main:/nosuch $D/x 2>&1 | sed 's/[0-9a-f]\\{64\\}/ID/'"),
    ("diff", "docker diff main | sort"),
    ("commit", "docker commit -c 'CMD cat /root/renamed' main made >/dev/null; $R --rm $N made"),
    ("commit: history", "docker history --format '{{.CreatedBy}}' made | head -n 1; docker rmi made >/dev/null; echo $?"),
    ("export", "docker export main | tar t | grep -E '^root/|^bin/sh$' | sort"),
    ("update", "docker update -m 80m --memory-swap 80m --cpus 0.7 --pids-limit 99 main; docker exec main sh -c 'cd /sys/fs/cgroup; cat memory.max cpu.max pids.max'"),
    ("pause", "docker pause main; docker ps --filter name=main --format '{{.State}}'; docker exec main true 2>&1 | sed 's/[0-9a-f]\\{64\\}/ID/'"),
    ("unpause", "docker unpause main; docker exec main echo goes on"),
    ("rename", "docker rename main primary; docker ps --format '{{.Names}}'; docker rename primary main"),
    (
        "attach",
        "(sleep 4; docker kill -s USR1 main >/dev/null) & timeout -s KILL 12 docker attach --no-stdin --sig-proxy=false main; echo $?; wait",
    ),
    ("stop", "docker stop main; docker inspect -f '{{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}}' main; docker logs main 2>/dev/null | tail -n 1"),
    ("exec: stopped", "docker exec main true 2>&1 | sed 's/[0-9a-f]\\{64\\}/ID/'"),
    ("cp: stopped, both ways", "docker cp -q $D/file main:/root/offline; docker cp -q main:/root/renamed $D/back; cat $D/back"),
    ("diff: stopped", "docker diff main | sort | grep -v ' /root/tree'"),
    ("start", "docker start main; docker exec main cat /root/offline /root/renamed /root/flag; docker exec main sh -c 'stat -c %u:%g:%a /root/own; readlink /root/tree/link'"),
    ("restart", "docker restart -t 1 main; docker exec main cat /root/offline; docker inspect -f '{{.RestartCount}}' main"),
    ("logs -f", "(sleep 3; docker kill -s USR2 main >/dev/null) & docker logs -f --tail 1 main 2>/dev/null; wait"),
    ("wait", "docker wait main"),
    ("rm", "docker rm main; docker ps -aq | wc -l"),
    // Other ends.
    ("kill", "$R -d --name brief $N busybox sleep 1000 >/dev/null; docker kill brief; docker wait brief; docker rm brief"),
    // Networks.
    (
        "network: a published port",
        "$R -d --name web $W -p 8090:80 busybox sh -c 'mkdir /www; echo page >/www/index.html; exec httpd -f -h /www' >/dev/null
         curl -s --retry 100 --retry-all-errors --retry-delay 1 localhost:8090; docker port web",
    ),
    (
        "network: exposed ports",
        "$R -d --name open $W --expose 99/udp -p 8091:81/udp -P busybox sleep 1000 >/dev/null
         docker port open | sed 's/:[0-9]*$//' | sort -u; docker rm -f open",
    ),
    (
        "network: link",
        "$R --rm $W --link web:site busybox sh -c 'grep -w site /etc/hosts | cut -f 2; env | grep ^SITE_ | sort; ping -c 1 site' | grep -v -e seq= -e trip | sed 's|=/.*/|=/NAME/|'",
    ),
    (
        "network: what a container sees",
        "$R --rm $W --mac-address 02:42:ac:11:00:77 --hostname box busybox \
         sh -c 'cd /sys/class/net; ls; cat eth0/address eth0/mtu eth0/operstate; ip -4 -o address | cut -d\" \" -f2-; ip route; ip rule; tail -n 1 /etc/hosts
         ping -c 1 $(ip route | sed -n \"s/default via \\([0-9.]*\\).*/\\1/p\") | grep loss; cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/disable_ipv6'",
    ),
    (
        "network: not a privileged user",
        "$R --rm $W --user 1000 busybox sh -c 'exec 2>&1; ping -c 1 127.0.0.1 | grep loss; timeout 1 nc -l -p 80; echo $?; ip link add x type dummy; echo $?'",
    ),
    (
        "network: names of a network",
        "docker network create --subnet 10.93.0.0/24 shop >/dev/null; $R -d --name srv $W --network shop --network-alias www busybox sleep 1000 >/dev/null
         for name in srv www nosuch; do $R --rm $W --network shop busybox ping -c 1 $name 2>&1 | grep -e loss -e bad; done
         $R --rm $W --network shop busybox cat /etc/resolv.conf | grep -v -e '^#' -e '^search'",
    ),
    (
        "network: connect and disconnect",
        "docker network connect --alias later shop web; until docker exec web ip -4 -o address | grep -q eth1; do :; done
         docker exec web ip -4 -o address | cut -d' ' -f2-; docker exec web ip route; docker exec web ping -c 1 srv | grep loss
         docker exec srv ping -c 1 later | grep loss; docker network disconnect shop web
         while docker exec web ip -o link | grep -q eth1; do :; done; docker exec web ip route
         docker rm -f srv; docker network rm shop",
    ),
    ("network: another's", "$R --rm $W --network container:web busybox ls /sys/class/net 2>/dev/null"),
    ("network: gone", "docker rm -f web; curl -s localhost:8090; echo $?"),
    // A terminal.
    ("tty and detach keys", "$R -dit --name term $N busybox sh >/dev/null; (sleep 2; printf 'echo in-$((1+1))\\n'; sleep 2; printf '\\020\\021') | script -qec 'docker attach term' /dev/null | grep -c in-2; docker inspect -f '{{.State.Status}} {{.Config.Tty}}' term; docker rm -f term"),
    // What Docker watches.
    ("restart policy", "$R -d --name again $N --restart on-failure:3 busybox sh -c 'echo x >>/count; exit 6' >/dev/null; until [ \"$(docker inspect -f '{{.State.Status}} {{.RestartCount}}' again)\" = 'exited 3' ]; do sleep 0.3; done; docker inspect -f '{{.State.ExitCode}}' again; docker cp again:/count - | tar xO | wc -l; docker rm again"),
    ("health", "$R -d --name well $N --health-cmd 'test -e /ok' --health-interval 1s --health-retries 1 busybox sh -c 'touch /ok; sleep 1000' >/dev/null; until docker inspect -f '{{.State.Health.Status}}' well | grep -x healthy; do sleep 0.3; done; docker exec well rm /ok; until docker inspect -f '{{.State.Health.Status}}' well | grep -x unhealthy; do sleep 0.3; done; docker rm -f well"),
    ("events", "S=$(date +%s); $R -d --name seen $N busybox sleep 1000 >/dev/null; docker exec seen true; docker kill seen >/dev/null; docker wait seen; docker rm seen; docker events --since $S --until $(($(date +%s)+1)) --filter container=seen --format '{{.Action}}' | sed 's/:.*//' | sort | uniq -c"),
    // Where output goes.
    ("log driver: local", "$R --name log $N --log-driver local busybox sh -c 'echo logged; echo err >&2'; docker logs log; docker rm log"),
    ("log driver: journald", "$R --name log $N --log-driver journald busybox echo x 2>&1 | grep -c journald; docker rm log"),
    // Refusals of Docker's own.
    ("name in use", "docker create --name taken $N busybox true >/dev/null; docker create --name taken $N busybox true 2>&1 | sed 's/\"[0-9a-f]\\{64\\}\"/ID/'; docker rm taken"),
    ("rm of a running one", "$R -d --name busy $N busybox sleep 1000 >/dev/null; docker rm busy 2>&1 | sed 's/[0-9a-f]\\{64\\}/ID/'; docker rm -f busy"),
    // What is left.
    ("left", "docker volume rm kept; docker ps -aq | wc -l; docker volume ls -q | wc -l; docker images -q | wc -l; ls $D | sort"),
];

/// Steps that are meant to differ, and why.
const DIFFERENT: &[(&str, &str)] = &[
    ("network: another's", "each container is a machine of its own, which has no part in another's network"),
    ("given: by its kernel", "the guest's kernel has neither ACPI nor /proc/kcore, which /dev/core leads to"),
    (
        "given: a share of the processor",
        "runc 1.3 and later, and rvm, map shares to weights by another curve than runc 1.1",
    ),
];

#[test]
fn the_same_under_runc_and_under_rvm() {
    case(|docker| {
        let baseline = session(docker, "runc")?;
        let orphans_of_runc = orphans(docker)?.len();
        let ours = session(docker, docker.runtime())?;
        let orphans_in_all = orphans(docker)?.len();
        remove_orphans(docker)?;
        let mut report = String::new();
        let (mut equal, mut intended, mut wrong) = (0, 0, 0);
        let reasons: BTreeMap<&str, &str> = DIFFERENT.iter().copied().collect();
        for (((name, command), wanted), found) in STEPS.iter().zip(&baseline).zip(&ours) {
            match (wanted == found, reasons.get(name)) {
                (true, None) => equal += 1,
                (false, Some(_)) => intended += 1,
                (true, Some(reason)) => {
                    wrong += 1;
                    writeln!(report, "{name}: does not differ, as it should ({reason})")?;
                }
                (false, None) => {
                    wrong += 1;
                    writeln!(report, "{name}: {command}\nrunc {wanted}\n{} {found}", docker.runtime())?;
                }
            }
        }
        println!("{equal} equal, {intended} intended, {wrong} wrong");
        ensure!(orphans_in_all <= 2 * orphans_of_runc, "{orphans_of_runc} orphans, {orphans_in_all} in all");
        ensure!(wrong == 0, "{wrong} of {} steps differ:\n{report}", STEPS.len());
        Ok(())
    });
}

/// Writable layers of containers that are gone. Docker 26.1 keeps one of a session like this, whatever runs
/// its containers.
fn orphans(docker: &Docker) -> Result<Vec<PathBuf>> {
    let data = docker.world().dir().join("docker");
    let mut found = Vec::new();
    for layer in std::fs::read_dir(data.join("image/overlay2/layerdb/mounts"))? {
        let layer = layer?;
        if !data.join("containers").join(layer.file_name()).exists() {
            found.push(layer.path());
        }
    }
    Ok(found)
}

/// Removes them, and what dockerd has open since it asked for a journal.
fn remove_orphans(docker: &Docker) -> Result<()> {
    docker.without_daemon(Signal::SIGTERM, || {
        let layers = docker.world().dir().join("docker/overlay2");
        for orphan in orphans(docker)? {
            for id in ["mount-id", "init-id"] {
                let layer = layers.join(std::fs::read_to_string(orphan.join(id))?);
                let link = layers.join("l").join(std::fs::read_to_string(layer.join("link"))?);
                std::fs::remove_dir_all(layer)?;
                std::fs::remove_file(link)?;
            }
            std::fs::remove_dir_all(orphan)?;
        }
        Ok(())
    })
}

/// What a step gave, without what differs between any two runs.
fn session(docker: &Docker, runtime: &str) -> Result<Vec<String>> {
    let dir = docker.world().dir().join("session");
    std::fs::create_dir(&dir)?;
    let runtime_alone = format!("--runtime {runtime}");
    let options = format!("{runtime_alone} --network none");
    let mut seen = Vec::new();
    for (name, command) in STEPS {
        let dir_text = dir.to_string_lossy();
        let variables =
            [("R", "docker run"), ("N", options.as_str()), ("W", &*runtime_alone), ("D", &*dir_text)];
        let finished = docker.script(&dir, &variables, command)?;
        println!("{runtime}, {name}: {} after {} ms", finished.code(), finished.took.as_millis());
        seen.push(normalised(&finished, &dir));
    }
    std::fs::remove_dir_all(&dir)?;
    Ok(seen)
}

fn normalised(finished: &Finished, dir: &Path) -> String {
    let text = |text: String| {
        // Terminals say so that their input has ended, at any time.
        let text = text.replace(&*dir.to_string_lossy(), "DIR").replace(['\r', '\0'], "").replace("^@", "");
        // Numbers of descriptors, in Docker's own errors.
        let mut parts = text.split("/proc/self/fd/");
        let first = parts.next().unwrap_or_default().to_owned();
        let text = parts
            .fold(first, |text, part| text + "FD" + part.trim_start_matches(|c: char| c.is_ascii_digit()));
        text.split_inclusive(|c: char| !c.is_ascii_alphanumeric()).map(without_id).collect::<String>()
    };
    format!("-> {}\n{}{}", finished.code(), text(finished.text()), text(finished.errors()))
}

/// A word, or `ID` where it is one of a container or an image.
fn without_id(word: &str) -> String {
    let bare = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
    let is_id = matches!(bare.len(), 12 | 64) && bare.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_id { word.replacen(bare, "ID", 1) } else { word.to_owned() }
}

#[test]
fn names_are_steps_and_ids_are_not_compared() {
    assert_eq!(without_id("0123456789ab "), "ID ");
    assert_eq!(without_id("hello\n"), "hello\n");
    // One name each, and no excuse for what is no step.
    let mut names: Vec<_> =
        STEPS.iter().map(|step| step.0).chain(DIFFERENT.iter().map(|one| one.0)).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), STEPS.len());
}
