//! The framing of everything that is sent or stored: a preamble, then records.
//!
//! A record is `{type u32, len u32, body, sum u32}`, little-endian. Bit 31 of the type says that a
//! reader which doesn't know the type may skip it. The [`Checksum`] covers type, length and body. Each
//! type has a hard limit on its length, checked before anything is allocated.
//! `PROTOCOL.md`, "Framing", is the specification; this file and that chapter change together.

use std::io::{self, Read};

use crate::state::{SECTION_LEN_MAX, Section};

mod checksum;

pub use checksum::{Algorithm, Checksum, Digest};

/// The first eight bytes. The line ending finds a transport that mangles text.
pub const MAGIC: [u8; 8] = *b"VMMOVE\r\n";
/// The version of the framing itself, apart from the version of the protocol above it.
pub const FORMAT: u16 = 1;
/// Length of an encoded [`Preamble`], in bytes.
pub const PREAMBLE_LEN: usize = 16;
/// Length of an encoded [`RecordHead`], in bytes.
pub const HEAD_LEN: usize = 8;
/// Length of the checksum behind a body, in bytes.
pub const SUM_LEN: usize = 4;
/// Longest body of any record, in bytes. A reader skips an unknown optional record up to this.
pub const RECORD_LEN_MAX: u32 = 2 << 20;
/// Longest kind of a section, in bytes of printable ASCII.
pub const SECTION_KIND_LEN_MAX: usize = 32;

const OPTIONAL: u32 = 1 << 31;
const SECTION_HEAD_MAX: usize = 1 + SECTION_KIND_LEN_MAX + 4 + 2;

/// What a stream is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamKind {
    /// A connection between a source and a destination.
    Live = 1,
    /// The `state` file of a snapshot.
    Snapshot = 2,
}

/// Types of records. A number is never reused for something else.
#[expect(missing_docs, reason = "each is described with the message of the same name")]
pub mod record {
    pub const HELLO: u32 = 1;
    pub const HELLO_REPLY: u32 = 2;
    pub const RESERVE: u32 = 3;
    pub const SECTION: u32 = 4;
    pub const ACCEPTED: u32 = 5;
    pub const REFUSED: u32 = 6;
    pub const PING: u32 = 7;
    pub const PONG: u32 = 8;
    pub const PAGES: u32 = 9;
    pub const ROUND_END: u32 = 10;
    pub const ROUND_ACK: u32 = 11;
    pub const STOP_AND_COPY: u32 = 12;
    pub const END: u32 = 13;
    pub const READY: u32 = 14;
    pub const COMMIT: u32 = 15;
    pub const ACTIVATED: u32 = 16;
    pub const NEVER_ACTIVATED: u32 = 17;
    pub const DONE: u32 = 18;
    pub const CANCEL: u32 = 19;
    pub const FAILED: u32 = 20;
    pub const RESOLVE: u32 = 21;
    pub const UNKNOWN_ID: u32 = 22;
    pub const SNAPSHOT: u32 = 23;
    pub const MEMORY_SUMS: u32 = 24;
    pub const READS: u32 = 25;
    pub const PAGES2: u32 = 26;
    pub const FIRST_SIGN: u32 = 27;
    pub const LOCK_MARK: u32 = 28;
}

/// The name of a record type, for `inspect` and for errors.
#[must_use]
pub fn record_name(kind: u32) -> &'static str {
    match kind {
        record::HELLO => "Hello",
        record::HELLO_REPLY => "HelloReply",
        record::RESERVE => "Reserve",
        record::SECTION => "Section",
        record::ACCEPTED => "Accepted",
        record::REFUSED => "Refused",
        record::PING => "Ping",
        record::PONG => "Pong",
        record::PAGES => "Pages",
        record::ROUND_END => "RoundEnd",
        record::ROUND_ACK => "RoundAck",
        record::STOP_AND_COPY => "StopAndCopy",
        record::END => "End",
        record::READY => "Ready",
        record::COMMIT => "Commit",
        record::ACTIVATED => "Activated",
        record::NEVER_ACTIVATED => "NeverActivated",
        record::DONE => "Done",
        record::CANCEL => "Cancel",
        record::FAILED => "Failed",
        record::RESOLVE => "Resolve",
        record::UNKNOWN_ID => "UnknownId",
        record::SNAPSHOT => "Snapshot",
        record::MEMORY_SUMS => "MemorySums",
        record::READS => "Reads",
        record::PAGES2 => "Pages2",
        record::FIRST_SIGN => "FirstSign",
        record::LOCK_MARK => "LockMark",
        _ => "unknown",
    }
}

/// A record of this type, as an error names it: by its number where that is all there is.
fn a_record(kind: u32) -> String {
    match record_name(kind) {
        "unknown" => format!("a type {kind} record"),
        name if name.starts_with(['A', 'E', 'U']) => format!("an {name} record"),
        name => format!("a {name} record"),
    }
}

