//! Frames to the guest: merged buffers, buffers that are missing, frames too large.

use std::os::fd::AsRawFd;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::Net;
use super::super::testing::{ALL, Bench, MAC, MERGE, MemoryNet, frame, incoming};
use super::*;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{Buf, Driver, ram};

#[test]
fn a_long_frame_is_merged_from_as_many_buffers_as_it_needs() {
    let mut b = Bench::new(MERGE);
    b.post(60, 1536);
    // The first comes as a surprise and is copied in part, the second is expected; small ones follow.
    let sent = [frame(60_000, 1), frame(60_000, 2), frame(66, 3), frame(1536, 4), frame(1537, 5)];
    let needed = [40, 40, 1, 1, 2];
    incoming(&b, &sent[..1]);
    assert!(b.ready());
    b.expect(&sent[0], 40);
    b.post(60, 1536);
    incoming(&b, &sent[1..]);
    assert!(b.ready());
    for (f, count) in sent.iter().zip(needed).skip(1) {
        b.expect(f, count);
    }
    assert_eq!(b.net.inner().offered[..2], [1536, 40 * 1536]);
    // What was not needed is still the driver's: exactly the rest can be had.
    let rest = 120 - 40 - 44;
    incoming(&b, &[frame(rest * 1536, 6)]);
    assert!(!b.ready(), "none is left");
    b.expect(&frame(rest * 1536, 6), 36);
}

#[test]
fn without_merging_every_frame_takes_one_buffer_or_is_lost() {
    let mut b = Bench::new(0);
    b.post(3, 1526);
    incoming(&b, &[frame(66, 1), frame(1527, 2), frame(1526, 3)]);
    assert!(b.ready());
    b.expect(&frame(66, 1), 1);
    b.expect(&frame(1526, 3), 1);
    assert_eq!(b.received(), None);
}

#[test]
fn without_buffers_the_interface_waits() {
    let mut b = Bench::new(MERGE);
    incoming(&b, &[frame(100, 1)]);
    assert!(!b.ready());
    assert_eq!(b.net.inner().incoming.len(), 1, "the kernel keeps it");
    assert_eq!(b.rings[RX].avail_event(), 0, "the driver is asked to tell of the next buffer");
    b.post(3, 1536);
    assert!(b.process(RX).used);
    b.expect(&frame(100, 1), 1);
    // Not starved any more: a notification alone reads nothing.
    incoming(&b, &[frame(200, 2)]);
    assert!(!b.process(RX).used);
    assert!(b.ready());
    b.expect(&frame(200, 2), 1);
}

#[test]
fn a_frame_that_finds_too_few_buffers_waits_for_more() {
    let mut b = Bench::new(MERGE);
    b.post(3, 1536);
    incoming(&b, &[frame(6000, 1), frame(100, 2)]);
    assert!(!b.ready());
    assert_eq!(b.received(), None);
    assert_eq!(b.rings[RX].avail_event(), 3, "the fourth buffer is told of");
    // A start or another device's notification in between changes nothing.
    assert!(!b.process(RX).used);
    assert_eq!(b.rings[RX].avail_event(), 3);
    b.post(2, 1536);
    b.process(RX);
    b.expect(&frame(6000, 1), 4);
    b.expect(&frame(100, 2), 1);
}

#[test]
fn a_frame_larger_than_the_ring_is_lost_and_the_next_one_comes() {
    let mut b = Bench::new(MERGE);
    b.post(256, 100);
    incoming(&b, &[frame(25_601, 1), frame(25_600, 2)]);
    assert!(!b.ready(), "all buffers are used up");
    b.expect(&frame(25_600, 2), 256);
}

#[test]
fn a_burst_of_frames_is_bounded() {
    let mut b = Bench::new(MERGE);
    b.post(32, 1536);
    incoming(&b, &vec![frame(60, 1); 100]);
    assert!(!b.ready(), "32 buffers, then none");
    b.post(32, 1536);
    b.process(RX);
    assert_eq!(b.net.inner().incoming.len(), 36);
    b.post(64, 1536);
    b.process(RX);
    assert!(b.net.inner().incoming.is_empty());
}

#[test]
fn a_broken_interface_or_buffer_stops_reception() {
    let mut b = Bench::new(MERGE);
    b.post(2, 1536);
    b.net.inner().fault = Some(io::ErrorKind::Other);
    assert!(!b.ready(), "it would be readable for ever");
    b.net.inner().fault = None;
    incoming(&b, &[frame(100, 1)]);
    assert!(b.process(RX).used);
    let mut b = Bench::new(MERGE);
    b.post(1, 11);
    let (result, _) = b.call(|device, io| device.source_ready(0, io));
    assert!(matches!(result, Err(DriverFault::Request(_))));
}

/// The driver's rule for notifications with `EVENT_IDX` (virtio 1.3, 2.7.10.1), after `added` chains.
fn must_notify(event: u16, index: u16, added: u16) -> bool {
    index.wrapping_sub(event).wrapping_sub(1) < added
}

#[test]
fn a_frame_that_waits_is_told_of_new_buffers_also_when_no_input_follows() {
    let ram = ram(8 << 20);
    let readable = EventFd::new(EFD_NONBLOCK).unwrap();
    let net = MemoryNet::new(ALL).with_fd(readable.as_raw_fd());
    let device = Net::new("eth", MAC, None, Box::new(net.clone()));
    let mut driver = Driver::new(Box::new(device), &ram);
    let mut rings = driver.start(0x1_0000, &[256, 256, 64], 0);
    let buffer = Buf::writable(0x10_0000, 1536);
    for _ in 0..3 {
        rings[RX].add(&[buffer]);
    }
    driver.notify(0);
    net.inner().incoming.push_back(frame(6000, 1));
    readable.write(1).unwrap();
    driver.io.turn();
    readable.read().unwrap();
    driver.io.run();
    assert_eq!(rings[RX].used_idx(), 0);
    // Notifications that bring nothing leave the wish for the next buffer standing.
    for queue in [0, 1, 0] {
        driver.notify(queue);
        assert!(must_notify(rings[RX].avail_event(), 4, 1), "after queue {queue}");
    }
    rings[RX].add(&[buffer]);
    driver.notify(0);
    assert_eq!(rings[RX].used_idx(), 4);
}
