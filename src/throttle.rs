//! Throttling: keeps vCPUs off for a share of their time, so that a migration converges.
//!
//! A ticker kicks each throttled vCPU once in its period; the vCPU's own thread then sleeps for its share.
//! It is the same kick that stops a machine, and the same rule: a vCPU leaves `KVM_RUN` by EINTR only.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::kick;

/// A throttled vCPU runs and sleeps once in each of these; in a longer one where its run would be shorter than [`RUN_MIN`].
const PERIOD: Duration = Duration::from_millis(20);
/// What a vCPU runs for between two sleeps: less could be lost in waking up, and it would never come to run.
const RUN_MIN: Duration = Duration::from_millis(1);
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

    /// By how many percent, at most [`PERCENT_MAX`]; 0: it isn't throttled.
    fn percent(&self) -> u32 {
        u32::from(self.throttle_percent.load(Ordering::Relaxed))
    }

    /// Called by the vCPU's thread after a kick: sleeps for its share of a period. A stop wakes it.
    pub fn sleep_share(&self) {
        let percent = self.percent();
        let share = period(percent) * percent / 100;
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

/// How often a vCPU runs and sleeps that is throttled by so many percent.
fn period(percent: u32) -> Duration {
    PERIOD.max(RUN_MIN * 100 / (100 - percent))
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
            let mut due = vec![Instant::now(); vcpus.len()];
            while !ended.load(Ordering::Acquire) {
                let (now, mut wait) = (Instant::now(), PERIOD);
                for ((thread, orders), due) in vcpus.iter().zip(&mut due) {
                    let percent = orders.percent();
                    if percent == 0 {
                        continue;
                    }
                    if *due <= now {
                        *due = now + period(percent);
                        thread.kick();
                    }
                    wait = wait.min(*due - now);
                }
                std::thread::park_timeout(wait);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_throttle_leaves_time_to_run_and_keeps_its_share() {
        for percent in 1..=u32::from(PERCENT_MAX) {
            let period = period(percent);
            let run = period - period * percent / 100;
            assert!(run >= RUN_MIN, "{percent} %: {run:?}");
            assert!((PERIOD..=Duration::from_millis(100)).contains(&period), "{percent} %");
        }
        assert_eq!(period(50), PERIOD);
    }
}
