//! What was asked of a share once ([`super::super::trace`]) is asked of one again: the files that were there are made,
//! with contents of no meaning, and each request is sent with the node ids and handles of now.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rvm_protocol::vmm::CachePolicy;
use tempfile::TempDir;

use super::super::trace::{self, Field, Request, Trace, Was};
use super::client::*;
use super::{Fs, MAX_IO_BYTES};
use crate::devices::virtio::test_queue::{DATA, WRITE};

/// Where data lies that is written to files.
const PAYLOAD: u64 = ANSWER + ANSWER_BYTES as u64;
/// Where messages lie that nobody waits for, with room for so many.
const UNANSWERED: u64 = PAYLOAD + MAX_IO_BYTES as u64;
const MOST_UNANSWERED: usize = 32;
const UNANSWERED_BYTES: usize = 128;

/// The traces of this crate by name, in order.
pub(super) fn traces() -> Result<Vec<(String, Trace)>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("traces");
    let mut all = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))? {
        let path = entry?.path();
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let trace = Trace::parse(&text).with_context(|| path.display().to_string())?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().replace('-', " ");
        all.push((name, trace));
    }
    ensure!(!all.is_empty(), "{}: no traces", dir.display());
    all.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(all)
}

impl Trace {
    /// A client of a share as the trace's was, over the files that were there; they are made in `dir`, which is empty.
    /// The server's threads are started by one that has done `before`.
    pub(super) fn client(&self, dir: TempDir, before: impl FnOnce() + Send) -> Result<Client> {
        for was in &self.files {
            make(dir.path(), was).with_context(|| format!("make what was there: {was}"))?;
        }
        let cache = if self.constant { CachePolicy::Always } else { CachePolicy::Auto };
        let device = Fs::new(&share(dir.path(), self.readonly, cache))?;
        let client = Client::with_threads(device, dir, before);
        client.queue.write(PAYLOAD, &vec![b'x'; MAX_IO_BYTES as usize]);
        Ok(client)
    }

    /// Asks all of it; how many requests that were.
    pub(super) fn play(&self, client: &mut Client) -> Result<usize> {
        let none = HashMap::from([(0, 0)]);
        let mut player = Player {
            client,
            files: HashMap::from([(0, 0), (1, ROOT)]),
            handles: none,
            listings: HashMap::new(),
            unanswered: 0,
            asked: 0,
        };
        for (number, asked) in (1..).zip(&self.requests) {
            player.ask(asked).with_context(|| format!("request {number}, {asked}"))?;
        }
        player.wait_for_unanswered();
        Ok(player.asked)
    }
}

fn path(root: &Path, names: &[u8]) -> PathBuf {
    names.split(|byte| *byte == 0).fold(root.to_owned(), |path, name| path.join(OsStr::from_bytes(name)))
}

