//! Tests of the transport's saved state: moves, the frozen encoding, hostile input.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_migration::state::{Saved, Section};

use super::*;
use crate::bus::BusDevice;
use crate::virtio::core::{F_EVENT_IDX, F_VERSION_1};
use crate::virtio::mmio::register;
use crate::virtio::testing::{Buf, Driver, DriverRing, Echo, Probe, moved, ram};
use proptest::prelude::*;

const RINGS: u64 = 0x1000;
const DATA: u64 = 0x8000;

fn live() -> (Driver, Vec<DriverRing>, Arc<Probe>) {
    let (echo, probe, _feed) = Echo::new();
    let mut driver = Driver::new(echo, &ram(0x2_0000));
    let rings = driver.start(RINGS, &[16, 8], 0);
    driver.io.run();
    (driver, rings, probe)
}

fn request(ring: &mut DriverRing) -> u16 {
    ring.add(&[Buf::readable(DATA, 4), Buf::writable(DATA + 0x100, 4)])
}

#[test]
fn a_move_loses_no_request() {
    let (mut source, mut rings, probe) = live();
    let done = request(&mut rings[0]);
    source.notify(0);
    assert_eq!(rings[0].pop_used(), Some((done, 4)));
    probe.hold.store(true, Ordering::SeqCst);
    let in_flight = [request(&mut rings[0]), request(&mut rings[0])];
    source.notify(0);
    let waiting = request(&mut rings[0]);

    let (echo, probe, _feed) = Echo::new();
    let mut destination = moved(&mut source, echo);
    assert_eq!(destination.read(register::INTERRUPT_STATUS), 1, "still pending");
    assert_eq!(Probe::get(&probe.activations), 0);
    destination.device.resume();
    assert_eq!(destination.line.edges(), 1, "raised again");
    assert_eq!(Probe::get(&probe.features), F_VERSION_1 | F_EVENT_IDX | Echo::FEATURE | 1 << 28);
    destination.io.run();
    let used: Vec<_> = std::iter::from_fn(|| rings[0].pop_used()).collect();
    assert_eq!(used, [(in_flight[0], 0), (in_flight[1], 0), (waiting, 4)]);
    assert_eq!(destination.status(), source.status());
}

#[test]
fn a_move_in_the_middle_of_the_initialization_goes_on() {
    let (echo, ..) = Echo::new();
    let mut source = Driver::new(echo, &ram(0x2_0000));
    let features = source.offered();
    assert!(source.negotiate(features));
    let mut ring = DriverRing::new(&source.ram, RINGS, 8);
    source.set_up(0, &ring);
    source.write(register::QUEUE_SEL, 1);
    source.write(register::QUEUE_SIZE, 0xdead_beef);
    let (echo, probe, _feed) = Echo::new();
    let mut destination = moved(&mut source, echo);
    destination.device.resume();
    assert_eq!(destination.io.run(), 0, "not started yet");
    destination.set_up(1, &DriverRing::new(&destination.ram, RINGS + 0x1000, 8));
    destination.add_status(status::DRIVER_OK);
    let head = request(&mut ring);
    destination.notify(0);
    assert_eq!(ring.pop_used(), Some((head, 4)));
    assert_eq!(Probe::get(&probe.activations), 1);
}

#[test]
fn a_broken_device_moves_broken() {
    let (mut source, mut rings, _) = live();
    rings[0].set_avail_idx(0x4000);
    source.notify(0);
    let (echo, probe, _feed) = Echo::new();
    let mut destination = moved(&mut source, echo);
    destination.device.resume();
    assert_ne!(destination.status() & status::NEEDS_RESET, 0);
    assert_eq!(destination.io.run(), 0);
    assert_eq!(Probe::get(&probe.activations), 0);
    let mut rings = destination.start(RINGS, &[16, 8], 0);
    let head = request(&mut rings[0]);
    destination.notify(0);
    assert_eq!(rings[0].pop_used(), Some((head, 4)));
}

#[test]
fn configuration_generations_differ_across_a_move() {
    let (mut source, ..) = live();
    let before = source.read(register::CONFIG_GENERATION);
    let mut destination = moved(&mut source, Echo::new().0);
    assert_ne!(destination.read(register::CONFIG_GENERATION), before);
}

/// A state with a different value in each field.
fn sample() -> TransportStateV1 {
    let queue = |at: u64, ready, next_avail, next_used| QueueStateV1 {
        size: 8,
        ready,
        descriptor_area: at,
        driver_area: at + 0x100,
        device_area: at + 0x200,
        next_avail,
        next_used,
    };
    TransportStateV1 {
        device_id: Echo::ID,
        status: 0x0f,
        device_features_sel: 1,
        driver_features_sel: 2,
        driver_features: F_VERSION_1 | Echo::FEATURE,
        queue_sel: 3,
        interrupt_status: 2,
        config_generation: 300,
        queues: vec![queue(0x1000, true, 0x102, 0xff), queue(0x2000, false, 0, 0)],
    }
}

fn destination() -> VirtioMmio {
    Driver::at_rest(Echo::new().0, &ram(0x1_0000)).device
}

