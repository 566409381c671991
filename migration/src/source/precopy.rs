//! Stage 2: memory goes over while the guest runs, round by round, until the policy says stop.

use std::time::Duration;

use super::sender::{AsTheyAre, Rearmed, Sender, WINDOW_PAGES};
use super::{Aborted, Common, Reserved, Source};
use crate::error::MigrateError;
use crate::forecast::{Basis, Sample, forecast};
use crate::guest::Live;
use crate::message::{Message, RoundEnd};
use crate::pages::PageSet;
use crate::plan::Plan;
use crate::policy::{Decision, Fixed, Measured, Policy, Verdict};
use crate::report::{Forecast, Observer, Round, Stage, micros};

/// Between rounds that have little to send, where waiting is all there is to do.
pub(crate) const REST: Duration = Duration::from_millis(100);
/// Rounds that a report lists; of more, the first and the last.
const ROUNDS_LISTED_MAX: usize = 1000;

/// Stage 2 is over: what is dirty now can go over within the limit (or has to).
#[derive(Debug)]
pub struct Copied<L> {
    pub(super) guest: L,
    pub(super) left: PageSet,
    pub(super) locks_seen: bool,
    pub(super) predicted: Duration,
}

impl<L: Live> Source<Reserved<L>> {
    /// Stage 2, iterative pre-copy. Round 0 sends every page ever touched, later ones what was dirtied
    /// meanwhile.
    ///
    /// # Errors
    /// The guest runs on.
    pub fn precopy(
        mut self,
        observer: &mut dyn Observer,
    ) -> Result<Source<Copied<L>>, Box<Aborted<L>>> {
        let common = &mut self.common;
        common.progress.stage = Stage::PreCopy;
        let Reserved { mut guest, plan, locks_seen, fixed } = self.stage;
        let done = common.rounds(&mut guest, &plan, fixed, observer);
        (common.cut_at, common.time_up_at) = (None, None);
        match done {
            Ok((left, predicted)) => {
                let stage = Copied { guest, left, locks_seen, predicted };
                Ok(Source { common: self.common, stage })
            }
            Err(error) => Err(self.common.abort(guest, error)),
        }
    }
}

