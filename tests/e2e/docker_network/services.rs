//! Services of a whole Debian on Docker's networks: nginx behind a published port, names,
//! a compose file.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use rvm_tests::docker::{Docker, case_with_services};

use super::{script, with_networks};

#[test]
fn a_web_server_with_a_published_port() {
    case_with_services(|docker| {
        let page = script(
            docker,
            "docker run -d --name web -p 8080:80 -m 256m --cpus 0.5 --runtime $RUNTIME $S nginx -g 'daemon off;' >/dev/null
             curl -s --retry 100 --retry-all-errors --retry-delay 1 localhost:8080
             curl -s 'http://[::1]:8080' | grep -c '<h1>'; docker port web; docker exec web cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max",
        )?;
        ensure!(page.contains("Welcome to nginx!") && page.contains("\n1\n80/tcp -> 0.0.0.0:8080"), "{page}");
        ensure!(page.ends_with("\n268435456\n50000 100000\n"), "{page}");
        // By its address, from the host and from a container under the other kernel.
        let others = script(
            docker,
            "A=$(docker inspect -f '{{.NetworkSettings.Networks.bridge.IPAddress}}' web)
             curl -s $A | grep -c '<h1>'
             docker run --rm --runtime runc $S curl -s $A | grep -c '<h1>'
             docker stats --no-stream --format '{{.NetIO}}' web
             docker restart -t 1 web >/dev/null
             curl -s --retry 100 --retry-all-errors --retry-delay 1 localhost:8080 | grep -c '<h1>'
             docker rm -f web >/dev/null; curl -s localhost:8080 || echo refused",
        )?;
        ensure!(others.starts_with("1\n1\n") && others.ends_with("\n1\nrefused\n"), "{others}");
        ensure!(!others.contains("0B / 0B"), "{others}");
        Ok(())
    });
}

/// A name server that has one answer to everything, by UDP and by TCP.
const NAME_SERVER: &str = r"
import socket, threading
def answer(query):
    end = query.index(0, 12) + 5
    return query[:2] + b'\x81\x80\0\1\0\1\0\0\0\0' + query[12:end] + b'\xc0\x0c\0\1\0\1\0\0\0\7\0\4\xc0\0\2\7'
def datagrams():
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(('', 53))
    while True:
        query, who = server.recvfrom(4096)
        server.sendto(answer(query), who)
threading.Thread(target=datagrams).start()
server = socket.create_server(('', 53))
while True:
    stream = server.accept()[0]
    reply = answer(stream.recv(4096)[2:])
    stream.sendall(len(reply).to_bytes(2, 'big') + reply)
    stream.close()
";

#[test]
fn names_of_containers_and_of_others() {
    case_with_services(|docker| {
        let server = docker.world().write_file("names.py", NAME_SERVER)?;
        with_networks(docker, "ours theirs outside client late", || names(docker, &server))?;
        std::fs::remove_file(server)?;
        Ok(())
    });
}

