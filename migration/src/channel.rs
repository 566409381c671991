//! One connection between source and destination: records over bytes, with deadlines, a bandwidth cap,
//! byte counters and the running digests.
//!
//! The bytes come from a [`Transport`], the time from a [`Clock`], so that a test decides over both.

use std::io::{self, IoSlice, Read, Write};
use std::time::{Duration, Instant};

use crate::message::Message;
use crate::wire::{self, Checksum, Digest, RecordHead, StreamKind, WireError};

mod receive;
mod wait;

pub(crate) use receive::{Incoming, Pages};
pub use wait::Wait;

/// Whoever kept still for so long is to blame for a time that is over.
const BLAME: Duration = Duration::from_secs(1);
/// So much longer all of something may take than a peer may keep still meanwhile: one that keeps still is told so.
const SLACK: Duration = Duration::from_secs(1);
/// A cap is kept over spans of this length, in milliseconds.
const CAP_SPAN_MS: u64 = 20;

/// Bytes to and from the peer.
///
/// How to implement: `read` and `write` (and `write_vectored`, which carries the pages and should be
/// `writev`) block for at most about 100 ms and then fail with `WouldBlock` or `TimedOut`; a socket does
/// that with `SO_RCVTIMEO` and `SO_SNDTIMEO`, a pipe with `poll`. The channel calls again until its
/// own deadline and asks the observer in between. A `write` that fails must not have handed on any
/// byte of that call: the rule of `Commit` rests on it, so no buffering in user space. Set
/// `TCP_NODELAY`.
pub trait Transport: Read + Write + Send {}

impl<T: Read + Write + Send> Transport for T {}

/// The time, from any fixed origin; it never goes back.
pub trait Clock: Send {
    /// Now.
    fn now(&self) -> Duration;
    /// Lets time pass.
    fn sleep(&self, time: Duration);
}

/// The host's monotonic clock.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock(Instant);

impl Default for SystemClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// What the observer of a migration wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    Continue,
    /// Stop the migration; the guest stays where it is. Without effect after commitment.
    Cancel,
}

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The source, as a destination's peer.
    Source,
    /// The destination, as a source's peer.
    Destination,
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Source => "the source",
            Self::Destination => "the destination",
        })
    }
}

/// Why a message didn't get through.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The connection ended.
    #[error("{0} closed the connection")]
    Closed(Peer),
    /// The peer let a deadline pass.
    #[error("{peer} has not answered or taken data for {ms} ms")]
    TimedOut {
        /// Who.
        peer: Peer,
        /// The deadline, in milliseconds.
        ms: u128,
    },
    /// The time for all of it is over, and it isn't the peer alone that took it.
    #[error("it was not over in the time that it had")]
    Overdue,
    /// The observer said so.
    #[error("cancelled")]
    Cancelled,
    /// The transport failed.
    #[error("the connection failed")]
    Io(#[source] io::Error),
    /// What arrived isn't the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The peer gave up and said why.
    #[error("{_0} says: {}", .1.join("; "))]
    Peer(Peer, Vec<String>),
    /// A message that has no place here.
    #[error("{peer} sent {found} where {expected} belongs")]
    Unexpected {
        /// Who.
        peer: Peer,
        /// What arrived.
        found: &'static str,
        /// What had to.
        expected: &'static str,
    },
}

/// One connection.
pub struct Channel {
    peer: Peer,
    io: Box<dyn Transport>,
    clock: Box<dyn Clock>,
    bandwidth: Option<u64>,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    incoming_at: usize,
    body: Vec<u8>,
    sent_bytes: u64,
    received_bytes: u64,
    sent_digest: Digest,
    received_digest: Digest,
    free_at: Duration,
    broken: bool,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel")
            .field("sent_bytes", &self.sent_bytes)
            .field("received_bytes", &self.received_bytes)
            .finish_non_exhaustive()
    }
}

impl Channel {
    /// A channel over a fresh connection, as a source has it.
    #[must_use]
    pub fn new(io: impl Transport + 'static, clock: impl Clock + 'static) -> Self {
        Self {
            peer: Peer::Destination,
            io: Box::new(io),
            clock: Box::new(clock),
            bandwidth: None,
            outgoing: Vec::new(),
            incoming: Vec::new(),
            incoming_at: 0,
            body: Vec::new(),
            sent_bytes: 0,
            received_bytes: 0,
            sent_digest: Digest::default(),
            received_digest: Digest::default(),
            free_at: Duration::ZERO,
            broken: false,
        }
    }

    /// It is a destination's.
    pub(crate) fn face_source(&mut self) {
        self.peer = Peer::Source;
    }

    /// A message that has no place here.
    pub(crate) fn unexpected(&self, found: &Message, expected: &'static str) -> ChannelError {
        let found = wire::record_name(found.kind());
        ChannelError::Unexpected { peer: self.peer, found, expected }
    }

    /// Sends at most so many bytes a second from here on. `None`: as many as go.
    pub fn set_bandwidth(&mut self, bytes_per_second: Option<u64>) {
        self.bandwidth = bytes_per_second.map(|rate| rate.max(1));
    }

