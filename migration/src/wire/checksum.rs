//! The checksum behind each record, and the digest over all of them.
//!
//! `Pages2` has XXH64's, which takes plain instructions only; every other record has CRC-32, which is fast by PCLMULQDQ
//! alone. A page of 4 KiB took 0.8 us with XXH64 and 4.9 us with CRC-32 on emulated CPUs, 0.38 and 0.10 to 0.14 us on an
//! AMD EPYC: so a source takes the [`Algorithm::fastest`] for its pages. `PROTOCOL.md`, "Framing", is the specification.

use std::hash::Hasher;
use std::hint::black_box;
use std::time::Duration;

use twox_hash::XxHash64;

use super::{RecordHead, record};

/// Bytes over which the algorithms are timed, and how often: 0.06 ms in all, on emulated CPUs 0.2 to 0.3 ms.
const TIMED_BYTES: usize = 16 << 10;
const TIMED_TURNS: usize = 4;

/// What a checksum is taken with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// CRC-32/ISO-HDLC, as in `Pages`.
    Crc32,
    /// The low half of XXH64 with seed 0, as in `Pages2`.
    Xxh64,
}

impl Algorithm {
    /// The faster on the processor that this runs on, by the best of a few turns each. `now` is any clock.
    pub fn fastest(now: impl Fn() -> Duration) -> Self {
        let body = vec![0x55; TIMED_BYTES];
        let best = |kind| {
            let turns = (0..TIMED_TURNS).map(|_| {
                let start = now();
                let mut sum = Checksum::new(RecordHead::new(kind, TIMED_BYTES));
                sum.update(black_box(&body));
                black_box(sum.value());
                now().saturating_sub(start)
            });
            turns.min()
        };
        if best(record::PAGES) < best(record::PAGES2) { Self::Crc32 } else { Self::Xxh64 }
    }
}

/// The checksum of one record, over type, length and body, being taken.
#[derive(Clone, Debug)]
pub struct Checksum(Taking);

#[derive(Clone, Debug)]
enum Taking {
    Crc32(crc32fast::Hasher),
    Xxh64(XxHash64),
}

impl Checksum {
    /// Begins with a record's head. Its type chooses the algorithm: CRC-32 also for a type that isn't known.
    #[must_use]
    pub fn new(head: RecordHead) -> Self {
        let mut sum = Self(match head.kind {
            record::PAGES2 => Taking::Xxh64(XxHash64::with_seed(0)),
            _ => Taking::Crc32(crc32fast::Hasher::new()),
        });
        sum.update(&head.encode());
        sum
    }

    /// Takes in the next bytes of the body.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            Taking::Crc32(crc) => crc.update(bytes),
            Taking::Xxh64(hash) => hash.write(bytes),
        }
    }

    /// What stands behind the body.
    #[must_use]
    pub fn value(self) -> u32 {
        match self.0 {
            Taking::Crc32(crc) => crc.finalize(),
            Taking::Xxh64(hash) => {
                let [a, b, c, d, ..] = hash.finish().to_le_bytes();
                u32::from_le_bytes([a, b, c, d])
            }
        }
    }
}

/// The running digest of one direction of a stream: CRC-32 over the records' checksums in order, four
/// little-endian bytes each. It finds a record lost, doubled or moved, which no record's own can.
#[derive(Clone, Debug, Default)]
pub struct Digest {
    crc: crc32fast::Hasher,
    records: u64,
}

impl Digest {
    /// Counts one record in, by its checksum.
    pub fn add(&mut self, sum: u32) {
        self.crc.update(&sum.to_le_bytes());
        self.records += 1;
    }

    /// The number of records so far, and the digest over them.
    #[must_use]
    pub fn value(&self) -> (u64, u32) {
        (self.records, self.crc.clone().finalize())
    }
}
