//! The one way in which the agent and a child it made speak to each other.
//!
//! ```text
//!   child                                   parent
//!     │ ── Moved(pid) ──────────────────────> │   another child goes on from here,
//!     │ <───────────────────────── adopted ── │   once the agent knows it
//!     │ ── Terminal(master) ────────────────> │   where the process has one
//!     │ ── Ready ───────────────────────────> │   everything is made, execve is next
//!     │ <───────────────────────── start ──── │
//!     │ ── (closed by execve) ──────────────> │   the program runs
//!     │ ── Failed(errno, message) ──────────> │   at any point: the step that failed
//! ```
//!
//! A [`helper`](crate::helper) says `Done(flag, descriptor)` instead of `Ready`.
//!
//! Packets of a `SOCK_SEQPACKET` pair: one message is one packet. What the child
//! says and hears from `Ready` on takes `read` and `write` only: a seccomp filter
//! may be in force by then.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, send,
        sendmsg, socketpair,
    },
    unistd::Pid,
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    error::{Step, StepError, StepResult},
    sys::register,
};

/// Longest error message passed on; what is longer is cut.
const MAX_MESSAGE: usize = 16 * 1024;

const MOVED: u8 = b'M';
const TERMINAL: u8 = b'T';
const READY: u8 = b'R';
const FAILED: u8 = b'F';
const DONE: u8 = b'D';
const START: u8 = b'S';
const ADOPTED: u8 = b'A';

/// What runc says of a start that comes too late.
pub const STOPPED: &str = "cannot start a container that has stopped";

/// What a child says before it is started.
#[derive(Debug)]
pub enum Message {
    /// The child with this pid, in the agent's pid namespace, goes on instead.
    Moved(Pid),
    /// The master side of its terminal.
    Terminal(OwnedFd),
    /// It has done everything up to `execve`.
    Ready,
}

/// The agent's end.
#[derive(Debug)]
pub struct Parent(AsyncFd<OwnedFd>);

/// The child's end; closed by `execve`.
#[derive(Debug)]
pub struct Child(OwnedFd);

/// Makes a channel.
pub fn pair() -> StepResult<(Parent, Child)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (parent, child) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).step(|| "create a channel")?;
    let nonblocking = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
    nix::fcntl::fcntl(&parent, nonblocking).step(|| "make the channel non-blocking")?;
    let parent = register(parent, Interest::READABLE).step(|| "watch the channel")?;
    Ok((Parent(parent), Child(child)))
}

impl Parent {
    /// The next thing the child says until it is ready, or why it never will be.
    pub async fn hear(&self) -> StepResult<Message> {
        let (message, fd) = self.receive().await?;
        match (message.split_first(), fd) {
            (Some((&MOVED, pid)), _) => match pid.try_into() {
                Ok(pid) => Ok(Message::Moved(Pid::from_raw(i32::from_le_bytes(pid)))),
                Err(_) => Err(StepError::Refused("the child's message has the wrong length".into())),
            },
            (Some((&TERMINAL, _)), Some(master)) => Ok(Message::Terminal(master)),
            (Some((&READY, _)), _) => Ok(Message::Ready),
            (Some((&FAILED, text)), _) => Err(failed(text)),
            (None, _) => Err(StepError::Refused("the process was killed while it was being created".into())),
            (Some((kind, _)), _) => {
                Err(StepError::Refused(format!("the child's message is of unknown kind {kind}")))
            }
        }
    }

    /// Tells the child that the one it has made in its place is known.
    pub fn adopted(&self) -> StepResult<()> {
        self.send(ADOPTED).map(drop).step(|| "take over the process")
    }

    /// The outcome of what a helper was to do; `what` names it in errors.
    pub async fn done(&self, what: &str) -> StepResult<(bool, Option<OwnedFd>)> {
        let (message, fd) = self.receive().await?;
        match message.split_first() {
            Some((&DONE, flag)) => Ok((flag == [1], fd)),
            Some((&FAILED, text)) => Err(failed(text)),
            _ => Err(StepError::Refused(format!("{what}: the process that was to was killed"))),
        }
    }

