//! The network device (virtio 1.3, 5.1), on a [`NetBackend`]: one pair of queues and a control queue.
//!
//! Frames pass straight between the backend and guest RAM, their `virtio_net_hdr` as it is: the guest
//! and the host's kernel settle checksums and segmentation between them, and the kernel checks what
//! the guest claims.
//!
//! A frame that the backend refuses to send is dropped, as a network card drops it: waiting would hold
//! up the I/O thread, and whoever needs the frame sends it again. A TAP refuses only headers that lie,
//! and everything while it is down; its queue has no limit that the guest could fill.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE,
    VIRTIO_NET_S_LINK_UP,
};

use self::receive::Receiver;
use super::announce::{Announcer, MAC_LEN};
use super::queue::QueueIo;
use super::{ConfigSpace, DriverFault, VirtioDevice};
use crate::GuestSlice;
use crate::backend::{NET_FRAME_LEN_MAX, NET_HEADER_LEN, NetBackend, Offloads};
use crate::limit::RateLimited;

mod control;
mod receive;
mod state;
#[cfg(test)]
mod testing;

/// Index of the queue of frames to the guest.
const RX: usize = 0;
/// Index of the queue of frames from the guest.
const TX: usize = 1;
/// Index of the control queue.
const CONTROL: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
/// How many frames are sent before the driver is told of them.
const TX_BURST_FRAMES_MAX: usize = 64;
/// Lines that the errors of one interface may log, a second.
const LOG_LINES_PER_SECOND: u32 = 5;

/// `struct virtio_net_config` (virtio 1.3, 5.1.4): where its fields lie.
const CONFIG_STATUS: usize = 6;
/// Smallest MTU that the device may tell (5.1.4.1), in bytes.
pub const MTU_MIN: u16 = 68;

/// A virtio network device.
pub struct Net {
    // Configuration.
    id: String,
    factory_mac: [u8; MAC_LEN],
    // Glue.
    backend: Box<dyn NetBackend>,
    config: Arc<ConfigSpace>,
    announcer: Announcer,
    log: RateLimited,
    // State.
    mac: [u8; MAC_LEN],
    mtu: Option<u16>,
    status: u16,
    driver_features: u64,
    /// The driver's last choice by the control queue, as feature bits. `None`: all that it negotiated.
    guest_offloads: Option<u64>,
    receiver: Receiver,
}

/// How an offload stands in the guest's feature bits: as what the guest takes, and what it may send.
struct OffloadBits {
    on: fn(&mut Offloads) -> &mut bool,
    guest: u64,
    host: u64,
}

const OFFLOAD_BITS: [OffloadBits; 5] = [
    OffloadBits {
        on: |o| &mut o.csum,
        guest: 1 << VIRTIO_NET_F_GUEST_CSUM,
        host: 1 << VIRTIO_NET_F_CSUM,
    },
    OffloadBits {
        on: |o| &mut o.tso4,
        guest: 1 << VIRTIO_NET_F_GUEST_TSO4,
        host: 1 << VIRTIO_NET_F_HOST_TSO4,
    },
    OffloadBits {
        on: |o| &mut o.tso6,
        guest: 1 << VIRTIO_NET_F_GUEST_TSO6,
        host: 1 << VIRTIO_NET_F_HOST_TSO6,
    },
    OffloadBits {
        on: |o| &mut o.ecn,
        guest: 1 << VIRTIO_NET_F_GUEST_ECN,
        host: 1 << VIRTIO_NET_F_HOST_ECN,
    },
    OffloadBits {
        on: |o| &mut o.uso,
        guest: 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6,
        host: 1 << VIRTIO_NET_F_HOST_USO,
    },
];

/// The offloads in feature bits `GUEST_*`, without those whose prerequisites (5.1.3.1) are missing.
fn offloads_of(guest_bits: u64) -> Offloads {
    let mut offloads = Offloads::default();
    for OffloadBits { on, guest, .. } in &OFFLOAD_BITS {
        *on(&mut offloads) = guest_bits & guest == *guest;
    }
    let Offloads { csum, tso4, tso6, ecn, uso } = offloads;
    let (tso4, tso6) = (csum && tso4, csum && tso6);
    Offloads { csum, tso4, tso6, ecn: ecn && (tso4 || tso6), uso: csum && uso }
}

/// The feature bits `GUEST_*` of all offloads.
fn guest_offload_mask() -> u64 {
    OFFLOAD_BITS.iter().fold(0, |all, bits| all | bits.guest)
}

impl Net {
    /// An interface called `id` in messages. The guest takes `mtu` over, if there is one (at least
    /// [`MTU_MIN`]).
    #[must_use]
    pub fn new(
        id: &str,
        mac: [u8; MAC_LEN],
        mtu: Option<u16>,
        backend: Box<dyn NetBackend>,
    ) -> Self {
        let status = link_up();
        let config = ConfigSpace::new(&config_bytes(mac, status, mtu));
        Self {
            id: id.to_owned(),
            factory_mac: mac,
            backend,
            config: config.clone(),
            announcer: Announcer::new(config),
            log: RateLimited::new(LOG_LINES_PER_SECOND),
            mac,
            mtu,
            status,
            driver_features: 0,
            guest_offloads: None,
            receiver: Receiver::default(),
        }
    }

    /// The handle by which the machine makes the guest announce itself after a move.
    #[must_use]
    pub fn announcer(&self) -> Announcer {
        self.announcer.clone()
    }

    fn negotiated(&self, feature: u32) -> bool {
        self.driver_features & 1 << feature != 0
    }

