//! The device driven by a driver of our own, against real Unix sockets.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rvm_protocol::vmm::VsockConfig;
use tempfile::TempDir;

use super::packet::{HEADER_BYTES, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND, TYPE_STREAM};
use super::{HOST_CID, Vsock, VsockError, WINDOW_BYTES};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::test_queue::{TestQueue, WRITE};

const CID: u64 = 5;
const RX: usize = 0;
const TX: usize = 1;
const RX_BUFFERS: u64 = 32;
const RX_BYTES: u64 = 0x1000;
const RX_AT: u64 = 0x10_0000;
const TX_AT: u64 = 0x20_0000;
const GUEST_PORT: u32 = 1024;

/// A guest's driver that knows one connection at a time by its host port.
struct Guest {
    queue: TestQueue,
    vsock: Vsock,
    dir: TempDir,
    /// Told to the device in every packet.
    window: u32,
    forwarded: u32,
    /// Buffers taken and not given back.
    kept: Vec<u64>,
}

impl Guest {
    fn new() -> Self {
        let mut guest = Self::asleep();
        guest.wake();
        guest
    }

    /// The device exists, its driver is not up.
    fn asleep() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = VsockConfig { guest_cid: CID as u32, socket: dir.path().join("v.sock") };
        let vsock = Vsock::new(&config).unwrap();
        let kept = (0..RX_BUFFERS).map(|index| RX_AT + index * RX_BYTES).collect();
        Self { queue: TestQueue::new(), vsock, dir, window: 1 << 20, forwarded: 0, kept }
    }

    fn wake(&mut self) {
        let features = self.vsock.features();
        let activation = self.queue.activation(3, features);
        self.vsock.activate(activation).unwrap();
        self.give_buffers();
    }

    fn give_buffers(&mut self) {
        for at in std::mem::take(&mut self.kept) {
            self.queue.send(RX, &[(at, RX_BYTES as u32, WRITE)]);
        }
    }

    fn call(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("v.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    fn header(&self, op: Op, host_port: u32, flags: u32, len: u32) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: GUEST_PORT,
            dst_port: host_port,
            len,
            kind: TYPE_STREAM,
            op: Some(op),
            flags,
            buf_alloc: self.window,
            fwd_cnt: self.forwarded,
        }
    }

    fn send_raw(&mut self, header: &Header, data: &[u8]) {
        self.queue.write(TX_AT, &header.encode());
        self.queue.write(TX_AT + 0x1000, data);
        let mut chain = vec![(TX_AT, HEADER_BYTES as u32, 0)];
        if !data.is_empty() {
            chain.push((TX_AT + 0x1000, data.len() as u32, 0));
        }
        self.queue.send(TX, &chain);
        assert_eq!(self.queue.wait_used(TX), 0);
    }

    fn send(&mut self, op: Op, host_port: u32, flags: u32) {
        let header = self.header(op, host_port, flags, 0);
        self.send_raw(&header, &[]);
    }

    fn send_data(&mut self, host_port: u32, data: &[u8]) {
        let header = self.header(Op::Rw, host_port, 0, data.len() as u32);
        self.send_raw(&header, data);
    }

    /// The next packet of the device, its buffer kept.
    fn take(&mut self) -> (Header, Vec<u8>) {
        let (head, len) = self.queue.wait_used_element(RX);
        self.packet(head, len)
    }

    fn try_take(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.queue.try_used(RX)?;
        Some(self.packet(head, len))
    }

    fn packet(&mut self, head: u16, len: u32) -> (Header, Vec<u8>) {
        // One descriptor per buffer: its address is in the table.
        let raw = self.queue.read(u64::from(head) * 16, 8);
        let at = u64::from_le_bytes(raw.try_into().unwrap());
        let bytes = self.queue.read(at, HEADER_BYTES).try_into().unwrap();
        let header = Header::decode(&bytes);
        assert_eq!(len, HEADER_BYTES as u32 + header.len);
        let data = self.queue.read(at + HEADER_BYTES as u64, header.len as usize);
        self.kept.push(at);
        (header, data)
    }

    /// The next packet, its buffer given back.
    fn recv(&mut self) -> (Header, Vec<u8>) {
        let packet = self.take();
        self.give_buffers();
        packet
    }

    /// The next packet that is not about credit.
    fn expect(&mut self, op: Op) -> Header {
        loop {
            let (header, data) = self.recv();
            match header.op {
                Some(Op::CreditUpdate | Op::CreditRequest) if op != Op::CreditUpdate => continue,
                found => assert_eq!(found, Some(op), "{header:?} {} bytes", data.len()),
            }
            return header;
        }
    }

    /// A connection the host makes, accepted by the guest.
    fn connect(&mut self) -> (UnixStream, u32) {
        let mut stream = self.call();
        writeln!(stream, "CONNECT {GUEST_PORT}").unwrap();
        let request = self.expect(Op::Request);
        assert_eq!((request.src_cid, request.dst_cid, request.dst_port), (HOST_CID, CID, GUEST_PORT));
        self.send(Op::Response, request.src_port, 0);
        assert_eq!(read_line(&mut stream), format!("OK {}\n", request.src_port));
        (stream, request.src_port)
    }

    /// Receives `len` bytes of data, giving credit as it goes.
    fn recv_data(&mut self, host_port: u32, len: usize) -> Vec<u8> {
        let mut received = Vec::new();
        while received.len() < len {
            let (header, data) = self.recv();
            match header.op {
                Some(Op::Rw) => {
                    self.forwarded = self.forwarded.wrapping_add(data.len() as u32);
                    received.extend(data);
                    self.send(Op::CreditUpdate, host_port, 0);
                }
                Some(Op::CreditRequest) => self.send(Op::CreditUpdate, host_port, 0),
                other => panic!("{other:?} after {} bytes", received.len()),
            }
        }
        received
    }
}

