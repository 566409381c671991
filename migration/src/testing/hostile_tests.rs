//! Hostile peers: streams with right checksums and wrong content, fed to either end. Nothing may panic,
//! allocate beyond its limits, or bring a second copy to life.

use std::io::{self, Read, Write};
use std::time::Duration;

use proptest::prelude::*;

use super::guest::{FakeLive, Habits};
use super::host::FakeHost;
use super::sim::{Scenario, run};
use super::world::World;
use crate::channel::{Channel, Clock, Flow};
use crate::destination::{self, Opening};
use crate::error::MigrateError;
use crate::message::Message;
use crate::plan::MigrationId;
use crate::policy::{Limits, OnTimeout};
use crate::report::{Observer, Progress};
use crate::source::{Commitment, Deadlines, Options};
use crate::wire::{self, Algorithm, HEAD_LEN, PREAMBLE_LEN, RecordHead};

/// Says its lines whatever it hears, then hangs up.
struct Script(io::Cursor<Vec<u8>>);

impl Read for Script {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl Write for Script {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Frozen;

impl Clock for Frozen {
    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn sleep(&self, _time: Duration) {}
}

/// Bodies of the records that a clean run sends.
pub(super) fn lines(side: usize) -> Vec<(u32, Vec<u8>)> {
    let scenario = Scenario { seed: 1, capacity: 1 << 16, ..Scenario::default() };
    let sent = run(&scenario, true).sent[side].clone();
    let mut rest = &sent[PREAMBLE_LEN..];
    let mut lines = Vec::new();
    while let Some((head, tail)) = rest.split_first_chunk::<HEAD_LEN>() {
        let head = RecordHead::decode(*head).unwrap();
        lines.push((head.kind, tail[..head.body_len()].to_vec()));
        rest = &tail[head.body_len() + 4..];
    }
    lines
}

/// What a peer does to one of its lines.
#[derive(Clone, Debug)]
enum Lie {
    Flip(usize, usize, u8),
    Cut(usize, usize),
    Grow(usize, Vec<u8>),
    Retype(usize, u32),
    Drop(usize),
    Double(usize),
    Swap(usize, usize),
}

fn lie() -> impl Strategy<Value = Lie> {
    let at = || any::<prop::sample::Index>().prop_map(|index| index.index(1 << 16));
    prop_oneof![
        6 => (at(), at(), 0..8_u8).prop_map(|(line, byte, bit)| Lie::Flip(line, byte, bit)),
        1 => (at(), at()).prop_map(|(line, len)| Lie::Cut(line, len)),
        1 => (at(), prop::collection::vec(any::<u8>(), 1..40)).prop_map(|(line, v)| Lie::Grow(line, v)),
        1 => (at(), 0..30_u32).prop_map(|(line, kind)| Lie::Retype(line, kind)),
        1 => at().prop_map(Lie::Drop),
        1 => at().prop_map(Lie::Double),
        1 => (at(), at()).prop_map(|(a, b)| Lie::Swap(a, b)),
    ]
}

/// The lines with a lie in them, framed with right checksums.
fn told(mut lines: Vec<(u32, Vec<u8>)>, lie: &Lie) -> Vec<u8> {
    let count = lines.len();
    match lie.clone() {
        Lie::Flip(line, byte, bit) => {
            let body = &mut lines[line % count].1;
            if let Some(len) = std::num::NonZero::new(body.len()) {
                body[byte % len] ^= 1 << bit;
            }
        }
        Lie::Cut(line, len) => {
            let body = &mut lines[line % count].1;
            body.truncate(len % (body.len() + 1));
        }
        Lie::Grow(line, more) => lines[line % count].1.extend(more),
        Lie::Retype(line, kind) => {
            let line = &mut lines[line % count];
            if line.1.len() <= wire::len_max(kind) as usize {
                line.0 = kind;
            }
        }
        Lie::Drop(line) => drop(lines.remove(line % count)),
        Lie::Double(line) => lines.insert(line % count, lines[line % count].clone()),
        Lie::Swap(a, b) => lines.swap(a % count, b % count),
    }
    let mut out = wire::preamble(wire::StreamKind::Live).to_vec();
    for (kind, body) in lines {
        wire::put_record(&mut out, kind, &body);
    }
    out
}

/// A destination that hears this; whether it activated the guest.
pub(super) fn destination_hears(stream: Vec<u8>) -> bool {
    let mut observer = |_: &Progress| Flow::Continue;
    let channel = Channel::new(Script(io::Cursor::new(stream)), Frozen);
    destination_over(channel, &mut observer).is_ok()
}

/// ... over this channel. It may hear no more, once it has.
pub(super) fn destination_over(
    channel: Channel,
    observer: &mut dyn Observer,
) -> Result<(), Option<MigrateError>> {
    let world = World::new(None);
    world.state().at_stop = None;
    let mut host = FakeHost { world: world.clone(), habits: Habits::default(), clock: None };
    match destination::accept(channel, destination::Options::new("test"), observer) {
        Ok(Opening::Migrate(destination)) => destination
            .reserve(&mut host, observer)
            .and_then(|destination| destination.precopy(observer))
            .and_then(|destination| destination.stop_and_copy(observer))
            .and_then(|destination| destination.await_commit(observer))
            .and_then(|destination| destination.activate(observer))
            .map(|(_, mut farewell)| _ = farewell.source_knows())
            .map_err(|ended| Some(ended.error)),
        Ok(Opening::Question(question)) => {
            if question.answer(&[]) {
                Ok(())
            } else {
                Err(None)
            }
        }
        Err(ended) => Err(Some(ended.error)),
    }
}

/// A source that hears this; what became of its guest.
pub(super) fn source_hears(stream: Vec<u8>) -> &'static str {
    source_hears_at(stream, Frozen, OnTimeout::Abort)
}

/// ... by this clock, whatever the downtime.
pub(super) fn source_hears_at(
    stream: Vec<u8>,
    clock: impl Clock + 'static,
    on_timeout: OnTimeout,
) -> &'static str {
    source_over(Channel::new(Script(io::Cursor::new(stream)), clock), on_timeout)
}

