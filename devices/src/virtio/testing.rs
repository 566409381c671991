//! The driver's side of a virtqueue and of the register map, for tests of devices and transport.

mod driver;
mod echo;

use std::sync::atomic::{AtomicU64, Ordering};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::GuestRam;
use crate::irq::IrqLine;

pub use driver::{Driver, IoLoop, moved};
pub use echo::{Echo, Odd, Probe};

/// Guest RAM of `len` bytes from address 0.
pub fn ram(len: usize) -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), len)]).expect("mapping RAM")
}

/// An interrupt line that counts its edges.
#[derive(Debug, Default)]
pub struct CountingLine(AtomicU64);

impl CountingLine {
    /// Edges since the start.
    pub fn edges(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

impl IrqLine for CountingLine {
    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// One descriptor as a driver writes it, without its place in the chain.
#[derive(Clone, Copy, Debug)]
pub struct Buf {
    /// Address of the first byte.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Device-writable.
    pub write: bool,
}

impl Buf {
    /// A device-readable buffer.
    pub fn readable(addr: u64, len: u32) -> Self {
        Self { addr, len, write: false }
    }

    /// A device-writable buffer.
    pub fn writable(addr: u64, len: u32) -> Self {
        Self { addr, len, write: true }
    }
}

/// Descriptor flags (virtio 1.3, 2.7.5).
pub const F_NEXT: u16 = 1;
/// Device-writable.
pub const F_WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const F_INDIRECT: u16 = 4;

/// A split virtqueue as its driver sees it. Descriptors are handed out round and round and never
/// waited for: a test that outruns its queue overwrites them.
pub struct DriverRing {
    ram: GuestRam,
    /// Entries, a power of two.
    pub size: u16,
    /// Address of the descriptor table.
    pub desc: u64,
    /// Address of the available ring.
    pub avail: u64,
    /// Address of the used ring.
    pub used: u64,
    next_desc: u16,
    avail_idx: u16,
    used_seen: u16,
}

impl DriverRing {
    /// A ring of `size` entries laid out from `base` (page-aligned; [`Self::len`] bytes).
    pub fn new(ram: &GuestRam, base: u64, size: u16) -> Self {
        let avail = base + 16 * u64::from(size);
        let used = (avail + 6 + 2 * u64::from(size)).next_multiple_of(4);
        let zeroes = vec![0; usize::try_from(Self::len(size)).expect("a small ring")];
        ram.write_slice(&zeroes, GuestAddress(base)).expect("the ring is in RAM");
        let ram = ram.clone();
        Self { ram, size, desc: base, avail, used, next_desc: 0, avail_idx: 0, used_seen: 0 }
    }

    /// Bytes of RAM that a ring of `size` entries takes, at most.
    pub fn len(size: u16) -> u64 {
        32 + 26 * u64::from(size)
    }

    /// The device's view of this ring, ready.
    pub fn device_queue(&self, event_idx: bool) -> Queue {
        let halves = |a: u64| {
            let low = u32::try_from(a & 0xffff_ffff).expect("masked");
            (Some(low), Some(u32::try_from(a >> 32).expect("shifted")))
        };
        let mut q = Queue::new(self.size).expect("a valid size");
        q.set_desc_table_address(halves(self.desc).0, halves(self.desc).1);
        q.set_avail_ring_address(halves(self.avail).0, halves(self.avail).1);
        q.set_used_ring_address(halves(self.used).0, halves(self.used).1);
        q.set_event_idx(event_idx);
        q.set_ready(true);
        q
    }

    /// Writes one raw descriptor.
    pub fn descriptor(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(table + 16 * u64::from(index));
        let words = addr.to_le_bytes().into_iter().chain(len.to_le_bytes());
        let bytes: Vec<u8> = words.chain(flags.to_le_bytes()).chain(next.to_le_bytes()).collect();
        self.ram.write_slice(&bytes, at).expect("the table is in RAM");
    }

    fn chain(&self, table: u64, first: u16, size: u16, bufs: &[Buf]) {
        for (i, b) in (0u16..).zip(bufs) {
            let last = usize::from(i) + 1 == bufs.len();
            let flags = if b.write { F_WRITE } else { 0 } | if last { 0 } else { F_NEXT };
            let next = if last { 0 } else { (first + i + 1) % size };
            self.descriptor(table, (first + i) % size, b.addr, b.len, flags, next);
        }
    }

    /// Makes a chain of `bufs` available without a notification; returns its head.
    pub fn add(&mut self, bufs: &[Buf]) -> u16 {
        let head = self.take(u16::try_from(bufs.len()).expect("a short chain"));
        self.chain(self.desc, head, self.size, bufs);
        self.publish(head);
        head
    }

    /// As [`Self::add`], through an indirect table at address `table`.
    pub fn add_indirect(&mut self, table: u64, bufs: &[Buf]) -> u16 {
        let head = self.take(1);
        let len = u16::try_from(bufs.len()).expect("a short chain");
        self.chain(table, 0, len.max(1), bufs);
        self.descriptor(self.desc, head, table, 16 * u32::from(len), F_INDIRECT, 0);
        self.publish(head);
        head
    }

    /// Puts `head` into the available ring, whatever it is.
    pub fn publish(&mut self, head: u16) {
        let slot = self.avail + 4 + 2 * u64::from(self.avail_idx % self.size);
        self.store(slot, head);
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    /// Moves the available index, whatever that means.
    pub fn set_avail_idx(&mut self, idx: u16) {
        self.avail_idx = idx;
        self.store(self.avail + 2, idx);
    }

    /// Sets `flags` of the available ring (1: no interrupts please).
    pub fn set_avail_flags(&self, flags: u16) {
        self.store(self.avail, flags);
    }

    /// Sets `used_event`: interrupt once the used index moves past it.
    pub fn set_used_event(&self, event: u16) {
        self.store(self.avail + 4 + 2 * u64::from(self.size), event);
    }

    /// The device's `avail_event`.
    pub fn avail_event(&self) -> u16 {
        self.load(self.used + 4 + 8 * u64::from(self.size))
    }

    /// The device's `flags` (1: no notifications please).
    pub fn used_flags(&self) -> u16 {
        self.load(self.used)
    }

    /// The device's used index.
    pub fn used_idx(&self) -> u16 {
        self.load(self.used + 2)
    }

    /// The next chain that came back: its head and the length written.
    pub fn pop_used(&mut self) -> Option<(u16, u32)> {
        if self.used_idx() == self.used_seen {
            return None;
        }
        let slot = self.used + 4 + 8 * u64::from(self.used_seen % self.size);
        self.used_seen = self.used_seen.wrapping_add(1);
        let mut len = [0; 4];
        self.ram.read_slice(&mut len, GuestAddress(slot + 4)).expect("the ring is in RAM");
        Some((self.load(slot), u32::from_le_bytes(len)))
    }

    fn take(&mut self, count: u16) -> u16 {
        let first = self.next_desc;
        self.next_desc = (first + count) % self.size;
        first
    }

    fn store(&self, at: u64, value: u16) {
        let at = GuestAddress(at);
        self.ram.store(value.to_le(), at, Ordering::SeqCst).expect("the ring is in RAM");
    }

    fn load(&self, at: u64) -> u16 {
        let value = self.ram.load::<u16>(GuestAddress(at), Ordering::SeqCst);
        u16::from_le(value.expect("the ring is in RAM"))
    }
}