    fn update_config(&mut self) {
        self.config.update(0, &config_bytes(self.mac, self.status, self.mtu));
    }

    /// Sends all that the guest made available, within the burst. Whether there was anything.
    fn transmit(&mut self, io: &mut QueueIo<'_>) -> Result<bool, DriverFault> {
        let ram = io.ram();
        let mut slices = Vec::new();
        let mut used = Vec::new();
        for _ in 0..TX_BURST_FRAMES_MAX {
            let Some(chain) = io.pop(TX)? else { break };
            let len = chain.readable_len();
            if len < NET_HEADER_LEN {
                return Err(DriverFault::Request("a frame shorter than its virtio_net_hdr"));
            }
            let sent = if len > NET_FRAME_LEN_MAX {
                Err(io::Error::from(io::ErrorKind::InvalidInput))
            } else {
                slices.clear();
                chain.readable.slices(ram, 0, len, &mut slices)?;
                self.backend.send(&slices)
            };
            match sent {
                Ok(()) => self.announcer.known.sent(self.mac, &slices),
                Err(error) => {
                    report(&mut self.log, &self.id, &error, "a frame from the guest was dropped");
                }
            }
            used.push((chain.head, 0));
        }
        // The driver reclaims what was sent at its leisure: one update of the index will do.
        if used.is_empty() { Ok(false) } else { io.push_all(TX, &used).map(|()| true) }
    }

    /// Makes the backend leave undone what the guest now takes.
    fn apply_offloads(&mut self) -> io::Result<()> {
        let chosen = self.guest_offloads.unwrap_or(u64::MAX) & self.driver_features;
        self.backend.set_offloads(offloads_of(chosen))
    }

    /// Turns the machine's wish for an announcement into the status bit and its interrupt (5.1.6.5.4).
    fn start_announcement(&mut self, io: &mut QueueIo<'_>) {
        if self.announcer.take() && self.negotiated(VIRTIO_NET_F_GUEST_ANNOUNCE) {
            self.status |= announce();
            self.update_config();
            io.config_changed();
        }
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let own = [
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_CTRL_MAC_ADDR,
            VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
            VIRTIO_NET_F_GUEST_ANNOUNCE,
        ];
        let mtu = if self.mtu.is_some() { 1 << VIRTIO_NET_F_MTU } else { 0 };
        let mut offloads = self.backend.offloads();
        let mut features = own.iter().fold(mtu, |all, bit| all | 1 << bit);
        for OffloadBits { on, guest, host } in &OFFLOAD_BITS {
            features |= if *on(&mut offloads) { guest | host } else { 0 };
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Arc<ConfigSpace> {
        self.config.clone()
    }

    fn activate(&mut self, driver_features: u64) {
        self.driver_features = driver_features;
        self.receiver.activate(self.negotiated(VIRTIO_NET_F_MRG_RXBUF));
        if let Err(error) = self.apply_offloads() {
            report(&mut self.log, &self.id, &error, "the interface refused its offloads");
        }
    }

    fn reset(&mut self) {
        self.driver_features = 0;
        self.guest_offloads = None;
        self.mac = self.factory_mac;
        self.status = link_up();
        self.announcer.known.replace(&[]);
        self.receiver = Receiver::default();
        self.update_config();
        if let Err(error) = self.apply_offloads() {
            report(&mut self.log, &self.id, &error, "the interface refused its offloads");
        }
    }

    fn sources(&self) -> Vec<RawFd> {
        vec![self.backend.fd()]
    }

    fn process(&mut self, queue: usize, io: &mut QueueIo<'_>) -> Result<(), DriverFault> {
        self.start_announcement(io);
        match queue {
            RX if self.receiver.is_starved() => self.source_ready(0, io).map(drop),
            RX => Ok(()),
            TX => {
                // The host's kernel often answers while it is sent to: one interrupt then tells of both.
                let may_be_answered = self.transmit(io)? && !self.receiver.is_starved();
                if may_be_answered { self.source_ready(0, io).map(drop) } else { Ok(()) }
            }
            _ => self.control(io),
        }
    }

    fn source_ready(&mut self, _source: usize, io: &mut QueueIo<'_>) -> Result<bool, DriverFault> {
        let (log, id) = (&mut self.log, &self.id);
        let mut lost = |error: io::Error| report(log, id, &error, "a frame for the guest was lost");
        let (known, mac) = (&self.announcer.known, self.mac);
        let came = |frame: &[GuestSlice<'_>], len| known.received(mac, frame, len);
        self.receiver.receive(self.backend.as_mut(), io, &came, &mut lost)
    }
}

fn report(log: &mut RateLimited, id: &str, error: &io::Error, what: &str) {
    if let Some(dropped) = log.admit() {
        tracing::warn!(net = %id, %error, dropped, "{what}");
    }
}

fn config_bytes(mac: [u8; MAC_LEN], status: u16, mtu: Option<u16>) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..CONFIG_STATUS].copy_from_slice(&mac);
    bytes[CONFIG_STATUS..8].copy_from_slice(&status.to_le_bytes());
    // max_virtqueue_pairs at 8: not offered.
    bytes[10..].copy_from_slice(&mtu.unwrap_or(0).to_le_bytes());
    bytes
}

fn link_up() -> u16 {
    u16::try_from(VIRTIO_NET_S_LINK_UP).expect("it is 1")
}

fn announce() -> u16 {
    u16::try_from(VIRTIO_NET_S_ANNOUNCE).expect("it is 2")
}

#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;
