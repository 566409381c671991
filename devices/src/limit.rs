//! Log lines that a guest can cause: so many a second and no more.

use std::time::{Duration, Instant};

/// Admits a bounded number of lines a second and counts what it turned away.
#[derive(Debug)]
pub struct RateLimited {
    lines_per_second: u32,
    window: Option<Instant>,
    admitted: u32,
    dropped: u64,
}

impl RateLimited {
    /// Admits `lines_per_second`, all of them at once if they come so.
    #[must_use]
    pub fn new(lines_per_second: u32) -> Self {
        Self { lines_per_second, window: None, admitted: 0, dropped: 0 }
    }

    /// Asks to log one line. `Some(n)`: log it; `n` lines before it were turned away. `None`: don't.
    pub fn admit(&mut self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&mut self, now: Instant) -> Option<u64> {
        let fresh = self
            .window
            .is_none_or(|start| now.saturating_duration_since(start) >= Duration::from_secs(1));
        if fresh {
            (self.window, self.admitted) = (Some(now), 0);
        }
        if self.admitted >= self.lines_per_second {
            self.dropped = self.dropped.saturating_add(1);
            return None;
        }
        self.admitted += 1;
        Some(std::mem::take(&mut self.dropped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_over_the_limit_are_counted_and_told_later() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut limit = RateLimited::new(2);
        assert_eq!(limit.admit_at(at(0)), Some(0));
        assert_eq!(limit.admit_at(at(10)), Some(0));
        assert_eq!(limit.admit_at(at(20)), None);
        assert_eq!(limit.admit_at(at(999)), None);
        assert_eq!(limit.admit_at(at(1000)), Some(2));
        assert_eq!(limit.admit_at(at(1001)), Some(0));
        assert_eq!(limit.admit_at(at(1002)), None);
    }

    #[test]
    fn a_limit_of_nothing_admits_nothing() {
        let mut limit = RateLimited::new(0);
        assert_eq!((limit.admit(), limit.admit()), (None, None));
    }
}
