//! What is measured of one guest: throughput, loss, latency, and what they cost.

use std::{
    io::{Read, Write},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rvm_protocol::vmm::Metrics;
use rvm_tests::{
    job::{self, Input},
    scale,
};
use serde_json::{Value, json};

use super::guest::Guest;
use crate::{counters, monitor};

/// Rates at which datagrams are sent, in Mbit/s.
pub const RATES: [u32; 3] = [5, 20, 100];
/// Bytes of each.
const DATAGRAM: &str = "1400";
/// Percentiles of latencies.
const PERCENTILES: [(&str, f64); 4] = [("50 %", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("99.9 %", 0.999)];

/// How much of it.
#[derive(Clone, Copy)]
pub struct Length {
    /// Seconds of each transfer.
    pub seconds: u32,
    /// Requests whose responses are waited for.
    pub requests: usize,
}

/// What was measured, in the order it was: milliseconds, Mbit/s, percent, or counts for a frame.
pub type Measured = Vec<(String, f64)>;

/// Everything between the host and one guest, and from it to another of its kind.
pub fn all(guest: &Guest<'_>, other: &Guest<'_>, length: Length) -> Result<(Measured, Value)> {
    let mut measured = Vec::new();
    let mut costs = serde_json::Map::new();
    for (streams, name) in [("1", "1 stream"), ("8", "8 streams")] {
        for (direction, option) in [("in", None), ("out", Some("-R"))] {
            let name = format!("TCP, {name} {direction}");
            let mut options = vec!["-P", streams];
            options.extend(option);
            let (rate, cost) = counted(guest, || from_host(guest, &options, length))?;
            measured.push((name.clone(), megabits(&rate["end"]["sum_received"])?));
            costs.insert(name, cost);
        }
    }
    for rate in RATES {
        for (direction, option) in [("in", None), ("out", Some("-R"))] {
            let rate_option = format!("{rate}M");
            let mut options = vec!["-u", "-b", &rate_option, "-l", DATAGRAM];
            options.extend(option);
            let report = from_host(guest, &options, length)?;
            let lost = report["end"]["sum"]["lost_percent"].as_f64();
            let lost = lost.with_context(|| format!("no loss in {}", report["end"]))?;
            measured.push((format!("UDP, loss at {rate} Mbit/s {direction}"), lost));
        }
    }
    let (times, cost) = counted(guest, || requests(guest, length.requests))?;
    percentiles("request and response", times, &mut measured);
    costs.insert("request and response".to_owned(), cost);

    let address = &other.address;
    let script = format!("/net/iperf3 -c {address} -J -t {}", length.seconds);
    let between = |script: &str| -> Result<Value> {
        let text = guest.shell(script)?;
        serde_json::from_str(&text).with_context(|| format!("{script}: {text}"))
    };
    measured.push(("TCP, guest to guest".to_owned(), megabits(&between(&script)?["end"]["sum_received"])?));
    let text = guest.shell(&format!("ping -A -c {} {address}", length.requests))?;
    let times: Vec<f64> = text.lines().filter_map(reply_ms).collect();
    ensure!(times.len() * 100 >= length.requests * 99, "{} replies: {text}", times.len());
    percentiles("ping, guest to guest", times, &mut measured);
    Ok((measured, Value::Object(costs)))
}

/// Runs iperf3 here against a guest's; its report. The server says that it is busy for a moment
/// after each run.
fn from_host(guest: &Guest<'_>, options: &[&str], length: Length) -> Result<Value> {
    let until = Instant::now() + scale::command();
    loop {
        let mut command = Command::new("iperf3");
        command.args(["-c", &guest.address, "-J", "-t", &length.seconds.to_string()]).args(options);
        let finished = job::run(command, Input::Nothing, scale::container())?;
        let report: Value = serde_json::from_str(&finished.text())
            .with_context(|| format!("iperf3 {options:?} to {}: {finished}", guest.kind.name()))?;
        let Some(error) = report["error"].as_str() else { return Ok(report) };
        if !error.contains("busy") && !error.contains("refused") || Instant::now() > until {
            bail!("iperf3 {options:?} to {}: {error}", guest.kind.name());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn megabits(sum: &Value) -> Result<f64> {
    Ok(sum["bits_per_second"].as_f64().with_context(|| format!("no rate in {sum}"))? / 1e6)
}

/// Milliseconds from each byte's sending to its return.
fn requests(guest: &Guest<'_>, count: usize) -> Result<Vec<f64>> {
    let mut stream = guest.echo()?;
    let mut once = || -> Result<f64> {
        let started = Instant::now();
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
        Ok(started.elapsed().as_secs_f64() * 1e3)
    };
    // Until the guest has started who answers.
    for _ in 0..20 {
        once()?;
    }
    (0..count).map(|_| once()).collect()
}

fn percentiles(name: &str, mut times: Vec<f64>, measured: &mut Measured) {
    times.sort_by(f64::total_cmp);
    for (percentile, part) in PERCENTILES {
        let index = ((times.len() as f64 * part).ceil() as usize).saturating_sub(1);
        measured.push((format!("{name}, {percentile}"), times.get(index).copied().unwrap_or(f64::NAN)));
    }
}

/// `64 bytes from 10.90.0.3: seq=0 ttl=64 time=0.517 ms`
fn reply_ms(line: &str) -> Option<f64> {
    line.split_once("time=")?.1.strip_suffix(" ms")?.parse().ok()
}

/// Does something with a guest; what it cost of exits, returns to user space and the monitor's own
/// work, for each frame.
fn counted<T>(guest: &Guest<'_>, act: impl FnOnce() -> Result<T>) -> Result<(T, Value)> {
    let Some(machine) = guest.machine else {
        let before = guest.frames()?;
        return Ok((act()?, json!({ "frames": guest.frames()? - before })));
    };
    let exits = || counters::of_vm(machine).get("exits").copied().unwrap_or(0);
    let nets = || -> Result<Option<Metrics>> { guest.counters.as_deref().map(monitor::metrics).transpose() };
    let before = (guest.frames()?, exits(), nets()?);
    let counting = counters::UserspaceExits::count()?;
    let done = act()?;
    let returns = counting.by_reason()?;
    drop(counting);
    let frames = guest.frames()? - before.0;
    let per_frame = |count: u64| count as f64 / frames.max(1) as f64;
    let mut cost = json!({
        "frames": frames,
        "exits": per_frame(exits() - before.1),
        "returns to user space": returns.iter().map(|(reason, count)| (reason.clone(), json!(per_frame(*count))))
            .collect::<serde_json::Map<_, _>>(),
    });
    if let (Some(before), Some(after)) = (&before.2, &nets()?) {
        let sum = |metrics: &Metrics, count: fn(&rvm_protocol::vmm::NetCounts) -> u64| -> u64 {
            metrics.nets.iter().map(|net| count(&net.receive) + count(&net.transmit)).sum()
        };
        for (name, count) in [
            ("copied in the monitor", (|counts| counts.copied) as fn(&rvm_protocol::vmm::NetCounts) -> u64),
            ("wakeups of the monitor", |counts| counts.wakeups),
        ] {
            cost[name] = json!(per_frame(sum(after, count) - sum(before, count)));
        }
    }
    Ok((done, cost))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_and_percentiles() {
        assert_eq!(reply_ms("64 bytes from 10.90.0.3: seq=0 ttl=64 time=0.517 ms"), Some(0.517));
        assert_eq!(reply_ms("PING 10.90.0.3 (10.90.0.3): 56 data bytes"), None);
        let mut measured = Vec::new();
        percentiles("x", (1..=1000).rev().map(f64::from).collect(), &mut measured);
        let values: Vec<f64> = measured.iter().map(|measured| measured.1).collect();
        assert_eq!(values, [500.0, 900.0, 990.0, 999.0]);
    }
}
