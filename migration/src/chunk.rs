//! The body of a `Pages` or `Pages2` record: a table of runs and, behind it, the data of those that have any.
//!
//! `{space u16, 0 u16, runs u32}`, then for each run `{first u64, count u32, encoding u8, 0 u8 x 3,
//! len u32}`, then `len` bytes of data for each run in the table's order; little-endian. One record
//! carries many runs, so that scattered pages cost a table entry and not a record each.

use crate::pages::{PAGE_SIZE, Run, is_zero};
use crate::wire::{WireError, record};

/// Length of a body's head, in bytes.
pub const CHUNK_HEAD_LEN: usize = 8;
/// Length of a table entry, in bytes.
pub const ENTRY_LEN: usize = 20;
/// Most runs of one record.
pub const RUNS_MAX: usize = 2048;
/// Most pages whose data one record carries: 1 MiB.
pub const DATA_PAGES_MAX: usize = 256;

/// How a run's data stands in the record. New encodings get new numbers; a source uses only those that
/// `HelloReply` named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Every byte is 0; no data.
    Zero,
    /// The pages as they are.
    Raw,
}

impl Encoding {
    /// The encodings decoded here, bit `n` for number `n`.
    pub const KNOWN: u64 = 0b11;

    /// The number on the wire.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Zero => 0,
            Self::Raw => 1,
        }
    }
}

/// One run of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The pages.
    pub run: Run,
    /// How they are encoded.
    pub encoding: Encoding,
    /// Length of their data in this record, in bytes.
    pub len: usize,
}

fn bad(what: &'static str) -> WireError {
    WireError::Malformed { kind: record::PAGES, what }
}

/// Reads a body's head: the space and the number of runs.
///
/// # Errors
/// A reserved byte that isn't 0, or more than [`RUNS_MAX`] runs.
pub fn decode_head(bytes: [u8; CHUNK_HEAD_LEN]) -> Result<(u16, usize), WireError> {
    let [a, b, 0, 0, runs @ ..] = bytes else { return Err(bad("reserved bytes set")) };
    match usize::try_from(u32::from_le_bytes(runs)) {
        Ok(runs) if runs <= RUNS_MAX => Ok((u16::from_le_bytes([a, b]), runs)),
        _ => Err(bad("too many runs")),
    }
}

/// Reads one table entry.
///
/// # Errors
/// An invalid run, an unknown encoding, or a length that isn't the encoding's.
pub fn decode_entry(bytes: [u8; ENTRY_LEN]) -> Result<Entry, WireError> {
    let (first, rest) = bytes.split_first_chunk::<8>().expect("20 bytes");
    let (count, rest) = rest.split_first_chunk::<4>().expect("12 bytes");
    let &[encoding, 0, 0, 0, a, b, c, d] = rest else { return Err(bad("reserved bytes set")) };
    let count = u32::from_le_bytes(*count);
    let run = Run::new(u64::from_le_bytes(*first), count.into()).ok_or(bad("an invalid run"))?;
    let len = u64::from(u32::from_le_bytes([a, b, c, d]));
    let encoding = match encoding {
        0 if len == 0 => Encoding::Zero,
        1 if len == run.bytes() => Encoding::Raw,
        0 | 1 => return Err(bad("a length that is not the run's")),
        _ => return Err(bad("an unknown page encoding")),
    };
    Ok(Entry { run, encoding, len: usize::try_from(len).map_err(|_| bad("too long"))? })
}

fn encode_entry(entry: Entry) -> [u8; ENTRY_LEN] {
    let mut out = [0; ENTRY_LEN];
    let count = u32::try_from(entry.run.count()).expect("a table run is cut to 32 bits");
    let len = u32::try_from(entry.len).expect("at most 1 MiB");
    out[..8].copy_from_slice(&entry.run.first().to_le_bytes());
    out[8..12].copy_from_slice(&count.to_le_bytes());
    out[12] = entry.encoding.number();
    out[16..].copy_from_slice(&len.to_le_bytes());
    out
}

