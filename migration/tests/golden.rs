//! The bytes of every message, frozen: `golden/messages.txt` holds them, one record a line. A line is
//! never edited once released; a new layout is a new line under a new protocol. `golden/pages.txt`: the records of pages.

use vmm_migration::chunk::{Builder, DATA_PAGES_MAX};
use vmm_migration::message::*;
use vmm_migration::pages::Run;
use vmm_migration::plan::*;
use vmm_migration::state::Section;
use vmm_migration::wire::{self, Algorithm, WireError, record};

const GOLDEN: &str = include_str!("golden/messages.txt");
const GOLDEN_PAGES: &str = include_str!("golden/pages.txt");

fn plan() -> Plan {
    Plan {
        name: "web".into(),
        paused: false,
        config: vec![0xc0, 0xff],
        spaces: vec![Space {
            id: SPACE_RAM,
            regions: vec![
                Region { first_page: 0, pages: 0xc_0000 },
                Region { first_page: 0x10_0000, pages: 0x4_0000 },
            ],
        }],
        touched_pages: 12345,
        sections: vec![
            SectionId { kind: "vcpu".into(), instance: 0, version: 1 },
            SectionId { kind: "virtio-blk".into(), instance: 2, version: 3 },
        ],
        cpu: CpuNeeds {
            arch: "x86_64".into(),
            model: "host".into(),
            vcpus: 1,
            cpuid: vec![CpuidLeaf { function: 7, index: 0, registers: [1, 2, 3, 4] }],
            msrs: vec![0x10, 0xc000_0080],
            xsave_bytes: 2696,
            xcr0: 7,
            xss: 0,
            tsc_khz: 2_400_000,
        },
        disks: vec![DiskNeed {
            id: "root".into(),
            path: "/srv/web.img".into(),
            bytes: 1 << 30,
            read_only: false,
        }],
        nets: vec![NetNeed { id: "net0".into(), tap: "tap0".into(), mac: [2, 0, 0, 0, 0, 1] }],
    }
}

