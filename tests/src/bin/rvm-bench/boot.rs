//! Start times side by side: each kind of run in turn, so that what slows the
//! machine for a while slows all of them.

use std::path::PathBuf;

use anyhow::Result;
use rvm_protocol::vmm::Metrics;
use rvm_tests::stage::Stage;
use serde_json::{Value, json};

use crate::{
    MEMORY_MIB, VCPUS, counters, median,
    monitor::{Monitor, step_medians},
    peer::{self, Announcement, Peer},
};

/// The kernels besides the staged one.
pub struct Kernels {
    /// The staged one with virtio-mmio, so that QEMU's microvm can give its
    /// guest a vsock; under rvm in the same comparison.
    pub both: PathBuf,
    /// What a peer's microVM is given.
    pub trial: PathBuf,
    /// Its initramfs: an `/init` that prints one line.
    pub trial_initramfs: PathBuf,
}

/// Everything timed and counted.
pub fn measure(stage: &Stage, kernels: &Kernels, runs: usize) -> Result<Value> {
    counters::mount_both()?;
    let same_peer = || Peer::start(&kernels.both, &stage.initramfs(), Announcement::Vsock);
    let whole_peer = || Peer::start(&kernels.trial, &kernels.trial_initramfs, Announcement::Console);

    let (mut same, mut same_qemu, mut whole, mut whole_qemu) = (vec![], vec![], vec![], vec![]);
    let mut metrics: Vec<Metrics> = Vec::new();
    // The first round fills caches and is not counted.
    for round in 0..=runs {
        let rvm = Monitor::start(stage, &kernels.both)?;
        let a = rvm.ready_ms()?;
        rvm.stop()?;
        let qemu = same_peer()?;
        let b = qemu.ready_ms()?;
        qemu.stop()?;
        let rvm = Monitor::start(stage, &stage.kernel())?;
        let c = rvm.ready_ms()?;
        let counted = rvm.metrics()?;
        rvm.stop()?;
        let qemu = whole_peer()?;
        let d = qemu.ready_ms()?;
        qemu.stop()?;
        eprintln!(
            "round {round}: same kernel rvm {a:.0} QEMU {b:.0} ms, whole product rvm {c:.0} QEMU {d:.0} ms"
        );
        if round > 0 {
            same.push(a);
            same_qemu.push(b);
            whole.push(c);
            whole_qemu.push(d);
            metrics.push(counted);
        }
    }

    let exits = count_exits(stage, &whole_peer, &same_peer)?;
    let steps = step_medians(&metrics);
    Ok(json!({
        "ratios": {
            "rvm/qemu-microvm, same kernel and initramfs": median(&same) / median(&same_qemu),
            "rvm/qemu-microvm, whole product": median(&whole) / median(&whole_qemu),
        },
        "medians_ms": {
            "same kernel, rvm": median(&same),
            "same kernel, qemu-microvm": median(&same_qemu),
            "whole product, rvm": median(&whole),
            "whole product, qemu-microvm": median(&whole_qemu),
        },
        "runs_ms": {
            "same kernel, rvm": same,
            "same kernel, qemu-microvm": same_qemu,
            "whole product, rvm": whole,
            "whole product, qemu-microvm": whole_qemu,
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
            "devhost": std::env::var_os(rvm_tests::host::DEVHOST_ENV).is_some(),
            "same_kernel_ready": "rvm-agent's line on vsock port 1025, over rvm's vsock and over vhost-vsock",
            "whole_product_ready": "rvm: rvm-agent's line on vsock; QEMU: the first line /init prints on the serial console",
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
    let rvm = Monitor::start(stage, &stage.kernel())?;
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
