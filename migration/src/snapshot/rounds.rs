//! A live snapshot's rounds: memory is written while the guest runs, until the policy of a move says stop.

use std::time::{Duration, Instant};

use super::SnapshotError;
use super::files::Files;
use super::storage::Storage;
use crate::channel::Flow;
use crate::guest::Live;
use crate::pages::{PAGE_SIZE, PageSet};
use crate::plan::SectionId;
use crate::policy::{Decision, Fixed, Limits, Measured, Policy, Verdict};
use crate::report::{Observer, micros};
use crate::source::{REST, share};

/// Where the rounds begin.
pub(super) struct Start<'a> {
    /// When the guest was first tracked.
    pub(super) began: Instant,
    /// What stopping it takes.
    pub(super) stop: Duration,
    /// Its sections.
    pub(super) listed: &'a [SectionId],
}

/// How long the rounds may go on.
pub(super) struct Bounds {
    began: Instant,
    /// When the round under way is cut short, for the policy to decide at once.
    cut_after: Duration,
}

impl Bounds {
    /// Whether that is now.
    pub(super) fn is_reached(&self) -> bool {
        self.began.elapsed() >= self.cut_after
    }
}

/// What was written in a round.
#[derive(Default)]
pub(super) struct Written {
    /// Bytes of pages that hold something.
    pub(super) data_bytes: u64,
    /// Their share of the time.
    pub(super) data_time: Duration,
    /// What the round didn't come to, as it was cut short.
    pub(super) left: PageSet,
}

impl Written {
    /// Adds what so many pages took, of which `kept` hold something.
    pub(super) fn add(&mut self, time: Duration, kept: u64, pages: u64) {
        self.data_bytes += kept * PAGE_SIZE as u64;
        self.data_time += share(time, kept, pages);
    }
}

impl Files {
    /// Lets the guest's devices finish their I/O, so that the stop that follows waits for none.
    pub(super) fn settle<L: Live>(
        &mut self,
        guest: &mut L,
        observer: &mut dyn Observer,
    ) -> Result<(), SnapshotError> {
        let progress = self.progress;
        let doing = "letting the guest's devices finish their I/O";
        let settled = guest.settle(&mut || observer.observe(&progress));
        match settled.map_err(|source| SnapshotError::Guest { doing, source })? {
            Flow::Continue => Ok(()),
            Flow::Cancel => Err(SnapshotError::Cancelled),
        }
    }

    /// What stopping the guest takes: it is tried.
    pub(super) fn try_stop<L: Live>(
        &mut self,
        guest: &mut L,
        listed: &[SectionId],
        observer: &mut dyn Observer,
    ) -> Result<Duration, SnapshotError> {
        self.settle(guest, observer)?;
        let doing = "saving the guest's state for a trial";
        let example = guest.example(listed);
        let example = example.map_err(|source| SnapshotError::Guest { doing, source })?;
        Ok(Duration::from_micros(example.stop_us))
    }

    /// Writes what is touched, and then, round by round, what was dirtied meanwhile. Gives what is left for the stop.
    pub(super) fn rounds<L: Live>(
        &mut self,
        guest: &mut L,
        mut set: PageSet,
        start: Start<'_>,
        limits: Limits,
        storage: &mut dyn Storage,
        observer: &mut dyn Observer,
    ) -> Result<PageSet, SnapshotError> {
        let tracking = |source| SnapshotError::Guest { doing: "dirty tracking", source };
        let Start { began, mut stop, listed } = start;
        let (mut policy, mut stops) = (Policy::new(limits), 1);
        let mut bounds = Bounds { began, cut_after: limits.timeout };
        let mut collected = began;
        for round in 0.. {
            self.progress.round = round;
            let written = self.write_set(&set, Some(&bounds), observer, |run, bytes| {
                if round > 0 {
                    guest.rearm(&[run])?;
                }
                guest.read(run, bytes)
            })?;
            if round == 0 {
                // Else the disk would have the last round wait for the first.
                self.sync_memory(&bounds, storage, observer)?;
            }
            set.clear();
            guest.dirty_pages(&mut set).map_err(tracking)?;
            set.union(&written.left);
            if bounds.is_reached() {
                bounds.cut_after = limits.over_after(Duration::MAX);
            }
            let now = Instant::now();
            let left_pages = written.left.len();
            let dirty_pages = set.len() - left_pages;
            let measured = Measured {
                elapsed: now - began,
                data_bytes: written.data_bytes,
                data_time: written.data_time,
                dirty_pages,
                left_pages,
                dirty_time: now - collected,
                fixed: Fixed { stop, ..Fixed::default() },
                stops,
                dirty_by_vcpu: guest.dirty_by_vcpu(dirty_pages),
                ..Measured::default()
            };
            collected = now;
            let verdict = policy.decide(&measured);
            self.note(set.len(), &verdict);
            match verdict.decision {
                Decision::StopAndCopy => return Ok(set),
                Decision::Continue => {}
                Decision::Rest => self.rest(&bounds, observer)?,
                Decision::TryStop => {
                    stop = stop.min(self.try_stop(guest, listed, observer)?);
                    stops += 1;
                }
                Decision::Throttle(percent) => {
                    // One that can't be slowed down goes on as it does.
                    if guest.throttle(&percent).is_ok() {
                        self.progress.throttle_percent = percent.into_iter().max().unwrap_or(0);
                    }
                }
                Decision::TimedOut | Decision::Unreachable => {
                    return Err(given_up(&verdict, &limits));
                }
            }
        }
        unreachable!("rounds end by a decision")
    }

    /// Lets time pass, but none that the rounds may not have, and listens to the observer meanwhile.
    fn rest(&mut self, bounds: &Bounds, observer: &mut dyn Observer) -> Result<(), SnapshotError> {
        let end = Instant::now() + REST;
        while Instant::now() < end && !bounds.is_reached() {
            if observer.observe(&self.progress) == Flow::Cancel {
                return Err(SnapshotError::Cancelled);
            }
            std::thread::sleep(REST / 10);
        }
        Ok(())
    }

    fn note(&mut self, next_pages: u64, verdict: &Verdict) {
        self.progress.dirty_pages_per_s = verdict.dirty_pages_per_s;
        self.progress.send_bytes_per_s = verdict.send_bytes_per_s;
        self.progress.expected_downtime_us = micros(verdict.downtime);
        // Bytes of the pages, times microseconds of a second, over bytes of a second.
        let bytes = next_pages.saturating_mul(PAGE_SIZE as u64);
        self.progress.expected_round_us =
            bytes.saturating_mul(1_000_000).checked_div(verdict.send_bytes_per_s).unwrap_or(0);
    }
}

fn given_up(verdict: &Verdict, limits: &Limits) -> SnapshotError {
    match verdict.decision {
        Decision::Unreachable => SnapshotError::Unreachable {
            fixed_ms: verdict.fixed.as_millis(),
            limit_ms: limits.downtime.as_millis(),
        },
        _ => SnapshotError::NoConvergence {
            downtime_ms: verdict.downtime.as_millis(),
            dirty_mib_per_s: verdict.dirty_pages_per_s / 256,
            write_mib_per_s: verdict.send_bytes_per_s >> 20,
        },
    }
}