fn read_line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).flat_map(|word| word.wrapping_mul(2_654_435_761).to_le_bytes()).take(len).collect()
}

#[test]
fn a_host_program_that_comes_early_is_answered_when_the_driver_is_up() {
    let mut guest = Guest::asleep();
    let mut early = guest.call();
    // What follows the line belongs to the stream already.
    early.write_all(format!("CONNECT {GUEST_PORT}\nhello").as_bytes()).unwrap();
    guest.wake();
    let request = guest.expect(Op::Request);
    guest.send(Op::Response, request.src_port, 0);
    assert_eq!(read_line(&mut early), format!("OK {}\n", request.src_port));
    assert_eq!(guest.recv_data(request.src_port, 5), b"hello");
}

#[test]
fn each_direction_ends_by_itself() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.connect();
    stream.write_all(b"last words").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.recv_data(port, 10), b"last words");
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_SEND);

    guest.send_data(port, b"and mine");
    guest.send(Op::Shutdown, port, SHUTDOWN_SEND);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "and mine");
    drop(stream);
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
    // The connection is gone: its port means nothing any more.
    guest.send_data(port, b"?");
    guest.expect(Op::Rst);
}

#[test]
fn a_guest_that_stops_reading_only_is_told_to_the_host() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.connect();
    guest.send(Op::Shutdown, port, SHUTDOWN_RCV);
    guest.send_data(port, b"still talking");
    let mut bytes = [0; 13];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"still talking");
    assert_eq!(stream.write_all(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    // The other half makes it a whole end, answered by RST.
    guest.send(Op::Shutdown, port, SHUTDOWN_SEND);
    guest.expect(Op::Rst);
    assert_eq!(stream.read(&mut bytes).unwrap(), 0);
}

#[test]
fn what_the_host_wrote_before_it_closed_arrives_whole() {
    let mut guest = Guest::new();
    guest.window = 10_000;
    let (mut stream, port) = guest.connect();
    let sent = pattern(150_000);
    stream.write_all(&sent).unwrap();
    drop(stream);
    assert!(guest.recv_data(port, sent.len()) == sent);
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
}

#[test]
fn what_the_guest_sent_before_it_closed_arrives_whole() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.connect();
    // More than the socket takes, so that some of it is kept in the device.
    let sent = pattern(WINDOW_BYTES as usize);
    for part in sent.chunks(0x8000) {
        guest.send_data(port, part);
    }
    guest.send(Op::Shutdown, port, SHUTDOWN_BOTH);
    guest.expect(Op::Rst);
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    assert!(received == sent);
}

#[test]
fn connections_of_the_guest_reach_the_listener_of_their_port() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.dir.path().join("v.sock_99")).unwrap();
    guest.send(Op::Request, 99, 0);
    let response = guest.expect(Op::Response);
    assert_eq!((response.src_port, response.dst_port), (99, GUEST_PORT));
    assert_eq!(response.buf_alloc, WINDOW_BYTES);
    let (mut stream, _) = listener.accept().unwrap();
    guest.send_data(99, b"ready\n");
    assert_eq!(read_line(&mut stream), "ready\n");
    stream.write_all(b"welcome").unwrap();
    assert_eq!(guest.recv_data(99, 7), b"welcome");

    // Nobody listens there; and the same pair of ports is not free.
    guest.send(Op::Request, 98, 0);
    assert_eq!(guest.expect(Op::Rst).src_port, 98);
    guest.send(Op::Request, 99, 0);
    guest.expect(Op::Rst);
}

