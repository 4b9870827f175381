//! The monitor's network interfaces with a kernel that drives them, moved by the
//! monitor and by the host's kernel (vhost-net).

use std::{
    fs::{File, OpenOptions},
    os::fd::{AsRawFd, OwnedFd},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use rvm_protocol::vmm::{InheritedNet, NetConfig, NetMetrics, NetMover, RateLimit, Request, TokenBucket};
use rvm_tests::{
    case,
    machine::networked::{DOWNLOAD, Machine, Shape},
    world::World,
};

const SLOT: u8 = 24;
const PLUGGED: u8 = 25;
const MTU: u16 = 9000;

/// A case on a thread that has, and with all that it starts, a network of its own:
/// whatever is left in it goes with it.
fn case_in_network(test: impl FnOnce(&World) -> Result<()> + Send) {
    case(|world| {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
                // Where they are built in there is no such module.
                let _ = Command::new("modprobe").args(["-a", "tun", "vhost_net"]).status();
                ip("link set lo up")?;
                test(world)
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    });
}

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split(' ')).output()?;
    ensure!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A tap with the address 10.0.SLOT.1, there as long as the descriptors are.
fn tap(slot: u8, queues: usize) -> Result<Vec<OwnedFd>> {
    // SAFETY: an ifreq is plain numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(format!("tap{slot}").bytes()) {
        *place = byte as libc::c_char;
    }
    let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
    let open = || -> Result<OwnedFd> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
        let mut request = request;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the request takes an ifreq.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
            bail!("TUNSETIFF: {}", std::io::Error::last_os_error());
        }
        Ok(file.into())
    };
    let taps = (0..queues).map(|_| open()).collect::<Result<_>>()?;
    ip(&format!("addr add 10.0.{slot}.1/24 dev tap{slot}"))?;
    ip(&format!("link set tap{slot} mtu {MTU} up"))?;
    Ok(taps)
}

fn vhost(count: usize) -> Result<Vec<OwnedFd>> {
    let open = || OpenOptions::new().read(true).write(true).open("/dev/vhost-net").context("/dev/vhost-net");
    (0..count).map(|_| Ok(open()?.into())).collect()
}

fn config(slot: u8) -> NetConfig {
    NetConfig { slot, mac: [2, 0, 0, 0, 0, slot], mtu: MTU, queue_pairs: 1, receive: None, transmit: None }
}

/// The descriptors of an interface whose frames `mover` is to move.
fn descriptors(slot: u8, mover: NetMover) -> Result<(Vec<OwnedFd>, Vec<OwnedFd>)> {
    Ok((tap(slot, 1)?, if mover == NetMover::Vhost { vhost(1)? } else { Vec::new() }))
}

/// A machine with one interface; the test keeps none of its descriptors.
fn machine(world: &World, mover: NetMover, restore: Option<&std::path::Path>) -> Result<Machine> {
    let (taps, vhost) = descriptors(SLOT, mover)?;
    let numbers = |fds: &[OwnedFd]| fds.iter().map(AsRawFd::as_raw_fd).collect();
    let net = InheritedNet { net: config(SLOT), taps: numbers(&taps), vhost: numbers(&vhost) };
    let shape = Shape { memory: 192, more: 256, vcpus: 1, nets: vec![net], restore };
    Machine::start(world, shape)
}

fn net(machine: &mut Machine, slot: u8) -> Result<NetMetrics> {
    let metrics = machine.metrics()?;
    metrics.nets.into_iter().find(|net| net.slot == slot).with_context(|| format!("there is no net {slot}"))
}

/// `mover` moves the frames, and no other has tried to.
fn ensure_moved(machine: &mut Machine, slot: u8, mover: NetMover) -> Result<()> {
    let net = net(machine, slot)?;
    ensure!((net.mover, &net.fallback) == (mover, &None), "{net:?}");
    Ok(())
}

/// Pings of each size come back, all of them.
fn ping(machine: &Machine, slot: u8) -> Result<()> {
    for bytes in [8, 1400, 8900, 30_000] {
        let output = machine.shell(slot, &format!("ping -q -c 5 -i 0.05 -s {bytes} 10.0.{slot}.1"))?;
        ensure!(output.contains(" 0% packet loss"), "{bytes} bytes: {output}");
    }
    Ok(())
}