    /// Lets the child call `execve` and waits for the outcome.
    pub async fn start(&self) -> StepResult<()> {
        match self.send(START) {
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(StepError::Refused(STOPPED.into())),
            sent => sent.step(|| "start the process")?,
        };
        let (message, _) = match self.receive().await {
            // It was killed before it could read the word.
            Err(StepError::Kernel { errno: Errno::ECONNRESET, .. }) => {
                return Err(StepError::Refused(STOPPED.into()));
            }
            received => received?,
        };
        match message.split_first() {
            None => Ok(()),
            Some((&FAILED, text)) => Err(failed(text)),
            Some((kind, _)) => {
                Err(StepError::Refused(format!("the child's message is of unknown kind {kind}")))
            }
        }
    }

    fn send(&self, word: u8) -> nix::Result<usize> {
        send(self.0.get_ref().as_raw_fd(), &[word], MsgFlags::MSG_NOSIGNAL)
    }

    /// The next packet, empty once the other end is closed.
    async fn receive(&self) -> StepResult<(Vec<u8>, Option<OwnedFd>)> {
        self.0
            .async_io(Interest::READABLE, |socket| receive(socket).map_err(Into::into))
            .await
            .step(|| "hear from the child")
    }
}

impl Child {
    /// Reports that the child `pid` goes on instead of this one, and returns when
    /// the agent knows it.
    pub fn moved(&self, pid: Pid) -> StepResult<()> {
        let step = || "hand over to another process";
        let mut message = vec![MOVED];
        message.extend(pid.as_raw().to_le_bytes());
        self.say(&message).step(step)?;
        match self.hear().step(step)? {
            Some(ADOPTED) => Ok(()),
            _ => Err(StepError::Refused(format!("{}: the agent has given it up", step()))),
        }
    }

    /// Hands the master side of the terminal to the agent.
    pub fn terminal(&self, master: BorrowedFd<'_>) -> StepResult<()> {
        self.say_with(&[TERMINAL], Some(master)).step(|| "hand over the terminal")
    }

    /// Reports what a helper has done.
    pub fn done(&self, flag: bool, fd: Option<BorrowedFd<'_>>) -> StepResult<()> {
        self.say_with(&[DONE, flag.into()], fd).step(|| "report what was done")
    }

    /// Reports that everything up to `execve` is done and waits for permission
    /// to go on. `false`: the agent has given this child up.
    pub fn ready(&self) -> StepResult<bool> {
        self.say(&[READY]).step(|| "report readiness")?;
        loop {
            match self.hear().step(|| "wait for the start")? {
                // To the child before this one, which was killed before it heard it.
                Some(ADOPTED) => {}
                word => return Ok(word == Some(START)),
            }
        }
    }

    /// What the agent says next; none once it has given this child up.
    fn hear(&self) -> nix::Result<Option<u8>> {
        let mut word = [0];
        loop {
            match nix::unistd::read(&self.0, &mut word) {
                Err(Errno::EINTR) => {}
                read => return Ok((read? == 1).then_some(word[0])),
            }
        }
    }

    /// Reports the step that failed.
    pub fn failed(&self, error: &StepError) {
        let (errno, text) = match error {
            StepError::Kernel { step, errno } => (*errno as i32, step),
            StepError::Refused(text) => (0, text),
        };
        let mut message = vec![FAILED];
        message.extend(errno.to_le_bytes());
        message.extend(text.bytes().take(MAX_MESSAGE));
        // Where nobody listens any more nobody wants to know.
        let _ = self.say(&message);
    }

    fn say_with(&self, message: &[u8], fd: Option<BorrowedFd<'_>>) -> nix::Result<()> {
        let fds = fd.map(|fd| [fd.as_raw_fd()]);
        let rights: Vec<_> = fds.iter().map(|fds| ControlMessage::ScmRights(fds)).collect();
        let message = [IoSlice::new(message)];
        sendmsg::<()>(self.0.as_raw_fd(), &message, &rights, MsgFlags::MSG_NOSIGNAL, None).map(drop)
    }

