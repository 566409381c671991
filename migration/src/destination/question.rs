//! Connections that bring no guest: a source in doubt, which asks, and a source that comes to a busy listener.

use std::time::Duration;

use super::Verdict;
use crate::channel::{Channel, Flow, Wait};
use crate::message::{Message, Reasons};
use crate::plan::MigrationId;

/// A source in doubt.
#[derive(Debug)]
pub struct Question {
    pub(super) channel: Channel,
    pub(super) still: Duration,
    /// The migration it asks about.
    pub id: MigrationId,
}

impl Question {
    /// Answers: with the verdict on that migration, or, if there is none, that nothing is known of it. Gives
    /// whether the source has let go of the matter.
    #[must_use]
    pub fn answer(mut self, verdicts: &[Verdict]) -> bool {
        let verdict = verdicts.iter().find(|verdict| verdict.id == self.id);
        let message = verdict.map_or(Message::UnknownId, |verdict| verdict.message());
        let mut poll = || Flow::Continue;
        let mut wait = Wait::within(self.still, self.channel.now(), &mut poll);
        let sent = self.channel.send(&message, &mut wait);
        match verdict {
            Some(verdict) if verdict.is_activated() => {
                sent.is_ok() && matches!(self.channel.recv("Done", &mut wait), Ok(Message::Done))
            }
            _ => false,
        }
    }
}

/// Turns a connection away, with a reason: the second source at a busy listener.
pub fn refuse(mut channel: Channel, reason: &str) {
    let mut poll = || Flow::Continue;
    let mut wait = Wait::within(Duration::from_secs(1), channel.now(), &mut poll);
    channel.put_preamble();
    // Who doesn't hear it sees the connection end.
    let _ = channel.send(&Message::Refused(Reasons::one(reason)), &mut wait);
    // What it says is read before the connection ends: or else a socket's end would overtake the reason.
    let _ = channel.recv_preamble(&mut wait).and_then(|()| channel.recv("Hello", &mut wait));
}
