//! Files of file systems that are not this host's own.

use std::path::Path;

use rvm_protocol::vmm::CachePolicy;

use super::client::*;
use super::{Fs, share};

/// Where the answer to OPEN and OPENDIR has its flags.
const OPEN_FLAGS: usize = 8;
/// Nobody waits for RELEASE.
const UNANSWERED: u32 = 1 << 31;

/// Whoever served a request meanwhile would keep it for as long as the file's server keeps the `close`.
#[test]
fn what_nobody_waits_for_cannot_hang() {
    let opened = |client: &mut Client, op: u32, node: u64| {
        let (error, opened) = client.call(op, node, &words(&[libc::O_RDONLY as u32, 0]));
        assert_eq!(error, 0);
        u32_at(&opened, OPEN_FLAGS) & UNANSWERED
    };
    // Procfs is none of the file systems that are known to be local.
    let config = share(Path::new("/proc/sys/kernel"), false, CachePolicy::Auto);
    let mut elsewhere = Client::with(Fs::new(&config).unwrap(), tempfile::tempdir().unwrap());
    let file = elsewhere.lookup(ROOT, "ostype").unwrap();
    assert_eq!(opened(&mut elsewhere, OPEN, file), 0);
    assert_eq!(opened(&mut elsewhere, OPENDIR, ROOT), 0);
    let mut local = Client::new(false, CachePolicy::Auto);
    let (file, _) = local.create("file", 0o644, 0);
    assert_eq!(opened(&mut local, OPEN, file), UNANSWERED);
    assert_eq!(opened(&mut local, OPENDIR, ROOT), UNANSWERED);
}
