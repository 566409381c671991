//! Property tests of the whole transport: any register accesses, any content of the rings, stops, moves
//! and input in any order. Nothing panics, each step ends, and the status stays one that can be.

use std::sync::atomic::Ordering;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use crate::bus::BusDevice;
use crate::virtio::core::{F_EVENT_IDX, status};
use crate::virtio::mmio::register;
use crate::virtio::testing::{Buf, Driver, DriverRing, Echo, moved, ram};

const RAM_LEN: u64 = 0x1_0000;
const RINGS: u64 = 0x1000;
/// Where the second ring is, if the first has 16 entries.
const SECOND: u64 = 0x2000;

#[derive(Clone, Debug)]
enum Step {
    Read { offset: u64, width: usize },
    Write { offset: u64, value: u64, width: usize },
    Register { index: usize, value: u32 },
    Start { event_idx: bool },
    Request { readable: (u64, u32), writable: (u64, u32) },
    Publish { head: u16 },
    AvailIndex { index: u16 },
    Descriptor { index: u16, addr: u64, len: u32, flags: u16, next: u16 },
    Scribble { at: u64, bytes: Vec<u8> },
    Notify { queue: u32 },
    Feed,
    Hold(bool),
    Work,
    Stop,
    Go,
    Move,
}

/// An address that often is in RAM, sometimes at its end or in the rings, or anything.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0x8000..RAM_LEN,
        1 => RINGS..SECOND + 0x200,
        1 => Just(RINGS),
        1 => RAM_LEN - 64..RAM_LEN + 64,
        1 => any::<u64>(),
    ]
}

/// A length, often that of an indirect table.
fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0..0x400u32,
        2 => (1..20u32).prop_map(|n| 16 * n),
        1 => any::<u32>(),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let offset = prop_oneof![4 => 0..0x120u64, 1 => any::<u64>()];
    let value = prop_oneof![2 => 0..0x100u64, 1 => any::<u64>()];
    let word = prop_oneof![2 => 0..0x20u32, 1 => any::<u32>()];
    prop_oneof![
        1 => (offset.clone(), 0..9usize).prop_map(|(offset, width)| Step::Read { offset, width }),
        1 => (offset, value, 0..9usize).prop_map(|(offset, value, width)| {
            Step::Write { offset, value, width }
        }),
        4 => (0..64usize, word).prop_map(|(index, value)| Step::Register { index, value }),
        3 => any::<bool>().prop_map(|event_idx| Step::Start { event_idx }),
        6 => ((address(), length()), (address(), length()))
            .prop_map(|(readable, writable)| Step::Request { readable, writable }),
        1 => (0..20u16).prop_map(|head| Step::Publish { head }),
        1 => any::<u16>().prop_map(|index| Step::AvailIndex { index }),
        2 => (0..16u16, address(), length(), 0..8u16, 0..20u16).prop_map(
            |(index, addr, len, flags, next)| Step::Descriptor { index, addr, len, flags, next }),
        2 => (RINGS..SECOND + 0x200, prop::collection::vec(any::<u8>(), 1..40))
            .prop_map(|(at, bytes)| Step::Scribble { at, bytes }),
        4 => (0..3u32).prop_map(|queue| Step::Notify { queue }),
        1 => Just(Step::Feed),
        1 => any::<bool>().prop_map(Step::Hold),
        6 => Just(Step::Work),
        1 => Just(Step::Stop),
        2 => Just(Step::Go),
        1 => Just(Step::Move),
    ]
}

fn check(driver: &mut Driver) -> Result<(), TestCaseError> {
    let status = driver.status();
    let known = [
        status::ACKNOWLEDGE,
        status::DRIVER,
        status::FEATURES_OK,
        status::DRIVER_OK,
        status::NEEDS_RESET,
        status::FAILED,
    ];
    prop_assert_eq!(status & !known.iter().sum::<u32>(), 0);
    for pair in known[..4].windows(2) {
        prop_assert!(status & pair[1] == 0 || status & pair[0] != 0, "status {:#x}", status);
    }
    prop_assert_eq!(driver.read(register::INTERRUPT_STATUS) & !3, 0);
    Ok(())
}

struct World {
    driver: Driver,
    rings: Vec<DriverRing>,
    probe: std::sync::Arc<crate::virtio::testing::Probe>,
    feed: std::os::fd::OwnedFd,
}

impl World {
    fn new() -> Self {
        let (echo, probe, feed) = Echo::new();
        let ram = ram(usize::try_from(RAM_LEN).unwrap());
        let driver = Driver::new(echo, &ram);
        let rings = vec![DriverRing::new(&ram, RINGS, 16), DriverRing::new(&ram, SECOND, 8)];
        Self { driver, rings, probe, feed }
    }

    fn take(&mut self, step: Step) {
        let Self { driver, rings, probe, feed } = self;
        match step {
            Step::Read { offset, width } => driver.device.read(offset, &mut [0; 8][..width.min(8)]),
            Step::Write { offset, value, width } => {
                driver.device.write(offset, &value.to_le_bytes()[..width.min(8)]);
            }
            Step::Register { index, value } => driver.write(4 * index as u64, value),
            Step::Start { event_idx } => {
                *rings = driver.start(RINGS, &[16, 8], if event_idx { 0 } else { F_EVENT_IDX });
            }
            Step::Request { readable, writable } => {
                let bufs =
                    [Buf::readable(readable.0, readable.1), Buf::writable(writable.0, writable.1)];
                rings[0].add(&bufs);
                rings[1].add(&bufs[1..]);
            }
            Step::Publish { head } => rings[0].publish(head),
            Step::AvailIndex { index } => rings[0].set_avail_idx(index),
            Step::Descriptor { index, addr, len, flags, next } => {
                rings[0].descriptor(rings[0].desc, index, addr, len, flags, next);
            }
            Step::Scribble { at, bytes } => {
                driver.ram.write_slice(&bytes, GuestAddress(at)).unwrap();
            }
            Step::Notify { queue } => driver.write(register::QUEUE_NOTIFY, queue),
            Step::Feed => drop(rustix::io::write(&*feed, b"x")),
            Step::Hold(hold) => probe.hold.store(hold, Ordering::SeqCst),
            // Not until idle: rings may lie in each other and feed themselves for ever, at the guest's
            // own expense. A single turn always ends.
            Step::Work => drop(driver.io.turn()),
            Step::Stop => driver.device.quiesce(),
            Step::Go => driver.device.resume(),
            Step::Move => {
                let (echo, new_probe, new_feed) = Echo::new();
                *driver = moved(driver, echo);
                (*probe, *feed) = (new_probe, new_feed);
            }
        }
    }
}

proptest! {
    #[test]
    fn any_driver_is_survived(steps in prop::collection::vec(step(), 0..60)) {
        let mut world = World::new();
        for step in steps {
            world.take(step);
            check(&mut world.driver)?;
        }
        // Whatever happened: a reset always helps.
        world.driver.device.resume();
        world.probe.hold.store(false, Ordering::SeqCst);
        let mut rings = world.driver.start(RINGS, &[16, 8], 0);
        let head = rings[0].add(&[Buf::readable(0x8000, 4), Buf::writable(0x9000, 4)]);
        world.driver.write(register::QUEUE_NOTIFY, 0);
        for _ in 0..4 {
            world.driver.io.turn();
        }
        prop_assert_eq!(rings[0].pop_used(), Some((head, 4)));
    }
}