impl Common {
    fn rounds<L: Live>(
        &mut self,
        guest: &mut L,
        plan: &Plan,
        mut fixed: Fixed,
        observer: &mut dyn Observer,
    ) -> Result<(PageSet, Duration), MigrateError> {
        let mut policy = Policy::new(self.options.limits);
        let mut sender = Sender::new(self);
        let mut set = PageSet::new();
        let mut throttle = Vec::new();
        let writable = plan.disks.iter().any(|disk| !disk.read_only);
        let (mut flushes, mut stops, mut settles) = (0, 1, 0);
        let began = self.channel.now();
        let limits = self.options.limits;
        self.cut_at = limits.cut_after().map(|after| began.saturating_add(after));
        let over_after = limits.over_after(self.options.deadlines.still);
        self.time_up_at = Some(began.saturating_add(over_after));
        guest.start_tracking().map_err(self.guest_error("starting dirty tracking"))?;
        let mut collected = self.channel.now();
        for round in 0.. {
            let (start, bytes) = (self.channel.now(), self.channel.sent_bytes());
            self.progress.round = round;
            sender.begin(self);
            if round == 0 {
                self.first_round(guest, plan, &mut sender, observer)?;
            } else {
                sender.send(self, &set, &mut Rearmed(guest), observer)?;
            }
            sender.flush(self, observer)?;
            let acked = self.end_round(round, sender.sent.pages, observer)?;
            if !fixed.flush.is_zero() {
                let flush = self.flush_disks(guest, observer)?;
                // One that was cut short tells less than the last.
                fixed.flush = if self.is_cut_short() { flush.max(fixed.flush) } else { flush };
                flushes += 1;
            }
            set.clear();
            guest.dirty_pages(&mut set).map_err(self.guest_error("collecting dirty pages"))?;
            set.union(&sender.left);
            if self.is_cut_short() {
                self.cut_at = None;
            }
            let now = self.channel.now();
            let left_pages = sender.left.len();
            let dirty_pages = set.len() - left_pages;
            let measured = Measured {
                elapsed: now - began,
                data_bytes: sender.sent.data_bytes(),
                data_time: sender.sent.data_time + acked,
                dirty_pages,
                left_pages,
                dirty_time: now - collected,
                fixed,
                flushes,
                stops,
                bandwidth: self.options.bandwidth,
                dirty_by_vcpu: guest.dirty_by_vcpu(dirty_pages),
            };
            collected = now;
            let verdict = policy.decide(&measured);
            self.note(
                Round {
                    pages: sender.sent.pages,
                    zero_pages: sender.sent.zero_pages,
                    bytes: self.channel.sent_bytes() - bytes,
                    time_us: micros(now - start),
                    dirty_pages,
                    dirty_by_vcpu: measured.dirty_by_vcpu.clone(),
                    throttle_percent: throttle.clone(),
                    stall_us: guest.stall_us(),
                    ..Round::default()
                },
                set.len(),
                &verdict,
            );
            if round == 0 {
                self.forecast_after_round_0(&measured, &verdict, bytes);
            }
            let mut stops_now = verdict.decision == Decision::StopAndCopy;
            match verdict.decision {
                Decision::StopAndCopy
                    if writable && flushes == 0 && measured.elapsed < limits.timeout =>
                {
                    flushes = 1;
                    fixed.flush = self.flush_disks(guest, observer)?;
                    // Else another round, for what the guest dirtied meanwhile; and the flush counts.
                    stops_now = fixed.flush <= fixed.waits();
                }
                Decision::StopAndCopy | Decision::Continue => {}
                Decision::Rest => self.rest(REST, observer)?,
                Decision::TryStop => {
                    let again = self.try_stop(guest, observer)?;
                    fixed.stop = again.map_or(fixed.stop, |again| fixed.stop.min(again));
                    stops += 1;
                }
                Decision::Throttle(percent) => self.throttle(guest, percent, &mut throttle),
                Decision::TimedOut | Decision::Unreachable => {
                    return Err(self.given_up(&verdict));
                }
            }
            if stops_now && self.settle_for_stop(guest, settles, observer)? {
                return Ok((set, verdict.downtime));
            }
            settles += u32::from(stops_now);
        }
        unreachable!("rounds end by a decision")
    }

    /// Whether the policy is to decide before the round is over.
    pub(super) fn is_cut_short(&self) -> bool {
        self.cut_at.is_some_and(|at| self.channel.now() >= at)
    }

    /// Slows the guest down; one that can't be goes on as it does.
    fn throttle<L: Live>(&mut self, guest: &mut L, percent: Vec<u8>, now: &mut Vec<u8>) {
        if guest.throttle(&percent).is_ok() {
            self.progress.throttle_percent = percent.iter().copied().max().unwrap_or(0);
            *now = percent;
        }
    }

    fn first_round<L: Live>(
        &mut self,
        guest: &mut L,
        plan: &Plan,
        sender: &mut Sender,
        observer: &mut dyn Observer,
    ) -> Result<(), MigrateError> {
        self.progress.pages_left = plan.touched_pages.min(self.progress.pages_total);
        let mut touched = PageSet::new();
        let regions = self.regions.clone();
        for window in regions.into_iter().flat_map(|region| region.pieces(WINDOW_PAGES)) {
            touched.clear();
            let armed = guest.first_pages(window, &mut touched);
            armed.map_err(self.guest_error("starting dirty tracking"))?;
            sender.send_window(self, &touched, window, &mut AsTheyAre(guest), observer)?;
        }
        Ok(())
    }

