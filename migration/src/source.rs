//! The source's end of a migration, stage by stage.
//!
//! [`Source::connect`] → [`Source::reserve`] → [`Source::precopy`] → [`Source::stop_and_copy`] →
//! [`Source::commit`]. Each stage consumes the one before and owns the guest; each failure hands the guest
//! back. [`migrate`] walks all of them.
//!
//! Invariant: the guest may go on at the source iff no byte of `Commit` was written, or the
//! destination said `NeverActivated`, or the disks' locks prove it (see [`doubt`]).

use std::time::Duration;

use crate::channel::{Channel, ChannelError, Flow, Wait};
use crate::error::MigrateError;
use crate::guest::{Changes, Live};
use crate::message::{Message, Reads, Reasons};
use crate::pages::Run;
use crate::plan::{MigrationId, Plan, SectionId};
use crate::policy::{Fixed, Limits};
use crate::report::{Observer, Outcome, Progress, Report, micros};
use crate::wire::Algorithm;

mod aborted;
pub mod doubt;
mod dry_run;
mod flush;
pub mod handover;
mod precopy;
mod reservation;
mod sender;
mod stop;

pub use aborted::{Aborted, Place, Stayed};
pub use doubt::{Decision, InDoubt};
pub use handover::{Commitment, Moved, Stopped};
pub use precopy::Copied;
pub(crate) use precopy::REST;
pub use sender::WINDOW_PAGES;
pub(crate) use sender::share;

/// Round trips measured at reservation.
const PINGS: u64 = 3;

/// How long the peer may take.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// To give or take any byte; before pre-copy, to give or take the next message. Before a stop, the guest's storage has as
    /// long for the request that it is at.
    pub still: Duration,
    /// To take `Reserve` with its sections, and then to make the place, trial restore included.
    pub reserve: Duration,
    /// For the whole stop-and-copy, beside four times what was predicted for it.
    pub halted: Duration,
    /// To answer `Commit`, and `Resolve`.
    pub answer: Duration,
    /// To tell the guest's first sign, once all is over. A link that blocks may make it a little longer.
    pub first_sign: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        let s = Duration::from_secs;
        let first_sign = Duration::from_millis(150);
        Self { still: s(10), reserve: s(60), halted: s(10), answer: s(10), first_sign }
    }
}

/// What the operator asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// The migration's name: 16 fresh random bytes.
    pub id: MigrationId,
    /// This program and its version.
    pub software: String,
    /// When to stop, and when to give up.
    pub limits: Limits,
    /// Bytes sent in a second at most.
    pub bandwidth: Option<u64>,
    /// What the pages' checksum is taken with; CRC-32 in any case for a destination that reads no other.
    pub pages_checksum: Algorithm,
    /// How long the peer may take.
    pub deadlines: Deadlines,
    /// Reserve, check and forecast; move nothing.
    pub dry_run: bool,
}

/// A migration at the source in one of its stages.
#[derive(Debug)]
pub struct Source<S> {
    pub(crate) common: Box<Common>,
    pub(crate) stage: S,
}

/// Stage 0 is over: both ends speak the same protocol.
#[derive(Debug)]
pub struct Connected(());

/// Stage 1 is over: the destination has a place for this guest.
#[derive(Debug)]
pub struct Reserved<L> {
    pub(crate) guest: L,
    pub(crate) plan: Plan,
    pub(crate) locks_seen: bool,
    pub(crate) fixed: Fixed,
}

/// What all stages share.
#[derive(Debug)]
pub(crate) struct Common {
    pub(crate) channel: Channel,
    pub(crate) options: Options,
    pub(crate) progress: Progress,
    pub(crate) report: Report,
    pub(crate) started: Duration,
    /// The regions of RAM: no run sent crosses from one into the next.
    pub(crate) regions: Vec<Run>,
    /// When what is under way has to be over, whatever moves.
    pub(crate) deadline: Option<Duration>,
    /// When a round of pre-copy is cut short, so that the policy can decide.
    cut_at: Option<Duration>,
    /// When pre-copy is given up.
    time_up_at: Option<Duration>,
    /// What the destination reads.
    reads: Reads,
    /// The sections that the plan listed.
    sections: Vec<SectionId>,
}

impl Common {
    /// One exchange with the peer: asks the observer first, then while nothing moves. An error says the
    /// stage, and the peer's own reason if it left one.
    pub(crate) fn exchange<R>(
        &mut self,
        still: Duration,
        observer: &mut dyn Observer,
        run: impl FnOnce(&mut Channel, &mut Wait) -> Result<R, ChannelError>,
    ) -> Result<R, MigrateError> {
        let stage = self.progress.stage;
        self.progress.elapsed_us = micros(self.channel.now() - self.started);
        self.progress.bytes = self.channel.sent_bytes();
        let progress = self.progress;
        let mut poll = || observer.observe(&progress);
        let until = self.deadline.into_iter().chain(self.time_up_at).min();
        let time_is_up = |now| self.time_up_at.is_some_and(|at| now >= at);
        let result = match poll() {
            Flow::Cancel => Err(ChannelError::Cancelled),
            Flow::Continue if time_is_up(self.channel.now()) => Err(ChannelError::Overdue),
            Flow::Continue => {
                let mut wait = Wait::new(still, &mut poll);
                if let Some(until) = until {
                    wait = wait.until(until);
                }
                run(&mut self.channel, &mut wait)
            }
        };
        if let Err(ChannelError::Overdue | ChannelError::TimedOut { .. }) = &result
            && time_is_up(self.channel.now())
        {
            return Err(self.no_convergence());
        }
        result.map_err(|source| MigrateError::Channel { stage, source: self.explain(source) })
    }

