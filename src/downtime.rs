//! How much of the time between a guest's save and its restore passes for it.
//!
//! Real time tells it, but a migration's is read on two hosts, whose clocks may differ by any amount: a guest must not
//! jump by that. So it counts only where the destination's own clock confirms it.

use std::time::{Duration, Instant};

use vmm_migration::guest::Since;

/// How far two hosts' real times are apart for it to be worth a word.
const APART_MIN: Duration = Duration::from_millis(500);

/// Whether the time between save and restore passes for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Downtime {
    /// All that went by in real time: a restore as a rule. Timers that ran out meanwhile fire.
    Passes,
    /// As much, in a migration: the guest was saved between the two.
    PassesSince {
        /// The source had yet to hear something.
        earliest: Instant,
        /// The guest's state was here.
        latest: Instant,
    },
    /// None: a snapshot of yesterday goes on where it was, and its real time is yesterday's.
    StandsStill,
}

/// By how much the guest's clock is to be set ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ahead {
    /// By what real time has gone on.
    RealTime,
    /// By so much.
    Of(Duration),
}

impl Downtime {
    /// Of a guest that was saved so long ago.
    #[must_use]
    pub fn since(saved: Since) -> Self {
        let now = Instant::now();
        let before = |time| now.checked_sub(time).unwrap_or(now);
        Self::PassesSince { earliest: before(saved.at_most), latest: before(saved.at_least) }
    }

    /// By how much to set the clock ahead at `now`, of a guest that was saved at `saved_ns` where this host's real time
    /// is `realtime_ns`. Where the hosts' clocks differ, it is the time since its state was here: it loses a one-way trip, and
    /// never jumps.
    #[must_use]
    pub fn ahead(self, saved_ns: u64, realtime_ns: u64, now: Instant) -> Ahead {
        match self {
            Self::Passes => Ahead::RealTime,
            Self::StandsStill => Ahead::Of(Duration::ZERO),
            Self::PassesSince { latest, .. } => match self.apart(saved_ns, realtime_ns, now) {
                Apart { by: Duration::ZERO, .. } => Ahead::RealTime,
                _ => Ahead::Of(now.saturating_duration_since(latest)),
            },
        }
    }

    /// What to say of this host's clock where it differs plainly from the source's.
    #[must_use]
    pub fn warning(self, saved_ns: u64, realtime_ns: u64, now: Instant) -> Option<String> {
        let Apart { by, ahead } = self.apart(saved_ns, realtime_ns, now);
        let side = if ahead { "ahead of" } else { "behind" };
        (by >= APART_MIN).then(|| {
            format!(
                "this host's clock is {:.1} s {side} the source's: the guest's goes on as it was",
                by.as_secs_f64()
            )
        })
    }

    /// How far the two real times are apart at least.
    fn apart(self, saved_ns: u64, realtime_ns: u64, now: Instant) -> Apart {
        let Self::PassesSince { earliest, latest } = self else {
            return Apart { by: Duration::ZERO, ahead: false };
        };
        let gone = Duration::from_nanos(realtime_ns.saturating_sub(saved_ns));
        let backwards = Duration::from_nanos(saved_ns.saturating_sub(realtime_ns));
        let most = now.saturating_duration_since(earliest);
        let least = now.saturating_duration_since(latest);
        if gone > most {
            Apart { by: gone - most, ahead: true }
        } else {
            let by = least.saturating_sub(gone).saturating_add(backwards);
            Apart { by, ahead: false }
        }
    }
}

/// How far this host's real time is apart from the source's, at least.
struct Apart {
    by: Duration,
    ahead: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// A guest that was saved at 10 s of its host, between 40 and 15 ms ago.
    fn saved() -> (Downtime, Instant) {
        let latest = Instant::now() + Duration::from_secs(1);
        let earliest = latest - Duration::from_millis(25);
        (Downtime::PassesSince { earliest, latest }, latest + Duration::from_millis(15))
    }

    #[track_caller]
    fn check(realtime_ms: u64, ahead: Ahead, warning: Option<&str>) {
        let (downtime, now) = saved();
        let (saved_ns, realtime_ns) = (10_000 * MS, realtime_ms * MS);
        assert_eq!(downtime.ahead(saved_ns, realtime_ns, now), ahead);
        let found = downtime.warning(saved_ns, realtime_ns, now);
        assert_eq!(found.as_deref().map(|w| w.split(':').next().unwrap()), warning);
    }

    #[test]
    fn clocks_that_agree_count() {
        for realtime_ms in [10_015, 10_016, 10_030, 10_040] {
            check(realtime_ms, Ahead::RealTime, None);
        }
    }

    #[test]
    fn clocks_that_differ_do_not_make_the_guest_jump() {
        let arrived = Ahead::Of(Duration::from_millis(15));
        check(10_041, arrived, None);
        check(10_014, arrived, None);
        check(9_900, arrived, None);
        check(15_040, arrived, Some("this host's clock is 5.0 s ahead of the source's"));
        check(4_015, arrived, Some("this host's clock is 6.0 s behind the source's"));
        check(0, arrived, Some("this host's clock is 10.0 s behind the source's"));
        check(
            u64::MAX / MS,
            arrived,
            Some("this host's clock is 18446744063.7 s ahead of the source's"),
        );
    }

    #[test]
    fn a_snapshot_has_no_bounds() {
        let now = Instant::now();
        assert_eq!(Downtime::Passes.ahead(0, u64::MAX, now), Ahead::RealTime);
        assert_eq!(Downtime::StandsStill.ahead(0, u64::MAX, now), Ahead::Of(Duration::ZERO));
        assert_eq!(Downtime::Passes.warning(0, u64::MAX, now), None);
    }
}
