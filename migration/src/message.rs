//! The messages: what each record between source and destination says.
//!
//! Bodies are postcard encodings of the structs here, but for `Section` (see [`crate::wire`]), `Pages` and
//! `Pages2` (see [`crate::chunk`]) and `Ping`, which are laid out by hand. The structs are frozen as of protocol
//! 1. `PROTOCOL.md`, "Messages", says who sends what when.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::plan::{MigrationId, Plan};
use crate::state::Section;
use crate::wire::{self, WireError, record};

mod reads;

pub use reads::{CONFIG_KIND, FIRST_SIGN_KIND, PAGES_KIND, Reads};

/// The oldest protocol this release speaks.
pub const PROTOCOL_MIN: u16 = 1;
/// The newest protocol this release speaks.
pub const PROTOCOL_MAX: u16 = 1;
/// Most reasons that one message carries; longer lists are cut.
pub const REASONS_MAX: usize = 64;
/// Longest reason, in bytes of UTF-8; longer ones are cut.
pub const REASON_LEN_MAX: usize = 512;
/// Most padding of a `Ping`, in bytes.
pub const PING_PADDING_MAX: usize = 1 << 20;
/// A first sign that comes later than this after the activation isn't told, in microseconds.
pub const FIRST_SIGN_US_MAX: u64 = 100_000;

/// Opens a migration. Source to destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The oldest protocol the source speaks.
    pub protocol_min: u16,
    /// The newest protocol the source speaks.
    pub protocol_max: u16,
    /// The migration's name.
    pub id: MigrationId,
    /// The source's program and version, for reports.
    pub software: String,
}

/// Answers `Hello`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloReply {
    /// The protocol spoken from here on: the newest that both speak.
    pub protocol: u16,
    /// The page encodings the destination decodes: bit `n` is encoding `n`.
    pub encodings: u64,
    /// The destination's program and version, for reports.
    pub software: String,
}

/// Tells the locks that the source holds on its disks from anybody else's. Optional, before `Reserve`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockMark {
    /// Where the source's locks end: each is an exclusive one on the bytes from 0 to before this.
    pub end: u64,
}

/// Asks for a place. The example's sections follow, each as a `Section`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reserve {
    /// What the guest needs.
    pub plan: Plan,
    /// How many example sections follow. 0: no trial restore.
    pub example_sections: u32,
    /// Nothing will move: the destination checks and the source leaves with `Cancel`.
    pub dry_run: bool,
}

/// The place is reserved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// How long the trial restore took, in microseconds. `None`: there was no example.
    pub trial_restore_us: Option<u64>,
    /// The destination sees the locks that the source holds on the writable disks, and there is at
    /// least one: the locks can decide a migration in doubt.
    pub locks_seen: bool,
    /// What doesn't stand in the way but should be known; one line each, as of [`Reasons`].
    pub warnings: Vec<String>,
}

/// Reasons, of a refusal or a failure.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reasons {
    /// One line each, to be shown to the operator.
    pub reasons: Vec<String>,
}

impl Reasons {
    /// The reasons, cut to the limits.
    #[must_use]
    pub fn new(reasons: Vec<String>) -> Self {
        let cut = |reason: String| {
            let clean = reason.chars().map(|c| if c.is_control() { ' ' } else { c });
            let mut reason: String = clean.collect();
            while reason.len() > REASON_LEN_MAX {
                reason.pop();
            }
            reason
        };
        Self { reasons: reasons.into_iter().take(REASONS_MAX).map(cut).collect() }
    }

    /// The one reason.
    #[must_use]
    pub fn one(reason: impl Into<String>) -> Self {
        Self::new(vec![reason.into()])
    }
}

/// Ends a round of pre-copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundEnd {
    /// The round, from 0.
    pub round: u32,
    /// Pages sent in it, zero pages among them.
    pub pages: u64,
}

/// All of a round has arrived and its checksums were right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundAck {
    /// The round.
    pub round: u32,
}

/// The guest stands. The last pages, the sections and `End` follow in one burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopAndCopy {
    /// Pages that follow.
    pub pages: u64,
}

/// Everything was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// The guest was paused by its user and arrives so.
    pub paused: bool,
    /// Sections sent since `StopAndCopy`.
    pub sections: u32,
    /// Records sent in this direction before this one, all of them.
    pub records: u64,
    /// The [`wire::Digest`] over their checksums.
    pub digest: u32,
}