/// The longest body that a record of this type may have, in bytes.
#[must_use]
pub fn len_max(kind: u32) -> u32 {
    const KIB: u32 = 1 << 10;
    match kind {
        record::SECTION => 1024 * KIB + 64,
        record::RESERVE | record::SNAPSHOT => 1024 * KIB,
        record::PAGES | record::PAGES2 | record::PING => 1088 * KIB,
        record::MEMORY_SUMS => 256 * KIB + 64,
        record::HELLO..=record::READS | record::FIRST_SIGN | record::LOCK_MARK => 64 * KIB,
        _ => RECORD_LEN_MAX,
    }
}

/// Why bytes are not what the framing says.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The first bytes are something else.
    #[error("not a vmm stream (wrong magic)")]
    Magic,
    /// The framing is of another release.
    #[error("the stream has format {found}, this vmm reads format {FORMAT}")]
    Format {
        /// The version found.
        found: u16,
    },
    /// A snapshot where a migration is expected, or the other way round.
    #[error("the stream is of kind {found}, expected {}", match .expected {
        StreamKind::Live => "1, a migration",
        StreamKind::Snapshot => "2, a snapshot",
    })]
    Kind {
        /// The number found.
        found: u16,
        /// What the reader expects.
        expected: StreamKind,
    },
    /// The bytes end inside a record or where one has to follow.
    #[error("the stream is cut short")]
    Truncated,
    /// Longer than the type's limit.
    #[error("{} of {len} bytes is over the limit of {max}", a_record(*kind))]
    TooLong {
        /// The record's type.
        kind: u32,
        /// The length it claims, in bytes.
        len: u32,
        /// The limit, in bytes.
        max: u32,
    },
    /// The body isn't what was written.
    #[error("the checksum of {} is wrong", a_record(*kind))]
    Checksum {
        /// The record's type.
        kind: u32,
    },
    /// A type that this reader needs to know and doesn't.
    #[error("record type {kind} is unknown to this vmm and not optional")]
    UnknownRecord {
        /// The record's type.
        kind: u32,
    },
    /// Right checksum, wrong content.
    #[error("{} is malformed: {what}", a_record(*kind))]
    Malformed {
        /// The record's type.
        kind: u32,
        /// What is wrong.
        what: &'static str,
    },
    /// Reading failed.
    #[error("reading the stream failed")]
    Io(#[source] io::Error),
}

impl From<io::Error> for WireError {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::UnexpectedEof => WireError::Truncated,
            _ => WireError::Io(e),
        }
    }
}

/// The start of a stream: magic, format, kind.
#[must_use]
pub fn preamble(kind: StreamKind) -> [u8; PREAMBLE_LEN] {
    let mut out = [0; PREAMBLE_LEN];
    out[..8].copy_from_slice(&MAGIC);
    out[8..10].copy_from_slice(&FORMAT.to_le_bytes());
    out[10..12].copy_from_slice(&(kind as u16).to_le_bytes());
    out
}

/// What kind of stream starts so.
///
/// # Errors
/// Wrong magic, another format, an unknown kind, or a reserved byte that isn't 0.
pub fn parse_preamble(bytes: &[u8; PREAMBLE_LEN]) -> Result<StreamKind, WireError> {
    if bytes[..8] != MAGIC {
        return Err(WireError::Magic);
    }
    let found = u16::from_le_bytes([bytes[8], bytes[9]]);
    if found != FORMAT {
        return Err(WireError::Format { found });
    }
    match (u16::from_le_bytes([bytes[10], bytes[11]]), &bytes[12..]) {
        (1, [0, 0, 0, 0]) => Ok(StreamKind::Live),
        (2, [0, 0, 0, 0]) => Ok(StreamKind::Snapshot),
        (found, _) => Err(WireError::Kind { found, expected: StreamKind::Live }),
    }
}

/// [`parse_preamble`], and the stream has to be of the expected kind.
///
/// # Errors
/// As [`parse_preamble`]; also [`WireError::Kind`].
pub fn check_preamble(bytes: &[u8; PREAMBLE_LEN], expected: StreamKind) -> Result<(), WireError> {
    match parse_preamble(bytes)? {
        kind if kind == expected => Ok(()),
        _ => Err(WireError::Kind { found: u16::from_le_bytes([bytes[10], bytes[11]]), expected }),
    }
}

/// What stands before a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHead {
    /// The type, without bit 31.
    pub kind: u32,
    /// A reader that doesn't know the type may skip the record.
    pub optional: bool,
    /// Length of the body, in bytes, within the type's limit.
    pub len: u32,
}

impl RecordHead {
    /// The head of a record: mandatory, but for those that protocol 1 began without.
    ///
    /// # Panics
    /// If `len` is over the type's limit: the writer's own mistake.
    #[must_use]
    pub fn new(kind: u32, len: usize) -> Self {
        let len = u32::try_from(len).expect("a body within its limit");
        assert!(len <= len_max(kind), "{} of {len} bytes is over its limit", record_name(kind));
        let optional = matches!(kind, record::READS | record::FIRST_SIGN | record::LOCK_MARK);
        Self { kind, optional, len }
    }

