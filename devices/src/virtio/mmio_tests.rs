//! Tests of the transport through its register map, as a driver and as a machine that stops and starts.

use std::sync::atomic::Ordering;

use super::*;
use crate::virtio::core::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, status};
use crate::virtio::interrupt::{CONFIG_CHANGE, USED_BUFFER};
use crate::virtio::testing::{Buf, Driver, DriverRing, Echo, F_NEXT, Probe, ram};
use vm_memory::{Bytes, GuestAddress};

const RAM_LEN: usize = 0x2_0000;
const RINGS: u64 = 0x1000;
const DATA: u64 = 0x8000;

/// A running machine whose device waits for its driver.
fn setup() -> (Driver, Arc<Probe>, std::os::fd::OwnedFd) {
    let (echo, probe, feed) = Echo::new();
    (Driver::new(echo, &ram(RAM_LEN)), probe, feed)
}

/// Makes an echo request of `text` available.
fn request(driver: &Driver, ring: &mut DriverRing, text: &str) -> u16 {
    let len = u32::try_from(text.len()).unwrap();
    driver.ram.write_slice(text.as_bytes(), GuestAddress(DATA)).unwrap();
    ring.add(&[Buf::readable(DATA, len), Buf::writable(DATA + 0x100, len)])
}

/// Sends a request and expects its answer.
fn works(driver: &mut Driver, ring: &mut DriverRing) {
    let head = request(driver, ring, "ping");
    driver.notify(0);
    assert_eq!(ring.pop_used(), Some((head, 4)));
    assert_eq!(&driver.ram.read_obj::<[u8; 4]>(GuestAddress(DATA + 0x100)).unwrap(), b"ping");
}

