//! The window in doubt: `Commit` was written, and no answer read. The source keeps the stopped guest and finds
//! out, by asking over a new connection ([`InDoubt::ask`]), by the disks' locks ([`InDoubt::try_locks`]), or
//! from the operator ([`InDoubt::decide`]).

use std::time::Duration;

use super::handover::{Answer, read_answer};
use super::{Aborted, Commitment, Moved, Place};
use crate::channel::{Channel, ChannelError, Wait};
use crate::error::{MigrateError, StuckError};
use crate::guest::{Changes, Halted, Live, Locks};
use crate::message::{Message, PROTOCOL_MAX, PROTOCOL_MIN, Resolve};
use crate::plan::MigrationId;
use crate::report::{Observer, Outcome, Progress, Report, Stage};

/// A migration of which the source doesn't know whether it happened.
pub struct InDoubt<L: Live> {
    pub(super) guest: L::Halted,
    pub(super) id: MigrationId,
    pub(super) locks_seen: bool,
    pub(super) answer_limit: Duration,
    /// How long the guest had stood when its state was saved.
    pub(super) before_save_us: u64,
    /// Why there was no answer.
    pub error: MigrateError,
    /// How far it came.
    pub report: Report,
    /// Why the operator's last word couldn't be followed.
    pub refused: Option<StuckError>,
}

/// The operator's word on a migration in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The destination doesn't run it and won't: resume here.
    Resume,
    /// The destination runs it: drop it here.
    Discard,
}

impl<L: Live> InDoubt<L> {
    /// The migration's name, for the operator.
    #[must_use]
    pub fn id(&self) -> MigrationId {
        self.id
    }

    /// The guest, which stands.
    #[must_use]
    pub fn guest(&self) -> &L::Halted {
        &self.guest
    }

    /// Whether the disks' locks can decide.
    #[must_use]
    pub fn locks_can_tell(&self) -> bool {
        self.locks_seen
    }

    /// Asks the destination, over a new connection. The observer may have better things to do, and cancels the question.
    #[must_use]
    pub fn ask(
        mut self: Box<Self>,
        mut channel: Channel,
        observer: &mut dyn Observer,
    ) -> Commitment<L> {
        let stage = Stage::Commitment;
        let mut poll = || observer.observe(&Progress { stage, ..Default::default() });
        let mut wait = Wait::within(self.answer_limit, channel.now(), &mut poll);
        let resolve =
            Resolve { protocol_min: PROTOCOL_MIN, protocol_max: PROTOCOL_MAX, id: self.id };
        channel.put_preamble();
        let answer = channel
            .send(&Message::Resolve(resolve), &mut wait)
            .and_then(|()| channel.recv_preamble(&mut wait))
            .and_then(|()| read_answer(&mut channel, &mut wait));
        match answer {
            Ok(Answer::Activated(activated)) => {
                self.report.guest_stall_us = activated.guest_stall(self.before_save_us);
                // A destination that doesn't hear this forgets the migration by itself, later.
                let _ = channel.send(&Message::Done, &mut wait);
                self.moved()
            }
            Ok(Answer::NeverActivated(reasons)) => {
                self.error = MigrateError::never_activated(reasons);
                self.stays(true)
            }
            // That says nothing of the destination.
            Err(ChannelError::Cancelled) => Commitment::InDoubt(self),
            Ok(Answer::NotWritten(source) | Answer::None(source)) | Err(source) => {
                self.error = MigrateError::Channel { stage, source };
                Commitment::InDoubt(self)
            }
        }
    }

    /// Lets the disks' locks decide, where the destination saw them at reservation: it takes them, and
    /// marks the disks, before it runs; so a source that has them back, over unchanged disks, knows
    /// that it is alone and stays so.
    #[must_use]
    pub fn try_locks(mut self: Box<Self>) -> Commitment<L> {
        if self.locks_seen && matches!(self.guest.retake_disks(Changes::Matter), Ok(Locks::Taken)) {
            return self.stays(false);
        }
        Commitment::InDoubt(self)
    }

    /// Does as the operator says: to resume over disks that have changed, too, but never against a lock that
    /// somebody holds. Then the word was wrong or came too early, and is forgotten: what the disks looked like
    /// counts again, and it stays in doubt ([`InDoubt::refused`]).
    #[must_use]
    pub fn decide(mut self: Box<Self>, decision: Decision) -> Commitment<L> {
        if decision == Decision::Discard {
            return self.moved();
        }
        let why = match self.guest.retake_disks(Changes::Trusted) {
            Ok(Locks::Taken) => return self.stays(false),
            Ok(locks) => StuckError::Locks(locks),
            Err(why) => StuckError::Guest(why),
        };
        self.refused = Some(why);
        Commitment::InDoubt(self)
    }

    fn moved(self) -> Commitment<L> {
        let report = Report { outcome: Outcome::Moved, ..self.report };
        Commitment::Moved(Box::new(Moved { guest: self.guest, report }))
    }

    fn stays(self, released: bool) -> Commitment<L> {
        let report = Report { outcome: Outcome::NotMoved, ..self.report };
        let guest = Place::Halted { guest: self.guest, released };
        let changes = Changes::Matter;
        Commitment::Refused(Box::new(Aborted { guest, error: self.error, report, changes }))
    }
}