    /// The eight bytes.
    #[must_use]
    pub fn encode(self) -> [u8; HEAD_LEN] {
        let kind = self.kind | if self.optional { OPTIONAL } else { 0 };
        let mut out = [0; HEAD_LEN];
        out[..4].copy_from_slice(&kind.to_le_bytes());
        out[4..].copy_from_slice(&self.len.to_le_bytes());
        out
    }

    /// Reads the eight bytes and checks the length against the type's limit.
    ///
    /// # Errors
    /// [`WireError::TooLong`].
    pub fn decode(bytes: [u8; HEAD_LEN]) -> Result<Self, WireError> {
        let [a, b, c, d, e, f, g, h] = bytes;
        let raw = u32::from_le_bytes([a, b, c, d]);
        let len = u32::from_le_bytes([e, f, g, h]);
        let kind = raw & !OPTIONAL;
        let max = len_max(kind);
        if len > max {
            return Err(WireError::TooLong { kind, len, max });
        }
        Ok(Self { kind, optional: raw & OPTIONAL != 0, len })
    }

    /// The length of the body as a size in memory.
    #[must_use]
    pub fn body_len(self) -> usize {
        usize::try_from(self.len).expect("a length of at most 2 MiB")
    }
}

/// Appends one record to `out` and gives its checksum.
///
/// # Panics
/// If the body is over the type's limit.
pub fn put_record(out: &mut Vec<u8>, kind: u32, body: &[u8]) -> u32 {
    let head = RecordHead::new(kind, body.len());
    let mut sum = Checksum::new(head);
    sum.update(body);
    let sum = sum.value();
    out.reserve(HEAD_LEN + body.len() + SUM_LEN);
    out.extend_from_slice(&head.encode());
    out.extend_from_slice(body);
    out.extend_from_slice(&sum.to_le_bytes());
    sum
}

/// Reads one record; its body is left in `body`. Gives the head and the checksum.
///
/// # Errors
/// A length over the limit, a wrong checksum, the end of the input, or what reading met.
pub fn read_record(
    input: &mut impl Read,
    body: &mut Vec<u8>,
) -> Result<(RecordHead, u32), WireError> {
    let mut head = [0; HEAD_LEN];
    input.read_exact(&mut head)?;
    let head = RecordHead::decode(head)?;
    body.resize(head.body_len(), 0);
    input.read_exact(body)?;
    let mut found = [0; SUM_LEN];
    input.read_exact(&mut found)?;
    let mut sum = Checksum::new(head);
    sum.update(body);
    let sum = sum.value();
    if sum != u32::from_le_bytes(found) {
        return Err(WireError::Checksum { kind: head.kind });
    }
    Ok((head, sum))
}

/// The body of a `Section` record: kind's length u8, kind, instance u32, version u16, the state.
///
/// # Panics
/// If the kind or the state is over its limit: the part's own mistake.
#[must_use]
pub fn encode_section(section: &Section) -> Vec<u8> {
    let kind_len = u8::try_from(section.kind.len()).expect("a short kind");
    assert!(valid_kind(section.kind.as_bytes()), "section kind {:?}", section.kind);
    assert!(section.body.len() <= SECTION_LEN_MAX, "{}: state over the limit", section.kind);
    let mut out = Vec::with_capacity(SECTION_HEAD_MAX + section.body.len());
    out.push(kind_len);
    out.extend_from_slice(section.kind.as_bytes());
    out.extend_from_slice(&section.instance.to_le_bytes());
    out.extend_from_slice(&section.version.to_le_bytes());
    out.extend_from_slice(&section.body);
    out
}

/// Reads the body of a `Section` record.
///
/// # Errors
/// [`WireError::Malformed`]: a kind that is empty, too long or not printable ASCII, version 0, a state
/// over [`SECTION_LEN_MAX`], or bytes missing.
pub fn decode_section(body: &[u8]) -> Result<Section, WireError> {
    let bad = |what| WireError::Malformed { kind: record::SECTION, what };
    let (&kind_len, rest) = body.split_first().ok_or(bad("empty"))?;
    let (kind, rest) = rest.split_at_checked(kind_len.into()).ok_or(bad("kind cut short"))?;
    if !valid_kind(kind) {
        return Err(bad("the kind is not 1 to 32 bytes of printable ASCII"));
    }
    let (&instance, rest) = rest.split_first_chunk::<4>().ok_or(bad("instance cut short"))?;
    let (&version, state) = rest.split_first_chunk::<2>().ok_or(bad("version cut short"))?;
    let version = u16::from_le_bytes(version);
    if version == 0 {
        return Err(bad("version 0"));
    }
    if state.len() > SECTION_LEN_MAX {
        return Err(bad("state over the limit"));
    }
    Ok(Section {
        kind: kind.iter().copied().map(char::from).collect(),
        instance: u32::from_le_bytes(instance),
        version,
        body: state.to_vec(),
    })
}

fn valid_kind(kind: &[u8]) -> bool {
    (1..=SECTION_KIND_LEN_MAX).contains(&kind.len()) && kind.iter().all(u8::is_ascii_graphic)
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
