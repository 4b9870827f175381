//! The one way in which the agent and a child it made speak to each other.
//!
//! ```text
//!   child                                   parent
//!     │ ── Ready { pid, terminal } ─────────> │   everything is made, execve is next
//!     │ <───────────────────────── start ──── │
//!     │ ── (closed by execve) ──────────────> │   the program runs
//!     │ ── Failed(message) ─────────────────> │   at any point: the step that failed
//! ```
//!
//! Packets of a `SOCK_SEQPACKET` pair: one message is one packet.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recv, recvmsg,
        send, sendmsg, socketpair,
    },
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    error::{Step, StepError, StepResult},
    sys::register,
};

/// Longest error message passed on; what is longer is cut.
const MAX_MESSAGE: usize = 16 * 1024;

const READY: u8 = b'R';
const FAILED: u8 = b'F';
const START: u8 = b'S';

/// A child that has done everything up to `execve`.
#[derive(Debug)]
pub struct Ready {
    /// Its pid in its own pid namespace.
    pub pid: u32,
    /// The master side of its terminal, where it has one.
    pub terminal: Option<OwnedFd>,
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
    /// Waits until the child is ready, or says why it is not.
    pub async fn ready(&self) -> StepResult<Ready> {
        let (message, terminal) = self.receive().await?;
        match message.split_first() {
            Some((&READY, pid)) => match pid.try_into() {
                Ok(pid) => Ok(Ready { pid: u32::from_le_bytes(pid), terminal }),
                Err(_) => Err(StepError::Refused("the child's message has the wrong length".into())),
            },
            Some((&FAILED, text)) => Err(failed(text)),
            None => Err(StepError::Refused("the process was killed while it was being created".into())),
            Some((kind, _)) => {
                Err(StepError::Refused(format!("the child's message is of unknown kind {kind}")))
            }
        }
    }

    /// Lets the child call `execve` and waits for the outcome.
    pub async fn start(&self) -> StepResult<()> {
        match send(self.0.get_ref().as_raw_fd(), &[START], MsgFlags::MSG_NOSIGNAL) {
            // A child that is gone has been reaped or will be: its exit tells more.
            Ok(_) | Err(Errno::EPIPE | Errno::ECONNRESET) => {}
            Err(errno) => return Err(errno).step(|| "start the process"),
        }
        let (message, _) = self.receive().await?;
        match message.split_first() {
            None => Ok(()),
            Some((&FAILED, text)) => Err(failed(text)),
            Some((kind, _)) => {
                Err(StepError::Refused(format!("the child's message is of unknown kind {kind}")))
            }
        }
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
    /// Reports that everything up to `execve` is done and waits for permission
    /// to go on. `false`: the agent has given this child up.
    pub fn ready(&self, terminal: Option<BorrowedFd<'_>>) -> StepResult<bool> {
        let mut message = vec![READY];
        message.extend(std::process::id().to_le_bytes());
        let fds: Vec<RawFd> = terminal.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(&message)], control, MsgFlags::MSG_NOSIGNAL, None)
            .step(|| "report readiness")?;
        let mut answer = [0];
        loop {
            match recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty()) {
                Ok(length) => return Ok(length == 1 && answer == [START]),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).step(|| "wait for the start"),
            }
        }
    }

    /// Reports the step that failed.
    pub fn failed(&self, error: &StepError) {
        let mut message = vec![FAILED];
        message.extend(error.to_string().bytes().take(MAX_MESSAGE));
        // Where nobody listens any more nobody wants to know.
        let _ = send(self.0.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL);
    }
}

impl AsFd for Child {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn failed(text: &[u8]) -> StepError {
    StepError::Refused(String::from_utf8_lossy(text).into_owned())
}

fn receive(socket: &OwnedFd) -> nix::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut message = vec![0; 1 + MAX_MESSAGE];
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
    fn a_terminal_travels_with_readiness_and_start_is_seen() {
        run(async {
            let (parent, child) = pair().unwrap();
            let child = std::thread::spawn(move || {
                let zero = File::open("/dev/zero").unwrap();
                child.ready(Some(zero.as_fd())).unwrap()
            });
            let ready = parent.ready().await.unwrap();
            assert_eq!(ready.pid, std::process::id());
            let mut byte = [1];
            File::from(ready.terminal.unwrap()).read_exact(&mut byte).unwrap();
            assert_eq!(byte, [0]);
            // The thread ends after the start, which closes its end as execve would.
            parent.start().await.unwrap();
            assert!(child.join().unwrap());
        });
    }

    #[test]
    fn the_failed_step_arrives_as_one_message() {
        run(async {
            let (parent, child) = pair().unwrap();
            child.failed(&StepError::Kernel { step: "mount \"/proc\"".into(), errno: Errno::EPERM });
            let error = parent.ready().await.unwrap_err();
            assert_eq!(error.to_string(), "mount \"/proc\": operation not permitted");
        });
    }

    #[test]
    fn a_child_that_dies_silently_is_an_error_and_one_given_up_is_told() {
        run(async {
            let (parent, child) = pair().unwrap();
            drop(child);
            assert!(parent.ready().await.is_err());

            let (parent, child) = pair().unwrap();
            drop(parent);
            assert!(!child.ready(None).unwrap_or(false));
        });
    }
}
