//! A command that carries a migration's stream (`exec:`): left to itself where the guest went through it, and ended where
//! it didn't, for it may hang as its other end does.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};

use crate::signals;

/// How long a command whose stream has ended may take to end too, before it is told to.
const GRACE: Duration = Duration::from_secs(2);
/// How long one that was told to end may take, before it is killed.
const LAST_GRACE: Duration = Duration::from_secs(1);

/// The command, in a process group of its own with all that it starts. Dropping it ends it, a moment later.
pub struct Carrier(Option<Child>);

impl Carrier {
    /// Runs a command whose standard input and output are one socket to us.
    ///
    /// # Errors
    /// There can be no socket or process.
    pub fn start(command: &str) -> io::Result<(UnixStream, Self)> {
        let (ours, theirs) = UnixStream::pair()?;
        let theirs = OwnedFd::from(theirs);
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", command]).process_group(0);
        shell.stdin(Stdio::from(theirs.try_clone()?)).stdout(Stdio::from(theirs));
        let child = signals::while_unblocked(|| shell.spawn())?;
        Ok((ours, Self(Some(child))))
    }

    /// Lets it go on: the guest, or what it says on standard error, may hang on it.
    pub fn leave(mut self) {
        if let Some(mut child) = self.0.take() {
            aside(move || drop(child.wait()));
        }
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        if let Some(child) = self.0.take() {
            aside(move || drop(end(child)));
        }
    }
}

/// Nobody waits for it. Where there can be no thread, the command is left: it sees the end of its input.
fn aside(work: impl FnOnce() + Send + 'static) {
    if let Err(e) = std::thread::Builder::new().name("carrier".to_owned()).spawn(work) {
        tracing::warn!("the command that carried the migration is left to itself: {e}");
    }
}

/// Until it was waited for its process id, which is its group's too, is nobody else's: so the group gets the signals first,
/// for what the command started may live longer than itself.
fn end(mut child: Child) -> io::Result<()> {
    let group = Pid::from_child(&child);
    sleep(GRACE);
    kill_process_group(group, Signal::TERM)?;
    sleep(LAST_GRACE);
    kill_process_group(group, Signal::KILL)?;
    child.wait().map(drop)
}
