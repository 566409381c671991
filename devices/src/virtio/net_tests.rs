//! The network device against an interface in memory: frames out, features, the control queue.

use vm_memory::{Bytes, GuestAddress};
use vmm_migration::state::Saved;

use super::testing::{ALL, ANNOUNCE, BUFFERS, Bench, MAC, MERGE, MemoryNet, frame};
use super::*;
use crate::virtio::testing::Buf;

#[test]
fn frames_go_out_whole_with_their_header() {
    let mut b = Bench::new(0);
    let sent = [frame(12 + 60, 1), frame(12 + 1500, 2), frame(65000, 3)];
    for (i, f) in (0u64..).zip(&sent) {
        let at = BUFFERS + 0x2_0000 * i;
        b.ram.write_slice(f, GuestAddress(at)).unwrap();
        let len = u32::try_from(f.len()).unwrap();
        b.rings[TX].add(&[Buf::readable(at, 12), Buf::readable(at + 12, len - 12)]);
    }
    assert!(b.process(TX).used);
    assert_eq!(b.net.inner().sent, sent);
    let used: Vec<_> = std::iter::from_fn(|| b.rings[TX].pop_used()).collect();
    assert_eq!(used, [(0, 0), (2, 0), (4, 0)]);
    assert!(!b.process(TX).used);
}

#[test]
fn an_answer_to_a_frame_is_told_of_with_it() {
    let mut b = Bench::new(MERGE);
    b.post(2, 1536);
    b.net.inner().incoming.push_back(frame(100, 1));
    assert!(!b.process(TX).used, "nothing was sent, nothing is looked for");
    b.rings[TX].add(&[Buf::readable(0, 72)]);
    assert!(b.process(TX).used);
    assert!(b.rings[TX].pop_used().is_some());
    b.expect(&frame(100, 1), 1);
    // Who has no buffers for it waits for some, not for the next frame that goes out.
    b.net.inner().incoming.extend([frame(65000, 2), frame(100, 3)]);
    for _ in 0..2 {
        b.rings[TX].add(&[Buf::readable(0, 72)]);
        b.process(TX);
    }
    let inner = b.net.inner();
    assert_eq!((inner.incoming.len(), inner.offered.len()), (1, 2));
}

#[test]
fn what_can_not_be_sent_is_dropped_and_given_back() {
    let mut b = Bench::new(0);
    b.rings[TX].add(&[Buf::readable(0, 65536), Buf::readable(0, 65536)]);
    b.process(TX);
    for fault in [io::ErrorKind::InvalidInput, io::ErrorKind::WouldBlock] {
        b.net.inner().fault = Some(fault);
        b.rings[TX].add(&[Buf::readable(0, 72)]);
        b.process(TX);
    }
    assert_eq!(std::iter::from_fn(|| b.rings[TX].pop_used()).count(), 3);
    assert!(b.net.inner().sent.is_empty());

    b.rings[TX].add(&[Buf::readable(0, 11)]);
    let (result, _) = b.call(|device, io| device.process(TX, io));
    assert!(matches!(result, Err(DriverFault::Request(_))));
}

#[test]
fn only_offered_offloads_are_features_and_only_negotiated_ones_are_on() {
    let offload = |bits: &[u32]| bits.iter().fold(0, |all, b| all | 1_u64 << b);
    let guest = [VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4];
    let host = [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4];
    let some = Offloads { csum: true, tso4: true, ..Offloads::default() };
    let device = Net::new("eth", MAC, None, Box::new(MemoryNet::new(some)));
    let mask = OFFLOAD_BITS.iter().fold(0, |all, o| all | o.guest | o.host);
    assert_eq!(device.features() & mask, offload(&guest) | offload(&host));
    assert_eq!(device.features() & 1 << VIRTIO_NET_F_MTU, 0);

    let mut b = Bench::new(offload(&guest));
    assert_eq!(b.device.features() & mask, mask);
    assert_ne!(b.device.features() & 1 << VIRTIO_NET_F_MTU, 0);
    assert_eq!(b.net.inner().offloads, some);
    // Segmentation without checksums can't be: the driver broke a rule, the interface isn't asked.
    b.device.activate(offload(&[VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN]));
    assert_eq!(b.net.inner().offloads, Offloads::default());
    b.device.activate(u64::MAX);
    assert_eq!(b.net.inner().offloads, ALL);
    b.device.reset();
    assert_eq!(b.net.inner().offloads, Offloads::default());
}

