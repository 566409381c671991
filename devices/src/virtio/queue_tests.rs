//! Tests of the queue operations against a driver's ring.

use super::*;
use crate::virtio::testing::{Buf, DriverRing, F_INDIRECT, F_NEXT, F_WRITE, ram};
use proptest::prelude::*;

const RAM_LEN: usize = 0x2_0000;
const BASE: u64 = 0x1000;
const DATA: u64 = 0x8000;

fn setup(size: u16, event_idx: bool) -> (GuestRam, DriverRing, Vec<Queue>) {
    let ram = ram(RAM_LEN);
    let ring = DriverRing::new(&ram, BASE, size);
    let queues = vec![ring.device_queue(event_idx)];
    (ram, ring, queues)
}

/// The text of the fault that a pop ends in.
fn fault(ram: &GuestRam, queues: &mut [Queue]) -> String {
    QueueIo::new(ram, queues).pop(0).expect_err("a broken chain must not be popped").to_string()
}

#[test]
fn chains_come_out_in_order_and_go_back_in() {
    let (ram, mut ring, mut queues) = setup(4, false);
    let a = ring.add(&[Buf::readable(DATA, 16), Buf::writable(DATA + 0x100, 32)]);
    let b = ring.add(&[Buf::writable(DATA + 0x200, 1)]);
    let mut io = QueueIo::new(&ram, &mut queues);
    let first = io.pop(0).unwrap().unwrap();
    assert_eq!((first.head, first.readable_len(), first.writable_len()), (a, 16, 32));
    assert_eq!(first.readable[0], Span { addr: GuestAddress(DATA), len: 16 });
    let second = io.pop(0).unwrap().unwrap();
    assert_eq!((second.head, second.readable.len(), second.writable_len()), (b, 0, 1));
    assert!(io.pop(0).unwrap().is_none());
    io.undo_pop(0, 1);
    assert_eq!(io.pop(0).unwrap().unwrap().head, b);
    io.push(0, b, 1).unwrap();
    io.push(0, a, 32).unwrap();
    assert_eq!(io.finish().unwrap(), Signals { used: true, config: false });
    assert_eq!(ring.pop_used(), Some((b, 1)));
    assert_eq!(ring.pop_used(), Some((a, 32)));
    assert_eq!(ring.pop_used(), None);
}

#[test]
fn several_chains_are_published_at_once_around_the_ring() {
    let (ram, mut ring, mut queues) = setup(4, false);
    for round in 0..5u16 {
        let heads: Vec<u16> = (0..3).map(|_| ring.add(&[Buf::writable(DATA, 8)])).collect();
        let mut io = QueueIo::new(&ram, &mut queues);
        let used: Vec<(u16, u32)> =
            std::iter::from_fn(|| io.pop(0).unwrap()).map(|c| (c.head, 8)).collect();
        assert_eq!(ring.used_idx(), round * 3, "nothing is visible before the push");
        io.push_all(0, &used).unwrap();
        for head in heads {
            assert_eq!(ring.pop_used(), Some((head, 8)));
        }
    }
}

#[test]
fn a_queue_that_is_not_ready_or_not_there_is_empty() {
    let (ram, mut ring, mut queues) = setup(4, true);
    ring.add(&[Buf::readable(DATA, 1)]);
    queues[0].set_ready(false);
    for queue in [0, 1, usize::MAX] {
        let mut io = QueueIo::new(&ram, &mut queues);
        assert!(io.pop(queue).unwrap().is_none());
        io.undo_pop(queue, 1);
        io.push(queue, 0, 0).unwrap();
        io.disable_notification(queue).unwrap();
        assert!(!io.enable_notification(queue).unwrap());
        assert_eq!(io.finish().unwrap(), Signals::default());
    }
    assert_eq!(ring.used_idx(), 0);
}

#[test]
fn indices_that_jump_are_faults() {
    for idx in [5, 6, 0x8000, u16::MAX] {
        let (ram, mut ring, mut queues) = setup(4, false);
        ring.set_avail_idx(idx);
        assert!(fault(&ram, &mut queues).contains("jumps"), "index {idx}");
    }
}

