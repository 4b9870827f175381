//! Writes down what a guest's kernel asks of a share, for a [`super::trace`]: in a build with the feature `record`,
//! which nothing that is installed has, and in tests.
//!
//! What was there before the first request is found out from the answers: a name that is found and that no request
//! has made was there.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::{Mutex, PoisonError};

use fuse_backend_rs::abi::fuse_abi::{Attr, EntryOut, InHeader, OpenOut, OutHeader};
use fuse_backend_rs::api::filesystem::ROOT_ID;
use fuse_backend_rs::transport::Reader;
use virtio_queue::DescriptorChain;
use vm_memory::{ByteValued, Bytes};

use super::passthrough::Policy;
use super::trace::{self, Field, Request, Was};
use crate::memory::GuestRam;

/// Bytes of a message after its header that are looked at: names and values, not what is written to files.
const MAX_BODY_BYTES: u64 = 128 << 10;
/// Bytes of an answer that are looked at: an entry and a handle, or all of what is in a directory.
const ANSWER_BYTES: usize = size_of::<OutHeader>() + size_of::<EntryOut>() + size_of::<OpenOut>();
const LISTING_BYTES: usize = 1 << 20;
/// Fixed part of `struct fuse_dirent`: ino, offset, length, type.
const DIRENT_HEADER: usize = 24;

/// Writes a trace, a line for each request that was answered, in the order of the answers.
#[derive(Debug)]
pub struct Recorder(Mutex<State>);

impl Recorder {
    /// Writes to `file` what is asked of a share that is served so.
    pub(super) fn new(mut file: File, policy: Policy) -> io::Result<Self> {
        let [readonly, constant] = [(policy.readonly, " readonly"), (policy.constant, " constant")]
            .map(|(is_so, word)| if is_so { word } else { "" });
        file.write_all(format!("share{readonly}{constant}\n").as_bytes())?;
        Ok(Self(Mutex::new(State::new(file))))
    }

    /// A request was answered with `written` bytes.
    pub(super) fn note(&self, memory: &GuestRam, chain: DescriptorChain<&GuestRam>, written: usize) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = state.note(memory, chain, written) {
            log::error!("fs: a request is not in the trace: {error}");
        }
    }
}

/// A file, whatever node ids it had.
#[derive(Debug, Default)]
struct Known {
    /// Where it was before the first request, if it was there.
    was: Option<Vec<u8>>,
    /// What became of the names in it: their files, or nothing.
    names: HashMap<Vec<u8>, Option<usize>>,
}

#[derive(Debug)]
struct State {
    file: File,
    /// Lines of the request that is at hand.
    lines: String,
    /// Files by number; 0 is none and 1 the root.
    files: Vec<Known>,
    nodes: HashMap<u64, usize>,
    handles: HashMap<u64, u64>,
    next_handle: u64,
    user: (u32, u32),
}

impl State {
    fn new(file: File) -> Self {
        let root = Known { was: Some(Vec::new()), ..Known::default() };
        Self {
            file,
            lines: String::new(),
            files: vec![Known::default(), root],
            nodes: HashMap::from([(ROOT_ID, 1)]),
            handles: HashMap::new(),
            next_handle: 1,
            user: (0, 0),
        }
    }

    fn note(
        &mut self,
        memory: &GuestRam,
        chain: DescriptorChain<&GuestRam>,
        written: usize,
    ) -> io::Result<()> {
        let mut asked = self.asked(memory, chain.clone())?;
        let is_listing = matches!(asked.op, trace::READDIR | trace::READDIRPLUS);
        let room = written.min(if is_listing { LISTING_BYTES } else { ANSWER_BYTES });
        let answer = answer(memory, chain, room)?;
        asked.unanswered = answer.is_none();
        if written == 0 && !asked.unanswered {
            // The server says nothing to DESTROY: there is nothing that it could come to again.
            return Ok(());
        }
        let answer = answer.unwrap_or_default();
        let (header, body) = answer.split_at_checked(size_of::<OutHeader>()).unwrap_or_default();
        asked.error = object(header).map_or(0, |header: OutHeader| header.error.saturating_neg());
        self.follow(&mut asked, body);
        if self.user != (asked.uid, asked.gid) {
            self.user = (asked.uid, asked.gid);
            let _ = writeln!(self.lines, "as {} {}", asked.uid, asked.gid);
        }
        let _ = writeln!(self.lines, "{asked}");
        self.file.write_all(std::mem::take(&mut self.lines).as_bytes())
    }

