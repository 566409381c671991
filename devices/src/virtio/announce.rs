//! Telling the network where a guest is after a move. The machine sends the frames made here, and asks the guest
//! itself (virtio 1.3, 5.1.6.5.4), which alone knows all of its addresses and VLANs, through an [`Announcer`].
//!
//! Switches learn from any frame with the guest's MAC: RARP is one that means nothing else. What follows
//! addresses too (a fabric that routes to each host, a switch that lets no RARP through) learns from gratuitous
//! ARP for those that are known of the guest. No host's ARP cache is wrong after a move, as the MAC stays.
//!
//! ARP goes both as a request and as a reply: either is allowed (RFC 5944, 4.6), and devices are known that take only
//! the one or the other.
//!
//! IPv6 addresses are the guest's own to announce (Linux sends neighbour advertisements when it is asked): it has
//! many, some for a day only, so that those seen once say little, and hosts need none of it, as with ARP.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ConfigSpace;
use super::addresses::Addresses;

/// Length of an Ethernet address in bytes.
pub const MAC_LEN: usize = 6;
/// Shortest Ethernet frame, in bytes, without its checksum.
const FRAME_LEN_MIN: usize = 60;
const BROADCAST: [u8; MAC_LEN] = [0xff; MAC_LEN];
pub(super) const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_RARP: [u8; 2] = [0x80, 0x35];
const REQUEST: u8 = 1;
const REPLY: u8 = 2;
const REVERSE_REQUEST: u8 = 3;

/// The machine's handle on a network device, for announcements. Cloning gives another one.
#[derive(Clone, Debug)]
pub struct Announcer {
    config: Arc<ConfigSpace>,
    wanted: Arc<AtomicBool>,
    pub(super) known: Arc<Addresses>,
}

impl Announcer {
    pub(super) fn new(config: Arc<ConfigSpace>) -> Self {
        Self { config, wanted: Arc::default(), known: Arc::default() }
    }

    /// Asks the guest to announce itself. It is told at the device's next call, which the start of the
    /// machine brings: called at rest. A driver that can't (`GUEST_ANNOUNCE`) is not bothered.
    pub fn request(&self) {
        self.wanted.store(true, Ordering::Release);
    }

    /// The device's MAC address as it is now: the guest may have changed it.
    #[must_use]
    pub fn mac(&self) -> [u8; MAC_LEN] {
        let mut mac = [0; MAC_LEN];
        self.config.read(0, &mut mac);
        mac
    }

    /// The guest's IPv4 addresses, as far as they are known.
    #[must_use]
    pub fn addresses(&self) -> Vec<Ipv4Addr> {
        self.known.list()
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    pub(super) fn take(&self) -> bool {
        // Mostly it isn't: don't write then.
        self.is_wanted() && self.wanted.swap(false, Ordering::AcqRel)
    }
}

/// Ethernet frames that announce `mac`: a RARP request, and for each of the addresses gratuitous ARP.
#[must_use]
pub fn announce_frames(mac: [u8; MAC_LEN], addresses: &[Ipv4Addr]) -> Vec<Vec<u8>> {
    let none = Ipv4Addr::UNSPECIFIED;
    let rarp = frame(ETHERTYPE_RARP, REVERSE_REQUEST, (mac, none), (mac, none));
    let arp = |address: &Ipv4Addr| {
        let forms = [(REQUEST, [0; MAC_LEN]), (REPLY, mac)];
        forms.map(|(form, to)| frame(ETHERTYPE_ARP, form, (mac, *address), (to, *address)))
    };
    std::iter::once(rarp).chain(addresses.iter().flat_map(arp)).collect()
}

/// A broadcast ARP packet for IPv4 over Ethernet (RFC 826; RFC 903 for RARP).
fn frame(
    ethertype: [u8; 2],
    operation: u8,
    sender: ([u8; MAC_LEN], Ipv4Addr),
    target: ([u8; MAC_LEN], Ipv4Addr),
) -> Vec<u8> {
    let mut frame = Vec::with_capacity(FRAME_LEN_MIN);
    frame.extend(BROADCAST);
    frame.extend(sender.0);
    frame.extend(ethertype);
    // Ethernet, IPv4, and the lengths of their addresses.
    frame.extend([0, 1, 8, 0, 6, 4, 0, operation]);
    for (mac, address) in [sender, target] {
        frame.extend(mac);
        frame.extend(address.octets());
    }
    frame.resize(FRAME_LEN_MIN, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

    #[test]
    fn rarp_names_the_mac_as_sender_and_target() {
        let frames = announce_frames(MAC, &[]);
        let [rarp] = frames.as_slice() else { panic!("{frames:?}") };
        let expected = [
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 9, 0x80, 0x35][..],
            &[0, 1, 8, 0, 6, 4, 0, 3, 2, 0, 0, 0, 0, 9, 0, 0, 0, 0, 2, 0, 0, 0, 0, 9, 0, 0, 0, 0],
            &[0; 18],
        ];
        assert_eq!(*rarp, expected.concat());
    }

    #[test]
    fn each_known_address_gets_a_gratuitous_arp() {
        let frames =
            announce_frames(MAC, &[Ipv4Addr::new(10, 0, 0, 7), Ipv4Addr::new(10, 0, 0, 8)]);
        assert_eq!(frames.len(), 5);
        for (frame, form, to) in [(&frames[1], REQUEST, [0; 6]), (&frames[2], REPLY, MAC)] {
            assert_eq!((frame.len(), &frame[..6], &frame[6..12]), (60, &BROADCAST[..], &MAC[..]));
            assert_eq!(frame[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, form]);
            assert_eq!(frame[22..32], [2, 0, 0, 0, 0, 9, 10, 0, 0, 7]);
            assert_eq!((&frame[32..38], &frame[38..42]), (&to[..], &[10, 0, 0, 7][..]));
        }
        for (frame, form) in frames[3..].iter().zip([REQUEST, REPLY]) {
            assert_eq!((frame[21], &frame[38..42]), (form, &[10, 0, 0, 8][..]));
        }
    }

    #[test]
    fn the_announcer_reads_the_mac_that_the_guest_sees_and_is_asked_once() {
        let config = ConfigSpace::new(&MAC);
        let announcer = Announcer::new(config.clone());
        config.update(0, &[2, 1, 1, 1, 1, 1]);
        assert_eq!(announcer.mac(), [2, 1, 1, 1, 1, 1]);
        assert!(!announcer.take());
        announcer.clone().request();
        assert!(announcer.take());
        assert!(!announcer.take());
    }
}