fn traffic(world: &World, mover: NetMover) -> Result<()> {
    let mut machine = machine(world, mover, None)?;
    machine.wait_up()?;
    let link = machine
        .shell(SLOT, "cat /sys/class/net/eth0/mtu /sys/class/net/eth0/address /sys/class/net/eth0/speed")?;
    ensure!(link == "9000\n02:00:00:00:00:18\n10000\n", "{link}");
    ping(&machine, SLOT)?;
    let up = machine.upload(SLOT, DOWNLOAD)?;
    let before = net(&mut machine, SLOT)?.transmit;
    let down = machine.download(SLOT)?;
    ensure_moved(&mut machine, SLOT, mover)?;
    let moved = net(&mut machine, SLOT)?;
    println!("{mover:?}: {DOWNLOAD} bytes to the guest {up:?}, from it {down:?}: {moved:?}");
    if mover == NetMover::UserSpace {
        ensure!(moved.receive.bytes > DOWNLOAD as u64, "{moved:?}");
        let (bytes, frames) = (moved.transmit.bytes - before.bytes, moved.transmit.frames - before.frames);
        // Segments are not cut by the sender.
        ensure!(bytes > DOWNLOAD as u64 && bytes / frames > u64::from(MTU), "{before:?} {moved:?}");
    }

    // Another one comes and goes under load, with the guest's knowledge and without.
    let plug = |machine: &mut Machine| -> Result<()> {
        let (taps, vhost) = descriptors(PLUGGED, mover)?;
        let fds: Vec<_> = taps.into_iter().chain(vhost).collect();
        machine.ask(Request::AddNet(config(PLUGGED)), &fds)?;
        drop(fds);
        machine.shell(SLOT, "echo 1 > /sys/bus/pci/rescan; interfaces")?;
        ping(machine, PLUGGED)?;
        ensure_moved(machine, PLUGGED, mover)
    };
    let remove = "echo 1 > /sys/bus/pci/devices/0000:00:19.0/remove";
    for known in [true, false] {
        plug(&mut machine)?;
        machine.shell(
            SLOT,
            "for i in 1 2 3; do ping -q -A -s 8000 10.0.25.1 < /dev/null > /dev/null 2>&1 & done",
        )?;
        let mut load = machine.begin_download(PLUGGED)?;
        load.some()?;
        if known {
            machine.shell(SLOT, remove)?;
        }
        machine.ask(Request::RemoveNet { slot: PLUGGED }, &[])?;
        ensure!(net(&mut machine, PLUGGED).is_err());
        // The tap went with it.
        ensure!(ip("link show tap25").is_err());
        if !known {
            // A kernel that was not asked lets go of what is no longer there.
            machine.shell(SLOT, remove)?;
        }
        let devices = machine.shell(SLOT, "ls /sys/bus/pci/devices")?;
        ensure!(!devices.contains("0000:00:19.0"), "{devices}");
        machine.shell(SLOT, "killall ping")?;
        ping(&machine, SLOT)?;
    }

    // Stood still in the middle, and nothing is lost.
    std::thread::scope(|scope| -> Result<()> {
        let mut download = machine.begin_download(SLOT)?;
        let load = scope.spawn(move || download.finish());
        for _ in 0..5 {
            machine.ask(Request::Pause, &[])?;
            machine.ask(Request::Resume, &[])?;
            std::thread::sleep(Duration::from_millis(20));
        }
        load.join().map_err(|_| anyhow::anyhow!("the load panicked"))??;
        Ok(())
    })?;
    ensure_moved(&mut machine, SLOT, mover)?;

    machine.shell(
        SLOT,
        "while usleep 20000; do cat /sys/class/net/eth0/carrier; done < /dev/null > /tmp/carrier 2> /dev/null &",
    )?;
    for up in [false, true] {
        machine.ask(Request::SetLink { slot: SLOT, up }, &[])?;
        // As long as the guest may take to look.
        std::thread::sleep(Duration::from_secs(1));
    }
    let carrier = machine.shell(SLOT, "killall usleep; uniq /tmp/carrier")?;
    ensure!(carrier.ends_with("0\n1\n"), "{carrier:?}");

    // Memory that comes later can be used as well: what there was is full. It comes in two blocks, of which the first may
    // be there before the second.
    const WITH_BOTH_KIB: u64 = 400_000;
    machine.ask(Request::SetHotplugMemory { mib: 256 }, &[])?;
    let script = format!(
        "echo 1 > /sys/bus/pci/rescan; for i in $(seq 100); do \
         for block in /sys/devices/system/memory/memory*/state; do echo online > $block; done 2> /dev/null; \
         [ $(awk '/MemTotal/ {{ print $2 }}' /proc/meminfo) -gt {WITH_BOTH_KIB} ] && break; usleep 50000; done; \
         dd if=/dev/zero of=/tmp/full bs=1M 2> /dev/null; grep MemTotal /proc/meminfo"
    );
    let grown = machine.shell(SLOT, &script)?;
    let total: u64 =
        grown.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).context(grown.clone())?;
    ensure!(total > WITH_BOTH_KIB, "{grown}");
    machine.upload(SLOT, DOWNLOAD)?;
    machine.download(SLOT)?;
    ensure_moved(&mut machine, SLOT, mover)
}

