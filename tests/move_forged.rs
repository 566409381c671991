//! A source whose state, at the stop, isn't what it announced: with right checksums, a right digest and a right count. The
//! destination says what is wrong before it restores anything, both ends tell it in one line, and the guest runs on.

mod support;

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use support::guests::Guest;
use support::moves::{EASY, check_last_line};
use support::vm::{Place, Vm, has_kvm};
use vmm_migration::message::{End, Message};
use vmm_migration::wire::record::{END, SECTION, STOP_AND_COPY};
use vmm_migration::wire::{self, Digest, HEAD_LEN, PREAMBLE_LEN, RecordHead, SUM_LEN, put_record};

/// What becomes of the first section of the stop.
#[derive(Clone, Copy, Debug)]
enum Lie {
    Missing,
    Doubled,
    OfUnknownKind,
    OfANewerVersion,
    OfAnotherInstance,
    /// A record of a type that isn't there.
    BehindAStranger,
}

impl Lie {
    /// The records in its place: type and body.
    fn told(self, body: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let mut section = wire::decode_section(body).unwrap();
        match self {
            Self::OfUnknownKind => "flux".clone_into(&mut section.kind),
            Self::OfANewerVersion => section.version += 1,
            Self::OfAnotherInstance => section.instance += 1000,
            Self::Missing | Self::Doubled | Self::BehindAStranger => {}
        }
        let told = (SECTION, wire::encode_section(&section));
        match self {
            Self::Missing => vec![],
            Self::Doubled => vec![told.clone(), told],
            Self::BehindAStranger => vec![(999, b"?".to_vec()), told],
            _ => vec![told],
        }
    }
}

/// Passes on what a source says, with the lie in it, until either end hangs up.
fn forge(mut from: &UnixStream, mut to: &UnixStream, lie: Lie) -> io::Result<()> {
    let mut preamble = [0; PREAMBLE_LEN];
    from.read_exact(&mut preamble)?;
    to.write_all(&preamble)?;
    let (mut digest, mut has_stopped, mut more) = (Digest::default(), false, 0);
    let mut lie = Some(lie);
    loop {
        let mut head = [0; HEAD_LEN];
        from.read_exact(&mut head)?;
        let record = RecordHead::decode(head).unwrap();
        let mut body = vec![0; record.body_len()];
        from.read_exact(&mut body)?;
        let mut sum = [0; SUM_LEN];
        from.read_exact(&mut sum)?;
        has_stopped |= record.kind == STOP_AND_COPY;
        let told = match record.kind {
            SECTION if has_stopped && lie.is_some() => lie.take().unwrap().told(&body),
            END => {
                let Message::End(end) = Message::parse(END, &body).unwrap() else { unreachable!() };
                let (records, digest) = digest.value();
                let sections = end.sections.checked_add_signed(more).unwrap();
                vec![(END, Message::End(End { records, digest, sections, ..end }).body())]
            }
            _ => {
                digest.add(u32::from_le_bytes(sum));
                to.write_all(&[&head, &body[..], &sum].concat())?;
                continue;
            }
        };
        more += i32::from(record.kind == SECTION) * (i32::try_from(told.len()).unwrap() - 1);
        for (kind, body) in told {
            let mut out = Vec::new();
            digest.add(put_record(&mut out, kind, &body));
            to.write_all(&out)?;
        }
    }
}

/// Stands between a destination and the next source that comes, and lies to the first.
fn between(listener: UnixListener, destination: &Path, lie: Lie) -> thread::JoinHandle<()> {
    let destination = UnixStream::connect(destination).unwrap();
    thread::spawn(move || {
        let (source, _) = listener.accept().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                let _ = io::copy(&mut &destination, &mut &source);
                let _ = source.shutdown(Shutdown::Both);
            });
            // It ends with an error: the connection's end.
            let _ = forge(&source, &destination, lie);
            let _ = destination.shutdown(Shutdown::Write);
        });
    })
}

fn check_intact(vm: &mut Vm) {
    let dots = vm.read_some(3);
    assert!(dots.iter().all(|b| *b == b'.'), "its memory changed: {dots:?}");
}

#[test]
fn sections_that_were_not_announced() {
    if !has_kvm() {
        return;
    }
    let mut source = Vm::start(Guest::dirtier(8, 0), &[]);
    check_intact(&mut source);
    for (lie, words) in [
        (Lie::Missing, &[" is missing"][..]),
        (Lie::Doubled, &["was not announced, or came twice"]),
        (Lie::OfUnknownKind, &["section flux/0 version 1 was not announced", " is missing"]),
        (Lie::OfANewerVersion, &["version 2 was not announced", "version 1 is missing"]),
        (Lie::OfAnotherInstance, &["/1000 version 1 was not announced", "/0 version 1 is missing"]),
        (Lie::BehindAStranger, &["999"]),
    ] {
        let (mut destination, _) = Vm::listen(&[]);
        let place = Place::new();
        let socket = place.path("relay.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let relay = between(listener, &destination.place.path("move.sock"), lie);
        let answer = source.try_move(&format!("unix:{}", socket.display()), &EASY);
        answer.check_failed(&[&["the destination says: ", "stop-and-copy"], words].concat());
        let (status, err) = destination.wait();
        assert_eq!((status, destination.read_to_end()), (Some(1), vec![]), "{lie:?}: {err}");
        check_last_line(&err, &[&["stop-and-copy"], words].concat());
        relay.join().unwrap();
        assert_eq!(source.info()["state"], "running");
        check_intact(&mut source);
    }
    let (mut destination, uri) = Vm::listen(&[]);
    source.move_to(&uri, &EASY);
    check_intact(&mut destination);
}
