//! Orders that meet a migration, or are meant for the guest's life after it.

mod support;

use std::process::{Command, Stdio};

use serde_json::Value;
use support::guests::Guest;
use support::moves::{EASY, check_last_line, until};
use support::vm::{Place, Vm, binary, has_kvm};

/// `vmm stop` waits for a guest that doesn't hear its power button, and then goes.
#[test]
fn who_wants_a_guest_stopped_hears_that_it_has_gone() {
    if !has_kvm() {
        return;
    }
    let mut source = Vm::start(Guest::counter(), &[]);
    source.wait_until_up();
    let mut stop = Command::new(binary());
    stop.args(["stop", "--timeout", "10m"]).arg(source.place.path("vm.sock"));
    stop.stdin(Stdio::null()).stderr(Stdio::piped()).env_remove("VMM_LOG");
    let stop = stop.spawn().unwrap();
    until("asks", || source.has_thread("api-client"));
    // By now it has been heard.
    source.tell(&["info"]);
    let (mut destination, uri) = Vm::listen(&[]);
    source.move_to(&uri, &EASY);
    let output = stop.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    check_last_line(&String::from_utf8(output.stderr).unwrap(), &["the guest moved to unix:"]);
    assert_eq!(source.wait().0, Some(0));
    destination.read_some(1000);
}

/// It is told before anything moves; the guest moves all the same.
#[test]
fn a_kernel_that_is_missing_for_the_next_boot_is_named() {
    if !has_kvm() {
        return;
    }
    let mut source = Vm::start(Guest::counter(), &["--on-reboot", "reset"]);
    source.wait_until_up();
    let kernel = source.info()["config"]["boot"]["kernel"].as_str().unwrap().to_owned();
    let there = |source: &Vm, options: &[&str]| -> (Vm, Value) {
        let (destination, uri) = Vm::listen(&[]);
        let answer = source.try_move(&uri, &[options, &["--json", EASY[0], EASY[1]]].concat());
        assert_eq!(answer.status, Some(0), "{answer:?}");
        (destination, serde_json::from_str(&answer.out).unwrap())
    };
    let (_, report) = there(&source, &["--dry-run"]);
    assert_eq!(report["warnings"], serde_json::json!([]), "{report}");
    std::fs::remove_file(&kernel).unwrap();
    let (mut destination, report) = there(&source, &[]);
    let warning = report["warnings"][0].as_str().unwrap_or_default();
    let words = format!("can't reboot here, and ends where it does: kernel {kernel}: ");
    assert!(warning.contains(&words), "{report}");
    assert_eq!(source.wait().0, Some(0));
    destination.read_some(1000);
}

/// Who adds `--dry-run` to an order isn't obeyed in earnest.
#[test]
fn orders_take_no_options_of_a_move() {
    let place = Place::new();
    for (order, option) in [
        (&["--resolve", "discard", "--dry-run"][..], "--dry-run"),
        (&["--cancel", "--bandwidth", "1G"], "--bandwidth"),
        (&["--cancel", "--json"], "--json"),
    ] {
        let output = place.tell(&[&["migrate"], order].concat());
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let words = format!("{option} goes with neither --cancel nor --resolve");
        let err = String::from_utf8(output.stderr).unwrap();
        assert!(err.contains(&words), "{err}");
    }
}