#[test]
fn much_data_passes_both_ways_intact() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.connect();
    let sent = pattern(8 << 20);
    let expected = sent.clone();
    let mut writer = stream.try_clone().unwrap();
    let host_writes = std::thread::spawn(move || writer.write_all(&sent).unwrap());
    assert!(guest.recv_data(port, expected.len()) == expected);
    host_writes.join().unwrap();

    let host_reads = std::thread::spawn(move || {
        let mut received = vec![0; 8 << 20];
        stream.read_exact(&mut received).unwrap();
        received
    });
    let (mut credit, mut told) = (WINDOW_BYTES as usize, 0_u32);
    for part in expected.chunks(0x1_0000) {
        while credit < part.len() {
            let (header, _) = guest.recv();
            credit += header.fwd_cnt.wrapping_sub(told) as usize;
            told = header.fwd_cnt;
        }
        credit -= part.len();
        guest.send_data(port, part);
    }
    assert!(host_reads.join().unwrap() == expected);
}

#[test]
fn a_host_that_does_not_read_holds_up_no_other_and_a_guest_beyond_its_window_is_cut_off() {
    let mut guest = Guest::new();
    let (stuck, stuck_port) = guest.connect();
    let (mut lively, lively_port) = guest.connect();
    let part = pattern(0x8000);
    // The socket's own buffer and the device's backlog fill, and no more.
    let mut sent = 0;
    loop {
        guest.send_data(stuck_port, &part);
        sent += part.len();
        if let Some((header, _)) = guest.try_take()
            && header.op == Some(Op::Rst)
        {
            break;
        }
        guest.give_buffers();
        assert!(sent < 4 << 20, "the device took more than it announced");
    }
    guest.give_buffers();
    guest.send_data(lively_port, b"alive");
    let mut bytes = [0; 5];
    lively.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"alive");
    drop(stuck);
}

#[test]
fn without_credit_nothing_is_sent_and_others_go_on() {
    let mut guest = Guest::new();
    guest.window = 100;
    let (mut slow, slow_port) = guest.connect();
    let (mut other, other_port) = guest.connect();
    slow.write_all(&pattern(500)).unwrap();
    let (header, data) = guest.recv();
    assert_eq!((header.op, header.src_port, data.len()), (Some(Op::Rw), slow_port, 100));
    assert_eq!(guest.recv().0.op, Some(Op::CreditRequest));
    other.write_all(b"x").unwrap();
    let (header, _) = guest.recv();
    assert_eq!((header.op, header.src_port), (Some(Op::Rw), other_port));
    // A window that shrinks below what is under way is no credit either.
    guest.window = 50;
    guest.send(Op::CreditUpdate, slow_port, 0);
    assert!(guest.try_take().is_none());
    guest.window = 100;
    guest.forwarded = 100;
    guest.send(Op::CreditUpdate, slow_port, 0);
    assert_eq!(guest.recv().1, pattern(500)[100..200]);
}

#[test]
fn a_guest_without_buffers_gets_everything_later() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.connect();
    let sent = pattern(200_000);
    stream.write_all(&sent).unwrap();
    let mut received = Vec::new();
    for _ in 0..RX_BUFFERS {
        received.extend(guest.take().1);
    }
    assert!(guest.try_take().is_none());
    guest.give_buffers();
    while received.len() < sent.len() {
        received.extend(guest.recv().1);
    }
    assert!(received == sent);
    assert_ne!(port, 0);
}

