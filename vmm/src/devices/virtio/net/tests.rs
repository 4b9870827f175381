//! The interface on a real tap, in a network namespace of its own: what is on the other
//! end of the tap is a packet socket, as everything of the host's network stack is.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::{Duration, Instant};

use rvm_protocol::vmm::{NetConfig, NetMetrics, NetMover, RateLimit, TokenBucket};
use virtio_bindings::virtio_net::*;

use super::*;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::test_queue::{DATA, SIZE, TestQueue, WRITE};
use crate::jail::Duty;

mod native;
mod rig;

use rig::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const RX: usize = 0;
const TX: usize = 1;
const CONTROL: usize = 2;
/// Where buffers are.
const RECEIVED: u64 = DATA;
const SENT: u64 = DATA + 0x10_0000;
const COMMAND: u64 = DATA + 0x20_0000;
const ANSWER: u64 = DATA + 0x20_f000;
const OK: u8 = VIRTIO_NET_OK as u8;
const ERR: u8 = VIRTIO_NET_ERR as u8;
const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn frames_go_both_ways_without_a_copy() {
    let mut rig = Rig::new();
    for bytes in [60, 1514, 9014, 65_014] {
        let sent = frame(PEER, bytes);
        rig.transmit(&sent);
        assert_eq!(rig.host.receive(), sent);
    }
    rig.offer(0, 2, 0x1_0000);
    for number in 0..2u64 {
        let sent = frame(MAC, 1000 + number as usize);
        rig.host.send(&sent);
        assert_eq!(rig.queue.wait_used(RX), 12 + 1000 + number as u32);
        let received = rig.queue.read(RECEIVED + number * 0x1_0000, 12 + sent.len());
        assert_eq!(received[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "one buffer, nothing to finish");
        assert_eq!(received[12..], sent);
    }
    // Counted when the round is over, behind the last interrupt.
    wait(|| rig.metrics().receive.frames == 2 && rig.metrics().transmit.frames == 4);
    let metrics = rig.metrics();
    let (rx, tx) = (metrics.receive, metrics.transmit);
    assert_eq!((rx.frames, rx.bytes, rx.dropped, rx.copied), (2, 2001, 0, 0));
    assert_eq!((tx.frames, tx.bytes, tx.dropped), (4, 60 + 1514 + 9014 + 65_014, 0));
    assert!(rx.interrupts > 0 && rx.wakeups > 0);
}

/// What `count` used buffers hold, and in how many of them a frame says it lies.
fn collect(rig: &mut Rig, first: u64, count: u64) -> (u16, Vec<u8>) {
    let mut bytes = Vec::new();
    for number in first..first + count {
        let len = rig.queue.wait_used(RX);
        bytes.extend(rig.queue.read(RECEIVED + number * 0x1_0000, len as usize));
    }
    (u16::from_le_bytes([bytes[10], bytes[11]]), bytes.split_off(12))
}

#[test]
fn a_large_frame_lies_in_several_buffers_and_is_not_cut() {
    let mut rig = Rig::new();
    rig.offer(0, 24, 1526);
    let sent = frame(MAC, 9014);
    for (round, copied) in [(0, 1), (1, 1), (2, 1)] {
        rig.host.send(&sent);
        assert_eq!(collect(&mut rig, round * 6, 6), (6, sent.clone()), "{round}");
        wait(|| rig.metrics().receive.frames == round + 1);
        assert_eq!(rig.metrics().receive.copied, copied, "only the first was longer than expected");
    }
}

#[test]
fn a_frame_waits_for_buffers_and_is_not_lost() {
    let mut rig = Rig::new();
    rig.offer(0, 2, 1526);
    let sent = frame(MAC, 9014);
    rig.host.send(&sent);
    wait(|| rig.metrics().receive.copied == 1);
    assert!(rig.queue.try_used(RX).is_none());
    rig.offer(2, 2, 1526);
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.queue.try_used(RX).is_none(), "all of them or none");
    rig.offer(4, 3, 1526);
    assert_eq!(collect(&mut rig, 0, 6), (6, sent));
    rig.host.send(&frame(MAC, 60));
    assert_eq!(collect(&mut rig, 6, 1), (1, frame(MAC, 60)));
}

