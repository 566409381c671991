//! When to stop: a pure function of what was measured.
//!
//! The predicted downtime is the fixed cost of the stop (measured on the example at reservation, again where that
//! seems too much, and the round trips) plus the time that the pages dirty now take at the rate measured. Below the limit the
//! guest is stopped, unless one more round promises to make it much shorter still. A round that didn't keep
//! that promise is the last: a guest that dirties the same few pages over and over would pay for more of them
//! with a page fault for each page.

use std::time::Duration;

use crate::pages::PAGE_SIZE;

/// Strongest throttle, in percent.
pub const THROTTLE_PERCENT_MAX: u8 = 99;
/// How small each round has to be beside the one before, to make a downtime within the limit shorter still.
const SHRINK: f64 = 0.7;
/// After so many flushes of the guest's disks the next is taken to last as long as the last.
const FLUSHES_MAX: u32 = 10;
/// So many stops are tried before one is taken to last as long as the shortest.
const STOPS_MAX: u32 = 3;
/// The share of the downtime limit that the guest's I/O may take to end before its stop, and how often that is tried before it
/// may take what it takes: the guest dirties meanwhile, and nobody decides again.
const SETTLED_SHARE: u32 = 4;
const SETTLES_MAX: u32 = 5;
/// Rate assumed before anything was sent, in bytes a second.
const RATE_UNKNOWN: f64 = 1e9;
/// A page and its share of the table, on the wire.
const PAGE_WIRE: f64 = PAGE_SIZE as f64 + 20.0;

/// What to do when the time is up and the limit was never met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnTimeout {
    /// Give up; the guest stays.
    #[default]
    Abort,
    /// Stop the guest, whatever the downtime.
    StopAndCopy,
    /// Slow the vCPUs down until the limit can be met; give up at twice the timeout.
    Throttle,
}

/// What the operator allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The downtime that is wanted at most.
    pub downtime: Duration,
    /// Time for pre-copy.
    pub timeout: Duration,
    /// And then.
    pub on_timeout: OnTimeout,
}

impl Limits {
    /// When a round is cut short, for the policy to decide at once: how long after pre-copy began.
    #[must_use]
    pub fn cut_after(&self) -> Option<Duration> {
        (self.on_timeout != OnTimeout::Abort).then_some(self.timeout)
    }

    /// When pre-copy is given up wherever it is: how long after it began. `still`: how long a peer may keep still, which it
    /// may in the record at which a round is cut short, too.
    #[must_use]
    pub fn over_after(&self, still: Duration) -> Duration {
        match self.on_timeout {
            OnTimeout::Abort => self.timeout,
            OnTimeout::StopAndCopy => self.timeout.saturating_add(still),
            OnTimeout::Throttle => self.timeout.saturating_mul(2),
        }
    }
}

/// Whether the guest may be stopped after its I/O took so long to end, tried so often before.
#[must_use]
pub(crate) fn is_settled(limits: &Limits, took: Duration, tries: u32) -> bool {
    took <= limits.downtime / SETTLED_SHARE || tries >= SETTLES_MAX
}

impl Default for Limits {
    fn default() -> Self {
        let on_timeout = OnTimeout::default();
        Self { downtime: Duration::from_millis(50), timeout: Duration::from_secs(600), on_timeout }
    }
}

/// What a stop costs before the first page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fixed {
    /// Stopping the guest and saving its state.
    pub stop: Duration,
    /// The state, as it is sent.
    pub state_bytes: u64,
    /// Restoring it at the destination.
    pub restore: Duration,
    /// There and back.
    pub round_trip: Duration,
    /// Flushing the disks, which the source does while it waits for the destination.
    pub flush: Duration,
}

impl Fixed {
    /// All of it, at so many bytes a second.
    #[must_use]
    pub fn time(&self, bytes_per_s: u64) -> Duration {
        self.at(float(bytes_per_s.max(1)))
    }

    fn at(&self, rate: f64) -> Duration {
        // Of the hand-over's two round trips one half, the last answer's, is after the downtime.
        let state = seconds(float(self.state_bytes) / rate);
        let parts = [self.stop, state, self.waits().max(self.flush), self.round_trip / 2];
        parts.into_iter().fold(Duration::ZERO, Duration::saturating_add)
    }

    /// How long the source waits for the destination to be ready.
    pub(crate) fn waits(&self) -> Duration {
        self.restore.saturating_add(self.round_trip)
    }
}

