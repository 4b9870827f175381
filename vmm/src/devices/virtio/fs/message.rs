//! One FUSE message: what stands between a descriptor chain and the library.
//!
//! `fuse-backend-rs` allocates what a message asks for, as far as its buffers go.
//! So it only sees messages whose buffers are no larger than any that is right,
//! and only with the opcodes the server knows; what the library does not know
//! but Linux asks for is answered here.
//!
//! A message lies in memory the guest can change after it was looked at. What
//! holds in spite of that is the bound: it is taken of the very buffers that the
//! library reads from. A guest that changes the opcode meanwhile gains no more
//! than an allocation of that size.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{
    Attr, AttrOut, CreateIn, EntryOut, InHeader, Opcode, OpenIn, OpenOut, OutHeader, ReleaseIn, WriteIn,
    WriteOut,
};
use fuse_backend_rs::api::filesystem::OpenOptions;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use virtio_queue::DescriptorChain;
use vm_memory::{ByteValued, Bytes};

use super::meter::FsMeter;
use super::passthrough::{Passthrough, Seen};
use crate::memory::GuestRam;

/// Bytes of the largest message: a WRITE of [`super::MAX_IO_BYTES`] with its headers.
const MAX_MESSAGE_BYTES: usize = super::MAX_IO_BYTES as usize + 4096;

/// Opcodes Linux has and the library has not.
const SYNCFS: u32 = 50;
const TMPFILE: u32 = 51;

/// What is there before the content of a file that comes with the answer to OPEN.
const OPEN_BYTES: usize = size_of::<OutHeader>() + size_of::<OpenOut>();
/// Room behind that from which on our guest kernel wants the content, and how much of it, at most.
const CONTENT_BYTES: std::ops::RangeInclusive<usize> = 4096..=32 << 10;

/// Room for an answer to WRITE from which on our guest kernel wants to hear of the file, too.
const SEEN_BYTES: usize = size_of::<OutHeader>() + size_of::<WriteOut>() + size_of::<SeenOut>();

/// What follows the answer to WRITE (`struct fuse_write_seen` of our guest kernel).
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct SeenOut {
    /// When the file had been modified before the data was written.
    mtime: u64,
    mtime_nsec: u32,
    padding: u32,
    /// What it is afterwards.
    after: AttrOut,
}

// SAFETY: only integers, and what is between them is a field.
unsafe impl ByteValued for SeenOut {}

/// What is done with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Handling {
    /// The library decodes it.
    Library,
    /// Everything a file system holds goes to the host's disk.
    SyncFs,
    /// A file without a name is made.
    TmpFile,
    /// A file is opened, and perhaps read.
    Open,
    /// A file is written to, and perhaps looked at.
    Write,
    /// Something is closed: our guest kernel sends that without room for an answer.
    Close,
    /// No answer is expected to what is not done.
    Silence,
    /// The guest's kernel does without, and asks no more.
    Unknown,
}

fn handling(opcode: u32) -> Handling {
    const LIBRARY: [Opcode; 30] = [
        Opcode::Lookup,
        Opcode::Forget,
        Opcode::Getattr,
        Opcode::Setattr,
        Opcode::Readlink,
        Opcode::Symlink,
        Opcode::Mknod,
        Opcode::Mkdir,
        Opcode::Unlink,
        Opcode::Rmdir,
        Opcode::Rename,
        Opcode::Link,
        Opcode::Read,
        Opcode::Statfs,
        Opcode::Flush,
        Opcode::Fsync,
        Opcode::Setxattr,
        Opcode::Getxattr,
        Opcode::Listxattr,
        Opcode::Removexattr,
        Opcode::Init,
        Opcode::Opendir,
        Opcode::Readdir,
        Opcode::Fsyncdir,
        Opcode::Create,
        Opcode::Destroy,
        Opcode::BatchForget,
        Opcode::Fallocate,
        Opcode::Readdirplus,
        Opcode::Rename2,
    ];
    match opcode {
        SYNCFS => Handling::SyncFs,
        TMPFILE => Handling::TmpFile,
        _ if opcode == Opcode::Open as u32 => Handling::Open,
        _ if opcode == Opcode::Write as u32 => Handling::Write,
        _ if opcode == Opcode::Release as u32 || opcode == Opcode::Releasedir as u32 => Handling::Close,
        _ if opcode == Opcode::Interrupt as u32 => Handling::Silence,
        _ if opcode == Opcode::Lseek as u32 => Handling::Library,
        _ if LIBRARY.iter().any(|known| *known as u32 == opcode) => Handling::Library,
        _ => Handling::Unknown,
    }
}

/// The bytes of an answer, where one was given; `None` where the message could not be decoded.
type Served = Option<Option<usize>>;

/// Answers a guest's messages.
pub(super) struct FuseServer {
    library: Server<Arc<Passthrough>>,
    tree: Arc<Passthrough>,
    meter: FsMeter,
}

