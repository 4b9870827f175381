//! What the owner asks of its monitor, over the pair of sockets the monitor was
//! started with. Every request has a deadline, which its error names.

use std::{
    io::{self, IoSlice},
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::net::UnixDatagram as StdDatagram,
    },
    time::Duration,
};

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, sendmsg, socketpair,
};
use rvm_protocol::vmm::{Call, MAX_MESSAGE_LEN, Metrics, NetConfig, Reply, Request, Response};
use tokio::{io::Interest, net::UnixDatagram, sync::Mutex, time::timeout};

use super::MonitorError;

use crate::fault;

/// How long the monitor may take for any request: it does them on a thread of
/// their own, none of which waits for the guest.
pub const LIMIT: Duration = Duration::from_secs(10);

/// The owner's end. Dropping it ends the machine.
#[derive(Debug)]
pub struct Control {
    /// SOCK_SEQPACKET; all that counts here is that packets are kept apart.
    socket: UnixDatagram,
    /// The last call's id. Held by who waits for an answer.
    last: Mutex<u64>,
    limit: Duration,
}

impl Control {
    /// A pair: ours, and the monitor's, which is not inherited unless asked for.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, monitors) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let ours = StdDatagram::from(ours);
        ours.set_nonblocking(true)?;
        let socket = UnixDatagram::from_std(ours)?;
        Ok((Self { socket, last: Mutex::new(0), limit: LIMIT }, monitors))
    }

    /// Plugs a disk into the machine: the file or block device `fd`, which is open for
    /// writing unless `readonly`. A monitor that is still making the machine answers when
    /// it has made it: `limit` is how long that may take.
    pub async fn add_disk(
        &self,
        serial: &str,
        readonly: bool,
        fd: BorrowedFd<'_>,
        limit: Duration,
    ) -> Result<(), MonitorError> {
        let request = Request::AddDisk { serial: serial.to_owned(), readonly };
        self.done_within(limit, "add_disk", request, &[fd]).await
    }

    /// Takes a disk out of the running machine. The guest has let go of it.
    pub async fn remove_disk(&self, serial: &str) -> Result<(), MonitorError> {
        self.done("remove_disk", Request::RemoveDisk { serial: serial.to_owned() }, &[]).await
    }

    /// Plugs a file into the machine as memory that the guest can read; the slot it is in.
    /// `limit` is as for [`add_disk`](Self::add_disk).
    pub async fn add_pmem(&self, fd: BorrowedFd<'_>, limit: Duration) -> Result<u8, MonitorError> {
        match self.call(limit, "add_pmem", Request::AddPmem, &[fd]).await? {
            Response::Plugged { slot } => Ok(slot),
            other => Err(MonitorError::Refused(format!("answers add_pmem with {other:?}"))),
        }
    }

    /// Takes such a file out of the running machine. The guest has let go of it.
    pub async fn remove_pmem(&self, slot: u8) -> Result<(), MonitorError> {
        self.done("remove_pmem", Request::RemovePmem { slot }, &[]).await
    }

    /// Plugs a network interface into the running machine: a tap, opened once per queue
    /// pair, and `/dev/vhost-net` as often, or not at all.
    pub async fn add_net(
        &self,
        net: &NetConfig,
        taps: &[BorrowedFd<'_>],
        vhost: &[BorrowedFd<'_>],
    ) -> Result<(), MonitorError> {
        self.done("add_net", Request::AddNet(net.clone()), &[taps, vhost].concat()).await
    }

    /// Takes a network interface out of the running machine. The guest has let go of it.
    pub async fn remove_net(&self, slot: u8) -> Result<(), MonitorError> {
        self.done("remove_net", Request::RemoveNet { slot }, &[]).await
    }

    /// Tells the guest whether an interface's link is up.
    pub async fn set_link(&self, slot: u8, up: bool) -> Result<(), MonitorError> {
        self.done("set_link", Request::SetLink { slot, up }, &[]).await
    }

    /// Makes so many vCPUs exist, for the guest to bring them up.
    pub async fn set_vcpus(&self, count: u8) -> Result<(), MonitorError> {
        self.done("set_vcpus", Request::SetVcpus { count }, &[]).await
    }

    /// Offers the machine so much memory beside what it started with.
    pub async fn set_hotplug_memory(&self, mib: u64) -> Result<(), MonitorError> {
        self.done("set_hotplug_memory", Request::SetHotplugMemory { mib }, &[]).await
    }

    /// The same of the host's huge pages.
    pub async fn set_hugetlb_memory(&self, mib: u64) -> Result<(), MonitorError> {
        self.done("set_hugetlb_memory", Request::SetHugetlbMemory { mib }, &[]).await
    }

    /// Stops every vCPU between two instructions.
    pub async fn pause(&self) -> Result<(), MonitorError> {
        self.done("pause", Request::Pause, &[]).await
    }

    /// Lets them go on.
    pub async fn resume(&self) -> Result<(), MonitorError> {
        self.done("resume", Request::Resume, &[]).await
    }

    /// The monitor's counters.
    pub async fn metrics(&self) -> Result<Metrics, MonitorError> {
        match self.call(self.limit, "metrics", Request::Metrics, &[]).await? {
            Response::Metrics(metrics) => Ok(metrics),
            other => Err(MonitorError::Refused(format!("answers metrics with {other:?}"))),
        }
    }

    async fn done(
        &self,
        name: &'static str,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), MonitorError> {
        self.done_within(self.limit, name, request, fds).await
    }

    async fn done_within(
        &self,
        limit: Duration,
        name: &'static str,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), MonitorError> {
        match self.call(limit, name, request, fds).await? {
            Response::Ok => Ok(()),
            other => Err(MonitorError::Refused(format!("answers {name} with {other:?}"))),
        }
    }

    /// Asks and waits for the answer. Where the caller gives up, the answer that may
    /// come later is known by its id and thrown away.
    async fn call(
        &self,
        limit: Duration,
        name: &'static str,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Response, MonitorError> {
        let answered = async {
            let mut last = self.last.lock().await;
            *last += 1;
            let text = serde_json::to_vec(&Call { id: *last, request }).map_err(io::Error::from)?;
            self.send(&text, fds).await?;
            loop {
                let reply: Reply = self.receive().await?;
                if reply.id == *last {
                    return Ok(reply.response);
                }
                log::debug!("the monitor answers call {} late: {:?}", reply.id, reply.response);
            }
        };
        fault::point(format_args!("to ask the monitor: {name}"));
        let answered = timeout(limit, answered).await;
        fault::point(format_args!("the monitor has answered: {name}"));
        match answered {
            Ok(Ok(Response::Error { message })) => Err(MonitorError::Refused(message)),
            Ok(answer) => answer.map_err(|source| MonitorError::Control { request: name, source }),
            Err(_) => Err(MonitorError::TimedOut { request: name, limit }),
        }
    }

    async fn send(&self, text: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let attached = [ControlMessage::ScmRights(&fds)];
        let attached = if fds.is_empty() { &[][..] } else { &attached };
        self.socket
            .async_io(Interest::WRITABLE, || {
                let raw = self.socket.as_raw_fd();
                sendmsg::<()>(raw, &[IoSlice::new(text)], attached, MsgFlags::MSG_NOSIGNAL, None)?;
                Ok(())
            })
            .await
    }

    async fn receive(&self) -> io::Result<Reply> {
        let mut text = vec![0; MAX_MESSAGE_LEN];
        let count = self
            .socket
            .async_io(Interest::READABLE, || Ok(recv(self.socket.as_raw_fd(), &mut text, MsgFlags::empty())?))
            .await?;
        match text.get(..count).filter(|message| !message.is_empty()) {
            Some(message) => Ok(serde_json::from_slice(message)?),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    /// Answers calls as `answer` says, on a thread; its end hangs up.
    fn monitor(fd: OwnedFd, mut answer: impl FnMut(Call) -> Vec<Reply> + Send + 'static) {
        std::thread::spawn(move || {
            let socket = StdDatagram::from(fd);
            let mut text = vec![0; MAX_MESSAGE_LEN];
            while let Ok(count @ 1..) = socket.recv(&mut text) {
                for reply in answer(serde_json::from_slice(&text[..count]).unwrap()) {
                    socket.send(&serde_json::to_vec(&reply).unwrap()).unwrap();
                }
            }
        });
    }

    fn control(limit: Duration) -> (Control, OwnedFd) {
        let (control, fd) = Control::pair().unwrap();
        (Control { limit, ..control }, fd)
    }

    #[tokio::test]
    async fn an_answer_nobody_waits_for_any_more_is_not_anothers() {
        let (mut control, fd) = control(Duration::from_millis(50));
        let mut kept = Vec::new();
        monitor(fd, move |Call { id, request }| match request {
            // Frozen.
            Request::SetVcpus { .. } => {
                kept.push(Reply { id, response: Response::Error { message: "late".into() } });
                Vec::new()
            }
            _ => kept.drain(..).chain([Reply { id, response: Response::Ok }]).collect(),
        });
        let error = control.set_vcpus(3).await.unwrap_err().to_string();
        assert_eq!(error, "the monitor does not answer set_vcpus within 0.05 s");
        control.set_vcpus(4).await.unwrap_err();
        // It goes on, however slow.
        control.limit = LIMIT;
        control.pause().await.unwrap();
        control.resume().await.unwrap();
    }

    #[tokio::test]
    async fn refusals_and_a_monitor_that_is_gone_are_errors() {
        let (ours, fd) = control(LIMIT);
        monitor(fd, |Call { id, .. }| {
            vec![Reply { id, response: Response::Error { message: "there is no disk x".into() } }]
        });
        let error = ours.remove_disk("x").await.unwrap_err().to_string();
        assert_eq!(error, "the monitor: there is no disk x");

        let (ours, fd) = control(LIMIT);
        drop(fd);
        let file = tempfile::tempfile().unwrap();
        let error = ours.add_disk("x", true, file.as_fd(), LIMIT).await.unwrap_err().to_string();
        assert!(error.starts_with("asking the monitor (add_disk): "), "{error}");
    }

    #[tokio::test]
    async fn a_monitor_that_takes_nothing_keeps_nobody_beyond_the_deadline() {
        let (control, _fd) = control(Duration::from_millis(1));
        // More than the socket holds.
        for _ in 0..2000 {
            assert!(matches!(control.pause().await, Err(MonitorError::TimedOut { request: "pause", .. })));
        }
    }
}