    fn say(&self, message: &[u8]) -> nix::Result<()> {
        // A child whose agent is gone may well end by SIGPIPE.
        nix::unistd::write(&self.0, message).map(drop)
    }
}

impl AsFd for Child {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn failed(message: &[u8]) -> StepError {
    let (errno, text) = message.split_first_chunk().unwrap_or((&[0; 4], message));
    let text = String::from_utf8_lossy(text).into_owned();
    match i32::from_le_bytes(*errno) {
        0 => StepError::Refused(text),
        errno => StepError::Kernel { step: text, errno: Errno::from_raw(errno) },
    }
}

fn receive(socket: &OwnedFd) -> nix::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut message = vec![0; 1 + size_of::<i32>() + MAX_MESSAGE];
    let mut control = cmsg_space!(RawFd);
    let (length, fd) = {
        let mut slices = [IoSliceMut::new(&mut message)];
        let received =
            recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let fd = received.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        (received.bytes, fd)
    };
    message.truncate(length);
    // SAFETY: the kernel has just installed this descriptor for us, and there is
    // room for one only.
    Ok((message, fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read};

    use super::*;

    fn run(test: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
    }

    #[test]
    fn what_the_child_says_arrives_in_order_and_start_is_seen() {
        run(async {
            let (parent, child) = pair().unwrap();
            let child = std::thread::spawn(move || {
                let zero = File::open("/dev/zero").unwrap();
                child.moved(Pid::from_raw(4711)).unwrap();
                child.terminal(zero.as_fd()).unwrap();
                child.ready().unwrap()
            });
            assert!(matches!(parent.hear().await, Ok(Message::Moved(pid)) if pid == Pid::from_raw(4711)));
            parent.adopted().unwrap();
            let Ok(Message::Terminal(terminal)) = parent.hear().await else { panic!("no terminal") };
            let mut byte = [1];
            File::from(terminal).read_exact(&mut byte).unwrap();
            assert_eq!(byte, [0]);
            assert!(matches!(parent.hear().await, Ok(Message::Ready)));
            // The thread ends after the start, which closes its end as execve would.
            parent.start().await.unwrap();
            assert!(child.join().unwrap());
        });
    }

    #[test]
    fn a_child_takes_over_from_one_that_was_killed_before_it_heard_that() {
        run(async {
            let (parent, child) = pair().unwrap();
            let mut moved = vec![MOVED];
            moved.extend(4711_i32.to_le_bytes());
            child.say(&moved).unwrap();
            assert!(matches!(parent.hear().await, Ok(Message::Moved(_))));
            parent.adopted().unwrap();
            let child = std::thread::spawn(move || child.ready().unwrap());
            assert!(matches!(parent.hear().await, Ok(Message::Ready)));
            parent.start().await.unwrap();
            assert!(child.join().unwrap());
        });
    }

    #[test]
    fn the_failed_step_arrives_as_one_message() {
        run(async {
            let (parent, child) = pair().unwrap();
            child.failed(&StepError::Kernel { step: "mount \"/proc\"".into(), errno: Errno::EPERM });
            let error = parent.hear().await.unwrap_err();
            assert_eq!(error.to_string(), "mount \"/proc\": operation not permitted");
            assert!(matches!(error, StepError::Kernel { errno: Errno::EPERM, .. }));
            child.failed(&StepError::Refused("too long".into()));
            assert_eq!(parent.hear().await.unwrap_err().to_string(), "too long");
        });
    }

    #[test]
    fn a_child_that_dies_silently_is_an_error_and_one_given_up_is_told() {
        run(async {
            let (parent, child) = pair().unwrap();
            drop(child);
            assert!(parent.hear().await.is_err());
            assert_eq!(parent.start().await.unwrap_err().to_string(), STOPPED);

            let (parent, child) = pair().unwrap();
            drop(parent);
            assert!(!child.ready().unwrap_or(false));
        });
    }
}
