//! Throttling: keeps vCPUs off for a share of their time, so that a migration converges.
//!
//! A ticker kicks every throttled vCPU once a period; the vCPU's own thread then sleeps for its share.
//! It is the same kick that stops a machine, and the same rule: a vCPU leaves `KVM_RUN` by EINTR only.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::kick;

/// A throttled vCPU runs and sleeps once in each of these.
const PERIOD: Duration = Duration::from_millis(20);
/// Strongest throttle, in percent: a guest that never runs would never come to an end.
pub const PERCENT_MAX: u8 = 99;

/// What other threads ask of a vCPU's thread when they kick it.
#[derive(Debug, Default)]
pub struct VcpuOrders {
    stop: AtomicBool,
    throttle_percent: AtomicU8,
}

impl VcpuOrders {
    /// Takes all orders back, before the vCPU's thread is lent a vCPU.
    pub fn reset(&self) {
        self.stop.store(false, Ordering::SeqCst);
        self.throttle(0);
    }

    /// Asks the vCPU's thread to give its vCPU back. A kick follows.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    /// Whether it was asked to.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Keeps the vCPU off for this share of its time, in percent from 0 to [`PERCENT_MAX`].
    pub fn throttle(&self, percent: u8) {
        self.throttle_percent.store(percent.min(PERCENT_MAX), Ordering::Relaxed);
    }

    fn is_throttled(&self) -> bool {
        self.throttle_percent.load(Ordering::Relaxed) > 0
    }

    /// Called by the vCPU's thread after a kick: sleeps for its share of a period. A stop wakes it.
    pub fn sleep_share(&self) {
        let share = PERIOD * u32::from(self.throttle_percent.load(Ordering::Relaxed)) / 100;
        let end = Instant::now() + share;
        while !self.is_stopping() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::park_timeout(left);
        }
    }
}

/// The thread that kicks throttled vCPUs. Dropping it ends and joins the thread.
#[derive(Debug)]
pub struct Ticker {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    /// Starts ticking. Each vCPU is named by its thread and its orders; the ticker is dropped before any
    /// of these threads is joined.
    pub fn start(vcpus: Vec<(kick::ThreadId, Arc<VcpuOrders>)>) -> io::Result<Self> {
        let end = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&end);
        let thread = std::thread::Builder::new().name("throttle".to_owned()).spawn(move || {
            while !ended.load(Ordering::Acquire) {
                for (thread, _) in vcpus.iter().filter(|(_, orders)| orders.is_throttled()) {
                    thread.kick();
                }
                std::thread::park_timeout(PERIOD);
            }
        })?;
        Ok(Self { end, thread: Some(thread) })
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}
