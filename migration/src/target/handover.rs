//! Stages 4 and 5 at the destination: `Commit` read whole, and only then the guest activated.

use serde::{Deserialize, Serialize};

use super::{Common, Ended, Target};
use crate::channel::{Flow, Wait};
use crate::error::MigrateError;
use crate::guest::{Active, Vacant};
use crate::message::{self, Activated, Message, Reasons};
use crate::plan::MigrationId;
use crate::report::{Observer, Stage, micros};

/// Stage 3 is over: the guest is restored. It doesn't run.
#[derive(Debug)]
pub struct Restored<V> {
    pub(super) guest: V,
    pub(super) paused: bool,
}

/// Stage 4 is over: the guest is this side's.
#[derive(Debug)]
pub struct Committed<V> {
    guest: V,
    paused: bool,
    read_at: std::time::Duration,
}

/// How a migration ended here, for a source that didn't hear it. It never changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The migration.
    pub id: MigrationId,
    answer: Result<Activated, Vec<String>>,
}

impl Verdict {
    /// The guest never ran here and never will.
    #[must_use]
    pub fn never_activated(id: MigrationId, why: impl Into<String>) -> Self {
        Self { id, answer: Err(vec![why.into()]) }
    }

    /// As bytes, for another process of this host that may be asked.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        message::pack(self)
    }

    /// From such bytes. `None`: they are none.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        message::unpack(0, bytes).ok()
    }

    /// Whether the guest was activated.
    #[must_use]
    pub fn is_activated(&self) -> bool {
        self.answer.is_ok()
    }

    pub(super) fn message(&self) -> Message {
        match &self.answer {
            Ok(activated) => Message::Activated(*activated),
            Err(reasons) => Message::NeverActivated(Reasons::new(reasons.clone())),
        }
    }
}

/// The guest runs here.
#[derive(Debug)]
pub struct Activation<R> {
    /// The guest.
    pub running: R,
    /// What to answer a source in doubt, while [`Farewell::source_knows`] is false.
    pub verdict: Verdict,
    /// What the source was told.
    pub activated: Activated,
    common: Box<Common>,
}

/// The destination's end after activation: whether the source has heard. It may go to another thread.
#[derive(Debug)]
pub struct Farewell {
    /// What to answer a source in doubt, while [`Farewell::source_knows`] is false.
    pub verdict: Verdict,
    common: Box<Common>,
}

impl Farewell {
    /// Waits for `Done`: whether the source has let go of its copy. If not, the listener should answer
    /// questions for some minutes.
    pub fn source_knows(&mut self) -> bool {
        let mut poll = || Flow::Continue;
        let mut wait = Wait::new(self.common.options.still, &mut poll);
        matches!(self.common.channel.recv("Done", &mut wait), Ok(Message::Done))
    }
}

impl<R> Activation<R> {
    /// The guest, and what is left to do with the source.
    #[must_use]
    pub fn into_parts(self) -> (R, Farewell) {
        (self.running, Farewell { verdict: self.verdict, common: self.common })
    }
}

impl<V: Vacant> Target<Restored<V>> {
    /// Stage 4, commitment: waits for the whole of `Commit`.
    ///
    /// # Errors
    /// It didn't come, or came for another migration. The guest is gone and never ran: that is the
    /// verdict, to be kept for the source.
    pub fn await_commit(
        self,
        observer: &mut dyn Observer,
    ) -> Result<Target<Committed<V>>, Box<Ended>> {
        let Target { mut common, stage: Restored { guest, paused } } = self;
        common.progress.stage = Stage::Commitment;
        let until = common.channel.now() + common.options.commit;
        common.options.still = common.options.commit;
        let message = common.exchange(observer, |channel, wait| {
            let mut poll = || wait.ask();
            let limit = until.saturating_sub(channel.now());
            channel.recv("Commit", &mut Wait::new(limit, &mut poll).until(until))
        });
        let error = match message {
            Ok(Message::Commit(commit)) if commit.id == common.id => {
                let stage = Committed { guest, paused, read_at: common.channel.now() };
                return Ok(Target { common, stage });
            }
            Ok(other) => MigrateError::Channel {
                stage: Stage::Commitment,
                source: common.channel.unexpected(&other, "Commit of this migration"),
            },
            Err(error) => error,
        };
        // First the guest, with all it holds; then the word that it is gone.
        drop(guest);
        Err(common.never_activated(error))
    }
}

impl Common {
    /// The guest never ran and never will. The source is told; it may not hear.
    pub(super) fn never_activated(&mut self, error: MigrateError) -> Box<Ended> {
        let verdict = Verdict::never_activated(self.id, error.line());
        self.tell(&verdict.message());
        Box::new(Ended { error, verdict: Some(verdict), dry_run: false })
    }
}

impl<V: Vacant> Target<Committed<V>> {
    /// Stage 5, activation: takes the disks, runs the guest, tells the source. That the source doesn't
    /// hear it changes nothing.
    ///
    /// # Errors
    /// The guest couldn't be activated; it is gone, and never ran. The source was told, so that it
    /// resumes its own.
    pub fn activate(self) -> Result<Activation<V::Running>, Box<Ended>> {
        let Target { mut common, stage: Committed { guest, paused, read_at } } = self;
        common.progress.stage = Stage::Activation;
        let Active { running, guest_stall_us } = match guest.activate(paused) {
            Ok(active) => active,
            Err(source) => {
                let (stage, doing) = (Stage::Activation, "activating the guest");
                return Err(common.never_activated(MigrateError::Guest { stage, doing, source }));
            }
        };
        let activate_us = micros(common.channel.now() - read_at);
        let activated = Activated { activate_us, guest_stall_us };
        let verdict = Verdict { id: common.id, answer: Ok(activated) };
        common.tell(&verdict.message());
        Ok(Activation { running, verdict, activated, common })
    }
}
