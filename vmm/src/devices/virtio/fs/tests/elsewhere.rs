//! Files of file systems that are not this host's own.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rvm_protocol::vmm::CachePolicy;

use super::client::*;
use super::{Fs, share};
use crate::mounts;

/// Where the answer to OPEN and OPENDIR has its flags.
const OPEN_FLAGS: usize = 8;
/// Nobody waits for RELEASE.
const UNANSWERED: u32 = 1 << 31;
/// `FOPEN_NOFLUSH`.
const NO_FLUSH: u32 = 1 << 5;
/// `FUSE_WRITE_KILL_SUIDGID`: who writes is not root.
const KILL_PRIVILEGES: u32 = 1 << 2;

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

/// As with a quota of an NFS server's, or a disk of sshfs's other end that is full.
#[test]
fn who_closes_hears_what_became_of_what_was_written() {
    let Some((mut client, server)) = Server::share(State::default()) else { return };
    let file = client.lookup(ROOT, "file").unwrap();
    let mut open = |flags: i32| {
        let (error, opened) = client.call(OPEN, file, &words(&[flags as u32, 0]));
        assert_eq!(error, 0);
        (u64_at(&opened, 0), u32_at(&opened, OPEN_FLAGS) & NO_FLUSH)
    };
    let (written, asks) = open(libc::O_RDWR);
    assert_eq!(asks, 0);
    let (read, asks) = open(libc::O_RDONLY);
    assert_eq!(asks, NO_FLUSH, "nobody asks for what is known");
    let flush = |client: &mut Client, handle| client.call(FLUSH, file, &flush_body(handle)).0;
    assert_eq!(flush(&mut client, written), 0);
    server.lock().flush = libc::EDQUOT;
    assert_eq!(flush(&mut client, written), libc::EDQUOT);
    let asked = std::mem::take(&mut server.lock().asked);
    assert_eq!(asked.iter().filter(|op| **op == FLUSH).count(), 2);
    // It stays open.
    assert_eq!(client.call(WRITE_OP, file, &write_body(written, 0, 0, b"more")).0, 0);
    assert_eq!(flush(&mut client, read), 0);
    assert_eq!(client.call(FLUSH, ROOT, &flush_body(written)).0, libc::EBADF);
    assert_eq!(flush(&mut client, 999), libc::EBADF);
    assert!(!server.lock().asked.contains(&FLUSH));
}

/// A server that is asked for times has to be sent what was written first.
#[test]
fn who_writes_does_not_wait_to_hear_of_the_file() {
    let Some((mut client, server)) = Server::share(State::default()) else { return };
    let file = client.lookup(ROOT, "file").unwrap();
    let handle = client.open(file, libc::O_RDWR).unwrap();
    server.lock().asked.clear();
    for fuse_flags in [0, 0, KILL_PRIVILEGES, KILL_PRIVILEGES] {
        let mut body = write_body(handle, 0, 0, b"more");
        body[20..24].copy_from_slice(&fuse_flags.to_le_bytes());
        let (error, said) = client.call(WRITE_OP, file, &body);
        assert_eq!((error, said.len(), u32_at(&said, 0)), (0, 8, 4));
    }
    let mut asked = std::mem::take(&mut server.lock().asked);
    // The kernel closes what the share was opened by in its own time.
    asked.retain(|op| ![RELEASE, RELEASEDIR, STATFS, FORGET, BATCH_FORGET].contains(op));
    assert_eq!(asked, [WRITE_OP; 4]);
}

