//! Programs people run, in a whole Debian: each case starts one container and
//! works in it by `ctr task exec`.

mod roots;

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    case_with,
    ctr::{Ctr, Run},
    job::{Finished, Input},
    scale,
    world::World,
};

/// Its OCI archive, which `cargo xtask test` makes and names.
const IMAGE_ENV: &str = "RVM_TEST_DEBIAN_IMAGE";
const IMAGE: &str = "docker.io/library/debian-services:latest";

/// Runs a case with the image, which stays for the next one.
fn case(test: impl FnOnce(&World) -> Result<()>) {
    case_with(import, test);
}

fn import(world: &World) -> Result<()> {
    let ctr = world.ctr();
    if ctr.list(&["images", "ls", "-q"]).iter().any(|name| name == IMAGE) {
        return Ok(());
    }
    let archive = std::env::var(IMAGE_ENV).with_context(|| format!("{IMAGE_ENV} is not set"))?;
    timed("importing the image", || {
        ctr.run(&["images", "import", &archive], scale::container() * 10)?.success().map(drop)
    })
}

/// A running Debian.
struct Debian<'a> {
    world: &'a World,
    ctr: Ctr,
    run: Run,
}

impl<'a> Debian<'a> {
    fn start(world: &'a World) -> Result<Self> {
        Self::with(world, &[])
    }

    /// With more options of `ctr run`.
    fn with(world: &'a World, options: &[&str]) -> Result<Self> {
        let ctr = world.ctr();
        let run = ctr.container("debian").with_image(IMAGE).with(options).detached();
        timed("starting the container", || run.run(&["sleep", "infinity"])?.success().map(drop))?;
        Ok(Self { world, ctr, run })
    }

    /// A shell script as root.
    fn script(&self, what: &str, script: &str) -> Result<Finished> {
        self.exec(what, &[], script)
    }

    fn exec(&self, what: &str, options: &[&str], script: &str) -> Result<Finished> {
        timed(what, || {
            let args = ["sh", "-ec", script];
            let job = self.ctr.exec(&self.run.id, options, &args, Input::Nothing)?;
            job.finish(scale::container() * 4)?.success()
        })
    }

    fn end(self) -> Result<()> {
        self.world.end(&self.run.id)
    }
}

fn timed<T>(what: &str, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let result = act().with_context(|| what.to_owned());
    println!("{:>7} ms  {what}", started.elapsed().as_millis());
    result
}

#[test]
fn nginx_serves() {
    case(|world| {
        let debian = Debian::start(world)?;
        debian.script(
            "writing the page",
            "seq 1 10000 > /var/www/html/numbers; ip link set lo up 2>/dev/null || true",
        )?;
        debian.script("starting nginx", "nginx")?;
        let request = "python3 -c \"
import urllib.request
page = urllib.request.urlopen('http://127.0.0.1/numbers').read()
assert page == b''.join(b'%d\\n' % n for n in range(1, 10001)), len(page)
missing = None
try: urllib.request.urlopen('http://127.0.0.1/missing')
except urllib.error.HTTPError as error: missing = error.code
assert missing == 404, missing
print('served', len(page))\"";
        let served = debian.script("a request", request)?;
        ensure!(served.text() == "served 48894\n", "{served}");
        let workers = debian.script("its processes", "cat /proc/[0-9]*/comm | grep -c nginx")?;
        ensure!(workers.text().trim().parse::<u32>()? >= 2, "a master and a worker: {workers}");
        debian.script("stopping nginx", "nginx -s quit")?;
        debian.end()
    });
}

#[test]
fn apt_installs_a_package_file() {
    case(|world| {
        let debian = Debian::start(world)?;
        let build = "mkdir -p /tmp/p/DEBIAN /tmp/p/usr/bin /tmp/p/etc
printf '#!/bin/sh\\necho from the package\\n' > /tmp/p/usr/bin/packaged
chmod 755 /tmp/p/usr/bin/packaged
echo setting > /tmp/p/etc/packaged.conf
printf 'Package: packaged\\nVersion: 1.0\\nArchitecture: all\\nMaintainer: nobody <nobody@example.org>\\nDepends: python3\\nDescription: a package of the test\\n' > /tmp/p/DEBIAN/control
echo /etc/packaged.conf > /tmp/p/DEBIAN/conffiles
printf '#!/bin/sh\\nset -e\\nadduser --system --quiet --no-create-home packaged\\nchown packaged /etc/packaged.conf\\n' > /tmp/p/DEBIAN/postinst
chmod 755 /tmp/p/DEBIAN/postinst
dpkg-deb --build --root-owner-group /tmp/p /tmp/packaged.deb";
        debian.script("building the package", build)?;
        debian.script(
            "apt-get install",
            "DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends /tmp/packaged.deb",
        )?;
        let seen = debian.script(
            "running it",
            "packaged; stat -c %U /etc/packaged.conf; dpkg -s packaged | grep Status",
        )?;
        ensure!(seen.text() == "from the package\npackaged\nStatus: install ok installed\n", "{seen}");
        debian.script("apt-get purge", "DEBIAN_FRONTEND=noninteractive apt-get purge -y -q packaged")?;
        let gone = debian
            .script("it is gone", "ls /usr/bin/packaged /etc/packaged.conf 2>&1 | grep -c 'No such file'")?;
        ensure!(gone.text() == "2\n", "{gone}");
        debian.end()
    });
}

