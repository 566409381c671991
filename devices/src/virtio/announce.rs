//! Telling the network where a guest is after a move: switches learn from any frame with its MAC, hosts
//! from gratuitous ARP. The machine sends the frames made here, and asks the guest itself, which alone
//! knows its addresses and VLANs (virtio 1.3, 5.1.6.5.4), through an [`Announcer`].

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ConfigSpace;

/// Length of an Ethernet address in bytes.
pub const MAC_LEN: usize = 6;
/// Shortest Ethernet frame, in bytes, without its checksum.
const FRAME_LEN_MIN: usize = 60;
const BROADCAST: [u8; MAC_LEN] = [0xff; MAC_LEN];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_RARP: [u8; 2] = [0x80, 0x35];
const REQUEST: u8 = 1;
const REVERSE_REQUEST: u8 = 3;

/// The machine's handle on a network device, for announcements. Cloning gives another one.
#[derive(Clone, Debug)]
pub struct Announcer {
    config: Arc<ConfigSpace>,
    wanted: Arc<AtomicBool>,
}

impl Announcer {
    pub(super) fn new(config: Arc<ConfigSpace>) -> Self {
        Self { config, wanted: Arc::default() }
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

    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    pub(super) fn take(&self) -> bool {
        // Mostly it isn't: don't write then.
        self.is_wanted() && self.wanted.swap(false, Ordering::AcqRel)
    }
}

/// Ethernet frames that announce `mac`: a RARP request, which every switch learns from, and a gratuitous
/// ARP request for each of the guest's addresses that is known.
#[must_use]
pub fn announce_frames(mac: [u8; MAC_LEN], addresses: &[Ipv4Addr]) -> Vec<Vec<u8>> {
    let none = Ipv4Addr::UNSPECIFIED;
    let rarp = frame(ETHERTYPE_RARP, REVERSE_REQUEST, (mac, none), (mac, none));
    let arp = |address: &Ipv4Addr| {
        frame(ETHERTYPE_ARP, REQUEST, (mac, *address), ([0; MAC_LEN], *address))
    };
    std::iter::once(rarp).chain(addresses.iter().map(arp)).collect()
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
        assert_eq!(frames.len(), 3);
        assert_eq!(frames[1][12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(
            frames[1][22..42],
            [2, 0, 0, 0, 0, 9, 10, 0, 0, 7, 0, 0, 0, 0, 0, 0, 10, 0, 0, 7]
        );
        assert_eq!(frames[2][38..42], [10, 0, 0, 8]);
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
