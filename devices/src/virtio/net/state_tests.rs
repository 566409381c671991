//! The network device's saved state: its frozen bytes, and state that can't be.

use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM;
use vmm_migration::state::Saved;

use super::super::RX;
use super::super::testing::{Bench, MERGE, frame, incoming};
use super::*;

fn state() -> NetStateV1 {
    NetStateV1 {
        mac: [2, 7, 7, 7, 7, 7],
        mtu: Some(1400),
        status: 3,
        announce_wanted: true,
        guest_offloads: Some(1 << VIRTIO_NET_F_GUEST_CSUM),
        held: Vec::new(),
    }
}

#[test]
fn saved_state_has_the_bytes_that_were_released() {
    let mut b = Bench::new(MERGE);
    b.device.restore(state()).unwrap();
    let saved = b.device.save_section(7).unwrap();
    assert_eq!((saved.kind.as_str(), saved.instance, saved.version), ("virtio-net", 7, 1));
    assert_eq!(saved.body, [2, 7, 7, 7, 7, 7, 1, 0xf8, 0x0a, 3, 1, 1, 2, 0]);
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
    let wrong = |change: fn(&mut NetStateV1)| {
        let mut state = state();
        change(&mut state);
        match Bench::new(0).device.restore(state) {
            Err(RestoreError::Invalid { why, .. }) => why,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        wrong(|s| s.mtu = None),
        "interface 'eth' has mtu 1400, the guest knows it with none"
    );
    assert!(wrong(|s| s.status = 4).contains("unknown status 0x4"));
    assert!(wrong(|s| s.guest_offloads = Some(1)).contains("unknown offloads"));
    assert!(wrong(|s| s.held = vec![0; 65566]).contains("a frame of 65566 bytes"));
}
