//! What a guest's kernel asked of a share, in text: a [`super::record::Recorder`] writes it, the tests play it again.
//!
//! A line is one of these; words are parted by one space, what begins with `#` is for people:
//!
//! ```text
//! share [readonly] [constant]        how the share was served; the first one
//! was MODE UID GID SIZE PATH         what was there before the first request; MODE in octal, with the type
//! was = PATH OTHER                   a second name of it
//! as UID GID                         who asks, from here on
//! OPCODE FILE [WORDS] [:TAIL] [RESULT]...
//! ```
//!
//! Files and handles have numbers of the trace's own, counted from 1, which is the share's root: a file keeps its
//! number, whatever node id it gets. WORDS are the fixed part of a message's body, hexadecimal, without the zeroes
//! it ends with; TAIL is what follows, in which NUL is `/`. What is written to a file is left out. A RESULT is
//! `!ERRNO`, `=FILE`, `@HANDLE`, `+FILE:NAME` of an entry in a directory, or `~` where none was waited for.

#[cfg(test)]
mod parse;

use std::fmt::{self, Write};

use fuse_backend_rs::abi::fuse_abi::Opcode;

#[cfg(test)]
pub(super) use parse::Trace;

/// What a field in the fixed part of a body is, other than a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    /// A handle.
    Handle,
    /// A node id.
    Node,
    /// Who has a lock: any number, by which nothing is served.
    Owner,
}

/// Opcode, name, bytes of the fixed part, and its fields of eight bytes with their offsets.
type Shape = (u32, &'static str, usize, &'static [(usize, Field)]);

use Field::{Handle, Node, Owner};

pub(super) const LOOKUP: u32 = Opcode::Lookup as u32;
pub(super) const FORGET: u32 = Opcode::Forget as u32;
pub(super) const SYMLINK: u32 = Opcode::Symlink as u32;
pub(super) const MKNOD: u32 = Opcode::Mknod as u32;
pub(super) const MKDIR: u32 = Opcode::Mkdir as u32;
pub(super) const UNLINK: u32 = Opcode::Unlink as u32;
pub(super) const RMDIR: u32 = Opcode::Rmdir as u32;
pub(super) const RENAME: u32 = Opcode::Rename as u32;
pub(super) const LINK: u32 = Opcode::Link as u32;
pub(super) const OPEN: u32 = Opcode::Open as u32;
pub(super) const WRITE: u32 = Opcode::Write as u32;
pub(super) const OPENDIR: u32 = Opcode::Opendir as u32;
pub(super) const READDIR: u32 = Opcode::Readdir as u32;
pub(super) const CREATE: u32 = Opcode::Create as u32;
pub(super) const READDIRPLUS: u32 = Opcode::Readdirplus as u32;
pub(super) const RENAME2: u32 = Opcode::Rename2 as u32;
pub(super) const TMPFILE: u32 = 51;

/// Of messages that Linux sends (linux/fuse.h).
const SHAPES: [Shape; 37] = [
    (LOOKUP, "LOOKUP", 0, &[]),
    (FORGET, "FORGET", 8, &[]),
    (3, "GETATTR", 16, &[(8, Handle)]),
    (4, "SETATTR", 88, &[(8, Handle), (24, Owner)]),
    (5, "READLINK", 0, &[]),
    (SYMLINK, "SYMLINK", 0, &[]),
    (MKNOD, "MKNOD", 16, &[]),
    (MKDIR, "MKDIR", 8, &[]),
    (UNLINK, "UNLINK", 0, &[]),
    (RMDIR, "RMDIR", 0, &[]),
    (RENAME, "RENAME", 8, &[(0, Node)]),
    (LINK, "LINK", 8, &[(0, Node)]),
    (OPEN, "OPEN", 8, &[]),
    (15, "READ", 40, &[(0, Handle), (24, Owner)]),
    (WRITE, "WRITE", 40, &[(0, Handle), (24, Owner)]),
    (17, "STATFS", 0, &[]),
    (18, "RELEASE", 24, &[(0, Handle), (16, Owner)]),
    (20, "FSYNC", 16, &[(0, Handle)]),
    (21, "SETXATTR", 8, &[]),
    (22, "GETXATTR", 8, &[]),
    (23, "LISTXATTR", 8, &[]),
    (24, "REMOVEXATTR", 0, &[]),
    (25, "FLUSH", 24, &[(0, Handle), (16, Owner)]),
    (26, "INIT", 64, &[]),
    (OPENDIR, "OPENDIR", 8, &[]),
    (READDIR, "READDIR", 40, &[(0, Handle), (24, Owner)]),
    (29, "RELEASEDIR", 24, &[(0, Handle), (16, Owner)]),
    (30, "FSYNCDIR", 16, &[(0, Handle)]),
    (CREATE, "CREATE", 16, &[]),
    (38, "DESTROY", 0, &[]),
    (39, "IOCTL", 32, &[(0, Handle)]),
    (43, "FALLOCATE", 32, &[(0, Handle)]),
    (READDIRPLUS, "READDIRPLUS", 40, &[(0, Handle), (24, Owner)]),
    (RENAME2, "RENAME2", 16, &[(0, Node)]),
    (46, "LSEEK", 24, &[(0, Handle)]),
    (50, "SYNCFS", 8, &[]),
    (TMPFILE, "TMPFILE", 16, &[]),
];