impl FuseServer {
    pub(super) fn new(tree: Passthrough, meter: FsMeter) -> Self {
        let tree = Arc::new(tree);
        Self { library: Server::new(Arc::clone(&tree)), tree, meter }
    }

    pub(super) fn tree(&self) -> &Passthrough {
        &self.tree
    }

    /// Answers one request; returns the bytes of the answer, 0 for none.
    pub(super) fn answer(&self, memory: &GuestRam, chain: DescriptorChain<&GuestRam>) -> u32 {
        let mut served = self.serve(memory, chain.clone());
        if served == Some(Some(size_of::<OutHeader>())) {
            // An error, perhaps.
            served = self.serve_user(memory, &chain).unwrap_or(served);
        }
        let written = served.unwrap_or_else(|| {
            // A driver must not take what lies in its buffer for an answer.
            let request = header(memory, chain.clone())?;
            reply(memory, chain.clone(), request.unique, Err(libc::EINVAL))
        });
        #[cfg(any(test, feature = "record"))]
        self.meter.record(memory, chain, written.unwrap_or(0));
        written.and_then(|written| u32::try_from(written).ok()).unwrap_or(0)
    }

    fn serve(&self, memory: &GuestRam, chain: DescriptorChain<&GuestRam>) -> Served {
        let request = header(memory, chain.clone())?;
        self.meter.message(request.opcode);
        self.serve_request(request, memory, chain)
    }

    /// Does in the name of the process that asked what was refused, where that makes a difference; nothing was done of
    /// it then. What is asked of an open file is the affair of who opened it, and its errors are told once.
    fn serve_user(&self, memory: &GuestRam, chain: &DescriptorChain<&GuestRam>) -> Option<Served> {
        const OF_OPEN: [Opcode; 8] = [
            Opcode::Read,
            Opcode::Write,
            Opcode::Flush,
            Opcode::Fsync,
            Opcode::Fallocate,
            Opcode::Lseek,
            Opcode::Release,
            Opcode::Releasedir,
        ];
        let room =
            chain.clone().writable().next().filter(|room| room.len() as usize >= size_of::<OutHeader>())?;
        let OutHeader { error, .. } = memory.read_obj(room.addr()).ok()?;
        if ![-libc::EACCES, -libc::EPERM].contains(&error) {
            return None;
        }
        let request = header(memory, chain.clone())?;
        if request.opcode == SYNCFS || OF_OPEN.iter().any(|known| *known as u32 == request.opcode) {
            return None;
        }
        let serve = || self.serve_request(request, memory, chain.clone());
        self.tree.for_user(request.nodeid, request.uid, request.gid, serve)
    }

    fn serve_request(
        &self,
        request: InHeader,
        memory: &GuestRam,
        chain: DescriptorChain<&GuestRam>,
    ) -> Served {
        match handling(request.opcode) {
            Handling::Library => {
                let reader = Reader::from_descriptor_chain(memory, chain.clone()).ok()?;
                if reader.available_bytes() > MAX_MESSAGE_BYTES {
                    return None;
                }
                let writer = VirtioFsWriter::new(memory, chain).ok()?;
                self.library.handle_message(reader, Writer::VirtioFs(writer), None, None).ok().map(Some)
            }
            Handling::SyncFs => {
                let result = self.tree.sync_fs(request.nodeid).map(|()| Vec::new());
                Some(reply(memory, chain, request.unique, result.map_err(number)))
            }
            Handling::TmpFile => {
                let result = self.make_nameless(memory, chain.clone());
                Some(reply(memory, chain, request.unique, result.map_err(number)))
            }
            Handling::Open => self.open(memory, chain),
            Handling::Write => self.write(memory, chain),
            Handling::Close => {
                let mut reader = Reader::from_descriptor_chain(memory, chain.clone()).ok()?;
                let _: InHeader = reader.read_obj().ok()?;
                let ReleaseIn { fh, .. } = reader.read_obj().ok()?;
                let result = self.tree.close(request.nodeid, fh).map(|()| Vec::new());
                Some(reply(memory, chain, request.unique, result.map_err(number)))
            }
            Handling::Silence => Some(Some(0)),
            Handling::Unknown => Some(reply(memory, chain, request.unique, Err(libc::ENOSYS))),
        }
    }

    /// The answer to an OPEN: a handle, and the content of the file where there is room for it.
    fn open(&self, memory: &GuestRam, chain: DescriptorChain<&GuestRam>) -> Served {
        let mut reader = Reader::from_descriptor_chain(memory, chain.clone()).ok()?;
        let InHeader { nodeid, unique, .. } = reader.read_obj().ok()?;
        let OpenIn { flags, fuse_flags } = reader.read_obj().ok()?;
        let (handle, options) = match self.tree.open_file(nodeid, flags, fuse_flags) {
            Ok(opened) => opened,
            Err(error) => return Some(reply(memory, chain, unique, Err(number(error)))),
        };
        let answered = self.opened(memory, chain, nodeid, unique, handle, options);
        if answered.is_none() {
            // Nobody has heard of it.
            let _ = self.tree.close(nodeid, handle);
        }
        answered.map(Some)
    }

