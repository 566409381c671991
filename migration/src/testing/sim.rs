//! One migration from start to end, both sides, with whatever goes wrong on the way, and the rules held
//! against it.
//!
//! The rules: never two copies running; never none, unless the guest's owner at that moment crashed; a
//! copy runs with the memory and state of the one that stopped, and holds the disk's lock; no copy runs on
//! after another one ran.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::Duration;

use super::guest::{FakeLive, Habits};
use super::host::FakeHost;
use super::link::{End, Fault, Link};
use super::world::{Side, World};
use crate::channel::{Channel, Flow};
use crate::destination::{self, Opening, Verdict};
use crate::message::Reads;
use crate::plan::MigrationId;
use crate::policy::{Limits, OnTimeout};
use crate::report::{Progress, Report};
use crate::source::{Commitment, Deadlines, Decision, InDoubt, Options};
use crate::wire::Algorithm;

const ID: MigrationId = MigrationId([7; 16]);

/// What happens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scenario {
    /// Of the guest and everything random.
    pub seed: u64,
    /// The guest's.
    pub habits: Habits,
    /// On the migration's connection.
    pub fault: Option<Fault>,
    /// On the first connection by which a source in doubt asks.
    pub second_fault: Option<Fault>,
    /// A side, and at which of its steps.
    pub crash: Option<(Side, u64)>,
    /// Bytes that the connection holds each way.
    pub capacity: usize,
    /// The source's observer cancels when asked so often.
    pub cancel_at: Option<u64>,
    /// The destination's, so often.
    pub turn_away_at: Option<u64>,
    /// A source in doubt tries the locks at once, while the destination may still be at it.
    pub eager_locks: bool,
    /// What to do when the time is up.
    pub on_timeout: OnTimeout,
    /// The destination doesn't say what it reads, as one of an earlier release: pages go to it in `Pages`, and no first sign
    /// is awaited from it.
    pub older_destination: bool,
    /// To one that does, pages go in `Pages` too, else in `Pages2`.
    pub crc: bool,
    /// How long the link blocks at most, if not for its usual time.
    pub slice: Option<Duration>,
    /// Time for pre-copy, if not 150 ms.
    pub timeout: Option<Duration>,
    /// Bytes a second at most, if not a million.
    pub bandwidth: Option<u64>,
    /// Bytes a second that the link carries, if not all at once.
    pub rate: Option<u64>,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// At the destination.
    Moved,
    /// At the source.
    Stayed,
    /// The operator had to say.
    Decided,
    /// A crash took it.
    Lost,
}

/// What a run showed.
#[derive(Debug)]
pub struct Run {
    /// How it ended.
    pub ending: Ending,
    /// Breaches of the rules.
    pub breaches: Vec<String>,
    /// What each side sent, if recorded.
    pub sent: [Vec<u8>; 2],
    /// Steps that each side took.
    pub steps: [u64; 2],
    /// The source's report, of a migration that came to its end there.
    pub report: Option<Report>,
    /// The source's error.
    pub error: Option<String>,
}

/// What the destination's process holds when its part is over.
type DestinationEnd = Vec<Verdict>;

enum SourceEnd {
    Moved(Report),
    Stayed(Report, String),
    /// It stands and tries again.
    Stuck(Box<crate::source::Aborted<FakeLive>>),
    InDoubt(Box<InDoubt<FakeLive>>),
}

/// Runs a scenario.
#[must_use]
pub fn run(scenario: &Scenario, record: bool) -> Run {
    let world = World::new(scenario.crash);
    let link = Link::new(&world, scenario.fault, scenario.capacity.max(1), record);
    scenario.slice.iter().for_each(|slice| link.set_slice(*slice));
    link.set_rate(scenario.rate);
    let guest = FakeLive::new(&world, scenario.seed, scenario.habits);
    let guest = guest.with_clock(link.end(Side::Source));
    let clock = Some(link.end(Side::Destination));
    let host = FakeHost { world: world.clone(), habits: scenario.habits, clock };
    let (source, verdicts) = both(
        &link,
        |end| source_main(end, guest, scenario),
        |end| destination_main(end, host, scenario),
    );
    let sent = [link.sent(Side::Source), link.sent(Side::Destination)];
    let (mut report, mut error) = (None, None);
    let ending = match source {
        None => None,
        Some(source) => {
            let (ending, what, why) = conclude(source, verdicts, &world, scenario);
            (report, error) = (what, why);
            Some(ending)
        }
    };
    let mut state = world.state();
    let (at_source, at_destination) = state.running();
    if !at_source && !at_destination && !state.owner_crashed {
        state.breaches.push("none running, and the owner didn't crash".to_owned());
    }
    if at_source && state.activations > 0 {
        state.breaches.push("the source's copy goes on after the destination's ran".to_owned());
    }
    let ending = match (ending, at_source, at_destination) {
        (Some(Ending::Decided), ..) => Ending::Decided,
        (_, true, _) => Ending::Stayed,
        (_, _, true) => Ending::Moved,
        _ => Ending::Lost,
    };
    let steps = [state.steps(Side::Source), state.steps(Side::Destination)];
    Run { ending, breaches: std::mem::take(&mut state.breaches), sent, steps, report, error }
}

