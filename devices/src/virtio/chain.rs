//! Descriptor chains (virtio 1.3, 2.7.5): read once out of guest RAM, checked whole, then only the copy
//! is used, so that a guest that rewrites a descriptor under the device's hands changes nothing.

use std::ops::Deref;

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::DriverFault;
use crate::{GuestRam, GuestSlice};

/// Spans that a [`Spans`] holds without the heap: a block request of a few pages, a network frame.
const SPANS_INLINE: usize = 8;

/// Size of one descriptor in a table, in bytes.
const DESCRIPTOR_LEN: u32 = 16;

/// A piece of guest RAM that a descriptor names. Its whole range was found in RAM when the chain was
/// popped, and `len` is not zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Guest physical address of the first byte.
    pub addr: GuestAddress,
    /// Length in bytes, at least 1.
    pub len: u32,
}

/// The spans of one direction of a chain, in order: a slice of [`Span`] that needs the heap only when
/// it is long.
#[derive(Clone, Debug, Default)]
pub struct Spans {
    inline: [Span; SPANS_INLINE],
    inline_len: usize,
    /// All of them, once there are too many for `inline`.
    spill: Vec<Span>,
}

impl Deref for Spans {
    type Target = [Span];

    fn deref(&self) -> &[Span] {
        if self.spill.is_empty() { &self.inline[..self.inline_len] } else { &self.spill }
    }
}

impl Spans {
    fn push(&mut self, span: Span) {
        if !self.spill.is_empty() {
            self.spill.push(span);
        } else if self.inline_len < SPANS_INLINE {
            self.inline[self.inline_len] = span;
            self.inline_len += 1;
        } else {
            self.spill.reserve(4 * SPANS_INLINE);
            self.spill.extend_from_slice(&self.inline);
            self.spill.push(span);
        }
    }

    /// Length of all spans in bytes, at most `u32::MAX` for the two directions of a chain together.
    #[must_use]
    pub fn total_len(&self) -> usize {
        self.iter().map(|s| s.len as usize).sum()
    }

    /// Fills `data` from `offset` bytes into the spans.
    ///
    /// # Errors
    /// The spans end before `data` is full: the request is malformed.
    pub fn copy_from(
        &self,
        ram: &GuestRam,
        offset: usize,
        data: &mut [u8],
    ) -> Result<(), DriverFault> {
        let mut rest = data;
        for part in self.parts(offset, rest.len()) {
            let (now, later) = rest.split_at_mut(part.len as usize);
            ram.read_slice(now, part.addr).map_err(|_| OUTSIDE)?;
            rest = later;
        }
        if rest.is_empty() { Ok(()) } else { Err(TOO_SHORT) }
    }

    /// Writes `data` at `offset` bytes into the spans.
    ///
    /// # Errors
    /// The spans have no room for all of `data`: the request is malformed. Some of it may be written.
    pub fn copy_to(&self, ram: &GuestRam, offset: usize, data: &[u8]) -> Result<(), DriverFault> {
        let mut rest = data;
        for part in self.parts(offset, rest.len()) {
            let (now, later) = rest.split_at(part.len as usize);
            ram.write_slice(now, part.addr).map_err(|_| OUTSIDE)?;
            rest = later;
        }
        if rest.is_empty() { Ok(()) } else { Err(TOO_SHORT) }
    }

    /// Appends to `out` the RAM that lies from `offset`, `len` bytes long, for vectored I/O. A span that
    /// crosses two regions of RAM gives two slices. Reusing `out` saves the allocation.
    ///
    /// # Errors
    /// The spans end before `len` bytes: the request is malformed.
    pub fn slices<'m>(
        &self,
        ram: &'m GuestRam,
        offset: usize,
        len: usize,
        out: &mut Vec<GuestSlice<'m>>,
    ) -> Result<(), DriverFault> {
        let mut found = 0;
        for part in self.parts(offset, len) {
            for slice in ram.get_slices(part.addr, part.len as usize) {
                out.push(slice.map_err(|_| OUTSIDE)?);
            }
            found += part.len as usize;
        }
        if found == len { Ok(()) } else { Err(TOO_SHORT) }
    }

    /// The spans, cut to the `len` bytes that start at `offset`.
    fn parts(&self, offset: usize, len: usize) -> impl Iterator<Item = Span> {
        let (mut skip, mut left) = (offset, len);
        self.iter().filter_map(move |span| {
            let jump = skip.min(span.len as usize);
            skip -= jump;
            let take = left.min(span.len as usize - jump);
            left -= take;
            let len = u32::try_from(take).ok().filter(|l| *l > 0)?;
            // No overflow: the span as a whole was found in RAM.
            Some(Span { addr: GuestAddress(span.addr.0 + jump as u64), len })
        })
    }
}