    fn opened(
        &self,
        memory: &GuestRam,
        chain: DescriptorChain<&GuestRam>,
        id: u64,
        unique: u64,
        handle: u64,
        options: OpenOptions,
    ) -> Option<usize> {
        let mut writer = VirtioFsWriter::new(memory, chain).ok()?;
        let mut behind = writer.split_at(OPEN_BYTES).ok()?;
        let room = behind.available_bytes().min(*CONTENT_BYTES.end());
        let read = match CONTENT_BYTES.contains(&room) {
            // Who gets none asks for it, and hears why.
            true => {
                let read = self.tree.content(id, handle, |file| behind.write_from_at(file, room, 0));
                read.unwrap_or(0)
            }
            false => 0,
        };
        let len = OPEN_BYTES + read;
        let header = OutHeader { len: u32::try_from(len).ok()?, error: 0, unique };
        let open = OpenOut { fh: handle, open_flags: options.bits(), passthrough: 0 };
        writer.write_all(&[header.as_slice(), open.as_slice()].concat()).ok()?;
        Some(len)
    }

    /// The answer to a WRITE: how much was written, and where there is room for it what the file was before and is now.
    fn write(&self, memory: &GuestRam, chain: DescriptorChain<&GuestRam>) -> Served {
        let mut reader = Reader::from_descriptor_chain(memory, chain.clone()).ok()?;
        if reader.available_bytes() > MAX_MESSAGE_BYTES {
            return None;
        }
        let InHeader { nodeid, unique, .. } = reader.read_obj().ok()?;
        let args: WriteIn = reader.read_obj().ok()?;
        let room = VirtioFsWriter::new(memory, chain.clone()).ok()?.available_bytes();
        let data = |file: &mut File, size, offset| reader.read_to_at(file, size, offset);
        let result = self.tree.write_file(nodeid, &args, room >= SEEN_BYTES, data).map(|(size, seen)| {
            // No message is that large.
            let size = u32::try_from(size).unwrap_or(u32::MAX);
            let mut body = WriteOut { size, padding: 0 }.as_slice().to_vec();
            if let Some(seen) = seen {
                body.extend(SeenOut::from(seen).as_slice());
            }
            body
        });
        reply(memory, chain, unique, result.map_err(number)).map(Some)
    }

    /// The answer to a TMPFILE: as to a CREATE.
    fn make_nameless(&self, memory: &GuestRam, chain: DescriptorChain<&GuestRam>) -> io::Result<Vec<u8>> {
        let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
        let mut reader = Reader::from_descriptor_chain(memory, chain).map_err(invalid)?;
        let request: InHeader = reader.read_obj()?;
        let args: CreateIn = reader.read_obj()?;
        let made = self.tree.make_nameless(request.uid, request.gid, request.nodeid, &args);
        let (entry, handle, options) = made?;
        let open = OpenOut { fh: handle, open_flags: options.bits(), passthrough: 0 };
        Ok([EntryOut::from(entry).as_slice(), open.as_slice()].concat())
    }
}

impl From<Seen> for SeenOut {
    fn from(Seen { mtime: (mtime, mtime_nsec), after, timeout }: Seen) -> Self {
        let after = AttrOut {
            attr_valid: timeout.as_secs(),
            attr_valid_nsec: timeout.subsec_nanos(),
            dummy: 0,
            attr: Attr::with_flags(after, 0),
        };
        // As `Attr` has them.
        Self { mtime: mtime as u64, mtime_nsec: mtime_nsec as u32, padding: 0, after }
    }
}

fn number(error: io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EINVAL)
}

fn header(memory: &GuestRam, chain: DescriptorChain<&GuestRam>) -> Option<InHeader> {
    Reader::from_descriptor_chain(memory, chain).ok()?.read_obj().ok()
}

/// Answers with a result or an error number; `None` where there is no room.
fn reply(
    memory: &GuestRam,
    chain: DescriptorChain<&GuestRam>,
    unique: u64,
    result: Result<Vec<u8>, i32>,
) -> Option<usize> {
    let (error, body) = match result {
        Ok(body) => (0, body),
        Err(error) => (-error, Vec::new()),
    };
    let len = size_of::<OutHeader>() + body.len();
    let header = OutHeader { len: u32::try_from(len).ok()?, error, unique };
    let mut writer = VirtioFsWriter::new(memory, chain).ok()?;
    writer.write_all(&[header.as_slice(), &body].concat()).ok()?;
    Some(len)
}
