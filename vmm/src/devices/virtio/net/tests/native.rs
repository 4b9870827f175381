//! What the monitor's own interface costs without a guest: `cargo xtask bench net --monitor`.

use anyhow::Result;
use serde_json::json;

use super::*;
use crate::devices::virtio::test_cost::{self, Cost, at_large, filtered, measure, shut_in};

/// Frames in each direction, of each kind.
const FRAMES: usize = 20_000;
/// In flight at once.
const BATCH: usize = 16;
/// Of a frame: what a link of 1500 bytes carries.
const FULL: usize = 1514;

#[test]
#[ignore = "measures; for `cargo xtask bench net --monitor`"]
fn what_frames_cost() -> Result<()> {
    // A tap cannot be made by who is shut in.
    let host = Host::new(1);
    let all = || {
        let (dir, theirs) = (tempfile::tempdir()?, host.again());
        let free = at_large(|| costs(Rig::new()))?;
        Ok([free, shut_in(dir.path(), move || costs(Rig::on(theirs, config(), u64::MAX, filtered)))?])
    };
    test_cost::report("frames", all, json!({ "frames": format!("of {FULL} bytes, to a tap and from it") }))
}

fn costs(mut rig: Rig) -> Result<Vec<Cost>> {
    let (out, incoming) = (frame(PEER, FULL), frame(MAC, FULL));
    let mut all = Vec::new();
    all.push(measure("sent, one after another", || {
        (0..FRAMES).for_each(|_| rig.transmit(&out));
        Ok(FRAMES)
    })?);
    all.push(measure("sent, 16 at once", || {
        for _ in 0..FRAMES / BATCH {
            for _ in 0..BATCH {
                let buffers = [(SENT, HEADER_BYTES as u32, 0), (SENT + 0x100, FULL as u32, 0)];
                rig.queue.send_quietly(TX, &buffers);
            }
            rig.queue.kick(TX);
            for _ in 0..BATCH {
                rig.queue.wait_used(TX);
            }
        }
        Ok(FRAMES)
    })?);
    for (what, at_once) in [("received, one after another", 1), ("received, 16 at once", BATCH)] {
        all.push(measure(what, || {
            for _ in 0..FRAMES / at_once {
                rig.offer(0, at_once as u64, 2048);
                for _ in 0..at_once {
                    rig.host.send(&incoming);
                }
                for _ in 0..at_once {
                    assert_eq!(rig.queue.wait_used(RX) as usize, HEADER_BYTES + FULL);
                }
            }
            Ok(FRAMES)
        })?);
    }
    Ok(all)
}
