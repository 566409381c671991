//! Moves that are lied to, by a relay between two real ends ([`super::forge`]): the lies, and what both ends have to say.

use std::time::Duration;

use rustix::process::Signal;
use vmm_migration::channel::Peer::{self, Destination, Source};
use vmm_migration::wire::record::{COMMIT, READY};

use super::disk;
use super::forge::{self, Forgery, Told, body, framed};
use super::guests::Guest;
use super::moves::{Answer, EASY, check_last_line, until};
use super::vm::{Place, Vm, has_kvm};

/// What the connection's end before the hand-over may mean.
pub const GONE: &str = "closed the connection; if the source is gone, the guest is gone";

/// What [`garbage`] is, read as a record.
pub const HTTP: &str = "a type 1347703880 record of 825110831 bytes is over the limit of 2097152";

/// A lie in place of what an end says, and the words that the other has for it, its stage first.
pub struct Lie {
    /// As of [`Forgery`], as are the next two.
    pub kind: u32,
    pub after: Option<u32>,
    pub told: fn(&[u8]) -> Told,
    /// Of the message, in that order or another.
    pub words: &'static [&'static str],
}

/// One at the first of its type.
pub const fn lie(kind: u32, told: fn(&[u8]) -> Told, words: &'static [&'static str]) -> Lie {
    Lie { kind, after: None, told, words }
}

/// The bytes, with a bit of one flipped.
pub fn flipped(whole: &[u8], at: usize) -> Told {
    let mut bytes = whole.to_vec();
    bytes[at] ^= 2;
    Told::Bytes(bytes)
}

/// Half of it, and nothing after.
pub fn half(whole: &[u8]) -> Told {
    Told::Last(whole[..whole.len() / 2].to_vec())
}

/// An answer in another language.
pub fn garbage(_: &[u8]) -> Told {
    Told::Bytes(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec())
}

/// The record with its body changed and its checksum right again; the digest of the stream isn't.
pub fn changed(whole: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Told {
    let mut body = body(whole).to_vec();
    change(&mut body);
    Told::Bytes(framed(whole, &body))
}

/// A dirtier of 8 of its 64 MiB, with a disk.
pub fn dirtier() -> Vm {
    let mut vm = disk::start(Guest::dirtier(8, 0), &[]);
    check_intact(&mut vm);
    vm
}

/// It goes on printing a dot for each pass over its memory without a difference.
pub fn check_intact(vm: &mut Vm) {
    // What is in the pipe already doesn't count.
    while !vm.read(Duration::ZERO).is_empty() {}
    let dots = vm.read_some(3);
    assert!(dots.iter().all(|b| *b == b'.'), "its memory changed: {dots:?}");
}

/// The guest runs at the source, and moves.
pub fn check_moves(mut source: Vm) {
    let (mut destination, uri) = Vm::listen(&[]);
    let dots = source.move_to(&uri, &EASY);
    assert!(dots.iter().all(|b| *b == b'.'), "its memory changed: {dots:?}");
    check_intact(&mut destination);
}

/// The way to a destination on which the first is lied to.
pub fn forged(destination: &Vm, by: Peer, lie: &Lie) -> (Place, String) {
    let Lie { kind, after, told, .. } = *lie;
    let forgery = Forgery { by, kind, after, told };
    forge::before(&destination.place.path("move.sock"), forgery)
}

/// A move that is lied to: what the client says, and the destination, which is gone then.
pub fn lied_to(source: &mut Vm, by: Peer, lie: &Lie) -> (Answer, String) {
    let (mut destination, _) = Vm::listen(&[]);
    let (_place, uri) = forged(&destination, by, lie);
    let answer = source.try_move(&uri, &EASY);
    if [READY, COMMIT].contains(&lie.kind) {
        // It waits for a source that may ask.
        let socket = destination.place.path("vm.sock");
        until("gives up", || !socket.exists());
        destination.signal(Signal::TERM);
    }
    let (status, err) = destination.wait();
    assert_eq!((status, destination.read_to_end()), (Some(1), vec![]), "{answer:?}\n{err}");
    disk::check_untouched(source);
    until("runs on at the source", || source.info()["state"] == "running");
    check_intact(source);
    (answer, err)
}

/// The last line holds these words. One who waited for questions says it again at the end.
pub fn check_said(err: &str, words: &[&str]) {
    let last = err.lines().last().unwrap_or_default();
    let first = err.find(last).unwrap_or_default();
    check_last_line(&err[..first + last.len()], words);
}

/// The destination is lied to: it says what is wrong, and the source has it from there.
pub fn source_lies(lies: &[Lie]) {
    if !has_kvm() {
        return;
    }
    let mut source = dirtier();
    for lie in lies {
        let (answer, err) = lied_to(&mut source, Source, lie);
        answer.check_failed(&[&[": the destination says: "], lie.words].concat());
        check_said(&err, lie.words);
    }
    check_moves(source);
}

/// The source is lied to: it says what is wrong, and the destination has it from there.
pub fn destination_lies(lies: &[Lie]) {
    if !has_kvm() {
        return;
    }
    let mut source = dirtier();
    for lie in lies {
        let (answer, err) = lied_to(&mut source, Destination, lie);
        answer.check_failed(lie.words);
        assert!(!answer.err.contains(" says: "), "{answer:?}");
        check_said(&err, &[&[": the source says: the source gave up: "], lie.words].concat());
    }
    check_moves(source);
}
