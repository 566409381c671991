//! The guest's disks are flushed: while it runs, so that little is left for the stop and that little is known; and in the
//! stop, for no longer than that may take.

use std::time::Duration;

use super::Common;
use crate::channel::{ChannelError, Flow};
use crate::error::MigrateError;
use crate::guest::{GuestError, Halted, Live};
use crate::report::Observer;

/// A flush that took no longer than this had nothing to do.
const QUICK: Duration = Duration::from_millis(1);
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
                self.while_asked(until, observer, FLUSHING, |poll| guest.flush_disks(poll))?;
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
        let flow =
            self.while_asked(self.deadline, observer, FLUSHING, |poll| guest.release_disks(poll))?;
        let took = self.channel.now() - start;
        if flow == Flow::Cancel {
            let why = format!("the flush goes on after {} ms", took.as_millis());
            return Err(self.guest_error("releasing the disks")(why.into()));
        }
        self.deadline = self.deadline.map(|deadline| deadline.saturating_add(took));
        Ok(took)
    }

    /// Does what takes as long as the guest's storage does. [`Flow::Cancel`]: it was given up at `until`.
    pub(super) fn while_asked(
        &mut self,
        until: Option<Duration>,
        observer: &mut dyn Observer,
        doing: &'static str,
        run: impl FnOnce(&mut dyn FnMut() -> Flow) -> Result<Flow, GuestError>,
    ) -> Result<Flow, MigrateError> {
        let (stage, progress, channel) = (self.progress.stage, self.progress, &self.channel);
        let mut is_cancelled = false;
        let mut poll = || {
            is_cancelled = observer.observe(&progress) == Flow::Cancel;
            let is_over = until.is_some_and(|until| channel.now() >= until);
            if is_cancelled || is_over { Flow::Cancel } else { Flow::Continue }
        };
        let flow = run(&mut poll);
        if is_cancelled {
            return Err(MigrateError::Channel { stage, source: ChannelError::Cancelled });
        }
        flow.map_err(self.guest_error(doing))
    }
}