const TOO_SHORT: DriverFault = DriverFault::Request("the chain's buffers are too short");
const OUTSIDE: DriverFault = DriverFault::Request("a buffer lies outside of RAM");

/// A chain that the driver made available: what the device may read, then what it may write.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// Index of the first descriptor: the chain's name when it is given back.
    pub head: u16,
    /// Device-readable buffers.
    pub readable: Spans,
    /// Device-writable buffers.
    pub writable: Spans,
}

impl Chain {
    /// Length of the readable buffers in bytes.
    #[must_use]
    pub fn readable_len(&self) -> usize {
        self.readable.total_len()
    }

    /// Length of the writable buffers in bytes.
    #[must_use]
    pub fn writable_len(&self) -> usize {
        self.writable.total_len()
    }

    /// [`Spans::copy_from`] of the readable buffers.
    pub fn copy_from(
        &self,
        ram: &GuestRam,
        offset: usize,
        data: &mut [u8],
    ) -> Result<(), DriverFault> {
        self.readable.copy_from(ram, offset, data)
    }

    /// [`Spans::copy_to`] of the writable buffers.
    pub fn copy_to(&self, ram: &GuestRam, offset: usize, data: &[u8]) -> Result<(), DriverFault> {
        self.writable.copy_to(ram, offset, data)
    }

    /// Reads the chain that starts at descriptor `head` of `queue`.
    ///
    /// A direct chain is at most the queue's size long. An indirect one may be as long as the largest
    /// size that the device offered: a driver that settled for a smaller ring (Linux does when it
    /// can't allocate a large one) still builds requests of the device's segment limit.
    pub(super) fn walk(ram: &GuestRam, queue: &Queue, head: u16) -> Result<Self, &'static str> {
        let mut chain = Self { head, ..Self::default() };
        let mut table = Table {
            base: queue.desc_table(),
            len: u32::from(queue.size()),
            left: u32::from(queue.size()),
        };
        let (mut index, mut indirect, mut total) = (head, false, 0u32);
        loop {
            let descriptor = table.read(ram, index)?;
            if descriptor.refers_to_indirect_table() {
                if indirect {
                    return Err("an indirect table names another one");
                }
                table = Table::indirect(&descriptor, queue.max_size())?;
                (index, indirect) = (0, true);
                continue;
            }
            total = total.checked_add(descriptor.len()).ok_or("a chain of more than 4 GiB")?;
            chain.add(ram, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(chain);
            }
            index = descriptor.next();
        }
    }

    fn add(&mut self, ram: &GuestRam, descriptor: &Descriptor) -> Result<(), &'static str> {
        let span = Span { addr: descriptor.addr(), len: descriptor.len() };
        if !descriptor.is_write_only() && !self.writable.is_empty() {
            return Err("a readable buffer after a writable one");
        }
        if !ram.check_range(span.addr, span.len as usize) {
            return Err("a buffer outside of RAM");
        }
        // A buffer of no bytes is pointless and not forbidden; devices needn't know of it.
        if span.len > 0 {
            if descriptor.is_write_only() { &mut self.writable } else { &mut self.readable }
                .push(span);
        }
        Ok(())
    }
}

/// A descriptor table under a walk.
struct Table {
    base: u64,
    /// Descriptors in it.
    len: u32,
    /// How many more may be read before the chain counts as endless.
    left: u32,
}

impl Table {
    fn indirect(descriptor: &Descriptor, chain_len_max: u16) -> Result<Self, &'static str> {
        if descriptor.has_next() {
            return Err("an indirect descriptor with a next one");
        }
        let bytes = descriptor.len();
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR_LEN) {
            return Err("an indirect table that is no whole number of descriptors long");
        }
        let len = bytes / DESCRIPTOR_LEN;
        Ok(Self { base: descriptor.addr().0, len, left: len.min(u32::from(chain_len_max)) })
    }

    fn read(&mut self, ram: &GuestRam, index: u16) -> Result<Descriptor, &'static str> {
        self.left = self.left.checked_sub(1).ok_or("a loop of descriptors, or too long a chain")?;
        if u32::from(index) >= self.len {
            return Err("a descriptor index past the end of its table");
        }
        self.base
            .checked_add(u64::from(index) * u64::from(DESCRIPTOR_LEN))
            .and_then(|at| ram.read_obj(GuestAddress(at)).ok())
            .ok_or("a descriptor table outside of RAM")
    }
}

#[cfg(test)]
#[path = "chain_tests.rs"]
mod tests;