#[test]
fn postgresql_passes_pgbench() {
    case(|world| {
        let debian = Debian::start(world)?;
        let as_postgres = |what: &str, script: &str| {
            let script = format!("export PATH=$PATH:$(echo /usr/lib/postgresql/*/bin); cd /tmp; {script}");
            debian.exec(what, &["--user", "postgres"], &script)
        };
        as_postgres("initdb", "initdb --no-sync -D /tmp/db >/tmp/initdb.log")?;
        // Its own shared memory, semaphores and sockets are what is tried here, and fsync.
        as_postgres(
            "starting the server",
            "pg_ctl -D /tmp/db -l /tmp/log -w -t 120 -o '-k /tmp' start >/dev/null",
        )?;
        as_postgres("pgbench -i", "pgbench -h /tmp -i -q -s 1 postgres")?;
        let run = as_postgres("pgbench", "pgbench -h /tmp -n -c 4 -j 2 -t 25 postgres")?;
        ensure!(run.text().contains("number of transactions actually processed: 100/100"), "{run}");
        println!("{}", run.text());
        let sums = as_postgres(
            "what it left",
            "psql -h /tmp -Atc 'select count(*) from pgbench_accounts; select count(*) from pgbench_history; \
             select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history)' postgres",
        )?;
        ensure!(sums.text() == "100000\n100\nt\n", "{sums}");
        as_postgres("stopping the server", "pg_ctl -D /tmp/db -w -t 120 stop >/dev/null")?;
        debian.end()
    });
}

#[test]
fn python_os_socket_multiprocessing() {
    case(|world| {
        let debian = Debian::start(world)?;
        let program = r#"cat > /tmp/smoke.py <<'END'
import fcntl, mmap, multiprocessing, os, pwd, select, signal, socket, subprocess, tempfile, threading, time

def square(number):
    return number * number

def child(connection, lock, value):
    with lock:
        value.value += os.getpid() != 0
    connection.send(os.getpid())

if __name__ == "__main__":
    # os
    assert os.getpid() != 1 and os.path.exists("/proc/1/status")
    assert pwd.getpwuid(os.getuid()).pw_name == "root"
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "file")
        with open(path, "wb") as file:
            file.write(b"x" * 10000)
            file.flush()
            os.fsync(file.fileno())
            fcntl.flock(file, fcntl.LOCK_EX)
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            memory[:5] = b"hello"
            memory.flush()
        assert open(path, "rb").read(6) == b"hellox"
        os.rename(path, path + "2")
        os.link(path + "2", path)
        os.symlink("file", path + "3")
        assert os.stat(path + "3").st_nlink == 2 and os.readlink(path + "3") == "file"
        assert sorted(os.listdir(directory)) == ["file", "file2", "file3"]
    assert subprocess.run(["sh", "-c", "exit 7"]).returncode == 7
    received = []
    signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    os.kill(os.getpid(), signal.SIGUSR1)
    assert received == [signal.SIGUSR1]
    # socket
    server = socket.create_server(("127.0.0.1", 0))
    def serve():
        connection, _ = server.accept()
        with connection:
            while data := connection.recv(65536):
                connection.sendall(data)
    threading.Thread(target=serve, daemon=True).start()
    with socket.create_connection(server.getsockname()) as client:
        sent = os.urandom(300000)
        threading.Thread(target=lambda: (client.sendall(sent), client.shutdown(socket.SHUT_WR))).start()
        back = b""
        while data := client.recv(65536):
            back += data
    assert back == sent
    left, right = socket.socketpair()
    socket.send_fds(left, [b"fd"], [0])
    assert len(socket.recv_fds(right, 10, 1)[1]) == 1
    poller = select.epoll()
    poller.register(right, select.EPOLLIN)
    left.send(b"now")
    assert poller.poll(5)
    # multiprocessing
    with multiprocessing.Pool(4) as pool:
        assert pool.map(square, range(100)) == [n * n for n in range(100)]
    lock, value = multiprocessing.Lock(), multiprocessing.Value("i", 0)
    pipes = [multiprocessing.Pipe() for _ in range(4)]
    children = [multiprocessing.Process(target=child, args=(pipe[1], lock, value)) for pipe in pipes]
    for process in children: process.start()
    pids = {pipe[0].recv() for pipe in pipes}
    for process in children: process.join()
    assert len(pids) == 4 and value.value == 4
    print("smoke ok", multiprocessing.cpu_count() > 0)
END
python3 /tmp/smoke.py"#;
        let smoke = debian.script("python", program)?;
        ensure!(smoke.text() == "smoke ok True\n", "{smoke}");
        debian.end()
    });
}