#[test]
fn the_register_map_identifies_the_device() {
    let (mut driver, ..) = setup();
    assert_eq!(driver.read(register::MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(driver.read(register::VERSION), 2);
    assert_eq!(driver.read(register::DEVICE_ID), Echo::ID);
    assert_eq!(driver.read(register::VENDOR_ID).to_le_bytes(), *b"vmm\0");
    for (queue, size) in [(0, 16), (1, 8), (2, 0), (u32::MAX, 0)] {
        driver.write(register::QUEUE_SEL, queue);
        assert_eq!(driver.read(register::QUEUE_SIZE_MAX), size);
    }
    for offset in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(driver.read(offset), u32::MAX, "there is no shared memory");
    }
    let features = Echo::FEATURE | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC;
    assert_eq!(driver.offered(), features);
    driver.write(register::DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.read(register::DEVICE_FEATURES), 0);
    for unknown in [0x18, 0x40, 0xc0, register::QUEUE_NOTIFY] {
        assert_eq!(driver.read(unknown), 0);
    }
}

#[test]
fn accesses_of_odd_width_or_offset_do_nothing() {
    let (mut driver, ..) = setup();
    for len in [0, 1, 2, 3, 8, 16] {
        let mut data = vec![0xee; len];
        driver.device.read(register::MAGIC_VALUE, &mut data);
        assert_eq!(data, vec![0; len]);
        driver.device.write(register::STATUS, &vec![1; len]);
    }
    let mut word = [0xee; 4];
    driver.device.read(2, &mut word);
    assert_eq!(word, [0; 4]);
    driver.device.write(register::STATUS + 1, &[1, 0, 0, 0]);
    driver.device.write(u64::MAX - 3, &[1, 0, 0, 0]);
    assert_eq!(driver.status(), 0);
}

#[test]
fn the_configuration_is_read_in_every_width() {
    let (mut driver, ..) = setup();
    for (offset, len, expected) in [
        (0, 1, &[1][..]),
        (1, 2, &[2, 3]),
        (4, 4, &[5, 6, 7, 8]),
        (0, 8, &Echo::CONFIG),
        (6, 4, &[7, 8, 0, 0]),
        (0xe00, 4, &[0; 4]),
        (0, 3, &[0; 3]),
    ] {
        let mut data = vec![0xee; len];
        driver.device.read(register::CONFIG + offset, &mut data);
        assert_eq!(data, expected);
    }
    driver.device.read(u64::MAX, &mut [0; 8]);
    driver.device.write(register::CONFIG, &[9]);
    assert_eq!(driver.read(register::CONFIG).to_le_bytes(), [1, 2, 3, 4]);
}

#[test]
fn a_request_goes_through_with_and_without_event_index() {
    for refused in [0, F_EVENT_IDX, F_INDIRECT_DESC] {
        let (mut driver, probe, _feed) = setup();
        let mut rings = driver.start(RINGS, &[16, 8], refused);
        let features = driver.offered() & !refused;
        assert_eq!(Probe::get(&probe.features), features);
        works(&mut driver, &mut rings[0]);
        assert_eq!(driver.acknowledge(), USED_BUFFER);
        assert_eq!(driver.read(register::INTERRUPT_STATUS), 0);
        assert_eq!(driver.line.edges(), 1);
        let more: Vec<u16> = (0..7).map(|_| request(&driver, &mut rings[0], "x")).collect();
        driver.notify(0);
        let used: Vec<u16> = (0..7).map(|_| rings[0].pop_used().unwrap().0).collect();
        assert_eq!(used, more);
    }
}

#[test]
fn an_event_index_in_the_future_holds_interrupts_back() {
    let (mut driver, ..) = setup();
    let mut rings = driver.start(RINGS, &[16, 8], 0);
    rings[0].set_used_event(1);
    works(&mut driver, &mut rings[0]);
    assert_eq!((driver.acknowledge(), driver.line.edges()), (0, 0));
    works(&mut driver, &mut rings[0]);
    assert_eq!((driver.acknowledge(), driver.line.edges()), (USED_BUFFER, 1));
}

#[test]
fn a_long_queue_yields_to_others_and_is_finished_later() {
    let (mut driver, ..) = setup();
    let mut rings = driver.start(RINGS, &[16, 8], 0);
    driver.io.run();
    for _ in 0..10 {
        request(&driver, &mut rings[0], "x");
    }
    driver.write(register::QUEUE_NOTIFY, 0);
    driver.io.turn();
    assert_eq!(rings[0].used_idx(), 4, "one call a round, and so many rounds");
    driver.io.run();
    assert_eq!(rings[0].used_idx(), 10);
}

#[test]
fn input_waits_for_buffers_without_spinning() {
    let (mut driver, probe, feed) = setup();
    let mut rings = driver.start(RINGS, &[16, 8], 0);
    rustix::io::write(&feed, b"ab").unwrap();
    driver.io.run();
    assert_eq!(Probe::get(&probe.inputs), 1, "without a buffer it is asked once");
    rings[1].add(&[Buf::writable(DATA, 1)]);
    rings[1].add(&[Buf::writable(DATA + 1, 1)]);
    rings[1].add(&[Buf::writable(DATA + 2, 1)]);
    driver.notify(1);
    assert_eq!(rings[1].used_idx(), 2);
    assert_eq!(&driver.ram.read_obj::<[u8; 2]>(GuestAddress(DATA)).unwrap(), b"ab");
    // A buffer is left, and no input: neither spins, and input is seen when it comes.
    assert_eq!(driver.io.run(), 0);
    rustix::io::write(&feed, b"c").unwrap();
    driver.io.run();
    assert_eq!(rings[1].used_idx(), 3);
    drop(feed);
    driver.io.run();
    assert_eq!(driver.status() & status::NEEDS_RESET, 0, "input that ends is no fault");
    works(&mut driver, &mut rings[0]);
}

#[test]
fn a_changed_configuration_is_told_and_generations_differ() {
    let (mut driver, probe, _feed) = setup();
    let mut rings = driver.start(RINGS, &[16, 8], 0);
    driver.io.run();
    let before = driver.read(register::CONFIG_GENERATION);
    assert_eq!(driver.read(register::CONFIG_GENERATION), before);
    probe.change_config.store(true, Ordering::SeqCst);
    works(&mut driver, &mut rings[0]);
    assert_eq!(driver.acknowledge(), USED_BUFFER | CONFIG_CHANGE);
    assert_ne!(driver.read(register::CONFIG_GENERATION), before);
    assert_eq!(driver.read(register::CONFIG).to_le_bytes(), [1, 2, 0xaa, 0xbb]);
}

#[test]
fn a_driver_without_version_1_or_with_foreign_features_is_refused() {
    let (mut driver, probe, _feed) = setup();
    assert!(!driver.negotiate(Echo::FEATURE));
    assert!(!driver.negotiate(F_VERSION_1 | 1 << 40));
    driver.add_status(status::DRIVER_OK);
    assert_eq!(driver.status(), status::ACKNOWLEDGE | status::DRIVER);
    assert_eq!(Probe::get(&probe.activations), 0);
    let mut rings = driver.start(RINGS, &[16, 8], 0);
    works(&mut driver, &mut rings[0]);
}

#[test]
fn driver_ok_twice_starts_once() {
    let (mut driver, probe, _feed) = setup();
    let mut rings = driver.start(RINGS, &[16, 8], 0);
    driver.add_status(status::DRIVER_OK);
    driver.add_status(status::DRIVER_OK | status::FEATURES_OK);
    assert_eq!(Probe::get(&probe.activations), 1);
    works(&mut driver, &mut rings[0]);
}

#[test]
fn notifications_before_the_start_or_of_no_queue_do_no_harm() {
    let (mut driver, probe, _feed) = setup();
    driver.notify(0);
    driver.notify(7);
    driver.notify(u32::MAX);
    assert_eq!(Probe::get(&probe.calls), 0);
    // The first queue only is set up, and a request waits before the start.
    let features = driver.offered();
    assert!(driver.negotiate(features));
    let mut ring = DriverRing::new(&driver.ram, RINGS, 16);
    driver.set_up(0, &ring);
    let head = request(&driver, &mut ring, "early");
    driver.add_status(status::DRIVER_OK);
    driver.notify(1);
    assert_eq!(ring.pop_used(), Some((head, 5)), "served without a notification of its own");
    assert!(Probe::get(&probe.calls) > 0);
}

#[test]
fn queues_that_cannot_be_used_break_the_device_until_reset() {
    let spoilers: [fn(&mut DriverRing); 5] = [
        |r| r.desc += 8,
        |r| r.avail += 1,
        |r| r.used = RAM_LEN as u64 - 8,
        |r| r.desc = 0xffff_ffff_ffff_fff0,
        |r| r.size = 12,
    ];
    for spoil in spoilers {
        let (mut driver, probe, _feed) = setup();
        let features = driver.offered();
        assert!(driver.negotiate(features));
        let mut ring = DriverRing::new(&driver.ram, RINGS, 16);
        spoil(&mut ring);
        driver.set_up(0, &ring);
        assert_eq!(driver.status() & status::NEEDS_RESET, 0, "not before it would be used");
        driver.add_status(status::DRIVER_OK);
        assert_ne!(driver.status() & status::NEEDS_RESET, 0);
        assert_eq!(driver.acknowledge(), CONFIG_CHANGE);
        assert_eq!(driver.line.edges(), 1);
        driver.notify(0);
        assert_eq!(Probe::get(&probe.calls), 0);
        let mut rings = driver.start(RINGS, &[16, 8], 0);
        works(&mut driver, &mut rings[0]);
    }
}

#[test]
fn a_broken_ring_stops_the_device_until_reset() {
    let breakers: [fn(&mut DriverRing); 3] = [
        |r| {
            r.descriptor(r.desc, 0, DATA, 1, F_NEXT, 0);
            r.publish(0);
        },
        |r| r.set_avail_idx(0x4000),
        |r| {
            r.add(&[Buf::readable(0x7fff_0000, 16)]);
        },
    ];
    for spoil in breakers {
        let (mut driver, _probe, feed) = setup();
        let mut rings = driver.start(RINGS, &[16, 8], 0);
        works(&mut driver, &mut rings[0]);
        driver.acknowledge();
        let mut fresh = driver.start(RINGS, &[16, 8], 0);
        spoil(&mut fresh[0]);
        driver.notify(0);
        assert_ne!(driver.status() & status::NEEDS_RESET, 0);
        assert_eq!(driver.acknowledge(), CONFIG_CHANGE);
        rustix::io::write(&feed, b"x").unwrap();
        driver.write(register::QUEUE_NOTIFY, 0);
        assert_eq!(driver.io.run(), 0, "a broken device waits for nothing");
        driver.device.quiesce();
        driver.device.resume();
        assert_eq!(driver.io.run(), 0, "not even after a stop");
        let mut rings = driver.start(RINGS, &[16, 8], 0);
        assert_eq!(driver.status() & status::NEEDS_RESET, 0);
        works(&mut driver, &mut rings[0]);
    }
}

#[test]
fn a_reset_of_a_live_device_brings_everything_home() {
    let (mut driver, probe, feed) = setup();
    probe.hold.store(true, Ordering::SeqCst);
    let mut rings = driver.start(RINGS, &[16, 8], 0);
    request(&driver, &mut rings[0], "in flight");
    driver.notify(0);
    driver.write(register::QUEUE_NOTIFY, 0);
    rustix::io::write(&feed, b"x").unwrap();
    let resets = Probe::get(&probe.resets);
    driver.write(register::STATUS, 0);
    assert_eq!(Probe::get(&probe.resets), resets + 1);
    assert_eq!(driver.io.run(), 0, "nothing is lent any more");
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.read(register::INTERRUPT_STATUS), 0);
    driver.write(register::QUEUE_SEL, 0);
    assert_eq!(driver.read(register::QUEUE_READY), 0);
    assert!(!driver.device_ready(0));
    driver.write(register::STATUS, 0);
    probe.hold.store(false, Ordering::SeqCst);
    let mut rings = driver.start(RINGS, &[16, 8], 0);
    works(&mut driver, &mut rings[0]);
    assert_eq!(rings[0].pop_used(), None, "the chain from before the reset never comes back");
    assert_eq!(Probe::get(&probe.activations), 2);
}

