//! What a device sees of its virtqueues (virtio 1.3, 2.7): chains come out, used buffers go in.
//!
//! The indices and addresses live in [`virtio_queue::Queue`]; chains are walked here because that crate
//! ends a broken chain silently, and used buffers are published here because it can't publish several
//! at once.

use std::num::Wrapping;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

pub use super::chain::{Chain, Span, Spans};

use super::DriverFault;
use crate::GuestRam;

/// Most virtqueues of one device: the bits of `QueueIo::armed`.
pub const QUEUES_MAX: usize = 16;

/// Offset of the ring in the available and in the used area, behind `flags` and `idx`.
const RING_OFFSET: u64 = 4;
/// Offset of `idx` in both areas.
const INDEX_OFFSET: u64 = 2;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (virtio 1.3, 2.7.6).
const AVAIL_NO_INTERRUPT: u16 = 1;

/// What a call into a device left to be told to the driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signals {
    /// Used buffers that the driver wants to hear of.
    pub used: bool,
    /// The configuration space changed.
    pub config: bool,
}

/// The queues of one device and the RAM they lie in, borrowed for one call into the device.
///
/// An operation on a queue that the driver has not made ready finds it empty (virtio 1.3, 4.2.2.1: the
/// device doesn't touch it).
pub struct QueueIo<'a> {
    ram: &'a GuestRam,
    queues: &'a mut [Queue],
    /// Where each queue's used index stood before the call.
    used_before: [u16; QUEUES_MAX],
    /// A bit for each queue of which the driver was asked to tell the chain after the last one popped.
    armed: u16,
    config_changed: bool,
    /// While set, no chain is popped.
    hold: Option<&'a AtomicBool>,
}

impl<'a> QueueIo<'a> {
    /// Lends a device its queues.
    ///
    /// # Panics
    /// With more than [`QUEUES_MAX`] queues.
    pub fn new(ram: &'a GuestRam, queues: &'a mut [Queue]) -> Self {
        let mut used_before = [0; QUEUES_MAX];
        assert!(queues.len() <= QUEUES_MAX, "the transport admits devices of few queues only");
        for (mark, queue) in used_before.iter_mut().zip(queues.iter()) {
            *mark = queue.next_used();
        }
        Self { ram, queues, used_before, armed: 0, config_changed: false, hold: None }
    }

    /// The same, but while `hold` is set the queues seem empty to the device: what waits there has to be looked at again.
    #[must_use]
    pub fn held_by(self, hold: &'a AtomicBool) -> Self {
        Self { hold: Some(hold), ..self }
    }

    /// Guest RAM.
    #[must_use]
    pub fn ram(&self) -> &'a GuestRam {
        self.ram
    }

    /// How many queues the device has.
    #[must_use]
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// How many chains a queue holds at most, as the driver set it; 0 if it is not ready.
    #[must_use]
    pub fn size(&self, queue: usize) -> u16 {
        self.queues.get(queue).filter(|q| q.ready()).map_or(0, QueueT::size)
    }

    /// Takes the next chain that the driver made available, checked whole: every buffer is in RAM,
    /// readable ones stand before writable ones, the chain ends, indirect tables are followed. `None`:
    /// there is none.
    ///
    /// # Errors
    /// The ring or the chain is broken, or the driver made more chains available than its queue holds.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain>, DriverFault> {
        let ram = self.ram;
        if self.hold.is_some_and(|hold| hold.load(Ordering::Acquire)) {
            return Ok(None);
        }
        let Some(q) = ready(self.queues, queue) else { return Ok(None) };
        let chain = pop(ram, q).map_err(|why| DriverFault::Queue { queue, why: why.to_owned() })?;
        if chain.is_some() {
            self.armed &= !(1 << queue);
        }
        Ok(chain)
    }

    /// Puts the last `count` popped chains back, as if they had not been popped.
    pub fn undo_pop(&mut self, queue: usize, count: u16) {
        if let Some(q) = ready(self.queues, queue) {
            q.set_next_avail(q.next_avail().wrapping_sub(count));
        }
    }

    /// Returns the chain of descriptor `head` to the driver, with `len` bytes written to it.
    ///
    /// # Errors
    /// The used ring is not in RAM, or `head` is no index of this queue.
    pub fn push(&mut self, queue: usize, head: u16, len: u32) -> Result<(), DriverFault> {
        self.push_all(queue, &[(head, len)])
    }

    /// Returns several chains, `(head, length written)` each, so that the driver sees all or none: what
    /// the buffers of one merged frame need (virtio 1.3, 5.1.6.4.1).
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn push_all(&mut self, queue: usize, used: &[(u16, u32)]) -> Result<(), DriverFault> {
        let ram = self.ram;
        let Some(q) = ready(self.queues, queue) else { return Ok(()) };
        push(ram, q, used).map_err(|why| DriverFault::Queue { queue, why: why.to_owned() })
    }

    /// Asks the driver for no more notifications. A hint, and nothing at all with `EVENT_IDX`.
    pub fn disable_notification(&mut self, queue: usize) -> Result<(), DriverFault> {
        let ram = self.ram;
        let Some(q) = ready(self.queues, queue) else { return Ok(()) };
        q.disable_notification(ram)
            .map_err(|e| DriverFault::Queue { queue, why: format!("disable notification: {e}") })
    }

    /// Asks the driver to notify the device of the next chain. `true`: chains are available that were
    /// not popped (they may have come meanwhile), for which no notification will come.
    pub fn enable_notification(&mut self, queue: usize) -> Result<bool, DriverFault> {
        let ram = self.ram;
        let Some(q) = ready(self.queues, queue) else { return Ok(false) };
        let left = q
            .enable_notification(ram)
            .map_err(|e| DriverFault::Queue { queue, why: format!("enable notification: {e}") })?;
        if !left {
            self.armed |= 1 << queue;
        }
        Ok(left)
    }

    /// Whether the device popped all chains of `queue` and asked to be notified of the next, in this
    /// call. It may have put them back after that, to wait until there are more: enabling the
    /// notifications again would then ask for chains that are long there.
    #[must_use]
    pub fn is_armed(&self, queue: usize) -> bool {
        self.armed & 1 << queue != 0
    }

    /// The device changed its configuration space: the driver is told after the call.
    pub fn config_changed(&mut self) {
        self.config_changed = true;
    }

    /// Ends the call: what is to be told to the driver.
    ///
    /// # Errors
    /// A ring is not in RAM.
    pub fn finish(self) -> Result<Signals, DriverFault> {
        let mut signals = Signals { used: false, config: self.config_changed };
        for (queue, (q, before)) in self.queues.iter().zip(self.used_before).enumerate() {
            if q.ready() && q.next_used() != before {
                signals.used |= wants_interrupt(self.ram, q, before)
                    .map_err(|why| DriverFault::Queue { queue, why: why.to_owned() })?;
            }
        }
        Ok(signals)
    }
}

