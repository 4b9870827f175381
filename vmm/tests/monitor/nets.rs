//! Network interfaces of the running monitor, on real taps.

use std::fs::OpenOptions;

use rvm_protocol::vmm::{NetConfig, NetMover};

use super::*;

/// A tap, in a network namespace of its own.
fn tap() -> File {
    // A namespace is a thread's; the descriptor outlives it.
    std::thread::spawn(|| {
        // SAFETY: takes flags.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
        // SAFETY: plain numbers.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        let tap = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
        // SAFETY: the request takes an ifreq.
        assert_eq!(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }, 0);
        tap
    })
    .join()
    .unwrap()
}

fn config(slot: u8) -> NetConfig {
    NetConfig { slot, mac: [2, 0, 0, 0, 0, slot], mtu: 0, queue_pairs: 1, receive: None, transmit: None }
}

impl Control {
    fn ask_with_files(&mut self, request: Request, files: &[&File]) -> Response {
        self.id += 1;
        let call = serde_json::to_vec(&Call { id: self.id, request }).unwrap();
        let fds: Vec<_> = files.iter().map(|file| file.as_raw_fd()).collect();
        self.socket.send_with_fds(&[call.as_slice()], &fds).unwrap();
        let mut text = vec![0; MAX_MESSAGE_LEN];
        let count = self.socket.recv(&mut text).unwrap();
        serde_json::from_slice::<Reply>(&text[..count]).unwrap().response
    }

    fn slots(&mut self) -> Vec<u8> {
        self.metrics().nets.iter().map(|net| net.slot).collect()
    }
}

fn message(response: Response) -> String {
    match response {
        Response::Error { message } => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn interfaces_come_and_go_and_leave_nothing() {
    let sandbox = Sandbox::new(HANG);
    let (child, mut control) = sandbox.start();
    control.metrics_of_running();
    let before = holdings(&child);
    let add = |slot| Request::AddNet(config(slot));
    let null = File::open("/dev/null").unwrap();
    for (request, files, says) in [
        (add(24), &[][..], "net 24: taps: 0 descriptors; must be as many as queue_pairs, 1"),
        (add(24), &[&null][..], "net 24: taps[0]: it cannot be used as a tap's queue: "),
        (add(24), &[&null, &null, &null][..], "net 24: vhost: 2 descriptors; must be none, or"),
        (add(23), &[&null][..], "net 23: slot: 23 given; must be 24 to 31"),
        (add(255), &[&null][..], "net 255: slot: 255 given; must be 24 to 31"),
        (Request::RemoveNet { slot: 24 }, &[][..], "there is no net 24"),
        (Request::SetLink { slot: 24, up: true }, &[][..], "there is no net 24"),
        (Request::RemoveNet { slot: 24 }, &[&null][..], "this request takes no descriptor"),
    ] {
        let refused = message(control.ask_with_files(request, files));
        assert!(refused.starts_with(says), "{refused}");
    }
    assert_eq!(holdings(&child), before, "what was refused is closed");
    for _ in 0..20 {
        for slot in 24..32 {
            assert_eq!(control.ask_with_files(add(slot), &[&tap()]), Response::Ok);
        }
        assert_eq!(message(control.ask_with_files(add(30), &[&tap()])), "net 30 is there already");
        assert_eq!(control.slots(), (24..32).collect::<Vec<_>>());
        assert_eq!(control.ask(Request::SetLink { slot: 31, up: false }), Response::Ok);
        for slot in 24..32 {
            assert_eq!(control.ask(Request::RemoveNet { slot }), Response::Ok);
        }
    }
    assert_eq!(control.slots(), [0; 0]);
    wait_for(|| holdings(&child) == before);
    assert_eq!(control.ask(Request::Stop), Response::Ok);
    assert_eq!(finish(child).status.code(), Some(exit_code::OK));
}

#[test]
fn an_interface_known_before_boot_is_inherited() {
    let (tap, null) = (tap(), File::open("/dev/null").unwrap());
    for file in [&tap, &null] {
        inherit(file.as_raw_fd()).unwrap();
    }
    let net = |tap: &File, vhost: &[&File]| {
        let vhost: Vec<_> = vhost.iter().map(|file| file.as_raw_fd()).collect();
        serde_json::json!([{
            "net": {"slot": 26, "mac": [2, 0, 0, 0, 0, 1], "queue_pairs": 1}, "taps": [tap.as_raw_fd()], "vhost": vhost,
        }])
    };
    // What is no vhost-net is said and done without.
    let sandbox = Sandbox::new(HANG).set("nets", net(&tap, &[&null]));
    let (child, mut control) = sandbox.start();
    control.metrics_of_running();
    let nets = control.metrics().nets;
    assert_eq!((nets.len(), nets[0].slot, nets[0].mover), (1, 26, NetMover::Nobody));
    assert!(nets[0].fallback.as_ref().unwrap().starts_with("VHOST_SET_OWNER: "), "{nets:?}");
    assert_eq!(
        message(control.ask_with_files(Request::AddNet(config(26)), &[&tap])),
        "net 26 is there already"
    );
    assert_eq!(control.ask(Request::RemoveNet { slot: 26 }), Response::Ok);
    assert_eq!(control.ask(Request::Stop), Response::Ok);
    assert_eq!(finish(child).status.code(), Some(exit_code::OK));

    for (nets, code, says) in [
        (
            net(&null, &[]),
            exit_code::BUILD_FAILED,
            "nets: slot 26: taps[0]: it cannot be used as a tap's queue",
        ),
        (net(&tap, &[&tap]), exit_code::BAD_CONFIG, "must be inherited and named once"),
    ] {
        let output = Sandbox::new(HANG).set("nets", nets).run();
        let reason = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{reason}");
        assert!(reason.contains(says) && reason.lines().count() == 1, "{reason}");
    }
}
