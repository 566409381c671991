//! The guest's stop: tried at reservation for what it costs, and done at last. Its devices finish their I/O before it, while
//! the guest runs, for nobody can tell how long that takes.

use super::Common;
use crate::channel::Flow;
use crate::error::MigrateError;
use crate::guest::{Example, Live};
use crate::report::Observer;

impl Common {
    /// Brings the guest's I/O to rest, so that the stop that follows waits for none.
    pub(super) fn settle<L: Live>(
        &mut self,
        guest: &mut L,
        observer: &mut dyn Observer,
    ) -> Result<(), MigrateError> {
        const DOING: &str = "letting the guest's devices finish their I/O";
        let start = self.channel.now();
        let until = start.saturating_add(self.options.deadlines.still);
        match self.while_asked(Some(until), observer, DOING, |poll| guest.settle(poll))? {
            Flow::Continue => Ok(()),
            Flow::Cancel => {
                let why =
                    format!("it goes on after {} ms", (self.channel.now() - start).as_millis());
                Err(self.guest_error(DOING)(why.into()))
            }
        }
    }

    /// An example of the guest's state. What the stop for it cost is reported, of several the least.
    pub(super) fn example<L: Live>(
        &mut self,
        guest: &mut L,
        observer: &mut dyn Observer,
    ) -> Result<Example, MigrateError> {
        self.settle(guest, observer)?;
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
