//! What the server costs without a guest: `cargo xtask bench fs-server`.

use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use rvm_protocol::vmm::CachePolicy;

use super::*;

/// Files that everything is done to.
const FILES: usize = 2000;

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

/// Does something to every file; what a request took, and what it cost the server's threads, in seconds.
fn measure(
    client: &mut Client,
    what: &'static str,
    requests: usize,
    mut act: impl FnMut(&mut Client, usize),
) -> (&'static str, f64, f64) {
    let server = || used(libc::RUSAGE_SELF) - used(libc::RUSAGE_THREAD);
    let (began, before) = (Instant::now(), server());
    for index in 0..FILES {
        act(client, index);
    }
    let all = (requests * FILES) as f64;
    let (took, cost) = (began.elapsed().as_secs_f64(), (server() - before).as_secs_f64());
    (what, took / all, cost / all)
}

#[test]
#[ignore = "measures; for `cargo xtask bench fs-server`"]
fn what_requests_cost() {
    let free = costs(Client::new(false, CachePolicy::Auto));
    let dir = tempfile::tempdir().unwrap();
    let said = crate::jail::tests::inside(dir.path(), true, || {
        // The server's threads have filters; the client is no thread of a monitor's.
        let dir = tempfile::tempdir_in("/").unwrap();
        let device = Fs::new(&share(dir.path(), false, CachePolicy::Auto)).unwrap().with_request_queues(2);
        let client = Client::with_threads(device, dir, || crate::jail::tests::filter().unwrap());
        let line = |(_, took, cost): (&str, f64, f64)| format!("{took} {cost}\n");
        costs(client).into_iter().map(line).collect()
    });
    let numbers = |line: &str| line.split(' ').map(|word| word.parse().ok()).collect::<Option<Vec<f64>>>();
    let jailed: Option<Vec<Vec<f64>>> = said.lines().map(numbers).collect();
    let jailed = jailed.unwrap_or_else(|| panic!("{said}"));
    assert_eq!(jailed.len(), free.len(), "{said}");
    println!(
        "{:>12} {:>26} {:>12} {:>26}",
        "requests/s", "us of a processor each", "shut in", "us of a processor each"
    );
    for ((what, took, cost), jailed) in free.into_iter().zip(jailed) {
        println!(
            "{:>12.0} {:>26.2} {:>12.0} {:>26.2}   {what}: {:.2} of the time, {:.2} of the processor shut in",
            1.0 / took,
            cost * 1e6,
            1.0 / jailed[0],
            jailed[1] * 1e6,
            jailed[0] / took,
            jailed[1] / cost
        );
    }
}

/// What each kind of request costs.
fn costs(mut client: Client) -> Vec<(&'static str, f64, f64)> {
    let mut all = Vec::new();
    let file = |index: usize| format!("file-{index}");
    let mut nodes = Vec::new();
    let close = |client: &mut Client, node, handle: u64| {
        let body = [handle.to_le_bytes().as_slice(), &words(&[0; 4])].concat();
        assert_eq!(client.call(RELEASE, node, &body).0, 0);
    };
    all.push(measure(&mut client, "a file is made, written, closed", 3, |client, index| {
        let (node, handle) = client.create(&file(index), 0o644, 0o022);
        assert_eq!(client.call(WRITE_OP, node, &write_body(handle, 0, 0, b"the content of a file")).0, 0);
        close(client, node, handle);
        nodes.push(node);
    }));
    all.push(measure(&mut client, "a name is looked up again", 1, |client, index| {
        assert_eq!(client.lookup(ROOT, &file(index)), Ok(nodes[index]));
    }));
    all.push(measure(&mut client, "a name is looked up that is not there", 1, |client, index| {
        assert!(client.lookup(ROOT, &format!("none-{index}")).is_err());
    }));
    all.push(measure(&mut client, "attributes", 1, |client, index| {
        assert_eq!(client.call(GETATTR, nodes[index], &[0; 16]).0, 0);
    }));
    all.push(measure(&mut client, "a file is opened, read, closed", 3, |client, index| {
        let handle = client.open(nodes[index], libc::O_RDONLY).unwrap();
        assert_eq!(client.call(READ, nodes[index], &read_body(handle, 0, 4096)).0, 0);
        close(client, nodes[index], handle);
    }));
    let mut listed = Some(client.root_dir());
    all.push(measure(&mut client, "a directory entry with attributes, 100 in a request", 1, |client, _| {
        if let Some(dir) = listed.take() {
            assert_eq!(client.names(READDIRPLUS, ROOT, dir, 16 << 10).len(), FILES + 2);
        }
    }));
    all.push(measure(&mut client, "a file is removed, forgotten", 2, |client, index| {
        assert_eq!(client.call(UNLINK, ROOT, &name(&file(index))).0, 0);
        // The high-priority queue is served by another thread.
        let message = [client.header(FORGET, nodes[index], 8), 9_u64.to_le_bytes().to_vec()].concat();
        client.queue.write(DATA, &message);
        client.queue.send(0, &[(DATA, message.len() as u32, 0)]);
        client.queue.wait_used(0);
    }));
    all
}