/// Collects runs, and the data of pages that aren't zero, for one record after another. Holds one
/// megabyte, whatever the guest's size.
#[derive(Debug)]
pub struct Builder {
    space: u16,
    data: Vec<u8>,
    used: usize,
    entries: Vec<Entry>,
    table: Vec<u8>,
    zero_pages: u64,
    apart: bool,
}

impl Builder {
    /// A builder for records of `data_pages` pages with data at most.
    #[must_use]
    pub fn new(space: u16, data_pages: usize) -> Self {
        let data = vec![0; data_pages.clamp(1, DATA_PAGES_MAX) * PAGE_SIZE];
        Self {
            space,
            data,
            used: 0,
            entries: Vec::new(),
            table: Vec::new(),
            zero_pages: 0,
            apart: false,
        }
    }

    /// How many more pages fit before the record has to be sent.
    #[must_use]
    pub fn room(&self) -> u64 {
        // A page read may need an entry of its own; so many are kept free.
        let entries = RUNS_MAX.saturating_sub(self.entries.len() + 1);
        ((self.data.len() - self.used) / PAGE_SIZE).min(entries) as u64
    }

    /// Adds a run of at most [`Builder::room`] pages, whose bytes `read` fills in.
    ///
    /// # Errors
    /// What `read` says; the run is not in then.
    ///
    /// # Panics
    /// If the run is longer than the room.
    pub fn add<E>(
        &mut self,
        run: Run,
        read: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        assert!(run.count() <= self.room(), "a run longer than the room");
        let len = usize::try_from(run.bytes()).expect("at most 1 MiB");
        let start = self.used;
        read(&mut self.data[start..start + len])?;
        for page in run.pieces(1) {
            let at = start + usize::try_from((page.first() - run.first()) * 4096).expect("small");
            let bytes = at..at + PAGE_SIZE;
            if is_zero(&self.data[bytes.clone()]) {
                self.zero_pages += 1;
                self.push(page, Encoding::Zero);
            } else {
                if at != self.used {
                    self.data.copy_within(bytes, self.used);
                }
                self.used += PAGE_SIZE;
                self.push(page, Encoding::Raw);
            }
        }
        Ok(())
    }

    /// A region begins: the next page starts a run of its own, though it may follow the last.
    pub fn set_apart(&mut self) {
        self.apart = true;
    }

    /// Pages found to be zero since the last [`Builder::clear`].
    #[must_use]
    pub fn zero_pages(&self) -> u64 {
        self.zero_pages
    }

    /// Whether there is nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether the record should be sent now.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.room() == 0
    }

    /// The body in two parts: head with table, and data.
    pub fn parts(&mut self) -> [&[u8]; 2] {
        let runs = u32::try_from(self.entries.len()).expect("at most 2048");
        self.table.clear();
        self.table.extend_from_slice(&self.space.to_le_bytes());
        self.table.extend_from_slice(&[0, 0]);
        self.table.extend_from_slice(&runs.to_le_bytes());
        self.entries.iter().for_each(|e| self.table.extend_from_slice(&encode_entry(*e)));
        [&self.table, &self.data[..self.used]]
    }

    /// Empties it for the next record.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.used = 0;
        self.zero_pages = 0;
    }

    fn push(&mut self, page: Run, encoding: Encoding) {
        let len = if encoding == Encoding::Raw { PAGE_SIZE } else { 0 };
        if let Some(last) = self.entries.last_mut()
            && !std::mem::take(&mut self.apart)
            && last.encoding == encoding
            && last.run.end() == page.first()
            && last.run.count() < u64::from(u32::MAX)
        {
            last.run = Run::new(last.run.first(), last.run.count() + 1).expect("pages of a run");
            last.len += len;
        } else {
            self.apart = false;
            self.entries.push(Entry { run: page, encoding, len });
        }
    }
}

#[cfg(test)]
#[path = "chunk_tests.rs"]
mod tests;