fn ready(queues: &mut [Queue], queue: usize) -> Option<&mut Queue> {
    queues.get_mut(queue).filter(|q| q.ready())
}

fn at(base: u64, offset: u64) -> Result<GuestAddress, &'static str> {
    base.checked_add(offset).map(GuestAddress).ok_or("a ring outside of RAM")
}

fn load(ram: &GuestRam, at: GuestAddress, order: Ordering) -> Result<u16, &'static str> {
    ram.load(at, order).map(u16::from_le).map_err(|_| "a ring outside of RAM")
}

fn pop(ram: &GuestRam, q: &mut Queue) -> Result<Option<Chain>, &'static str> {
    let next = q.next_avail();
    // Acquire: what the driver wrote before it moved the index is visible from here on.
    let end = load(ram, at(q.avail_ring(), INDEX_OFFSET)?, Ordering::Acquire)?;
    if end == next {
        return Ok(None);
    }
    if end.wrapping_sub(next) > q.size() {
        return Err("the available index jumps by more than the queue's size");
    }
    if next.wrapping_sub(q.next_used()) >= q.size() {
        return Err("more chains in flight than the queue holds");
    }
    let slot = RING_OFFSET + 2 * u64::from(next % q.size());
    let head = load(ram, at(q.avail_ring(), slot)?, Ordering::Relaxed)?;
    let chain = Chain::walk(ram, q, head)?;
    q.set_next_avail(next.wrapping_add(1));
    Ok(Some(chain))
}

fn push(ram: &GuestRam, q: &mut Queue, used: &[(u16, u32)]) -> Result<(), &'static str> {
    let mut next = Wrapping(q.next_used());
    for (head, len) in used {
        if *head >= q.size() {
            return Err("a used chain that is none of the queue's");
        }
        let slot = RING_OFFSET + 8 * u64::from(next.0 % q.size());
        // One element: the head's index as 32 bits, then the length (virtio 1.3, 2.7.8).
        let element = u64::from(*head) | u64::from(*len) << 32;
        ram.write_obj(element.to_le(), at(q.used_ring(), slot)?)
            .map_err(|_| "a used ring outside of RAM")?;
        next += 1;
    }
    q.set_next_used(next.0);
    // Release: the driver that sees the index sees the elements, and the data in the buffers.
    ram.store(next.0.to_le(), at(q.used_ring(), INDEX_OFFSET)?, Ordering::Release)
        .map_err(|_| "a used ring outside of RAM")
}

/// Whether the driver wants to hear of the used buffers since `before` (virtio 1.3, 2.7.7.2).
fn wants_interrupt(ram: &GuestRam, q: &Queue, before: u16) -> Result<bool, &'static str> {
    // The used index must be visible before the driver's wish is read, or both sides sleep.
    fence(Ordering::SeqCst);
    if !q.event_idx_enabled() {
        let flags = load(ram, at(q.avail_ring(), 0)?, Ordering::Relaxed)?;
        return Ok(flags & AVAIL_NO_INTERRUPT == 0);
    }
    let used_event = at(q.avail_ring(), RING_OFFSET + 2 * u64::from(q.size()))?;
    let event = Wrapping(load(ram, used_event, Ordering::Relaxed)?);
    let (now, before) = (Wrapping(q.next_used()), Wrapping(before));
    Ok(now - event - Wrapping(1) < now - before)
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
