//! `vmm migrate` cancelled when the destination has the whole guest already: the guest runs on at the source, and the listener
//! ends as after a cancel in pre-copy. And a dry run that is refused, which ends no listener.

mod support;

use std::process::Output;
use std::sync::mpsc::channel;
use std::time::Duration;

use rustix::process::Signal;
use support::guests::Guest;
use support::moves::{Answer, EASY, until};
use support::relay::{Point, Relay};
use support::vm::{Vm, has_kvm};
use vmm_migration::wire::record::{COMMIT, READY};

/// How long a message is held up.
const HELD: Duration = Duration::from_millis(500);

/// A guest that checks its memory, and prints a dot for each pass without a difference.
fn dirtier() -> Vm {
    let mut vm = Vm::start(Guest::dirtier(8, 0), &[]);
    vm.read_some(2);
    vm
}

/// Has something done while the first record of a type is held up between the ends. Gives the source, what its client was
/// told, and the status and the words with which the destination ended.
fn while_held(
    kind: u32,
    what: impl FnOnce(&Vm, &Vm) + Send,
) -> (Vm, Answer, (Option<i32>, String)) {
    let source = dirtier();
    let (mut destination, _) = Vm::listen(&[]);
    let point = Point { kind, after: None, delivered: false };
    let (held, is_held) = channel();
    let relay = Relay::watching(&destination.place.path("move.sock"), point, move || {
        let _ = held.send(());
        std::thread::sleep(HELD);
    });
    let client = source.start_move(&relay.uri(), &EASY);
    is_held.recv().unwrap();
    what(&source, &destination);
    let answer = client.wait();
    assert_eq!(destination.read_to_end(), b"", "a second copy ran");
    let end = destination.wait();
    (source, answer, end)
}

/// The guest goes on where it was.
fn check_stayed(mut source: Vm) {
    until("runs on", || source.info()["state"] == "running");
    assert!(source.read_some(2).iter().all(|c| *c == b'.'), "its memory changed");
}

fn check_cancelled(end: &(Option<i32>, String)) {
    let last = end.1.lines().last().unwrap_or_default();
    assert!(
        last.starts_with("vmm: the migration failed: ") && last.contains("cancelled"),
        "{end:?}"
    );
    assert_eq!(end.0, Some(1), "{end:?}");
}

#[test]
fn at_the_source_once_the_destination_is_ready() {
    if has_kvm() {
        let cancel = |source: &Vm, _: &Vm| drop(source.tell(&["migrate", "--cancel"]));
        let (source, answer, end) = while_held(READY, cancel);
        answer.check_failed(&["cancelled"]);
        check_cancelled(&end);
        check_stayed(source);
    }
}

#[test]
fn by_ctrl_c_at_the_destination_once_it_is_ready() {
    if has_kvm() {
        let interrupt = |_: &Vm, destination: &Vm| destination.signal(Signal::INT);
        let (source, answer, end) = while_held(COMMIT, interrupt);
        answer.check_failed(&["the destination says", "cancelled"]);
        check_cancelled(&end);
        check_stayed(source);
    }
}

#[test]
fn by_a_forced_stop_at_the_destination_once_it_is_ready() {
    if has_kvm() {
        let mut told = None;
        let stop = |_: &Vm, destination: &Vm| {
            told = Some(destination.place.tell(&["stop", "--force", "--json"]));
        };
        let (source, answer, end) = while_held(COMMIT, stop);
        answer.check_failed(&["the destination says", "cancelled"]);
        check_cancelled(&end);
        check_stayed(source);
        let Some(Output { status, stdout, .. }) = told else { panic!("nothing was asked") };
        assert!(status.success() && String::from_utf8_lossy(&stdout).contains("forced"));
    }
}

/// What a dry run finds missing is told on both sides; the listener waits on for the guest.
#[test]
fn a_refused_dry_run_ends_no_listener() {
    if has_kvm() {
        let mut source = dirtier();
        let disk = source.place.path("disk");
        std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
        let (mut destination, uri) = Vm::listen(&["--name", "there", "--net", "id=net0,tap=tap0"]);
        source.try_move(&uri, &["--dry-run"]).check_failed(&["net0"]);
        source.try_move(&uri, &["--dry-run"]).check_failed(&["net0"]);
        source.try_move(&uri, &[]).check_failed(&["net0"]);
        let (status, err) = destination.wait();
        let told = "vmm: a connection brought no guest: reservation: ";
        assert_eq!((status, err.matches(told).count()), (Some(1), 2), "{err}");
        assert!(source.read_some(2).iter().all(|c| *c == b'.'));
    }
}