    /// The message, with the trace's numbers.
    fn asked(&self, memory: &GuestRam, chain: DescriptorChain<&GuestRam>) -> io::Result<Request> {
        let mut reader = Reader::from_descriptor_chain(memory, chain).map_err(io::Error::other)?;
        let InHeader { opcode: op, nodeid, uid, gid, .. } = reader.read_obj()?;
        let bytes = trace::fixed_bytes(op);
        let most = if op == trace::WRITE { bytes as u64 } else { MAX_BODY_BYTES };
        let mut fixed = Vec::new();
        reader.take(most).read_to_end(&mut fixed)?;
        let tail = fixed.split_off(fixed.len().min(bytes));
        let mut asked =
            Request { op, file: self.number(nodeid), uid, gid, fixed, tail, ..Request::default() };
        let Ok(()) = asked.change(|field, value| -> Result<u64, Infallible> {
            Ok(match field {
                Field::Handle => self.handles.get(&value).copied().unwrap_or(0),
                Field::Node => self.number(value),
                Field::Owner => 0,
            })
        });
        Ok(asked)
    }

    fn number(&self, node: u64) -> u64 {
        self.nodes.get(&node).map_or(0, |file| *file as u64)
    }

    /// What a request and its answer say of files and handles.
    fn follow(&mut self, asked: &mut Request, answer: &[u8]) {
        let dir = asked.file as usize;
        let names: Vec<Vec<u8>> = asked.tail.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
        let name = |position: usize| names.get(position).cloned().unwrap_or_default();
        let entry: Option<EntryOut> = answer.get(..size_of::<EntryOut>()).and_then(object);
        let is_done = asked.error == 0;
        match (asked.op, entry) {
            (trace::LOOKUP, Some(entry)) if is_done && entry.nodeid != 0 => {
                asked.gave = self.found(dir, name(0), &entry);
            }
            (trace::LOOKUP, _) if is_done || asked.error == libc::ENOENT => {
                self.names(dir).entry(name(0)).or_insert(None);
            }
            (trace::LINK, Some(entry)) if is_done => {
                asked.gave = self.number(entry.nodeid);
                let file = asked.gave as usize;
                self.names(dir).insert(name(0), Some(file));
            }
            (trace::MKNOD | trace::MKDIR | trace::SYMLINK | trace::CREATE | trace::TMPFILE, Some(entry))
                if is_done =>
            {
                // One that was there may be opened by CREATE.
                let there = self.nodes.get(&entry.nodeid).copied();
                let file = there.unwrap_or_else(|| self.add(entry.nodeid, None));
                asked.gave = file as u64;
                if asked.op != trace::TMPFILE {
                    self.names(dir).insert(name(0), Some(file));
                }
                if matches!(asked.op, trace::CREATE | trace::TMPFILE) {
                    asked.handle = self.opened(answer.get(size_of::<EntryOut>()..));
                }
            }
            (trace::OPEN | trace::OPENDIR, _) if is_done => asked.handle = self.opened(Some(answer)),
            (trace::UNLINK | trace::RMDIR, _) if is_done => {
                self.names(dir).insert(name(0), None);
            }
            (trace::RENAME | trace::RENAME2, _) if is_done => {
                let exchanged = asked.op == trace::RENAME2 && asked.word(8) & libc::RENAME_EXCHANGE != 0;
                let to = asked.word(0) as usize;
                let moved = self.names(dir).insert(name(0), None).flatten();
                let replaced = self.names(to).insert(name(1), moved).flatten();
                if exchanged {
                    self.names(dir).insert(name(0), replaced);
                }
            }
            (trace::READDIR | trace::READDIRPLUS, _) if is_done => {
                let plus = if asked.op == trace::READDIRPLUS { size_of::<EntryOut>() } else { 0 };
                let mut rest = answer;
                while let Some((bytes, name, next)) = dirent(rest, plus) {
                    // Of some the name alone is told.
                    let entry = object(bytes).filter(|entry: &EntryOut| entry.nodeid != 0);
                    let file = entry.map_or(0, |entry| self.found(dir, name.to_vec(), &entry));
                    asked.entries.push((file, name.to_vec()));
                    rest = next;
                }
            }
            _ => {}
        }
    }

