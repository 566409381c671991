//! Kicks: how a vCPU thread is brought out of `KVM_RUN`, exactly once for each kick and never lost.
//!
//! The kick is a signal whose handler, running on the vCPU's own thread, sets `immediate_exit` in the
//! thread's `kvm_run`. Whether it arrives inside `KVM_RUN` or between two calls, the next thing that
//! `KVM_RUN` does after completing a pending PIO or MMIO is to return EINTR.
//!
//! Invariant: the vCPU loop is left for a kick only by `KVM_RUN` returning EINTR, so that pending
//! PIO/MMIO is always completed by re-entry.

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::OnceLock;
use std::time::Duration;

use kvm_bindings::kvm_run;

thread_local! {
    /// This thread's `kvm_run` while it is a vCPU thread, else null.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
    /// A kick came before [`Target::enter`] had set `RUN`.
    static EARLY: Cell<bool> = const { Cell::new(false) };
}

extern "C" fn on_kick(_signal: libc::c_int) {
    let run = RUN.get();
    if run.is_null() {
        EARLY.set(true);
    } else {
        // SAFETY: `RUN` points to this thread's mapped `kvm_run` for as long as it is set; the kernel
        // expects that user space writes this byte at any time, and so it is written as volatile.
        unsafe { ptr::write_volatile(&raw mut (*run).immediate_exit, 1) };
    }
}

fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Installs the kick's signal handler, once for the process.
pub fn install() -> io::Result<()> {
    static DONE: OnceLock<Result<(), i32>> = OnceLock::new();
    DONE.get_or_init(|| {
        vmm_sys_util::signal::register_signal_handler(signal(), handler).map_err(|e| e.errno())
    })
    .map_err(io::Error::from_raw_os_error)
}

extern "C" fn handler(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    on_kick(signal);
}

/// Makes the calling thread one that kicks reach, until dropped.
pub struct Target {
    run: *mut kvm_run,
}

impl Target {
    /// Announces the calling thread's `kvm_run`. A kick that came before is not lost.
    pub fn enter(run: &mut kvm_run) -> Self {
        run.immediate_exit = 0;
        let run: *mut kvm_run = run;
        RUN.set(run);
        if EARLY.replace(false) {
            on_kick(signal());
        }
        Self { run }
    }

    /// Whether a kick arrived since [`Self::enter`].
    #[must_use]
    pub fn kicked(&self) -> bool {
        // SAFETY: `run` is the live mapping given to `enter`; only this thread and its own signal
        // handler write the byte.
        unsafe { ptr::read_volatile(&raw const (*self.run).immediate_exit) != 0 }
    }

    /// Takes note of the kick: the next `KVM_RUN` enters the guest, unless another kick comes.
    pub fn rearm(&self) {
        // SAFETY: as in `kicked`.
        unsafe { ptr::write_volatile(&raw mut (*self.run).immediate_exit, 0) };
    }

    /// Size in bytes of one element of the port I/O that `KVM_RUN` just returned.
    #[must_use]
    pub fn io_size(&self) -> usize {
        // SAFETY: `run` is the live mapping; the union holds `io` after a KVM_EXIT_IO, and any bytes
        // are a valid `u8`.
        usize::from(unsafe { (*self.run).__bindgen_anon_1.io.size }).max(1)
    }

    /// The suberror of the KVM_EXIT_INTERNAL_ERROR that `KVM_RUN` just returned.
    #[must_use]
    pub fn suberror(&self) -> u32 {
        // SAFETY: as in `io_size`, with the `internal` member.
        unsafe { (*self.run).__bindgen_anon_1.internal.suberror }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        RUN.set(ptr::null_mut());
    }
}

/// A thread that kicks reach, named so that it can be kicked from any other.
#[derive(Clone, Copy, Debug)]
pub struct ThreadId(libc::pthread_t);

impl ThreadId {
    /// Names a thread. The caller sees to it that the thread is not joined while the name is in use.
    pub fn of<T>(thread: &std::thread::JoinHandle<T>) -> Self {
        Self(thread.as_pthread_t())
    }

    /// Kicks it.
    pub fn kick(self) {
        // SAFETY: the thread is not joined yet (see `of`), so its pthread_t is valid, even if the thread
        // has ended; the signal's handler is installed before any vCPU thread starts.
        unsafe { libc::pthread_kill(self.0, signal()) };
    }

    /// The processor time that it has used, guest included. `None` if it has ended.
    #[must_use]
    pub fn cpu_time(self) -> Option<Duration> {
        let mut clock = 0;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the thread is not joined yet (see `of`); both calls write to live variables of ours.
        let told = unsafe {
            libc::pthread_getcpuclockid(self.0, &raw mut clock) == 0
                && libc::clock_gettime(clock, &raw mut time) == 0
        };
        let (seconds, nanos) =
            (u64::try_from(time.tv_sec).ok()?, u32::try_from(time.tv_nsec).ok()?);
        told.then(|| Duration::new(seconds, nanos))
    }
}
