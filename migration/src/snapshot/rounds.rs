//! A live snapshot's rounds: memory is written while the guest runs, until the policy of a move says stop.

use std::time::{Duration, Instant};

use super::SnapshotError;
use super::files::Files;
use super::storage::Storage;
use crate::channel::Flow;
use crate::guest::Live;
use crate::pages::{PAGE_SIZE, PageSet};
use crate::plan::SectionId;
use crate::policy::{Decision, Fixed, Limits, Measured, Policy, Verdict, is_settled};
use crate::report::{Observer, micros};
use crate::source::{REST, share};

const SETTLING: &str = "letting the guest's devices finish their I/O";

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
    /// Lets the guest's devices finish their I/O, so that the stop that follows waits for none. Gives how long that took, or
    /// will at least: then time is up, and nothing rests.
    pub(super) fn settle<L: Live>(
        &mut self,
        guest: &mut L,
        bounds: Option<&Bounds>,
        observer: &mut dyn Observer,
    ) -> Result<Result<Duration, Duration>, SnapshotError> {
        let (progress, start, mut is_cancelled) = (self.progress, Instant::now(), false);
        let settled = guest.settle(&mut || {
            is_cancelled = observer.observe(&progress) == Flow::Cancel;
            let is_over = bounds.is_some_and(Bounds::is_reached);
            if is_cancelled || is_over { Flow::Cancel } else { Flow::Continue }
        });
        let settled = settled.map_err(|source| SnapshotError::Guest { doing: SETTLING, source })?;
        let took = start.elapsed();
        match settled {
            _ if is_cancelled => Err(SnapshotError::Cancelled),
            Flow::Continue => Ok(Ok(took)),
            Flow::Cancel => Ok(Err(took)),
        }
    }

    /// What stopping the guest takes: it is tried, unless time is up.
    pub(super) fn try_stop<L: Live>(
        &mut self,
        guest: &mut L,
        listed: &[SectionId],
        bounds: Option<&Bounds>,
        observer: &mut dyn Observer,
    ) -> Result<Option<Duration>, SnapshotError> {
        if self.settle(guest, bounds, observer)?.is_err() {
            return Ok(None);
        }
        let doing = "saving the guest's state for a trial";
        let example = guest.example(listed);
        let example = example.map_err(|source| SnapshotError::Guest { doing, source })?;
        Ok(Some(Duration::from_micros(example.stop_us)))
    }

    /// Brings the guest's I/O to rest for the stop, after `tries` times. `false`: not yet, as of a move.
    fn settle_for_stop<L: Live>(
        &mut self,
        guest: &mut L,
        limits: &Limits,
        (bounds, tries): (&Bounds, u32),
        observer: &mut dyn Observer,
    ) -> Result<bool, SnapshotError> {
        let is_first = limits.cut_after() == Some(bounds.cut_after);
        let is_late = limits.cut_after().is_some() && !is_first;
        match self.settle(guest, Some(bounds), observer)? {
            Ok(took) if is_late || is_settled(limits, took, tries) => Ok(true),
            Ok(_) => {
                guest.unsettle();
                Ok(false)
            }
            Err(_) if is_first => Ok(false),
            Err(after) => {
                let source = format!("it goes on after {} ms", after.as_millis()).into();
                Err(SnapshotError::Guest { doing: SETTLING, source })
            }
        }
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
        let (mut policy, mut stops, mut settles) = (Policy::new(limits), 1, 0);
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
                Decision::StopAndCopy => {
                    if self.settle_for_stop(guest, &limits, (&bounds, settles), observer)? {
                        return Ok(set);
                    }
                    settles += 1;
                }
                Decision::Continue => {}
                Decision::Rest => self.rest(&bounds, observer)?,
                Decision::TryStop => {
                    let again = self.try_stop(guest, listed, Some(&bounds), observer)?;
                    stop = again.map_or(stop, |again| stop.min(again));
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
