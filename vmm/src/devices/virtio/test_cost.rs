//! What a device costs without a guest, for `cargo xtask bench`: a monitor that is shut in beside one that is not.

use std::mem::MaybeUninit;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::jail::tests::{apart, filter, inside};
use crate::process::make_room;

/// What one of something took, and what it cost the device's threads of a processor, in seconds.
pub type Cost = (String, f64, f64);

/// Processor time: of the whole process, or of the calling thread.
fn used(who: libc::c_int) -> Duration {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: there is room for a rusage.
    assert_eq!(unsafe { libc::getrusage(who, usage.as_mut_ptr()) }, 0);
    // SAFETY: it was zeroed and then filled.
    let usage = unsafe { usage.assume_init() };
    let time = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// Costs of what `act` does, which returns of how many.
pub fn measure(what: &str, act: impl FnOnce() -> Result<usize>) -> Result<Cost> {
    let device = || used(libc::RUSAGE_SELF) - used(libc::RUSAGE_THREAD);
    let (began, before) = (Instant::now(), device());
    let count = act()? as f64;
    let (took, cost) = (began.elapsed().as_secs_f64(), (device() - before).as_secs_f64());
    Ok((what.to_owned(), took / count, cost / count))
}

/// What comes before a device's threads are made that are to have filters; who measures is no thread of a monitor's.
pub fn filtered() {
    filter().unwrap();
}

/// What is measured in a monitor's jail, with `dir` as its root.
pub fn shut_in(dir: &Path, measure: impl FnOnce() -> Result<Vec<Cost>> + Send) -> Result<Vec<Cost>> {
    costs(&inside(dir, true, || told(measure)))
}

/// What is measured without one, in a process that is as new: the kernel has made nothing for it yet.
pub fn at_large(measure: impl FnOnce() -> Result<Vec<Cost>>) -> Result<Vec<Cost>> {
    costs(&apart(|| told(measure)))
}

/// What a process of its own measures, as it says it.
fn told(measure: impl FnOnce() -> Result<Vec<Cost>>) -> String {
    // As a monitor does.
    match make_room().map_err(anyhow::Error::from).and_then(|()| measure()) {
        Ok(costs) => json!(costs).to_string(),
        Err(error) => format!("{error:#}"),
    }
}

fn costs(said: &str) -> Result<Vec<Cost>> {
    serde_json::from_str(said).with_context(|| said.to_owned())
}

/// Keeps this process, and what it starts, on the processor it is on. To wake up a thread on another one takes a virtual machine
/// longer than most requests do, and whether that happens is the scheduler's affair, for the same work once so and once so.
fn on_one_processor() {
    // SAFETY: takes nothing.
    let here = unsafe { libc::sched_getcpu() };
    // SAFETY: a set of processors is numbers, of which zero is none.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: a set has room for any processor there is.
    unsafe { libc::CPU_SET(here.try_into().unwrap(), &mut set) };
    // SAFETY: a set of the size given.
    let pinned = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    assert_eq!(pinned, 0);
}

/// Measures what is `counted` as often as the benchmark wants it, each time without a jail and shut in, and prints
/// medians on one line that it takes, with `more` conditions.
pub fn report(counted: &str, all: impl Fn() -> Result<[Vec<Cost>; 2]>, more: Value) -> Result<()> {
    let runs =
        std::env::var("RVM_BENCH_RUNS").map_or(Ok(1), |runs| runs.parse().context("RVM_BENCH_RUNS"))?;
    on_one_processor();
    let measured: Vec<[Vec<Cost>; 2]> = (0..runs).map(|_| all()).collect::<Result<_>>()?;
    let (mut ratios, mut rows) = (Map::new(), Vec::new());
    for (place, (what, ..)) in measured[0][0].iter().enumerate() {
        let [free, jailed] = [0, 1].map(|side| {
            let of = || measured.iter().map(|run| &run[side][place]);
            (median(of().map(|cost| cost.1)), median(of().map(|cost| cost.2)))
        });
        ratios.insert(format!("rvm shut in/rvm, {what}"), json!(jailed.0 / free.0));
        ratios.insert(format!("rvm shut in/rvm, {what}, processor"), json!(jailed.1 / free.1));
        rows.push(json!([what, 1.0 / free.0, free.1 * 1e6, 1.0 / jailed.0, jailed.1 * 1e6]));
    }
    let mut conditions = json!({
        "runs": runs,
        "counted": counted,
        "where": "On one processor of this machine, without a guest; who asks is another thread.",
        "host_kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        "profile": if cfg!(debug_assertions) { "dev" } else { "release" },
    });
    for (name, value) in more.as_object().into_iter().flatten() {
        conditions[name] = value.clone();
    }
    let rates = "each second and us of a processor for each, and both shut in";
    // At the beginning of a line.
    println!("\n@result {}", json!({ "ratios": ratios, rates: rows, "conditions": conditions }));
    Ok(())
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