#[test]
fn chains_never_given_back_fill_the_queue() {
    let (ram, mut ring, mut queues) = setup(4, false);
    for _ in 0..4 {
        ring.add(&[Buf::writable(DATA, 8)]);
        assert!(QueueIo::new(&ram, &mut queues).pop(0).unwrap().is_some());
    }
    ring.publish(0);
    assert!(fault(&ram, &mut queues).contains("in flight"));
    QueueIo::new(&ram, &mut queues).push(0, 0, 0).unwrap();
    assert!(QueueIo::new(&ram, &mut queues).pop(0).unwrap().is_some());
}

#[test]
fn broken_chains_are_faults() {
    let top = RAM_LEN as u64;
    type Case = (&'static str, fn(&DriverRing, u64));
    let cases: [Case; 11] = [
        ("a loop", |r, _| r.descriptor(r.desc, 0, DATA, 8, F_NEXT, 0)),
        ("past the end of its table", |r, _| r.descriptor(r.desc, 0, DATA, 8, F_NEXT, 4)),
        ("a buffer outside", |r, top| r.descriptor(r.desc, 0, top - 7, 8, 0, 0)),
        ("a buffer outside", |r, _| r.descriptor(r.desc, 0, u64::MAX - 3, 8, 0, 0)),
        ("a readable buffer after", |r, _| {
            r.descriptor(r.desc, 0, DATA, 8, F_WRITE | F_NEXT, 1);
            r.descriptor(r.desc, 1, DATA, 8, 0, 0);
        }),
        ("an indirect descriptor with a next", |r, _| {
            r.descriptor(r.desc, 0, DATA, 16, F_INDIRECT | F_NEXT, 1);
        }),
        ("whole number", |r, _| r.descriptor(r.desc, 0, DATA, 24, F_INDIRECT, 0)),
        ("whole number", |r, _| r.descriptor(r.desc, 0, DATA, 0, F_INDIRECT, 0)),
        ("table outside", |r, top| r.descriptor(r.desc, 0, top, 16, F_INDIRECT, 0)),
        ("names another", |r, _| {
            r.descriptor(r.desc, 0, DATA, 16, F_INDIRECT, 0);
            r.descriptor(DATA, 0, DATA, 16, F_INDIRECT, 0);
        }),
        ("a loop", |r, _| {
            r.descriptor(r.desc, 0, DATA, 0xffff_fff0, F_INDIRECT, 0);
            r.descriptor(DATA, 0, DATA, 8, F_NEXT, 0);
        }),
    ];
    for (expected, build) in cases {
        let (ram, mut ring, mut queues) = setup(4, false);
        build(&ring, top);
        ring.publish(0);
        let got = fault(&ram, &mut queues);
        assert!(got.contains(expected), "{got:?} instead of {expected:?}");
        assert_eq!(queues[0].next_avail(), 0, "a fault takes nothing");
    }
}

#[test]
fn a_head_outside_of_the_table_is_a_fault() {
    let (ram, mut ring, mut queues) = setup(4, false);
    ring.publish(4);
    assert!(fault(&ram, &mut queues).contains("past the end"));
}

#[test]
fn a_used_chain_outside_of_the_table_is_refused() {
    let (ram, _ring, mut queues) = setup(4, false);
    assert!(QueueIo::new(&ram, &mut queues).push(0, 4, 0).is_err());
}

#[test]
fn rings_outside_of_ram_are_faults_wherever_they_are_touched() {
    let (ram, ..) = setup(4, false);
    let far = Some(0xffff_fff0);
    for event_idx in [false, true] {
        let mut q = Queue::new(4).unwrap();
        q.set_desc_table_address(far, far);
        q.set_avail_ring_address(far, far);
        q.set_used_ring_address(far, far);
        q.set_event_idx(event_idx);
        q.set_ready(true);
        let queues = &mut [q][..];
        assert!(QueueIo::new(&ram, queues).pop(0).is_err());
        assert!(QueueIo::new(&ram, queues).enable_notification(0).is_err());
        let mut io = QueueIo::new(&ram, queues);
        assert!(io.push(0, 0, 0).is_err());
    }
}

#[test]
fn the_driver_is_interrupted_as_it_asks_by_flag() {
    let (ram, mut ring, mut queues) = setup(4, false);
    for (flags, expected) in [(0, true), (1, false)] {
        ring.set_avail_flags(flags);
        let head = ring.add(&[Buf::writable(DATA, 8)]);
        let mut io = QueueIo::new(&ram, &mut queues);
        io.pop(0).unwrap().unwrap();
        io.push(0, head, 0).unwrap();
        assert_eq!(io.finish().unwrap().used, expected);
    }
    assert!(!QueueIo::new(&ram, &mut queues).finish().unwrap().used, "nothing new");
}

#[test]
fn the_driver_is_interrupted_as_it_asks_by_event_index() {
    // (used_event, used before, pushed now, interrupt?), around the wrap too.
    let cases: [(u16, u16, u16, bool); 6] = [
        (0, 0, 1, true),
        (1, 0, 1, false),
        (1, 0, 2, true),
        (0, 1, 2, false),
        (u16::MAX, u16::MAX, 1, true),
        (0, u16::MAX, 1, false),
    ];
    for (event, before, pushed, expected) in cases {
        let (ram, ring, mut queues) = setup(4, true);
        queues[0].set_next_used(before);
        ring.set_used_event(event);
        let mut io = QueueIo::new(&ram, &mut queues);
        for head in 0..pushed {
            io.push(0, head, 0).unwrap();
        }
        assert_eq!(io.finish().unwrap().used, expected, "{event} {before} {pushed}");
    }
}

#[test]
fn notifications_are_asked_for_by_event_index_or_flag() {
    let (ram, mut ring, mut queues) = setup(4, true);
    ring.add(&[Buf::writable(DATA, 8)]);
    let mut io = QueueIo::new(&ram, &mut queues);
    assert!(io.enable_notification(0).unwrap(), "one is waiting");
    io.pop(0).unwrap().unwrap();
    assert!(!io.enable_notification(0).unwrap());
    assert_eq!(ring.avail_event(), 1);

    let (ram, ring, mut queues) = setup(4, false);
    let mut io = QueueIo::new(&ram, &mut queues);
    io.disable_notification(0).unwrap();
    assert_eq!(ring.used_flags(), 1);
    assert!(!io.enable_notification(0).unwrap());
    assert_eq!(ring.used_flags(), 0);
}

#[test]
fn a_changed_configuration_is_told() {
    let (ram, _ring, mut queues) = setup(4, false);
    let mut io = QueueIo::new(&ram, &mut queues);
    io.config_changed();
    assert_eq!(io.finish().unwrap(), Signals { used: false, config: true });
}

proptest! {
    /// Whatever lies in the rings: every pop ends, and what it returns is in RAM and in order.
    #[test]
    fn random_rings_are_popped_safely(
        descriptors in prop::collection::vec(
            (prop_oneof![0..RAM_LEN as u64, Just(BASE), any::<u64>()],
             prop_oneof![0..0x200u32, Just(16), Just(64), any::<u32>()], 0..8u16, 0..10u16), 8),
        heads in prop::collection::vec(0..9u16, 8),
        avail_idx in prop_oneof![0..9u16, any::<u16>()],
        event_idx: bool,
    ) {
        let (ram, mut ring, mut queues) = setup(8, event_idx);
        for (i, (addr, len, flags, next)) in (0..).zip(descriptors) {
            ring.descriptor(ring.desc, i, addr, len, flags, next);
        }
        for head in heads {
            ring.publish(head);
        }
        ring.set_avail_idx(avail_idx);
        let mut io = QueueIo::new(&ram, &mut queues);
        let mut popped = 0;
        while let Ok(Some(chain)) = io.pop(0) {
            popped += 1;
            prop_assert!(popped <= 8);
            for span in chain.readable.iter().chain(chain.writable.iter()) {
                prop_assert!(span.len > 0);
                prop_assert!(span.addr.0 + u64::from(span.len) <= RAM_LEN as u64);
            }
            let written = u32::try_from(chain.writable_len()).unwrap();
            io.push(0, chain.head, written).unwrap();
        }
        io.enable_notification(0).unwrap();
        io.finish().unwrap();
    }
}