fn messages() -> Vec<Message> {
    let id = MigrationId([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
    let reasons = || Reasons { reasons: vec!["no".into(), "never".into()] };
    vec![
        Message::Hello(Hello {
            protocol_min: 1,
            protocol_max: 1,
            id,
            software: "vmm 0.1.0".into(),
        }),
        Message::HelloReply(HelloReply { protocol: 1, encodings: 3, software: "vmm 0.1.0".into() }),
        Message::Reserve(Box::new(Reserve { plan: plan(), example_sections: 2, dry_run: true })),
        Message::Section(Section {
            kind: "vcpu".into(),
            instance: 1,
            version: 1,
            body: vec![9, 8, 7],
        }),
        Message::Accepted(Accepted {
            trial_restore_us: Some(1500),
            locks_seen: true,
            warnings: vec!["slow".into()],
        }),
        Message::Refused(reasons()),
        Message::Ping(0x0102_0304_0506_0708, 2),
        Message::Pong(0x0102_0304_0506_0708),
        Message::RoundEnd(RoundEnd { round: 3, pages: 1000 }),
        Message::RoundAck(RoundAck { round: 3 }),
        Message::StopAndCopy(StopAndCopy { pages: 300 }),
        Message::End(End { paused: true, sections: 17, records: 4321, digest: 0xdead_beef }),
        Message::Ready(Ready { receive_us: 1000, restore_us: 2000 }),
        Message::Commit(Commit { id }),
        Message::Activated(Activated { activate_us: 80, guest_stall_us: Some(9000) }),
        Message::NeverActivated(reasons()),
        Message::Done,
        Message::Cancel(reasons()),
        Message::Failed(reasons()),
        Message::Resolve(Resolve { protocol_min: 1, protocol_max: 1, id }),
        Message::UnknownId,
        Message::Reads(Reads { newest: vec![("serial".into(), 2)] }),
        Message::FirstSign(FirstSign { after_us: 15_000 }),
        Message::LockMark(LockMark { end: 0x4123_4567_89ab_cdef }),
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        text.chars().map(|c| u8::try_from(c.to_digit(16).unwrap()).unwrap()).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

#[test]
fn every_message_has_its_golden_bytes() {
    let mut text = String::new();
    for message in messages() {
        let mut bytes = Vec::new();
        wire::put_record(&mut bytes, message.kind(), &message.body());
        text += &format!("{} {}\n", wire::record_name(message.kind()), hex(&bytes));
    }
    let golden: String =
        GOLDEN.lines().filter(|l| !l.starts_with('#')).map(|l| format!("{l}\n")).collect();
    assert_eq!(text, golden, "what is written now:\n{text}");
}

#[test]
fn golden_bytes_are_read_as_what_they_were() {
    let mut golden = GOLDEN.lines().filter(|line| !line.starts_with('#'));
    for message in messages() {
        let (name, bytes) = golden.next().expect("a line").split_once(' ').expect("two words");
        assert_eq!(name, wire::record_name(message.kind()));
        let mut body = Vec::new();
        let (head, _) = wire::read_record(&mut unhex(bytes).as_slice(), &mut body).expect(name);
        assert_eq!(Message::parse(head.kind, &body).expect(name), message);
    }
    assert_eq!(golden.next(), None);
}

#[test]
fn pages_have_their_golden_bytes() {
    let mut builder = Builder::new(SPACE_RAM, DATA_PAGES_MAX);
    let runs = [(0, 0x9f), (0x100, 1), (0x10_0000, 0x4_0000)];
    for run in runs.map(|(first, count)| Run::new(first, count).unwrap()) {
        for piece in run.pieces(DATA_PAGES_MAX as u64) {
            builder.add(piece, |_| Ok::<(), ()>(())).unwrap();
        }
    }
    let body = builder.parts().concat();
    let mut text = String::new();
    for kind in [record::PAGES, record::PAGES2] {
        let mut bytes = Vec::new();
        let sum = wire::put_record(&mut bytes, kind, &body);
        text += &format!("{} {}\n", wire::record_name(kind), hex(&bytes));
        let mut read = Vec::new();
        let (head, read_sum) = wire::read_record(&mut bytes.as_slice(), &mut read).unwrap();
        assert_eq!((head.kind, head.optional, read_sum, &read), (kind, false, sum, &body));
    }
    let golden: String =
        GOLDEN_PAGES.lines().filter(|l| !l.starts_with('#')).map(|l| format!("{l}\n")).collect();
    assert_eq!(text, golden, "what is written now:\n{text}");
}

#[test]
fn a_cut_or_longer_body_is_no_message() {
    for message in messages() {
        let body = message.body();
        for len in 0..body.len() {
            // Of these two any tail is data.
            if !matches!(message, Message::Section(_) | Message::Ping(..)) {
                assert!(Message::parse(message.kind(), &body[..len]).is_err(), "{message:?} {len}");
            }
        }
        if !matches!(message, Message::Section(_) | Message::Ping(..)) {
            let longer = [&body[..], &[0]].concat();
            assert!(Message::parse(message.kind(), &longer).is_err(), "{message:?} and a byte");
        }
    }
}

#[test]
fn versions_meet_where_they_can() {
    assert_eq!(negotiate(1, 1), Some(1));
    assert_eq!(negotiate(1, 9), Some(PROTOCOL_MAX), "a newer source that still speaks ours");
    assert_eq!(negotiate(2, 9), None, "a source too new");
    assert_eq!(negotiate(0, 0), None, "a source too old");
    assert_eq!(negotiate(5, 1), None, "a range upside down");
}

#[test]
fn sections_are_held_against_the_parts() {
    let part = |kind: &str, instance, version| SectionId { kind: kind.into(), instance, version };
    let plan = plan();
    assert_eq!(plan.section_reasons(&[part("vcpu", 0, 1), part("virtio-blk", 2, 4)]), [""; 0]);
    assert_eq!(
        plan.section_reasons(&[part("vcpu", 0, 1), part("virtio-blk", 2, 2), part("rtc", 0, 1)]),
        [
            "section virtio-blk/2 version 3 is newer than this vmm, which reads up to version 2",
            "section rtc/0 is missing",
        ]
    );
    assert_eq!(
        plan.section_reasons(&[part("vcpu", 0, 1)]),
        ["no part here takes section virtio-blk/2"]
    );
}

/// What a newer source sends to a destination that reads less, or doesn't say: the newest that both know.
#[test]
fn plans_are_lowered_to_what_the_destination_reads() {
    let lowered = |newest: &[(&str, u16)]| {
        let mut plan = plan();
        let newest = newest.iter().map(|(kind, version)| ((*kind).to_owned(), *version)).collect();
        plan.lower_to(&Reads { newest });
        plan.sections.iter().map(|id| id.version).collect::<Vec<_>>()
    };
    assert_eq!(lowered(&[]), [1, 1]);
    assert_eq!(lowered(&[("virtio-blk", 2)]), [1, 2]);
    assert_eq!(lowered(&[("virtio-blk", 9), ("vcpu", 9), ("serial", 2)]), [1, 3]);
    assert_eq!(lowered(&[(PAGES_KIND, 2)]), [1, 1], "of no concern to sections");
}

#[test]
fn pages_go_as_the_destination_reads_them() {
    let goes = |newest: &[(&str, u16)]| {
        let newest = newest.iter().map(|(kind, version)| ((*kind).to_owned(), *version)).collect();
        let reads = Reads { newest };
        assert_eq!(reads.pages_record(Algorithm::Crc32), record::PAGES, "which any reads");
        reads.pages_record(Algorithm::Xxh64)
    };
    assert_eq!(goes(&[]), record::PAGES, "it says nothing");
    assert_eq!(goes(&[("serial", 2)]), record::PAGES, "nothing of pages");
    assert_eq!(goes(&[("Pages", 1)]), record::PAGES);
    assert_eq!(goes(&[("serial", 2), ("Pages", 2)]), record::PAGES2);
    assert_eq!(goes(&[("Pages", 7)]), record::PAGES2, "the newest that we write");
    let like_us = Reads::new(Vec::new()).pages_record(Algorithm::Xxh64);
    assert_eq!(like_us, record::PAGES2, "a destination like us");
}

#[test]
fn plans_that_cannot_be_are_refused() {
    assert_eq!(plan().faults(), [""; 0]);
    let with = |change: fn(&mut Plan)| {
        let mut plan = plan();
        change(&mut plan);
        plan.faults()
    };
    assert_eq!(with(|p| p.spaces.clear()), ["0 page spaces, expected one, of RAM"]);
    assert_eq!(
        with(|p| p.spaces[0].regions[1].first_page = 0xb_ffff),
        ["RAM region at page 786431 is invalid"]
    );
    assert_eq!(with(|p| p.spaces[0].regions[0].pages = 0), ["RAM region at page 0 is invalid"]);
    assert_eq!(
        with(|p| p.spaces[0].regions[1].pages = u64::MAX),
        ["RAM region at page 1048576 is invalid"]
    );
    assert_eq!(
        with(|p| p.sections.extend(p.sections.clone())),
        ["section vcpu/0 is listed twice", "section virtio-blk/2 is listed twice"]
    );
    assert_eq!(with(|p| p.disks.extend(p.disks.clone())), ["disk root is listed twice"]);
}

#[test]
fn what_a_peer_says_to_the_operator_can_do_nothing_to_a_terminal() {
    let hostile = vec!["\x1b]0;title\x07\u{9b}2J\r\n".repeat(100); 100];
    let reasons = Reasons { reasons: hostile.clone() };
    let accepted = Accepted { warnings: hostile, ..Accepted::default() };
    for message in [
        Message::Accepted(accepted),
        Message::Refused(reasons.clone()),
        Message::NeverActivated(reasons.clone()),
        Message::Failed(reasons.clone()),
        Message::Cancel(reasons),
    ] {
        let lines = match Message::parse(message.kind(), &message.body()) {
            Ok(Message::Accepted(Accepted { warnings, .. })) => warnings,
            Ok(
                Message::Refused(m)
                | Message::NeverActivated(m)
                | Message::Failed(m)
                | Message::Cancel(m),
            ) => m.reasons,
            other => panic!("{other:?}"),
        };
        assert_eq!(lines.len(), REASONS_MAX);
        for line in lines {
            assert!(line.len() <= REASON_LEN_MAX && line.starts_with(" ]0;title"), "{line:?}");
            assert!(!line.contains(char::is_control), "{line:?}");
        }
    }
}

#[test]
fn an_unknown_type_is_an_error() {
    let unknown = Message::parse(0x1234, &[]).unwrap_err();
    assert!(matches!(unknown, WireError::UnknownRecord { kind: 0x1234 }));
    for kind in [record::PAGES, record::PAGES2] {
        assert!(Message::parse(kind, &[]).is_err(), "pages are no message");
    }
}
