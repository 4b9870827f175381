//! A container's network, side by side: runc's veth, rvm with vhost-net and in user space, and the
//! same kernel in QEMU's `microvm` with vhost-net.
//!
//! A pair of guests of each kind in turn on one bridge of the host, so that what slows the machine
//! for a while slows all.

mod guest;
mod measures;

use std::{collections::BTreeMap, path::PathBuf, time::Instant};

use anyhow::Result;
use guest::{Bridge, Guest, Kind, Programs};
use measures::{Length, RATES};
use rvm_tests::{
    cni,
    stage::{RUNTIME, Stage},
    world::{World, shell},
};
use serde_json::{Value, json};

use crate::{RUNC, counters, median, peer, swept};

/// Everything measured; `kernel` is what QEMU boots. In a short run transfers take a second.
pub fn measure(stage: Stage, runs: usize, kernel: PathBuf, short: bool) -> Result<Value> {
    let length =
        if short { Length { seconds: 1, requests: 300 } } else { Length { seconds: 3, requests: 2000 } };
    let world = World::new(stage)?;
    counters::mount_both()?;
    swept(&world, |world| {
        let starts = starts(world, runs)?;
        compared(world, (runs, length), kernel, &starts)
    })
}

/// Milliseconds of `ctr run --rm --cni` of `true`, under runc and under rvm.
fn starts(world: &World, runs: usize) -> Result<[Vec<f64>; 2]> {
    let network = cni::ForCtr::new(&json!([
        {"type": "bridge", "bridge": "rvmbench", "isGateway": true, "ipMasq": true,
         "ipam": {"type": "host-local", "dataDir": "/run/rvm-tests/cni",
                  "ranges": [[{"subnet": "10.91.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
        {"type": "portmap", "capabilities": {"portMappings": true}},
    ]))?;
    let mut times = [Vec::new(), Vec::new()];
    // The first round fills caches and is not counted.
    for round in 0..=runs {
        for (runtime, times) in [RUNC, RUNTIME].into_iter().zip(&mut times) {
            let run = world.ctr().under(runtime).container("start").with(&["--cni"]);
            let started = Instant::now();
            run.run(&["/bin/true"])?.success()?;
            let ms = started.elapsed().as_secs_f64() * 1e3;
            eprintln!("start with a network, round {round}: {runtime} {ms:.0} ms");
            if round > 0 {
                times.push(ms);
            }
        }
    }
    drop(network);
    shell("ip link delete rvmbench; rm -rf /run/rvm-tests/cni /run/xtables.lock")?;
    Ok(times)
}

fn compared(
    world: &World,
    (runs, length): (usize, Length),
    kernel: PathBuf,
    starts: &[Vec<f64>; 2],
) -> Result<Value> {
    let programs = Programs::collect(world, kernel)?;
    let _bridge = Bridge::new()?;
    let mut all: BTreeMap<Kind, BTreeMap<String, Vec<f64>>> = BTreeMap::new();
    let (mut order, mut costs) = (Vec::new(), serde_json::Map::new());
    for round in 1..=runs {
        for kind in Kind::ALL {
            let first = Guest::start(world, &programs, kind, 2)?;
            let second = Guest::start(world, &programs, kind, 3)?;
            let (measured, cost) = measures::all(&first, &second, length)?;
            for guest in [first, second] {
                guest.stop()?;
            }
            for (name, value) in measured {
                eprintln!("round {round}: {}: {name}: {value:.3}", kind.name());
                if !order.contains(&name) {
                    order.push(name.clone());
                }
                all.entry(kind).or_default().entry(name).or_default().push(value);
            }
            costs.insert(kind.name().to_owned(), cost);
        }
    }
    world.set_config(&world.config())?;

    let middle = |kind: Kind, name: &str| {
        all.get(&kind).and_then(|measured| measured.get(name)).map_or(f64::NAN, |values| median(values))
    };
    let mut ratios = serde_json::Map::new();
    ratios
        .insert("rvm/runc, start with a network".to_owned(), json!(median(&starts[1]) / median(&starts[0])));
    let pairs = [
        ("rvm/qemu, vhost", Kind::RvmVhost, Kind::Qemu),
        ("rvm in user space/qemu, vhost", Kind::RvmUserSpace, Kind::Qemu),
        ("rvm/runc", Kind::RvmVhost, Kind::Runc),
    ];
    for (pair, one, other) in pairs {
        for name in order.iter().filter(|name| !name.starts_with("UDP")) {
            let (one, other) = (middle(one, name), middle(other, name));
            // Time, or the inverse of throughput.
            let ratio = if name.starts_with("TCP") { other / one } else { one / other };
            ratios.insert(format!("{pair}, {name}"), json!(ratio));
        }
    }
    let medians: Vec<Value> =
        order.iter().map(|name| json!([name, Kind::ALL.map(|kind| json!(middle(kind, name)))])).collect();
    let by_kind = |all: &BTreeMap<Kind, BTreeMap<String, Vec<f64>>>| -> Value {
        all.iter()
            .map(|(kind, measured)| (kind.name().to_owned(), json!(measured)))
            .collect::<serde_json::Map<_, _>>()
            .into()
    };
    Ok(json!({
        "ratios": ratios,
        "kinds": Kind::ALL.map(Kind::name),
        "medians": medians,
        "costs for each frame, last run": costs,
        "starts_ms": { "runc": starts[0], "rvm": starts[1] },
        "runs": by_kind(&all),
        "conditions": {
            "runs": runs,
            "units": "TCP: Mbit/s; UDP: percent lost of datagrams of 1400 bytes; requests and pings: ms",
            "transfers": format!("{} s each; in: from the host; out: to it", length.seconds),
            "requests": format!("{}, of one byte, one after another, answered by cat", length.requests),
            "udp_rates_mbit": RATES,
            "start with a network": "ctr run --rm --cni of /bin/true, by the plugins bridge, host-local and portmap",
            "containers": "a veth on a bridge of the host, 1500 bytes; rvm: a tap redirected to it by tc, as always",
            "qemu": peer::version()?,
            "qemu_machine": format!("{}, virtio-net on MMIO, its tap on the bridge, rvm's kernel", peer::MACHINE),
            "frames": "as counted at the guest's port of the bridge; one that is yet to be cut into segments is one",
            "host_kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "devhost": std::env::var(rvm_tests::host::DEVHOST_ENV).ok(),
        },
    }))
}