#[test]
fn a_queue_can_be_taken_away_and_given_again_while_live() {
    let (mut driver, ..) = setup();
    let mut rings = driver.start(RINGS, &[16, 8], 0);
    works(&mut driver, &mut rings[0]);
    driver.write(register::QUEUE_SEL, 0);
    driver.write(register::QUEUE_READY, 0);
    assert_eq!(driver.read(register::QUEUE_READY), 0);
    request(&driver, &mut rings[0], "ignored");
    driver.notify(0);
    assert_eq!(rings[0].pop_used(), None);
    let mut ring = DriverRing::new(&driver.ram, RINGS, 8);
    driver.set_up(0, &ring);
    works(&mut driver, &mut ring);
    // The second time with a ring that can't be.
    driver.write(register::QUEUE_READY, 0);
    ring.used += 1;
    driver.set_up(0, &ring);
    assert_ne!(driver.status() & status::NEEDS_RESET, 0);
    assert_eq!(driver.io.run(), 0);
}

#[test]
fn nothing_moves_while_the_machine_stands_still() {
    let (mut driver, probe, _feed) = setup();
    let mut rings = driver.start(RINGS, &[16, 8], 0);
    works(&mut driver, &mut rings[0]);
    let edges = driver.line.edges();
    let head = request(&driver, &mut rings[0], "late");
    driver.write(register::QUEUE_NOTIFY, 0);
    driver.device.quiesce();
    assert_eq!(Probe::get(&probe.drains), 1);
    assert_eq!(driver.io.run(), 0);
    assert_eq!(rings[0].pop_used(), None);
    driver.device.resume();
    assert_eq!(driver.line.edges(), edges + 1, "the pending interrupt is raised again");
    driver.io.run();
    assert_eq!(rings[0].pop_used(), Some((head, 4)));
    assert_eq!(Probe::get(&probe.activations), 1);
}

#[test]
fn a_request_made_without_notification_is_found_after_a_stop() {
    let (mut driver, ..) = setup();
    let mut rings = driver.start(RINGS, &[16, 8], 0);
    driver.io.run();
    driver.device.quiesce();
    let head = request(&driver, &mut rings[0], "silent");
    driver.device.resume();
    driver.io.run();
    assert_eq!(rings[0].pop_used(), Some((head, 6)));
}

#[test]
fn more_queues_than_a_device_may_have_are_refused() {
    use crate::virtio::testing::{CountingLine, IoLoop, Odd};
    for sizes in [vec![8; QUEUES_MAX + 1], vec![0], vec![12]] {
        let (line, io) = (Arc::new(CountingLine::default()), Box::new(IoLoop::new()));
        let device = Box::new(Odd::new(sizes));
        let result = VirtioMmio::new(device, ram(0x1000), line, io, Arc::default());
        assert_eq!(result.err().unwrap().kind(), io::ErrorKind::InvalidInput);
    }
}
