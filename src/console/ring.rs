//! A queue of bytes from one thread to one other, without locks and without `unsafe`.
//!
//! Positions count up for ever; a byte's place is its position modulo the capacity. Memory comes in
//! blocks, on first use; and a push into an empty ring starts over at the front, so that a console
//! whose reader keeps up touches one block only.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

/// Bytes that a [`Ring`] holds at most.
pub const CAPACITY: usize = 1 << 20;
const BLOCK_LEN: usize = 4096;

type Block = Box<[AtomicU8]>;

/// The queue. Two threads that push, or two that take, at the same time garble the bytes (and nothing
/// but the bytes).
pub struct Ring {
    blocks: Box<[OnceLock<Block>]>,
    /// Position after the last byte that was pushed. Written by the pushing thread.
    head: AtomicUsize,
    /// Position of the oldest byte. Written by the taking thread; by the pushing one while empty.
    tail: AtomicUsize,
}

impl Default for Ring {
    /// An empty ring that has no memory yet.
    fn default() -> Self {
        let blocks = (0..CAPACITY / BLOCK_LEN).map(|_| OnceLock::new()).collect();
        Self { blocks, head: AtomicUsize::new(0), tail: AtomicUsize::new(0) }
    }
}

impl Ring {
    /// Bytes pushed and not yet taken.
    pub fn pending(&self) -> usize {
        // The tail is read last: a push into the empty ring moves the tail before the head, so the
        // tail is never behind by a lap, only perhaps ahead of an old head. That reads as empty.
        let head = self.head.load(Ordering::SeqCst);
        let tail = self.tail.load(Ordering::SeqCst);
        head.saturating_sub(tail)
    }

    /// Pushes as many bytes as fit, and says how many.
    pub fn push(&self, bytes: &[u8]) -> usize {
        let mut head = self.head.load(Ordering::SeqCst);
        let mut tail = self.tail.load(Ordering::SeqCst);
        if head == tail && !head.is_multiple_of(CAPACITY) {
            // Empty, and the taking thread writes the tail only when it isn't.
            head = head.next_multiple_of(CAPACITY);
            tail = head;
            self.tail.store(tail, Ordering::SeqCst);
        }
        let count = bytes.len().min(CAPACITY - (head - tail));
        for (position, byte) in (head..).zip(&bytes[..count]) {
            self.cell(position).store(*byte, Ordering::Relaxed);
        }
        if count > 0 {
            self.head.store(head + count, Ordering::SeqCst);
        }
        count
    }

    /// Copies the oldest bytes and says how many. They stay until [`Self::consume`].
    pub fn peek(&self, out: &mut [u8]) -> usize {
        let count = self.pending().min(out.len());
        let tail = self.tail.load(Ordering::SeqCst);
        for (position, byte) in (tail..).zip(&mut out[..count]) {
            *byte = self.cell(position).load(Ordering::Relaxed);
        }
        count
    }

    /// Takes the oldest `count` bytes away, which [`Self::peek`] has shown.
    pub fn consume(&self, count: usize) {
        if count > 0 {
            self.tail.fetch_add(count, Ordering::SeqCst);
        }
    }

    fn cell(&self, position: usize) -> &AtomicU8 {
        let place = position % CAPACITY;
        let block = self.blocks[place / BLOCK_LEN]
            .get_or_init(|| (0..BLOCK_LEN).map(|_| AtomicU8::new(0)).collect());
        &block[place % BLOCK_LEN]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(ring: &Ring, most: usize) -> Vec<u8> {
        let mut out = vec![0; most];
        let count = ring.peek(&mut out);
        ring.consume(count);
        out.truncate(count);
        out
    }

    #[test]
    fn keeps_order_and_refuses_what_does_not_fit() {
        let ring = Ring::default();
        assert_eq!(ring.push(b"abc"), 3);
        assert_eq!(take(&ring, 2), b"ab");
        let big: Vec<u8> = (0..CAPACITY).map(|i| u8::try_from(i % 251).unwrap()).collect();
        assert_eq!(ring.push(&big), CAPACITY - 1);
        assert_eq!((ring.pending(), ring.push(b"x")), (CAPACITY, 0));
        assert_eq!(take(&ring, 1), b"c");
        assert_eq!(ring.push(b"xy"), 1);
        let mut expected = big[..CAPACITY - 1].to_vec();
        expected.push(b'x');
        assert!(take(&ring, CAPACITY) == expected);
        assert_eq!(ring.pending(), 0);
    }

    #[test]
    fn a_reader_that_keeps_up_costs_one_block() {
        let ring = Ring::default();
        for round in 0..3 * CAPACITY / 100 {
            let line = [u8::try_from(round % 256).unwrap(); 100];
            assert_eq!(ring.push(&line), 100);
            assert_eq!(take(&ring, 200), line);
        }
        assert_eq!(ring.blocks.iter().filter(|b| b.get().is_some()).count(), 1);
    }

    #[test]
    fn two_threads_pass_every_byte_once() {
        const TOTAL: usize = 300_000;
        let ring = Ring::default();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut sent = 0usize;
                while sent < TOTAL {
                    // Sizes that differ, and pauses in which the ring runs empty and starts over.
                    let size = (1 + sent % 97).min(TOTAL - sent);
                    let bytes: Vec<u8> = (sent..sent + size).map(|i| i.to_le_bytes()[0]).collect();
                    sent += ring.push(&bytes);
                    if sent.is_multiple_of(13) {
                        std::thread::yield_now();
                    }
                }
            });
            let mut seen = 0usize;
            while seen < TOTAL {
                for byte in take(&ring, 64) {
                    assert_eq!(byte, seen.to_le_bytes()[0], "byte {seen}");
                    seen += 1;
                }
            }
        });
        assert_eq!(ring.pending(), 0);
    }
}
