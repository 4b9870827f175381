//! A process's standard streams: containerd's FIFOs on one side, the agent's
//! stdio port on the other.
//!
//! Each stream is one connection, so that a slow one holds up no other; its end
//! of file travels as a half-close. The FIFOs are held open by the shim itself,
//! so that a client that goes away neither ends the process's input nor kills
//! it by its output; see docs/decisions/0604.

mod binary;
mod copy;
mod endpoint;
#[cfg(test)]
mod tests;

use std::{
    fs::File,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rvm_protocol::guest::{Stream, StreamHeader};
use tokio::{sync::watch, task::AbortHandle};

use crate::{
    background::off_thread,
    vsock::{Vsock, VsockError},
};
pub use binary::Logger;
use copy::{Direction, Progress, copy};
use endpoint::OpenInput;
pub use endpoint::{Input, Output};

/// What containerd wants a process's streams connected to; empty for none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Where its input comes from.
    pub stdin: String,
    /// Where its output goes.
    pub stdout: String,
    /// Where its errors go.
    pub stderr: String,
    /// Whether it has a terminal, which has one output only.
    pub terminal: bool,
}

/// Why a process has no streams.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// A path that cannot be opened.
    #[error("{stream}: {path}: {source}")]
    Open {
        /// Which stream.
        stream: &'static str,
        /// As containerd named it.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something other than a path that is not known here.
    #[error("{stream}: {uri}: must be a FIFO's path, file:///PATH or binary:///PROGRAM")]
    Scheme {
        /// Which stream.
        stream: &'static str,
        /// As containerd named it.
        uri: String,
    },
    /// The logging program.
    #[error("{uri}: {source}")]
    Logger {
        /// As containerd named it.
        uri: String,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// The guest's side.
    #[error(transparent)]
    Vsock(#[from] VsockError),
}

/// The host side of a process's streams, open but for the input.
#[derive(Default)]
pub struct Endpoints {
    /// Where its input comes from.
    pub stdin: Option<Input>,
    /// Where its output goes.
    pub stdout: Option<Output>,
    /// Where its errors go; unused with a terminal.
    pub stderr: Option<Output>,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// The program that reads the output, where there is one.
    pub logger: Option<Logger>,
}

impl Endpoints {
    /// Opens what containerd named. `id` and `namespace` are for a logging program.
    pub async fn open(stdio: &Stdio, namespace: &str, id: &str) -> Result<Self, IoError> {
        let mut wanted = stdio.clone();
        let is_logged = stdio.stdout.starts_with("binary://");
        if is_logged {
            // The program takes both.
            (wanted.stdout, wanted.stderr) = Default::default();
        }
        // A client may name places of a file system that does not answer.
        let mut endpoints = off_thread(move || Self::open_files(&wanted)).await?;
        if is_logged {
            let (logger, stdout, stderr) = Logger::start(&stdio.stdout, namespace, id).await?;
            (endpoints.logger, endpoints.stdout, endpoints.stderr) =
                (Some(logger), Some(stdout), Some(stderr));
        }
        Ok(endpoints)
    }

    fn open_files(stdio: &Stdio) -> Result<Self, IoError> {
        let mut endpoints = Self { terminal: stdio.terminal, ..Self::default() };
        if !stdio.stdin.is_empty() {
            endpoints.stdin = Some(Input::new("stdin", &stdio.stdin)?);
        }
        if !stdio.stdout.is_empty() {
            endpoints.stdout = Some(Output::open("stdout", &stdio.stdout)?);
        }
        if !stdio.stderr.is_empty() && !stdio.terminal {
            endpoints.stderr = Some(Output::open("stderr", &stdio.stderr)?);
        }
        Ok(endpoints)
    }
}

/// Ends the copies when it is dropped.
#[derive(Default)]
struct Copies(Vec<AbortHandle>);

impl Drop for Copies {
    fn drop(&mut self) {
        for copy in &self.0 {
            copy.abort();
        }
    }
}

/// The running copies of one process's streams; dropping this ends them.
#[derive(Default)]
pub struct ProcessIo {
    copies: Copies,
    /// Every output copy holds a sender; closed once all have ended.
    open: Option<watch::Receiver<()>>,
    progress: Arc<Progress>,
    stdin_hold: Mutex<Option<File>>,
    _logger: Option<Logger>,
}

impl ProcessIo {
    /// Connects the streams of a process that is about to start. Its input is
    /// opened here and no earlier: a client that has written all of it may only
    /// then find that it has to be closed, see docs/decisions/0604.
    pub async fn attach(
        vsock: &Vsock,
        container_id: &str,
        exec_id: &str,
        endpoints: Endpoints,
    ) -> Result<Self, IoError> {
        let header = |stream| StreamHeader {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            stream,
        };
        let (open_sender, open) = watch::channel(());
        let mut io = Self { open: Some(open), _logger: endpoints.logger, ..Self::default() };
        let Endpoints { stdin, stdout, stderr, terminal, .. } = endpoints;

        if terminal {
            if stdin.is_none() && stdout.is_none() {
                return Ok(io);
            }
            let (read, write) = vsock.stream(&header(Stream::Terminal)).await?.into_split();
            if let Some(input) = stdin {
                let OpenInput { reader, hold } = off_thread(move || input.open("stdin")).await?;
                *io.stdin_hold.lock().unwrap_or_else(PoisonError::into_inner) = hold;
                // A terminal has no end of input but the characters typed on it:
                // the write half stays open as long as the output does.
                io.input(copy(reader, write, Direction::KeepOpen, Arc::default()));
            } else {
                // Dropping the half would half-close the terminal.
                write.forget();
            }
            let sink = stdout.unwrap_or_else(Output::sink);
            io.output(read, sink, open_sender);
            return Ok(io);
        }

        let wanted = async |stream, wanted: bool| match wanted {
            true => vsock.stream(&header(stream)).await.map(Some),
            false => Ok(None),
        };
        let (stdin_stream, stdout_stream, stderr_stream) = tokio::try_join!(
            wanted(Stream::Stdin, stdin.is_some()),
            wanted(Stream::Stdout, stdout.is_some()),
            wanted(Stream::Stderr, stderr.is_some()),
        )?;
        if let (Some(input), Some(stream)) = (stdin, stdin_stream) {
            let OpenInput { reader, hold } = off_thread(move || input.open("stdin")).await?;
            *io.stdin_hold.lock().unwrap_or_else(PoisonError::into_inner) = hold;
            io.input(copy(reader, stream, Direction::Close, Arc::default()));
        }
        if let (Some(sink), Some(stream)) = (stdout, stdout_stream) {
            io.output(stream, sink, open_sender.clone());
        }
        if let (Some(sink), Some(stream)) = (stderr, stderr_stream) {
            io.output(stream, sink, open_sender);
        }
        Ok(io)
    }

    fn input(&mut self, copy: impl Future<Output = ()> + Send + 'static) {
        self.copies.0.push(tokio::spawn(copy).abort_handle());
    }

    fn output(
        &mut self,
        stream: impl tokio::io::AsyncRead + Unpin + Send + 'static,
        sink: Output,
        open: watch::Sender<()>,
    ) {
        let copy = copy(stream, sink.writer, Direction::Close, self.progress.clone());
        let task = tokio::spawn(async move {
            // Both end with the copy: who waits for it, and the FIFO's hold.
            let _open = open;
            copy.await;
        });
        self.copies.0.push(task.abort_handle());
    }

    /// Lets the process's input end once what the client has written is
    /// delivered and the client has closed its end.
    pub fn close_stdin(&self) {
        self.stdin_hold.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Waits until all output has been delivered. Gives up when nothing has
    /// moved for `quiet`, as then somebody else holds the output open or nobody
    /// reads it, and after `limit` in any case; the copies go on.
    pub async fn drain(&self, quiet: Duration, limit: Duration) {
        let Some(mut open) = self.open.clone() else { return };
        let ended = async { while open.changed().await.is_ok() {} };
        let stuck = async {
            let mut seen = self.progress.count();
            loop {
                tokio::time::sleep(quiet).await;
                match self.progress.count() {
                    now if now == seen => break,
                    now => seen = now,
                }
            }
        };
        tokio::select! {
            () = ended => {}
            () = stuck => log::debug!("output is held open"),
            () = tokio::time::sleep(limit) => log::debug!("output goes on"),
        }
    }
}
