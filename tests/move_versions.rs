//! Moves between releases of `vmm`: a source writes each section, and pages, in a version that its destination reads.
//! And what version 2 of the serial port's section is for: what was typed and not yet read moves with the guest.

mod support;

use support::guests::Guest;
use support::moves::{Count, EASY};
use support::pty::Pty;
use support::relay::Relay;
use support::vm::{Place, Vm, has_kvm};
use vmm_migration::wire::record;

/// A guest goes over a relay; gives the versions in which its serial port went (as an example, and at last), and the
/// types of the records in which its pages did.
fn moved_over(hidden: u32) -> (Vec<u16>, Vec<u32>) {
    let mut source = Vm::start(Guest::counter(), &[]);
    let mut count = Count::default();
    count.check(&source.read_some(1000));
    let (mut destination, _) = Vm::listen(&[]);
    let relay = Relay::hiding(&destination.place.path("move.sock"), hidden);
    count.check(&source.move_to(&relay.uri(), &EASY));
    count.check(&destination.read_some(20_000));
    assert_eq!(relay.versions("power"), [1, 1]);
    let pages = [record::PAGES, record::PAGES2].into_iter().filter(|kind| relay.has_passed(*kind));
    (relay.versions("serial"), pages.collect())
}

/// Pages go with the checksum that is faster on this processor: all of them.
#[test]
fn to_this_release() {
    if has_kvm() {
        let (serial, pages) = moved_over(u32::MAX);
        assert_eq!(serial, [2, 2]);
        assert!(pages == [record::PAGES] || pages == [record::PAGES2], "{pages:?}");
    }
}

/// A destination that doesn't say what it reads, as before there was a version 2: the source writes what that one
/// reads, and the destination here reads what such a source wrote.
#[test]
fn to_and_from_the_release_before() {
    if has_kvm() {
        assert_eq!(moved_over(record::READS), (vec![1, 1], vec![record::PAGES]));
    }
}

#[test]
fn what_is_typed_to_a_paused_guest_moves_with_it() {
    if !has_kvm() {
        return;
    }
    let place = Place::new();
    let mut pty = Pty::spawn(&place.run(Guest::echo(), &[]));
    // The terminal is raw from here on.
    pty.read_until("Ctrl-a");
    pty.type_in(b"ready");
    pty.read_until("ready");
    assert!(place.tell(&["pause"]).status.success());
    let typed: Vec<u8> = (0..500).map(|i| b"0123456789abcdefghijk"[i % 21]).collect();
    pty.type_in(&typed);
    pty.until_read();
    let (mut destination, uri) = Vm::listen(&[]);
    let moved = place.tell(&["migrate", "--connect", &uri, EASY[0], EASY[1]]);
    assert!(moved.status.success(), "{moved:?}");
    assert!(pty.child.wait().unwrap().success());
    destination.tell(&["resume"]);
    assert_eq!(destination.read_some(typed.len()), typed);
    // What is typed there comes after it.
    destination.type_in(b"and on");
    assert_eq!(destination.read_some(6), b"and on");
}
