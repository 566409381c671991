//! A source in doubt, whose destination hangs or can't be reached: it answers and obeys at any moment, and believes the
//! operator only as far as the disks' locks let it.

mod support;

use std::os::unix::fs::symlink;
use std::time::Duration;

use rustix::fd::OwnedFd;
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::process::Signal;
use support::guests::Guest;
use support::moves::{Client, EASY, check_last_line, fill, until};
use support::relay::{Point, Relay};
use support::vm::{Place, Vm, has_kvm};
use vmm_migration::wire::record::{ACTIVATED, COMMIT};

/// A source in doubt, the client of its migration, and what it asks by now.
struct Scene {
    source: Vm,
    client: Client,
    destination: Vm,
    _relay: Relay,
    _place: Place,
}

/// What the source's address leads to once the connection was cut.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    /// To the destination, which was stopped.
    Stopped,
    /// To nothing.
    Nowhere,
}

/// Cuts the connection at a record.
fn in_doubt(options: &[&str], kind: u32, then: Then) -> Scene {
    let mut source = Vm::start(Guest::dirtier(8, 300), options);
    source.read_some(1);
    let (destination, _) = Vm::listen(&[]);
    let listener = destination.place.path("move.sock");
    let place = Place::new();
    let address = place.path("there.sock");
    let (link, there, stop) =
        (address.clone(), listener.clone(), destination.signaller(Signal::STOP));
    let spring = move || {
        std::fs::remove_file(&link).unwrap();
        if then == Then::Stopped {
            stop();
            symlink(there, link).unwrap();
        }
    };
    let relay = Relay::start(&listener, Point { kind, after: None, delivered: false }, spring);
    symlink(relay.path(), &address).unwrap();
    let client = source.start_move(&format!("unix:{}", address.display()), &EASY);
    relay.wait();
    until("is in doubt", || source.info()["state"] == "in-doubt");
    Scene { source, client, destination, _relay: relay, _place: place }
}

/// In doubt, while a destination was stopped that has as many connections waiting as it takes: they last as long as what
/// comes with the scene.
fn in_doubt_before_a_full_queue() -> (Scene, Vec<OwnedFd>) {
    let scene = in_doubt(&[], COMMIT, Then::Stopped);
    let queued = fill(&scene.destination.place.path("move.sock"));
    until("connects", || scene.source.has_thread("connect"));
    (scene, queued)
}

/// Asks a destination that takes the connection and says nothing, for all the test knows.
fn until_it_asks() {
    std::thread::sleep(Duration::from_millis(2500));
}

/// The client failed, and these words stand in its last line; one before told of the doubt.
fn check_failed(client: Client, words: &str) {
    let answer = client.wait();
    assert_eq!((answer.status, answer.out.as_str()), (Some(1), ""), "{answer:?}");
    assert!(answer.err.lines().last().unwrap().contains(words), "{answer:?}");
}

fn check_running(source: &mut Vm) {
    until("runs on", || source.info()["state"] == "running");
    source.read_some(1);
}

#[test]
fn the_operator_is_heard_while_the_destination_takes_no_connection() {
    if !has_kvm() {
        return;
    }
    let (mut scene, _queued) = in_doubt_before_a_full_queue();
    assert_eq!(scene.source.info()["state"], "in-doubt");
    let told = scene.source.tell(&["info"]);
    let known = told.lines().find(|line| line.starts_with("message")).unwrap_or_default();
    assert!(known.contains("in doubt: ") && known.contains("--resolve"), "{told}");
    scene.source.tell(&["migrate", "--resolve", "resume"]);
    check_running(&mut scene.source);
    check_failed(scene.client, "");
}

#[test]
fn an_end_by_force_is_heard_while_the_destination_takes_no_connection() {
    if !has_kvm() {
        return;
    }
    let (mut scene, _queued) = in_doubt_before_a_full_queue();
    scene.source.tell(&["stop", "--force"]);
    assert_eq!(scene.source.wait().0, Some(0));
    check_failed(scene.client, "in doubt");
}

