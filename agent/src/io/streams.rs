//! The streams of one process, from before it exists until it is deleted.

use std::{
    fs::File,
    mem,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::{fcntl::OFlag, unistd::pipe2};
use rvm_protocol::{agent, guest::Stream};
use tokio::{
    net::unix::pipe,
    sync::{Notify, watch},
};

use super::{Pty, Size};
use crate::error::{Error, Step, StepResult};

/// The agent's ends of a process's streams. A process that has a terminal has
/// that alone; the others have pipes, so that `/dev/stdout` can be opened again.
#[derive(Debug)]
pub struct Streams {
    stdin: Mutex<Slot<pipe::Sender>>,
    stdout: Mutex<Slot<pipe::Receiver>>,
    stderr: Mutex<Slot<pipe::Receiver>>,
    terminal: Mutex<Slot<()>>,
    /// Known once the process has opened it.
    pty: watch::Sender<Option<Pty>>,
    size: Mutex<Option<Size>>,
    close_stdin: Arc<Notify>,
}

/// A stream on its way to the one connection that carries it.
#[derive(Debug)]
enum Slot<T> {
    /// The client did not ask for it.
    Absent,
    /// No connection yet.
    Waiting(T),
    /// Handed to a connection, or closed.
    Taken,
}

/// The process's ends of its pipes; `None` is `/dev/null`.
#[derive(Debug, Default)]
pub struct ChildEnds {
    /// Read end.
    pub stdin: Option<OwnedFd>,
    /// Write end.
    pub stdout: Option<OwnedFd>,
    /// Write end.
    pub stderr: Option<OwnedFd>,
}

/// What a connection carries.
#[derive(Debug)]
pub enum Attachment {
    /// Host to process; ends early when notified.
    Input(pipe::Sender, Arc<Notify>),
    /// Process to host.
    Output(pipe::Receiver),
    /// Both ways, once the process has opened it.
    Terminal(watch::Receiver<Option<Pty>>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // One thread: a poisoned lock means a panic, and that rebooted the VM.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The size a request gives; 0 by 0 is no size.
fn size_of_console(size: &agent::ConsoleSize) -> Option<Size> {
    let clamp = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    (size.width > 0 || size.height > 0).then(|| Size { width: clamp(size.width), height: clamp(size.height) })
}

impl Streams {
    /// Makes the streams a process is to have.
    pub fn new(process: &agent::Process) -> StepResult<(Self, ChildEnds)> {
        let mut child = ChildEnds::default();
        let streams = Self {
            stdin: Mutex::new(Slot::Absent),
            stdout: Mutex::new(Slot::Absent),
            stderr: Mutex::new(Slot::Absent),
            terminal: Mutex::new(if process.terminal { Slot::Waiting(()) } else { Slot::Absent }),
            pty: watch::channel(None).0,
            size: Mutex::new(size_of_console(&process.console_size)),
            close_stdin: Arc::default(),
        };
        if process.terminal {
            return Ok((streams, child));
        }
        let make = || pipe2(OFlag::O_CLOEXEC).step(|| "create a pipe");
        if process.stdin {
            let (read, write) = make()?;
            child.stdin = Some(read);
            let sender = pipe::Sender::from_file(File::from(write)).step(|| "watch a pipe")?;
            *lock(&streams.stdin) = Slot::Waiting(sender);
        }
        for (wanted, slot, end) in [
            (process.stdout, &streams.stdout, &mut child.stdout),
            (process.stderr, &streams.stderr, &mut child.stderr),
        ] {
            if wanted {
                let (read, write) = make()?;
                *end = Some(write);
                let receiver = pipe::Receiver::from_file(File::from(read)).step(|| "watch a pipe")?;
                *lock(slot) = Slot::Waiting(receiver);
            }
        }
        Ok((streams, child))
    }

    /// Hands out a stream, to one connection only.
    pub fn attach(&self, stream: Stream) -> Result<Attachment, Error> {
        fn take<T>(stream: Stream, slot: &Mutex<Slot<T>>) -> Result<T, Error> {
            let mut slot = lock(slot);
            match mem::replace(&mut *slot, Slot::Taken) {
                Slot::Waiting(end) => Ok(end),
                Slot::Taken => {
                    Err(Error::Precondition(format!("{} is attached already or closed", stream.as_str())))
                }
                Slot::Absent => {
                    *slot = Slot::Absent;
                    Err(Error::NotFound(format!("the process has no {}", stream.as_str())))
                }
            }
        }
        Ok(match stream {
            Stream::Stdin => Attachment::Input(take(stream, &self.stdin)?, Arc::clone(&self.close_stdin)),
            Stream::Stdout => Attachment::Output(take(stream, &self.stdout)?),
            Stream::Stderr => Attachment::Output(take(stream, &self.stderr)?),
            Stream::Terminal => {
                take(stream, &self.terminal)?;
                Attachment::Terminal(self.pty.subscribe())
            }
        })
    }

    /// Ends standard input: at once where no connection carries it, else once
    /// what has arrived is delivered. A terminal's input does not end.
    pub fn close_stdin(&self) {
        let mut stdin = lock(&self.stdin);
        if let Slot::Waiting(_) = &*stdin {
            *stdin = Slot::Taken;
        }
        self.close_stdin.notify_one();
    }

    /// Takes over the terminal the process has opened.
    pub fn set_terminal(&self, master: OwnedFd) -> StepResult<()> {
        let pty = Pty::new(master)?;
        if let Some(size) = *lock(&self.size) {
            pty.resize(size)?;
        }
        self.pty.send_replace(Some(pty));
        Ok(())
    }

    /// Sets the terminal's size, now or once it is open.
    pub fn resize(&self, size: &agent::ConsoleSize) -> Result<(), Error> {
        if let Slot::Absent = *lock(&self.terminal) {
            return Err(Error::Precondition("the process has no terminal".into()));
        }
        let size = size_of_console(size).ok_or_else(|| Error::invalid("size", "must not be 0 by 0"))?;
        *lock(&self.size) = Some(size);
        match &*self.pty.borrow() {
            Some(pty) => Ok(pty.resize(size)?),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_runtime(test: impl FnOnce()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _entered = runtime.enter();
        test();
    }

    #[test]
    fn a_stream_is_attached_once_and_only_if_asked_for() {
        with_runtime(|| {
            let process = agent::Process { stdout: true, ..Default::default() };
            let (streams, child) = Streams::new(&process).unwrap();
            assert!(child.stdout.is_some() && child.stdin.is_none() && child.stderr.is_none());
            assert!(matches!(streams.attach(Stream::Stdout), Ok(Attachment::Output(_))));
            let again = streams.attach(Stream::Stdout).unwrap_err().to_string();
            assert_eq!(again, "stdout is attached already or closed");
            for absent in [Stream::Stdin, Stream::Stderr, Stream::Terminal] {
                assert!(matches!(streams.attach(absent), Err(Error::NotFound(_))));
            }
        });
    }

    #[test]
    fn a_terminal_replaces_the_pipes_and_can_be_attached_before_it_is_open() {
        with_runtime(|| {
            let process = agent::Process { terminal: true, stdin: true, stdout: true, ..Default::default() };
            let (streams, child) = Streams::new(&process).unwrap();
            assert!(child.stdin.is_none() && child.stdout.is_none());
            assert!(matches!(streams.attach(Stream::Terminal), Ok(Attachment::Terminal(_))));
            assert!(streams.attach(Stream::Stdin).is_err());
            streams.resize(&agent::ConsoleSize { width: 80, height: 24, ..Default::default() }).unwrap();
            assert_eq!(*lock(&streams.size), Some(Size { width: 80, height: 24 }));
        });
    }

    #[test]
    fn unattached_stdin_closes_at_once() {
        with_runtime(|| {
            let process = agent::Process { stdin: true, ..Default::default() };
            let (streams, child) = Streams::new(&process).unwrap();
            streams.close_stdin();
            let mut byte = [0];
            assert_eq!(nix::unistd::read(child.stdin.unwrap(), &mut byte), Ok(0));
        });
    }
}
