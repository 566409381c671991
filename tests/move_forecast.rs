//! What is forecast of a move beside what comes, with tiny guests on any KVM: a guest that dirties all of its 4 MiB in
//! every round, over a link of known bandwidth.

mod support;

use serde_json::Value;
use support::guests::Guest;
use support::vm::{Vm, has_kvm};

/// Pages that the guest dirties, again and again.
const PAGES: f64 = 1024.0;
/// Bytes that the link carries in a second.
const RATE: f64 = 5e6;
const SLOW: [&str; 2] = ["--bandwidth", "40M"];
/// A downtime in which the 4 MiB go over.
const ENOUGH: [&str; 2] = ["--downtime-limit", "5s"];

/// Slow enough that its dots never fill the pipe, which would stop it.
fn dirtier() -> Vm {
    let mut vm = Vm::start(Guest::dirtier(4, 500), &[]);
    vm.read_some(2);
    vm
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value}"))
}

/// Not three times as much, and not a third.
#[track_caller]
fn check_near(what: &str, forecast: f64, came: f64) {
    assert!(
        forecast < came * 3.0 && came < forecast * 3.0,
        "{what}: {forecast} forecast, {came} came"
    );
}

/// The last line as JSON, of a client that succeeded.
fn report(vm: &Vm, uri: &str, options: &[&str]) -> Value {
    let answer = vm.try_move(uri, &[&SLOW[..], &["--json"], options].concat());
    assert_eq!(answer.status, Some(0), "{answer:?}");
    serde_json::from_str(&answer.out).unwrap()
}

#[test]
fn it_comes_as_forecast() {
    if !has_kvm() {
        return;
    }
    let source = dirtier();
    let (mut destination, uri) = Vm::listen(&[]);
    let before = report(&source, &uri, &[&ENOUGH[..], &["--dry-run"]].concat());
    assert_eq!((&before["outcome"], &before["downtime"]), (&"not-moved".into(), &Value::Null));
    let came = report(&source, &uri, &ENOUGH);
    destination.read_some(2);
    // The first round's, and the stop's.
    assert!(number(&came["sent_bytes"]) > 2.0 * 4096.0 * PAGES, "{came}");
    let downtime = &came["downtime"];
    let to_running =
        number(&downtime["total_us"]) - downtime["first_sign_us"].as_f64().unwrap_or(0.0);
    // The dry run's, and that of the move itself.
    for forecast in [&before["forecast"], &came["forecast"]] {
        assert_eq!(forecast["converges"], true, "{forecast}");
        check_near("bytes", number(&forecast["bytes"]), number(&came["sent_bytes"]));
        check_near("time", number(&forecast["total_us"]), number(&came["total_us"]));
        check_near("downtime", number(&forecast["downtime_us"]), to_running);
        check_near("bytes a second", number(&forecast["send_bytes_per_s"]), RATE);
    }
    check_near("pages", number(&before["forecast"]["dirty_pages_per_s"]), PAGES);
}

#[test]
fn what_does_not_converge_is_told() {
    if !has_kvm() {
        return;
    }
    let mut source = dirtier();
    let (_destination, uri) = Vm::listen(&[]);
    let before = report(&source, &uri, &["--dry-run"]);
    assert_eq!(before["forecast"]["converges"], false, "{before}");
    let answer = source.try_move(&uri, &[&SLOW[..], &["--dry-run"]].concat());
    assert!(answer.out.starts_with("will not converge at this bandwidth"), "{answer:?}");
    let tried = [&SLOW[..], &["--timeout", "2s"]].concat();
    source.try_move(&uri, &tried).check_failed(&["no convergence: a stop would take "]);
    source.read_some(2);
}
