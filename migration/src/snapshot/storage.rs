//! What makes a snapshot last: the few steps that may take as long as the disk likes, in the order in which they come.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;

use crate::channel::Flow;

/// One of them.
#[derive(Debug)]
pub enum Step {
    /// Writes a small file, which is there already and empty.
    Write {
        /// The file.
        file: File,
        /// Its path.
        path: PathBuf,
        /// What it is to hold.
        bytes: Vec<u8>,
    },
    /// Makes a file's contents durable, or a directory's names.
    Sync {
        /// The file or directory.
        file: File,
        /// Its path.
        path: PathBuf,
    },
    /// Gives a directory the snapshot's name. It can't be left to itself: who cancels has to know what became of it.
    Rename {
        /// The name that it has.
        from: PathBuf,
        /// The snapshot's.
        to: PathBuf,
    },
}

impl Step {
    /// Takes it, however long that may be.
    ///
    /// # Errors
    /// What the system says.
    pub fn take(self) -> io::Result<()> {
        match self {
            Self::Write { mut file, bytes, .. } => file.write_all(&bytes),
            Self::Sync { file, .. } => file.sync_all(),
            Self::Rename { from, to } => fs::rename(from, to),
        }
    }
}

/// Takes a snapshot's last steps, and looks up meanwhile; and has threads, which this crate has not.
pub trait Storage {
    /// Does `work`, which ends by itself once the snapshot is written or given up, on a thread of its own. `false`: there is none,
    /// and the work was not begun.
    fn beside(&mut self, work: Box<dyn FnOnce() + Send>) -> bool {
        drop(work);
        false
    }

    /// Takes a step: best on a thread of its own, since nobody can tell how long storage takes, nor stop it. `poll` is asked
    /// about every 100 ms and cancels the wait: the step is left to itself.
    ///
    /// # Errors
    /// What [`Step::take`] says, or there can be no such thread.
    fn take(&mut self, step: Step, poll: &mut dyn FnMut() -> Flow) -> io::Result<Flow>;
}