/// What a container that builds networks of its own makes: every type of link, and packet filters by all three tools.
#[test]
fn networks_and_packet_filters() {
    case(|world| {
        let debian = Debian::with(world, &["--cap-add", "CAP_NET_ADMIN", "--cap-add", "CAP_NET_RAW"])?;
        let links = "ip link add d0 type dummy; ip link add b0 type bridge vlan_filtering 1
ip link add v0 type veth peer name v1; ip link add vlan0 link d0 type vlan id 7
ip link add mac0 link d0 type macvlan mode bridge; ip link add ipvlan0 link v0 type ipvlan mode l3
ip link add vx0 type vxlan id 42 dev d0 dstport 4789; ip link add wg0 type wireguard
for d in d0 b0 v0 vlan0 mac0 ipvlan0 vx0 wg0; do ip -o -d link show $d | grep -o -w -E 'dummy|bridge|veth|vlan protocol|macvlan mode|ipvlan|vxlan id|wireguard'; done";
        let made = debian.script("links", links)?;
        let kinds: std::collections::BTreeSet<&str> = made.text().leak().lines().collect();
        for kind in
            ["dummy", "bridge", "veth", "vlan protocol", "macvlan mode", "ipvlan", "vxlan id", "wireguard"]
        {
            ensure!(kinds.contains(kind), "no {kind}: {made}");
        }
        debian.script(
            "routes",
            "ip address add 10.7.0.1/24 dev d0; ip link set d0 up
ip route add 10.9.0.0/16 nexthop via 10.7.0.2 weight 2 nexthop via 10.7.0.3
ip -6 route add fd09::/64 nexthop via fe80::2 dev d0 nexthop via fe80::3 dev d0
ip rule add fwmark 7 lookup 100; ip route add default via 10.7.0.4 table 100
ip route get 10.11.0.1 mark 7 | grep 'via 10.7.0.4'
{ ip route show 10.9.0.0/16; ip -6 route show fd09::/64; } | grep -c 'nexthop via' | grep -x 4",
        )?;
        debian.script(
            "shaping",
            "tc qdisc add dev d0 root handle 1: htb; tc qdisc add dev d0 clsact; tc qdisc add dev v0 root fq",
        )?;
        debian.script(
            "nft",
            "nft -f - <<'EOF'
table netdev n {
  chain in { type filter hook ingress device v0 priority 0; drop; }
  chain out { type filter hook egress device v0 priority 0; drop; }
}
table bridge b {
  chain forward { type filter hook forward priority 0; ether type ip accept; }
}
table inet t {
  chain pre {
    type filter hook prerouting priority mangle
    ct zone set 5
    meta l4proto tcp socket transparent 1 accept
    meta l4proto tcp tproxy ip to 127.0.0.1:15001 accept
    log group 3
    queue num 1
  }
}
EOF
nft list ruleset | grep -c -E 'tproxy|zone|egress|ingress|log group|queue|socket' | grep -x 7",
        )?;
        debian.script(
            "ipset and iptables",
            "ipset create nets hash:net; ipset add nets 10.0.0.0/8; ipset create ports hash:ip,port
ipset test nets 10.1.2.3
for iptables in iptables-nft iptables-legacy ip6tables-legacy; do
$iptables -t raw -A PREROUTING -m rpfilter --invert -j DROP
$iptables -t mangle -A PREROUTING -p tcp -m socket --transparent -j MARK --set-mark 1
$iptables -t mangle -A PREROUTING -p tcp -j TPROXY --on-port 15001 --tproxy-mark 1
$iptables -A INPUT -j NFLOG --nflog-group 1; $iptables -A INPUT -j NFQUEUE --queue-num 1
done
iptables-nft -A INPUT -m set --match-set nets src -j DROP
iptables-legacy -A INPUT -m set --match-set nets src -j DROP",
        )?;
        debian.end()
    });
}

/// `mount -o loop` of what a container made itself, in a privileged one.
#[test]
fn file_systems_in_files_are_mounted() {
    case(|world| {
        let debian = Debian::with(world, &["--privileged"])?;
        debian.script(
            "making the file systems",
            "cd /root; mkdir tree; echo kept > tree/file
test -e /dev/loop-control || mknod /dev/loop-control c 10 237
for n in 0 1 2; do test -e /dev/loop$n || mknod /dev/loop$n b 7 $n; done
truncate -s 8M ext4; mkfs.ext4 -q -d tree ext4; mksquashfs tree squashfs -quiet -no-progress
mkfs.erofs -zlz4 erofs tree >/dev/null",
        )?;
        for kind in ["ext4", "squashfs", "erofs"] {
            let script = format!(
                "mkdir -p /mnt; mount -o loop -t {kind} /root/{kind} /mnt; cat /mnt/file; \
                 findmnt -n -o FSTYPE /mnt; umount /mnt"
            );
            let seen = debian.script(kind, &script)?;
            ensure!(seen.text() == format!("kept\n{kind}\n"), "{seen}");
        }
        debian.end()
    });
}