    /// What is known of the names in a directory.
    fn names(&mut self, dir: usize) -> &mut HashMap<Vec<u8>, Option<usize>> {
        let place = if dir < self.files.len() { dir } else { 0 };
        &mut self.files[place].names
    }

    fn add(&mut self, node: u64, was: Option<Vec<u8>>) -> usize {
        self.files.push(Known { was, ..Known::default() });
        self.nodes.insert(node, self.files.len() - 1);
        self.files.len() - 1
    }

    /// The number of a file that was found by its name.
    fn found(&mut self, dir: usize, name: Vec<u8>, entry: &EntryOut) -> u64 {
        let node = entry.nodeid;
        if let Some(Some(file)) = self.names(dir).get(&name).copied() {
            self.nodes.insert(node, file);
            return file as u64;
        }
        let is_news = !self.names(dir).contains_key(&name);
        let path = self.files.get(dir).and_then(|dir| dir.was.as_ref()).filter(|_| is_news).map(|dir| {
            let between: &[u8] = if dir.is_empty() { b"" } else { b"\0" };
            [dir, between, &name].concat()
        });
        let file = match self.nodes.get(&node).copied() {
            Some(file) => {
                if let Some((path, other)) = path.zip(self.files.get(file).and_then(|file| file.was.clone()))
                {
                    let _ = writeln!(self.lines, "{}", Was::Link { path, other });
                }
                file
            }
            None => {
                if let Some(path) = path.clone() {
                    let Attr { mode, uid, gid, size, .. } = entry.attr;
                    let _ = writeln!(self.lines, "{}", Was::File { mode, uid, gid, size, path });
                }
                self.add(node, path)
            }
        };
        self.names(dir).insert(name, Some(file));
        file as u64
    }

    /// The number of the handle that an answer gives.
    fn opened(&mut self, open: Option<&[u8]>) -> u64 {
        let Some(handle) = open.and_then(<[u8]>::first_chunk) else { return 0 };
        let number = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(u64::from_le_bytes(*handle), number);
        number
    }
}

/// The first bytes, `most` at most, of what was answered; `None` where there was no room for an answer.
fn answer(memory: &GuestRam, chain: DescriptorChain<&GuestRam>, most: usize) -> io::Result<Option<Vec<u8>>> {
    let mut answer: Option<Vec<u8>> = None;
    for room in chain.writable() {
        let answer = answer.get_or_insert_default();
        let begin = answer.len();
        answer.resize((begin + room.len() as usize).min(most), 0);
        memory.read_slice(&mut answer[begin..], room.addr()).map_err(io::Error::other)?;
    }
    Ok(answer)
}

/// What lies in bytes of just its size.
fn object<T: ByteValued + Default>(bytes: &[u8]) -> Option<T> {
    let mut object = T::default();
    (bytes.len() == size_of::<T>()).then(|| object.as_mut_slice().copy_from_slice(bytes))?;
    Some(object)
}

/// The first directory entry: `plus` bytes of attributes, its name, and what follows.
fn dirent(bytes: &[u8], plus: usize) -> Option<(&[u8], &[u8], &[u8])> {
    let (attributes, dirent) = bytes.split_at_checked(plus)?;
    let len = u32::from_le_bytes(*dirent.get(16..)?.first_chunk()?) as usize;
    let name = dirent.get(DIRENT_HEADER..DIRENT_HEADER.checked_add(len)?)?;
    let next = (DIRENT_HEADER + len).next_multiple_of(8).min(dirent.len());
    Some((attributes, name, dirent.get(next..)?))
}