#[test]
fn a_frame_that_never_fits_is_dropped_and_the_next_comes() {
    // Every buffer of the ring, and yet not enough.
    let mut rig = Rig::new();
    rig.offer(0, SIZE.into(), 20);
    rig.host.send(&frame(MAC, 9014));
    wait(|| rig.metrics().receive.dropped == 1);
    rig.host.send(&frame(MAC, 60));
    assert_eq!(collect(&mut rig, 0, 4), (4, frame(MAC, 60)));
    // One buffer is all there is where they are not merged.
    let mut rig = Rig::with(config(), !(1 << VIRTIO_NET_F_MRG_RXBUF));
    rig.offer(0, 2, 1526);
    rig.host.send(&frame(MAC, 9014));
    wait(|| rig.metrics().receive.dropped == 1);
    rig.host.send(&frame(MAC, 1514));
    assert_eq!(collect(&mut rig, 0, 1), (1, frame(MAC, 1514)));
}

#[test]
fn a_guest_without_buffers_costs_nothing_until_it_has_some() {
    let mut rig = Rig::new();
    rig.host.send(&frame(MAC, 60));
    wait(|| rig.metrics().receive.wakeups > 0);
    std::thread::sleep(Duration::from_millis(50));
    let before = rig.metrics().receive.wakeups;
    for _ in 0..5000 {
        rig.host.send(&frame(MAC, 60));
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(rig.metrics().receive.wakeups, before, "the tap is not looked at");
    rig.offer(0, 8, 1526);
    for number in 0..8 {
        assert_eq!(collect(&mut rig, number, 1), (1, frame(MAC, 60)));
    }
}

#[test]
fn hostile_transmissions_are_dropped_and_the_next_goes() {
    let mut rig = Rig::new();
    rig.queue.write(SENT, &[0xff; 0x2_0000]);
    let outside = crate::devices::virtio::test_queue::MEMORY as u64;
    let chains: &[&[(u64, u32, u16)]] = &[
        &[(SENT, 0, 0)],
        &[(SENT, 1, 0)],
        &[(SENT, 12, 0)],
        &[(SENT, 25, 0)],
        &[(SENT, 12, 0), (SENT + 12, 13, 0)],
        &[(SENT, 12, 0), (SENT + 12, 65_558, 0)],
        &[(SENT, 12, 0), (SENT + 12, u32::MAX, 0)],
        &[(SENT, 12, WRITE), (SENT + 12, 60, WRITE)],
        &[(SENT, 12, WRITE), (SENT + 12, 60, 0)],
        &[(outside, 100, 0)],
        &[(outside - 50, 100, 0)],
        &[(u64::MAX - 3, 100, 0)],
        // A header of nonsense: the kernel refuses it.
        &[(SENT, 100, 0)],
    ];
    for (index, chain) in chains.iter().enumerate() {
        rig.queue.send(TX, chain);
        assert_eq!(rig.queue.wait_used(TX), 0, "{index}");
        wait(|| rig.metrics().transmit.dropped == index as u64 + 1);
    }
    rig.queue.send_loop(TX, SENT, 0);
    assert_eq!(rig.queue.wait_used(TX), 0);
    // Every kind of segmentation there is and is not, and offsets beyond all.
    for kind in 0..=255u8 {
        for (flags, offsets) in [(0, [0; 8]), (1, [0xff; 8]), (255, [14, 0, 1, 0, 20, 0, 16, 0])] {
            let mut packet = vec![flags, kind];
            packet.extend(offsets);
            packet.extend([0xff, 0xff]);
            packet.extend(frame(PEER, 120));
            rig.queue.write(SENT, &packet);
            rig.queue.send(TX, &[(SENT, packet.len() as u32, 0)]);
            assert_eq!(rig.queue.wait_used(TX), 0);
        }
    }
    // A table that says the same buffer 40 times.
    let many: Vec<_> = std::iter::once((SENT + 0x4000, 12, 0)).chain([(SENT, 40, 0); 40]).collect();
    rig.queue.write(SENT + 0x4000, &[0; 12]);
    rig.queue.send_indirect(TX, SENT + 0x8000, &many);
    assert_eq!(rig.queue.wait_used(TX), 0);
    while rig.host.receive().len() != 1600 {}
    let sent = frame(PEER, 77);
    rig.transmit(&sent);
    assert_eq!(rig.host.receive(), sent);
}

#[test]
fn hostile_buffers_are_given_back_empty_and_the_next_is_filled() {
    let mut rig = Rig::new();
    let outside = crate::devices::virtio::test_queue::MEMORY as u64;
    let chains: &[&[(u64, u32, u16)]] = &[
        &[(RECEIVED, 1526, 0)],
        &[(RECEIVED, 0, WRITE)],
        &[(RECEIVED, 11, WRITE)],
        &[(outside, 1526, WRITE)],
        &[(outside - 12, 1526, WRITE)],
        &[(u64::MAX - 3, 1526, WRITE)],
        &[(RECEIVED, 1526, WRITE), (RECEIVED, 1526, 0)],
    ];
    for chain in chains {
        rig.queue.send(RX, chain);
    }
    rig.queue.send_loop(RX, RECEIVED, WRITE);
    rig.offer(1, 1, 1526);
    for index in 0..=chains.len() {
        assert_eq!(rig.queue.wait_used(RX), 0, "{index}");
    }
    rig.host.send(&frame(MAC, 1000));
    assert_eq!(collect(&mut rig, 1, 1), (1, frame(MAC, 1000)));
    // All pieces of a buffer are the same bytes: the guest's own affair.
    let same = [(RECEIVED, 100, WRITE); 40];
    rig.queue.send_indirect(RX, SENT, &same);
    rig.host.send(&frame(MAC, 1000));
    assert_eq!(rig.queue.wait_used(RX), 1012);
    // One of no use behind one that is too small: the frame waits for more.
    rig.offer(0, 1, 100);
    rig.queue.send(RX, &[(u64::MAX - 3, 100, WRITE)]);
    rig.host.send(&frame(MAC, 1000));
    rig.offer(1, 1, 1526);
    assert_eq!([0; 3].map(|_| rig.queue.wait_used(RX)), [100, 0, 912]);
}

#[test]
fn rings_of_nonsense_end_the_service_and_a_reset_brings_it_back() {
    for queue in [RX, TX, CONTROL] {
        let mut rig = Rig::new();
        rig.queue.break_ring(queue);
        wait(|| rig.queue.config_changed());
        rig.queue.reset();
        rig.net.reset();
        assert_eq!(rig.metrics().mover, NetMover::Nobody);
        let features = rig.features;
        rig.net.activate(rig.queue.activation(3, features)).unwrap();
        rig.transmit(&frame(PEER, 60));
        assert_eq!(rig.host.receive(), frame(PEER, 60));
    }
}

#[test]
fn buffers_offered_and_taken_for_ever_keep_nobody() {
    let rig = Rig::new();
    for queue in [RX, TX] {
        let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let driver = rig.queue.refill_for_ever(queue, over.clone());
        std::thread::sleep(Duration::from_millis(50));
        for _ in 0..50 {
            rig.host.send(&frame(MAC, 1000));
        }
        if queue == TX {
            let started = Instant::now();
            rig.queue.stop();
            assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
        }
        over.store(true, Ordering::Relaxed);
        driver.join().unwrap();
    }
}

#[test]
fn a_reset_in_the_middle_leaves_a_device_that_works() {
    let mut rig = Rig::new();
    for round in 0..20u64 {
        rig.offer(0, 16, 1526);
        for _ in 0..100 {
            rig.host.send(&frame(MAC, 1000));
        }
        rig.queue.reset();
        rig.net.reset();
        let features = rig.features;
        rig.net.activate(rig.queue.activation(3, features)).unwrap();
        // What was left on the tap comes first.
        rig.offer(0, 1, 0x1_0000);
        assert_eq!(rig.queue.wait_used(RX), 1012, "{round}");
    }
}

#[test]
fn the_guests_wishes_are_kept_and_nonsense_is_refused() {
    let mut rig = Rig::new();
    rig.offer(0, 8, 2048);
    let hears = |rig: &mut Rig, number: u64, to: [u8; 6]| {
        // The second is always wanted.
        let dropped = rig.metrics().receive.dropped;
        rig.host.send(&frame(to, 100));
        rig.host.send(&frame(MAC, 200));
        let (_, first) = collect(rig, number, 1);
        first.len() == 100 && rig.metrics().receive.dropped == dropped
    };
    let group = [1, 0, 0x5e, 0, 0, 1];
    let rx = VIRTIO_NET_CTRL_RX;
    assert_eq!(rig.command(rx, VIRTIO_NET_CTRL_RX_PROMISC, &[0]), OK);
    assert!(!hears(&mut rig, 0, PEER));
    assert!(!hears(&mut rig, 1, group));
    let table = |unicast: &[[u8; 6]], multicast: &[[u8; 6]]| {
        let mut bytes = Vec::new();
        for list in [unicast, multicast] {
            bytes.extend((list.len() as u32).to_le_bytes());
            bytes.extend(list.concat());
        }
        bytes
    };
    let (mac, set) = (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET);
    assert_eq!(rig.command(mac, set, &table(&[PEER], &[group])), OK);
    assert!(hears(&mut rig, 2, group));
    assert_eq!(collect(&mut rig, 3, 1).1.len(), 200);

    for wrong in [
        &[][..],
        &[1],
        &[0xff; 4],
        &[0xff; 8],
        &[1, 0, 0, 0, 2, 0, 0, 0, 0],
        &[1, 0, 0, 0x80, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0],
        &[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
    ] {
        assert_eq!(rig.command(mac, set, wrong), ERR, "{wrong:?}");
    }
    let many = table(&vec![PEER; 5000], &vec![group; 5000]);
    let mut command = vec![mac as u8, set as u8];
    command.extend(&many);
    rig.queue.write(SENT, &command);
    rig.queue.send(CONTROL, &[(SENT, command.len() as u32, 0), (ANSWER, 1, WRITE)]);
    assert_eq!((rig.queue.wait_used(CONTROL), rig.queue.read(ANSWER, 1)[0]), (1, OK));

    let pairs = 1u16.to_le_bytes();
    for (class, code, data) in [
        (rx, VIRTIO_NET_CTRL_RX_PROMISC, &[][..]),
        (rx, VIRTIO_NET_CTRL_RX_PROMISC, &[1, 1]),
        (rx, 6, &[1]),
        (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, &[1]),
        (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, &[0, 0x10]),
        (VIRTIO_NET_CTRL_VLAN, 2, &[1, 0]),
        (mac, VIRTIO_NET_CTRL_MAC_ADDR_SET, &[2; 5]),
        (mac, VIRTIO_NET_CTRL_MAC_ADDR_SET, &[1; 6]),
        (mac, VIRTIO_NET_CTRL_MAC_ADDR_SET, &[0; 6]),
        (mac, 2, &[2; 6]),
        (VIRTIO_NET_CTRL_ANNOUNCE, 1, &[]),
        (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, &[1]),
        // Not negotiated: there is one pair.
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, &pairs),
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_RSS_CONFIG, &[0; 64]),
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, &[0xff; 8]),
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, &[0; 7]),
        (255, 255, &[0; 16]),
    ] {
        assert_eq!(rig.command(class, code, data), ERR, "{class} {code} {data:?}");
    }
    // No room for an answer, nothing to read, a loop.
    rig.queue.send(CONTROL, &[(COMMAND, 2, 0)]);
    assert_eq!(rig.queue.wait_used(CONTROL), 0);
    rig.queue.send(CONTROL, &[(ANSWER, 1, WRITE)]);
    assert_eq!(rig.queue.wait_used(CONTROL), 1);
    rig.queue.send_loop(CONTROL, COMMAND, 0);
    assert_eq!(rig.queue.wait_used(CONTROL), 0);

    assert_eq!(rig.command(mac, VIRTIO_NET_CTRL_MAC_ADDR_SET, &[2, 9, 9, 9, 9, 9]), OK);
    assert_eq!(rig.config_bytes(0, 6), [2, 9, 9, 9, 9, 9]);
    rig.queue.reset();
    rig.net.reset();
    assert_eq!(rig.config_bytes(0, 6), MAC);
}

