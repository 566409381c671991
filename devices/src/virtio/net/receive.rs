//! Frames to the guest (virtio 1.3, 5.1.6.3 and 5.1.6.4).
//!
//! How long the next frame is only reading it tells. So it is read into as many of the guest's buffers
//! as the frames before needed, with a buffer of ours behind them: a longer frame costs a copy of its
//! rest into further buffers of the guest, a shorter one leaves buffers for the next frame. What a burst
//! leaves unused goes back to the queue: between calls no buffer of the guest is held.
//!
//! A frame for which the guest has too few buffers is kept until it has more; until then nothing is
//! read, so that frames queue up (and are finally dropped) in the host's kernel.

use std::collections::VecDeque;
use std::io;

use super::RX;
use crate::backend::{NET_FRAME_LEN_MAX, NET_HEADER_LEN, NetBackend};
use crate::virtio::DriverFault;
use crate::virtio::queue::{Chain, QueueIo};
use crate::{GuestRam, GuestSlice};

/// How many frames are received before the driver is told of them.
const BURST_FRAMES_MAX: usize = 64;
/// Once a frame's buffers are of so many pieces, no further ones are added: a system call takes 1024, a
/// single chain has at most twice the queue's size.
const PIECES_MAX: usize = 256;
/// Where `num_buffers` lies in `virtio_net_hdr`.
const NUM_BUFFERS: usize = 10;
/// What the first frame is expected to be, in bytes: one of a common MTU.
const EXPECTED_LEN: usize = NET_HEADER_LEN + 1514;

/// The receiving half of the device.
pub(super) struct Receiver {
    /// The driver merges buffers (`MRG_RXBUF`).
    mergeable: bool,
    /// What the next frame's length is guessed to be, in bytes.
    expected: usize,
    /// For the rest of a frame that is longer than expected.
    overflow: Box<[u8]>,
    /// The frame that waits for buffers. Empty if none does.
    held: Vec<u8>,
    /// The guest had no buffers: the source is not watched.
    starved: bool,
    /// Buffers of the guest; empty between calls.
    pool: Pool,
}

impl Default for Receiver {
    fn default() -> Self {
        Self {
            mergeable: false,
            expected: EXPECTED_LEN,
            overflow: vec![0; NET_FRAME_LEN_MAX].into(),
            held: Vec::new(),
            starved: false,
            pool: Pool::default(),
        }
    }
}

impl Receiver {
    pub(super) fn activate(&mut self, mergeable: bool) {
        self.mergeable = mergeable;
    }

    pub(super) fn is_starved(&self) -> bool {
        self.starved
    }

    /// The frame that waits for buffers, for saving.
    pub(super) fn held(&self) -> &[u8] {
        &self.held
    }

    /// Puts back a frame that waited.
    pub(super) fn hold(&mut self, frame: Vec<u8>) {
        self.starved = !frame.is_empty();
        self.held = frame;
    }

