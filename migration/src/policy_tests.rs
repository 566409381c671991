//! The policy, figure by figure.

use super::*;

const MS: Duration = Duration::from_millis(1);

fn fixed(ms: u32) -> Fixed {
    Fixed { stop: MS * ms, ..Fixed::default() }
}

/// A round over a link of 1 GB/s, with a fixed cost of 5 ms.
fn measured(elapsed_ms: u32, dirty_pages: u64, dirty_ms: u32) -> Measured {
    Measured {
        elapsed: MS * elapsed_ms,
        data_bytes: 100_000_000,
        data_time: MS * 100,
        dirty_pages,
        dirty_time: MS * dirty_ms,
        fixed: fixed(5),
        ..Measured::default()
    }
}

fn policy(on_timeout: OnTimeout) -> Policy {
    Policy::new(Limits { downtime: MS * 50, timeout: MS * 1000, on_timeout })
}

#[test]
fn an_idle_guest_is_stopped_at_once() {
    let verdict = policy(OnTimeout::Abort).decide(&measured(100, 20, 100));
    assert_eq!(verdict.decision, Decision::StopAndCopy);
    assert_eq!(verdict.send_bytes_per_s, 1_000_000_000);
    assert_eq!(verdict.dirty_pages_per_s, 200);
    assert!((MS * 5..MS * 6).contains(&verdict.downtime), "{:?}", verdict.downtime);
}

#[test]
fn the_fixed_cost_counts() {
    // 10,000 pages are 41 ms: with 5 ms of fixed cost within the limit, with 15 ms not.
    let mut now = measured(100, 10_000, 10);
    assert_eq!(policy(OnTimeout::Abort).decide(&now).decision, Decision::StopAndCopy);
    now.fixed = fixed(15);
    assert_eq!(policy(OnTimeout::Abort).decide(&now).decision, Decision::Continue);
}

#[test]
fn one_more_round_where_it_pays() {
    // 41 ms to send, and the guest dirties a quarter of that meanwhile.
    let now = measured(100, 10_000, 164);
    assert_eq!(policy(OnTimeout::Abort).decide(&now).decision, Decision::Continue);
    // The same set dirtied in a tenth of the time: the next round would be as large.
    let now = measured(100, 10_000, 16);
    assert_eq!(policy(OnTimeout::Abort).decide(&now).decision, Decision::StopAndCopy);
}

#[test]
fn refinement_goes_on_while_each_round_is_much_smaller() {
    let decisions = |rounds: &[u64]| -> Vec<Decision> {
        let mut policy = policy(OnTimeout::Abort);
        let decide = |pages: &u64| policy.decide(&measured(100, *pages, 1000)).decision;
        rounds.iter().map(decide).collect()
    };
    let [go_on, stop] = [|| Decision::Continue, || Decision::StopAndCopy];
    assert_eq!(decisions(&[10_000, 6_000, 5_000]), [go_on(), go_on(), stop()]);
    // The same pages over and over.
    assert_eq!(decisions(&[10_000, 10_000]), [go_on(), stop()]);
}

#[test]
fn the_timeout_decides_as_told() {
    for (on_timeout, decision) in [
        (OnTimeout::Abort, Decision::TimedOut),
        (OnTimeout::StopAndCopy, Decision::StopAndCopy),
        (OnTimeout::Throttle, Decision::Throttle(vec![50])),
    ] {
        let mut policy = policy(on_timeout);
        // 20,000 pages are 82 ms to send and were dirtied in 82: exactly as fast as the link.
        assert_eq!(policy.decide(&measured(999, 20_000, 82)).decision, Decision::Continue);
        assert_eq!(policy.decide(&measured(1000, 20_000, 82)).decision, decision);
    }
}

#[test]
fn throttling_grows_until_twice_the_timeout() {
    let mut policy = policy(OnTimeout::Throttle);
    let steps: Vec<_> = (0..8).map(|_| policy.decide(&measured(1500, 20_000, 82))).collect();
    let percents = [50, 75, 88, 94, 97, 98, 99, 99].map(|p| Decision::Throttle(vec![p]));
    assert_eq!(steps.into_iter().map(|v| v.decision).collect::<Vec<_>>(), percents);
    assert_eq!(policy.decide(&measured(2000, 20_000, 82)).decision, Decision::TimedOut);
}

/// What a fresh policy throttles by when all that is dirtied has to be halved, and then at each next step, if
/// the vCPUs would go on as they do and the throttle does what it says.
fn throttles(speeds: &[u64], steps: usize) -> Vec<Vec<u8>> {
    let mut policy = policy(OnTimeout::Throttle);
    let mut last = vec![0; speeds.len()];
    let step = |_| {
        let mut now = measured(1000, 20_000, 82);
        let pages = |(speed, percent): (&u64, &u8)| speed * u64::from(100 - percent) / 100;
        now.dirty_by_vcpu = speeds.iter().zip(&last).map(pages).collect();
        let Decision::Throttle(percents) = policy.decide(&now).decision else {
            panic!("no throttle")
        };
        last.clone_from(&percents);
        percents
    };
    (0..steps).map(step).collect()
}