fn make(root: &Path, was: &Was) -> io::Result<()> {
    let (mode, uid, gid, size, at) = match was {
        Was::File { mode, uid, gid, size, path: names } => (*mode, *uid, *gid, *size, path(root, names)),
        Was::Link { path: names, other } => return fs::hard_link(path(root, other), path(root, names)),
    };
    match mode & libc::S_IFMT {
        libc::S_IFDIR => fs::create_dir(&at)?,
        libc::S_IFREG => {
            io::copy(&mut io::repeat(b'x').take(size), &mut File::create_new(&at)?)?;
        }
        libc::S_IFLNK => symlink("x".repeat(size.min(4095) as usize), &at)?,
        kind => {
            let name = std::ffi::CString::new(at.as_os_str().as_bytes())?;
            // SAFETY: a C string.
            if unsafe { libc::mknod(name.as_ptr(), kind | 0o600, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    lchown(&at, Some(uid), Some(gid))?;
    if mode & libc::S_IFMT != libc::S_IFLNK {
        fs::set_permissions(&at, Permissions::from_mode(mode & 0o7777))?;
    }
    Ok(())
}

/// Sends a trace's requests.
struct Player<'a> {
    client: &'a mut Client,
    /// Node ids by the trace's numbers.
    files: HashMap<u64, u64>,
    handles: HashMap<u64, u64>,
    /// Directories that are being read, by node id and handle.
    listings: HashMap<(u64, u64), Listing>,
    /// Messages that are sent and not used yet.
    unanswered: usize,
    asked: usize,
}

/// A directory that is being read: it may give its names in another order, and other numbers of them at once.
#[derive(Default)]
struct Listing {
    /// By which the next entries are asked for.
    offset: u64,
    /// The trace's numbers of names that were given then, and are still to come.
    awaited: HashMap<Vec<u8>, u64>,
    /// Node ids of names that have come.
    came: HashMap<Vec<u8>, u64>,
}

impl Player<'_> {
    fn ask(&mut self, asked: &Request) -> Result<()> {
        let mut now = asked.clone();
        now.file = *self.files.get(&asked.file).context("nothing has given the file")?;
        now.change(|field, number| {
            let known = match field {
                Field::Handle => &self.handles,
                Field::Node => &self.files,
                Field::Owner => return Ok(number),
            };
            known.get(&number).copied().with_context(|| format!("nothing has given {field:?} {number}"))
        })?;
        if asked.unanswered {
            return self.send(&now);
        }
        if matches!(asked.op, trace::READDIR | trace::READDIRPLUS) {
            return self.list(&now);
        }
        let answer = self.call(&now)?;
        let given = |at: usize| answer.get(at..at + 8).map_or(0, |_| u64_at(&answer, at));
        let is_made = matches!(asked.op, trace::CREATE | trace::TMPFILE);
        if asked.gave != 0 {
            ensure!(given(0) != 0, "no file was given");
            self.files.insert(asked.gave, given(0));
        } else if asked.op == trace::LOOKUP {
            ensure!(given(0) == 0, "a file was given");
        }
        if asked.handle != 0 {
            self.handles.insert(asked.handle, given(if is_made { ENTRY_BYTES } else { 0 }));
        }
        Ok(())
    }

    /// What a message is made of; what is written to a file lies apart.
    fn message(&mut self, now: &Request, data: u32) -> Vec<u8> {
        (self.client.uid, self.client.gid) = (now.uid, now.gid);
        let body = now.fixed.len() + now.tail.len();
        let header = self.client.header(now.op, now.file, body + data as usize);
        [header.as_slice(), &now.fixed, &now.tail].concat()
    }

    /// Sends a request and waits; the answer, whose error has to be the recorded one.
    fn call(&mut self, now: &Request) -> Result<Vec<u8>> {
        let data = if now.op == trace::WRITE { now.word(16) } else { 0 };
        ensure!(data <= MAX_IO_BYTES, "{data} bytes are too much at once");
        let message = self.message(now, data);
        let queue = &mut self.client.queue;
        queue.write(DATA, &message);
        let mut chain = vec![(DATA, IN_HEADER as u32, 0)];
        if message.len() > IN_HEADER {
            chain.push((DATA + IN_HEADER as u64, (message.len() - IN_HEADER) as u32, 0));
        }
        if data > 0 {
            chain.push((PAYLOAD, data, 0));
        }
        // Files that were read were read by messages of their own.
        let room = if now.op == trace::OPEN { (OUT_HEADER + OPEN_BYTES) as u32 } else { ANSWER_BYTES };
        chain.push((ANSWER, room, WRITE));
        queue.send(1, &chain);
        let len = queue.wait_used(1) as usize;
        // The server has looked at that queue first.
        while self.unanswered > 0 && queue.try_used(0).is_some() {
            self.unanswered -= 1;
        }
        self.asked += 1;
        // Of what was read from a file nobody looks at more than the first bytes.
        let is_listing = matches!(now.op, trace::READDIR | trace::READDIRPLUS);
        let bytes = queue.read(ANSWER, len.min(if is_listing { len } else { 256 }));
        ensure!(len >= OUT_HEADER && u32_at(&bytes, 0) as usize == len, "the answer has {len} bytes");
        let error = (u32_at(&bytes, 4) as i32).wrapping_neg();
        ensure!(error == now.error, "error {error}, and {} was recorded", now.error);
        Ok(bytes[OUT_HEADER..].to_vec())
    }

    /// Sends what nobody waits for. As our guest kernel does, it does not tell the device of it: it is done before
    /// the next request.
    fn send(&mut self, now: &Request) -> Result<()> {
        let message = self.message(now, 0);
        ensure!(message.len() <= UNANSWERED_BYTES, "a message of {} bytes needs an answer", message.len());
        if self.unanswered == MOST_UNANSWERED {
            self.wait_for_unanswered();
        }
        let at = UNANSWERED + (self.asked % MOST_UNANSWERED * UNANSWERED_BYTES) as u64;
        self.client.queue.write(at, &message);
        self.client.queue.send_quietly(0, &[(at, message.len() as u32, 0)]);
        self.unanswered += 1;
        self.asked += 1;
        Ok(())
    }

    fn wait_for_unanswered(&mut self) {
        if self.unanswered > 0 {
            self.client.queue.kick(0);
        }
        for _ in 0..std::mem::take(&mut self.unanswered) {
            self.client.queue.wait_used(0);
        }
    }

    /// Asks for entries of a directory, and for the rest of them where there was none.
    fn list(&mut self, now: &Request) -> Result<()> {
        let handle = u64_at(&now.fixed, 0);
        let mut listing = match u64_at(&now.fixed, 8) {
            0 => Listing::default(),
            _ => self.listings.remove(&(now.file, handle)).unwrap_or_default(),
        };
        let awaited = now.entries.iter().filter(|(file, _)| *file != 0);
        listing.awaited.extend(awaited.map(|(file, name)| (name.clone(), *file)));
        let was_last = now.error == 0 && now.entries.is_empty();
        loop {
            let mut now = now.clone();
            now.fixed[8..16].copy_from_slice(&listing.offset.to_le_bytes());
            let answer = self.call(&now)?;
            let came = listing.take(&answer, now.op)?;
            if !was_last || !came {
                break;
            }
        }
        let Listing { awaited, came, .. } = &mut listing;
        awaited.retain(|name, file| match came.get(name) {
            Some(node) => {
                self.files.insert(*file, *node);
                false
            }
            None => true,
        });
        if let Some(name) = awaited.keys().next().filter(|_| was_last) {
            bail!("the directory has no {:?}", String::from_utf8_lossy(name));
        }
        self.listings.insert((now.file, handle), listing);
        Ok(())
    }
}

impl Listing {
    /// Takes an answer's entries; whether there were any.
    fn take(&mut self, answer: &[u8], op: u32) -> Result<bool> {
        let plus = if op == trace::READDIRPLUS { ENTRY_BYTES } else { 0 };
        let mut rest = answer;
        while !rest.is_empty() {
            let (attributes, dirent) = rest.split_at_checked(plus).context("an entry is cut off")?;
            ensure!(dirent.len() >= 24, "an entry is cut off");
            self.offset = u64_at(dirent, 8);
            let len = u32_at(dirent, 16) as usize;
            let name = dirent.get(24..24 + len).context("a name is cut off")?;
            if plus > 0 && u64_at(attributes, 0) != 0 {
                self.came.insert(name.to_vec(), u64_at(attributes, 0));
            }
            rest = dirent.get((24 + len).next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(!answer.is_empty())
    }
}

/// Where files are whose file system is to cost as little as it can.
pub(super) fn in_memory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

#[test]
fn what_was_recorded_comes_to_the_same() -> Result<()> {
    for (name, trace) in traces()? {
        let played = || trace.play(&mut trace.client(in_memory(), || ())?);
        let asked = played().with_context(|| name.clone())?;
        assert!(asked >= trace.requests.len(), "{name}");
    }
    Ok(())
}

#[test]
fn what_is_recorded_is_played_again() {
    let dir = in_memory();
    fs::create_dir_all(dir.path().join("a dir/inner")).unwrap();
    fs::write(dir.path().join("a dir/old"), b"content").unwrap();
    fs::hard_link(dir.path().join("a dir/old"), dir.path().join("other name")).unwrap();
    symlink("a dir/old", dir.path().join("link%")).unwrap();
    for index in 0..100 {
        fs::write(dir.path().join(format!("a dir/inner/{index}")), b"x").unwrap();
    }
    let record = tempfile::NamedTempFile::new().unwrap();
    let device = Fs::new(&share(dir.path(), false, CachePolicy::Auto)).unwrap();
    let mut client = Client::with(device.recorded(record.reopen().unwrap()).unwrap(), dir);
    exercise(&mut client);

    let text = fs::read_to_string(record.path()).unwrap();
    let trace = Trace::parse(&text).unwrap();
    // As it was written.
    let mut lines = trace.requests.iter().map(ToString::to_string);
    let written =
        text.lines().filter(|line| !["share", "was ", "as "].iter().any(|word| line.starts_with(word)));
    assert!(written.eq(lines.by_ref()), "{text}");
    assert!(text.contains("\nwas = other%20name a%20dir/old\n"), "{text}");
    assert!(text.contains("\nwas 120777 0 0 9 link%25\n"), "{text}");
    assert!(!text.contains("DESTROY"), "{text}");

    let mut again = trace.client(in_memory(), || ()).unwrap();
    assert!(trace.play(&mut again).unwrap() >= trace.requests.len());
    assert_eq!(listed(again.dir.path()), listed(client.dir.path()), "{text}");
    // What comes to something else is told, with the line.
    let mut other = trace.client(in_memory(), || ()).unwrap();
    fs::remove_file(other.path("other name")).unwrap();
    let error = format!("{:#}", trace.play(&mut other).unwrap_err());
    assert!(
        error.contains("LOOKUP 1 :other%20name/") && error.ends_with("error 2, and 0 was recorded"),
        "{error}"
    );
}

/// Does something of each kind.
fn exercise(client: &mut Client) {
    let dir = client.lookup(ROOT, "a dir").unwrap();
    let old = client.lookup(dir, "old").unwrap();
    assert_eq!(client.lookup(ROOT, "other name"), Ok(old));
    assert_eq!(client.lookup(ROOT, "none"), Err(libc::ENOENT));
    let link = client.lookup(ROOT, "link%").unwrap();
    assert_eq!(client.call(READLINK, link, &[]).0, 0);
    let handle = client.open(old, libc::O_RDWR).unwrap();
    assert_eq!(client.call(READ, old, &read_body(handle, 0, 100)).0, 0);
    assert_eq!(client.call(WRITE_OP, old, &write_body(handle, 7, 0, b"and more")).0, 0);
    assert_eq!(client.call(FSYNC, old, &[handle.to_le_bytes(), [0; 8]].concat()).0, 0);
    let release = [handle.to_le_bytes().as_slice(), &words(&[0; 4])].concat();
    let message = [client.header(RELEASE, old, release.len()), release].concat();
    client.queue.write(DATA, &message);
    client.queue.send(0, &[(DATA, message.len() as u32, 0)]);
    client.queue.wait_used(0);

    let inner = client.lookup(dir, "inner").unwrap();
    let (error, opened) = client.call(OPENDIR, inner, &words(&[0, 0]));
    assert_eq!(error, 0);
    let names = client.names(READDIRPLUS, inner, u64_at(&opened, 0), 4096);
    let (_, tenth) = names.iter().find(|(name, _)| name == "10").unwrap();
    assert_eq!(client.call(GETATTR, *tenth, &words(&[0; 4])).0, 0);

    let (made, handle) = client.create("made", 0o640, 0o022);
    assert_eq!(client.call(WRITE_OP, made, &write_body(handle, 0, 0, b"new")).0, 0);
    assert_eq!(client.call(MKDIR, ROOT, &[words(&[0o755, 0o022]), name("new dir")].concat()).0, 0);
    let new = client.lookup(ROOT, "new dir").unwrap();
    let rename = [new.to_le_bytes().to_vec(), name("made"), name("moved")].concat();
    assert_eq!(client.call(RENAME, ROOT, &rename).0, 0);
    assert_eq!(client.lookup(new, "moved"), Ok(made));
    assert_eq!(client.call(LINK, dir, &[made.to_le_bytes().to_vec(), name("again")].concat()).0, 0);
    assert_eq!(client.call(SYMLINK, new, &[name("soft"), name("../file")].concat()).0, 0);
    assert_eq!(client.call(UNLINK, ROOT, &name("other name")).0, 0);
    let create = [words(&[libc::O_RDWR as u32, 0o600, 0, 0]), name("other name")].concat();
    assert_eq!(client.call(CREATE, ROOT, &create).0, 0);
    assert_eq!(client.call(RMDIR, dir, &name("inner")).0, libc::ENOTEMPTY);
    // The directory goes elsewhere, and what was in it before is found there.
    let rename = [new.to_le_bytes().to_vec(), name("a dir"), name("gone here")].concat();
    assert_eq!(client.call(RENAME, ROOT, &rename).0, 0);
    assert!(client.lookup(inner, "11").is_ok());
    client.call(DESTROY, 0, &[]);
}

/// Paths, types, modes and sizes of all there is.
fn listed(dir: &Path) -> Vec<(PathBuf, u32, u64)> {
    use std::os::unix::fs::MetadataExt;
    let mut all = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(next) = dirs.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            let size = if metadata.is_dir() { 0 } else { metadata.len() };
            all.push((path.strip_prefix(dir).unwrap().to_owned(), metadata.mode(), size));
            if metadata.is_dir() {
                dirs.push(path);
            }
        }
    }
    all.sort();
    all
}

#[test]
fn what_is_no_trace_is_told_with_its_line() {
    let error = |text: &str| Trace::parse(text).unwrap_err().to_string();
    for (text, expected) in [
        ("", "line 0: the trace has no requests"),
        ("LOOKUP 1 :a/", "line 1: the first line must be `share [readonly] [constant]`"),
        ("share fast", "line 1: a share is readonly and constant, or neither, not \"fast\""),
        ("share\n# for people\n", "line 2: the trace has no requests"),
        ("share\nwas 100644 0 0 1", "line 2: a file that was there needs its path"),
        ("share\nwas 89 0 0 1 a", "line 2: mode \"89\" is no octal number"),
        ("share\nwas = a b c", "line 2: \"c\" is too much"),
        ("share\nas 0", "line 2: who asks is a uid and a gid"),
        ("share\nas 0 4294967296", "line 2: \"4294967296\" is no number, or too large"),
        ("share\nLOOK 1", "line 2: \"LOOK\" is no opcode"),
        ("share\nLOOKUP", "line 2: a request needs the number of its file"),
        ("share\nOPEN 1", "line 2: the fixed part of the body is not there"),
        ("share\nOPEN 1 1,2,3", "line 2: the body has 12 bytes of 8"),
        ("share\nOPEN 1 x", "line 2: \"x\" is no hexadecimal word"),
        ("share\nLOOKUP 1 :a%2", "line 2: \"a%2\": two hexadecimal digits follow a %"),
        ("share\nLOOKUP 1 :a/ =b", "line 2: \"b\" is no number, or too large"),
        ("share\nLOOKUP 1 :a/ \u{e9}", "line 2: \"\u{e9}\" is no result of a request"),
        ("share\nREADDIR 1 0 +5", "line 2: \"+5\" has no name"),
    ] {
        assert_eq!(error(text), expected, "{text:?}");
    }
    let refused = |line: &str| {
        let trace = Trace::parse(&format!("share\n{line}")).unwrap();
        let mut client = trace.client(in_memory(), || ()).unwrap();
        format!("{:#}", trace.play(&mut client).unwrap_err())
    };
    assert!(refused("GETATTR 7 0").ends_with("nothing has given the file"));
    assert!(refused("READ 1 3").ends_with("nothing has given Handle 3"));
    assert!(refused("WRITE 1 0,0,0,0,ffffffff").ends_with("4294967295 bytes are too much at once"));
}
