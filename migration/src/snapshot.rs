//! Snapshots: a guest in a directory of two files.
//!
//! `state` is a recorded stream (preamble, `Snapshot`, `Section`s, `MemorySums`, `End`), `memory` is the
//! guest's RAM, region after region, sparse: it can be mapped and run from at once. Each block of 1 MiB
//! of `memory` that holds anything has its CRC-32 in `state`; a block that isn't listed is a hole.
//! `PROTOCOL.md`, "Snapshots", is the specification.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::guest::GuestError;
use crate::message::{End, Message, unpack};
use crate::pages::{PAGE_SIZE, Run};
use crate::plan::{MigrationId, Plan, Sections, Space};
use crate::state::Section;
use crate::wire::{self, Digest, StreamKind, WireError, record};

mod files;
mod partial;
mod rounds;
mod save;
mod storage;
mod sums;

pub use save::{NotSaved, Saved, save};
pub use storage::{Step, Storage};

/// The file of RAM.
pub const MEMORY_FILE: &str = "memory";
/// The file of everything else.
pub const STATE_FILE: &str = "state";
/// Bytes of `memory` that one checksum covers.
pub const BLOCK_LEN: usize = 1 << 20;

/// Linux's: `open` doesn't wait for a pipe's other end.
const O_NONBLOCK: i32 = 0o4000;
const SUM_LEN: usize = 8;
const SUMS_PER_RECORD: usize = 32 << 10;

/// The first record of `state`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The snapshot's own name.
    pub id: MigrationId,
    /// The program that made it, and its version.
    pub software: String,
    /// When, in milliseconds since 1970 UTC.
    pub created_unix_ms: u64,
    /// What the guest needs.
    pub plan: Plan,
}

/// Why a snapshot can't be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file can't be used.
    #[error("can't {doing} {path}")]
    File {
        /// What was tried.
        doing: &'static str,
        /// Which file.
        path: String,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// There is something already.
    #[error("{0} exists already: choose another directory")]
    Exists(String),
    /// `state` isn't what it should be.
    #[error("the snapshot's state can't be read")]
    State(#[from] WireError),
    /// The parts don't fit each other.
    #[error("the snapshot is damaged: {0}")]
    Damaged(String),
    /// The guest failed.
    #[error("{doing} failed")]
    Guest {
        /// What it was asked.
        doing: &'static str,
        /// What it said.
        #[source]
        source: GuestError,
    },
    /// The time for the rounds is up.
    #[error(
        "no convergence: a stop would take {downtime_ms} ms; the guest dirties {dirty_mib_per_s} MiB/s and \
         {write_mib_per_s} MiB/s are written (see --downtime-limit, --timeout, --on-timeout)"
    )]
    NoConvergence {
        /// The downtime predicted last, in milliseconds.
        downtime_ms: u128,
        /// The dirty rate.
        dirty_mib_per_s: u64,
        /// The rate of writing.
        write_mib_per_s: u64,
    },
    /// The limit can't be met by any guest on this host.
    #[error(
        "a stop takes {fixed_ms} ms before the first page, over the limit of {limit_ms} ms: raise --downtime-limit"
    )]
    Unreachable {
        /// What stopping the guest and saving its state take, in milliseconds.
        fixed_ms: u128,
        /// The downtime limit, in milliseconds.
        limit_ms: u128,
    },
    /// The observer said so.
    #[error("cancelled")]
    Cancelled,
}

/// A snapshot, opened and checked, its memory not yet read.
#[derive(Debug)]
pub struct Snapshot {
    /// What it is of.
    pub header: Header,
    /// The state of every part: exactly those of the plan.
    pub sections: Vec<Section>,
    /// Whether the guest was paused by its user.
    pub paused: bool,
    /// The file of RAM, as long as the plan says.
    pub memory: File,
    sums: BTreeMap<u32, u32>,
}

/// Where a page run of RAM lies in `memory`, in bytes. `None`: outside, or over a region's end.
#[must_use]
pub fn memory_offset(ram: &Space, run: Run) -> Option<u64> {
    let mut before = 0;
    for region in ram.regions.iter().filter_map(|region| region.run()) {
        if region.contains(run) {
            return Some((before + run.first() - region.first()) * PAGE_SIZE as u64);
        }
        before += region.count();
    }
    None
}

