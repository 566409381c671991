//! Stages 3 to 5: the stop, the last pages, and the guest changing hands.
//!
//! **The rule.** The source may resume iff no byte of `Commit` was written; the destination may run iff it
//! read the whole `Commit`. Between the two lies the window in doubt: the source keeps the stopped
//! guest and finds out (see [`super::doubt`]).

use std::time::Duration;

use super::sender::{AsTheyAre, Sender};
use super::{Aborted, Common, Copied, InDoubt, Place, Source};
use crate::channel::{Channel, ChannelError, Flow, Wait};
use crate::error::MigrateError;
use crate::guest::{Changes, Halted, Live};
use crate::message::{Activated, Commit, End, FIRST_SIGN_US_MAX, Message, Ready, StopAndCopy};
use crate::pages::PageSet;
use crate::plan::MigrationId;
use crate::report::{Downtime, Observer, Outcome, Progress, Report, Round, Stage, micros};

/// Stage 3 is over: the destination holds everything and stands ready.
pub struct Stopped<L: Live> {
    guest: L::Halted,
    locks_seen: bool,
    began: Duration,
    downtime: Downtime,
    /// How long the guest had put out nothing when it stood.
    silent_us: Option<u64>,
}

/// How the hand-over ended.
pub enum Commitment<L: Live> {
    /// The guest is the destination's, which said so. What is left here is to be dropped.
    Moved(Box<Moved<L::Halted>>),
    /// The guest is the source's: [`Aborted::resume`] it.
    Refused(Box<Aborted<L>>),
    /// `Commit` was written and no answer read. The guest stands until that is known.
    InDoubt(Box<InDoubt<L>>),
}

/// A migration that happened.
#[derive(Debug)]
pub struct Moved<H> {
    /// The source's stopped guest, of no more use.
    pub guest: H,
    /// How it went.
    pub report: Report,
}

impl<L: Live> Source<Copied<L>> {
    /// Stage 3, stop-and-copy: stops the guest, sends what is left and waits for `Ready`.
    ///
    /// # Errors
    /// The guest is handed back, running or stopped; [`Aborted::resume`] lets it go on.
    pub fn stop_and_copy(
        self,
        observer: &mut dyn Observer,
    ) -> Result<Source<Stopped<L>>, Box<Aborted<L>>> {
        let Source { mut common, stage } = self;
        let Copied { guest, mut left, locks_seen, predicted } = stage;
        common.progress.stage = Stage::StopAndCopy;
        if let Err(error) = common.exchange(Duration::ZERO, observer, |_, _| Ok(())) {
            return Err(common.abort(guest, error));
        }
        let began = common.channel.now();
        let mut guest = match guest.stop() {
            Ok(guest) => guest,
            Err(failed) => {
                let error = common.guest_error("stopping the guest")(failed.error);
                return Err(common.abort(failed.guest, error));
            }
        };
        let mut downtime =
            Downtime { stop_us: micros(common.channel.now() - began), ..Downtime::default() };
        let silent_us = guest.last_sign_ago().map(micros);
        common.begin_within(common.options.deadlines.halted.saturating_add(predicted * 4));
        let burst = common.last_burst(&mut guest, &mut left, &mut downtime, observer);
        if let Err(error) = burst {
            return Err(give_back(common, guest, false, error));
        }
        match common.await_ready(&mut guest, &mut downtime, observer) {
            Ok(()) => {
                let stage = Stopped { guest, locks_seen, began, downtime, silent_us };
                Ok(Source { common, stage })
            }
            Err(error) => Err(give_back(common, guest, true, error)),
        }
    }
}

