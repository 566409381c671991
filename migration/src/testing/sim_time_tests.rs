//! The simulation's clock: what is over in time, and what is predicted beside what comes.

use super::tests::{Tally, base, records};
use super::*;
use crate::report::Forecast;
use crate::testing::link::Kind;
use crate::wire::record;

/// The time that is up within a round: 20 ms, where at this bandwidth the first record takes 160.
fn slow(on_timeout: OnTimeout) -> Scenario {
    Scenario {
        on_timeout,
        timeout: Some(Duration::from_millis(20)),
        bandwidth: Some(100_000),
        slice: Some(Duration::from_millis(1)),
        ..base(41)
    }
}

#[test]
fn the_time_is_up_within_a_round() {
    let run = Tally::default().run(&slow(OnTimeout::Abort));
    let (report, error) = (run.report.expect("a report"), run.error.expect("an error"));
    assert_eq!(run.ending, Ending::Stayed);
    assert!(error.contains("no convergence") && error.contains("first round"), "{error}");
    assert!(report.rounds.is_empty() && report.total_us < 60_000, "{report:?}");
}

#[test]
fn a_round_is_cut_short_for_a_stop_or_a_throttle() {
    let clean = |on_timeout, timeout| {
        let timeout = Some(Duration::from_millis(timeout));
        let run = Tally::default().run(&Scenario { timeout, ..slow(on_timeout) });
        (run.ending, run.report.expect("a report"))
    };
    let (ending, whole) = clean(OnTimeout::StopAndCopy, 60_000);
    assert_eq!(ending, Ending::Moved);
    let (ending, cut) = clean(OnTimeout::StopAndCopy, 20);
    assert_eq!((ending, cut.rounds.len()), (Ending::Moved, 2), "{cut:?}");
    assert!((1..whole.rounds[0].pages).contains(&cut.rounds[0].pages), "{cut:?}");
    assert!(cut.rounds[0].pages + cut.rounds[1].pages >= whole.rounds[0].pages, "{cut:?}");
    let (_, throttled) = clean(OnTimeout::Throttle, 300);
    assert!((1..whole.rounds[0].pages).contains(&throttled.rounds[0].pages), "{throttled:?}");
}

#[test]
fn a_destination_that_takes_a_byte_now_and_then_does_not_hold_the_source() {
    for on_timeout in [OnTimeout::Abort, OnTimeout::StopAndCopy, OnTimeout::Throttle] {
        let mut scenario = slow(on_timeout);
        let sent = run(&scenario, true).sent[0].clone();
        let kinds = [record::PAGES, record::PAGES2];
        let at =
            records(&sent).iter().find(|(_, head)| kinds.contains(&head.kind)).expect("pages").0;
        let fault = Fault { sender: Side::Source, at: at as u64 + 100, kind: Kind::Trickle };
        scenario.fault = Some(fault);
        let run = Tally::default().run(&scenario);
        let total_us = run.report.expect("a report").total_us;
        assert!(
            run.ending == Ending::Stayed && total_us < 10_000_000,
            "{on_timeout:?}: {total_us}"
        );
        let error = run.error.expect("an error");
        assert!(error.contains("no convergence"), "{error}");
    }
}

/// Its example alone would take longer by the cap than a ping may take.
#[test]
fn a_guest_with_much_state_moves_under_a_low_cap() {
    let habits = Habits { state_bytes: 900_000, ..base(22).habits };
    let scenario = Scenario { habits, bandwidth: Some(125_000), ..base(22) };
    let run = Tally::default().run(&scenario);
    assert_eq!(run.ending, Ending::Moved, "{:?}", run.error);
}

#[test]
fn a_dry_run_forecasts_and_moves_nothing() {
    let slice = Some(Duration::from_millis(1));
    let (forecast, report) = dry_run(&Scenario { slice, ..base(21) });
    // 1 MB/s, 32 pages of RAM, some of them touched: tens of milliseconds.
    assert!((900_000..=1_000_000).contains(&forecast.send_bytes_per_s), "{forecast:?}");
    assert!(forecast.total_us > 20_000 && forecast.bytes > 5 * 4096, "{forecast:?}");
    assert!(forecast.dirty_pages_per_s > 0, "{forecast:?}");
    assert_eq!((report.forecast, report.rounds), (Some(forecast), vec![]));
}