    /// What comes next has to be over in so long.
    pub(crate) fn begin_within(&mut self, limit: Duration) {
        self.deadline = Some(self.channel.end_of(limit));
    }

    /// The time for pre-copy is up.
    fn no_convergence(&self) -> MigrateError {
        let progress = &self.progress;
        if progress.round == 0 {
            return MigrateError::TooSlow { pages_left: progress.pages_left };
        }
        MigrateError::NoConvergence {
            downtime_ms: u128::from(progress.expected_downtime_us / 1000),
            dirty_mib_per_s: progress.dirty_pages_per_s / 256,
            send_mib_per_s: progress.send_bytes_per_s >> 20,
        }
    }

    /// The peer's last words, if the connection broke and it left some.
    fn explain(&mut self, error: ChannelError) -> ChannelError {
        if !matches!(error, ChannelError::Closed(_) | ChannelError::Io(_)) {
            return error;
        }
        let mut poll = || Flow::Continue;
        let mut wait = Wait::within(Duration::from_millis(200), self.channel.now(), &mut poll);
        loop {
            match self.channel.recv("a reason", &mut wait) {
                Ok(_) => {}
                Err(said @ ChannelError::Peer(..)) => return said,
                Err(_) => return error,
            }
        }
    }

    /// Receives the one message that `pick` takes.
    pub(crate) fn receive<R>(
        &mut self,
        expected: &'static str,
        still: Duration,
        observer: &mut dyn Observer,
        pick: impl FnOnce(Message) -> Result<R, Message>,
    ) -> Result<R, MigrateError> {
        self.exchange(still, observer, |channel, wait| {
            pick(channel.recv(expected, wait)?)
                .map_err(|other| channel.unexpected(&other, expected))
        })
    }

    /// Tells the destination that the guest stays; it may not hear it.
    pub(crate) fn cancel(&mut self, error: &MigrateError) {
        let told = matches!(
            error,
            MigrateError::Channel { source: ChannelError::Peer(..) | ChannelError::Closed(_), .. }
        );
        if !told {
            let mut poll = || Flow::Continue;
            let mut wait = Wait::within(Duration::from_secs(1), self.channel.now(), &mut poll);
            // The cap has no say any more: nothing of size follows.
            self.channel.set_bandwidth(None);
            let reasons = Reasons::one(format!("the source gave up: {}", error.line()));
            // The connection's end says the same to a destination that doesn't get this.
            let _ = self.channel.send(&Message::Cancel(reasons), &mut wait);
        }
    }

    /// The report as of now.
    pub(crate) fn report(&mut self, outcome: Outcome) -> Report {
        let mut report = std::mem::take(&mut self.report);
        report.outcome = outcome;
        report.total_us = micros(self.channel.now() - self.started);
        report.sent_bytes = self.channel.sent_bytes();
        report.received_bytes = self.channel.received_bytes();
        report
    }

    pub(crate) fn guest_error(
        &self,
        doing: &'static str,
    ) -> impl FnOnce(crate::guest::GuestError) -> MigrateError + use<> {
        let stage = self.progress.stage;
        move |source| MigrateError::Guest { stage, doing, source }
    }

    /// Gives up before the guest was stopped.
    pub(crate) fn abort<L: Live>(
        mut self: Box<Self>,
        mut guest: L,
        error: MigrateError,
    ) -> Box<Aborted<L>> {
        guest.stop_tracking();
        self.cancel(&error);
        let report = self.report(Outcome::NotMoved);
        Box::new(Aborted { guest: Place::Live(guest), error, report, changes: Changes::Matter })
    }
}

/// All stages, one after the other. What is left to do stands in the [`Commitment`]: end the guest,
/// [`Aborted::resume`] it, or find out.
///
/// # Errors
/// Stage 0 failed; the guest is as it was.
pub fn migrate<L: Live>(
    channel: Channel,
    options: Options,
    guest: L,
    observer: &mut dyn Observer,
) -> Result<Commitment<L>, Box<(L, MigrateError)>> {
    let source = match Source::connect(channel, options, observer) {
        Ok(source) => source,
        Err(error) => return Err(Box::new((guest, error))),
    };
    let stopped = source
        .reserve(guest, observer)
        .and_then(|source| source.precopy(observer))
        .and_then(|source| source.stop_and_copy(observer));
    Ok(match stopped {
        Ok(source) => source.commit(observer),
        Err(aborted) => Commitment::Refused(aborted),
    })
}
