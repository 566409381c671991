//! Tests of the status machine alone.

use std::sync::Arc;

use super::*;
use crate::virtio::testing::{CountingLine, ram};
use proptest::prelude::*;

const OWN: u64 = 1 << 3;
const NEGOTIATING: u32 = ACKNOWLEDGE | DRIVER;

fn core() -> TransportCore {
    TransportCore::new(1, OWN, &[16, 4], Interrupt::new(Arc::new(CountingLine::default())))
}

fn accept(core: &mut TransportCore, features: u64) -> Result<Effect, Refusal> {
    for half in [0, 1] {
        core.driver_features_sel = half;
        core.set_driver_features_word(word(features, half)).unwrap();
    }
    core.set_status(NEGOTIATING | FEATURES_OK)
}

#[test]
fn the_steps_are_taken_in_order() {
    let mut core = core();
    for early in [DRIVER, FEATURES_OK, DRIVER_OK, ACKNOWLEDGE | DRIVER_OK, NEGOTIATING | DRIVER_OK]
    {
        assert!(core.set_status(early).is_err(), "{early:#x}");
        assert_eq!(core.status(), 0);
    }
    assert_eq!(core.set_status(ACKNOWLEDGE), Ok(Effect::None));
    assert_eq!(core.set_status(NEGOTIATING), Ok(Effect::None));
    assert!(core.set_status(ACKNOWLEDGE).is_err(), "cleared without a reset");
    assert_eq!(accept(&mut core, F_VERSION_1 | OWN), Ok(Effect::None));
    let all = NEGOTIATING | FEATURES_OK | DRIVER_OK;
    assert_eq!(core.set_status(all), Ok(Effect::Start));
    assert!(core.live());
    assert_eq!(core.set_status(all), Ok(Effect::None), "it starts once");
    assert_eq!(core.set_status(all | FAILED), Ok(Effect::None));
    assert_eq!(core.set_status(0), Ok(Effect::Reset));
    core.reset();
    assert_eq!((core.status(), core.driver_features(), core.live()), (0, 0, false));
}

#[test]
fn unknown_bits_and_the_devices_own_are_not_the_drivers() {
    let mut core = core();
    core.set_status(ACKNOWLEDGE | NEEDS_RESET | 0xffff_ff30).unwrap();
    assert_eq!(core.status(), ACKNOWLEDGE);
    core.interrupt.fail();
    assert_eq!(core.status(), ACKNOWLEDGE | NEEDS_RESET);
    core.set_status(NEGOTIATING).unwrap();
    assert_eq!(core.status(), NEGOTIATING | NEEDS_RESET);
}

#[test]
fn only_offered_features_and_version_1_are_accepted() {
    for (features, ok) in [
        (F_VERSION_1, true),
        (F_VERSION_1 | OWN | F_EVENT_IDX | F_INDIRECT_DESC, true),
        (OWN, false),
        (0, false),
        (F_VERSION_1 | 1 << 4, false),
        (F_VERSION_1 | 1 << 63, false),
    ] {
        let mut core = core();
        core.set_status(NEGOTIATING).unwrap();
        assert_eq!(accept(&mut core, features).is_ok(), ok, "{features:#x}");
        assert_eq!(core.status() & FEATURES_OK != 0, ok);
        if !ok {
            assert_eq!(core.status(), NEGOTIATING, "the driver may try again");
            assert!(accept(&mut core, F_VERSION_1).is_ok());
        }
        assert!(core.set_driver_features_word(0).is_err(), "the negotiation is over");
    }
}

#[test]
fn a_refused_negotiation_starts_nothing() {
    let mut core = core();
    core.set_status(NEGOTIATING).unwrap();
    assert!(core.set_status(NEGOTIATING | FEATURES_OK | DRIVER_OK).is_err());
    assert_eq!(core.status(), NEGOTIATING);
}

