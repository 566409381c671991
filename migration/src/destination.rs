//! The destination's end of a migration, stage by stage.
//!
//! [`accept`] → [`Destination::reserve`] → [`Destination::precopy`] → [`Destination::stop_and_copy`] →
//! [`Destination::await_commit`] → [`Destination::activate`]. Each stage owns the vacant guest; dropping any of them
//! before activation leaves nothing behind and the disks untouched.
//!
//! Invariant: the guest is activated only if the whole `Commit` was read. Whatever ended otherwise after
//! `Ready` leaves a [`Verdict`], with which the listener answers a source in doubt.

use std::time::Duration;

use crate::channel::{Channel, ChannelError, Flow, Incoming, Wait};
use crate::chunk::Encoding;
use crate::error::MigrateError;
use crate::guest::{Host, Reserved, Since, Vacant};
use crate::message::{self, Accepted, HelloReply, Message, Reads, Reasons, Reserve, Resolve};
use crate::plan::{MigrationId, Plan, Sections};
use crate::report::{Observer, Progress, Stage, micros};
use crate::state::Section;

mod handover;
mod question;
mod receiver;

pub use handover::{Committed, Farewell, Restored, Verdict};
pub use question::{Question, refuse};
pub use receiver::Copied;

/// What the destination was started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// This program and its version.
    pub software: String,
    /// What this program reads. The default says so of pages alone: sections are the machine's.
    pub reads: Reads,
    /// How long a connection may take to say what it wants: a source does so at once.
    pub hello: Duration,
    /// How long `Reserve` and its sections may take in all.
    pub reserve: Duration,
    /// How long the source may keep still.
    pub still: Duration,
    /// How long after `Ready` the source may take to commit; it flushes its disks meanwhile.
    pub commit: Duration,
}

impl Options {
    /// The defaults: 10 s for the first message, 60 s for the reservation, 30 s each for the others.
    #[must_use]
    pub fn new(software: impl Into<String>) -> Self {
        let limit = Duration::from_secs(30);
        let (hello, reserve) = (Duration::from_secs(10), Duration::from_secs(60));
        Self {
            software: software.into(),
            reads: Reads::new(Vec::new()),
            hello,
            reserve,
            still: limit,
            commit: limit,
        }
    }
}

/// A migration at the destination in one of its stages.
#[derive(Debug)]
pub struct Destination<S> {
    pub(crate) common: Box<Common>,
    pub(crate) stage: S,
}

/// Stage 0 is over.
#[derive(Debug)]
pub struct Greeted(());

/// Stage 1 is over: there is a place for the guest.
#[derive(Debug)]
pub struct Prepared<V> {
    pub(crate) guest: V,
    pub(crate) plan: Plan,
}

#[derive(Debug)]
pub(crate) struct Common {
    pub(crate) channel: Channel,
    pub(crate) options: Options,
    pub(crate) id: MigrationId,
    pub(crate) progress: Progress,
    pub(crate) started: Duration,
    /// When the last message was begun that the source awaits before it goes on.
    pub(crate) asked: Duration,
    /// When what is under way has to be over, whatever moves.
    deadline: Option<Duration>,
    /// The source only looks, as it has said.
    dry_run: bool,
}

/// A migration that won't happen here. The vacant guest is gone.
#[derive(Debug)]
pub struct Ended {
    /// Why.
    pub error: MigrateError,
    /// After `Ready`: what to answer a source in doubt. Keep it for a while.
    pub verdict: Option<Verdict>,
    /// With a verdict: the source may be in doubt, and come back to ask. Not where it said that it keeps the guest, nor
    /// where the observer cancelled and the source was told so.
    pub in_doubt: bool,
    /// It was a dry run: no guest would have come.
    pub dry_run: bool,
}

impl Ended {
    /// Whether the source said itself that it leaves, as it does after a dry run.
    #[must_use]
    pub fn is_by_source(&self) -> bool {
        matches!(self.error, MigrateError::Channel { source: ChannelError::Peer(..), .. })
    }
}

/// What a new connection turned out to be.
#[derive(Debug)]
pub enum Opening {
    /// A migration.
    Migrate(Destination<Greeted>),
    /// A source in doubt, to be answered with [`Question::answer`].
    Question(Box<Question>),
}

/// Stage 0, pre-migration: finds out what a new connection wants.
///
/// # Errors
/// It speaks another protocol, or not at all.
pub fn accept(
    mut channel: Channel,
    options: Options,
    observer: &mut dyn Observer,
) -> Result<Opening, Box<Ended>> {
    channel.face_source();
    channel.put_preamble();
    let started = channel.now();
    let id = MigrationId([0; 16]);
    let progress = Progress::default();
    let deadline = Some(started + options.hello);
    let asked = started;
    let dry_run = false;
    let mut common =
        Box::new(Common { channel, options, id, progress, started, asked, deadline, dry_run });
    let opening = common.exchange(observer, |channel, wait| {
        channel.flush(wait)?;
        channel.recv_preamble(wait)?;
        channel.recv("Hello", wait)
    });
    match opening.map_err(|error| common.give_up(error))? {
        Message::Hello(hello) => {
            common.id = hello.id;
            common.agree(hello.protocol_min, hello.protocol_max, observer)
        }
        Message::Resolve(Resolve { id, .. }) => {
            let still = common.options.still;
            Ok(Opening::Question(Box::new(Question { channel: common.channel, still, id })))
        }
        other => Err(common.unexpected(&other, "Hello")),
    }
}

