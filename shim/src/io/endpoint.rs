//! The host's side of a stream: FIFOs as containerd makes them, files, and
//! whatever else can be read or written.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::Path,
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::unix::pipe,
};

use super::IoError;

/// Where a process's input comes from.
pub struct Input(Source);

enum Source {
    Reader(Box<dyn AsyncRead + Send + Unpin>),
    /// A FIFO that is opened when the process is about to start.
    Fifo(String),
}

/// An input that is open.
pub(super) struct OpenInput {
    pub(super) reader: Box<dyn AsyncRead + Send + Unpin>,
    /// The shim's own writer on the FIFO: while it is there, clients come and go
    /// without ending the input.
    pub(super) hold: Option<File>,
}

impl Input {
    /// Anything that can be read; its end is the input's.
    pub fn reader(reader: impl AsyncRead + Send + Unpin + 'static) -> Self {
        Self(Source::Reader(Box::new(reader)))
    }

    pub(super) fn new(stream: &'static str, path: &str) -> Result<Self, IoError> {
        if path.contains("://") {
            return Err(IoError::Scheme { stream, uri: path.to_owned() });
        }
        let failed = |source| IoError::Open { stream, path: path.to_owned(), source };
        fs::metadata(path).map_err(failed)?;
        Ok(Self(Source::Fifo(path.to_owned())))
    }

    pub(super) fn open(self, stream: &'static str) -> Result<OpenInput, IoError> {
        let path = match self.0 {
            Source::Reader(reader) => return Ok(OpenInput { reader, hold: None }),
            Source::Fifo(path) => path,
        };
        let failed = |source| IoError::Open { stream, path: path.clone(), source };
        // Neither open waits for the other end: the first of a FIFO's read side
        // never does without blocking, and then there is a reader.
        let reader = pipe::OpenOptions::new().open_receiver(&path).map_err(failed)?;
        let hold =
            OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&path).map_err(failed)?;
        Ok(OpenInput { reader: Box::new(reader), hold: Some(hold) })
    }
}

/// Where a process's output goes.
pub struct Output {
    pub(super) writer: Box<dyn AsyncWrite + Send + Unpin>,
}

impl Output {
    /// Anything that can be written.
    pub fn writer(writer: impl AsyncWrite + Send + Unpin + 'static) -> Self {
        Self { writer: Box::new(writer) }
    }

    /// Output nobody wants.
    pub(super) fn sink() -> Self {
        Self::writer(tokio::io::sink())
    }

    pub(super) fn open(stream: &'static str, uri: &str) -> Result<Self, IoError> {
        let failed = |source| IoError::Open { stream, path: uri.to_owned(), source };
        if let Some(path) = uri.strip_prefix("file://") {
            return Self::append(Path::new(path), true).map_err(failed);
        }
        if uri.contains("://") {
            return Err(IoError::Scheme { stream, uri: uri.to_owned() });
        }
        if !fs::metadata(uri).map_err(failed)?.file_type().is_fifo() {
            return Self::append(Path::new(uri), false).map_err(failed);
        }
        // Open for reading as well: the shim is then itself the reader that
        // keeps a write from failing while no client is there.
        let sender = pipe::OpenOptions::new().read_write(true).open_sender(uri).map_err(failed)?;
        Ok(Self::writer(sender))
    }

    fn append(path: &Path, create: bool) -> io::Result<Self> {
        if create && let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        let file = OpenOptions::new().append(true).create(create).mode(0o644).open(path)?;
        // The kernel knows no waiting for a regular file: it is written to by other threads.
        Ok(Self::writer(tokio::fs::File::from_std(file)))
    }
}