#[test]
fn the_monitor_moves_frames() {
    case_in_network(|world| traffic(world, NetMover::UserSpace));
}

#[test]
fn the_hosts_kernel_moves_frames() {
    case_in_network(|world| traffic(world, NetMover::Vhost));
}

#[test]
fn a_saved_machine_goes_on_with_its_network() {
    case_in_network(|world| {
        let mut first = machine(world, NetMover::Vhost, None)?;
        first.wait_up()?;
        first.shell(SLOT, "echo kept > /tmp/kept; ip link set eth0 mtu 4000")?;
        // Each goes on with what the other left, in a file of its own: one that a machine
        // was made from does not change.
        let mut current = first;
        for (index, mover) in (0..).zip([NetMover::UserSpace, NetMover::Vhost, NetMover::UserSpace]) {
            let path = world.dir().join(format!("snapshot-{index}"));
            let mut download = current.begin_download(SLOT)?;
            download.some().with_context(|| format!("before {mover:?}"))?;
            current.ask(Request::Pause, &[])?;
            let file = File::create(&path)?;
            current.ask(Request::Save, &[file.into()])?;
            drop(download);
            drop(current);
            current = machine(world, mover, Some(&path))?;
            let kept = current.shell(SLOT, "cat /tmp/kept /sys/class/net/eth0/mtu")?;
            ensure!(kept == "kept\n4000\n", "{kept}");
            ping(&current, SLOT)?;
            current.upload(SLOT, DOWNLOAD)?;
            current.download(SLOT)?;
            ensure_moved(&mut current, SLOT, mover)?;
            std::fs::remove_file(&path)?;
        }
        Ok(())
    });
}

#[test]
fn limits_several_queues_and_what_is_no_vhost() {
    case_in_network(|world| {
        let mut machine = machine(world, NetMover::UserSpace, None)?;
        machine.wait_up()?;
        // 4 MB/s: 16 MiB take four seconds at least, whatever vhost could.
        let rate = Some(RateLimit {
            bytes: Some(TokenBucket { per_second: 4_000_000, burst: 400_000 }),
            packets: None,
        });
        let limited = NetConfig { receive: rate, transmit: rate, ..config(PLUGGED) };
        let plug = |machine: &mut Machine, net: NetConfig, fds: Vec<OwnedFd>| -> Result<()> {
            machine.ask(Request::AddNet(net), &fds)?;
            drop(fds);
            machine.shell(SLOT, "echo 1 > /sys/bus/pci/rescan; interfaces").map(drop)
        };
        plug(&mut machine, limited, tap(PLUGGED, 1)?.into_iter().chain(vhost(1)?).collect())?;
        for took in [machine.upload(PLUGGED, DOWNLOAD)?, machine.download(PLUGGED)?] {
            ensure!((3.5..40.0).contains(&took.as_secs_f64()), "{took:?}");
        }
        let moved = net(&mut machine, PLUGGED)?;
        ensure!(moved.mover == NetMover::UserSpace, "{moved:?}");
        ensure!(moved.fallback.as_deref().is_some_and(|why| why.contains("rate limit")), "{moved:?}");
        machine.shell(SLOT, "echo 1 > /sys/bus/pci/devices/0000:00:19.0/remove")?;
        machine.ask(Request::RemoveNet { slot: PLUGGED }, &[])?;

        // Two queues; the guest has one processor and uses one of them, or both if told.
        for vhosts in [0, 2] {
            let several = NetConfig { queue_pairs: 2, ..config(PLUGGED) };
            plug(&mut machine, several, tap(PLUGGED, 2)?.into_iter().chain(vhost(vhosts)?).collect())?;
            ping(&machine, PLUGGED)?;
            machine.upload(PLUGGED, DOWNLOAD)?;
            machine.download(PLUGGED)?;
            let mover = if vhosts == 0 { NetMover::UserSpace } else { NetMover::Vhost };
            ensure_moved(&mut machine, PLUGGED, mover)?;
            machine.shell(SLOT, "echo 1 > /sys/bus/pci/devices/0000:00:19.0/remove")?;
            machine.ask(Request::RemoveNet { slot: PLUGGED }, &[])?;
        }

        // A descriptor that is not vhost-net's: the monitor does it, and says why.
        let null: OwnedFd = File::open("/dev/null")?.into();
        plug(&mut machine, config(PLUGGED), tap(PLUGGED, 1)?.into_iter().chain([null]).collect())?;
        ping(&machine, PLUGGED)?;
        let moved = net(&mut machine, PLUGGED)?;
        ensure!(moved.mover == NetMover::UserSpace, "{moved:?}");
        ensure!(moved.fallback.as_deref().is_some_and(|why| why.contains("VHOST_SET_OWNER")), "{moved:?}");
        ensure!(machine.log().contains("vhost-net does not"), "{}", machine.log());
        Ok(())
    });
}