    /// Waits until the destination has all of a round: how long beyond the round trip.
    fn end_round(
        &mut self,
        round: u32,
        pages: u64,
        observer: &mut dyn Observer,
    ) -> Result<Duration, MigrateError> {
        let still = self.options.deadlines.still;
        let start = self.channel.now();
        let end = Message::RoundEnd(RoundEnd { round, pages });
        self.exchange(still, observer, |channel, wait| channel.send(&end, wait))?;
        self.receive("RoundAck of this round", still, observer, |message| match message {
            Message::RoundAck(ack) if ack.round == round => Ok(()),
            other => Err(other),
        })?;
        let round_trip = Duration::from_micros(self.report.round_trip_us);
        Ok((self.channel.now() - start).saturating_sub(round_trip))
    }

    fn note(&mut self, mut round: Round, next_pages: u64, verdict: &Verdict) {
        round.dirty_pages_per_s = verdict.dirty_pages_per_s;
        round.send_bytes_per_s = verdict.send_bytes_per_s;
        round.expected_downtime_us = micros(verdict.downtime);
        self.progress.dirty_pages_per_s = round.dirty_pages_per_s;
        self.progress.send_bytes_per_s = round.send_bytes_per_s;
        self.progress.expected_downtime_us = round.expected_downtime_us;
        // Bytes of the pages, times microseconds of a second, over bytes of a second.
        self.progress.expected_round_us = next_pages
            .saturating_mul(4_096_000_000)
            .checked_div(round.send_bytes_per_s)
            .unwrap_or(0);
        if self.report.rounds.len() >= ROUNDS_LISTED_MAX {
            self.report.rounds.pop();
        }
        self.report.rounds.push(round);
    }

    /// The forecast that costs nothing: made of round 0 itself.
    fn forecast_after_round_0(&mut self, measured: &Measured, verdict: &Verdict, before: u64) {
        let limits = self.options.limits;
        let made = forecast(&Basis {
            samples: vec![Sample { time: measured.dirty_time, pages: measured.dirty_pages }],
            pages: self.progress.pages_total,
            touched_pages: measured.pages(),
            send_bytes_per_s: verdict.send_bytes_per_s,
            fixed: measured.fixed.time(verdict.send_bytes_per_s),
            downtime: limits.downtime,
            timeout: limits.timeout,
        });
        let sent = self.channel.sent_bytes() - before;
        let elapsed = micros(self.channel.now() - self.started);
        let stop_now = verdict.decision == Decision::StopAndCopy;
        let downtime_us = if stop_now { micros(verdict.downtime) } else { made.downtime_us };
        let more_us = if stop_now { downtime_us } else { made.total_us };
        self.report.forecast = Some(Forecast {
            converges: made.converges || stop_now,
            rounds: if stop_now { 1 } else { made.rounds + 1 },
            total_us: elapsed.saturating_add(more_us),
            bytes: made.bytes.saturating_add(sent),
            downtime_us,
            ..made
        });
    }

    fn given_up(&self, verdict: &Verdict) -> MigrateError {
        match verdict.decision {
            Decision::Unreachable => MigrateError::Unreachable {
                fixed_ms: verdict.fixed.as_millis(),
                limit_ms: self.options.limits.downtime.as_millis(),
            },
            _ => MigrateError::NoConvergence {
                downtime_ms: verdict.downtime.as_millis(),
                dirty_mib_per_s: verdict.dirty_pages_per_s / 256,
                send_mib_per_s: verdict.send_bytes_per_s >> 20,
            },
        }
    }

    /// Lets time pass, but none that a round may not have, and listens to the observer meanwhile.
    pub(super) fn rest(
        &mut self,
        time: Duration,
        observer: &mut dyn Observer,
    ) -> Result<(), MigrateError> {
        let end = self.channel.now().saturating_add(time);
        let end = self.cut_at.map_or(end, |at| at.min(end));
        while let Some(left) = end.checked_sub(self.channel.now()).filter(|left| !left.is_zero()) {
            self.channel.sleep(left.min(Duration::from_millis(50)));
            self.exchange(time, observer, |_, _| Ok(()))?;
        }
        Ok(())
    }
}