#[test]
fn a_guest_may_ask_the_hosts_kernel_for_few_changes() {
    let mut rig = Rig::new();
    let csum = (1u64 << VIRTIO_NET_F_GUEST_CSUM).to_le_bytes();
    let mut done = 0;
    let started = Instant::now();
    for round in 0..1000 {
        let offloads = if round % 2 == 0 { csum } else { [0; 8] };
        let (class, code) = (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET);
        done += u64::from(rig.command(class, code, &offloads) == OK);
    }
    // Every second of those refused would have been undone by the next, which asks for
    // what is already.
    let changes = 50 + 20 * (started.elapsed().as_secs() + 1);
    assert!(done >= 50 && done <= 500 + changes, "{done}");
}

#[test]
fn what_the_driver_reads_of_the_device() {
    let mtu = NetConfig { mtu: 9000, ..config() };
    let rig = Rig::with(mtu, u64::MAX);
    assert!(rig.features & (1 << VIRTIO_NET_F_MTU) != 0 && rig.features & (1 << VIRTIO_NET_F_MQ) == 0);
    let expected =
        [&MAC[..], &[1, 0], &[1, 0], &9000u16.to_le_bytes(), &10_000u32.to_le_bytes(), &[1]].concat();
    assert_eq!(rig.config_bytes(0, 17), expected);
    assert_eq!(rig.config_bytes(16, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
    let (control, generation) = (rig.net.control(), rig.net.config_generation());
    control.set_link(true).unwrap();
    assert!(!rig.queue.config_changed() && rig.net.config_generation() == generation);
    control.set_link(false).unwrap();
    assert!(rig.queue.config_changed() && rig.net.config_generation() != generation);
    assert_eq!(rig.config_bytes(6, 2), [0, 0]);
    control.set_link(true).unwrap();
    assert_eq!(rig.config_bytes(6, 2), [1, 0]);
}

#[test]
fn limits_hold_in_each_direction() {
    let bucket = |per_second, burst| Some(TokenBucket { per_second, burst });
    let receive = Some(RateLimit { bytes: bucket(100_000, 10_000), packets: None });
    let transmit = Some(RateLimit { bytes: None, packets: bucket(100, 10) });
    let mut rig = Rig::with(NetConfig { receive, transmit, ..config() }, u64::MAX);
    let started = Instant::now();
    for _ in 0..30 {
        rig.transmit(&frame(PEER, 60));
        assert_eq!(rig.host.receive().len(), 60);
    }
    let took = started.elapsed();
    assert!((180..1500).contains(&took.as_millis()), "{took:?}");
    let started = Instant::now();
    for round in 0..4u64 {
        rig.offer(round * 8, 8, 2048);
        for number in 0..8 {
            rig.host.send(&frame(MAC, 1000));
            assert_eq!(collect(&mut rig, round * 8 + number, 1).1.len(), 1000);
        }
    }
    let took = started.elapsed();
    assert!((200..2000).contains(&took.as_millis()), "{took:?}");
}

#[test]
fn several_queues_take_frames_as_far_as_the_driver_wants() {
    let mut rig = Rig::with(NetConfig { queue_pairs: 2, ..config() }, u64::MAX);
    assert!(rig.features & (1 << VIRTIO_NET_F_MQ) != 0);
    assert_eq!(rig.config_bytes(8, 2), [2, 0]);
    let pairs = |rig: &mut Rig, count: u16| {
        rig.queue.write(COMMAND, &[VIRTIO_NET_CTRL_MQ as u8, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET as u8]);
        rig.queue.write(COMMAND + 2, &count.to_le_bytes());
        rig.queue.send(4, &[(COMMAND, 4, 0), (ANSWER, 1, WRITE)]);
        assert_eq!(rig.queue.wait_used(4), 1);
        rig.queue.read(ANSWER, 1)[0]
    };
    // All flows may come to either: the host's kernel tells them apart by a hash that each boot has another key for.
    for queue in [0, 2] {
        for number in 0..32 {
            rig.queue.send(queue, &[(RECEIVED + number * 0x1000, 2048, WRITE)]);
        }
    }
    let used = |rig: &mut Rig, queue| std::iter::from_fn(|| rig.queue.try_used(queue)).count();
    // Each flow, here each address, goes to one of the queues that are in use.
    let flows = |rig: &mut Rig| {
        for flow in 0..16u8 {
            let mut sent = frame(MAC, 100);
            sent[11] = flow;
            // IPv4 and UDP ports, by which flows are told apart.
            sent[12..38].copy_from_slice(&[
                8, 0, 0x45, 0, 0, 86, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, flow, 10, 0, 1, flow, flow, 1, 0,
                53,
            ]);
            rig.host.send(&sent);
        }
        let mut got = [0, 0];
        wait(|| {
            got = [got[0] + used(rig, 0), got[1] + used(rig, 2)];
            got[0] + got[1] >= 16
        });
        got
    };
    assert_eq!(flows(&mut rig), [16, 0], "one at first");
    assert_eq!([0, 3, u16::MAX].map(|count| pairs(&mut rig, count)), [ERR; 3]);
    assert_eq!(pairs(&mut rig, 2), OK);
    let [first, second] = flows(&mut rig);
    assert!(first < 16 && second > 0 && first + second == 16, "{first} {second}");
    // Both transmit.
    for queue in [1, 3] {
        rig.queue.write(SENT, &[0; 12]);
        rig.queue.write(SENT + 12, &frame(PEER, 60));
        rig.queue.send(queue, &[(SENT, 72, 0)]);
        assert_eq!(rig.queue.wait_used(queue), 0);
    }
    assert_eq!(pairs(&mut rig, 1), OK);
}

#[test]
fn a_saved_interface_goes_on_as_it_was() {
    let mut rig = Rig::new();
    assert_eq!(rig.command(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, &[0]), OK);
    assert_eq!(rig.command(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, &PEER), OK);
    rig.net.control().set_link(false).unwrap();
    rig.queue.stop();
    let saved = rig.net.save().unwrap();

    let mut clone = Host::new(1);
    let mut net = Net::new(&config(), std::mem::take(&mut clone.taps), Vec::new()).unwrap();
    net.restore(saved.clone()).unwrap();
    let mut bytes = [0; 8];
    net.read_config(0, &mut bytes);
    assert_eq!(bytes, [2, 0, 0, 0, 0, 2, 0, 0]);
    let mut queue = TestQueue::new();
    net.activate(queue.activation(3, rig.features)).unwrap();
    assert!(queue.config_changed(), "it is to say where it is");
    net.read_config(0, &mut bytes);
    assert_eq!(bytes[6..], [2, 0]);
    let mut rig = Rig { net, queue, host: clone, features: rig.features };
    assert_eq!(rig.command(VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, &[]), OK);
    assert_eq!(rig.config_bytes(6, 2), [0, 0]);
    rig.offer(0, 1, 2048);
    rig.host.send(&frame(MAC, 100));
    rig.host.send(&frame(PEER, 200));
    assert_eq!(collect(&mut rig, 0, 1).1.len(), 200, "the filter is that of the driver");

    let other = NetConfig { mac: PEER, ..config() };
    let mut net = Net::new(&other, Host::new(1).taps, Vec::new()).unwrap();
    let error = net.restore(saved).unwrap_err().to_string();
    assert!(error.contains("mac 02:00:00:00:00:02") && error.contains("02:00:00:00:00:01"), "{error}");
}

#[test]
fn configurations_and_descriptors_that_are_wrong_are_refused_by_name() {
    let taps = |count: usize| (0..count).map(|_| tempfile::tempfile().unwrap()).collect::<Vec<_>>();
    let refused = |config: NetConfig, count: usize, vhost: usize| {
        let error = Net::new(&config, taps(count), taps(vhost)).map(drop).unwrap_err();
        let cause = std::error::Error::source(&error).map(|source| format!(": {source}"));
        format!("{error}{}", cause.unwrap_or_default())
    };
    let none = Some(RateLimit { bytes: None, packets: Some(TokenBucket { per_second: 0, burst: 1 }) });
    for (config, count, vhost, says) in [
        (NetConfig { slot: 23, ..config() }, 1, 0, "slot: 23 given; must be 24 to 31"),
        (NetConfig { mac: [1; 6], ..config() }, 1, 0, "mac: must be"),
        (NetConfig { mac: [0; 6], ..config() }, 1, 0, "mac: must be"),
        (NetConfig { mtu: 67, ..config() }, 1, 0, "mtu: 67 given; must be 68 or more"),
        (NetConfig { queue_pairs: 0, ..config() }, 0, 0, "queue_pairs: 0 given; must be 1 to 32"),
        (NetConfig { queue_pairs: 33, ..config() }, 33, 0, "queue_pairs: 33 given"),
        (config(), 0, 0, "taps: 0 descriptors"),
        (config(), 1, 2, "vhost: 2 descriptors"),
        (NetConfig { transmit: none, ..config() }, 1, 0, "transmit: per_second and burst"),
        (config(), 1, 0, "taps[0]: it cannot be used as a tap's queue: Inappropriate ioctl"),
    ] {
        let error = refused(config, count, vhost);
        assert!(error.starts_with(says), "{error}");
    }
    // A tap of one queue for a device of two.
    let several = NetConfig { queue_pairs: 2, ..config() };
    let both = Host::new(1).taps.into_iter().chain(Host::new(1).taps).collect();
    let error = Net::new(&several, both, Vec::new()).map(drop).unwrap_err().to_string();
    assert!(error.starts_with("taps[0]"), "{error}");
}

#[test]
fn what_is_no_vhost_leaves_the_frames_to_the_monitor_and_says_so() {
    let host = Host::new(1);
    let net = Net::new(&config(), host.taps, vec![tempfile::tempfile().unwrap()]).unwrap();
    let metrics = net.control().metrics();
    assert_eq!(metrics.mover, NetMover::Nobody);
    assert!(metrics.fallback.unwrap().starts_with("VHOST_SET_OWNER"));
}
