//! The signals that ask this process to end become events: no handler runs on any thread's stack.

use std::io;
use std::sync::mpsc::Sender;
use std::thread;

use rustix::process::{Signal, getpid, kill_process};
use vmm_sys_util::signal::{
    Error as BlockError, block_signal, create_sigset, get_blocked_signals, register_signal_handler,
    unblock_signal,
};

use crate::event::Event;

const ENDING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Signals that are blocked, and wait to be turned into events.
#[derive(Debug)]
#[must_use = "blocked signals that nobody reads make a process that can't be ended"]
pub struct Signals {
    blocked: Vec<libc::c_int>,
}

/// Blocks the ending signals on this thread and all that it starts. What the parent made this
/// process ignore (`nohup`, a shell's background job) stays ignored.
///
/// # Errors
/// The kernel's.
pub fn block() -> io::Result<Signals> {
    let mut blocked = Vec::new();
    for signal in ENDING {
        if !is_ignored(signal)? {
            match block_signal(signal) {
                // Whoever started us may have blocked it already.
                Ok(()) | Err(BlockError::SignalAlreadyBlocked(_)) => blocked.push(signal),
                Err(e) => return Err(io::Error::other(e.to_string())),
            }
        }
    }
    Ok(Signals { blocked })
}

impl Signals {
    /// Starts the thread that sends each signal as [`Event::Signal`]. It ends with the process,
    /// or when nobody receives.
    ///
    /// # Errors
    /// The kernel's, if there can be no thread.
    pub fn send_to(self, events: Sender<Event>) -> io::Result<()> {
        let set =
            create_sigset(&self.blocked).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        thread::Builder::new().name("signals".into()).spawn(move || {
            loop {
                let mut signal = 0;
                // SAFETY: `set` was made by sigemptyset and sigaddset, `signal` is a live c_int.
                let status = unsafe { libc::sigwait(&raw const set, &raw mut signal) };
                if status == 0 && events.send(Event::Signal(signal)).is_err() {
                    return;
                }
            }
        })?;
        Ok(())
    }
}

/// Starts a command that can be told to end: it inherits this thread's mask, so none of the ending signals is blocked
/// meanwhile. One that comes for this process just then is passed on to whoever waits for it.
pub fn while_unblocked<T>(start: impl FnOnce() -> T) -> T {
    let mut blocked = get_blocked_signals().unwrap_or_default();
    blocked.retain(|signal| ENDING.contains(signal) && matches!(is_ignored(*signal), Ok(false)));
    // One that can't be passed on stays blocked.
    blocked.retain(|signal| register_signal_handler(*signal, pass_on).is_ok());
    blocked.retain(|signal| unblock_signal(*signal).is_ok());
    let started = start();
    for signal in blocked {
        // As it was a moment ago.
        let _ = block_signal(signal);
    }
    started
}

/// Sends this process the signal once more: it is blocked on this thread as long as this function lasts.
extern "C" fn pass_on(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    if let Some(signal) = Signal::from_named_raw(signal) {
        let _ = kill_process(getpid(), signal);
    }
}

fn is_ignored(signal: libc::c_int) -> io::Result<bool> {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a null new action changes nothing, and `action` has room for the old one.
    let status = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed, and then written by the kernel: any bytes are a valid sigaction.
    let action = unsafe { action.assume_init() };
    Ok(action.sa_sigaction == libc::SIG_IGN)
}
