//! The guest's disks are flushed: while it runs, so that little is left for the stop and that little is known; and in the
//! stop, for no longer than that may take.

use std::time::Duration;

use super::Common;
use crate::channel::{ChannelError, Flow, Wait};
use crate::error::MigrateError;
use crate::guest::{GuestError, Halted, Live};
use crate::message::Message;
use crate::report::Observer;

/// A flush that took no longer than this had nothing to do.
const QUICK: Duration = Duration::from_millis(1);
/// How often a destination that awaits pages hears something: it gives up after 30 s of silence.
const SIGN_OF_LIFE: Duration = Duration::from_secs(3);
const FLUSHING: &str = "flushing the disks";

impl Common {
    /// Flushes the disks while the guest runs. Gives how long it takes where little was written since the last time: what a
    /// stop right after may take.
    pub(super) fn flush_disks<L: Live>(
        &mut self,
        guest: &mut L,
        observer: &mut dyn Observer,
    ) -> Result<Duration, MigrateError> {
        let until = self.cut_at.into_iter().chain(self.time_up_at).min();
        let mut took = Duration::ZERO;
        // Flushed twice: the first may find much that was written long ago, so the second is timed.
        for _ in 0..2 {
            let start = self.channel.now();
            let flow =
                self.while_asked(until, true, observer, FLUSHING, |poll| guest.flush_disks(poll))?;
            let now = self.channel.now();
            took = now - start;
            if flow == Flow::Cancel && self.time_up_at.is_some_and(|at| now >= at) {
                return Err(self.no_convergence());
            }
            if flow == Flow::Cancel || took <= QUICK {
                break;
            }
        }
        Ok(took)
    }

    /// Flushes the disks of a guest that stands, and releases their locks: how long that took, which is not the
    /// destination's doing, and doesn't count against it.
    pub(super) fn release_disks<H: Halted>(
        &mut self,
        guest: &mut H,
        observer: &mut dyn Observer,
    ) -> Result<Duration, MigrateError> {
        let start = self.channel.now();
        let flow = self.while_asked(self.deadline, false, observer, FLUSHING, |poll| {
            guest.release_disks(poll)
        })?;
        let took = self.channel.now() - start;
        if flow == Flow::Cancel {
            let why = format!("the flush goes on after {} ms", took.as_millis());
            return Err(self.guest_error("releasing the disks")(why.into()));
        }
        self.deadline = self.deadline.map(|deadline| deadline.saturating_add(took));
        Ok(took)
    }

    /// Does what takes as long as the guest's storage does. In pre-copy the destination hears now and then that this end is
    /// still there (`heard`). [`Flow::Cancel`]: it was given up at `until`.
    pub(super) fn while_asked(
        &mut self,
        until: Option<Duration>,
        heard: bool,
        observer: &mut dyn Observer,
        doing: &'static str,
        run: impl FnOnce(&mut dyn FnMut() -> Flow) -> Result<Flow, GuestError>,
    ) -> Result<Flow, MigrateError> {
        let (mut next, mut pings, mut failed) = (self.channel.now() + SIGN_OF_LIFE, 0, None);
        let still = self.options.deadlines.still;
        let (stage, progress, channel) = (self.progress.stage, self.progress, &mut self.channel);
        let mut is_cancelled = false;
        let mut poll = || {
            is_cancelled = observer.observe(&progress) == Flow::Cancel;
            let now = channel.now();
            if heard && now >= next && failed.is_none() {
                let mut idle = || Flow::Continue;
                let mut wait = Wait::within(still, now, &mut idle);
                failed = channel.send(&Message::Ping(0, 0), &mut wait).err();
                (next, pings) = (channel.now() + SIGN_OF_LIFE, pings + 1);
            }
            let is_over = failed.is_some() || until.is_some_and(|until| now >= until);
            if is_cancelled || is_over { Flow::Cancel } else { Flow::Continue }
        };
        let flow = run(&mut poll);
        if let Some(source) = failed.or(is_cancelled.then_some(ChannelError::Cancelled)) {
            return Err(MigrateError::Channel { stage, source });
        }
        for _ in 0..pings {
            self.pong(0, observer)?;
        }
        flow.map_err(self.guest_error(doing))
    }
}