#[test]
fn nonsense_is_refused_or_ignored_and_the_device_goes_on() {
    let mut guest = Guest::new();
    // No such connection, unknown operation, unknown type: RST.
    guest.send_data(1234, b"who?");
    assert_eq!(guest.expect(Op::Rst).src_port, 1234);
    guest.send(Op::Response, 1, 0);
    guest.expect(Op::Rst);
    let unknown = Header { op: None, ..guest.header(Op::Rw, 2, 0, 0) };
    guest.send_raw(&unknown, &[]);
    assert_eq!(guest.expect(Op::Rst).src_port, 2);
    let seqpacket = Header { kind: 2, ..guest.header(Op::Request, 3, 0, 0) };
    guest.send_raw(&seqpacket, &[]);
    assert_eq!(guest.expect(Op::Rst).kind, 2);

    // No answer: RST itself, other addresses, packets that are no packets.
    guest.send(Op::Rst, 4, 0);
    let foreign = Header { src_cid: CID + 1, ..guest.header(Op::Rw, 5, 0, 0) };
    guest.send_raw(&foreign, &[]);
    let elsewhere = Header { dst_cid: 9, ..guest.header(Op::Rw, 6, 0, 0) };
    guest.send_raw(&elsewhere, &[]);
    let boastful = guest.header(Op::Rw, 7, 0, u32::MAX);
    guest.send_raw(&boastful, b"short");
    for chain in [vec![(TX_AT, 43, 0)], vec![(u64::MAX, 44, 0)], vec![(TX_AT, 44, WRITE)]] {
        guest.queue.send(TX, &chain);
        assert_eq!(guest.queue.wait_used(TX), 0);
    }
    guest.queue.send_loop(TX, TX_AT, 0);
    assert_eq!(guest.queue.wait_used(TX), 0);

    // Buffers of no use come back empty.
    guest.queue.send(RX, &[(RX_AT + 0x8_0000, 44, WRITE)]);
    guest.queue.send_loop(RX, RX_AT, WRITE);
    for _ in 0..3 * RX_BUFFERS {
        guest.send_data(1234, b"who?");
        loop {
            let (head, len) = guest.queue.wait_used_element(RX);
            if len > 0 {
                assert_eq!(guest.packet(head, len).0.op, Some(Op::Rst));
                break;
            }
        }
        guest.give_buffers();
    }
    guest.connect();
}

#[test]
fn refusals_nobody_takes_stop_the_guest_instead_of_filling_memory() {
    let mut guest = Guest::asleep();
    guest.kept.clear();
    guest.wake();
    let header = guest.header(Op::Rw, 1, 0, 0);
    guest.queue.write(TX_AT, &header.encode());
    let mut answered = 0;
    let mut waiting = 0;
    // Without buffers for the answers the device stops taking packets.
    'flood: loop {
        guest.queue.send(TX, &[(TX_AT, HEADER_BYTES as u32, 0)]);
        waiting += 1;
        while guest.queue.try_used(TX).is_some() {
            answered += 1;
            waiting -= 1;
        }
        if waiting == 32 {
            std::thread::sleep(Duration::from_millis(20));
            if guest.queue.try_used(TX).is_none() {
                break 'flood;
            }
            answered += 1;
            waiting -= 1;
        }
        assert!(answered <= super::MAX_REFUSALS);
    }
    // With buffers it goes on by itself.
    guest.kept = (0..RX_BUFFERS).map(|index| RX_AT + index * RX_BYTES).collect();
    guest.give_buffers();
    for _ in 0..answered + waiting {
        assert_eq!(guest.recv().0.op, Some(Op::Rst));
    }
}

