//! An end that lies, or a connection that changes what it carries, with checksums, digest and counts as right as they can be:
//! both ends tell in one line what is wrong, no second copy runs, the guest runs on with its memory, and the next move works.

mod support;

use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use support::forge::{PREAMBLE, Told, behind, body, message, say};
use support::lies::*;
use support::moves::{Answer, EASY};
use support::vm::{Vm, has_kvm};
use vmm_migration::channel::Peer::{self, Destination, Source};
use vmm_migration::message::{Activated, Commit, Hello, HelloReply, Message, RoundAck};
use vmm_migration::plan::{MigrationId, SectionId};
use vmm_migration::state::Section;
use vmm_migration::wire::record::*;
use vmm_migration::wire::{self, HEAD_LEN, SUM_LEN, StreamKind, len_max};

/// Before it is known for a source: it is told what is wrong, and the wait for one goes on.
#[test]
fn a_source_of_another_language_or_version() {
    if !has_kvm() {
        return;
    }
    let lies = [
        lie(PREAMBLE, |w| flipped(w, 0), &["not a vmm stream (wrong magic)"]),
        lie(PREAMBLE, |w| flipped(w, 8), &["the stream has format 3, this vmm reads format 1"]),
        lie(
            PREAMBLE,
            |_| Told::Bytes(wire::preamble(StreamKind::Snapshot).to_vec()),
            &["the stream is of kind 2, expected 1, a migration"],
        ),
        lie(HELLO, |w| flipped(w, HEAD_LEN), &["the checksum of a Hello record is wrong"]),
        lie(
            HELLO,
            |whole| {
                let Message::Hello(hello) = message(whole) else { unreachable!() };
                say(&Message::Hello(Hello { protocol_min: 7, protocol_max: 9, ..hello }))
            },
            &["the source speaks protocols 7 to 9, the destination 1 to 1"],
        ),
    ];
    let mut source = dirtier();
    let (mut destination, uri) = Vm::listen(&[]);
    for lie in &lies {
        let (_place, uri) = forged(&destination, Source, lie);
        let answer = source.try_move(&uri, &EASY);
        answer
            .check_failed(&[&["pre-migration failed: the destination says: "], lie.words].concat());
        check_intact(&mut source);
    }
    source.move_to(&uri, &EASY);
    check_intact(&mut destination);
    destination.tell(&["stop", "--force"]);
    let (status, err) = destination.wait();
    assert_eq!(status, Some(0), "{err}");
    let strays =
        err.lines().filter(|line| line.starts_with("vmm: a connection brought no guest: "));
    let told: Vec<_> = strays.collect();
    assert_eq!(told.len(), lies.len(), "{err}");
    for (line, lie) in told.iter().zip(&lies) {
        assert!(lie.words.iter().all(|word| line.contains(word)), "{:?}: {line}", lie.words);
    }
}

#[test]
fn a_destination_of_another_language_or_version() {
    const STAGE: &str = "pre-migration failed: ";
    destination_lies(&[
        lie(PREAMBLE, |w| flipped(w, 0), &[STAGE, "not a vmm stream (wrong magic)"]),
        lie(PREAMBLE, |w| flipped(w, 8), &[STAGE, "has format 3, this vmm reads format 1"]),
        lie(HELLO_REPLY, garbage, &[STAGE, HTTP]),
        lie(HELLO_REPLY, |w| flipped(w, HEAD_LEN), &[STAGE, "the checksum of a HelloReply record"]),
        lie(
            HELLO_REPLY,
            |whole| {
                let Message::HelloReply(reply) = message(whole) else { unreachable!() };
                say(&Message::HelloReply(HelloReply { protocol: 9, ..reply }))
            },
            &["pre-migration: ", "the destination chose protocol 9, the source speaks 1 to 1"],
        ),
    ]);
}

#[test]
fn a_plan_that_cannot_be() {
    source_lies(&[
        lie(
            RESERVE,
            |whole| {
                let Message::Reserve(mut reserve) = message(whole) else { unreachable!() };
                let stranger = SectionId { kind: "virtio-blk".into(), instance: 9, version: 1 };
                reserve.plan.sections[0] = stranger;
                say(&Message::Reserve(reserve))
            },
            &["reservation", "no part here takes section virtio-blk/9", "irqchip/0 is missing"],
        ),
        lie(
            RESERVE,
            |whole| {
                let Message::Reserve(mut reserve) = message(whole) else { unreachable!() };
                reserve.plan.sections.push(reserve.plan.sections[0].clone());
                reserve.plan.spaces[0].regions[0].pages = 1 << 50;
                say(&Message::Reserve(reserve))
            },
            &["reservation", "RAM region at page 0 is invalid", "irqchip/0 is listed twice"],
        ),
        lie(
            RESERVE,
            |whole| behind(whole, &[(PAGES, vec![0; 8])]),
            &["reservation failed: the source sent Pages where Reserve belongs"],
        ),
        lie(
            SECTION,
            |whole| behind(whole, &[(COMMIT, vec![0; 16])]),
            &["reservation failed: the source sent Commit where Section belongs"],
        ),
    ]);
}

