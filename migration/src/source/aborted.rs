//! A migration that didn't happen, and how its guest goes on.

use super::Moved;
use crate::error::{MigrateError, StuckError};
use crate::guest::{Changes, Halted, Live, Locks};
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
    /// What is made of a disk that has changed, at the next try to resume.
    pub(super) changes: Changes,
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
    /// Takes the operator's word that no other copy runs, whatever the disks look like. It is good for one try: what
    /// holds a lock at that may write the disks until the next.
    pub fn trust_disks(&mut self) {
        self.changes = Changes::Trusted;
    }

    /// Gives the guest up, as the operator says: what is left here is to be dropped.
    ///
    /// # Errors
    /// A guest that never stopped is not given up.
    pub fn discard(self) -> Result<Moved<L::Halted>, Box<Self>> {
        match self.guest {
            Place::Halted { guest, .. } => Ok(Moved { guest, report: self.report }),
            guest @ Place::Live(_) => Err(Box::new(Self { guest, ..self })),
        }
    }

    /// Lets the guest go on, after taking its disks' locks back where they were released.
    ///
    /// # Errors
    /// It stands still and whole; try again, or ask the operator.
    pub fn resume(self) -> Result<Stayed<L>, Box<(Aborted<L>, StuckError)>> {
        let Self { guest, error, report, changes } = self;
        let stuck = |guest, error, report, why| {
            let guest = Place::Halted { guest, released: true };
            let changes = Changes::Matter;
            Err(Box::new((Aborted { guest, error, report, changes }, why)))
        };
        let guest = match guest {
            Place::Live(guest) => guest,
            Place::Halted { mut guest, released } => {
                if released {
                    match guest.retake_disks(changes) {
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
