//! Stages 4 and 5 at the destination: `Commit` read whole, and only then the guest activated.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Common, Destination, Ended};
use crate::channel::{ChannelError, Flow, Wait};
use crate::error::MigrateError;
use crate::guest::{Active, SignWatch, Vacant};
use crate::message::{self, Activated, FIRST_SIGN_US_MAX, FirstSign, Message, Reasons};
use crate::plan::MigrationId;
use crate::report::{Observer, Stage, micros};

/// How often to look for the guest's first sign: when it was is known exactly all the same.
const FIRST_SIGN_LOOK: Duration = Duration::from_millis(5);

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
    read_at: Duration,
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

/// The destination's end after activation: whether the source has heard. It may go to another thread.
#[derive(Debug)]
pub struct Farewell {
    /// What to answer a source in doubt, while [`Farewell::source_knows`] is false.
    pub verdict: Verdict,
    sign: Option<SignWatch>,
    activated_at: Duration,
    common: Box<Common>,
}

impl Farewell {
    /// Waits for `Done`: whether the source has let go of its copy. If not, the listener should answer
    /// questions for some minutes.
    pub fn source_knows(&mut self) -> bool {
        let mut poll = || Flow::Continue;
        let now = self.common.channel.now();
        let mut wait = Wait::within(self.common.options.still, now, &mut poll);
        matches!(self.common.channel.recv("Done", &mut wait), Ok(Message::Done))
    }

    /// Tells a source that knows the guest's first sign, as soon as it is given, if that is soon. All else is over,
    /// and nothing hangs on whether the source hears it.
    pub fn tell_first_sign(&mut self) {
        let Some(sign) = &self.sign else { return };
        loop {
            let ago = sign.ago();
            let after = self.common.channel.now().saturating_sub(self.activated_at);
            // One that was given before `Activated` was written came at once.
            let after_us = micros(after.saturating_sub(ago.unwrap_or_default()));
            if after_us > FIRST_SIGN_US_MAX {
                return;
            }
            if ago.is_some() {
                self.common.tell(&Message::FirstSign(FirstSign { after_us }));
                return;
            }
            self.common.channel.sleep(FIRST_SIGN_LOOK);
        }
    }
}

impl<V: Vacant> Destination<Restored<V>> {
    /// Stage 4, commitment: waits for the whole of `Commit`.
    ///
    /// # Errors
    /// It didn't come, or came for another migration. The guest is gone and never ran: that is the
    /// verdict, to be kept for the source.
    pub fn await_commit(
        self,
        observer: &mut dyn Observer,
    ) -> Result<Destination<Committed<V>>, Box<Ended>> {
        let Destination { mut common, stage: Restored { guest, paused } } = self;
        common.progress.stage = Stage::Commitment;
        common.options.still = common.options.commit;
        common.begin_within(common.options.commit);
        let message = common.exchange(observer, |channel, wait| channel.recv("Commit", wait));
        let error = match message {
            Ok(Message::Commit(commit)) if commit.id == common.id => {
                let stage = Committed { guest, paused, read_at: common.channel.now() };
                return Ok(Destination { common, stage });
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
        let told = self.tell(&verdict.message());
        let in_doubt = match &error {
            // It said that it keeps the guest: no `Commit` comes from it, nor a question.
            MigrateError::Channel { source: ChannelError::Peer(..), .. } => false,
            error if error.is_cancelled() => !told,
            _ => true,
        };
        Box::new(Ended { verdict: Some(verdict), in_doubt, ..*self.ended(error) })
    }
}

impl<V: Vacant> Destination<Committed<V>> {
    /// Stage 5, activation: takes the disks, runs the guest, tells the source. That the source doesn't
    /// hear it changes nothing. Gives the guest, and what is left to do with the source.
    ///
    /// The observer is asked once more before the guest runs, and may still cancel. It is asked again, in this stage and
    /// without effect, once the guest runs and before the source hears of it: what came until then comes too late.
    ///
    /// # Errors
    /// The observer cancelled, or the guest couldn't be activated; it is gone, and never ran. The source was told, so
    /// that it resumes its own.
    pub fn activate(
        self,
        observer: &mut dyn Observer,
    ) -> Result<(V::Running, Farewell), Box<Ended>> {
        let Destination { mut common, stage: Committed { guest, paused, read_at } } = self;
        // Since the last pages nobody may have been asked: that happens only where something is waited for.
        if let Err(error) = common.ask(observer) {
            drop(guest);
            return Err(common.never_activated(error));
        }
        common.progress.stage = Stage::Activation;
        let Active { running, guest_stall_us, first_sign: sign } = match guest.activate(paused) {
            Ok(active) => active,
            Err(source) => {
                let (stage, doing) = (Stage::Activation, "activating the guest");
                return Err(common.never_activated(MigrateError::Guest { stage, doing, source }));
            }
        };
        let activated_at = common.channel.now();
        // Who cancels after this may know that the guest is here.
        let _ = common.ask(observer);
        let activate_us = micros(activated_at - read_at);
        let activated = Activated { activate_us, guest_stall_us };
        let verdict = Verdict { id: common.id, answer: Ok(activated) };
        common.tell(&verdict.message());
        Ok((running, Farewell { verdict, sign, activated_at, common }))
    }
}