#[test]
fn pages_that_are_not_what_was_sent() {
    source_lies(&[
        lie(
            PAGES,
            // The last byte of a page.
            |whole| flipped(whole, whole.len() - SUM_LEN - 1),
            &["pre-copy failed: the checksum of a Pages", " record is wrong"],
        ),
        lie(
            PAGES,
            |whole| changed(whole, |body| *body.last_mut().unwrap() ^= 1),
            &["stop-and-copy", "the stream's digest is wrong"],
        ),
        lie(
            PAGES,
            |whole| {
                // The first run of the table, moved so that only its last page is beyond the 64 MiB.
                changed(whole, |body| {
                    let count = u32::from_le_bytes(body[16..20].try_into().unwrap());
                    let first = (64 << 20) / 4096 + 1 - u64::from(count);
                    body[8..16].copy_from_slice(&first.to_le_bytes());
                })
            },
            &["pre-copy failed: a Pages", "malformed: a run outside the guest's memory"],
        ),
        lie(
            PAGES,
            // Another page space.
            |whole| changed(whole, |body| body[0] = 1),
            &["pre-copy failed: a Pages", "malformed: a run outside the guest's memory"],
        ),
        lie(
            PAGES,
            |whole| {
                let mut bytes = whole.to_vec();
                bytes[4..HEAD_LEN].copy_from_slice(&(len_max(PAGES) + 1).to_le_bytes());
                Told::Bytes(bytes)
            },
            &["pre-copy failed: a Pages", "of 1114113 bytes is over the limit of 1114112"],
        ),
    ]);
}

#[test]
fn records_out_of_place() {
    source_lies(&[
        lie(
            ROUND_END,
            |whole| {
                let section =
                    Section { kind: "serial".into(), instance: 0, version: 1, body: vec![] };
                behind(whole, &[(SECTION, wire::encode_section(&section))])
            },
            &["pre-copy failed: the source sent Section where Pages belongs"],
        ),
        lie(
            STOP_AND_COPY,
            |whole| behind(whole, &[(COMMIT, vec![0; 16])]),
            &["pre-copy failed: the source sent Commit where Pages belongs"],
        ),
        lie(
            END,
            |whole| behind(whole, &[(ROUND_END, vec![0, 0])]),
            &["stop-and-copy failed: the source sent RoundEnd where End belongs"],
        ),
    ]);
}

#[test]
fn answers_that_are_none() {
    destination_lies(&[
        lie(ACCEPTED, garbage, &["reservation failed: ", HTTP]),
        lie(ACCEPTED, |w| flipped(w, HEAD_LEN), &["the checksum of an Accepted record is wrong"]),
        lie(
            PONG,
            |_| say(&Message::Pong(77)),
            &["reservation failed: the destination sent Pong where Pong to this Ping belongs"],
        ),
        lie(ROUND_ACK, garbage, &["pre-copy failed: ", HTTP]),
        lie(
            ROUND_ACK,
            |_| say(&Message::RoundAck(RoundAck { round: 7 })),
            &[
                "pre-copy failed: the destination sent RoundAck where RoundAck of this round belongs",
            ],
        ),
        lie(READY, garbage, &["stop-and-copy failed: ", HTTP]),
        lie(
            READY,
            |_| say(&Message::Activated(Activated::default())),
            &["stop-and-copy failed: the destination sent Activated where Ready belongs"],
        ),
    ]);
}

/// The connection ends within a record: each end takes the other for gone, and the destination says what that may mean.
#[test]
fn cut_within_a_record() {
    if !has_kvm() {
        return;
    }
    let mut source = dirtier();
    for (by, kind, there, here) in [
        (Source, RESERVE, "reservation", "reservation"),
        (Source, PAGES, "pre-copy", "pre-copy"),
        (Source, ROUND_END, "pre-copy", "pre-copy"),
        (Source, END, "stop-and-copy", "stop-and-copy"),
        (Destination, ACCEPTED, "pre-copy", "reservation"),
        (Destination, ROUND_ACK, "pre-copy", "pre-copy"),
        (Destination, READY, "commitment", "stop-and-copy"),
    ] {
        let (answer, err) = lied_to(&mut source, by, &lie(kind, half, &[]));
        answer.check_failed(&[here, " failed: the destination closed the connection"]);
        check_said(&err, &[there, " failed: the source ", GONE, "its disks are untouched"]);
    }
    check_moves(source);
}