    /// Hands the guest what frames there are, within the burst. `false`: it has no buffers. `came` sees each frame
    /// as far as it lies in the guest's buffers, and its length.
    pub(super) fn receive(
        &mut self,
        backend: &mut dyn NetBackend,
        io: &mut QueueIo<'_>,
        came: &dyn Fn(&[GuestSlice<'_>], usize),
        lost: &mut dyn FnMut(io::Error),
    ) -> Result<bool, DriverFault> {
        let result = self.burst(backend, io, came, lost);
        io.undo_pop(RX, self.pool.clear());
        self.starved = !result.as_ref().is_ok_and(|more| *more);
        result
    }

    fn burst(
        &mut self,
        backend: &mut dyn NetBackend,
        io: &mut QueueIo<'_>,
        came: &dyn Fn(&[GuestSlice<'_>], usize),
        lost: &mut dyn FnMut(io::Error),
    ) -> Result<bool, DriverFault> {
        let ram = io.ram();
        let mut slices = Vec::new();
        for _ in 0..BURST_FRAMES_MAX {
            if !self.deliver_held(io, lost)? {
                return Ok(false);
            }
            let wanted = if self.mergeable { self.expected } else { 1 };
            self.pool.fill(io, wanted)?;
            if self.pool.len == 0 {
                if io.enable_notification(RX)? {
                    continue;
                }
                return Ok(false);
            }
            slices.clear();
            let room = self.pool.slices(ram, wanted, &mut slices)?;
            match backend.receive(&slices, &mut self.overflow) {
                Ok(len) => {
                    came(&slices, len);
                    self.accept(io, room, len.min(room + self.overflow.len()), lost)?;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(e) => {
                    // Nothing comes from a broken interface: don't spin on it.
                    lost(e);
                    return Ok(false);
                }
            }
        }
        // Also what the last round may have left: no further input might come.
        self.deliver_held(io, lost)
    }

    /// A frame of `len` bytes came, the first `room` of them into the pool's first buffers.
    fn accept(
        &mut self,
        io: &mut QueueIo<'_>,
        room: usize,
        len: usize,
        lost: &mut dyn FnMut(io::Error),
    ) -> Result<(), DriverFault> {
        let ram = io.ram();
        self.expected = len.max(self.expected - self.expected / 4);
        if let Some(rest) = len.checked_sub(room).filter(|rest| *rest > 0) {
            let rest = &self.overflow[..rest];
            if !self.mergeable {
                lost(too_long());
                return Ok(());
            }
            self.pool.fill(io, len)?;
            if self.pool.len < len {
                self.held.resize(room, 0);
                self.pool.copy_from(ram, &mut self.held)?;
                self.held.extend(rest);
                return Ok(());
            }
            self.pool.copy_to(ram, room, rest)?;
        }
        self.pool.complete(io, len)
    }

    /// Hands the guest the frame that waited, if one did. `false`: it has to wait on.
    fn deliver_held(
        &mut self,
        io: &mut QueueIo<'_>,
        lost: &mut dyn FnMut(io::Error),
    ) -> Result<bool, DriverFault> {
        let len = self.held.len();
        if len == 0 {
            return Ok(true);
        }
        // Each further round finds further chains, of which there are at most the queue's size.
        for _ in 0..=io.size(RX) {
            self.pool.fill(io, len)?;
            if self.pool.len >= len {
                self.pool.copy_to(io.ram(), 0, &self.held)?;
                self.held.clear();
                return self.pool.complete(io, len).map(|()| true);
            }
            if self.pool.chains.len() >= usize::from(io.size(RX)) || !self.mergeable {
                break;
            }
            if !io.enable_notification(RX)? {
                return Ok(false);
            }
        }
        // All that the guest can ever offer is too little.
        self.held.clear();
        lost(too_long());
        Ok(true)
    }
}

fn too_long() -> io::Error {
    io::Error::other("it is longer than the guest's buffers")
}

/// Chains of the receive queue, in the order in which they were popped.
#[derive(Default)]
struct Pool {
    chains: VecDeque<Chain>,
    /// Their length together, in bytes.
    len: usize,
    /// For [`Self::complete`].
    used: Vec<(u16, u32)>,
}

impl Pool {
    /// Pops chains until there are `wanted` bytes, or no more chains.
    fn fill(&mut self, io: &mut QueueIo<'_>, wanted: usize) -> Result<(), DriverFault> {
        while self.len < wanted {
            let Some(chain) = io.pop(RX)? else { break };
            let len = chain.writable_len();
            if len < NET_HEADER_LEN {
                return Err(DriverFault::Request("a receive buffer shorter than virtio_net_hdr"));
            }
            self.len += len;
            self.chains.push_back(chain);
        }
        Ok(())
    }

    /// Lists the RAM of the first chains, up to `wanted` bytes or as many pieces as are sensible. Returns
    /// the length listed.
    fn slices<'m>(
        &self,
        ram: &'m GuestRam,
        wanted: usize,
        out: &mut Vec<GuestSlice<'m>>,
    ) -> Result<usize, DriverFault> {
        let mut listed = 0;
        for chain in &self.chains {
            let len = chain.writable_len();
            chain.writable.slices(ram, 0, len, out)?;
            listed += len;
            if listed >= wanted || out.len() >= PIECES_MAX {
                break;
            }
        }
        Ok(listed)
    }

    /// Writes `data` at `offset` bytes into the chains, which have room for it.
    fn copy_to(&self, ram: &GuestRam, offset: usize, data: &[u8]) -> Result<(), DriverFault> {
        let (mut skip, mut rest) = (offset, data);
        for chain in &self.chains {
            let len = chain.writable_len();
            let at = skip.min(len);
            skip -= at;
            let (now, later) = rest.split_at(rest.len().min(len - at));
            chain.copy_to(ram, at, now)?;
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        Ok(())
    }

    /// Reads back what lies in the first chains.
    fn copy_from(&self, ram: &GuestRam, data: &mut [u8]) -> Result<(), DriverFault> {
        let mut rest = data;
        for chain in &self.chains {
            let (now, later) = rest.split_at_mut(rest.len().min(chain.writable_len()));
            chain.writable.copy_from(ram, 0, now)?;
            rest = later;
        }
        Ok(())
    }

    /// Returns the first chains to the guest as one frame of `len` bytes.
    fn complete(&mut self, io: &mut QueueIo<'_>, len: usize) -> Result<(), DriverFault> {
        self.used.clear();
        let mut left = len;
        let mut first = None;
        while left > 0 || first.is_none() {
            let Some(chain) = self.chains.pop_front() else { break };
            let room = chain.writable_len();
            self.len -= room;
            let here = left.min(room);
            left -= here;
            self.used.push((chain.head, u32::try_from(here).expect("a frame is below 4 GiB")));
            first.get_or_insert(chain);
        }
        let Some(first) = first else { return Ok(()) };
        let count = u16::try_from(self.used.len()).expect("a queue has at most 32768 chains");
        first.copy_to(io.ram(), NUM_BUFFERS, &count.to_le_bytes())?;
        io.push_all(RX, &self.used)
    }

    /// Forgets the chains; returns how many there were.
    fn clear(&mut self) -> u16 {
        let count = u16::try_from(self.chains.len()).expect("a queue has at most 32768 chains");
        self.chains.clear();
        self.len = 0;
        count
    }
}

#[cfg(test)]
#[path = "receive_tests.rs"]
mod tests;
