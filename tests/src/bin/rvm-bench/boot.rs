//! Start times side by side: each kind of run in turn, so that what slows the
//! machine for a while slows all of them.

use std::path::PathBuf;

use anyhow::Result;
use rvm_protocol::vmm::Metrics;
use rvm_tests::stage::Stage;
use serde_json::{Value, json};

use crate::{
    MEMORY_MIB, VCPUS, clean, counters, median,
    monitor::{Monitor, step_medians},
    peer::{self, Announcement, Peer},
};

/// What a peer's microVM is given.
pub struct PeerFiles {
    /// rvm's kernel with the entry and the drivers that the peer's machine needs.
    pub same_kernel: PathBuf,
    /// The kernel where the whole product is compared.
    pub trial_kernel: PathBuf,
    /// The initramfs with it: an `/init` that prints one line.
    pub trial_initramfs: PathBuf,
}

/// Everything timed and counted.
pub fn measure(stage: &Stage, files: &PeerFiles, runs: usize) -> Result<Value> {
    counters::mount_both()?;
    let same_peer = || Peer::start(&files.same_kernel, &stage.initramfs(), Announcement::Vsock);
    let whole_peer = || Peer::start(&files.trial_kernel, &files.trial_initramfs, Announcement::Console);

    let (mut rvm_ms, mut jailed_ms, mut same_ms, mut whole_ms) = (vec![], vec![], vec![], vec![]);
    let mut metrics: Vec<Metrics> = Vec::new();
    // The first round fills caches and is not counted.
    for round in 0..=runs {
        clean::free_memory()?;
        let rvm = Monitor::start(stage)?;
        let a = rvm.ready_ms()?;
        let counted = rvm.metrics()?;
        rvm.stop()?;
        clean::free_memory()?;
        let rvm = Monitor::start_jailed(stage)?;
        let jailed = rvm.ready_ms()?;
        rvm.stop()?;
        clean::free_memory()?;
        let qemu = same_peer()?;
        let b = qemu.ready_ms()?;
        qemu.stop()?;
        clean::free_memory()?;
        let qemu = whole_peer()?;
        let c = qemu.ready_ms()?;
        qemu.stop()?;
        eprintln!(
            "round {round}: rvm {a:.0} ms, shut in {jailed:.0} ms; QEMU microvm, same kernel and initramfs {b:.0} ms, trial kernel {c:.0} ms"
        );
        if round > 0 {
            rvm_ms.push(a);
            jailed_ms.push(jailed);
            same_ms.push(b);
            whole_ms.push(c);
            metrics.push(counted);
        }
    }

    let exits = count_exits(stage, &whole_peer, &same_peer)?;
    let steps = step_medians(&metrics);
    Ok(json!({
        "ratios": {
            "rvm/qemu-microvm, same kernel and initramfs": median(&rvm_ms) / median(&same_ms),
            "rvm/qemu-microvm, whole product": median(&rvm_ms) / median(&whole_ms),
            "rvm/rvm without its jail": median(&jailed_ms) / median(&rvm_ms),
        },
        "medians_ms": {
            "rvm": median(&rvm_ms),
            "rvm, shut in": median(&jailed_ms),
            "qemu-microvm, rvm's kernel and initramfs": median(&same_ms),
            "qemu-microvm, trial kernel": median(&whole_ms),
        },
        "runs_ms": {
            "rvm": rvm_ms,
            "rvm, shut in": jailed_ms,
            "qemu-microvm, rvm's kernel and initramfs": same_ms,
            "qemu-microvm, trial kernel": whole_ms,
        },
        "steps_ms": steps,
        "exits": exits,
        "conditions": {
            "runs": runs,
            "vcpus": VCPUS,
            "memory_mib": MEMORY_MIB,
            "qemu": peer::version()?,
            "qemu_machine": peer::MACHINE,
            "host_kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
            "devhost": std::env::var(rvm_tests::host::DEVHOST_ENV).ok(),
            "same_kernel_ready": "rvm-agent's line on vsock port 1025, over rvm's vsock and over vhost-vsock",
            "whole_product_ready": "rvm: rvm-agent's line on vsock; QEMU: the first line /init prints on the serial console",
        },
    }))
}

/// What the jail adds to a start: one in turn that is shut in, and one that is not.
pub fn jail(stage: &Stage, runs: usize) -> Result<Value> {
    let mut all: [Vec<f64>; 2] = Default::default();
    let mut metrics: [Vec<Metrics>; 2] = Default::default();
    // The first round fills caches and is not counted.
    for round in 0..=runs {
        let one = |start: fn(&Stage) -> Result<Monitor>| -> Result<(f64, Metrics)> {
            clean::free_memory()?;
            let monitor = start(stage)?;
            let ready = (monitor.ready_ms()?, monitor.metrics()?);
            monitor.stop()?;
            Ok(ready)
        };
        let [open, shut] = [one(Monitor::start)?, one(Monitor::start_jailed)?];
        eprintln!("round {round}: {:.0} ms, shut in {:.0} ms", open.0, shut.0);
        if round > 0 {
            for (which, (ms, counted)) in [open, shut].into_iter().enumerate() {
                all[which].push(ms);
                metrics[which].push(counted);
            }
        }
    }
    let [open, shut] = all.each_ref().map(|ms| median(ms));
    Ok(json!({
        "ratios": { "rvm/rvm without its jail": shut / open },
        "medians_ms": { "rvm": open, "rvm, shut in": shut },
        "runs_ms": { "rvm": all[0], "rvm, shut in": all[1] },
        "steps_ms": { "rvm": step_medians(&metrics[0]), "rvm, shut in": step_medians(&metrics[1]) },
        "conditions": {
            "runs": runs,
            "vcpus": VCPUS,
            "memory_mib": MEMORY_MIB,
            "host_kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
            "devhost": std::env::var(rvm_tests::host::DEVHOST_ENV).ok(),
            "ready": "rvm-agent's line on vsock port 1025",
        },
    }))
}

/// One more run of each, counted by KVM instead of timed.
fn count_exits(
    stage: &Stage,
    whole_peer: &dyn Fn() -> Result<Peer>,
    same_peer: &dyn Fn() -> Result<Peer>,
) -> Result<Value> {
    let counting = counters::UserspaceExits::count()?;
    let rvm = Monitor::start(stage)?;
    rvm.ready_ms()?;
    let metrics = rvm.metrics()?;
    let by_kvm = json!({
        "to_user_space": counting.by_reason()?,
        "kvm": counters::of_vm(rvm.pid()),
        "monitor": metrics.exits,
    });
    rvm.stop()?;
    drop(counting);
    let count_peer = |start: &dyn Fn() -> Result<Peer>| -> Result<Value> {
        let counting = counters::UserspaceExits::count()?;
        let qemu = start()?;
        qemu.ready_ms()?;
        let counted = json!({ "to_user_space": counting.by_reason()?, "kvm": counters::of_vm(qemu.pid()) });
        qemu.stop()?;
        Ok(counted)
    };
    Ok(json!({
        "rvm": by_kvm,
        "qemu-microvm, trial kernel": count_peer(whole_peer)?,
        "qemu-microvm, rvm's kernel": count_peer(same_peer)?,
    }))
}
