//! The guest's IPv4 addresses, as far as its ARP tells them (RFC 826): what can be announced after a move.
//!
//! They are only believed. The guest can announce any address by itself, and what is announced for it goes
//! through the same interface, and the same filters of the host, as its own frames. An address that somebody
//! else has claimed since is forgotten, so that a move takes nothing away from whoever has it now.
//!
//! Frames with VLAN tags, and IPv6, are not looked at: see `announce`.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, Ordering};

use super::announce::{ETHERTYPE_ARP, MAC_LEN};
use crate::GuestSlice;
use crate::backend::NET_HEADER_LEN;

/// How many addresses of an interface are known at most: of more, those heard of last.
pub const ADDRESSES_MAX: usize = 4;
/// Where the EtherType lies in a frame with its header.
const ETHERTYPE_AT: usize = NET_HEADER_LEN + 12;
/// Where the ARP packet lies.
const PACKET_AT: usize = ETHERTYPE_AT + 2;
/// Length of an ARP packet for IPv4 over Ethernet, in bytes.
const PACKET_LEN: usize = 28;

/// The addresses known of one interface. The device writes them; who reads while it does may miss one or see one
/// twice, that once.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    /// The one heard of last first; 0 is none, and nothing comes after it.
    known: [AtomicU32; ADDRESSES_MAX],
}

impl Addresses {
    /// Those known, the one heard of last first.
    pub(super) fn list(&self) -> Vec<Ipv4Addr> {
        self.load().into_iter().filter(|known| *known != 0).map(Ipv4Addr::from_bits).collect()
    }

    /// Knows these and no others; what is more than there is room for is left out.
    pub(super) fn replace(&self, addresses: &[Ipv4Addr]) {
        let mut known = [0; ADDRESSES_MAX];
        for (to, address) in known.iter_mut().zip(addresses) {
            *to = address.to_bits();
        }
        self.store(known);
    }

    /// The guest, whose MAC that is, has sent this frame.
    pub(super) fn sent(&self, mac: [u8; MAC_LEN], frame: &[GuestSlice<'_>]) {
        match claim(frame) {
            Some(claim) if claim.mac == mac => self.learn(claim.address),
            Some(claim) => self.forget(claim.address),
            None => {}
        }
    }

    /// A frame of that length has come for it.
    pub(super) fn received(&self, mac: [u8; MAC_LEN], frame: &[GuestSlice<'_>], len: usize) {
        // Of a shorter one, the rest is what lay there before.
        if len < PACKET_AT + PACKET_LEN {
            return;
        }
        if let Some(claim) = claim(frame).filter(|claim| claim.mac != mac) {
            self.forget(claim.address);
        }
    }

    fn learn(&self, address: Ipv4Addr) {
        let (mut known, address) = (self.load(), address.to_bits());
        if known[0] != address {
            // In place of itself, of nothing, or of the one not heard of for longest.
            let place = known.iter().position(|k| *k == address || *k == 0);
            let place = place.unwrap_or(ADDRESSES_MAX - 1);
            known[place] = address;
            known[..=place].rotate_right(1);
            self.store(known);
        }
    }

    fn forget(&self, address: Ipv4Addr) {
        let mut known = self.load();
        if let Some(place) = known.iter().position(|k| *k == address.to_bits()) {
            known[place] = 0;
            known[place..].rotate_left(1);
            self.store(known);
        }
    }

    fn load(&self) -> [u32; ADDRESSES_MAX] {
        std::array::from_fn(|i| self.known[i].load(Ordering::Relaxed))
    }

    fn store(&self, known: [u32; ADDRESSES_MAX]) {
        for (to, from) in self.known.iter().zip(known) {
            to.store(from, Ordering::Relaxed);
        }
    }
}

/// Whether a host may have this address, so that announcing it can make sense.
pub(super) fn may_be_a_hosts(address: Ipv4Addr) -> bool {
    let nobodys = address.is_multicast() || address.is_broadcast() || address.is_loopback();
    // "This network"; 0.0.0.0 is what a host says that asks whether an address is free.
    !nobodys && address.octets()[0] != 0
}

/// That an address belongs to a MAC.
struct Claim {
    mac: [u8; MAC_LEN],
    address: Ipv4Addr,
}

/// What the sender of a frame with its header says of itself, if that is ARP. The guest may change it meanwhile: what is
/// read here is looked at once.
fn claim(frame: &[GuestSlice<'_>]) -> Option<Claim> {
    let mut ethertype = [0; 2];
    read(frame, ETHERTYPE_AT, &mut ethertype)?;
    if ethertype != ETHERTYPE_ARP {
        return None;
    }
    let mut packet = [0; PACKET_LEN];
    read(frame, PACKET_AT, &mut packet)?;
    let (head, rest) = packet.split_at(8);
    // Ethernet, IPv4, and the lengths of their addresses; a request or a reply.
    if !matches!(head, [0, 1, 8, 0, 6, 4, 0, 1 | 2]) {
        return None;
    }
    let (mac, rest) = rest.split_first_chunk()?;
    let address = Ipv4Addr::from(*rest.first_chunk::<4>()?);
    may_be_a_hosts(address).then_some(Claim { mac: *mac, address })
}

/// Fills `to` from `offset` bytes into the slices. `None`: they are too short.
fn read(slices: &[GuestSlice<'_>], offset: usize, to: &mut [u8]) -> Option<()> {
    let (mut skip, mut rest) = (offset, to);
    for slice in slices {
        let jump = skip.min(slice.len());
        skip -= jump;
        let copied = slice.offset(jump).ok()?.copy_to(&mut *rest);
        rest = &mut rest[copied..];
        if rest.is_empty() {
            return Some(());
        }
    }
    None
}

#[cfg(test)]
#[path = "addresses_tests.rs"]
mod tests;