fn section(version: u16, body: Vec<u8>) -> Section {
    Section { kind: "virtio-mmio".to_owned(), instance: 0, version, body }
}

/// The bytes of [`sample`] in version 1. Never changes.
const GOLDEN_V1: &[u8] = &[
    0x2a, 0x0f, 0x01, 0x02, 0xa0, 0x80, 0x80, 0x80, 0x10, 0x03, 0x02, 0xac, 0x02, 0x02, 0x08, 0x01,
    0x80, 0x20, 0x80, 0x22, 0x80, 0x24, 0x82, 0x02, 0xff, 0x01, 0x08, 0x00, 0x80, 0x40, 0x80, 0x42,
    0x80, 0x44, 0x00, 0x00,
];

#[test]
fn version_1_is_encoded_as_it_was_released() {
    let mut device = destination();
    device.restore_section(&section(1, GOLDEN_V1.to_vec())).unwrap();
    let mut expected = sample();
    expected.config_generation += 1;
    assert_eq!(device.save().unwrap(), expected);
    let mut device = destination();
    let mut before = sample();
    before.config_generation -= 1;
    device.restore(before).unwrap();
    assert_eq!(device.save_section(0).unwrap().body, GOLDEN_V1);
}

/// A destination restores an example first: a guest that reset its device since then has nothing of that any more.
#[test]
fn what_an_earlier_state_had_is_gone() {
    let mut device = destination();
    device.restore(sample()).unwrap();
    let mut state = sample();
    for queue in &mut state.queues {
        (queue.ready, queue.next_avail, queue.next_used) = (false, 0, 0);
    }
    device.restore(state.clone()).unwrap();
    let saved = device.save().unwrap();
    assert_eq!(saved.queues, state.queues);
    assert!(device.home().queues.iter().all(|queue| !queue.ready()));
}

#[test]
fn states_that_cannot_be_are_refused() {
    destination().restore(sample()).unwrap();
    type Case = (&'static str, fn(&mut TransportStateV1));
    let spoilers: [Case; 19] = [
        ("device 1", |s| s.device_id = 1),
        ("1 queues", |s| s.queues.truncate(1)),
        ("3 queues", |s| s.queues.push(s.queues[0].clone())),
        ("status", |s| s.status = 4),
        ("status", |s| s.status = 0x1f),
        ("status", |s| s.status = u32::MAX),
        ("features", |s| s.driver_features = Echo::FEATURE),
        ("features", |s| s.driver_features |= 1 << 50),
        ("interrupt", |s| s.interrupt_status = 4),
        ("size", |s| s.queues[0].size = 0),
        ("size", |s| s.queues[0].size = 32),
        ("size", |s| s.queues[0].size = 0x1_0008),
        ("size", |s| s.queues[0].size = 9),
        ("misaligned", |s| s.queues[0].descriptor_area += 1),
        ("outside", |s| s.queues[0].driver_area = 0xfffe),
        ("misaligned", |s| s.queues[0].driver_area |= 1),
        ("outside", |s| s.queues[0].device_area = u64::MAX - 3),
        ("in flight", |s| s.queues[0].next_avail += 6),
        ("in flight", |s| s.queues[0].next_used = s.queues[0].next_avail + 1),
    ];
    for (expected, spoil) in spoilers {
        let mut state = sample();
        spoil(&mut state);
        let got = destination().restore(state).unwrap_err().to_string();
        assert!(got.contains(expected), "{got:?} instead of {expected:?}");
    }
}

#[test]
fn what_a_driver_may_write_before_it_starts_is_no_reason_to_refuse() {
    let mut state = sample();
    state.status = 3;
    state.driver_features = u64::MAX;
    state.queues[0].size = u32::MAX;
    state.queues[0].driver_area = u64::MAX;
    let mut device = destination();
    device.restore(state).unwrap();
    device.resume();
}

#[test]
fn a_longer_or_shorter_body_is_refused() {
    for len in 0..GOLDEN_V1.len() {
        assert!(destination().restore_section(&section(1, GOLDEN_V1[..len].to_vec())).is_err());
    }
    let longer = [GOLDEN_V1, &[0]].concat();
    assert!(destination().restore_section(&section(1, longer)).is_err());
    assert!(destination().restore_section(&section(2, GOLDEN_V1.to_vec())).is_err());
}

proptest! {
    /// Any bytes, and any flips of good bytes: refused, or a device that runs without panicking.
    #[test]
    fn hostile_states_do_no_harm(
        random in prop::collection::vec(any::<u8>(), 0..80),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        use_random: bool,
    ) {
        let mut body = if use_random { random } else { GOLDEN_V1.to_vec() };
        for (at, to) in flips {
            if !body.is_empty() {
                let index = at.index(body.len());
                body[index] = to;
            }
        }
        let mut driver = Driver::at_rest(Echo::new().0, &ram(0x1_0000));
        if driver.device.restore_section(&section(1, body)).is_ok() {
            driver.device.resume();
            driver.io.run();
            driver.save();
        }
    }
}
