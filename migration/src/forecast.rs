//! What a migration will be like, from a short sampling of the dirty rate: the rounds of pre-copy, played
//! through on paper.

use std::time::Duration;

use crate::pages::PAGE_SIZE;
use crate::policy::{float, seconds, whole};
use crate::report::{Forecast, micros};

const ROUNDS_MAX: u32 = 200;

/// Pages dirtied within a span from a common start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// The span.
    pub time: Duration,
    /// Different pages dirtied in it.
    pub pages: u64,
}

/// What a forecast goes by.
#[derive(Clone, Debug)]
pub struct Basis {
    /// Samples of growing spans. The guest is taken to dirty as between them, and beyond the last as
    /// between the last two, up to all of its pages.
    pub samples: Vec<Sample>,
    /// Pages of guest RAM.
    pub pages: u64,
    /// Pages that the first round sends.
    pub touched_pages: u64,
    /// Bytes that go over in a second.
    pub send_bytes_per_s: u64,
    /// The fixed cost of the stop.
    pub fixed: Duration,
    /// The downtime wanted at most.
    pub downtime: Duration,
    /// Time for pre-copy.
    pub timeout: Duration,
}

/// Plays the migration through.
#[must_use]
pub fn forecast(basis: &Basis) -> Forecast {
    let rate = float(basis.send_bytes_per_s.max(1));
    let time = |pages: f64| pages * (PAGE_SIZE as f64 + 20.0) / rate;
    let fixed = basis.fixed.as_secs_f64();
    let limit = basis.downtime.as_secs_f64();
    let (mut set, mut sent, mut elapsed) = (float(basis.touched_pages), 0.0, 0.0);
    let mut rounds = 0;
    let converges = loop {
        let round = time(set);
        sent += set;
        elapsed += round;
        rounds += 1;
        let next = dirtied(&basis.samples, round).min(float(basis.pages));
        let better = next < set * 0.95;
        set = next;
        let downtime = fixed + time(set);
        if downtime <= limit && (!better || time(set) <= (fixed / 4.0).max(0.001)) {
            break true;
        }
        if !better || rounds >= ROUNDS_MAX || elapsed > basis.timeout.as_secs_f64() {
            break downtime <= limit;
        }
    };
    let last = basis.samples.last().copied().unwrap_or(Sample { time: Duration::ZERO, pages: 0 });
    Forecast {
        converges,
        rounds,
        total_us: micros(seconds(elapsed + fixed + time(set))),
        bytes: whole((sent + set) * (PAGE_SIZE as f64 + 20.0)),
        downtime_us: micros(seconds(fixed + time(set))),
        fixed_us: micros(basis.fixed),
        dirty_pages_per_s: whole(float(last.pages) / last.time.as_secs_f64().max(1e-6)),
        send_bytes_per_s: basis.send_bytes_per_s,
    }
}

/// Different pages dirtied within a span, by the samples.
fn dirtied(samples: &[Sample], span: f64) -> f64 {
    let points = || {
        let points = samples.iter().map(|s| (s.time.as_secs_f64(), float(s.pages)));
        std::iter::once((0.0, 0.0)).chain(points)
    };
    let mut slope = 0.0;
    for ((t0, p0), (t1, p1)) in points().zip(points().skip(1)) {
        slope = (p1 - p0).max(0.0) / (t1 - t0).max(1e-6);
        if span <= t1 {
            return p0 + (span - t0) * slope;
        }
    }
    let (time, pages) = points().last().unwrap_or_default();
    pages + (span - time) * slope
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basis(samples: &[(u64, u64)]) -> Basis {
        let sample = |&(ms, pages)| Sample { time: Duration::from_millis(ms), pages };
        Basis {
            samples: samples.iter().map(sample).collect(),
            pages: 1 << 17,
            touched_pages: 1 << 15,
            send_bytes_per_s: 1_000_000_000,
            fixed: Duration::from_millis(5),
            downtime: Duration::from_millis(50),
            timeout: Duration::from_secs(60),
        }
    }

    #[test]
    fn an_idle_guest_takes_one_round() {
        let got = forecast(&basis(&[(100, 5), (300, 8), (1000, 10)]));
        assert!(got.converges);
        assert_eq!(got.rounds, 1);
        // 2^15 pages of 4116 bytes at 1 GB/s are 135 ms; the stop adds its 5.
        assert!((139_000..142_000).contains(&got.total_us), "{}", got.total_us);
        assert!((5_000..5_100).contains(&got.downtime_us), "{}", got.downtime_us);
    }

    #[test]
    fn a_working_set_that_fits_the_limit_converges() {
        // 8 MiB over and over: 8.4 ms at 1 GB/s, whatever the round.
        let got = forecast(&basis(&[(5, 2048), (300, 2048), (1000, 2048)]));
        assert!(got.converges);
        assert!((13_000..14_000).contains(&got.downtime_us), "{}", got.downtime_us);
    }

    #[test]
    fn a_working_set_over_the_limit_does_not() {
        let got = forecast(&basis(&[(10, 16384), (300, 16384), (1000, 16384)]));
        assert!(!got.converges, "{got:?}");
        assert!(got.downtime_us > 50_000);
    }

    #[test]
    fn faster_than_the_link_does_not_converge_and_ends() {
        let got = forecast(&basis(&[(100, 30_000), (300, 90_000), (1000, 300_000)]));
        assert!(!got.converges);
        assert_eq!(forecast(&Basis { samples: vec![], ..basis(&[]) }).rounds, 1);
    }

    #[test]
    fn dirtied_is_linear_between_samples() {
        let samples = basis(&[(100, 100), (300, 200)]).samples;
        for (span, pages) in [(0.05, 50.0), (0.1, 100.0), (0.2, 150.0), (0.5, 300.0)] {
            assert!((dirtied(&samples, span) - pages).abs() < 1e-6, "{span}");
        }
    }
}
