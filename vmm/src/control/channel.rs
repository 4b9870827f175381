//! The owner's connection: one packet of JSON per call and per reply, with
//! descriptors attached to the calls that need some.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;

use rvm_protocol::vmm::{Call, MAX_MESSAGE_LEN, MAX_QUEUE_PAIRS, Reply, Request, Response};
use vmm_sys_util::errno;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::Served;
use crate::process;

/// Most descriptors attached to a call: those of a virtio-net device. An odd
/// number: see `receive`.
const MAX_FILES: usize = 2 * MAX_QUEUE_PAIRS as usize + 1;
/// Calls answered before the machine's other events are looked at again.
const CALLS_AT_ONCE: usize = 16;

/// The monitor's end of the connection.
pub struct OwnerChannel {
    /// A connected SOCK_SEQPACKET socket: all this type's methods need is that
    /// packets are kept apart.
    socket: UnixDatagram,
}

impl OwnerChannel {
    /// Takes over the inherited descriptor `fd`, which nothing else of this process
    /// uses.
    pub fn inherited(fd: RawFd) -> io::Result<Self> {
        Self::new(process::inherited(fd)?)
    }

    fn new(fd: OwnedFd) -> io::Result<Self> {
        let mut kind: libc::c_int = 0;
        let mut len = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: both pointers are to values of the length they say.
        let answer = unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_TYPE,
                (&raw mut kind).cast(),
                &raw mut len,
            )
        };
        if answer < 0 {
            return Err(io::Error::last_os_error());
        }
        if kind != libc::SOCK_SEQPACKET {
            return Err(io::Error::other("it is not a SOCK_SEQPACKET socket"));
        }
        let socket = UnixDatagram::from(fd);
        socket.set_nonblocking(true)?;
        Ok(Self { socket })
    }

    /// The descriptor; readable when the owner calls or is gone.
    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Answers what the owner has asked with what `handle` makes of it; `Closed`
    /// once the owner is gone.
    pub fn serve(&mut self, handle: &mut dyn FnMut(Request, Vec<File>) -> Response) -> Served {
        let mut buffer = vec![0; MAX_MESSAGE_LEN];
        for _ in 0..CALLS_AT_ONCE {
            buffer.fill(0);
            let (count, files) = match self.receive(&mut buffer) {
                Ok(received) => received,
                Err(e) => match e.errno() {
                    libc::EAGAIN | libc::EINTR => return Served::Open,
                    // More descriptors than any request takes, or no room for them;
                    // the text is there all the same.
                    libc::ENOBUFS => {
                        let text = buffer.split(|byte| *byte == 0).next().unwrap_or(&[]);
                        let id = serde_json::from_slice(text).map_or(0, |Call { id, .. }| id);
                        let message = "the request's descriptors could not be taken: there are too many, \
                                       or too many files are open"
                            .into();
                        self.answer(&Reply { id, response: Response::Error { message } });
                        continue;
                    }
                    _ => {
                        log::warn!("control: {e}");
                        return Served::Closed;
                    }
                },
            };
            let Some(message) = buffer.get(..count).filter(|message| !message.is_empty()) else {
                return Served::Closed;
            };
            let reply = match serde_json::from_slice(message) {
                Ok(Call { id, request }) => Reply { id, response: handle(request, files) },
                Err(e) => Reply { id: 0, response: Response::Error { message: format!("not a call: {e}") } },
            };
            self.answer(&reply);
        }
        Served::Open
    }

    /// A packet and the descriptors attached to it; ENOBUFS where they are too many.
    fn receive(&self, buffer: &mut [u8]) -> Result<(usize, Vec<File>), errno::Error> {
        // The kernel's own room is for an even number: asked for an odd one, it would
        // put one more where the crate does not look for it.
        let mut fds = [-1; MAX_FILES + 1];
        let mut iovecs = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
        // SAFETY: the iovec is the buffer, borrowed for the call.
        let (count, attached) = unsafe { self.socket.recv_with_fds(&mut iovecs, &mut fds) }?;
        let owned = |fd: &RawFd| {
            // SAFETY: the kernel has just made it for us.
            unsafe { File::from_raw_fd(*fd) }
        };
        let files: Vec<File> = fds.iter().take(attached).map(owned).collect();
        if files.len() < fds.len() { Ok((count, files)) } else { Err(errno::Error::new(libc::ENOBUFS)) }
    }

    /// An owner that does not read its answers does without.
    fn answer(&self, reply: &Reply) {
        let sent =
            serde_json::to_vec(reply).map_err(io::Error::from).and_then(|text| self.socket.send(&text));
        if let Err(e) = sent {
            log::warn!("control: an answer is lost: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;

    use super::*;

    struct Owner(UnixDatagram);

    fn pair(kind: libc::c_int) -> (OwnedFd, OwnedFd) {
        let mut fds = [-1; 2];
        // SAFETY: an array of two descriptors, as the call wants.
        assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) }, 0);
        // SAFETY: both were just made for us.
        fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).into()
    }

    fn connected() -> (Owner, OwnerChannel) {
        let (owner, monitor) = pair(libc::SOCK_SEQPACKET);
        (Owner(owner.into()), OwnerChannel::new(monitor).unwrap())
    }

    impl Owner {
        fn send(&self, text: &[u8], file: Option<&File>) {
            match file {
                Some(file) => assert_eq!(self.0.send_with_fd(text, file.as_raw_fd()).unwrap(), text.len()),
                None => assert_eq!(self.0.send(text).unwrap(), text.len()),
            }
        }

        fn call(&self, id: u64, request: Request, file: Option<&File>) {
            self.send(&serde_json::to_vec(&Call { id, request }).unwrap(), file);
        }

        fn reply(&self) -> Reply {
            let mut text = vec![0; MAX_MESSAGE_LEN];
            let count = self.0.recv(&mut text).unwrap();
            serde_json::from_slice(&text[..count]).unwrap()
        }
    }

    #[test]
    fn calls_are_answered_by_their_id_and_bring_a_descriptor() {
        let (owner, mut monitor) = connected();
        let mut content = String::new();
        let mut handle = |request, mut files: Vec<File>| match (request, files.as_mut_slice()) {
            (Request::AddDisk { .. }, [file]) => {
                file.read_to_string(&mut content).unwrap();
                Response::Ok
            }
            (Request::Pause, []) => Response::Ok,
            _ => Response::Error { message: "no".into() },
        };
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "disk").unwrap();
        owner.call(7, Request::Pause, None);
        owner.call(9, Request::AddDisk { serial: "s".into(), readonly: true }, Some(file.as_file()));
        owner.call(10, Request::Metrics, Some(file.as_file()));
        owner.send(b"nonsense", None);
        assert_eq!(monitor.serve(&mut handle), Served::Open);
        assert_eq!(owner.reply(), Reply { id: 7, response: Response::Ok });
        assert_eq!(owner.reply(), Reply { id: 9, response: Response::Ok });
        let says = |reply: Reply, id, text: &str| matches!(&reply.response, Response::Error { message } if reply.id == id && message.contains(text));
        assert!(says(owner.reply(), 10, "no"));
        assert!(says(owner.reply(), 0, "not a call"));
        assert_eq!(content, "disk");
        drop(owner);
        assert_eq!(monitor.serve(&mut |_, _| Response::Ok), Served::Closed);
    }

    #[test]
    fn too_many_descriptors_are_closed_and_the_next_call_is_answered() {
        let (owner, mut monitor) = connected();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let call = serde_json::to_vec(&Call { id: 1, request: Request::Pause }).unwrap();
        for count in [MAX_FILES + 1, MAX_FILES + 2, 200] {
            owner.0.send_with_fds(&[call.as_slice()], &vec![writer.as_raw_fd(); count]).unwrap();
        }
        owner.call(2, Request::Pause, None);
        assert_eq!(monitor.serve(&mut |_, _| Response::Ok), Served::Open);
        for _ in 0..3 {
            let reply = owner.reply();
            assert_eq!(reply.id, 1);
            assert!(
                matches!(reply.response, Response::Error { message } if message.contains("could not be taken"))
            );
        }
        assert_eq!(owner.reply().id, 2);
        drop(writer);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0, "nobody else has it open");
    }

    #[test]
    fn an_owner_that_never_reads_holds_nobody_up() {
        let (owner, mut monitor) = connected();
        let mut answered = 0;
        for id in 0..500 {
            owner.call(id, Request::Pause, None);
            let long = Response::Error { message: "x".repeat(10_000) };
            monitor.serve(&mut |_, _| {
                answered += 1;
                long.clone()
            });
        }
        assert_eq!(answered, 500);
    }

    #[test]
    fn other_descriptors_are_refused() {
        let (stream, _other) = pair(libc::SOCK_STREAM);
        assert!(OwnerChannel::new(stream).is_err());
        let file = tempfile::tempfile().unwrap();
        assert!(OwnerChannel::new(file.as_fd().try_clone_to_owned().unwrap()).is_err());
        for fd in [-1, 0, 2, 1_000_000] {
            assert!(OwnerChannel::inherited(fd).is_err(), "{fd}");
        }
    }
}
