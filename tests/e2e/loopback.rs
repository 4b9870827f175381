//! Sockets that listen on a sandbox's loopback addresses, reached from the host.

use std::{
    fs::File,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;
use rvm_tests::{
    case,
    job::{Input, Job},
    sandbox::Sandbox,
    scale,
    world::World,
};

/// A file to be had at 127.0.0.1:8080 and, another, at [::1]:9090.
const LISTEN: &str = "mkdir /4 /6 && echo four > /4/name && echo six > /6/name && \
                      head -c 3000000 /dev/urandom > /4/large && md5sum < /4/large && \
                      exec < /dev/null > /dev/null 2>&1 && \
                      httpd -p 127.0.0.1:8080 -h /4 && httpd -p [::1]:9090 -h /6";

/// What is asked for, in words of HTTP that end with the connection.
fn get(mut stream: TcpStream, path: &str) -> Result<Vec<u8>> {
    stream.set_read_timeout(Some(scale::container()))?;
    write!(stream, "GET /{path} HTTP/1.0\r\n\r\n")?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let body = answer.windows(4).position(|window| window == b"\r\n\r\n").context("no head")?;
    Ok(answer.split_off(body + 4))
}

fn dial(address: &str) -> Result<TcpStream> {
    let address: SocketAddr = address.parse()?;
    TcpStream::connect_timeout(&address, Duration::from_secs(10)).with_context(|| format!("dial {address}"))
}

/// The address after the nth "Forwarding from".
fn forwarded(job: &Job, number: usize) -> Result<String> {
    let text = job.stdout();
    let line = text.lines().nth(number).with_context(|| format!("line {number} of {text:?}"))?;
    Ok(line.split_whitespace().nth(2).context("an address")?.to_owned())
}

/// `rvmctl port-forward`, and whoever dials in the sandbox's network namespace on
/// the host, reach them; a port nobody listens on is no end of anything.
#[test]
fn a_listener_on_loopback_is_reached_from_the_host() {
    case(|world| {
        let run = world.ctr().container("loopback").detached();
        let pod = format!("io.kubernetes.cri.sandbox-id={}", run.id);
        let kind = "io.kubernetes.cri.container-type=sandbox";
        let run = run.with(&["--annotation", kind, "--annotation", &pod]);
        run.run(&["sleep", "100000"])?.success()?;
        let listen = world.ctr().exec(&run.id, &[], &["sh", "-c", LISTEN], Input::Nothing)?;
        let sum = listen.finish(scale::container())?.success()?.text();
        let sandbox = Sandbox::find(world.stage(), &run.id)?;

        let forward = world.rvmctl(&["port-forward", &run.id, ":8080", ":9090", ":81"]);
        let forward = Job::start(forward, Input::Nothing)?;
        forward.wait_for("-> 81", scale::command())?;
        for (number, expected) in [(0, "four\n"), (1, "six\n")] {
            let answer = get(dial(&forwarded(&forward, number)?)?, "name")?;
            ensure!(answer == expected.as_bytes(), "{}", String::from_utf8_lossy(&answer));
        }
        let large = get(dial(&forwarded(&forward, 0)?)?, "large")?;
        ensure!(large.len() == 3_000_000, "{} bytes", large.len());
        let path = world.write_file("large", &large)?;
        let seen = rvm_tests::world::shell(&format!("md5sum < {path}; rm {path}"))?;
        ensure!(seen == sum, "other bytes than {sum}");
        // Nobody listens there: the connection ends, the forwarding goes on.
        let mut nobody = dial(&forwarded(&forward, 2)?)?;
        ensure!(matches!(nobody.read(&mut [0]), Ok(0) | Err(_)), "somebody answers");
        let together: Vec<_> = (0..20)
            .map(|_| -> Result<_> {
                let stream = dial(&forwarded(&forward, 0)?)?;
                Ok(thread::spawn(move || get(stream, "name")))
            })
            .collect::<Result<_>>()?;
        for answer in together {
            let answer = answer.join().map_err(|_| anyhow::anyhow!("a panic"))??;
            ensure!(answer == b"four\n", "{}", String::from_utf8_lossy(&answer));
        }
        ensure!(forward.stderr().contains("connection refused"), "{}", forward.stderr());
        forward.signal(Signal::SIGINT)?;
        forward.finish(scale::command())?.success()?;

        // In the namespace on the host, as CRI's port-forward dials.
        let task = sandbox_task(world, &run.id)?;
        let namespace = File::open(format!("/proc/{task}/ns/net"))?;
        let inside = thread::spawn(move || -> Result<_> {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            rvm_tests::world::shell("ip link set lo up")?;
            let four = get(dial("127.0.0.1:8080")?, "name")?;
            let six = get(dial("[::1]:9090")?, "name")?;
            let mut nobody = dial("127.0.0.1:81")?;
            ensure!(nobody.read(&mut [0]).is_err(), "somebody answers");
            Ok((four, six))
        });
        let (four, six) = inside.join().map_err(|_| anyhow::anyhow!("a panic"))??;
        ensure!(four == b"four\n" && six == b"six\n", "{four:?} {six:?}");

        // It ends with the sandbox.
        let forward = Job::start(world.rvmctl(&["port-forward", &run.id, ":8080"]), Input::Nothing)?;
        forward.wait_for("-> 8080", scale::command())?;
        world.end(&run.id)?;
        sandbox.wait_until_gone(scale::container())?;
        forward.finish(scale::container())?.success()?;
        Ok(())
    });
}

/// The pid a client knows a task by.
fn sandbox_task(world: &World, id: &str) -> Result<i32> {
    let tasks = world.ctr().list(&["task", "ls"]);
    let pid = tasks.iter().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(id)).then(|| words.next()?.parse().ok()).flatten()
    });
    pid.with_context(|| format!("no task {id} in {tasks:?}"))
}
