//! What ARP tells of a guest's addresses, and what else is no such word.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::GuestRam;
use crate::virtio::testing::ram;

const OWN: [u8; MAC_LEN] = [2, 0, 0, 0, 0, 9];
const OTHER: [u8; MAC_LEN] = [2, 0, 0, 0, 0, 1];
const REQUEST: u8 = 1;
const REPLY: u8 = 2;

fn address(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, last)
}

/// An ARP frame with its header, from a sender who says that the address is theirs.
fn arp(form: u8, mac: [u8; MAC_LEN], address: Ipv4Addr) -> Vec<u8> {
    let mut frame = vec![0; NET_HEADER_LEN];
    frame.extend([0xff; MAC_LEN]);
    frame.extend(mac);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, form]);
    frame.extend(mac);
    frame.extend(address.octets());
    frame.extend([0, 0, 0, 0, 0, 0, 10, 0, 0, 1]);
    frame
}

/// A guest with an interface, as it sends and receives.
struct Bench {
    ram: GuestRam,
    addresses: Addresses,
}

impl Bench {
    fn new() -> Self {
        Self { ram: ram(1 << 20), addresses: Addresses::default() }
    }

    /// The frame in guest memory, in pieces of these lengths and one of the rest.
    fn slices(&self, frame: &[u8], pieces: &[usize]) -> Vec<GuestSlice<'_>> {
        self.ram.write_slice(frame, GuestAddress(0x1000)).unwrap();
        let (mut at, mut slices) = (0, Vec::new());
        for len in pieces.iter().copied().chain([frame.len() - pieces.iter().sum::<usize>()]) {
            slices.push(self.ram.get_slice(GuestAddress(0x1000 + at as u64), len).unwrap());
            at += len;
        }
        slices
    }

    fn sends(&self, frame: &[u8]) -> Vec<Ipv4Addr> {
        self.addresses.sent(OWN, &self.slices(frame, &[]));
        self.addresses.list()
    }

    fn hears(&self, frame: &[u8]) -> Vec<Ipv4Addr> {
        self.addresses.received(OWN, &self.slices(frame, &[]), frame.len());
        self.addresses.list()
    }
}

#[test]
fn requests_and_replies_tell_the_senders_address() {
    let b = Bench::new();
    assert_eq!(b.sends(&arp(REQUEST, OWN, address(7))), [address(7)]);
    assert_eq!(b.sends(&arp(REPLY, OWN, address(8))), [address(8), address(7)]);
    assert_eq!(b.sends(&arp(REQUEST, OWN, address(8))), [address(8), address(7)]);
}

#[test]
fn the_one_not_heard_of_for_longest_goes() {
    let b = Bench::new();
    for last in [1, 2, 3, 4] {
        b.sends(&arp(REQUEST, OWN, address(last)));
    }
    assert_eq!(b.sends(&arp(REQUEST, OWN, address(1))), [1, 4, 3, 2].map(address));
    assert_eq!(b.sends(&arp(REQUEST, OWN, address(5))), [5, 1, 4, 3].map(address));
    assert_eq!(b.sends(&arp(REQUEST, OWN, address(4))), [4, 5, 1, 3].map(address));
    b.addresses.replace(&[9, 8, 7, 6, 5].map(address));
    assert_eq!(b.addresses.list(), [9, 8, 7, 6].map(address));
    b.addresses.replace(&[]);
    assert!(b.addresses.list().is_empty());
}

/// The driver lays its frames out as it likes.
#[test]
fn a_frame_may_lie_in_any_pieces() {
    let frame = arp(REQUEST, OWN, address(7));
    for first in 1..frame.len() {
        for second in [1, 2, 5] {
            let b = Bench::new();
            let pieces = [first, second.min(frame.len() - first)];
            b.addresses.sent(OWN, &b.slices(&frame, &pieces));
            assert_eq!(b.addresses.list(), [address(7)], "{pieces:?}");
        }
    }
    let b = Bench::new();
    b.addresses.sent(OWN, &b.slices(&frame, &[1; 53]));
    assert_eq!(b.addresses.list(), [address(7)]);
}

#[test]
fn what_is_no_such_word_tells_nothing() {
    let b = Bench::new();
    let frame = arp(REQUEST, OWN, address(7));
    for len in 0..frame.len() {
        assert!(b.sends(&frame[..len]).is_empty(), "{len} bytes");
    }
    // EtherType, kinds and lengths of addresses, operation.
    for at in NET_HEADER_LEN + 12..NET_HEADER_LEN + 22 {
        let mut wrong = frame.clone();
        wrong[at] ^= 0x10;
        assert!(b.sends(&wrong).is_empty(), "byte {at}");
    }
    for operation in [0, 3, 4] {
        assert!(b.sends(&arp(operation, OWN, address(7))).is_empty());
    }
    let nobodys = ["0.0.0.0", "0.1.2.3", "127.0.0.1", "224.0.0.251", "255.255.255.255"];
    for nobodys in nobodys.map(|text| text.parse().unwrap()) {
        assert!(b.sends(&arp(REQUEST, OWN, nobodys)).is_empty(), "{nobodys}");
    }
    assert!(b.sends(&arp(REQUEST, OTHER, address(7))).is_empty(), "of another in the guest");
    assert!(b.hears(&arp(REPLY, OWN, address(7))).is_empty(), "another says so of the guest");
}

#[test]
fn what_another_claims_is_forgotten() {
    let b = Bench::new();
    for last in [1, 2, 3] {
        b.sends(&arp(REQUEST, OWN, address(last)));
    }
    assert_eq!(b.hears(&arp(REQUEST, OTHER, address(9))), [3, 2, 1].map(address));
    assert_eq!(b.hears(&arp(REQUEST, OTHER, address(2))), [3, 1].map(address));
    assert_eq!(b.sends(&arp(REPLY, OTHER, address(3))), [1].map(address));
    assert_eq!(b.hears(&arp(REPLY, OWN, address(1))), [1].map(address), "its own comes back");
    // What lay in the buffer before is no part of a shorter frame.
    let frame = arp(REPLY, OTHER, address(1));
    let slices = b.slices(&frame, &[]);
    b.addresses.received(OWN, &slices, frame.len() - 1);
    assert_eq!(b.addresses.list(), [1].map(address));
    b.addresses.received(OWN, &slices, frame.len());
    assert!(b.addresses.list().is_empty());
}