    /// The channel's time.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.clock.now()
    }

    /// When something has to be over that may take so long.
    pub(crate) fn end_of(&self, limit: Duration) -> Duration {
        self.now().saturating_add(limit).saturating_add(SLACK)
    }

    pub(crate) fn sleep(&self, time: Duration) {
        self.clock.sleep(time);
    }

    /// Bytes that the transport took so far.
    #[must_use]
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Bytes that arrived so far.
    #[must_use]
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes
    }

    /// Records sent and the digest over them.
    pub(crate) fn sent_digest(&self) -> (u64, u32) {
        self.sent_digest.value()
    }

    /// Records received and the digest over them.
    pub(crate) fn received_digest(&self) -> (u64, u32) {
        self.received_digest.value()
    }

    /// Queues the preamble.
    pub(crate) fn put_preamble(&mut self) {
        self.outgoing.extend_from_slice(&wire::preamble(StreamKind::Live));
    }

    /// Queues a message; [`Channel::flush`] or the next pages send it.
    pub(crate) fn put(&mut self, message: &Message) {
        let sum = wire::put_record(&mut self.outgoing, message.kind(), &message.body());
        self.sent_digest.add(sum);
    }

    /// Sends a message and everything queued before it.
    pub(crate) fn send(&mut self, message: &Message, wait: &mut Wait) -> Result<(), ChannelError> {
        self.put(message);
        self.flush(wait)
    }

    /// Sends everything queued.
    pub(crate) fn flush(&mut self, wait: &mut Wait) -> Result<(), ChannelError> {
        let queued = std::mem::take(&mut self.outgoing);
        let result = self.write_all(&mut [IoSlice::new(&queued)], wait);
        self.outgoing = queued;
        self.outgoing.clear();
        result
    }

    /// Sends everything queued and a record of pages, of this type, from parts, without joining them first.
    pub(crate) fn send_pages(
        &mut self,
        kind: u32,
        parts: [&[u8]; 2],
        wait: &mut Wait,
    ) -> Result<(), ChannelError> {
        let head = RecordHead::new(kind, parts[0].len() + parts[1].len());
        let mut sum = Checksum::new(head);
        parts.iter().for_each(|part| sum.update(part));
        let sum = sum.value();
        self.sent_digest.add(sum);
        let queued = std::mem::take(&mut self.outgoing);
        let (head, sum) = (head.encode(), sum.to_le_bytes());
        let slices = [&queued, &head[..], parts[0], parts[1], &sum];
        let result = self.write_all(&mut slices.map(IoSlice::new), wait);
        self.outgoing = queued;
        self.outgoing.clear();
        result
    }

    fn write_all(
        &mut self,
        mut slices: &mut [IoSlice<'_>],
        wait: &mut Wait,
    ) -> Result<(), ChannelError> {
        if self.broken {
            return Err(ChannelError::Closed(self.peer));
        }
        let mut left: usize = slices.iter().map(|slice| slice.len()).sum();
        let total = left;
        self.pay(total, wait)?;
        let mut start = self.now();
        while left > 0 {
            match self.io.write_vectored(slices) {
                Ok(0) => return self.break_off(ChannelError::Closed(self.peer)),
                Ok(count) => {
                    self.sent_bytes += count as u64;
                    left -= count;
                    IoSlice::advance_slices(&mut slices, count);
                    start = self.now();
                    if let Some(error) = self.late(wait, start, start).filter(|_| left > 0) {
                        return self.break_off(error);
                    }
                }
                Err(e) => {
                    if let Some(error) = self.trouble(e, start, wait) {
                        // Whole records may still follow where nothing of this one went out.
                        self.broken = left != total || !matches!(error, ChannelError::Cancelled);
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Keeps the bandwidth cap: waits until these bytes may go.
    fn pay(&mut self, bytes: usize, wait: &mut Wait) -> Result<(), ChannelError> {
        if wait.is_over(self.now()) {
            return Err(ChannelError::Overdue);
        }
        let Some(rate) = self.bandwidth else { return Ok(()) };
        let span = Duration::from_millis(CAP_SPAN_MS);
        loop {
            let now = self.now();
            let Some(ahead) = self.free_at.checked_sub(now).filter(|ahead| *ahead > span) else {
                let nanos = (bytes as u64).saturating_mul(1_000_000_000) / rate;
                self.free_at = self.free_at.max(now) + Duration::from_nanos(nanos);
                return Ok(());
            };
            if wait.ask() == Flow::Cancel {
                return Err(ChannelError::Cancelled);
            }
            if wait.is_over(now) {
                return Err(ChannelError::Overdue);
            }
            let left = wait.until.map_or(Duration::MAX, |until| until - now);
            self.sleep((ahead - span).min(5 * span).min(left));
        }
    }

    /// If it is too late for something that began, or last moved, at `start`.
    fn late(&self, wait: &Wait, start: Duration, now: Duration) -> Option<ChannelError> {
        let still = now.saturating_sub(start);
        let (is_still, is_over) = (!still.is_zero() && still >= wait.still, wait.is_over(now));
        if is_still || (is_over && still >= BLAME) {
            return Some(ChannelError::TimedOut { peer: self.peer, ms: still.as_millis() });
        }
        is_over.then_some(ChannelError::Overdue)
    }

    /// What to make of a failed call. `None`: try again.
    fn trouble(&self, e: io::Error, start: Duration, wait: &mut Wait) -> Option<ChannelError> {
        match e.kind() {
            io::ErrorKind::Interrupted => None,
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                if wait.ask() == Flow::Cancel {
                    return Some(ChannelError::Cancelled);
                }
                self.late(wait, start, self.now())
            }
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::UnexpectedEof => Some(ChannelError::Closed(self.peer)),
            _ => Some(ChannelError::Io(e)),
        }
    }

    fn break_off(&mut self, error: ChannelError) -> Result<(), ChannelError> {
        self.broken = true;
        Err(error)
    }
}

#[cfg(test)]
#[path = "channel_tests.rs"]
mod tests;