/// Runs both sides over a link; `None` of a side that crashed.
fn both<S: Send, T: Send>(
    link: &Link,
    source: impl FnOnce(&End) -> S,
    destination: impl FnOnce(&End) -> T + Send,
) -> (Option<S>, Option<T>) {
    let run_destination = |end: End| {
        let turn = end.begin();
        let result = catch_unwind(AssertUnwindSafe(|| destination(&turn)));
        drop(turn);
        result
    };
    let (source, destination) = thread::scope(|scope| {
        let end = link.end(Side::Destination);
        let destination = scope.spawn(move || run_destination(end));
        let turn = link.end(Side::Source).begin();
        let source = catch_unwind(AssertUnwindSafe(|| source(&turn)));
        drop(turn);
        (source, destination.join().expect("caught within"))
    });
    (uncrashed(source), uncrashed(destination))
}

/// A crash on purpose is `None`; any other panic goes on.
fn uncrashed<T>(result: thread::Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(payload) if payload.is::<super::world::Crash>() => None,
        Err(payload) => std::panic::resume_unwind(payload),
    }
}

fn channel(end: &End) -> Channel {
    let (transport, clock) = end.parts();
    Channel::new(transport, clock)
}

fn source_options(scenario: &Scenario) -> Options {
    Options {
        id: ID,
        software: "sim".to_owned(),
        limits: Limits {
            downtime: Duration::from_millis(10),
            timeout: scenario.timeout.unwrap_or(Duration::from_millis(150)),
            on_timeout: scenario.on_timeout,
        },
        bandwidth: scenario.bandwidth.or(Some(1_000_000)),
        pages_checksum: if scenario.crc { Algorithm::Crc32 } else { Algorithm::Xxh64 },
        deadlines: Deadlines {
            still: Duration::from_secs(5),
            reserve: Duration::from_secs(5),
            halted: Duration::from_secs(5),
            answer: Duration::from_secs(5),
            ..Deadlines::default()
        },
        dry_run: false,
    }
}

fn source_main(end: &End, guest: FakeLive, scenario: &Scenario) -> SourceEnd {
    let options = source_options(scenario);
    let mut asked = 0;
    let mut observer = |_: &Progress| {
        asked += 1;
        if scenario.cancel_at == Some(asked) { Flow::Cancel } else { Flow::Continue }
    };
    match crate::source::migrate(channel(end), options, guest, &mut observer) {
        Ok(commitment) => settle(commitment, scenario.eager_locks),
        Err(failed) => SourceEnd::Stayed(Report::default(), failed.1.line()),
    }
}

fn settle(commitment: Commitment<FakeLive>, try_locks: bool) -> SourceEnd {
    match commitment {
        Commitment::Moved(moved) => SourceEnd::Moved(moved.report),
        Commitment::Refused(aborted) => match aborted.resume() {
            Ok(stayed) => SourceEnd::Stayed(stayed.report, stayed.error.line()),
            Err(stuck) => SourceEnd::Stuck(Box::new(stuck.0)),
        },
        Commitment::InDoubt(doubt) if try_locks => settle(doubt.try_locks(), false),
        Commitment::InDoubt(doubt) => SourceEnd::InDoubt(doubt),
    }
}

fn destination_options(scenario: &Scenario) -> destination::Options {
    let mut options = destination::Options::new("sim");
    if scenario.older_destination {
        options.reads = Reads::default();
    }
    options.still = Duration::from_secs(8);
    options.commit = Duration::from_secs(8);
    options
}