/// `root_squash`, the default of NFS exports: the server's root is nobody there.
#[test]
fn who_is_not_root_may_do_what_root_may_not() {
    let squashes = State { squashes: true, ..State::default() };
    let Some((mut client, server)) = Server::share(squashes) else { return };
    (client.uid, client.gid) = (0, 0);
    assert_eq!(client.lookup(ROOT, "file"), Err(libc::EACCES));
    assert_eq!(client.call(OPENDIR, ROOT, &words(&[0, 0])).0, libc::EACCES);
    (client.uid, client.gid) = (1000, 1000);
    let file = client.lookup(ROOT, "file").unwrap();
    assert_eq!(client.lookup(ROOT, "none"), Err(libc::ENOENT), "of what he looks for he hears");
    assert_eq!(client.call(OPENDIR, ROOT, &words(&[0, 0])).0, 0);
    let handle = client.open(file, libc::O_RDWR).unwrap();
    assert_eq!(client.call(SETATTR, file, &[vec![1, 0, 0, 0], vec![0; 84]].concat()).0, 0);
    server.lock().asked.clear();
    assert_eq!(client.call(MKDIR, ROOT, &[words(&[0o755, 0o022]), name("dir")].concat()).0, 0);
    let made = std::mem::take(&mut server.lock().asked);
    assert_eq!(made.iter().filter(|op| **op == MKDIR).count(), 1, "{made:?}");
    assert_eq!(client.call(UNLINK, ROOT, &name("file")).0, 0);
    // What a file's server says of what was written is said once.
    server.lock().flush = libc::EACCES;
    server.lock().asked.clear();
    assert_eq!(client.call(FLUSH, file, &flush_body(handle)).0, libc::EACCES);
    assert_eq!(server.lock().asked.iter().filter(|op| **op == FLUSH).count(), 1);
    // The next one is not he.
    (client.uid, client.gid) = (0, 0);
    assert_eq!(client.call(OPEN, file, &words(&[0, 0])).0, libc::EACCES);
    (client.uid, client.gid) = (u32::MAX, u32::MAX);
    assert_eq!(client.call(OPEN, file, &words(&[0, 0])).0, libc::EACCES);
}

#[test]
fn of_this_hosts_files_nobody_asks() {
    let mut client = Client::new(false, CachePolicy::Auto);
    let flags = libc::O_RDWR as u32;
    let created = client.call(CREATE, ROOT, &[words(&[flags, 0o644, 0, 0]), name("file")].concat());
    assert_eq!(created.0, 0);
    let file = u64_at(&created.1, 0);
    let opened = client.call(OPEN, file, &words(&[flags, 0]));
    let with_content = client.call_with_room(1, OPEN, file, &words(&[flags, 0]), 32 + 4096);
    let again = client.call(CREATE, ROOT, &[words(&[flags, 0o644, 0, 0]), name("file")].concat());
    let nameless = [words(&[libc::O_TMPFILE as u32 | flags, 0o666, 0, 0]), name("/")].concat();
    let nameless = client.call(TMPFILE, ROOT, &nameless);
    for (how, (error, answer), before) in [
        ("CREATE", created, ENTRY_BYTES),
        ("OPEN", opened, 0),
        ("OPEN with content", with_content, 0),
        ("CREATE of what is there", again, ENTRY_BYTES),
        ("TMPFILE", nameless, ENTRY_BYTES),
    ] {
        if (how, error) == ("TMPFILE", libc::EOPNOTSUPP) {
            continue; // The host's file system has none.
        }
        assert_eq!(error, 0, "{how}");
        let told = u32_at(&answer, before + OPEN_FLAGS);
        assert_eq!(told & (NO_FLUSH | UNANSWERED), NO_FLUSH | UNANSWERED, "{how}");
        // Other kernels ask all the same.
        let node = if before > 0 { u64_at(&answer, 0) } else { file };
        assert_eq!(client.call(FLUSH, node, &flush_body(u64_at(&answer, before))).0, 0, "{how}");
    }
    assert_eq!(client.call(FLUSH, file, &flush_body(0)).0, libc::EBADF);
    // Where nothing is opened there are no flags by which to tell: the guest asks once.
    let mut layers = Client::new(true, CachePolicy::Always);
    assert_eq!(layers.call(FLUSH, ROOT, &flush_body(0)).0, libc::ENOSYS);
}

/// A file system of one file, `file`, that a server elsewhere keeps.
struct Server(Mutex<State>);

#[derive(Default)]
struct State {
    /// What FLUSH is answered with.
    flush: i32,
    /// Root may do nothing (`root_squash`).
    squashes: bool,
    /// Opcodes of all it was asked.
    asked: Vec<u32>,
}

