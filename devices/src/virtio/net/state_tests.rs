//! The network device's saved state: its frozen bytes, and state that can't be.

use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM;
use vmm_migration::state::{Saved, Section};

use super::super::RX;
use super::super::testing::{Bench, MERGE, frame, incoming};
use super::*;

/// [`state`] in version 1.
const GOLDEN_V1: [u8; 14] = [2, 7, 7, 7, 7, 7, 1, 0xf8, 0x0a, 3, 1, 1, 2, 0];

fn state() -> NetStateV2 {
    let v1 = NetStateV1 {
        mac: [2, 7, 7, 7, 7, 7],
        mtu: Some(1400),
        status: 3,
        announce_wanted: true,
        guest_offloads: Some(1 << VIRTIO_NET_F_GUEST_CSUM),
        held: Vec::new(),
    };
    NetStateV2 { v1, addresses: vec![[10, 0, 0, 7], [192, 168, 1, 2]] }
}

#[test]
fn version_2_has_the_bytes_that_were_released() {
    let mut b = Bench::new(MERGE);
    b.device.restore(state()).unwrap();
    let saved = b.device.save_section(7).unwrap();
    assert_eq!((saved.kind.as_str(), saved.instance, saved.version), ("virtio-net", 7, 2));
    assert_eq!(saved.body, [&GOLDEN_V1[..], &[2, 10, 0, 0, 7, 192, 168, 1, 2]].concat());
    let mut destination = Bench::new(MERGE);
    destination.device.restore_section(&saved).unwrap();
    assert_eq!(destination.device.save().unwrap(), state());
}

#[test]
fn version_1_is_frozen_read_and_written() {
    let mut b = Bench::new(MERGE);
    b.device.restore(state()).unwrap();
    let section = b.device.save_as(7, 1).unwrap();
    assert_eq!((section.kind.as_str(), section.instance, section.version), ("virtio-net", 7, 1));
    assert_eq!(section.body, GOLDEN_V1);
    // An old source's, and back to an old destination. The addresses of an example don't outlive it.
    let mut destination = Bench::new(MERGE);
    destination.device.restore(state()).unwrap();
    destination.device.restore_section(&section).unwrap();
    let without = NetStateV2 { addresses: Vec::new(), ..state() };
    assert_eq!(destination.device.save().unwrap(), without);
    assert_eq!(destination.device.save_as(7, 1).unwrap(), section);
    assert!(b.device.save_as(7, 0).is_err() && b.device.save_as(7, 3).is_err());
    // One version's body isn't the other's.
    let two = b.device.save_section(7).unwrap();
    for wrong in [Section { version: 2, ..section }, Section { version: 1, ..two }] {
        let refused = destination.device.restore_section(&wrong);
        assert!(matches!(refused, Err(RestoreError::Decode { .. })), "{refused:?}");
    }
}

#[test]
fn a_frame_that_waits_moves_along() {
    let mut b = Bench::new(MERGE);
    b.post(1, 1536);
    incoming(&b, &[frame(4000, 1)]);
    assert!(!b.ready());
    let saved = b.device.save_section(0).unwrap();
    let mut destination = Bench::new(MERGE);
    destination.device.restore_section(&saved).unwrap();
    destination.post(3, 1536);
    assert!(destination.process(RX).used, "the start brings it");
    destination.expect(&frame(4000, 1), 3);
}

#[test]
fn state_that_can_not_be_is_refused() {
    let wrong = |change: fn(&mut NetStateV2)| {
        let mut state = state();
        change(&mut state);
        match Bench::new(0).device.restore(state) {
            Err(RestoreError::Invalid { why, .. }) => why,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        wrong(|s| s.v1.mtu = None),
        "interface 'eth' has mtu 1400, the guest knows it with none"
    );
    assert!(wrong(|s| s.v1.status = 4).contains("unknown status 0x4"));
    assert!(wrong(|s| s.v1.guest_offloads = Some(1)).contains("unknown offloads"));
    assert!(wrong(|s| s.v1.held = vec![0; 65566]).contains("a frame of 65566 bytes"));
    assert!(wrong(|s| s.addresses = vec![[10, 0, 0, 7]; 5]).contains("has 5 addresses"));
    assert!(wrong(|s| s.addresses.push([224, 0, 0, 1])).contains("has the address 224.0.0.1"));
    assert!(wrong(|s| s.addresses.push([0; 4])).contains("has the address 0.0.0.0"));
}