impl Snapshot {
    /// Opens the snapshot in a directory and checks all of `state`, and `memory`'s length.
    ///
    /// # Errors
    /// A file is missing, cut short, longer, of a newer version or damaged.
    pub fn open(dir: &Path) -> Result<Self, SnapshotError> {
        let (state, _) = open(&dir.join(STATE_FILE))?;
        let (memory, memory_len) = open(&dir.join(MEMORY_FILE))?;
        let mut reader = StateReader::new(BufReader::new(state))?;
        let snapshot = reader.read(memory)?;
        let expected = snapshot.memory_len();
        if memory_len != expected {
            return Err(SnapshotError::Damaged(format!(
                "its memory has {memory_len} bytes, its state says {expected}"
            )));
        }
        if let Some((&last, _)) = snapshot.sums.last_key_value()
            && u64::from(last) >= snapshot.blocks()
        {
            return Err(SnapshotError::Damaged("a checksum of no memory".to_owned()));
        }
        Ok(snapshot)
    }

    /// The RAM's layout.
    ///
    /// # Panics
    /// Never: an opened snapshot has one.
    #[must_use]
    pub fn ram(&self) -> &Space {
        self.header.plan.ram().expect("checked when it was opened")
    }

    /// Bytes of `memory`.
    #[must_use]
    pub fn memory_len(&self) -> u64 {
        self.ram().pages() * PAGE_SIZE as u64
    }

    /// How many blocks `memory` has, the last perhaps a short one.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.memory_len().div_ceil(BLOCK_LEN as u64)
    }

    /// The blocks that hold anything, ascending. The rest of `memory` is zero.
    pub fn used_blocks(&self) -> impl Iterator<Item = u32> + '_ {
        self.sums.keys().copied()
    }

    /// Reads one block and checks it: all of an eager restore, block by block, from as many threads as
    /// may be. Gives how many bytes it has.
    ///
    /// # Errors
    /// It can't be read, or its checksum is wrong.
    ///
    /// # Panics
    /// If `into` is shorter than [`BLOCK_LEN`].
    pub fn read_block(&self, block: u32, into: &mut [u8]) -> Result<usize, SnapshotError> {
        let offset = u64::from(block) * BLOCK_LEN as u64;
        let len = self.memory_len().saturating_sub(offset).min(BLOCK_LEN as u64);
        let len = usize::try_from(len).expect("at most 1 MiB");
        let into = &mut into[..len];
        let read = self.memory.read_exact_at(into, offset);
        read.map_err(|source| file_error("read", Path::new(MEMORY_FILE), source))?;
        let right = match self.sums.get(&block) {
            Some(sum) => *sum == crc32fast::hash(into),
            None => crate::pages::is_zero(into),
        };
        if !right {
            return Err(SnapshotError::Damaged(format!("the checksum of block {block} is wrong")));
        }
        Ok(len)
    }
}

/// Opens a file of a snapshot, and gives its length. What is no file is refused: nobody knows when a pipe has a writer, and a
/// device may be anything.
fn open(path: &Path) -> Result<(File, u64), SnapshotError> {
    let error = |source| file_error("open", path, source);
    let mut options = File::options();
    let file = options.read(true).custom_flags(O_NONBLOCK).open(path).map_err(error)?;
    let metadata = file.metadata().map_err(error)?;
    if !metadata.is_file() {
        return Err(error(io::Error::other("it is no regular file")));
    }
    Ok((file, metadata.len()))
}

/// Reads the records of `state` in order.
struct StateReader<R> {
    input: R,
    body: Vec<u8>,
    digest: Digest,
}

impl<R: Read> StateReader<R> {
    fn new(mut input: R) -> Result<Self, WireError> {
        let mut bytes = [0; wire::PREAMBLE_LEN];
        input.read_exact(&mut bytes)?;
        wire::check_preamble(&bytes, StreamKind::Snapshot)?;
        Ok(Self { input, body: Vec::new(), digest: Digest::default() })
    }

    /// The next record's type, with the digest of those before it. Unknown optional ones are skipped.
    fn next(&mut self) -> Result<(u32, (u64, u32)), WireError> {
        loop {
            let before = self.digest.value();
            let (head, crc) = wire::read_record(&mut self.input, &mut self.body)?;
            self.digest.add(crc);
            if !head.optional || wire::record_name(head.kind) != "unknown" {
                return Ok((head.kind, before));
            }
        }
    }

