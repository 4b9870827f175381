//! The container's streams, copied to and from our own.

use std::{
    fs::File,
    io::{self, IsTerminal, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    thread,
};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use rvm_protocol::guest::{Stream, StreamHeader};
use rvm_shim::vsock::{Vsock, VsockError};
use tokio::task::JoinHandle;

use super::RunError;

/// Connected streams of a running command.
pub(super) struct Streams {
    /// What carries output; each ends when the command's end of it does.
    outputs: Vec<JoinHandle<()>>,
}

impl Streams {
    /// Connects the streams of the container's first process, which has been
    /// created and not yet started.
    pub(super) async fn connect(
        vsock: &Vsock,
        id: &str,
        terminal: bool,
        interactive: bool,
    ) -> Result<Self, RunError> {
        let connect = async |stream| -> Result<UnixStream, RunError> {
            let header = StreamHeader { container_id: id.to_owned(), exec_id: String::new(), stream };
            blocking(vsock.stream(&header).await?)
                .map_err(|source| VsockError::Io { port: rvm_protocol::guest::STDIO_PORT, source }.into())
        };
        let own = |fd: BorrowedFd<'_>| {
            fd.try_clone_to_owned()
                .map(File::from)
                .map_err(|source| RunError::Io { what: "standard streams", source })
        };
        let (stdin, stdout, stderr) =
            (own(io::stdin().as_fd())?, own(io::stdout().as_fd())?, own(io::stderr().as_fd())?);
        let mut outputs = Vec::new();
        if terminal {
            let output = connect(Stream::Terminal).await?;
            let input = output.try_clone().map_err(|source| RunError::Io { what: "the terminal", source })?;
            outputs.push(copy_output(output, stdout));
            if interactive {
                copy_input(stdin, input);
            }
        } else {
            outputs.push(copy_output(connect(Stream::Stdout).await?, stdout));
            outputs.push(copy_output(connect(Stream::Stderr).await?, stderr));
            if interactive {
                copy_input(stdin, connect(Stream::Stdin).await?);
            }
        }
        Ok(Self { outputs })
    }

    /// Waits until all output has been written.
    pub(super) async fn drained(self) {
        for output in self.outputs {
            let _ = output.await;
        }
    }
}

fn blocking(stream: tokio::net::UnixStream) -> io::Result<UnixStream> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Copies until the command's end of the stream is closed, or ours is: then the
/// command's own writes fail, as they would on a pipe.
fn copy_output(mut from: UnixStream, mut to: File) -> JoinHandle<()> {
    tokio::task::spawn_blocking(move || match copy(&mut from, &mut to) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            log::error!("the command's output: {error}");
        }
        _ => {}
    })
}

/// Copies until our end of input, which becomes the command's. The thread may
/// be reading still when the command has ended, and goes with the process.
fn copy_input(mut from: File, mut to: UnixStream) {
    thread::spawn(move || {
        let _ = copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
}

/// As `io::copy`, but what has arrived is passed on at once.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => to.write_all(buffer.get(..count).unwrap_or_default())?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Whether standard input is a terminal.
pub(super) fn stdin_is_terminal() -> bool {
    io::stdin().is_terminal()
}

/// Columns and lines of the terminal, if there is one.
pub(super) fn terminal_size() -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request fills in the winsize it is given (ioctl_tty(2)).
    let result = unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    (result == 0 && size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Standard input in raw mode: the terminal in the guest does the editing and
/// the signals. As it was again when dropped.
pub(super) struct RawMode {
    terminal: OwnedFd,
    before: Termios,
}

impl RawMode {
    pub(super) fn enter() -> io::Result<Self> {
        let terminal = io::stdin().as_fd().try_clone_to_owned()?;
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&terminal, SetArg::TCSANOW, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.terminal, SetArg::TCSANOW, &self.before);
    }
}