impl Common {
    /// Pages, sections and `End`, without a wait for anything.
    fn last_burst<H: Halted>(
        &mut self,
        guest: &mut H,
        left: &mut PageSet,
        downtime: &mut Downtime,
        observer: &mut dyn Observer,
    ) -> Result<(), MigrateError> {
        let mut lap = Lap(self.channel.now());
        let bytes = self.channel.sent_bytes();
        guest.dirty_pages(left).map_err(self.guest_error("collecting the last dirty pages"))?;
        downtime.dirty_us = lap.us(&self.channel);
        self.channel.put(&Message::StopAndCopy(StopAndCopy { pages: left.len() }));
        let mut sender = Sender::new(self);
        sender.send(self, left, &mut AsTheyAre(&mut *guest), observer)?;
        sender.flush(self, observer)?;
        downtime.pages_us = lap.us(&self.channel);
        let listed = std::mem::take(&mut self.sections);
        let saved =
            guest.sections(&listed).map_err(self.guest_error("saving the guest's state"))?;
        let sections = u32::try_from(saved.len()).unwrap_or(u32::MAX);
        saved.into_iter().for_each(|section| self.channel.put(&Message::Section(section)));
        let (records, digest) = self.channel.sent_digest();
        let end = Message::End(End { paused: guest.paused(), sections, records, digest });
        let still = self.options.deadlines.still;
        self.exchange(still, observer, |channel, wait| channel.send(&end, wait))?;
        downtime.save_us = lap.us(&self.channel);
        self.report.rounds.push(Round {
            pages: sender.sent.pages,
            zero_pages: sender.sent.zero_pages,
            bytes: self.channel.sent_bytes() - bytes,
            time_us: downtime.dirty_us + downtime.pages_us + downtime.save_us,
            ..Round::default()
        });
        Ok(())
    }

    /// Releases the disks while the destination restores, then hears that it is done.
    fn await_ready<H: Halted>(
        &mut self,
        guest: &mut H,
        downtime: &mut Downtime,
        observer: &mut dyn Observer,
    ) -> Result<(), MigrateError> {
        let start = self.channel.now();
        downtime.release_us = micros(self.release_disks(guest, observer)?);
        let still = self.options.deadlines.halted;
        let ready: Ready = self.receive("Ready", still, observer, |message| match message {
            Message::Ready(ready) => Ok(ready),
            other => Err(other),
        })?;
        downtime.restore_us = ready.restore_us;
        downtime.ready_us = micros(self.channel.now() - start).saturating_sub(ready.restore_us);
        Ok(())
    }

    /// Writes `Commit` and hears the answer. No byte of `Commit` written: [`Answer::NotWritten`].
    fn hand_over(&mut self, id: MigrationId, observer: &mut dyn Observer) -> Answer {
        self.progress.stage = Stage::Commitment;
        self.progress.elapsed_us = micros(self.channel.now() - self.started);
        // The cap has no say any more: these are twenty bytes, and the guest stands.
        self.channel.set_bandwidth(None);
        let (progress, before) = (self.progress, self.channel.sent_bytes());
        let mut poll = shown(observer, progress);
        let limit = self.options.deadlines.answer;
        let mut wait = Wait::within(limit, self.channel.now(), &mut poll);
        let written = self.channel.send(&Message::Commit(Commit { id }), &mut wait);
        match written.and_then(|()| read_answer(&mut self.channel, &mut wait)) {
            Ok(answer) => answer,
            Err(error) if self.channel.sent_bytes() == before => Answer::NotWritten(error),
            Err(error) => Answer::None(error),
        }
    }

    /// When the guest gave its first sign there, in microseconds after its activation. It is the destination's by now,
    /// which was told so: whatever comes here, or doesn't, changes nothing any more.
    fn first_sign(&mut self, observer: &mut dyn Observer) -> Option<u64> {
        if !self.reads.first_sign() {
            return None;
        }
        let progress = Progress { stage: Stage::Activation, ..self.progress };
        let mut poll = shown(observer, progress);
        let limit = self.options.deadlines.first_sign;
        let mut wait = Wait::within(limit, self.channel.now(), &mut poll);
        match self.channel.recv("FirstSign", &mut wait) {
            Ok(Message::FirstSign(sign)) if sign.after_us <= FIRST_SIGN_US_MAX => {
                Some(sign.after_us)
            }
            _ => None,
        }
    }
}

