//! Work that nobody waits for: it leaves the processors to the guests.

use std::thread;

/// Drops it on a thread that runs only where no other wants to (`SCHED_IDLE`, sched(7)), and waits for that. Used for what is
/// left to do when a guest has moved: where both ends of a move are on one host, giving back the source's memory would take
/// time from the guest's first steps at the destination. A thread of its own: without privileges there is no way back.
pub fn give_back(it: impl Send) {
    thread::scope(|scope| {
        let give_back = move || {
            enter();
            drop(it);
        };
        // Where there is no thread to be had, it was dropped with the closure.
        if let Err(e) =
            thread::Builder::new().name("give-back".into()).spawn_scoped(scope, give_back)
        {
            tracing::debug!("not in the background: {e}");
        }
    });
}

fn enter() {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the call reads `parameters`, which live; 0 names the calling thread.
    let done = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
    if done != 0 {
        tracing::debug!("not in the background: {}", std::io::Error::last_os_error());
    }
}