/// The guest is restored and can run. It doesn't.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// From `StopAndCopy` to `End`, in microseconds.
    pub receive_us: u64,
    /// Restoring the sections, in microseconds.
    pub restore_us: u64,
}

/// The guest is the destination's. From the first byte of this the source may not run it, from the
/// last byte the destination may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// The migration.
    pub id: MigrationId,
}

/// The guest runs at the destination (or stands there, paused).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activated {
    /// From `Commit` read to the vCPUs running, disk locks included, in microseconds.
    pub activate_us: u64,
    /// How far the guest's clock went on from the save of its state to its first run, in microseconds, where the
    /// destination can tell.
    pub guest_stall_us: Option<u64>,
}

impl Activated {
    /// How far it went on in all, of a guest that had stood for so long when its state was saved.
    #[must_use]
    pub fn guest_stall(&self, before_save_us: u64) -> Option<u64> {
        Some(self.guest_stall_us?.saturating_add(before_save_us))
    }
}

/// The guest gave its first sign at the destination. Optional, after `Done`; nothing hangs on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirstSign {
    /// From the end of what [`Activated::activate_us`] measures, in microseconds.
    pub after_us: u64,
}

/// Asks, over a new connection, how a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolve {
    /// The oldest protocol the source speaks.
    pub protocol_min: u16,
    /// The newest protocol the source speaks.
    pub protocol_max: u16,
    /// The migration.
    pub id: MigrationId,
}

/// Every message but `Pages` and `Pages2`, whose bodies are never held in one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant's content is documented")]
pub enum Message {
    Hello(Hello),
    HelloReply(HelloReply),
    Reads(Reads),
    LockMark(LockMark),
    Reserve(Box<Reserve>),
    Section(Section),
    Accepted(Accepted),
    /// The destination won't take the guest, or the connection.
    Refused(Reasons),
    /// A token, and this many bytes of padding.
    Ping(u64, usize),
    /// The token.
    Pong(u64),
    RoundEnd(RoundEnd),
    RoundAck(RoundAck),
    StopAndCopy(StopAndCopy),
    End(End),
    Ready(Ready),
    Commit(Commit),
    Activated(Activated),
    FirstSign(FirstSign),
    /// The destination never ran the guest and never will.
    NeverActivated(Reasons),
    /// The source has let go of the guest.
    Done,
    /// The source goes on with the guest itself; the destination forgets it.
    Cancel(Reasons),
    /// The destination gives up.
    Failed(Reasons),
    Resolve(Resolve),
    /// The destination knows nothing of this migration.
    UnknownId,
}

impl Message {
    /// The record's type.
    #[must_use]
    pub fn kind(&self) -> u32 {
        match self {
            Self::Hello(_) => record::HELLO,
            Self::HelloReply(_) => record::HELLO_REPLY,
            Self::Reads(_) => record::READS,
            Self::LockMark(_) => record::LOCK_MARK,
            Self::Reserve(_) => record::RESERVE,
            Self::Section(_) => record::SECTION,
            Self::Accepted(_) => record::ACCEPTED,
            Self::Refused(_) => record::REFUSED,
            Self::Ping(..) => record::PING,
            Self::Pong(_) => record::PONG,
            Self::RoundEnd(_) => record::ROUND_END,
            Self::RoundAck(_) => record::ROUND_ACK,
            Self::StopAndCopy(_) => record::STOP_AND_COPY,
            Self::End(_) => record::END,
            Self::Ready(_) => record::READY,
            Self::Commit(_) => record::COMMIT,
            Self::Activated(_) => record::ACTIVATED,
            Self::FirstSign(_) => record::FIRST_SIGN,
            Self::NeverActivated(_) => record::NEVER_ACTIVATED,
            Self::Done => record::DONE,
            Self::Cancel(_) => record::CANCEL,
            Self::Failed(_) => record::FAILED,
            Self::Resolve(_) => record::RESOLVE,
            Self::UnknownId => record::UNKNOWN_ID,
        }
    }