fn shape(op: u32) -> Option<&'static Shape> {
    SHAPES.iter().find(|(known, ..)| *known == op)
}

/// Bytes of the fixed part of an opcode's body; all of it is tail where it is not known.
pub(super) fn fixed_bytes(op: u32) -> usize {
    shape(op).map_or(0, |(_, _, bytes, _)| *bytes)
}

/// A request, and what came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Request {
    pub op: u32,
    /// The file it is about; 0 for none.
    pub file: u64,
    /// Whose process asked.
    pub uid: u32,
    pub gid: u32,
    /// The fixed part of its body, with numbers of the trace's in [`Field`]s.
    pub fixed: Vec<u8>,
    /// Names and values after it.
    pub tail: Vec<u8>,
    /// Nobody waited for an answer.
    pub unanswered: bool,
    /// The error's number; 0 for none.
    pub error: i32,
    /// The file it gave; 0 for none.
    pub gave: u64,
    /// The handle it gave; 0 for none.
    pub handle: u64,
    /// The directory entries it gave, with their files; of some only the name was told, then 0.
    pub entries: Vec<(u64, Vec<u8>)>,
}

impl Request {
    /// Changes each field of a kind in the fixed part.
    pub(super) fn change<E>(
        &mut self,
        mut change: impl FnMut(Field, u64) -> Result<u64, E>,
    ) -> Result<(), E> {
        let fields = shape(self.op).map_or(&[][..], |(_, _, _, fields)| fields);
        for &(offset, field) in fields {
            if let Some(place) = self.fixed.get_mut(offset..).and_then(|rest| rest.first_chunk_mut()) {
                *place = change(field, u64::from_le_bytes(*place))?.to_le_bytes();
            }
        }
        Ok(())
    }

    /// Four bytes of the fixed part.
    pub(super) fn word(&self, offset: usize) -> u32 {
        let bytes = self.fixed.get(offset..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match shape(self.op) {
            Some((_, name, ..)) => write!(f, "{name} {}", self.file)?,
            None => write!(f, "{} {}", self.op, self.file)?,
        }
        let (words, _) = self.fixed.as_chunks::<4>();
        let used = words.iter().rposition(|word| *word != [0; 4]).map_or(0, |last| last + 1);
        for (position, word) in words.iter().take(used.max(1)).enumerate() {
            let before = if position == 0 { ' ' } else { ',' };
            write!(f, "{before}{:x}", u32::from_le_bytes(*word))?;
        }
        if !self.tail.is_empty() {
            write!(f, " :{}", Escaped(&self.tail))?;
        }
        if self.unanswered {
            f.write_str(" ~")?;
        }
        for (mark, number) in
            [('!', u64::from(self.error.unsigned_abs())), ('=', self.gave), ('@', self.handle)]
        {
            if number != 0 {
                write!(f, " {mark}{number}")?;
            }
        }
        self.entries.iter().try_for_each(|(file, name)| write!(f, " +{file}:{}", Escaped(name)))
    }
}

/// A file that was there before the first request. Paths have NUL between their names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Was {
    File { mode: u32, uid: u32, gid: u32, size: u64, path: Vec<u8> },
    Link { path: Vec<u8>, other: Vec<u8> },
}

impl fmt::Display for Was {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { mode, uid, gid, size, path } => {
                write!(f, "was {mode:o} {uid} {gid} {size} {}", Escaped(path))
            }
            Self::Link { path, other } => write!(f, "was = {} {}", Escaped(path), Escaped(other)),
        }
    }
}

/// Bytes as a word.
struct Escaped<'a>(&'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| match byte {
            0 => f.write_char('/'),
            b'/' | b'%' => write!(f, "%{byte:02x}"),
            0x21..=0x7e => f.write_char((*byte).into()),
            _ => write!(f, "%{byte:02x}"),
        })
    }
}
