//! The policy, figure by figure.

use super::*;

const MS: Duration = Duration::from_millis(1);

/// A round over a link of 1 GB/s, with a fixed cost of 5 ms.
fn measured(elapsed_ms: u32, dirty_pages: u64, dirty_ms: u32) -> Measured {
    Measured {
        elapsed: MS * elapsed_ms,
        data_bytes: 100_000_000,
        data_time: MS * 100,
        dirty_pages,
        dirty_time: MS * dirty_ms,
        fixed: MS * 5,
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
    now.fixed = MS * 15;
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
fn refinement_ends() {
    let mut policy = policy(OnTimeout::Abort);
    let rounds = (0..100)
        .take_while(|_| policy.decide(&measured(100, 10_000, 1000)).decision == Decision::Continue);
    assert_eq!(rounds.count(), 20);
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

#[test]
fn the_vcpu_that_dirties_is_the_one_throttled() {
    let mut now = measured(1000, 20_000, 82);
    now.dirty_by_vcpu = vec![0, 18_000, 2_000, 0];
    let verdict = policy(OnTimeout::Throttle).decide(&now);
    assert_eq!(verdict.decision, Decision::Throttle(vec![0, 50, 6, 0]));
}

#[test]
fn a_fixed_cost_over_the_limit_is_said_at_once() {
    for (on_timeout, decision) in [
        (OnTimeout::Abort, Decision::Unreachable),
        (OnTimeout::Throttle, Decision::Unreachable),
        (OnTimeout::StopAndCopy, Decision::StopAndCopy),
    ] {
        let now = Measured { fixed: MS * 60, ..measured(10, 20, 100) };
        assert_eq!(policy(on_timeout).decide(&now).decision, decision);
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