fn destination_main(end: &End, mut host: FakeHost, scenario: &Scenario) -> DestinationEnd {
    let mut asked = 0;
    let mut observer = |_: &Progress| {
        asked += 1;
        if scenario.turn_away_at == Some(asked) { Flow::Cancel } else { Flow::Continue }
    };
    let observer = &mut observer;
    let opening = destination::accept(channel(end), destination_options(scenario), observer);
    let destination = match opening {
        Ok(Opening::Migrate(destination)) => destination,
        Ok(Opening::Question(_)) => unreachable!("no source asks first"),
        Err(_) => return Vec::new(),
    };
    let ended = destination
        .reserve(&mut host, observer)
        .and_then(|destination| destination.precopy(observer))
        .and_then(|destination| destination.stop_and_copy(observer))
        .and_then(|destination| destination.await_commit(observer))
        .and_then(|destination| destination.activate(observer));
    match ended {
        Ok((_, mut farewell)) => {
            if farewell.source_knows() {
                farewell.tell_first_sign();
            }
            vec![farewell.verdict]
        }
        Err(ended) => {
            let is_sure = ended.verdict.is_some() && !ended.in_doubt;
            // A cancel may be told and not heard.
            host.world.state().source_keeps |= is_sure && !ended.error.is_cancelled();
            ended.verdict.into_iter().collect()
        }
    }
}

/// What the source still has to do once the first connection is over for both.
fn conclude(
    source: SourceEnd,
    verdicts: Option<DestinationEnd>,
    world: &World,
    scenario: &Scenario,
) -> (Ending, Option<Report>, Option<String>) {
    let again = |source| conclude(source, verdicts.clone(), world, scenario);
    match source {
        SourceEnd::Moved(report) => (Ending::Moved, Some(report), None),
        SourceEnd::Stayed(report, error) => (Ending::Stayed, Some(report), Some(error)),
        SourceEnd::Stuck(aborted) => match crashing(|| aborted.resume()) {
            None => (Ending::Lost, None, None),
            Some(Ok(stayed)) => (Ending::Stayed, Some(stayed.report), Some(stayed.error.line())),
            Some(Err(stuck)) => {
                let breach = format!("stuck with the destination gone: {}", stuck.1);
                world.state().breaches.push(breach);
                (Ending::Lost, None, None)
            }
        },
        SourceEnd::InDoubt(doubt) => {
            let resolved = resolve(doubt, verdicts.as_ref(), world, scenario);
            match resolved {
                None => (Ending::Lost, None, None),
                Some(SourceEnd::InDoubt(doubt)) => {
                    // Nobody answers and the locks can't tell: the operator, who sees both hosts.
                    if !world.state().crashed(Side::Destination) {
                        let breach =
                            "the operator was needed though the destination lives".to_owned();
                        world.state().breaches.push(breach);
                    }
                    let ran = world.state().activations > 0;
                    let word = if ran { Decision::Discard } else { Decision::Resume };
                    crashing(|| settle(doubt.decide(word), false));
                    (Ending::Decided, None, None)
                }
                Some(source) => again(source),
            }
        }
    }
}

/// Asks over new connections, then tries the locks.
fn resolve(
    mut doubt: Box<InDoubt<FakeLive>>,
    verdicts: Option<&DestinationEnd>,
    world: &World,
    scenario: &Scenario,
) -> Option<SourceEnd> {
    if world.state().source_keeps {
        world
            .state()
            .breaches
            .push("in doubt, though the destination was sure that it would not be".to_owned());
    }
    for fault in [scenario.second_fault, None] {
        let Some(verdicts) = verdicts else { break };
        let link = Link::new(world, fault, scenario.capacity.max(1), false);
        let (source, _) = both(
            &link,
            |end| {
                let mut observer = |_: &Progress| Flow::Continue;
                settle(doubt.ask(channel(end), &mut observer), false)
            },
            |end| {
                let mut observer = |_: &Progress| Flow::Continue;
                match destination::accept(
                    channel(end),
                    destination_options(scenario),
                    &mut observer,
                ) {
                    Ok(Opening::Question(question)) => question.answer(verdicts),
                    _ => false,
                }
            },
        );
        match source? {
            SourceEnd::InDoubt(still) => doubt = still,
            settled => return Some(settled),
        }
        if world.state().crashed(Side::Destination) {
            break;
        }
    }
    crashing(|| settle(doubt.try_locks(), false))
}

fn crashing<T>(run: impl FnOnce() -> T) -> Option<T> {
    uncrashed(catch_unwind(AssertUnwindSafe(run)))
}

#[cfg(test)]
#[path = "sim_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "sim_time_tests.rs"]
mod time_tests;