#[test]
fn a_dry_run_over_a_slow_link_ends_with_its_last_sample() {
    let slice = Some(Duration::from_millis(1));
    let (forecast, report) = dry_run(&Scenario { bandwidth: Some(125_000), slice, ..base(21) });
    assert!((100_000..=125_000).contains(&forecast.send_bytes_per_s), "{forecast:?}");
    assert!(report.total_us < 1_500_000, "{report:?}");
}

/// Without a cap, by as much padding as it takes to tell.
#[test]
fn a_dry_run_measures_the_link() {
    for rate in [1_000_000, 20_000_000, 400_000_000] {
        let (rate, bandwidth) = (Some(rate), Some(u64::MAX));
        let slice = Some(Duration::from_millis(1));
        let (forecast, _) = dry_run(&Scenario { rate, bandwidth, slice, ..base(21) });
        let off = forecast.send_bytes_per_s.abs_diff(rate.unwrap_or(0));
        assert!(off < rate.unwrap_or(0) / 10, "{rate:?}: {forecast:?}");
    }
}

/// A destination whose memory takes pages more slowly than the link carries them, as on loopback.
#[test]
fn a_dry_run_measures_how_fast_pages_are_taken() {
    let slice = Some(Duration::from_millis(1));
    let habits = Habits { page_us: 4096, ..Habits::default() };
    let (rate, bandwidth) = (Some(400_000_000), Some(u64::MAX));
    let (forecast, _) = dry_run(&Scenario { habits, rate, bandwidth, slice, ..base(21) });
    // There is some blocking in it.
    assert!((800_000..=1_000_000).contains(&forecast.send_bytes_per_s), "{forecast:?}");
}

fn dry_run(scenario: &Scenario) -> (Forecast, Report) {
    let world = World::new(None);
    let link = Link::new(&world, None, 1 << 16, false);
    scenario.slice.iter().for_each(|slice| link.set_slice(*slice));
    link.set_rate(scenario.rate);
    let guest = FakeLive::new(&world, scenario.seed, scenario.habits);
    let clock = Some(link.end(Side::Destination));
    let mut host = FakeHost { world: world.clone(), habits: scenario.habits, clock };
    let (source, destination) = both(
        &link,
        |end| {
            let mut observer = |_: &Progress| Flow::Continue;
            let options = Options { dry_run: true, ..source_options(scenario) };
            let source = crate::source::Source::connect(channel(end), options, &mut observer)
                .unwrap()
                .reserve(guest, &mut observer)
                .unwrap_or_else(|aborted| panic!("{}", aborted.error.line()));
            let (_guest, forecast, report) = source
                .forecast(&mut observer)
                .unwrap_or_else(|aborted| panic!("{}", aborted.error.line()));
            (forecast, report)
        },
        |end| {
            let mut observer = |_: &Progress| Flow::Continue;
            let opening =
                destination::accept(channel(end), destination_options(scenario), &mut observer);
            let Ok(Opening::Migrate(destination)) = opening else { panic!("no migration") };
            let prepared = destination.reserve(&mut host, &mut observer).unwrap();
            prepared.precopy(&mut observer).expect_err("nothing comes")
        },
    );
    let (forecast, report) = source.expect("no crash");
    assert!(destination.expect("no crash").dry_run);
    assert_eq!(world.state().running(), (true, false));
    (forecast, report)
}

/// A guest that has nothing to send but its state, over a link of 1 Mbit/s.
fn stately(habits: Habits) -> Scenario {
    Scenario {
        habits: Habits { dirties: 0, sign_after: None, ..habits },
        rate: Some(125_000),
        bandwidth: Some(u64::MAX),
        slice: Some(Duration::from_millis(1)),
        timeout: Some(Duration::from_secs(60)),
        ..base(51)
    }
}

/// The downtimes predicted last and told, in microseconds.
fn downtimes(scenario: &Scenario) -> (u64, u64) {
    let run = Tally::default().run(scenario);
    let report = run.report.expect("a report");
    let expected = report.rounds.iter().rev().nth(1).expect("a round").expected_downtime_us;
    (expected, report.downtime.expect("a downtime").total_us)
}

#[test]
fn the_predicted_downtime_has_the_state_in_it() {
    let (expected, told) = downtimes(&stately(Habits { state_bytes: 40_000, ..Habits::default() }));
    assert!((320_000..350_000).contains(&told), "{told}");
    // The rate is measured of pages, some of them zero.
    assert!(expected.abs_diff(told) < told / 10, "{expected} predicted, {told} told");
}

