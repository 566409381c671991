//! The guest's stop: tried at reservation for what it costs, and done at last. Its devices finish their I/O before it, while
//! the guest runs, for nobody can tell how long that takes.

use std::time::Duration;

use super::Common;
use crate::channel::Flow;
use crate::error::MigrateError;
use crate::guest::{Example, Live};
use crate::policy::is_settled;
use crate::report::Observer;

const SETTLING: &str = "letting the guest's devices finish their I/O";

impl Common {
    /// Brings the guest's I/O to rest, so that the stop that follows waits for none. Gives how long that took, or will at
    /// least: then time is up, and nothing rests.
    fn settle<L: Live>(
        &mut self,
        guest: &mut L,
        observer: &mut dyn Observer,
    ) -> Result<Result<Duration, Duration>, MigrateError> {
        let start = self.channel.now();
        let most = start.saturating_add(self.options.deadlines.still);
        let until = self.cut_at.into_iter().chain(self.time_up_at).chain([most]).min();
        let flow = self.while_asked(until, false, observer, SETTLING, |poll| guest.settle(poll))?;
        let took = self.channel.now() - start;
        Ok(if flow == Flow::Continue { Ok(took) } else { Err(took) })
    }

    fn unsettled(&self, after: Duration) -> MigrateError {
        if self.time_up_at.is_some_and(|at| self.channel.now() >= at) {
            return self.no_convergence();
        }
        let why = format!("it goes on after {} ms", after.as_millis());
        self.guest_error(SETTLING)(why.into())
    }

    /// Brings it to rest for the stop. `false`: that took so long that the guest has dirtied more than was reckoned with. The
    /// devices go on, and it has to be tried again, after `tries` times.
    pub(super) fn settle_for_stop<L: Live>(
        &mut self,
        guest: &mut L,
        tries: u32,
        observer: &mut dyn Observer,
    ) -> Result<bool, MigrateError> {
        let is_late = self.cut_at.is_none() && self.options.limits.cut_after().is_some();
        match self.settle(guest, observer)? {
            Ok(took) if is_late || is_settled(&self.options.limits, took, tries) => Ok(true),
            Ok(_) => {
                guest.unsettle();
                Ok(false)
            }
            Err(_) if self.is_cut_short() => Ok(false),
            Err(after) => Err(self.unsettled(after)),
        }
    }

    /// An example of the guest's state. What the stop for it cost is reported, of several the least.
    pub(super) fn example<L: Live>(
        &mut self,
        guest: &mut L,
        observer: &mut dyn Observer,
    ) -> Result<Example, MigrateError> {
        let settled = self.settle(guest, observer)?;
        settled.map_err(|after| self.unsettled(after))?;
        self.save_example(guest)
    }

    /// What a stop takes, tried once more; unless it is time for something else.
    pub(super) fn try_stop<L: Live>(
        &mut self,
        guest: &mut L,
        observer: &mut dyn Observer,
    ) -> Result<Option<Duration>, MigrateError> {
        match self.settle(guest, observer)? {
            Ok(_) => self.save_example(guest).map(|e| Some(Duration::from_micros(e.stop_us))),
            Err(_) if self.is_cut_short() => Ok(None),
            Err(after) => Err(self.unsettled(after)),
        }
    }

    fn save_example<L: Live>(&mut self, guest: &mut L) -> Result<Example, MigrateError> {
        let example = guest
            .example(&self.sections)
            .map_err(self.guest_error("saving an example of the state"))?;
        let least_us = match self.report.example_stop_us {
            0 => u64::MAX,
            us => us,
        };
        self.report.example_stop_us = example.stop_us.min(least_us);
        Ok(example)
    }
}
