//! Virtio devices (virtio 1.3), apart from how they are reached: the transport is `mmio`, the thread
//! that drives a device belongs to whoever lends it a [`worker`].
//!
//! A device implements [`VirtioDevice`] and never sees a register or a thread. Its configuration
//! space is a [`ConfigSpace`] shared with the transport, so that a vCPU reads it while the device is
//! lent to the I/O thread.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

use vmm_migration::state::Saved;

mod addresses;
pub mod announce;
pub mod block;
mod chain;
pub mod core;
pub mod interrupt;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
mod state;
#[cfg(test)]
pub mod testing;
pub mod worker;

/// A device's configuration space (virtio 1.3, 2.5): bytes that the device writes and the driver
/// reads, with the generation counter that tells a driver that it read a mixture.
///
/// Invariant: two equal generations enclose no change. A driver may look while the device writes, so a
/// change counts before and after, and each look in between counts by itself.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: Box<[AtomicU8]>,
    generation: AtomicU32,
    changing: AtomicBool,
}

impl ConfigSpace {
    /// A configuration space that holds `bytes`.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Arc<Self> {
        Arc::new(Self {
            bytes: bytes.iter().map(|b| AtomicU8::new(*b)).collect(),
            generation: AtomicU32::new(0),
            changing: AtomicBool::new(false),
        })
    }

    /// Copies from `offset`; what lies past the end reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|o| o.checked_add(i));
            *byte = at.and_then(|a| self.bytes.get(a)).map_or(0, |b| b.load(Ordering::Acquire));
        }
    }

    /// Replaces the bytes from `offset` (by the device, not the driver) and counts a generation.
    /// What lies past the end is left out. The caller raises the configuration interrupt.
    pub fn update(&self, offset: usize, data: &[u8]) {
        self.changing.store(true, Ordering::SeqCst);
        self.generation.fetch_add(1, Ordering::SeqCst);
        for (byte, new) in self.bytes.iter().skip(offset).zip(data) {
            byte.store(*new, Ordering::Release);
        }
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.changing.store(false, Ordering::SeqCst);
    }

    /// The generation counter (virtio 1.3, 4.2.2 `ConfigGeneration`).
    #[must_use]
    pub fn generation(&self) -> u32 {
        if self.changing.load(Ordering::SeqCst) {
            self.generation.fetch_add(1, Ordering::SeqCst);
        }
        self.generation.load(Ordering::SeqCst)
    }

    /// Goes on after the generation that a driver saw elsewhere, before a move: what it read there may
    /// differ from what it reads here.
    pub fn follow_generation(&self, seen: u32) {
        self.generation.store(seen.wrapping_add(1), Ordering::SeqCst);
    }
}

/// The guest's driver broke the protocol: the device goes to `NEEDS_RESET` (virtio 1.3, 2.1.2) with one
/// rate-limited log line, and does nothing more until the driver resets it.
#[derive(Debug, thiserror::Error)]
pub enum DriverFault {
    /// A virtqueue is broken: an index that jumps, a ring outside of RAM, a loop of descriptors.
    #[error("virtqueue {queue}: {why}")]
    Queue {
        /// Which one.
        queue: usize,
        /// What is wrong with it.
        why: String,
    },
    /// A request that no driver may make.
    #[error("request: {0}")]
    Request(&'static str),
}

/// A virtio device, at home in its transport or lent to the I/O thread. Saved: its own volatile state
/// (not the queues', which the transport saves).
pub trait VirtioDevice: Saved + Send {
    /// Device id (virtio 1.3, section 5).
    fn id(&self) -> u32;

    /// Feature bits offered, without the transport's and the ring's own (`VERSION_1`, `EVENT_IDX`,
    /// `INDIRECT_DESC`), which the transport adds.
    fn features(&self) -> u64;

    /// The largest size of each virtqueue, a power of two up to 32768.
    fn queue_sizes(&self) -> &[u16];

    /// The configuration space, shared with the transport.
    fn config(&self) -> Arc<ConfigSpace>;

    /// The driver set `DRIVER_OK` with these features; also called after a restore.
    fn activate(&mut self, driver_features: u64);

    /// The driver reset the device: forget all of the driver's state, chains in flight included. Nothing
    /// is written to guest RAM afterwards.
    fn reset(&mut self);

    /// File descriptors to wait on for input besides the queues' notifications, level-triggered. Index
    /// in this list is the `source` of [`Self::source_ready`].
    fn sources(&self) -> Vec<RawFd> {
        Vec::new()
    }

    /// The driver notified `queue` (or may have: spurious calls are allowed, and one call follows each
    /// start). Handles all that is available, within a bounded burst.
    ///
    /// The caller turns the driver's notifications off before and on after, and calls again while the
    /// device pops and chains are left. A device that leaves chains (a receive queue without input)
    /// gets no notification for these; when it has popped the last one and waits for more, it calls
    /// [`queue::QueueIo::enable_notification`] itself, after which it may put back what it popped.
    fn process(&mut self, queue: usize, io: &mut queue::QueueIo<'_>) -> Result<(), DriverFault>;

    /// `sources()[source]` is readable. Returns whether to go on watching it: `false` (no buffers to put
    /// the input in) stops until the next [`Self::process`].
    fn source_ready(
        &mut self,
        _source: usize,
        _io: &mut queue::QueueIo<'_>,
    ) -> Result<bool, DriverFault> {
        Ok(false)
    }

    /// Finishes I/O in flight (nothing is written to guest RAM afterwards) and makes written data durable where the move needs it. Called with the
    /// device back at home, before its state is saved.
    fn drain(&mut self) {}
}