/// What isn't the whole `Commit` of this migration is none: the destination gives the guest back.
#[test]
fn a_commit_that_is_none() {
    source_lies(&[
        lie(
            COMMIT,
            |_| say(&Message::Commit(Commit { id: MigrationId([9; 16]) })),
            &["commitment failed: the source sent Commit where Commit of this migration belongs"],
        ),
        lie(
            COMMIT,
            |whole| flipped(whole, HEAD_LEN),
            &["commitment failed: the checksum of a Commit record is wrong"],
        ),
    ]);
}

/// All of `Commit` but its end, or an answer to it that is none: the source is in doubt, asks, and hears how it is.
#[test]
fn doubts_that_a_question_ends() {
    fn moved_or_not(by: Peer, kind: u32, told: fn(&[u8]) -> Told) -> (Answer, Vm, Vm) {
        let source = dirtier();
        let (destination, _) = Vm::listen(&[]);
        let (_place, uri) = forged(&destination, by, &lie(kind, told, &[]));
        let answer = source.try_move(&uri, &EASY);
        assert!(answer.err.contains("vmm: in doubt: the destination was told to run the guest"));
        (answer, source, destination)
    }
    if !has_kvm() {
        return;
    }
    thread::scope(|scope| {
        scope.spawn(|| {
            let but_its_end = |whole: &[u8]| Told::Last(whole[..whole.len() - 1].to_vec());
            let (answer, source, mut destination) = moved_or_not(Source, COMMIT, but_its_end);
            let last = answer.err.lines().last().unwrap();
            let words = "activation failed: the destination says: commitment failed: the source closed the connection";
            assert!(answer.status == Some(1) && last.ends_with(words), "{answer:?}");
            assert!(destination.read(Duration::ZERO).is_empty(), "a second copy ran");
            destination.signal(Signal::TERM);
            let (status, err) = destination.wait();
            assert_eq!(status, Some(1), "{err}");
            check_said(&err, &["commitment failed: the source ", GONE]);
            check_moves(source);
        });
        scope.spawn(|| {
            let (answer, mut source, mut destination) =
                moved_or_not(Destination, ACTIVATED, garbage);
            assert!(answer.check_moved().err.contains(HTTP), "{answer:?}");
            check_intact(&mut destination);
            source.read_to_end();
            assert_eq!(source.wait().0, Some(0), "{answer:?}");
        });
    });
}

/// Other sections in the place of one.
fn sections(whole: &[u8], told: impl FnOnce(Section) -> Vec<Section>) -> Told {
    let told = told(wire::decode_section(body(whole)).unwrap());
    Told::Records(told.iter().map(|section| (SECTION, wire::encode_section(section))).collect())
}

/// What the destination says it could restore, it has restored, before anything of the guest goes over.
#[test]
fn an_example_that_cannot_be_restored() {
    if !has_kvm() {
        return;
    }
    let mut source = dirtier();
    let cut = |whole: &[u8]| {
        sections(whole, |mut section| {
            section.body.pop();
            vec![section]
        })
    };
    let (answer, err) = lied_to(&mut source, Source, &lie(SECTION, cut, &[]));
    let words =
        "state irqchip/0 can't be restored: irqchip: the saved state of version 1 can't be decoded";
    answer.check_failed(&["reservation failed: the destination says: ", words]);
    assert!(!answer.err.contains("pre-copy"), "{answer:?}");
    check_said(&err, &["the migration failed: reservation: ", words]);
    check_moves(source);
}

/// A source whose state, at the stop, isn't what it announced: the destination says so before it restores anything.
#[test]
fn sections_that_were_not_announced() {
    let at_the_stop = |told, words| Lie { after: Some(STOP_AND_COPY), ..lie(SECTION, told, words) };
    source_lies(&[
        at_the_stop(|w| sections(w, |_| vec![]), &["stop-and-copy", " is missing"]),
        at_the_stop(
            |w| sections(w, |section| vec![section.clone(), section]),
            &["stop-and-copy", "was not announced, or came twice"],
        ),
        at_the_stop(
            |w| sections(w, |section| vec![Section { kind: "flux".into(), ..section }]),
            &["stop-and-copy", "section flux/0 version 1 was not announced", " is missing"],
        ),
        at_the_stop(
            |w| sections(w, |section| vec![Section { version: 2, ..section }]),
            &["stop-and-copy", "version 2 was not announced", "version 1 is missing"],
        ),
        at_the_stop(
            |w| sections(w, |section| vec![Section { instance: 1000, ..section }]),
            &["stop-and-copy", "/1000 version 1 was not announced", "/0 version 1 is missing"],
        ),
        // A record of a type that isn't there.
        at_the_stop(
            |whole| behind(whole, &[(999, b"?".to_vec())]),
            &["stop-and-copy failed: record type 999 is unknown to this vmm"],
        ),
    ]);
}