/// The observer sees it. What it wants can't be had any more.
fn shown(observer: &mut dyn Observer, progress: Progress) -> impl FnMut() -> Flow {
    move || {
        let _ = observer.observe(&progress);
        Flow::Continue
    }
}

/// What is known of who runs the guest.
pub(super) enum Answer {
    NotWritten(ChannelError),
    Activated(Activated),
    NeverActivated(Vec<String>),
    None(ChannelError),
}

pub(super) fn read_answer(channel: &mut Channel, wait: &mut Wait) -> Result<Answer, ChannelError> {
    const EXPECTED: &str = "Activated or NeverActivated";
    match channel.recv(EXPECTED, wait)? {
        Message::Activated(activated) => Ok(Answer::Activated(activated)),
        Message::NeverActivated(reasons) => Ok(Answer::NeverActivated(reasons.reasons)),
        other => Err(channel.unexpected(&other, EXPECTED)),
    }
}

impl<L: Live> Source<Stopped<L>> {
    /// Stages 4 and 5: `Commit`, and the destination's answer. The observer sees it; it can't cancel.
    pub fn commit(self, observer: &mut dyn Observer) -> Commitment<L> {
        let Source { mut common, stage } = self;
        let Stopped { guest, locks_seen, began, mut downtime, silent_us } = stage;
        let id = common.options.id;
        let before_save_us = downtime.stop_us + downtime.dirty_us + downtime.pages_us;
        let start = common.channel.now();
        let channel_error = |source| MigrateError::Channel { stage: Stage::Commitment, source };
        match common.hand_over(id, observer) {
            Answer::NotWritten(error) => {
                Commitment::Refused(give_back(common, guest, true, channel_error(error)))
            }
            Answer::NeverActivated(reasons) => {
                let error = MigrateError::never_activated(reasons);
                Commitment::Refused(give_back(common, guest, true, error))
            }
            Answer::None(error) => {
                let answer_limit = common.options.deadlines.answer;
                let (error, report) = (channel_error(error), common.report(Outcome::InDoubt));
                let in_doubt = InDoubt {
                    guest,
                    id,
                    locks_seen,
                    answer_limit,
                    before_save_us,
                    error,
                    report,
                    refused: None,
                };
                Commitment::InDoubt(Box::new(in_doubt))
            }
            Answer::Activated(activated) => {
                let now = common.channel.now();
                let way_back = common.report.round_trip_us / 2;
                downtime.activate_us = activated.activate_us;
                downtime.commit_us = micros(now - start)
                    .saturating_sub(activated.activate_us)
                    .saturating_sub(way_back);
                downtime.total_us = micros(now - began).saturating_sub(way_back);
                common.report.guest_stall_us = activated.guest_stall(before_save_us);
                common.report.downtime = Some(downtime);
                let mut poll = || Flow::Continue;
                let mut wait = Wait::within(Duration::from_secs(1), now, &mut poll);
                // A destination that doesn't hear this forgets the migration by itself, later.
                let _ = common.channel.send(&Message::Done, &mut wait);
                let mut report = common.report(Outcome::Moved);
                let sign = if guest.paused() { None } else { common.first_sign(observer) };
                if let (Some(downtime), Some(after_us)) = (&mut report.downtime, sign) {
                    downtime.add_first_sign(after_us, silent_us);
                }
                Commitment::Moved(Box::new(Moved { guest, report }))
            }
        }
    }
}

/// Gives up after the guest was stopped.
fn give_back<L: Live>(
    mut common: Box<Common>,
    guest: L::Halted,
    released: bool,
    error: MigrateError,
) -> Box<Aborted<L>> {
    common.deadline = None;
    common.cancel(&error);
    let report = common.report(Outcome::NotMoved);
    let guest = Place::Halted { guest, released };
    Box::new(Aborted { guest, error, report, changes: Changes::Matter })
}

/// A stopwatch.
struct Lap(Duration);

impl Lap {
    fn us(&mut self, channel: &Channel) -> u64 {
        let now = channel.now();
        micros(now - std::mem::replace(&mut self.0, now))
    }
}