/// ... over this channel.
pub(super) fn source_over(channel: Channel, on_timeout: OnTimeout) -> &'static str {
    let world = World::new(None);
    let guest = FakeLive::new(&world, 1, Habits::default());
    let options = Options {
        id: MigrationId([7; 16]),
        software: "test".into(),
        limits: Limits { on_timeout, ..Limits::default() },
        bandwidth: None,
        pages_checksum: Algorithm::Xxh64,
        deadlines: Deadlines::default(),
        dry_run: false,
    };
    let mut observer = |_: &Progress| Flow::Continue;
    match crate::source::migrate(channel, options, guest, &mut observer) {
        Ok(Commitment::Moved(_)) => "moved",
        Ok(Commitment::InDoubt(_)) => "in doubt",
        Ok(Commitment::Refused(aborted)) => {
            assert!(aborted.resume().is_ok() && world.state().running().0);
            "stays"
        }
        Err(_) => {
            assert!(world.state().running().0);
            "stays"
        }
    }
}

#[test]
fn the_truth_is_taken() {
    let clean = |side| {
        let mut out = wire::preamble(wire::StreamKind::Live).to_vec();
        for (kind, body) in lines(side) {
            wire::put_record(&mut out, kind, &body);
        }
        out
    };
    assert!(destination_hears(clean(0)), "the script is a migration");
    assert_eq!(source_hears(clean(1)), "moved");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn a_destination_survives_a_lying_source(lie in lie()) {
        let lines = lines(0);
        let changed = told(lines.clone(), &lie) != told(lines.clone(), &Lie::Swap(0, 0));
        // The digest covers every record up to `End`. What comes after `Commit` is too late to matter.
        let last = lines.len() - 1;
        let about_done = matches!(&lie,
            Lie::Flip(at, ..) | Lie::Cut(at, _) | Lie::Grow(at, _) | Lie::Retype(at, _)
            | Lie::Drop(at) | Lie::Double(at) if at % lines.len() >= last - 1);
        let activated = destination_hears(told(lines, &lie));
        prop_assert!(!activated || !changed || about_done || pauses(&lie), "activated after {lie:?}");
    }

    #[test]
    fn a_source_survives_a_lying_destination(lie in lie()) {
        source_hears(told(lines(1), &lie));
    }

    #[test]
    fn any_body_of_any_type_is_read_or_refused(kind in 0..40_u32, body: Vec<u8>) {
        let _ = Message::parse(kind, &body);
    }

    #[test]
    fn any_bytes_after_a_preamble_are_refused(bytes: Vec<u8>) {
        let mut stream = wire::preamble(wire::StreamKind::Live).to_vec();
        stream.extend(&bytes);
        prop_assert!(!destination_hears(stream.clone()));
        prop_assert_eq!(source_hears(stream.clone()), "stays");
        stream[10] = 2;
        let _ = crate::inspect::inspect(&mut stream.as_slice(), |_| {});
    }
}

/// `End` isn't under its own digest: a lie in it that still counts right can only change `paused`.
fn pauses(lie: &Lie) -> bool {
    let lines = lines(0);
    let end = lines.iter().position(|(kind, _)| *kind == wire::record::END).expect("an End");
    matches!(lie, Lie::Flip(line, byte, 0) if line % lines.len() == end
        && byte % lines[end].1.len() == 0)
}