    /// The record's body.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        match self {
            Self::Hello(m) => pack(m),
            Self::HelloReply(m) => pack(m),
            Self::Reads(m) => pack(m),
            Self::LockMark(m) => pack(m),
            Self::Reserve(m) => pack(m),
            Self::Section(section) => wire::encode_section(section),
            Self::Accepted(m) => pack(m),
            Self::Refused(m) | Self::NeverActivated(m) | Self::Cancel(m) | Self::Failed(m) => {
                pack(m)
            }
            Self::Ping(token, padding) => {
                let mut body = token.to_le_bytes().to_vec();
                body.resize(8 + padding, 0x55);
                body
            }
            Self::Pong(token) => token.to_le_bytes().to_vec(),
            Self::RoundEnd(m) => pack(m),
            Self::RoundAck(m) => pack(m),
            Self::StopAndCopy(m) => pack(m),
            Self::End(m) => pack(m),
            Self::Ready(m) => pack(m),
            Self::Commit(m) => pack(m),
            Self::Activated(m) => pack(m),
            Self::FirstSign(m) => pack(m),
            Self::Resolve(m) => pack(m),
            Self::Done | Self::UnknownId => Vec::new(),
        }
    }

    /// Reads a record's body.
    ///
    /// # Errors
    /// [`WireError::UnknownRecord`] for a type that isn't a message, [`WireError::Malformed`] for a
    /// body that isn't that type's.
    pub fn parse(kind: u32, body: &[u8]) -> Result<Self, WireError> {
        Ok(match kind {
            record::HELLO => Self::Hello(unpack(kind, body)?),
            record::HELLO_REPLY => Self::HelloReply(unpack(kind, body)?),
            record::READS => Self::Reads(unpack(kind, body)?),
            record::LOCK_MARK => Self::LockMark(unpack(kind, body)?),
            record::RESERVE => Self::Reserve(unpack(kind, body)?),
            record::SECTION => Self::Section(wire::decode_section(body)?),
            record::ACCEPTED => {
                let accepted: Accepted = unpack(kind, body)?;
                let Reasons { reasons: warnings } = Reasons::new(accepted.warnings);
                Self::Accepted(Accepted { warnings, ..accepted })
            }
            record::REFUSED => Self::Refused(reasons(kind, body)?),
            record::PING => match body.split_first_chunk() {
                Some((token, padding)) => Self::Ping(u64::from_le_bytes(*token), padding.len()),
                None => return Err(WireError::Malformed { kind, what: "no token" }),
            },
            record::PONG => match <[u8; 8]>::try_from(body) {
                Ok(token) => Self::Pong(u64::from_le_bytes(token)),
                Err(_) => return Err(WireError::Malformed { kind, what: "not 8 bytes" }),
            },
            record::ROUND_END => Self::RoundEnd(unpack(kind, body)?),
            record::ROUND_ACK => Self::RoundAck(unpack(kind, body)?),
            record::STOP_AND_COPY => Self::StopAndCopy(unpack(kind, body)?),
            record::END => Self::End(unpack(kind, body)?),
            record::READY => Self::Ready(unpack(kind, body)?),
            record::COMMIT => Self::Commit(unpack(kind, body)?),
            record::ACTIVATED => Self::Activated(unpack(kind, body)?),
            record::FIRST_SIGN => Self::FirstSign(unpack(kind, body)?),
            record::NEVER_ACTIVATED => Self::NeverActivated(reasons(kind, body)?),
            record::CANCEL => Self::Cancel(reasons(kind, body)?),
            record::FAILED => Self::Failed(reasons(kind, body)?),
            record::RESOLVE => Self::Resolve(unpack(kind, body)?),
            record::DONE if body.is_empty() => Self::Done,
            record::UNKNOWN_ID if body.is_empty() => Self::UnknownId,
            record::DONE | record::UNKNOWN_ID => {
                return Err(WireError::Malformed { kind, what: "a body where none belongs" });
            }
            _ => return Err(WireError::UnknownRecord { kind }),
        })
    }
}

/// The newest protocol in both ranges.
#[must_use]
pub fn negotiate(their_min: u16, their_max: u16) -> Option<u16> {
    let newest = their_max.min(PROTOCOL_MAX);
    (newest >= their_min.max(PROTOCOL_MIN)).then_some(newest)
}

/// The postcard bytes of a struct of this crate, which always encodes.
pub(crate) fn pack<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).expect("plain data encodes into memory")
}

/// The struct that `body` is, wholly.
pub(crate) fn unpack<T: DeserializeOwned>(kind: u32, body: &[u8]) -> Result<T, WireError> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(WireError::Malformed { kind, what: "bytes left over" }),
        Err(_) => Err(WireError::Malformed { kind, what: "can't be decoded" }),
    }
}

/// Reasons, and warnings too, come from a peer and go to a terminal: cut and cleaned again.
fn reasons(kind: u32, body: &[u8]) -> Result<Reasons, WireError> {
    let Reasons { reasons } = unpack(kind, body)?;
    Ok(Reasons::new(reasons))
}