fn names(docker: &Docker, server: &str) -> Result<()> {
    let told = script(
        docker,
        &format!(
            "$R -d --name ours --network back --network-alias b $S nginx -g 'daemon off;' >/dev/null
             docker run -d --runtime runc --name theirs --network back $S nginx -g 'daemon off;' >/dev/null
             # A container that serves names itself finds port 53 free.
             $R -d --name outside --network back --ip 10.92.0.53 -v {server}:/names.py:ro $S python3 /names.py >/dev/null
             $R -d --name client --network back --dns 10.92.0.53 $S sleep 1000 >/dev/null
             docker exec client grep ^nameserver /etc/resolv.conf
             get() {{ docker exec $1 curl -s --retry 100 --retry-all-errors --retry-delay 1 http://$2 | grep -c '<h1>'; }}
             get client b; get client ours; get client theirs; get theirs b
             docker exec -e RES_OPTIONS=use-vc client getent ahostsv4 theirs | grep -c STREAM
             for way in '' use-vc; do docker exec -e RES_OPTIONS=$way client getent ahostsv4 outside.example | grep STREAM; done"
        ),
    )?;
    ensure!(
        told == "nameserver 127.0.0.11\n1\n1\n1\n1\n1\n192.0.2.7       STREAM outside.example\n192.0.2.7       STREAM outside.example\n",
        "{told}"
    );
    // One that had no such network when it started.
    let told = script(
        docker,
        "$R -d --name late $S sleep 1000 >/dev/null
         docker exec late getent hosts b || echo unknown
         docker network connect back late
         docker exec late curl -s --retry 100 --retry-all-errors --retry-delay 1 http://b | grep -c '<h1>'
         docker network disconnect back late
         while docker exec late getent hosts b; do :; done; echo unknown",
    )?;
    ensure!(told.starts_with("unknown\n1\n") && told.ends_with("unknown\n"), "{told}");
    Ok(())
}

#[test]
fn ports_and_names_outlive_the_daemon() {
    case_with_services(|docker| {
        with_networks(docker, "server client", || {
            script(
                docker,
                "$R -d --name server --network back --network-alias b --ip 10.92.0.5 -p 8081:80 $S nginx -g 'daemon off;' >/dev/null
                 $R -d --name client --network back $S sleep 1000 >/dev/null",
            )?;
            let get = |what: &str| {
                script(
                    docker,
                    &format!(
                        "{what} curl -s --retry 100 --retry-all-errors --retry-delay 1 $A | grep '<h1>'"
                    ),
                )
            };
            for signal in [Signal::SIGTERM, Signal::SIGKILL] {
                docker.without_daemon(signal, || get("A=10.92.0.5;").map(drop))?;
                get("A=localhost:8081;")?;
                get("A=b; docker exec client")?;
            }
            script(
                docker,
                "docker network connect front client
                 until docker exec client cat /proc/net/route | grep -q eth1; do :; done",
            )
            .map(drop)
        })
    });
}

const COMPOSE: &str = r#"
services:
  db:
    image: debian-services
    runtime: RUNTIME
    user: postgres
    command: /usr/lib/postgresql/15/bin/postgres -D /var/lib/postgresql/15/main
      -c config_file=/etc/postgresql/15/main/postgresql.conf -c hba_file=/hba.conf
      -c listen_addresses=* -c unix_socket_directories=/tmp
    volumes: ["data:/var/lib/postgresql", "./hba.conf:/hba.conf:ro"]
    healthcheck: {test: "pg_isready -h /tmp", interval: 2s, timeout: 60s, retries: 100}
  web:
    image: debian-services
    runtime: RUNTIME
    command: nginx -g 'daemon off;'
    ports: ["8082:80"]
    healthcheck: {test: "curl -sf localhost", interval: 2s, timeout: 60s, retries: 100}
  client:
    image: debian-services
    runtime: RUNTIME
    command:
      - sh
      - -c
      - curl -s http://web | grep -c '<h1>' && psql -h db -U postgres -Atc 'create table if not exists t (n int)'
        -c 'insert into t values (7)' -c 'select count(*) from t'
    depends_on:
      db: {condition: service_healthy}
      web: {condition: service_healthy}
volumes: {data: {}}
"#;

#[test]
fn three_services_of_a_compose_file() {
    case_with_services(|docker| {
        let files = [
            docker.world().write_file("compose.yaml", COMPOSE.replace("RUNTIME", docker.runtime()))?,
            docker.world().write_file("hba.conf", "host all all all trust\nlocal all all trust\n")?,
        ];
        let told = script(
            docker,
            "C='docker compose -p shop'; trap '$C down -v -t 1 >/dev/null 2>&1' EXIT
             $C up -d 2>&1; docker wait shop-client-1; docker logs shop-client-1 2>&1
             $C ps --format '{{.Service}} {{.Health}}' | sort; curl -s localhost:8082 | grep -c '<h1>'
             # What is in the volume stays.
             $C restart -t 30 db 2>&1; $C run --rm -T client 2>&1
             $C down -v -t 30 2>&1; docker ps -aq | wc -l; docker volume ls -q | wc -l; docker network ls -q | wc -l",
        );
        files.iter().try_for_each(std::fs::remove_file)?;
        let told = told?;
        for part in ["0\n1\nCREATE TABLE\nINSERT 0 1\n1\ndb healthy\nweb healthy\n1\n", "INSERT 0 1\n2\n"] {
            ensure!(told.contains(part), "{part:?}: {told}");
        }
        ensure!(told.ends_with("\n0\n0\n3\n"), "{told}");
        Ok(())
    });
}
