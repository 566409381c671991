//! A migration that didn't happen, and how its guest goes on.

use crate::error::{MigrateError, StuckError};
use crate::guest::{Halted, Live, Locks};
use crate::report::Report;

/// Where the guest is after a migration that didn't happen.
pub enum Place<L: Live> {
    /// It runs, as before.
    Live(L),
    /// It stands, whole, and is to be resumed.
    Halted {
        /// The guest.
        guest: L::Halted,
        /// Whether its disks' locks were released.
        released: bool,
    },
}

/// A migration that didn't happen. The guest is the source's.
pub struct Aborted<L: Live> {
    /// The guest.
    pub guest: Place<L>,
    /// Why.
    pub error: MigrateError,
    /// How far it came.
    pub report: Report,
}

/// The guest goes on at the source.
#[derive(Debug)]
pub struct Stayed<L> {
    /// The guest.
    pub guest: L,
    /// Why it stayed.
    pub error: MigrateError,
    /// How far it came.
    pub report: Report,
}

impl<L: Live> Aborted<L> {
    /// Takes the operator's word that no other copy runs, whatever the disks look like.
    pub fn trust_disks(&mut self) {
        if let Place::Halted { guest, .. } = &mut self.guest {
            guest.trust_disks();
        }
    }

    /// Lets the guest go on, after taking its disks' locks back where they were released.
    ///
    /// # Errors
    /// It stands still and whole; try again, or ask the operator.
    pub fn resume(self) -> Result<Stayed<L>, Box<(Aborted<L>, StuckError)>> {
        let Self { guest, error, report } = self;
        let stuck = |guest, error, report, why| {
            let guest = Place::Halted { guest, released: true };
            Err(Box::new((Aborted { guest, error, report }, why)))
        };
        let guest = match guest {
            Place::Live(guest) => guest,
            Place::Halted { mut guest, released } => {
                if released {
                    match guest.retake_disks() {
                        Ok(Locks::Taken) => {}
                        Ok(locks) => return stuck(guest, error, report, StuckError::Locks(locks)),
                        Err(why) => return stuck(guest, error, report, StuckError::Guest(why)),
                    }
                }
                match guest.resume() {
                    Ok(guest) => guest,
                    Err(failed) => {
                        return stuck(failed.guest, error, report, StuckError::Guest(failed.error));
                    }
                }
            }
        };
        Ok(Stayed { guest, error, report })
    }
}
