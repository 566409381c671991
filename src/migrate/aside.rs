//! Work that may take long and can't be interrupted, on a thread of its own: whoever waits for it still looks up.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use vmm_migration::channel::Flow;

/// How often a wait looks up.
pub(super) const LOOK: Duration = Duration::from_millis(100);

/// Does `work` on a thread called `name`, and gives what comes of it; `None` if `poll` cancels the wait. The work then
/// goes on, for nobody.
///
/// # Errors
/// There can be no further thread.
pub(crate) fn aside<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
    poll: &mut dyn FnMut() -> Flow,
) -> io::Result<Option<T>> {
    let (give, result) = mpsc::channel();
    std::thread::Builder::new().name(name.to_owned()).spawn(move || drop(give.send(work())))?;
    loop {
        match result.recv_timeout(LOOK) {
            Ok(done) => return Ok(Some(done)),
            Err(RecvTimeoutError::Disconnected) => unreachable!("it sends before it ends"),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if poll() == Flow::Cancel {
            return Ok(None);
        }
    }
}