#[test]
fn host_programs_that_do_not_ask_properly_are_turned_away() {
    let mut guest = Guest::new();
    for line in ["HELLO\n", "CONNECT x\n", "CONNECT 4294967296\n", "CONNECT \n", &"9".repeat(64)] {
        let mut stream = guest.call();
        // The device may have closed it before all of it is written.
        let _ = stream.write_all(line.as_bytes());
        let mut bytes = Vec::new();
        match stream.read_to_end(&mut bytes) {
            Ok(count) => assert_eq!(count, 0),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
    }
    // Byte by byte is fine.
    let mut stream = guest.call();
    for byte in format!("CONNECT {GUEST_PORT}\n").bytes() {
        stream.write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    let request = guest.expect(Op::Request);
    // The guest declines.
    guest.send(Op::Rst, request.src_port, 0);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);

    // A program that goes away before the guest has answered.
    let mut stream = guest.call();
    writeln!(stream, "CONNECT {GUEST_PORT}").unwrap();
    let request = guest.expect(Op::Request);
    drop(stream);
    assert_eq!(guest.expect(Op::Rst).src_port, request.src_port);
}

#[test]
fn more_host_programs_than_connections_wait_their_turn() {
    // Both ends of every connection are in this process.
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a whole rlimit.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) }, 0);
    // Other tests of this process are not to run out of descriptors meanwhile.
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: as above.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
    let mut guest = Guest::new();
    let _listener = UnixListener::bind(guest.dir.path().join("v.sock_99")).unwrap();
    let mut waiting: Vec<UnixStream> = (0..super::MAX_CONNECTIONS_OF_GUEST).map(|_| guest.call()).collect();
    // One more of the host's: when it is answered, all before it have been taken.
    let (stream, port) = guest.connect();
    waiting.push(stream);
    guest.send(Op::Request, 99, 0);
    assert_eq!(guest.expect(Op::Rst).src_port, 99, "the guest makes no more");
    let mut one_too_many = |guest: &mut Guest, make_room: &dyn Fn(&mut Guest, &mut Vec<UnixStream>)| {
        waiting.extend((waiting.len()..super::MAX_CONNECTIONS).map(|_| guest.call()));
        let mut last = guest.call();
        last.write_all(b"nonsense\n").unwrap();
        last.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        assert_eq!(last.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        make_room(guest, &mut waiting);
        last.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert_eq!(last.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    };
    one_too_many(&mut guest, &|_, waiting| drop(waiting.pop()));
    // The host's program keeps its end, of which nothing is heard any more.
    one_too_many(&mut guest, &|guest, _| guest.send(Op::Rst, port, 0));
}

#[test]
fn a_guest_that_offers_useless_buffers_for_ever_keeps_the_thread_from_nothing() {
    let mut guest = Guest::asleep();
    let features = guest.vsock.features();
    guest.vsock.activate(guest.queue.activation(3, features)).unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let refilling = guest.queue.refill_for_ever(RX, over.clone());
    // Something waits to be sent, and goes on waiting.
    let mut stream = guest.call();
    stream.write_all(b"CONNECT 1024\n").unwrap();
    std::thread::sleep(Duration::from_millis(100));
    guest.queue.stop();
    over.store(true, Ordering::Relaxed);
    refilling.join().unwrap();
    assert_eq!(stream.read(&mut [0; 8]).unwrap_or(0), 0);
}

#[test]
fn a_restored_guest_is_told_once_that_its_connections_are_gone() {
    const EVENTS: usize = 2;
    let mut guest = Guest::asleep();
    let saved = guest.vsock.save().unwrap();
    guest.vsock.restore(saved).unwrap();
    guest.wake();
    // A buffer of no use, then one that is.
    guest.queue.write(TX_AT, &[0xee; 8]);
    guest.queue.send(EVENTS, &[(TX_AT, 2, WRITE)]);
    assert_eq!(guest.queue.wait_used(EVENTS), 0);
    guest.queue.send(EVENTS, &[(TX_AT, 8, WRITE)]);
    assert_eq!(guest.queue.wait_used(EVENTS), 4);
    assert_eq!(guest.queue.read(TX_AT, 8), [0, 0, 0, 0, 0xee, 0xee, 0xee, 0xee]);
    guest.queue.send(EVENTS, &[(TX_AT, 8, WRITE)]);
    guest.connect();
    assert_eq!(guest.queue.try_used(EVENTS), None);

    guest.queue.stop();
    guest.vsock.reset();
    guest.queue.reset();
    guest.kept = (0..RX_BUFFERS).map(|index| RX_AT + index * RX_BYTES).collect();
    guest.wake();
    guest.queue.send(EVENTS, &[(TX_AT, 8, WRITE)]);
    guest.connect();
    assert_eq!(guest.queue.try_used(EVENTS), None, "a driver that came anew");
}

#[test]
fn a_reset_ends_connections_and_the_device_starts_afresh() {
    let mut guest = Guest::new();
    let (mut stream, _) = guest.connect();
    guest.queue.stop();
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    guest.queue.reset();
    guest.kept = (0..RX_BUFFERS).map(|index| RX_AT + index * RX_BYTES).collect();
    guest.wake();
    guest.connect();
}

#[test]
fn what_the_guest_sent_right_before_it_went_down_arrives() {
    for _ in 0..50 {
        let mut guest = Guest::new();
        let (mut stream, port) = guest.connect();
        let header = guest.header(Op::Rw, port, 0, 10);
        guest.queue.write(TX_AT, &[header.encode().as_slice(), b"last words"].concat());
        guest.queue.send(TX, &[(TX_AT, HEADER_BYTES as u32 + 10, 0)]);
        guest.queue.stop();
        let mut received = String::new();
        stream.read_to_string(&mut received).unwrap();
        assert_eq!(received, "last words");
    }
}

#[test]
fn configuration_errors_name_the_field_and_the_socket_goes_with_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let config = |guest_cid, name: &str| VsockConfig { guest_cid, socket: dir.path().join(name) };
    assert!(matches!(Vsock::new(&config(2, "s")), Err(VsockError::Cid(2))));
    assert!(Vsock::new(&config(2, "s")).unwrap_err().to_string().contains("guest_cid"));
    assert!(Vsock::new(&config(3, &"x".repeat(100))).unwrap_err().to_string().contains("socket"));
    let vsock = Vsock::new(&config(3, "s")).unwrap();
    assert!(matches!(Vsock::new(&config(3, "s")), Err(VsockError::Bind { .. })));
    drop(vsock);
    assert!(!dir.path().join("s").exists());
}
