//! A migration in one process: fake guests in a fake world, over a link that fails on purpose, by a
//! clock that only moves when everybody waits. Everything follows from a seed.
//!
//! For tests, of this crate and others (feature `testing`).

pub mod guest;
pub mod host;
pub mod link;
pub mod sim;
pub mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::channel::Clock;

#[cfg(test)]
mod endless_tests;
#[cfg(test)]
mod hostile_numbers_tests;
#[cfg(test)]
mod hostile_tests;

/// A clock by which time passes only when somebody sleeps, in milliseconds.
#[derive(Clone, Debug, Default)]
pub struct Time(Arc<AtomicU64>);

impl Clock for Time {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::SeqCst))
    }

    fn sleep(&self, time: Duration) {
        let ms = u64::try_from(time.as_micros().div_ceil(1000)).unwrap_or(u64::MAX);
        self.0.fetch_add(ms, Ordering::SeqCst);
    }
}

/// A small generator of pseudo-random numbers (xorshift64*), enough to vary tests.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..4 {
            random.next();
        }
        random
    }

    /// The next number.
    #[expect(clippy::should_implement_trait, reason = "not an iterator")]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`.
    ///
    /// # Panics
    /// If `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