#[test]
fn queues_are_set_up_between_negotiation_and_ready() {
    let mut core = core();
    assert!(core.set_queue_size(4).is_err());
    assert!(core.set_queue_ready(true).is_err());
    core.set_status(NEGOTIATING).unwrap();
    accept(&mut core, F_VERSION_1).unwrap();
    core.set_queue_size(8).unwrap();
    core.set_queue_area(Area::Driver, 0, 0x1000).unwrap();
    core.set_queue_area(Area::Driver, 1, 0x1).unwrap();
    assert_eq!(core.set_queue_ready(true), Ok(None));
    assert_eq!(core.queue().unwrap().driver_area, 0x1_0000_1000);
    assert!(core.set_queue_size(4).is_err());
    assert!(core.set_queue_area(Area::Driver, 0, 0).is_err());
    core.queue_sel = 2;
    assert!(core.queue().is_none());
    assert!(core.set_queue_size(4).is_err());
    core.queue_sel = u32::MAX;
    assert_eq!(core.set_queue_ready(true), Ok(None), "there is no such queue");
}

#[test]
fn a_live_device_hears_of_a_queue_at_once() {
    let mut core = core();
    core.set_status(NEGOTIATING).unwrap();
    accept(&mut core, F_VERSION_1).unwrap();
    core.set_status(NEGOTIATING | FEATURES_OK | DRIVER_OK).unwrap();
    core.queue_sel = 1;
    assert_eq!(core.set_queue_ready(true), Ok(Some(1)));
    assert_eq!(core.set_queue_ready(true), Ok(None), "nothing changed");
    assert_eq!(core.set_queue_ready(false), Ok(Some(1)));
}

#[test]
fn queues_that_cannot_be_are_not_built() {
    let good = QueueSetup {
        size_max: 16,
        size: 16,
        descriptor_area: 0x1000,
        driver_area: 0x2002,
        device_area: 0x3004,
        ready: true,
    };
    let ram = ram(0x1_0000);
    let end = 0x1_0000;
    let queue = good.build(&ram, true).unwrap();
    assert!(queue.ready() && queue.event_idx_enabled());
    type Case = (&'static str, fn(&mut QueueSetup, u64));
    let bad: [Case; 10] = [
        ("size", |q, _| q.size = 0),
        ("size", |q, _| q.size = 3),
        ("size", |q, _| q.size = 32),
        ("size", |q, _| q.size = 0x1_0010),
        ("misaligned", |q, _| q.descriptor_area += 8),
        ("misaligned", |q, _| q.driver_area += 1),
        ("misaligned", |q, _| q.device_area += 2),
        ("outside", |q, end| q.descriptor_area = end - 0xf0),
        ("outside", |q, end| q.driver_area = end - 36),
        ("outside", |q, _| q.device_area = u64::MAX - 3),
    ];
    for (expected, spoil) in bad {
        let mut setup = good.clone();
        spoil(&mut setup, end);
        let why = setup.build(&ram, false).unwrap_err();
        assert!(why.contains(expected), "{why:?} instead of {expected:?}");
        setup.ready = false;
        assert!(!setup.build(&ram, false).unwrap().ready(), "what isn't ready isn't looked at");
    }
    let edge = QueueSetup { device_area: end - (6 + 8 * 16) - 2, ..good };
    assert!(edge.build(&ram, false).is_ok(), "up to the last byte");
}

proptest! {
    /// Whatever is written: the status is one that the specification knows.
    #[test]
    fn every_status_is_possible(writes in prop::collection::vec(
        (0..3u8, prop_oneof![0..0x100u32, any::<u32>()]), 0..40)) {
        let mut core = core();
        for (what, value) in writes {
            match what {
                0 => { core.driver_features_sel = value; }
                1 => { let _ = core.set_driver_features_word(value); }
                _ => if core.set_status(value) == Ok(Effect::Reset) { core.reset(); },
            }
            prop_assert!(TransportCore::possible(core.status()));
            if core.status() & FEATURES_OK != 0 {
                prop_assert!(core.acceptable(core.driver_features()));
            }
        }
    }
}