impl Common {
    /// One exchange with the peer, as at the source.
    pub(crate) fn exchange<R>(
        &mut self,
        observer: &mut dyn Observer,
        run: impl FnOnce(&mut Channel, &mut Wait) -> Result<R, ChannelError>,
    ) -> Result<R, MigrateError> {
        let stage = self.progress.stage;
        self.progress.elapsed_us = micros(self.channel.now() - self.started);
        self.progress.bytes = self.channel.received_bytes();
        let progress = self.progress;
        let mut poll = || observer.observe(&progress);
        let mut wait = Wait::new(self.options.still, &mut poll);
        if let Some(until) = self.deadline {
            wait = wait.until(until);
        }
        run(&mut self.channel, &mut wait).map_err(|source| MigrateError::Channel { stage, source })
    }

    /// What comes next has to be over in so long.
    fn begin_within(&mut self, limit: Duration) {
        self.deadline = Some(self.channel.end_of(limit));
    }

    fn agree(
        mut self: Box<Self>,
        min: u16,
        max: u16,
        observer: &mut dyn Observer,
    ) -> Result<Opening, Box<Ended>> {
        let Some(protocol) = message::negotiate(min, max) else {
            let (ours_min, ours_max) = (message::PROTOCOL_MIN, message::PROTOCOL_MAX);
            return Err(self.refuse(vec![format!(
                "the source speaks protocols {min} to {max}, the destination {ours_min} to {ours_max}"
            )]));
        };
        let software = self.options.software.clone();
        let reply = HelloReply { protocol, encodings: Encoding::KNOWN, software };
        self.channel.put(&Message::Reads(self.options.reads.clone()));
        self.asked = self.channel.now();
        let sent = self
            .exchange(observer, |channel, wait| channel.send(&Message::HelloReply(reply), wait));
        match sent {
            Ok(()) => Ok(Opening::Migrate(Destination { common: self, stage: Greeted(()) })),
            Err(error) => Err(self.give_up(error)),
        }
    }

    pub(crate) fn unexpected(&mut self, found: &Message, expected: &'static str) -> Box<Ended> {
        let source = self.channel.unexpected(found, expected);
        self.give_up(MigrateError::Channel { stage: self.progress.stage, source })
    }

    /// Refuses at reservation.
    pub(crate) fn refuse(&mut self, reasons: Vec<String>) -> Box<Ended> {
        let stage = self.progress.stage;
        self.tell(&Message::Refused(Reasons::new(reasons.clone())));
        self.ended(MigrateError::Refused { stage, reasons })
    }

    /// Gives up, and says why unless it was the peer's own doing.
    pub(crate) fn give_up(&mut self, error: MigrateError) -> Box<Ended> {
        let gone = matches!(
            error,
            MigrateError::Channel { source: ChannelError::Peer(..) | ChannelError::Closed(_), .. }
        );
        if !gone {
            self.tell(&Message::Failed(Reasons::one(error.line())));
        }
        self.ended(error)
    }

    /// An end before `Ready`.
    fn ended(&self, error: MigrateError) -> Box<Ended> {
        Box::new(Ended { error, verdict: None, in_doubt: false, dry_run: self.dry_run })
    }

    /// Gives whether the connection took it.
    pub(crate) fn tell(&mut self, message: &Message) -> bool {
        let mut poll = || Flow::Continue;
        let mut wait = Wait::within(Duration::from_secs(1), self.channel.now(), &mut poll);
        // Who doesn't hear it sees the connection end.
        self.channel.send(message, &mut wait).is_ok()
    }
}

impl Destination<Greeted> {
    /// The migration's name.
    #[must_use]
    pub fn id(&self) -> MigrationId {
        self.common.id
    }

    /// Turns the source away, with a reason: the second one at a busy listener.
    pub fn refuse(mut self, reason: &str) {
        self.common.refuse(vec![reason.to_owned()]);
        let mut poll = || Flow::Continue;
        let now = self.common.channel.now();
        let mut wait = Wait::within(Duration::from_secs(1), now, &mut poll);
        // What it sends meanwhile is read, or else a socket's end would overtake the reason.
        while self.common.channel.recv("the end", &mut wait).is_ok() {}
    }

