//! Peers that come to no end: after any of their records they say what may be skipped, for ever, or the rest byte by byte.
//! Neither keeps an end waiting beyond its time, whatever moves; and where a destination may wait for long, its operator is
//! heard all the while.

use std::io::{self, Read, Write};
use std::time::Duration;

use super::Time;
use super::hostile_tests::{destination_over, lines, source_over};
use crate::channel::{Channel, Clock, Flow};
use crate::policy::OnTimeout;
use crate::report::Progress;
use crate::wire::{self, StreamKind, record};

/// Says its lines, and then as it does, each time after a pause.
struct Endless {
    lines: io::Cursor<Vec<u8>>,
    then: Then,
    time: Time,
}

/// What comes in the end.
#[derive(Clone, Debug)]
enum Then {
    /// A record each second that a reader may skip.
    Chatter,
    /// These bytes, one in nine seconds.
    Drip(io::Cursor<Vec<u8>>),
}

impl Read for Endless {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self.lines.read(into)? {
            0 => {}
            count => return Ok(count),
        }
        assert!(self.time.now() < Duration::from_secs(3600), "it is heard for ever");
        self.time.sleep(Duration::from_secs(1));
        match &mut self.then {
            Then::Chatter => {
                let (head, rest) = into.split_first_chunk_mut().expect("room for a record");
                *head = (1_u32 << 31 | 999).to_le_bytes();
                rest[..8].copy_from_slice(&[&[0; 4], &empty_sum().to_le_bytes()[..]].concat());
                Ok(12)
            }
            Then::Drip(bytes) if self.time.now().as_secs().is_multiple_of(9) => {
                bytes.read(&mut into[..1])
            }
            Then::Drip(_) => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

/// The checksum of the record.
fn empty_sum() -> u32 {
    let head = wire::RecordHead { kind: 999, optional: true, len: 0 };
    wire::Checksum::new(head).value()
}

impl Write for Endless {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A peer that says so many of a clean run's records, of this side, before it comes to no end; each way.
fn peers(side: usize, count: usize) -> [(Time, Channel); 2] {
    let mut said = wire::preamble(StreamKind::Live).to_vec();
    let mut rest = Vec::new();
    for (at, (kind, body)) in lines(side).iter().enumerate() {
        wire::put_record(if at < count { &mut said } else { &mut rest }, *kind, body);
    }
    [Then::Chatter, Then::Drip(io::Cursor::new(rest))].map(|then| {
        let time = Time::default();
        let lines = io::Cursor::new(said.clone());
        (time.clone(), Channel::new(Endless { lines, then, time: time.clone() }, time))
    })
}

#[test]
fn a_source_hears_no_destination_for_ever() {
    let lines = lines(1);
    for (count, next) in lines.iter().map(|(kind, _)| *kind).enumerate() {
        for (time, channel) in peers(1, count) {
            let end = source_over(channel, OnTimeout::StopAndCopy);
            let limit_s = match next {
                record::ACCEPTED => 61,
                // The time for pre-copy, and to keep still.
                record::ROUND_ACK => 610,
                // And four times what was predicted.
                record::READY => 12,
                _ => 11,
            };
            let name = wire::record_name(next);
            assert!(time.now() <= Duration::from_secs(limit_s), "{name}: {:?}", time.now());
            let expected = match next {
                record::ACTIVATED => "in doubt",
                record::FIRST_SIGN => "moved",
                _ => "stays",
            };
            assert_eq!(end, expected, "{name}");
        }
    }
}

#[test]
fn a_destination_hears_no_source_for_ever() {
    let lines = lines(0);
    let accepted = lines.iter().position(|(kind, _)| *kind == record::PING).expect("a ping");
    for (count, next) in lines.iter().map(|(kind, _)| *kind).enumerate() {
        for (time, channel) in peers(0, count) {
            let limit = Duration::from_secs(match next {
                record::HELLO => 10,
                record::COMMIT | record::DONE => 31,
                _ if count < accepted => 61,
                // As long as the source may take for pre-copy; but its operator cancels.
                _ => 100,
            });
            let look = time.clone();
            let mut observer = |_: &Progress| {
                let is_over = look.now() >= Duration::from_secs(99);
                if is_over { Flow::Cancel } else { Flow::Continue }
            };
            let end = destination_over(channel, &mut observer);
            let name = wire::record_name(next);
            assert_eq!(end.is_ok(), next == record::DONE, "{name}: {end:?}");
            assert!(time.now() <= limit, "{name}: {:?}", time.now());
        }
    }
}