impl Server {
    /// A share of it, unless this is not root.
    fn share(state: State) -> Option<(Client, Arc<Self>)> {
        // SAFETY: takes nothing.
        if unsafe { libc::geteuid() } != 0 {
            eprintln!("not root: nothing is tried");
            return None;
        }
        let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let fd = CString::new(device.as_raw_fd().to_string()).unwrap();
        let options = [(c"fd", &*fd), (c"rootmode", c"40000"), (c"user_id", c"0"), (c"group_id", c"0")];
        let mount = mounts::new_file_system(c"fuse", &options, 0).unwrap();
        let server = Arc::new(Self(Mutex::new(state)));
        let serves = Arc::clone(&server);
        std::thread::spawn(move || serves.serve(device));
        let place = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
        let device = Fs::new(&share(&place, false, CachePolicy::Auto)).unwrap();
        drop::<OwnedFd>(mount);
        Some((Client::with(device, tempfile::tempdir().unwrap()), server))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Answers until nothing of it is mounted any more.
    fn serve(&self, mut device: File) {
        let mut message = vec![0; 1 << 20];
        loop {
            let len = match device.read(&mut message) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            let (op, unique, node) = (u32_at(&message, 4), u64_at(&message, 8), u64_at(&message, 16));
            let uid = u32_at(&message, 24);
            let Some(result) = self.answer(op, node, uid, &message[IN_HEADER..len]) else { continue };
            let (error, body) = result.map_or_else(|error| (-error, Vec::new()), |body| (0, body));
            let header = words(&[(OUT_HEADER + body.len()) as u32, error as u32]);
            let answer = [header, unique.to_le_bytes().to_vec(), body].concat();
            // Who asked may be gone.
            let _ = device.write(&answer);
        }
    }

    /// The answer (`linux/fuse.h`); none where none is due.
    fn answer(&self, op: u32, node: u64, uid: u32, body: &[u8]) -> Option<Result<Vec<u8>, i32>> {
        const NODE: u64 = 2;
        const DIR: u64 = 3;
        const FOR_LONG: u64 = 3600;
        let longs =
            |numbers: &[u64]| numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<_>>();
        let attributes = |node: u64| {
            let mode = if node == NODE { 0o100_644 } else { 0o040_755 };
            [longs(&[node, 0, 0, 0, 0, 0]), words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0])].concat()
        };
        let mut state = self.lock();
        state.asked.push(op);
        Some(match op {
            INIT => Ok([words(&[7, 31, 0, 0, 0, 4096, 1, 0]), vec![0; 32]].concat()),
            FORGET | BATCH_FORGET => return None,
            GETATTR => Ok([longs(&[FOR_LONG, 0]), attributes(node)].concat()),
            STATFS => Ok([longs(&[0; 5]), words(&[4096, 255, 4096, 0]), words(&[0; 6])].concat()),
            _ if state.squashes && uid == 0 => Err(libc::EACCES),
            // Looked up each time.
            MKDIR | LOOKUP if body.ends_with(b"dir\0") && state.asked.contains(&MKDIR) => {
                Ok([longs(&[DIR, 0, 0, FOR_LONG, 0]), attributes(DIR)].concat())
            }
            SETATTR => Ok([longs(&[FOR_LONG, 0]), attributes(node)].concat()),
            UNLINK => Ok(Vec::new()),
            LOOKUP if body == b"file\0" => {
                Ok([longs(&[NODE, 0, FOR_LONG, FOR_LONG, 0]), attributes(NODE)].concat())
            }
            LOOKUP => Err(libc::ENOENT),
            // Direct I/O: a WRITE is one.
            OPEN => Ok(words(&[7, 0, 1, 0])),
            OPENDIR => Ok(words(&[0; 4])),
            WRITE_OP => Ok(words(&[u32_at(body, 16), 0])),
            FLUSH if state.flush != 0 => Err(state.flush),
            FLUSH | RELEASE | RELEASEDIR | READDIR => Ok(Vec::new()),
            _ => Err(libc::ENOSYS),
        })
    }
}