#[test]
fn the_driver_chooses_among_the_offloads_it_negotiated() {
    let mut b = Bench::new(1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4);
    let set = |bits: u64| [&[5, 0][..], &bits.to_le_bytes()].concat();
    let csum_only = Offloads { csum: true, ..Offloads::default() };
    assert_eq!(b.control(&set(1 << VIRTIO_NET_F_GUEST_CSUM)), 0);
    assert_eq!(b.net.inner().offloads, csum_only);
    assert_eq!(b.control(&set(1 << VIRTIO_NET_F_GUEST_TSO6)), 1);
    assert_eq!(b.control(&set(MERGE)), 1);
    b.net.inner().fault = Some(io::ErrorKind::Other);
    assert_eq!(b.control(&set(0)), 1);
    b.net.inner().fault = None;
    // What was chosen last is what a move takes along.
    let section = b.device.save_section(0).unwrap();
    let net = MemoryNet::new(ALL);
    let mut destination = Net::new("eth", MAC, Some(1400), Box::new(net.clone()));
    destination.restore_section(&section).unwrap();
    destination.activate(b.device.driver_features);
    assert_eq!(net.inner().offloads, csum_only);
}

#[test]
fn the_mac_is_the_drivers_to_change_until_it_resets() {
    let mut b = Bench::new(0);
    let announcer = b.device.announcer();
    assert_eq!(b.config(), [2, 0, 0, 0, 0, 9, 1, 0, 0, 0, 0x78, 5]);
    let generation = b.device.config().generation();
    assert_eq!(b.control(&[1, 1, 2, 7, 7, 7, 7, 7]), 0);
    assert_eq!(announcer.mac(), [2, 7, 7, 7, 7, 7]);
    assert_ne!(b.device.config().generation(), generation);
    assert_eq!(b.control(&[1, 1, 2, 7]), 1, "too short");
    b.device.reset();
    assert_eq!(announcer.mac(), MAC);
}

#[test]
fn unknown_commands_are_refused() {
    let mut b = Bench::new(0);
    for command in [&[0, 0, 1][..], &[1, 0, 0, 0], &[2, 0, 0, 0], &[3, 1], &[4, 0, 1, 0], &[9]] {
        assert_eq!(b.control(command), 1, "{command:?}");
    }
    b.rings[CONTROL].add(&[Buf::readable(0x100, 2)]);
    let (result, _) = b.call(|device, io| device.process(CONTROL, io));
    assert!(matches!(result, Err(DriverFault::Request(_))));
}

#[test]
fn an_announcement_is_asked_for_once_and_acknowledged() {
    let mut b = Bench::new(ANNOUNCE);
    b.device.announcer().request();
    assert!(b.process(TX).config);
    assert_eq!(b.config()[6], 3, "link up, announce");
    assert!(!b.process(RX).config);
    // Moved again before the guest got to it: it is still to do.
    let mut destination = Net::new("eth", MAC, Some(1400), Box::new(MemoryNet::new(ALL)));
    destination.restore_section(&b.device.save_section(0).unwrap()).unwrap();
    let mut status = [0; 2];
    destination.config().read(6, &mut status);
    assert_eq!(status, [3, 0]);
    assert_eq!(b.control(&[3, 0]), 0);
    assert_eq!(b.config()[6], 1);

    let mut deaf = Bench::new(0);
    deaf.device.announcer().request();
    assert!(!deaf.process(TX).config);
    assert_eq!(deaf.config()[6], 1);
}

/// An ARP packet by which a host at that MAC says that 10.0.0.7 is its own, with its header.
fn arp(mac: [u8; MAC_LEN]) -> Vec<u8> {
    let ether = [&[0; 12][..], &[0xff; 6], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
    [&ether[..], &mac, &[10, 0, 0, 7, 0, 0, 0, 0, 0, 0, 10, 0, 0, 1]].concat()
}

fn send(b: &mut Bench, bytes: &[u8]) {
    b.ram.write_slice(bytes, GuestAddress(BUFFERS)).unwrap();
    let len = u32::try_from(bytes.len()).unwrap();
    b.rings[TX].add(&[Buf::readable(BUFFERS, 12), Buf::readable(BUFFERS + 12, len - 12)]);
    b.process(TX);
}

#[test]
fn the_guests_address_is_known_until_another_has_it() {
    let own = [std::net::Ipv4Addr::new(10, 0, 0, 7)];
    let mut b = Bench::new(MERGE);
    let announcer = b.device.announcer();
    b.net.inner().fault = Some(io::ErrorKind::WouldBlock);
    send(&mut b, &arp(MAC));
    assert!(announcer.addresses().is_empty(), "nobody has heard of it");
    b.net.inner().fault = None;
    send(&mut b, &arp(MAC));
    assert_eq!(announcer.addresses(), own);
    b.post(4, 1536);
    b.net.inner().incoming.extend([arp(MAC), frame(100, 1)]);
    assert!(b.ready());
    assert_eq!(announcer.addresses(), own);
    b.net.inner().incoming.push_back(arp([2, 0, 0, 0, 0, 1]));
    assert!(b.ready());
    assert!(announcer.addresses().is_empty());
    // With the MAC that the guest has set, and until it boots anew.
    assert_eq!(b.control(&[1, 1, 2, 7, 7, 7, 7, 7]), 0);
    send(&mut b, &arp(MAC));
    assert!(announcer.addresses().is_empty());
    send(&mut b, &arp([2, 7, 7, 7, 7, 7]));
    assert_eq!(announcer.addresses(), own);
    b.device.reset();
    assert!(announcer.addresses().is_empty());
}