    /// Stage 1, reservation: checks the plan, makes the place, tries to restore the example.
    ///
    /// # Errors
    /// The guest can't come here; the source was told every reason.
    pub fn reserve<H: Host>(
        mut self,
        host: &mut H,
        observer: &mut dyn Observer,
    ) -> Result<Destination<Prepared<H::Vacant>>, Box<Ended>> {
        self.common.progress.stage = Stage::Reservation;
        let common = &mut self.common;
        common.begin_within(common.options.reserve);
        let (reserve, lock_mark) = common.reserve_message(observer)?;
        common.dry_run = reserve.dry_run;
        let example = common.sections(reserve.example_sections, observer)?;
        let came = common.channel.now();
        let faults = reserve.plan.faults();
        if !faults.is_empty() {
            return Err(common.refuse(faults));
        }
        let Reserved { mut guest, locks_seen, mut warnings } =
            common.make_place(host, &reserve.plan, lock_mark, observer)?;
        let reasons = reserve.plan.section_reasons(&guest.parts());
        if !reasons.is_empty() {
            return Err(common.refuse(reasons));
        }
        let mut trial_restore_us = None;
        if !example.is_empty() {
            let told = guest.try_restore(&example, common.saved_since(came));
            let told = told.map_err(|reasons| common.refuse(reasons))?;
            warnings.extend(told);
            // The one that counts will not be the first either: it is the second that is timed.
            let start = common.channel.now();
            let again = guest.try_restore(&example, common.saved_since(came));
            again.map_err(|reasons| common.refuse(reasons))?;
            trial_restore_us = Some(micros(common.channel.now() - start));
        }
        common.progress.pages_total = reserve.plan.ram().map_or(0, crate::plan::Space::pages);
        let Reasons { reasons: warnings } = Reasons::new(warnings);
        let accepted = Message::Accepted(Accepted { trial_restore_us, locks_seen, warnings });
        common.asked = common.channel.now();
        common.begin_within(common.options.still);
        let sent = common.exchange(observer, |channel, wait| channel.send(&accepted, wait));
        sent.map_err(|error| common.give_up(error))?;
        common.deadline = None;
        let stage = Prepared { guest, plan: reserve.plan };
        Ok(Destination { common: self.common, stage })
    }
}

impl Common {
    /// `Reserve`, and where the source's locks end, if it tells.
    fn reserve_message(
        &mut self,
        observer: &mut dyn Observer,
    ) -> Result<(Reserve, Option<u64>), Box<Ended>> {
        let mut mark = None;
        loop {
            match self.exchange(observer, |channel, wait| channel.recv("Reserve", wait)) {
                Ok(Message::Reserve(reserve)) => return Ok((*reserve, mark)),
                Ok(Message::LockMark(found)) if mark.is_none() => mark = Some(found.end),
                Ok(other) => return Err(self.unexpected(&other, "Reserve")),
                Err(error) => return Err(self.give_up(error)),
            }
        }
    }

    /// Has the host make a place for the guest, unless the observer cancels that.
    fn make_place<H: Host>(
        &mut self,
        host: &mut H,
        plan: &Plan,
        lock_mark: Option<u64>,
        observer: &mut dyn Observer,
    ) -> Result<Reserved<H::Vacant>, Box<Ended>> {
        let (progress, until) = (self.progress, self.deadline);
        let (mut is_cancelled, mut is_late, channel) = (false, false, &self.channel);
        let mut poll = || {
            is_cancelled |= observer.observe(&progress) == Flow::Cancel;
            is_late |= until.is_some_and(|until| channel.now() >= until);
            if is_cancelled || is_late { Flow::Cancel } else { Flow::Continue }
        };
        match host.reserve(plan, lock_mark, &mut poll) {
            _ if is_cancelled => {
                let (stage, source) = (progress.stage, ChannelError::Cancelled);
                Err(self.give_up(MigrateError::Channel { stage, source }))
            }
            _ if is_late => {
                let seconds = self.options.reserve.as_secs();
                Err(self.refuse(vec![format!(
                    "the guest's place couldn't be made within {seconds} s: a disk's storage may hang"
                )]))
            }
            made => made.map_err(|reasons| self.refuse(reasons)),
        }
    }

    /// The example's sections.
    fn sections(
        &mut self,
        count: u32,
        observer: &mut dyn Observer,
    ) -> Result<Vec<Section>, Box<Ended>> {
        let mut sections = Sections::default();
        for _ in 0..count {
            let section =
                match self.exchange(observer, |channel, wait| channel.recv("Section", wait)) {
                    Ok(Message::Section(section)) => section,
                    Ok(other) => return Err(self.unexpected(&other, "Section")),
                    Err(error) => return Err(self.give_up(error)),
                };
            if !sections.push(section) {
                return Err(self.refuse(vec!["the example is too large".to_owned()]));
            }
        }
        Ok(sections.into_vec())
    }

    /// How long ago the source saved what was here at `came`: it did so after it had read the last message that it
    /// awaits.
    pub(crate) fn saved_since(&self, came: Duration) -> Since {
        let now = self.channel.now();
        Since { at_least: now.saturating_sub(came), at_most: now.saturating_sub(self.asked) }
    }

    /// The next record.
    pub(crate) fn next(&mut self, observer: &mut dyn Observer) -> Result<Incoming, MigrateError> {
        self.exchange(observer, |channel, wait| channel.recv_any(wait))
    }
}