/// What a round showed.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Time since pre-copy began.
    pub elapsed: Duration,
    /// Bytes of page data that went over in this round.
    pub data_bytes: u64,
    /// The time that they took, the destination's word included.
    pub data_time: Duration,
    /// Pages dirty now.
    pub dirty_pages: u64,
    /// Beside these, pages that the round was to send and didn't, as it was cut short.
    pub left_pages: u64,
    /// The time in which they became so.
    pub dirty_time: Duration,
    /// The fixed cost of the stop.
    pub fixed: Fixed,
    /// How often the disks' flush was measured for it.
    pub flushes: u32,
    /// How often the stop was tried for it.
    pub stops: u32,
    /// The bandwidth cap, in bytes a second.
    pub bandwidth: Option<u64>,
    /// Pages dirtied by each vCPU in this round. Empty: not known.
    pub dirty_by_vcpu: Vec<u64>,
}

impl Measured {
    /// Pages that would go over if the guest were stopped now.
    pub(crate) fn pages(&self) -> u64 {
        self.dirty_pages.saturating_add(self.left_pages)
    }
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Another round.
    Continue,
    /// Another round, after a pause: little is dirty, and the fixed cost alone is over the limit, so that only the
    /// time that is left can still show it smaller.
    Rest,
    /// Another round, each vCPU throttled by this many percent (the last value goes for the rest).
    Throttle(Vec<u8>),
    /// Stop the guest now.
    StopAndCopy,
    /// Give up: the time is up.
    TimedOut,
    /// Too long a stop is all that is in the way: try it once more, and another round.
    TryStop,
    /// Give up: the fixed cost alone is over the limit, and waiting doesn't change it.
    Unreachable,
}

/// A decision and the figures it rests on.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// What to do.
    pub decision: Decision,
    /// The downtime if the guest were stopped now.
    pub downtime: Duration,
    /// Of it, what waiting won't change.
    pub fixed: Duration,
    /// Pages dirtied in a second.
    pub dirty_pages_per_s: u64,
    /// Bytes that go over in a second.
    pub send_bytes_per_s: u64,
}

/// The policy over one migration.
#[derive(Clone, Debug)]
pub struct Policy {
    limits: Limits,
    data_bytes: f64,
    data_seconds: f64,
    /// At the end of the last round.
    dirty_pages: f64,
    /// How much of the guest's speed the throttle is to take, from 0 to 1, and what each vCPU is slowed down by.
    throttle: f64,
    percents: Vec<u8>,
}

