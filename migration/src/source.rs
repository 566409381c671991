//! The source's end of a migration, stage by stage.
//!
//! [`Source::connect`] → [`Source::reserve`] → [`Source::precopy`] → [`Source::stop_and_copy`] →
//! [`Source::commit`]. Each stage consumes the one before and owns the guest; each failure hands the guest
//! back. [`migrate`] walks all of them.
//!
//! Invariant: the guest may go on at the source iff no byte of `Commit` was written, or the
//! destination said `NeverActivated`, or the disks' locks prove it (see [`handover`]).

use std::time::Duration;

use crate::channel::{Channel, ChannelError, Flow, Wait};
use crate::chunk::Encoding;
use crate::error::MigrateError;
use crate::guest::Live;
use crate::message::{
    self, Accepted, Hello, Message, PROTOCOL_MAX, PROTOCOL_MIN, Reasons, Reserve,
};
use crate::pages::Run;
use crate::plan::{MigrationId, Plan};
use crate::policy::Limits;
use crate::report::{Observer, Outcome, Progress, Report, Stage, micros};

mod aborted;
pub mod handover;
mod precopy;
mod sender;

pub use aborted::{Aborted, Place, Stayed};
pub use handover::{Commitment, Decision, InDoubt, Moved, Stopped};
pub use precopy::Copied;
pub use sender::WINDOW_PAGES;

/// Round trips measured at reservation.
const PINGS: u64 = 3;

/// How long the peer may take.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// To give or take any byte.
    pub still: Duration,
    /// To make the place, trial restore included.
    pub reserve: Duration,
    /// For the whole stop-and-copy, beside four times what was predicted for it.
    pub halted: Duration,
    /// To answer `Commit`, and `Resolve`.
    pub answer: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        let s = Duration::from_secs;
        Self { still: s(10), reserve: s(60), halted: s(10), answer: s(10) }
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
    pub(crate) fixed: Duration,
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
    /// When the stage has to be over.
    pub(crate) deadline: Option<Duration>,
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
        let result = match poll() {
            Flow::Cancel => Err(ChannelError::Cancelled),
            Flow::Continue => {
                let mut wait = Wait::new(still, &mut poll);
                if let Some(until) = self.deadline {
                    wait = wait.until(until);
                }
                run(&mut self.channel, &mut wait)
            }
        };
        result.map_err(|source| MigrateError::Channel { stage, source: self.explain(source) })
    }

    /// The peer's last words, if the connection broke and it left some.
    fn explain(&mut self, error: ChannelError) -> ChannelError {
        if !matches!(error, ChannelError::Closed(_) | ChannelError::Io(_)) {
            return error;
        }
        let mut poll = || Flow::Continue;
        let until = self.channel.now() + Duration::from_millis(200);
        let mut wait = Wait::new(Duration::from_millis(200), &mut poll).until(until);
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
            let mut wait = Wait::new(Duration::from_secs(1), &mut poll);
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
        Box::new(Aborted { guest: Place::Live(guest), error, report })
    }
}

impl Source<Connected> {
    /// Stage 0, pre-migration: greets the destination over a fresh connection.
    ///
    /// # Errors
    /// No answer, no common protocol, or the destination refuses; no guest is concerned.
    pub fn connect(
        mut channel: Channel,
        options: Options,
        observer: &mut dyn Observer,
    ) -> Result<Self, MigrateError> {
        channel.set_bandwidth(options.bandwidth);
        let started = channel.now();
        let report = Report { id: options.id.to_string(), ..Report::default() };
        let progress = Progress::default();
        let (regions, deadline) = (Vec::new(), None);
        let mut common =
            Box::new(Common { channel, options, progress, report, started, regions, deadline });
        let hello = Message::Hello(Hello {
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
            id: common.options.id,
            software: common.options.software.clone(),
        });
        let still = common.options.deadlines.still;
        common.exchange(still, observer, |channel, wait| {
            channel.put_preamble();
            let sent = channel.send(&hello, wait);
            // Also of a destination that turned us away without listening: its reason comes next.
            channel.recv_preamble(wait).and(sent)
        })?;
        let reply = common.receive("HelloReply", still, observer, |message| match message {
            Message::HelloReply(reply) => Ok(reply),
            other => Err(other),
        })?;
        let mut reasons = Vec::new();
        if message::negotiate(reply.protocol, reply.protocol).is_none() {
            reasons.push(format!("the destination chose protocol {}", reply.protocol));
        }
        if reply.encodings & Encoding::KNOWN != Encoding::KNOWN {
            reasons.push("the destination doesn't take zero or raw pages".to_owned());
        }
        if !reasons.is_empty() {
            let error = MigrateError::Refused { stage: Stage::PreMigration, reasons };
            common.cancel(&error);
            return Err(error);
        }
        common.report.protocol = reply.protocol;
        common.report.destination = reply.software;
        Ok(Self { common, stage: Connected(()) })
    }

