//! Hostile numbers: every number of every message at its extremes, by clocks that stand and that run. Nothing may
//! overflow, at either end.

use std::cell::Cell;
use std::time::Duration;

use super::hostile_tests::{destination_hears, lines, source_hears_at};
use crate::channel::Clock;
use crate::message::Message;
use crate::policy::OnTimeout;
use crate::wire::{self, record};

/// Ticks with every look.
#[derive(Default)]
struct Ticking(Cell<u64>);

impl Clock for Ticking {
    fn now(&self) -> Duration {
        self.0.set(self.0.get() + 1);
        Duration::from_micros(self.0.get())
    }

    fn sleep(&self, _time: Duration) {}
}

/// Sets one of a message's numbers.
type Set = Box<dyn Fn(&mut Message)>;

#[expect(clippy::cast_possible_truncation, reason = "cut to the type")]
fn setters(message: &Message, n: u64) -> Vec<Set> {
    macro_rules! each {
        ($variant:ident($m:ident): $($field:expr),+ $(,)?) => {
            vec![$(Box::new(move |message: &mut Message| {
                if let Message::$variant($m) = message {
                    $field;
                }
            }) as Set),+]
        };
    }
    match message {
        Message::Hello(_) => each!(Hello(m): m.protocol_min = n as u16, m.protocol_max = n as u16),
        Message::HelloReply(_) => each!(HelloReply(m): m.protocol = n as u16, m.encodings = n),
        Message::Reads(_) => {
            each!(Reads(m): m.newest.iter_mut().for_each(|kind| kind.1 = n as u16))
        }
        Message::Reserve(_) => each!(Reserve(m):
            m.example_sections = n as u32,
            m.plan.touched_pages = n,
            m.plan.spaces[0].id = n as u16,
            m.plan.spaces[0].regions[0].first_page = n,
            m.plan.spaces[0].regions[2].first_page = n,
            m.plan.spaces[0].regions[0].pages = n,
            m.plan.spaces[0].regions[2].pages = n,
            m.plan.sections[0].instance = n as u32,
            m.plan.sections[0].version = n as u16,
            m.plan.cpu.vcpus = n as u32,
            m.plan.cpu.xsave_bytes = n as u32,
            m.plan.cpu.tsc_khz = n as u32,
            m.plan.disks[0].bytes = n,
        ),
        Message::Section(_) => {
            each!(Section(m): m.instance = n as u32, m.version = (n as u16).max(1))
        }
        Message::LockMark(_) => each!(LockMark(m): m.end = n),
        Message::Accepted(_) => each!(Accepted(m): m.trial_restore_us = Some(n)),
        Message::Ping(..) => vec![Box::new(move |m| *m = Message::Ping(n, 0))],
        Message::Pong(_) => vec![Box::new(move |m| *m = Message::Pong(n))],
        Message::RoundEnd(_) => each!(RoundEnd(m): m.round = n as u32, m.pages = n),
        Message::RoundAck(_) => each!(RoundAck(m): m.round = n as u32),
        Message::StopAndCopy(_) => each!(StopAndCopy(m): m.pages = n),
        Message::End(_) => each!(End(m): m.sections = n as u32, m.records = n, m.digest = n as u32),
        Message::Ready(_) => each!(Ready(m): m.receive_us = n, m.restore_us = n),
        Message::Activated(_) => each!(Activated(m): m.activate_us = n, m.guest_stall_us = Some(n)),
        Message::FirstSign(_) => each!(FirstSign(m): m.after_us = n),
        Message::Commit(_) | Message::Done => Vec::new(),
        other => panic!("{other:?} is not in a clean run"),
    }
}

/// Bodies of a record of pages with some of the numbers at the head of it at an extreme.
fn pages(body: &[u8], n: u64) -> Vec<Vec<u8>> {
    // The head's space and runs; the first entry's first page, count, encoding and length.
    let fields = [(0, 2), (4, 4), (8, 8), (16, 4), (20, 1), (24, 4)];
    let set = |(at, len): (usize, usize)| {
        let mut body = body.to_vec();
        body[at..at + len].copy_from_slice(&n.to_le_bytes()[..len]);
        body
    };
    fields.into_iter().map(set).collect()
}

/// The streams of a side, each with one number at an extreme.
fn streams(side: usize) -> Vec<Vec<u8>> {
    let clean = lines(side);
    let mut streams = Vec::new();
    for n in [0, 1, u64::MAX / 2, u64::MAX / 2 + 1, u64::MAX - 1, u64::MAX] {
        for (at, (kind, body)) in clean.iter().enumerate() {
            let bodies = if [record::PAGES, record::PAGES2].contains(kind) {
                pages(body, n)
            } else {
                let message = Message::parse(*kind, body).expect("a message");
                let changed = |set: Set| {
                    let mut message = message.clone();
                    set(&mut message);
                    message.body()
                };
                setters(&message, n).into_iter().map(changed).collect()
            };
            for body in bodies {
                let mut out = wire::preamble(wire::StreamKind::Live).to_vec();
                for (other, (kind, clean)) in clean.iter().enumerate() {
                    wire::put_record(&mut out, *kind, if other == at { &body } else { clean });
                }
                streams.push(out);
            }
        }
    }
    streams
}

#[test]
fn a_source_takes_any_number() {
    let streams = streams(1);
    assert!(streams.len() > 50, "{} streams", streams.len());
    let mut moved = 0;
    for stream in streams {
        source_hears_at(stream.clone(), Ticking::default(), OnTimeout::Abort);
        let whatever = source_hears_at(stream, Ticking::default(), OnTimeout::StopAndCopy);
        moved += usize::from(whatever == "moved");
    }
    // A time that the destination tells is no reason to fail.
    assert!(moved > 20, "{moved} moved");
}

#[test]
fn a_destination_takes_any_number() {
    let streams = streams(0);
    assert!(streams.len() > 200, "{} streams", streams.len());
    for stream in streams {
        destination_hears(stream.clone());
        let _ = crate::inspect::inspect(&mut stream.as_slice(), |_| {});
    }
}