impl Policy {
    /// A fresh one.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            data_bytes: 0.0,
            data_seconds: 0.0,
            dirty_pages: f64::INFINITY,
            throttle: 0.0,
            percents: Vec::new(),
        }
    }

    /// Decides at the end of a round.
    pub fn decide(&mut self, now: &Measured) -> Verdict {
        // Older rounds count half as much each: the rate follows the link without jumping at a round
        // too small to measure by.
        self.data_bytes = self.data_bytes / 2.0 + float(now.data_bytes);
        self.data_seconds = self.data_seconds / 2.0 + now.data_time.as_secs_f64();
        let rate = self.rate(now.bandwidth);
        let dirty_rate = float(now.dirty_pages) / now.dirty_time.as_secs_f64().max(1e-6);
        let transfer = float(now.pages()) * PAGE_WIRE / rate;
        let downtime = now.fixed.at(rate).saturating_add(seconds(transfer));
        let is_lasting = now.flushes >= FLUSHES_MAX;
        let flush = if is_lasting { now.fixed.flush } else { Duration::ZERO };
        let fixed = Fixed { flush, ..now.fixed }.at(rate);
        let ratio = dirty_rate * PAGE_WIRE / rate;
        let decision = self.choose(now, [downtime, fixed], transfer, ratio);
        let (dirty_pages_per_s, send_bytes_per_s) = (whole(dirty_rate), whole(rate));
        Verdict { decision, downtime, fixed, dirty_pages_per_s, send_bytes_per_s }
    }

    fn rate(&self, bandwidth: Option<u64>) -> f64 {
        let measured = if self.data_bytes > 0.0 && self.data_seconds > 0.0 {
            self.data_bytes / self.data_seconds
        } else {
            RATE_UNKNOWN
        };
        bandwidth.map_or(measured, |cap| measured.min(float(cap))).max(1.0)
    }

    /// `ratio`: how large the next round will be beside this one, if the guest goes on as it does.
    fn choose(
        &mut self,
        now: &Measured,
        [downtime, fixed]: [Duration; 2],
        transfer: f64,
        ratio: f64,
    ) -> Decision {
        let small = (fixed.as_secs_f64() / 4.0).max(0.001);
        let dirty_pages = float(now.pages());
        let shrank = dirty_pages < std::mem::replace(&mut self.dirty_pages, dirty_pages) * SHRINK;
        if downtime <= self.limits.downtime {
            let worth = transfer > small && ratio < SHRINK && shrank;
            if worth && now.elapsed < self.limits.timeout {
                return Decision::Continue;
            }
            return Decision::StopAndCopy;
        }
        let hopeless = fixed > self.limits.downtime && transfer <= small;
        // What a busy host once held up may be over.
        let rest = fixed.saturating_sub(now.fixed.stop);
        let (on_timeout, timeout) = (self.limits.on_timeout, self.limits.timeout);
        let again = now.stops < STOPS_MAX && rest <= self.limits.downtime;
        if hopeless && again && now.elapsed < timeout {
            return Decision::TryStop;
        }
        match on_timeout {
            OnTimeout::StopAndCopy if now.elapsed >= timeout => Decision::StopAndCopy,
            OnTimeout::StopAndCopy if hopeless => Decision::Rest,
            _ if hopeless => Decision::Unreachable,
            OnTimeout::Abort if now.elapsed >= timeout => Decision::TimedOut,
            OnTimeout::Throttle if now.elapsed >= timeout.saturating_mul(2) => Decision::TimedOut,
            OnTimeout::Throttle if now.elapsed >= timeout => {
                Decision::Throttle(self.shares(ratio, &now.dirty_by_vcpu))
            }
            _ => Decision::Continue,
        }
    }

    /// What each vCPU is to be slowed down by. The first step goes by how much too fast the guest
    /// dirties; where that doesn't do (pages are dirtied over and over, which a dirty log can't see), each
    /// next step leaves half of the speed that was left.
    fn shares(&mut self, ratio: f64, dirty_by_vcpu: &[u64]) -> Vec<u8> {
        self.throttle = if self.throttle == 0.0 {
            (1.0 - 0.5 / ratio.max(1e-9)).clamp(0.2, 0.9)
        } else {
            1.0 - (1.0 - self.throttle) / 2.0
        };
        // What each would dirty without the throttle that it is under.
        let last = self.percents.last().copied().unwrap_or(0);
        let now = self.percents.iter().copied().chain(std::iter::repeat(last));
        let full =
            |(pages, percent): (&u64, u8)| float(*pages) / (1.0 - f64::from(percent) / 100.0);
        let speeds: Vec<f64> = dirty_by_vcpu.iter().zip(now).map(full).collect();
        let most = ceiling(&speeds, 1.0 - self.throttle);
        let percent = |share: f64| {
            let percent = whole((share * 100.0).round());
            u8::try_from(percent).unwrap_or(u8::MAX).min(THROTTLE_PERCENT_MAX)
        };
        self.percents = match most {
            Some(most) => {
                speeds.iter().map(|speed| percent(1.0 - most / speed.max(most))).collect()
            }
            None => vec![percent(self.throttle)],
        };
        self.percents.clone()
    }
}

/// The speed that no vCPU may exceed so that all together keep this share of theirs: it is the fastest that
/// are slowed down. `None`: they all stand, or none is known.
fn ceiling(speeds: &[f64], share: f64) -> Option<f64> {
    let mut rest = speeds.iter().sum::<f64>() * share;
    let mut ascending = speeds.to_vec();
    ascending.sort_by(f64::total_cmp);
    for (at, speed) in ascending.iter().enumerate() {
        let most = rest / float((ascending.len() - at) as u64);
        if *speed > most {
            return Some(most);
        }
        rest -= speed;
    }
    None
}

/// A whole number as a float: exact below 2^53, and these are estimates.
#[expect(clippy::cast_precision_loss, reason = "estimates")]
pub(crate) fn float(value: u64) -> f64 {
    value as f64
}

/// A float as a whole number, cut to the range.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
pub(crate) fn whole(value: f64) -> u64 {
    value as u64
}

/// Seconds as a span, at most a thousand years.
pub(crate) fn seconds(value: f64) -> Duration {
    Duration::from_secs_f64(value.clamp(0.0, 3e10))
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
