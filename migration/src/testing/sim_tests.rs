//! The simulation: every message broken at every place, either side crashed at every step.

use std::collections::BTreeMap;

use super::*;
use crate::inspect::inspect;
use crate::testing::Random;
use crate::testing::link::Kind;
use crate::wire::{HEAD_LEN, PREAMBLE_LEN, RecordHead, SUM_LEN, record, record_name};

pub(super) fn base(seed: u64) -> Scenario {
    Scenario {
        seed,
        habits: Habits { dirties: 1, sign_after: Some(0), ..Habits::default() },
        capacity: 1 << 16,
        on_timeout: OnTimeout::StopAndCopy,
        ..Scenario::default()
    }
}

#[derive(Default)]
pub(super) struct Tally(BTreeMap<&'static str, u32>);

impl Tally {
    /// Runs a scenario, which must breach nothing.
    pub(super) fn run(&mut self, scenario: &Scenario) -> Run {
        let run = run(scenario, false);
        assert!(run.breaches.is_empty(), "{:?}\n{scenario:?}\n{run:?}", run.breaches);
        let ending = match run.ending {
            Ending::Moved => "moved",
            Ending::Stayed => "stayed",
            Ending::Decided => "decided",
            Ending::Lost => "lost",
        };
        *self.0.entry(ending).or_default() += 1;
        *self.0.entry("runs").or_default() += 1;
        run
    }

    fn count(&self, what: &str) -> u32 {
        self.0.get(what).copied().unwrap_or(0)
    }
}

/// Where records begin in what a side sent, and their types.
pub(super) fn records(sent: &[u8]) -> Vec<(usize, RecordHead)> {
    let mut at = PREAMBLE_LEN;
    let mut found = Vec::new();
    while let Some((head, _)) = sent[at..].split_first_chunk::<HEAD_LEN>() {
        let head = RecordHead::decode(*head).expect("a record");
        found.push((at, head));
        at += HEAD_LEN + head.body_len() + SUM_LEN;
    }
    assert_eq!(at, sent.len(), "whole records");
    found
}

/// Every byte of the small records; of a record of pages the head, the table and some of the data.
fn places(sent: &[u8]) -> Vec<u64> {
    let mut places: Vec<usize> = (0..PREAMBLE_LEN).collect();
    for (at, head) in records(sent) {
        let len = HEAD_LEN + head.body_len() + SUM_LEN;
        match head.kind {
            record::PAGES | record::PAGES2 => {
                places.extend((at..at + 80).step_by(3));
                places.extend((at + 80..at + len - SUM_LEN).step_by(4099));
                places.extend(at + len - SUM_LEN..at + len);
            }
            _ => places.extend(at..at + len),
        }
    }
    places.into_iter().map(|at| at as u64).collect()
}

#[test]
fn a_clean_run_moves_the_guest() {
    for seed in 0..50 {
        let (older_destination, crc) = (seed % 2 == 0, seed % 4 > 1);
        let run = run(&Scenario { older_destination, crc, ..base(seed) }, true);
        assert_eq!((run.ending, run.breaches.len()), (Ending::Moved, 0), "seed {seed}: {run:?}");
        let report = run.report.expect("a report");
        assert!(report.rounds.len() >= 2 && report.downtime.is_some(), "{report:?}");
        assert_eq!(report.warnings, ["an MSR is spared"]);
        let kinds: Vec<_> = records(&run.sent[0]).iter().map(|(_, head)| head.kind).collect();
        let (pages, other) = match older_destination || crc {
            true => (record::PAGES, record::PAGES2),
            false => (record::PAGES2, record::PAGES),
        };
        for kind in [record::HELLO, record::RESERVE, pages, record::COMMIT, record::DONE] {
            assert!(kinds.contains(&kind), "no {}", record_name(kind));
        }
        assert!(!kinds.contains(&other), "pages went in {}", record_name(other));
    }
}

#[test]
fn rounds_follow_each_other() {
    let report = run(&base(3), false).report.expect("a report");
    assert!(report.rounds.len() > 2, "{} rounds", report.rounds.len());
    assert!(report.rounds.iter().any(|round| round.zero_pages > 0));
}

#[test]
fn every_byte_of_both_directions_broken_in_every_way() {
    let mut tally = Tally::default();
    for (seed, blind) in [(1, false), (2, true)] {
        let mut scenario = Scenario { older_destination: blind, ..base(seed) };
        scenario.habits.blind = blind;
        let clean = run(&scenario, true);
        for (sender, sent) in [(Side::Source, &clean.sent[0]), (Side::Destination, &clean.sent[1])]
        {
            for at in places(sent) {
                for kind in Kind::ALL {
                    scenario.fault = Some(Fault { sender, at, kind });
                    scenario.eager_locks = at % 2 == 0;
                    tally.run(&scenario);
                }
            }
        }
    }
    println!("{:?}", tally.0);
    assert!(tally.count("runs") > 8000 && tally.count("lost") == 0, "{:?}", tally.0);
    assert!(tally.count("moved") > 1000 && tally.count("stayed") > 1000, "{:?}", tally.0);
    assert_eq!(tally.count("decided"), 0, "both sides live: nobody has to ask the operator");
}

#[test]
fn a_wrong_byte_of_pages_leaves_the_guest_where_it_is() {
    for (crc, kind) in [(true, record::PAGES), (false, record::PAGES2)] {
        let mut scenario = Scenario { crc, ..base(12) };
        let sent = run(&scenario, true).sent[0].clone();
        let (at, head) = *records(&sent).iter().find(|(_, head)| head.kind == kind).expect("pages");
        let within = at as u64..(at + HEAD_LEN + head.body_len() + SUM_LEN) as u64;
        let places: Vec<_> = places(&sent).into_iter().filter(|at| within.contains(at)).collect();
        assert!(places.len() > 30, "{} places", places.len());
        for at in places {
            scenario.fault = Some(Fault { sender: Side::Source, at, kind: Kind::Corrupt });
            let run = Tally::default().run(&scenario);
            assert_eq!(run.ending, Ending::Stayed, "{} byte {at}", record_name(kind));
        }
    }
}

#[test]
fn an_inspection_knows_pages_of_either_kind() {
    for (crc, name) in [(true, "Pages"), (false, "Pages2")] {
        let sent = run(&Scenario { crc, ..base(12) }, true).sent[0].clone();
        let mut items = Vec::new();
        inspect(&mut sent.as_slice(), |item| items.push(item)).expect("a whole stream");
        let pages = items.iter().find(|item| item.text.contains("pages with data")).expect("one");
        assert_eq!((pages.name, pages.optional), (name, false));
        let end = items.iter().find(|item| item.name == "End").expect("an End");
        assert!(end.text.ends_with("which is right"), "{}", end.text);
    }
}

#[test]
fn either_side_crashed_at_every_step() {
    let mut tally = Tally::default();
    for (seed, blind) in [(5, false), (6, true)] {
        let mut scenario = base(seed);
        scenario.habits.blind = blind;
        let clean = run(&scenario, false);
        for (side, steps) in [(Side::Source, clean.steps[0]), (Side::Destination, clean.steps[1])] {
            for step in 1..=steps {
                scenario.crash = Some((side, step));
                tally.run(&scenario);
            }
        }
    }
    println!("{:?}", tally.0);
    assert!(tally.count("lost") > 50, "the owner crashed: {:?}", tally.0);
    assert!(tally.count("moved") > 2, "the source crashed after the commitment: {:?}", tally.0);
    assert!(tally.count("stayed") > 40, "the destination crashed before it: {:?}", tally.0);
}

#[test]
fn anything_at_once() {
    let mut tally = Tally::default();
    let mut random = Random::new(0x5eed);
    for seed in 1000..4000 {
        let sender =
            |random: &mut Random| [Side::Source, Side::Destination][(random.next() % 2) as usize];
        let fault = |random: &mut Random, within: u64| Fault {
            sender: sender(random),
            at: random.below(within),
            kind: Kind::ALL[(random.next() % 6) as usize],
        };
        let some = |random: &mut Random, of: u64| random.below(of) == 0;
        let scenario = Scenario {
            seed,
            habits: Habits {
                dirties: random.below(3),
                paused: some(&mut random, 8),
                activation_fails: some(&mut random, 8),
                blind: some(&mut random, 2),
                sign_after: some(&mut random, 2).then(|| random.below(30)),
                flush_ms: [random.below(4) * 10, random.below(4) * 10],
                ..Habits::default()
            },
            fault: some(&mut random, 2).then(|| {
                let within = [600, 100_000][(random.next() % 2) as usize];
                fault(&mut random, within)
            }),
            second_fault: some(&mut random, 2).then(|| fault(&mut random, 100)),
            crash: some(&mut random, 3).then(|| (sender(&mut random), 1 + random.below(200))),
            capacity: [13, 100, 5000, 1 << 20][(random.next() % 4) as usize],
            cancel_at: some(&mut random, 4).then(|| random.below(60)),
            turn_away_at: some(&mut random, 8).then(|| random.below(60)),
            eager_locks: some(&mut random, 2),
            on_timeout: [OnTimeout::Abort, OnTimeout::StopAndCopy, OnTimeout::Throttle]
                [(random.next() % 3) as usize],
            older_destination: some(&mut random, 2),
            slice: some(&mut random, 8).then(|| Duration::from_millis(20)),
            crc: some(&mut random, 2),
            timeout: some(&mut random, 4).then(|| Duration::from_millis(random.below(100))),
            rate: some(&mut random, 8).then_some(500_000),
            bandwidth: some(&mut random, 8).then_some(100_000),
        };
        tally.run(&scenario);
    }
    println!("{:?}", tally.0);
    assert!(tally.count("moved") > 200 && tally.count("stayed") > 200, "{:?}", tally.0);
}

#[test]
fn cancelling_at_every_question_leaves_the_guest_running() {
    let mut tally = Tally::default();
    for at in 1..200 {
        let run = tally.run(&Scenario { cancel_at: Some(at), ..base(9) });
        if run.ending == Ending::Stayed {
            assert!(run.error.as_ref().is_some_and(|e| e.contains("cancelled")), "{:?}", run.error);
        }
    }
    assert!(tally.count("stayed") > 20 && tally.count("moved") > 20, "{:?}", tally.0);
}

/// The destination's last question but one comes once `Commit` is read; the last finds the guest running, so that its
/// answer comes too late.
#[test]
fn the_destination_cancels_until_the_guest_runs() {
    let mut tally = Tally::default();
    let endings: Vec<_> = (1..200)
        .map(|at| {
            let run = tally.run(&Scenario { turn_away_at: Some(at), ..base(9) });
            let is_told = run.error.as_ref().is_some_and(|e| e.contains("cancelled"));
            assert_eq!(run.ending == Ending::Stayed, is_told, "{at}: {:?}", run.error);
            (run.ending, run.error.unwrap_or_default())
        })
        .collect();
    let moved = endings.iter().position(|(ending, _)| *ending == Ending::Moved).expect("a move");
    assert!(endings[moved..].iter().all(|(ending, _)| *ending == Ending::Moved), "{endings:?}");
    assert!(endings[moved - 1].1.contains("commitment failed: cancelled"), "{endings:?}");
}

/// The downtime that a run tells, and of it the first sign.
fn told(run: &Run) -> (u64, Option<u64>) {
    assert_eq!((run.ending, run.breaches.len()), (Ending::Moved, 0), "{run:?}");
    let downtime = run.report.as_ref().and_then(|report| report.downtime.as_ref());
    downtime.map(|downtime| (downtime.total_us, downtime.first_sign_us)).expect("a downtime")
}

#[test]
fn the_downtime_lasts_to_the_first_sign_where_one_comes_in_time() {
    let mut scenario = base(31);
    // By the usual slice the time of the wait is over at once.
    scenario.slice = Some(Duration::from_millis(1));
    let mut run = |sign_after, paused, older_destination| {
        scenario.habits = Habits { sign_after, paused, ..scenario.habits };
        scenario.older_destination = older_destination;
        told(&super::run(&scenario, false))
    };
    let (without, none) = run(None, false, false);
    assert_eq!(none, None);
    for (looks, within) in [(0, 0..=5_000), (4, 20_000..=40_000), (10, 50_000..=90_000)] {
        let (total, sign) = run(Some(looks), false, false);
        let sign = sign.expect("a sign");
        assert!(within.contains(&sign), "{looks}: {sign}");
        assert_eq!(total, without + sign);
    }
    assert_eq!(run(Some(25), false, false), (without, None), "too late");
    assert_eq!(run(Some(0), false, true), (without, None), "from a destination that doesn't tell");
    assert_eq!(run(Some(0), true, false).1, None, "a paused guest gives none");
}

#[test]
fn a_connection_that_breaks_before_the_first_sign_changes_nothing() {
    let mut scenario = base(32);
    let clean = run(&scenario, true);
    let (total, sign) = told(&clean);
    let records = records(&clean.sent[1]);
    let (at, head) = *records.last().expect("records");
    assert_eq!((head.kind, head.optional, sign.is_some()), (record::FIRST_SIGN, true, true));
    for at in at..clean.sent[1].len() {
        for kind in Kind::ALL {
            scenario.fault = Some(Fault { sender: Side::Destination, at: at as u64, kind });
            let (broken, heard) = told(&run(&scenario, false));
            let expected = if kind == Kind::Short { sign } else { None };
            assert_eq!(heard, expected, "{kind:?} at {at}");
            assert_eq!(broken - heard.unwrap_or(0), total - sign.unwrap_or(0));
        }
    }
}

#[test]
fn a_failed_activation_gives_the_guest_back() {
    let habits = Habits { activation_fails: true, ..base(4).habits };
    let run = Tally::default().run(&Scenario { habits, ..base(4) });
    assert_eq!(run.ending, Ending::Stayed);
    assert!(run.error.expect("an error").contains("the disk's lock is held"));
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let once = |seed| run(&base(seed), true).sent;
    assert_eq!(once(11), once(11));
    assert_ne!(once(11), once(12));
}
