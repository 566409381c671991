//! The terminal on standard input: raw while the guest has it, restored however this process ends.
//!
//! What was changed is kept in statics, because the ways out are many: the console's end, `exit` from
//! anywhere, a panic (which aborts in release builds), a signal that kills. Only SIGKILL is left.
//! A process in the background leaves the terminal alone: its shell has it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use super::notice::Notice;
use rustix::io::Errno;
use rustix::termios::{
    OptionalActions, OutputModes, QueueSelector, SpecialCodeIndex, Termios, tcflush, tcgetattr,
    tcgetpgrp, tcsetattr,
};

/// The terminal's modes before the first change.
static SAVED: OnceLock<Termios> = OnceLock::new();
/// The modes are ours.
static RAW: AtomicBool = AtomicBool::new(false);
/// This process was stopped and goes on, perhaps with the shell's modes.
static CONTINUED: AtomicBool = AtomicBool::new(false);
/// Where the SIGCONT handler gives notice, or -1.
static NOTICE: AtomicI32 = AtomicI32::new(-1);

/// Signals that kill this process unless somebody else handles them.
const FATAL: [libc::c_int; 10] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGABRT,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGSYS,
];
/// What each of [`FATAL`] did before.
static BEFORE: [OnceLock<libc::sigaction>; FATAL.len()] = [const { OnceLock::new() }; FATAL.len()];

/// Whether this process may change and read the terminal: it is in the foreground, or the terminal
/// isn't the one that controls it.
pub fn is_ours() -> bool {
    match tcgetpgrp(io::stdin()) {
        Ok(group) => group == rustix::process::getpgrp(),
        Err(e) => e == Errno::NOTTY,
    }
}

/// Makes the terminal raw, and sees to its restoration. To be called in the foreground; again after
/// [`was_continued`].
pub fn enter(notice: &Notice) -> io::Result<()> {
    let before = tcgetattr(io::stdin())?;
    let mut raw = SAVED.get_or_init(|| before).clone();
    prepare(notice)?;
    let output = raw.output_modes;
    raw.make_raw();
    // A line of ours on standard error still starts at the left; the guest's CR LF stays one.
    raw.output_modes = output & (OutputModes::OPOST | OutputModes::ONLCR);
    // A read never waits, should another process have read what `poll` saw.
    raw.special_codes[SpecialCodeIndex::VMIN] = 0;
    raw.special_codes[SpecialCodeIndex::VTIME] = 0;
    RAW.store(true, Ordering::SeqCst);
    Ok(tcsetattr(io::stdin(), OptionalActions::Now, &raw)?)
}

/// Drops what was typed and not read yet. To be called in the foreground.
pub fn forget_typed() {
    // What can't be dropped is read.
    let _ = tcflush(io::stdin(), QueueSelector::IFlush);
}

/// Gives the terminal the modes that it had. Safe to call at any time, from anywhere, again.
pub fn restore() {
    NOTICE.store(-1, Ordering::SeqCst);
    if RAW.swap(false, Ordering::SeqCst)
        && let Some(saved) = SAVED.get()
        && is_ours()
    {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, saved);
    }
}

/// Whether this process was stopped and continued since the last call.
pub fn was_continued() -> bool {
    CONTINUED.swap(false, Ordering::SeqCst)
}

/// Takes care of every way out, once.
fn prepare(notice: &Notice) -> io::Result<()> {
    static DONE: AtomicBool = AtomicBool::new(false);
    NOTICE.store(notice.as_raw_fd(), Ordering::SeqCst);
    if DONE.swap(true, Ordering::SeqCst) {
        return Ok(());
    }
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        hook(info);
    }));
    // SAFETY: `at_exit` is a function for the whole life of the process, and sound to call at its end:
    // it reads statics and makes system calls.
    if unsafe { libc::atexit(at_exit) } != 0 {
        return Err(io::Error::other("no memory to register the terminal's restoration"));
    }
    for (signal, before) in FATAL.into_iter().zip(&BEFORE) {
        let old = set_action(signal, None)?;
        let fault = [libc::SIGSEGV, libc::SIGBUS].contains(&signal);
        if old.sa_sigaction == libc::SIG_DFL || fault {
            before.get_or_init(|| old);
            set_action(signal, Some(on_fatal))?;
        }
    }
    set_action(libc::SIGCONT, Some(on_continue))?;
    Ok(())
}

type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// Sets a signal's handler, if one is given, and says what its action was.
fn set_action(signal: libc::c_int, handler: Option<Handler>) -> io::Result<libc::sigaction> {
    // SAFETY: all zeroes are a valid sigaction.
    let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
    let new = handler.map(|handler| {
        let mut new = old;
        new.sa_sigaction = handler as *const () as libc::sighandler_t;
        // On the alternate stack: a fault may be a stack overflow.
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        new
    });
    let new = new.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `new` is null or points to a live sigaction whose handler has the signature that
    // SA_SIGINFO asks for and only does what is safe in a handler; `old` is live.
    match unsafe { libc::sigaction(signal, new, &raw mut old) } {
        0 => Ok(old),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn at_exit() {
    restore();
}

/// Restores the terminal, then lets the signal do what it did before.
extern "C" fn on_fatal(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    restore();
    let before = FATAL.iter().position(|s| *s == signal).and_then(|at| BEFORE[at].get());
    if let Some(before) = before {
        // SAFETY: `before` came from sigaction, for this signal.
        unsafe { libc::sigaction(signal, before, std::ptr::null_mut()) };
    }
    // SAFETY: the kernel gives a handler with SA_SIGINFO a live siginfo.
    let sent = unsafe { (*info).si_code } <= 0;
    if sent {
        // SAFETY: raise is safe in a handler; the signal is blocked here and comes after the return.
        unsafe { libc::raise(signal) };
    }
    // A fault comes again by itself when its instruction is tried again.
}

extern "C" fn on_continue(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    CONTINUED.store(true, Ordering::SeqCst);
    let one = 1u64;
    // SAFETY: the 8 bytes of `one` are live; write is safe in a handler. A descriptor that is closed
    // or none gives an error, which is of no consequence.
    unsafe { libc::write(NOTICE.load(Ordering::SeqCst), (&raw const one).cast(), 8) };
}
