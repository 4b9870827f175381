//! What the monitor's own interface costs without a guest: `cargo xtask bench net --monitor`.

use super::*;
use crate::devices::virtio::test_cost::{self, Cost};

/// Frames in each direction, of each kind.
const FRAMES: usize = 20_000;
/// In flight at once.
const BATCH: usize = 16;
/// Of a frame: what a link of 1500 bytes carries.
const FULL: usize = 1514;

#[test]
#[ignore = "measures; for `cargo xtask bench net --monitor`"]
fn what_frames_cost() {
    let dir = tempfile::tempdir().unwrap();
    // A tap cannot be made by who is shut in.
    let host = Host::new(1);
    let rig = |before: fn()| Rig::on(host.again(), config(), u64::MAX, before);
    let free = || costs(rig(|| ()));
    let shut_in = || costs(rig(|| crate::jail::tests::filter().unwrap()));
    print!("{}", test_cost::beside("frames", dir.path(), free, shut_in));
}

fn costs(mut rig: Rig) -> Vec<Cost> {
    let (out, incoming) = (frame(PEER, FULL), frame(MAC, FULL));
    let mut all = Vec::new();
    all.push(test_cost::measure("sent, one after another", FRAMES, 1, |_| rig.transmit(&out)));
    all.push(test_cost::measure("sent, 16 at once", FRAMES / BATCH, BATCH, |_| {
        for number in 0..BATCH {
            let buffers = [(SENT, HEADER_BYTES as u32, 0), (SENT + 0x100, FULL as u32, 0)];
            if number + 1 < BATCH {
                rig.queue.send_quietly(TX, &buffers);
            } else {
                rig.queue.send(TX, &buffers);
            }
        }
        for _ in 0..BATCH {
            rig.queue.wait_used(TX);
        }
    }));
    let mut receive = |what, at_once: usize| {
        test_cost::measure(what, FRAMES / at_once, at_once, |_| {
            rig.offer(0, at_once as u64, 2048);
            for _ in 0..at_once {
                rig.host.send(&incoming);
            }
            for _ in 0..at_once {
                assert_eq!(rig.queue.wait_used(RX) as usize, HEADER_BYTES + FULL);
            }
        })
    };
    all.push(receive("received, one after another", 1));
    all.push(receive("received, 16 at once", BATCH));
    all
}