/// A limit that no stop can meet: it is tried until the time is up, ten times a second.
#[test]
fn a_stop_over_the_limit_in_any_case_waits_for_the_timeout() {
    let habits = Habits { state_bytes: 40_000, ..Habits::default() };
    let timeout = Some(Duration::from_secs(2));
    let run = Tally::default().run(&Scenario { timeout, ..stately(habits) });
    let report = run.report.expect("a report");
    assert_eq!(run.ending, Ending::Moved);
    assert!((2_000_000..3_000_000).contains(&report.total_us), "{report:?}");
    assert!((10..=25).contains(&report.rounds.len()), "{} rounds", report.rounds.len());
}

#[test]
fn the_predicted_downtime_has_a_slow_flush_in_it() {
    let (expected, told) = downtimes(&stately(Habits { flush_ms: [80, 80], ..Habits::default() }));
    assert!((80_000..100_000).contains(&told), "{told}");
    assert!(expected.abs_diff(told) < told / 20, "{expected} predicted, {told} told");
}

/// `Ready` is there long before.
#[test]
fn a_flush_in_the_stop_is_not_the_destinations_fault() {
    let run =
        |ms| Tally::default().run(&stately(Habits { flush_ms: [0, ms], ..Habits::default() }));
    let slow = run(4000);
    assert_eq!(slow.ending, Ending::Moved, "{slow:?}");
    let slower = run(7000);
    let error = slower.error.expect("an error");
    assert_eq!(slower.ending, Ending::Stayed);
    assert!(error.contains("releasing the disks") && !error.contains("destination"), "{error}");
}

/// It is waited for while the guest runs: at reservation it would seem a cost of each stop, over the limit, and at the stop it
/// would be one.
#[test]
fn io_under_way_is_no_part_of_a_stop() {
    let habits = Habits { io_ms: 2000, ..Habits::default() };
    let run = Tally::default().run(&Scenario { on_timeout: OnTimeout::Abort, ..stately(habits) });
    assert_eq!(run.ending, Ending::Moved, "{run:?}");
    let report = run.report.expect("a report");
    let downtime = report.downtime.as_ref().expect("a downtime");
    assert!(report.example_stop_us < 1000 && downtime.stop_us < 1000, "{downtime:?}");
    assert!(downtime.total_us < 100_000 && report.total_us > 4_000_000, "{report:?}");
    // What the guest dirtied meanwhile has gone over before, as often as it seemed worth it.
    assert!((7..12).contains(&report.rounds.len()), "{} rounds", report.rounds.len());
}

/// A destination gives up when it has heard nothing for 30 s.
#[test]
fn a_destination_waits_while_the_disks_are_flushed_for_long() {
    let habits = Habits { flush_ms: [45_000, 0], ..Habits::default() };
    let run = Tally::default().run(&stately(habits));
    assert_eq!(run.ending, Ending::Moved, "{run:?}");
    let report = run.report.expect("a report");
    assert!(report.total_us > 45_000_000, "{report:?}");
}

#[test]
fn io_that_does_not_end_ends_the_migration_while_the_guest_runs() {
    let hung = stately(Habits { io_ms: 60_000, ..Habits::default() });
    let run = Tally::default().run(&hung);
    let error = run.error.expect("an error");
    assert_eq!(run.ending, Ending::Stayed);
    assert!(error.contains("finish their I/O failed: it goes on after 500"), "{error}");
    // Before any stop: it was never still.
    let report = run.report.expect("a report");
    assert_eq!((report.downtime, report.example_stop_us), (None, 0));
    let run = Tally::default().run(&Scenario { cancel_at: Some(20), ..hung });
    let (error, report) = (run.error.expect("an error"), run.report.expect("a report"));
    assert!(error.contains("cancelled") && report.total_us < 1_000_000, "{error}: {report:?}");
}

#[test]
fn a_stop_that_took_long_once_is_tried_again_before_it_is_hopeless() {
    let habits = Habits { first_stop_ms: 3000, ..Habits::default() };
    let run = Tally::default().run(&Scenario { on_timeout: OnTimeout::Abort, ..stately(habits) });
    assert_eq!(run.ending, Ending::Moved, "{run:?}");
    let report = run.report.expect("a report");
    assert_eq!(report.example_stop_us, 100);
    assert!(report.downtime.expect("a downtime").total_us < 100_000);
}