    /// Stage 1, reservation: the destination checks the guest's plan, makes a place for it, and tries to
    /// restore an example of its state.
    ///
    /// # Errors
    /// The destination refuses, with every reason; the guest runs on.
    pub fn reserve<L: Live>(
        mut self,
        mut guest: L,
        observer: &mut dyn Observer,
    ) -> Result<Source<Reserved<L>>, Box<Aborted<L>>> {
        self.common.progress.stage = Stage::Reservation;
        match self.common.reserve(&mut guest, observer) {
            Ok((plan, accepted, fixed)) => {
                let locks_seen = accepted.locks_seen;
                let stage = Reserved { guest, plan, locks_seen, fixed };
                Ok(Source { common: self.common, stage })
            }
            Err(error) => Err(self.common.abort(guest, error)),
        }
    }
}

impl Common {
    fn reserve<L: Live>(
        &mut self,
        guest: &mut L,
        observer: &mut dyn Observer,
    ) -> Result<(Plan, Accepted, Duration), MigrateError> {
        let plan = guest.plan().map_err(self.guest_error("describing the guest"))?;
        let faults = plan.faults();
        if !faults.is_empty() {
            return Err(MigrateError::Refused { stage: Stage::Reservation, reasons: faults });
        }
        self.progress.pages_total = plan.ram().map_or(0, crate::plan::Space::pages);
        let regions = plan.ram().map_or(&[][..], |ram| &ram.regions);
        self.regions = regions.iter().filter_map(|region| region.run()).collect();
        self.report.name.clone_from(&plan.name);
        self.report.pages = self.progress.pages_total;
        let example =
            guest.example().map_err(self.guest_error("saving an example of the state"))?;
        self.report.example_stop_us = example.stop_us;
        let example_sections = u32::try_from(example.sections.len()).unwrap_or(u32::MAX);
        let reserve = Reserve { plan, example_sections, dry_run: self.options.dry_run };
        let reserve = Message::Reserve(Box::new(reserve));
        let deadlines = self.options.deadlines;
        self.exchange(deadlines.still, observer, |channel, wait| {
            channel.put(&reserve);
            example.sections.into_iter().for_each(|s| channel.put(&Message::Section(s)));
            channel.flush(wait)
        })?;
        let accepted = self.receive("Accepted", deadlines.reserve, observer, |m| match m {
            Message::Accepted(accepted) => Ok(accepted),
            other => Err(other),
        })?;
        let Message::Reserve(reserve) = reserve else { unreachable!("made above") };
        let round_trip = self.round_trip(observer)?;
        self.report.round_trip_us = micros(round_trip);
        self.report.warnings.clone_from(&accepted.warnings);
        self.report.trial_restore_us = accepted.trial_restore_us;
        // Of the hand-over's two round trips one half, the last answer's, is after the downtime.
        let fixed = Duration::from_micros(example.stop_us)
            + Duration::from_micros(accepted.trial_restore_us.unwrap_or(0))
            + round_trip * 3 / 2;
        Ok((reserve.plan, accepted, fixed))
    }

    fn round_trip(&mut self, observer: &mut dyn Observer) -> Result<Duration, MigrateError> {
        let mut shortest = Duration::MAX;
        for token in 0..PINGS {
            let start = self.channel.now();
            self.ping(token, 0, observer)?;
            self.pong(token, observer)?;
            shortest = shortest.min(self.channel.now() - start);
        }
        Ok(shortest)
    }

    pub(crate) fn ping(
        &mut self,
        token: u64,
        padding: usize,
        observer: &mut dyn Observer,
    ) -> Result<(), MigrateError> {
        let still = self.options.deadlines.still;
        self.exchange(still, observer, |channel, wait| {
            channel.send(&Message::Ping(token, padding), wait)
        })
    }

    pub(crate) fn pong(
        &mut self,
        token: u64,
        observer: &mut dyn Observer,
    ) -> Result<(), MigrateError> {
        self.receive("Pong", self.options.deadlines.still, observer, |message| match message {
            Message::Pong(found) if found == token => Ok(()),
            other => Err(other),
        })
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
