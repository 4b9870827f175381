//! An interface on a tap, and what is on the other end of it.

use super::*;

/// The host's side: the tap's queues and a packet socket on its interface.
pub(super) struct Host {
    pub(super) taps: Vec<File>,
    pub(super) socket: File,
}

pub(super) fn check(answer: libc::c_int) -> libc::c_int {
    assert!(answer >= 0, "{}", std::io::Error::last_os_error());
    answer
}

impl Host {
    /// A tap of so many queues, up, with an MTU for which nothing is too large.
    pub(super) fn new(queues: usize) -> Self {
        // A namespace is a thread's; descriptors outlive it.
        std::thread::spawn(move || Self::in_namespace(queues)).join().unwrap()
    }

    pub(super) fn in_namespace(queues: usize) -> Self {
        // SAFETY: takes flags.
        check(unsafe { libc::unshare(libc::CLONE_NEWNET) });
        // The kernel says nothing by itself.
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        // SAFETY: plain numbers.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (place, byte) in request.ifr_name.iter_mut().zip(b"tap0") {
            *place = *byte as libc::c_char;
        }
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if queues > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let open = || {
            let tap = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
            let mut request = request;
            request.ifr_ifru.ifru_flags = flags as libc::c_short;
            // SAFETY: the request takes an ifreq.
            check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) });
            tap
        };
        let taps = (0..queues).map(|_| open()).collect();
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let all = i32::from((libc::ETH_P_ALL as u16).to_be());
        // SAFETY: takes numbers.
        let socket = check(unsafe { libc::socket(libc::AF_PACKET, kind, all) });
        // SAFETY: just made for us.
        let socket = unsafe { File::from_raw_fd(socket) };
        let set = |what: libc::Ioctl, request: &mut libc::ifreq| {
            // SAFETY: each of the requests takes an ifreq.
            check(unsafe { libc::ioctl(socket.as_raw_fd(), what, std::ptr::from_mut(request)) });
        };
        request.ifr_ifru.ifru_mtu = 65_000;
        set(libc::SIOCSIFMTU, &mut request);
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        set(libc::SIOCSIFFLAGS, &mut request);
        set(libc::SIOCGIFINDEX, &mut request);
        // SAFETY: zeroes are a value.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        // SAFETY: it was filled in.
        let index = unsafe { request.ifr_ifru.ifru_ifindex };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all as u16;
        address.sll_ifindex = index;
        let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: an address of that length.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) });
        let second = libc::timeval { tv_sec: PATIENCE.as_secs() as libc::time_t, tv_usec: 0 };
        let len = size_of::<libc::timeval>() as libc::socklen_t;
        let (level, what) = (libc::SOL_SOCKET, libc::SO_RCVTIMEO);
        // SAFETY: a value of that length.
        check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, what, (&raw const second).cast(), len) });
        Self { taps, socket }
    }

    /// The same one.
    pub(super) fn again(&self) -> Self {
        let taps = self.taps.iter().map(|tap| tap.try_clone().unwrap()).collect();
        Self { taps, socket: self.socket.try_clone().unwrap() }
    }

    pub(super) fn send(&self, frame: &[u8]) {
        assert_eq!((&self.socket).write(frame).unwrap(), frame.len());
    }

    pub(super) fn receive(&self) -> Vec<u8> {
        let mut frame = vec![0; 70_000];
        let count = (&self.socket).read(&mut frame).unwrap();
        frame.truncate(count);
        frame
    }
}

pub(super) struct Rig {
    pub(super) net: Net,
    pub(super) queue: TestQueue,
    pub(super) host: Host,
    pub(super) features: u64,
}

pub(super) fn config() -> NetConfig {
    NetConfig { slot: 24, mac: MAC, mtu: 0, queue_pairs: 1, receive: None, transmit: None }
}

impl Rig {
    pub(super) fn new() -> Self {
        Self::with(config(), u64::MAX)
    }

    /// A driver that negotiates what it can of `wanted`.
    pub(super) fn with(config: NetConfig, wanted: u64) -> Self {
        Self::on(Host::new(config.queue_pairs.into()), config, wanted, || ())
    }

    /// The same on `host`, whose device's threads are started by one that has done `before`.
    pub(super) fn on(mut host: Host, config: NetConfig, wanted: u64, before: impl FnOnce() + Send) -> Self {
        let mut net = Net::new(&config, std::mem::take(&mut host.taps), Vec::new()).unwrap();
        let features = net.features() & wanted;
        let queue = TestQueue::activated(&mut net, features, Duty::Net, before);
        let rig = Self { net, queue, host, features };
        // The tap is set up, on the device's thread.
        wait(|| rig.metrics().mover == NetMover::UserSpace);
        rig
    }

    pub(super) fn metrics(&self) -> NetMetrics {
        self.net.control().metrics()
    }

    /// Offers `count` buffers of `bytes` from number `first` on, 64 KiB apart.
    pub(super) fn offer(&mut self, first: u64, count: u64, bytes: u32) {
        for number in first..first + count {
            self.queue.send(RX, &[(RECEIVED + number * 0x1_0000, bytes, WRITE)]);
        }
    }

    /// Sends `frame` behind an empty header.
    pub(super) fn transmit(&mut self, frame: &[u8]) {
        self.queue.write(SENT, &[0; HEADER_BYTES]);
        self.queue.write(SENT + 0x100, frame);
        self.queue.send(TX, &[(SENT, HEADER_BYTES as u32, 0), (SENT + 0x100, frame.len() as u32, 0)]);
        assert_eq!(self.queue.wait_used(TX), 0);
    }

    pub(super) fn command(&mut self, class: u32, code: u32, data: &[u8]) -> u8 {
        let mut command = vec![class as u8, code as u8];
        command.extend(data);
        self.queue.write(COMMAND, &command);
        self.queue.write(ANSWER, &[0xee]);
        self.queue.send(CONTROL, &[(COMMAND, command.len() as u32, 0), (ANSWER, 1, WRITE)]);
        assert_eq!(self.queue.wait_used(CONTROL), 1);
        self.queue.read(ANSWER, 1)[0]
    }

    pub(super) fn config_bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.net.read_config(offset, &mut bytes);
        bytes
    }
}

pub(super) fn frame(to: [u8; 6], bytes: usize) -> Vec<u8> {
    let mut frame = to.to_vec();
    frame.extend(PEER);
    // A type nobody listens to.
    frame.extend([0x88, 0xb5]);
    frame.extend((frame.len()..bytes).map(|byte| (byte % 251) as u8));
    frame
}

/// Waits until `what` holds.
pub(super) fn wait(mut what: impl FnMut() -> bool) {
    let started = Instant::now();
    while !what() {
        assert!(started.elapsed() < PATIENCE, "it does not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}