#[test]
fn the_vcpus_that_dirty_are_those_throttled() {
    // The fastest, and only as far as is needed: 8,000 of its 18,000 are left, so half of the whole.
    assert_eq!(throttles(&[0, 18_000, 2_000, 0], 1), [[0, 56, 0, 0]]);
    assert_eq!(throttles(&[0, 9_000, 9_000, 2_000], 1), [[0, 56, 56, 0]]);
    // All that dirty, where that isn't enough; and the one that is throttled is still known as the fastest.
    let steps = throttles(&[0, 18_000, 2_000, 0], 6);
    assert_eq!(steps[1..4], [[0, 83, 0, 0], [0, 93, 38, 0], [0, 97, 69, 0]]);
    assert_eq!(steps[5], [0, 99, 92, 0]);
    // Unknown, or nothing to go by: all alike.
    assert_eq!(throttles(&[], 2), [[50], [75]]);
    assert_eq!(throttles(&[0, 0], 2), [[50], [75]]);
    assert_eq!(throttles(&[7, 7, 7], 2), [[50; 3], [75; 3]]);
}

#[test]
fn a_fixed_cost_over_the_limit_is_said_at_once_or_waited_for_until_the_timeout() {
    for (on_timeout, before, after) in [
        (OnTimeout::Abort, Decision::Unreachable, Decision::Unreachable),
        (OnTimeout::Throttle, Decision::Unreachable, Decision::Unreachable),
        (OnTimeout::StopAndCopy, Decision::Rest, Decision::StopAndCopy),
    ] {
        // However short the stop.
        let round_trip = Fixed { round_trip: MS * 60, ..fixed(5) };
        let mut policy = policy(on_timeout);
        for (elapsed_ms, decision) in [(10, &before), (999, &before), (1000, &after)] {
            let now = Measured { fixed: round_trip, stops: 1, ..measured(elapsed_ms, 20, 100) };
            assert_eq!(policy.decide(&now).decision, *decision, "{on_timeout:?} {elapsed_ms}");
        }
        // A stop may have been held up once: it is tried again while there is time.
        for (elapsed_ms, stops, decision) in [
            (10, 1, &Decision::TryStop),
            (20, 2, &Decision::TryStop),
            (30, 3, &before),
            (1000, 1, &after),
        ] {
            let now = Measured { fixed: fixed(60), stops, ..measured(elapsed_ms, 20, 100) };
            assert_eq!(policy.decide(&now).decision, *decision, "{on_timeout:?} {stops}");
        }
        // It was a busy moment.
        let now = Measured { fixed: fixed(40), ..measured(999, 20, 100) };
        assert_eq!(policy.decide(&now).decision, Decision::StopAndCopy);
    }
}

#[test]
fn a_cap_bounds_the_rate() {
    let now = Measured { bandwidth: Some(10_000_000), ..measured(10, 2_000, 10) };
    let verdict = policy(OnTimeout::Abort).decide(&now);
    assert_eq!(verdict.send_bytes_per_s, 10_000_000);
    assert_eq!(verdict.decision, Decision::Continue, "2000 pages take 820 ms at 10 MB/s");
}

#[test]
fn nothing_measured_does_no_harm() {
    let verdict = policy(OnTimeout::Abort).decide(&Measured::default());
    assert_eq!(verdict.decision, Decision::StopAndCopy);
    let endless = Measured { dirty_pages: u64::MAX, ..Measured::default() };
    assert_eq!(policy(OnTimeout::Abort).decide(&endless).decision, Decision::Continue);
}

#[test]
fn the_fixed_cost_has_all_its_parts() {
    let ms = |ms| MS * ms;
    let parts =
        Fixed { stop: ms(1), state_bytes: 40_000, restore: ms(3), round_trip: ms(2), flush: ms(4) };
    // 40 kB at 1 Mbit/s; the flush ends before the destination is ready.
    assert_eq!(parts.time(125_000), ms(1 + 320 + 3 + 2 + 1));
    assert_eq!(Fixed { flush: ms(50), ..parts }.time(40_000_000), ms(1 + 1 + 50 + 1));
    let most = Fixed { restore: Duration::MAX, state_bytes: u64::MAX, ..parts };
    assert_eq!(most.time(0), Duration::MAX);
}

#[test]
fn a_slow_flush_is_waited_for_a_while_and_a_state_too_large_is_not() {
    let decide =
        |fixed| policy(OnTimeout::Abort).decide(&Measured { fixed, ..measured(10, 20, 100) });
    let verdict = decide(Fixed { flush: MS * 60, ..fixed(5) });
    assert!(verdict.downtime > MS * 65, "{verdict:?}");
    assert_eq!((verdict.decision, verdict.fixed), (Decision::Continue, MS * 5));
    let fixed_60 = Fixed { flush: MS * 60, ..fixed(5) };
    let now = Measured { fixed: fixed_60, flushes: 10, stops: 3, ..measured(10, 20, 100) };
    let verdict = policy(OnTimeout::Abort).decide(&now);
    assert_eq!((verdict.decision, verdict.fixed), (Decision::Unreachable, MS * 65));
    // 100 MB at 1 GB/s.
    let verdict = decide(Fixed { state_bytes: 100_000_000, ..fixed(5) });
    assert_eq!((verdict.decision, verdict.fixed), (Decision::Unreachable, MS * 105));
}
