//! The guest's first sign at its destination, which ends the downtime that is told: of guests that give one and of
//! those that don't, and where it doesn't get through.

mod support;

use serde_json::Value;
use support::guests::Guest;
use support::moves::{Count, EASY, until};
use support::relay::{Point, Relay};
use support::vm::{Place, Vm, has_kvm};
use vmm_migration::wire::record;

/// The downtime in a moved guest's report.
fn downtime(report: &str) -> Value {
    let report: Value = serde_json::from_str(report).unwrap();
    assert_eq!(report["outcome"], "moved", "{report}");
    report["downtime"].clone()
}

/// Moves a counter through a relay; it goes on counting, and the first sign is told or isn't.
fn counter_over(relay: impl FnOnce(&Vm) -> Relay) -> Option<u64> {
    let mut source = Vm::start(Guest::counter(), &[]);
    let mut count = Count::default();
    count.check(&source.read_some(1000));
    let (mut destination, _) = Vm::listen(&[]);
    let relay = relay(&destination);
    let client = source.start_move(&relay.uri(), &["--json", EASY[0], EASY[1]]);
    count.check(&source.read_to_end());
    let answer = client.wait();
    assert_eq!(answer.status, Some(0), "{answer:?}");
    assert_eq!(source.wait().0, Some(0));
    count.check(&destination.read_some(20_000));
    let downtime = downtime(&answer.out);
    let sign = downtime["first_sign_us"].as_u64();
    let total = downtime["total_us"].as_u64().unwrap();
    assert!(Some(total) > sign, "{downtime}");
    sign
}

#[test]
fn a_guest_that_prints_gives_one() {
    if has_kvm() {
        let at = |vm: &Vm| Relay::hiding(&vm.place.path("move.sock"), u32::MAX);
        // On a busy machine it may come too late to be waited for.
        let sign = (0..10).find_map(|_| counter_over(at)).expect("one of ten in time");
        assert!(sign <= vmm_migration::message::FIRST_SIGN_US_MAX, "{sign}");
    }
}

#[test]
fn a_destination_that_does_not_announce_it_is_not_waited_for() {
    if has_kvm() {
        let at = |vm: &Vm| Relay::hiding(&vm.place.path("move.sock"), record::READS);
        assert_eq!(counter_over(at), None);
    }
}

#[test]
fn one_that_is_lost_is_just_missing() {
    if !has_kvm() {
        return;
    }
    let hidden = |vm: &Vm| Relay::hiding(&vm.place.path("move.sock"), record::FIRST_SIGN);
    assert_eq!(counter_over(hidden), None);
    let point = Point { kind: record::FIRST_SIGN, after: None, delivered: false };
    let cut = |vm: &Vm| Relay::start(&vm.place.path("move.sock"), point, || {});
    assert_eq!(counter_over(cut), None);
}

/// Moves a counter whose output goes out at once; gives its downtime. `None`: its first sign came too late to be waited
/// for, as it does on a busy machine.
fn flowing_over() -> Option<Value> {
    let place = Place::new();
    let console = place.path("console");
    let serial = format!("file:{}", console.display());
    let source = Vm::start(Guest::counter(), &["--serial", &serial]);
    source.wait_until_up();
    let (mut destination, _) = Vm::listen(&["--serial", "null"]);
    // It prints while its memory goes over, however busy this machine is: by more than may lie here unwritten.
    let printed = move || std::fs::metadata(&console).map_or(0, |file| file.len());
    let prints = move || {
        let before = printed();
        until("prints", || printed() > before + (32 << 10));
    };
    let point = Point { kind: record::ROUND_END, after: None, delivered: false };
    let relay = Relay::watching(&destination.place.path("move.sock"), point, prints);
    let answer = source.start_move(&relay.uri(), &["--json", EASY[0], EASY[1]]).wait();
    assert_eq!(answer.status, Some(0), "{answer:?}");
    destination.tell(&["stop", "--force"]);
    assert_eq!(destination.wait().0, Some(0));
    Some(downtime(&answer.out)).filter(|downtime| !downtime["first_sign_us"].is_null())
}

/// Both signs that an observer sees are known then, and what lies between them.
#[test]
fn a_guest_whose_output_flows_gives_a_last_one_too() {
    if !has_kvm() {
        return;
    }
    let downtime = (0..10).find_map(|_| flowing_over()).expect("one of ten in time");
    let us = |part: &str| downtime[part].as_u64().unwrap_or_else(|| panic!("{part}: {downtime}"));
    // It counts without pause: its last byte left it at or after the first kick.
    let running = us("total_us") - us("stop_us");
    assert!(us("silence_us") >= running, "{downtime}");
    assert!(us("silence_us") <= us("total_us") + 10_000_000, "{downtime}");
}

/// What runs without a pause and puts out nothing can't be seen; the move ends all the same.
#[test]
fn a_guest_that_spins_gives_none() {
    if !has_kvm() {
        return;
    }
    let mut source = Vm::start(Guest::spin(), &[]);
    source.wait_until_up();
    let (mut destination, uri) = Vm::listen_tcp(&[]);
    let answer = source.start_move(&uri, &["--json", EASY[0], EASY[1]]).wait();
    assert_eq!(answer.status, Some(0), "{answer:?}");
    let downtime = downtime(&answer.out);
    assert_eq!(downtime["first_sign_us"], Value::Null, "{downtime}");
    assert_eq!(downtime["silence_us"], Value::Null, "{downtime}");
    assert!(downtime["total_us"].as_u64() > Some(0), "{downtime}");
    assert_eq!(source.wait().0, Some(0));
    destination.tell(&["stop", "--force"]);
    assert_eq!(destination.wait().0, Some(0));
}
