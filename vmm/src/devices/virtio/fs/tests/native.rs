//! What the server costs without a guest: `cargo xtask bench fs-server`.

use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rvm_protocol::vmm::CachePolicy;
use serde_json::json;
use tempfile::TempDir;

use super::replay::{in_memory, traces};
use super::*;
use crate::devices::virtio::fs::trace::Trace;

/// Files that everything is done to.
const FILES: usize = 2000;

/// What a request took, and what it cost the server's threads of a processor, in seconds.
type Cost = (String, f64, f64);

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

/// What is done, and the number of requests that it takes.
fn measure(what: &str, act: impl FnOnce() -> Result<usize>) -> Result<Cost> {
    let server = || used(libc::RUSAGE_SELF) - used(libc::RUSAGE_THREAD);
    let (began, before) = (Instant::now(), server());
    let requests = act()? as f64;
    let (took, cost) = (began.elapsed().as_secs_f64(), (server() - before).as_secs_f64());
    Ok((what.to_owned(), took / requests, cost / requests))
}

/// The server's threads have filters; the client is no thread of a monitor's.
fn filtered() {
    crate::jail::tests::filter().unwrap();
}

/// What is measured in a monitor's jail, with `dir` as its root.
fn shut_in(dir: &Path, measure: impl FnOnce() -> Result<Vec<Cost>> + Send) -> Result<Vec<Cost>> {
    let said = crate::jail::tests::inside(dir, true, || match measure() {
        Ok(costs) => json!(costs).to_string(),
        Err(error) => format!("{error:#}"),
    });
    serde_json::from_str(&said).context(said)
}

/// All costs, in the same order: without a jail, and shut in.
fn all(traces: &[(String, Trace)]) -> Result<[Vec<Cost>; 2]> {
    let mut free = by_hand(Client::new(false, CachePolicy::Auto))?;
    let dir = tempfile::tempdir()?;
    let mut jailed = shut_in(dir.path(), || {
        let dir = tempfile::tempdir_in("/")?;
        let device = Fs::new(&share(dir.path(), false, CachePolicy::Auto))?.with_request_queues(2);
        by_hand(Client::with_threads(device, dir, filtered))
    })?;
    for (name, trace) in traces {
        free.push(played(name, trace, in_memory(), || ())?);
        let shut_in = shut_in(in_memory().path(), move || {
            Ok(vec![played(name, trace, tempfile::tempdir_in("/")?, filtered)?])
        });
        jailed.extend(shut_in?);
    }
    Ok([free, jailed])
}

fn played(name: &str, trace: &Trace, dir: TempDir, before: fn()) -> Result<Cost> {
    let mut client = trace.client(dir, before)?;
    measure(name, || trace.play(&mut client)).with_context(|| name.to_owned())
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Prints one line that `cargo xtask bench` takes.
#[test]
#[ignore = "measures; for `cargo xtask bench fs-server`"]
fn what_requests_cost() -> Result<()> {
    let runs = std::env::var("RVM_BENCH_RUNS").map_or(1, |runs| runs.parse().unwrap());
    let traces = traces()?;
    let measured: Vec<[Vec<Cost>; 2]> = (0..runs).map(|_| all(&traces)).collect::<Result<_>>()?;
    let (mut ratios, mut rows) = (serde_json::Map::new(), Vec::new());
    for (place, (what, ..)) in measured[0][0].iter().enumerate() {
        let [free, jailed] = [0, 1].map(|side| {
            let of = || measured.iter().map(|run| &run[side][place]);
            (median(of().map(|cost| cost.1)), median(of().map(|cost| cost.2)))
        });
        ratios.insert(format!("rvm shut in/rvm, {what}"), json!(jailed.0 / free.0));
        ratios.insert(format!("rvm shut in/rvm, {what}, processor"), json!(jailed.1 / free.1));
        rows.push(json!([what, 1.0 / free.0, free.1 * 1e6, 1.0 / jailed.0, jailed.1 * 1e6]));
    }
    let requests: serde_json::Map<_, _> =
        traces.iter().map(|(name, trace)| (name.clone(), json!(trace.requests.len()))).collect();
    let result = json!({
        "ratios": ratios,
        "requests/s and us of a processor for each, and both shut in": rows,
        "requests of each trace": requests,
        "conditions": {
            "runs": runs,
            "where": "On this machine, without a guest: one request at a time, the client on another thread.",
            "files": "of traces on a tmpfs, the others in the directory for temporary files",
            "host_kernel": fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
            "profile": if cfg!(debug_assertions) { "dev" } else { "release" },
        },
    });
    // At the beginning of a line.
    println!("\n@result {result}");
    Ok(())
}

/// What each kind of request costs.
fn by_hand(mut client: Client) -> Result<Vec<Cost>> {
    let mut all = Vec::new();
    let file = |index: usize| format!("file-{index}");
    let mut nodes = Vec::new();
    let close = |client: &mut Client, node, handle: u64| {
        let body = [handle.to_le_bytes().as_slice(), &words(&[0; 4])].concat();
        assert_eq!(client.call(RELEASE, node, &body).0, 0);
    };
    let mut each = |what, requests: usize, act: &mut dyn FnMut(&mut Client, usize)| -> Result<()> {
        all.push(measure(what, || {
            (0..FILES).for_each(|index| act(&mut client, index));
            Ok(requests * FILES)
        })?);
        Ok(())
    };
    each("a file is made, written, closed", 3, &mut |client, index| {
        let (node, handle) = client.create(&file(index), 0o644, 0o022);
        assert_eq!(client.call(WRITE_OP, node, &write_body(handle, 0, 0, b"the content of a file")).0, 0);
        close(client, node, handle);
        nodes.push(node);
    })?;
    each("a name is looked up again", 1, &mut |client, index| {
        assert_eq!(client.lookup(ROOT, &file(index)), Ok(nodes[index]));
    })?;
    each("a name is looked up that is not there", 1, &mut |client, index| {
        assert!(client.lookup(ROOT, &format!("none-{index}")).is_err());
    })?;
    each("attributes", 1, &mut |client, index| {
        assert_eq!(client.call(GETATTR, nodes[index], &[0; 16]).0, 0);
    })?;
    each("a file is opened, read, closed", 3, &mut |client, index| {
        let handle = client.open(nodes[index], libc::O_RDONLY).unwrap();
        assert_eq!(client.call(READ, nodes[index], &read_body(handle, 0, 4096)).0, 0);
        close(client, nodes[index], handle);
    })?;
    let mut listed = None;
    each("a directory entry with attributes, 100 in a request", 1, &mut |client, index| {
        if index == 0 {
            listed = Some(client.root_dir());
        }
        if let Some(dir) = listed.take() {
            assert_eq!(client.names(READDIRPLUS, ROOT, dir, 16 << 10).len(), FILES + 2);
        }
    })?;
    each("a file is removed, forgotten", 2, &mut |client, index| {
        assert_eq!(client.call(UNLINK, ROOT, &name(&file(index))).0, 0);
        // The high-priority queue is served by another thread.
        let message = [client.header(FORGET, nodes[index], 8), 9_u64.to_le_bytes().to_vec()].concat();
        client.queue.write(DATA, &message);
        client.queue.send(0, &[(DATA, message.len() as u32, 0)]);
        client.queue.wait_used(0);
    })?;
    Ok(all)
}
