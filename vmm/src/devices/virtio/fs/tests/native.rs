//! What the server costs without a guest: `cargo xtask bench fs-server`.

use rvm_protocol::vmm::CachePolicy;

use super::*;
use crate::devices::virtio::test_cost::{self, Cost};

/// Files that everything is done to.
const FILES: usize = 2000;

#[test]
#[ignore = "measures; for `cargo xtask bench fs-server`"]
fn what_requests_cost() {
    let dir = tempfile::tempdir().unwrap();
    let client = |place: &Path, before: fn()| {
        let dir = tempfile::tempdir_in(place).unwrap();
        let device = Fs::new(&share(dir.path(), false, CachePolicy::Auto)).unwrap().with_request_queues(2);
        Client::with_threads(device, dir, before)
    };
    let free = || costs(client(dir.path(), || ()));
    let shut_in = || costs(client(Path::new("/"), || crate::jail::tests::filter().unwrap()));
    print!("{}", test_cost::beside("requests", dir.path(), free, shut_in));
}

/// Does something to every file.
fn measure(
    client: &mut Client,
    what: &'static str,
    requests: usize,
    mut act: impl FnMut(&mut Client, usize),
) -> Cost {
    test_cost::measure(what, FILES, requests, |index| act(client, index))
}

/// What each kind of request costs.
fn costs(mut client: Client) -> Vec<Cost> {
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