    fn read(&mut self, memory: File) -> Result<Snapshot, SnapshotError> {
        let damaged = |what: &str| SnapshotError::Damaged(what.to_owned());
        let (record::SNAPSHOT, _) = self.next()? else {
            return Err(damaged("its first record is no Snapshot"));
        };
        let header: Header = unpack(record::SNAPSHOT, &self.body)?;
        if let Some(fault) = header.plan.faults().into_iter().next() {
            return Err(SnapshotError::Damaged(fault));
        }
        let (mut sections, mut sums) = (Sections::default(), BTreeMap::new());
        let end = loop {
            let (kind, before) = self.next()?;
            match kind {
                record::SECTION => {
                    if !sections.push(wire::decode_section(&self.body)?) {
                        return Err(damaged("its state is too large"));
                    }
                }
                record::MEMORY_SUMS => read_sums(&self.body, &mut sums)?,
                record::END => {
                    let end: End = unpack(kind, &self.body)?;
                    if (end.records, end.digest) != before
                        || usize::try_from(end.sections) != Ok(sections.len())
                    {
                        return Err(damaged("the digest of its state is wrong"));
                    }
                    break end;
                }
                kind => match wire::record_name(kind) {
                    "unknown" => return Err(WireError::UnknownRecord { kind }.into()),
                    name => return Err(damaged(&format!("a record {name} is out of place"))),
                },
            }
        };
        if self.input.read(&mut [0]).map_err(WireError::from)? != 0 {
            return Err(damaged("bytes after its end"));
        }
        let sections = sections.into_vec();
        if let Some(reason) = header.plan.mismatch(&sections).into_iter().next() {
            return Err(SnapshotError::Damaged(reason));
        }
        Ok(Snapshot { header, sections, paused: end.paused, memory, sums })
    }
}

/// `{block u32, crc u32}` each, little-endian, blocks ascending over the whole file.
fn read_sums(body: &[u8], sums: &mut BTreeMap<u32, u32>) -> Result<(), WireError> {
    let bad = |what| WireError::Malformed { kind: record::MEMORY_SUMS, what };
    let (chunks, rest) = body.as_chunks::<SUM_LEN>();
    if !rest.is_empty() {
        return Err(bad("a length that is no multiple of 8"));
    }
    for &[a, b, c, d, e, f, g, h] in chunks {
        let block = u32::from_le_bytes([a, b, c, d]);
        if sums.last_key_value().is_some_and(|(last, _)| *last >= block) {
            return Err(bad("blocks out of order"));
        }
        sums.insert(block, u32::from_le_bytes([e, f, g, h]));
    }
    Ok(())
}

/// All of `state`.
fn encode_state(
    header: &Header,
    sections: &[Section],
    paused: bool,
    sums: &BTreeMap<u32, u32>,
) -> Vec<u8> {
    let mut out = wire::preamble(StreamKind::Snapshot).to_vec();
    let mut digest = Digest::default();
    let mut put = |kind, body: &[u8]| digest.add(wire::put_record(&mut out, kind, body));
    put(record::SNAPSHOT, &crate::message::pack(header));
    sections.iter().for_each(|section| put(record::SECTION, &wire::encode_section(section)));
    let sums: Vec<_> = sums.iter().collect();
    for sums in sums.chunks(SUMS_PER_RECORD) {
        let pair = |(block, crc): &(&u32, &u32)| [block.to_le_bytes(), crc.to_le_bytes()].concat();
        put(record::MEMORY_SUMS, &sums.iter().flat_map(pair).collect::<Vec<u8>>());
    }
    let (records, digest) = digest.value();
    let sections = u32::try_from(sections.len()).unwrap_or(u32::MAX);
    let end = Message::End(End { paused, sections, records, digest });
    wire::put_record(&mut out, record::END, &end.body());
    out
}

fn file_error(doing: &'static str, path: &Path, source: io::Error) -> SnapshotError {
    SnapshotError::File { doing, path: path.display().to_string(), source }
}

#[cfg(test)]
#[path = "snapshot_tests.rs"]
mod tests;

#[cfg(test)]
mod save_tests;
