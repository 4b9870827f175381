//! What the server costs without a guest: `cargo xtask bench fs-server`.

use anyhow::{Context, Result};
use rvm_protocol::vmm::CachePolicy;
use serde_json::json;
use tempfile::TempDir;

use super::replay::{in_memory, traces};
use super::*;
use crate::devices::virtio::fs::trace::Trace;
use crate::devices::virtio::test_cost::{self, Cost, at_large, filtered, measure, shut_in};

/// Files that everything is done to.
const FILES: usize = 2000;

/// All costs, in the same order: without a jail, and shut in.
fn all(traces: &[(String, Trace)]) -> Result<[Vec<Cost>; 2]> {
    let mut free = at_large(|| by_hand(Client::over(in_memory(), false, CachePolicy::Auto)))?;
    let mut jailed = shut_in(in_memory().path(), || {
        let dir = tempfile::tempdir_in("/")?;
        let device = Fs::new(&share(dir.path(), false, CachePolicy::Auto))?.with_request_queues(2);
        by_hand(Client::with_threads(device, dir, filtered))
    })?;
    for (name, trace) in traces {
        free.extend(at_large(|| Ok(vec![played(name, trace, in_memory(), || ())?]))?);
        let costs = shut_in(in_memory().path(), move || {
            Ok(vec![played(name, trace, tempfile::tempdir_in("/")?, filtered)?])
        });
        jailed.extend(costs?);
    }
    Ok([free, jailed])
}

fn played(name: &str, trace: &Trace, dir: TempDir, before: fn()) -> Result<Cost> {
    let mut client = trace.client(dir, before)?;
    measure(name, || trace.play(&mut client)).with_context(|| name.to_owned())
}

#[test]
#[ignore = "measures; for `cargo xtask bench fs-server`"]
fn what_requests_cost() -> Result<()> {
    let traces = traces()?;
    let requests: serde_json::Map<_, _> =
        traces.iter().map(|(name, trace)| (name.clone(), json!(trace.requests.len()))).collect();
    // ext4 takes no inode again that was freed a moment ago, and looks for another one ever longer.
    let files = "on a tmpfs";
    test_cost::report(
        "requests",
        || all(&traces),
        json!({ "files": files, "requests of each trace": requests }),
    )
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