#[test]
fn the_operator_is_heard_while_the_destination_does_not_answer() {
    if !has_kvm() {
        return;
    }
    let mut scene = in_doubt(&[], COMMIT, Then::Stopped);
    until_it_asks();
    assert_eq!(scene.source.info()["state"], "in-doubt");
    scene.source.tell(&["migrate", "--resolve", "resume"]);
    check_running(&mut scene.source);
    check_failed(scene.client, "");
}

#[test]
fn orders_to_end_are_heard_while_the_destination_does_not_answer() {
    if !has_kvm() {
        return;
    }
    for by_signal in [false, true] {
        let mut scene = in_doubt(&[], COMMIT, Then::Stopped);
        until_it_asks();
        if by_signal {
            scene.source.signal(Signal::TERM);
        } else {
            scene.source.tell(&["stop", "--force"]);
        }
        assert_eq!(scene.source.wait().0, Some(0));
        check_failed(scene.client, "in doubt");
    }
}

/// The destination never sees `Commit`, and the source hears nothing for ten seconds.
#[test]
fn a_signal_before_it_is_known_to_be_in_doubt_is_not_lost() {
    if !has_kvm() {
        return;
    }
    let mut source = Vm::start(Guest::dirtier(8, 300), &[]);
    source.read_some(1);
    let (destination, _) = Vm::listen(&[]);
    let relay = Relay::hiding(&destination.place.path("move.sock"), COMMIT);
    let client = source.start_move(&relay.uri(), &EASY);
    until("commits", || source.info()["migration"]["stage"] == "commitment");
    source.signal(Signal::TERM);
    assert_eq!(source.wait().0, Some(0));
    check_failed(client, "in doubt");
}

/// The operator errs: the destination runs the guest. When that one ends, the word counts no more.
#[test]
fn a_word_that_the_locks_refute_is_forgotten() {
    if !has_kvm() {
        return;
    }
    let place = Place::new();
    let disk = place.path("disk");
    std::fs::write(&disk, [0; 1 << 16]).unwrap();
    let mut scene = in_doubt(&["--disk", disk.to_str().unwrap()], ACTIVATED, Then::Nowhere);
    scene.destination.read_some(1);
    let output = scene.source.place.tell(&["migrate", "--resolve", "resume"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let err = String::from_utf8(output.stderr).unwrap();
    check_last_line(&err, &["in doubt", "lock is held"]);
    assert_eq!(scene.source.info()["state"], "in-doubt");
    scene.destination.tell(&["stop", "--force"]);
    scene.destination.wait();
    // More than one try.
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(scene.source.info()["state"], "in-doubt", "another copy ran");
    // Now that it holds nothing any more, the operator may have the older guest all the same.
    scene.source.tell(&["migrate", "--resolve", "resume"]);
    check_running(&mut scene.source);
}

/// Somebody takes the disk as soon as the source lets go of it, so that the guest can go on nowhere: to give it up isn't to
/// have moved it.
#[test]
fn a_guest_that_is_given_up_has_not_moved() {
    if !has_kvm() {
        return;
    }
    let place = Place::new();
    let disk = place.path("disk");
    std::fs::write(&disk, [0; 1 << 16]).unwrap();
    let mut source = Vm::start(Guest::counter(), &["--disk", disk.to_str().unwrap()]);
    source.wait_until_up();
    let thief = std::fs::File::options().write(true).open(&disk).unwrap();
    let (destination, _) = Vm::listen(&["--serial", "null"]);
    let (keeps, kept) = std::sync::mpsc::channel();
    // By now the source has let go of it, and the destination takes it at this word only.
    let steal = move || {
        fcntl_lock(&thief, FlockOperation::LockExclusive).unwrap();
        keeps.send(thief).unwrap();
    };
    let point = Point { kind: COMMIT, after: None, delivered: false };
    let relay = Relay::watching(&destination.place.path("move.sock"), point, steal);
    let client = source.start_move(&relay.uri(), &EASY);
    let _thief = kept.recv().unwrap();
    until("stands", || source.info()["state"] == "in-doubt");
    assert!(source.info()["message"].as_str().unwrap().contains("can't go on yet"));
    source.tell(&["migrate", "--resolve", "discard"]);
    check_failed(client, "the guest was discarded here");
    let (status, err) = source.wait();
    assert_eq!(status, Some(0), "{err}");
    assert!(err.ends_with("vmm: the guest was discarded here, as the operator said\n"), "{err}");
}
