//! What a person sees of a migration, at a terminal and without one, with tiny guests on any KVM: the bar, what
//! becomes of it at the end, and Ctrl-C, at either end.

#[path = "support/screen.rs"]
mod screen;
mod support;

use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use screen::Screen;
use support::guests::Guest;
use support::moves::{EASY, listens, until};
use support::pty::{COOKED, Pty};
use support::vm::{Place, Vm, binary, has_kvm};

/// Slow enough for the bar to be drawn in each round, which lasts half a second.
const SLOW: [&str; 2] = ["--bandwidth", "64M"];

/// A VM that never stops writing to its 4 MiB, so slowly that its dots never fill the pipe, which would stop it.
fn dirtier() -> Vm {
    let mut vm = Vm::start(Guest::dirtier(4, 500), &["--name", "web"]);
    vm.read_some(2);
    vm
}

/// Starts to move it, at a terminal.
fn move_at_terminal(vm: &Vm, columns: u16, uri: &str, options: &[&str]) -> Pty {
    Pty::sized(&vm.move_command(uri, &[&SLOW, options].concat()), columns)
}

/// Reads all that a client at a terminal shows until it ends; gives its exit status.
fn watch(mut pty: Pty, screen: &mut Screen) -> Option<i32> {
    let (status, rest) = pty.read_to_end();
    screen.show(&rest);
    assert!(pty.modes().contains(COOKED), "{:?}", pty.modes());
    status
}

/// Whether a text is a number and then this, as `12.5 MiB/s` is one of bytes a second.
fn is_measure(text: &str, units: &[&str]) -> bool {
    units.iter().any(|unit| {
        let number = text.strip_suffix(unit).and_then(|text| text.strip_suffix(' '));
        number.is_some_and(|number| number.parse::<f64>().is_ok())
    })
}

fn is_number(text: &str) -> bool {
    text.parse::<u64>().is_ok()
}

/// A line of a narrow terminal with a downtime in it, and its parts; the first is the round.
#[track_caller]
fn measured(drawn: &[String]) -> (&String, Vec<&str>) {
    let later = drawn.iter().find(|line| line.starts_with("pre-copy ") && line.contains(", stop "));
    let later = later.unwrap_or_else(|| panic!("{drawn:#?}"));
    let parts: Vec<_> = later.split(", ").collect();
    assert!(parts[0].strip_prefix("pre-copy ").is_some_and(is_number), "{later}");
    (later, parts)
}

const BYTES: [&str; 3] = ["B", "KiB", "MiB"];
const RATES: [&str; 3] = ["B/s", "KiB/s", "MiB/s"];
const TIMES: [&str; 2] = ["ms", "s"];

/// Moves a VM at a terminal of this width, and gives the lines of the bar.
fn bar(columns: u16) -> Vec<String> {
    let mut source = dirtier();
    let (mut destination, uri) = Vm::listen(&[]);
    let options = ["--timeout", "3s", "--on-timeout", "stop-and-copy", "--downtime-limit", "1ms"];
    let mut screen = Screen::new(columns);
    let status = watch(move_at_terminal(&source, columns, &uri, &options), &mut screen);
    assert_eq!((status, screen.too_wide()), (Some(0), None));
    assert_eq!(source.wait().0, Some(0));
    destination.read_some(2);
    let drawn = screen.drawn.clone();
    // The report, and nothing of the bar.
    let left = screen.left();
    assert!(left[0].starts_with("moved web in "), "{left:?}");
    let beside = |line: &String| line.starts_with("forecast: ") && line.contains("; it was ");
    assert!(left.iter().any(beside), "{left:?}");
    assert!(!left.iter().any(|line| line.contains('\u{b7}') || line.contains("copy")), "{left:?}");
    drawn
}

#[test]
fn a_wide_terminal_shows_all() {
    if !has_kvm() {
        return;
    }
    let drawn = bar(140);
    for stage in ["pre-migration", "reservation", "pre-copy", "stop-and-copy"] {
        assert!(drawn.iter().any(|line| line.contains(stage)), "no {stage}: {drawn:#?}");
    }
    let first = drawn.iter().find(|line| line.contains("] pre-copy round 0 \u{b7} ")).unwrap();
    assert!(first.starts_with("[") && first.contains(" sent \u{b7} "), "{first}");
    // Once it is measured.
    let measured = |line: &&String| line.contains("] pre-copy ") && line.contains(" downtime ");
    let later = drawn.iter().find(measured).unwrap_or_else(|| panic!("{drawn:#?}"));
    let parts: Vec<_> = later.split(" \u{b7} ").collect();
    let [stage, sent, rate, left, downtime, dirties] = parts[..] else { panic!("{later}") };
    let stage = stage.trim_start_matches(['[', '#', '.']);
    assert!(stage.strip_prefix("] pre-copy round ").is_some_and(is_number), "{later}");
    assert!(sent.strip_suffix(" sent").is_some_and(|s| is_measure(s, &BYTES)), "{later}");
    assert!(is_measure(rate, &RATES), "{later}");
    assert!(left.strip_suffix(" left").is_some_and(|s| is_measure(s, &TIMES)), "{later}");
    assert!(downtime.strip_prefix("downtime ").is_some_and(|s| is_measure(s, &TIMES)), "{later}");
    assert!(dirties.strip_prefix("dirties ").is_some_and(|s| is_measure(s, &RATES)), "{later}");
}

#[test]
fn eighty_columns_show_all_but_the_bar() {
    if !has_kvm() {
        return;
    }
    let drawn = bar(80);
    assert!(drawn.iter().any(|line| line.starts_with('[')), "{drawn:#?}");
    let (later, parts) = measured(&drawn);
    let [left, stop, dirty, rate, bytes] = parts[1..] else { panic!("{later}") };
    assert!(left.strip_suffix(" left").is_some_and(|s| is_measure(s, &TIMES)), "{later}");
    assert!(stop.strip_prefix("stop ").is_some_and(|s| is_measure(s, &TIMES)), "{later}");
    assert!(dirty.strip_prefix("dirty ").is_some_and(|s| is_measure(s, &RATES)), "{later}");
    assert!(is_measure(rate, &RATES) && is_measure(bytes, &BYTES), "{later}");
}

#[test]
fn forty_columns_show_what_matters_most() {
    if !has_kvm() {
        return;
    }
    let drawn = bar(40);
    let (later, parts) = measured(&drawn);
    let [left, stop, ..] = parts[1..] else { panic!("{later}") };
    assert!(left.strip_suffix(" left").is_some_and(|s| is_measure(s, &TIMES)), "{later}");
    assert!(stop.strip_prefix("stop ").is_some_and(|s| is_measure(s, &TIMES)), "{later}");
}

#[test]
fn ctrl_c_cancels_and_leaves_the_terminal_in_order() {
    if !has_kvm() {
        return;
    }
    let mut source = dirtier();
    let (mut destination, uri) = Vm::listen(&[]);
    let mut screen = Screen::new(80);
    let mut pty = move_at_terminal(&source, 80, &uri, &[]);
    screen.show(&pty.read_until(", stop "));
    pty.type_in(b"\x03");
    assert_eq!(watch(pty, &mut screen), Some(1));
    let left = screen.left();
    let [line] = &left[..] else { panic!("{left:?}") };
    assert!(line.starts_with("vmm: ") && line.contains("cancelled"), "{line}");
    // Nothing of the bar, nor of the ^C that the terminal shows.
    assert!(!line.contains('^') && !line.contains(", stop "), "{line}");
    assert_eq!(source.info()["state"], "running");
    source.read_some(2);
    assert_eq!(destination.wait().0, Some(1));
}

/// A listener at a terminal, which waits for a guest.
fn listen_at_terminal(place: &Place) -> (Pty, String) {
    let uri = format!("unix:{}", place.path("move.sock").display());
    let mut command = Command::new(binary());
    command.args(["migrate", "--listen", &uri, "--control"]).arg(place.path("vm.sock"));
    let mut pty = Pty::sized(command.env_remove("VMM_LOG"), 80);
    pty.read_until("waiting for a guest");
    until("listens", || listens(&place.path("move.sock")));
    (pty, uri)
}

#[test]
fn ctrl_c_at_the_destination_cancels_too() {
    if !has_kvm() {
        return;
    }
    let mut source = dirtier();
    let place = Place::new();
    let (mut pty, uri) = listen_at_terminal(&place);
    let client = source.start_move(&uri, &SLOW);
    let mut screen = Screen::new(80);
    screen.show(&pty.read_until("pre-copy"));
    assert!(pty.modes().contains(COOKED), "{:?}", pty.modes());
    pty.type_in(b"\x03");
    assert_eq!(watch(pty, &mut screen), Some(1));
    let left = screen.left();
    let line = left.last().unwrap_or_else(|| panic!("{left:?}"));
    assert!(
        line.starts_with("vmm: the migration failed: ") && line.contains("cancelled"),
        "{left:?}"
    );
    client.wait().check_failed(&["the destination says", "cancelled"]);
    assert_eq!(source.info()["state"], "running");
    source.read_some(2);
}

#[test]
fn what_is_typed_before_the_guest_is_there_is_not_the_guests() {
    if !has_kvm() {
        return;
    }
    let source = Vm::start(Guest::echo(), &["--name", "web"]);
    source.wait_until_up();
    let place = Place::new();
    let (mut pty, uri) = listen_at_terminal(&place);
    pty.type_in(b"early\n");
    source.try_move(&uri, &EASY).check_moved();
    pty.read_until("this terminal is the guest's");
    pty.type_in(b"late\x04");
    let (status, shown) = pty.read_to_end();
    assert!(shown.ends_with("late") && !shown.contains("early"), "{shown:?}");
    assert_eq!(status, Some(0), "{shown:?}");
}

/// A VM that doesn't answer, for it stands still, is left behind by one more Ctrl-C.
#[test]
fn a_second_ctrl_c_does_not_wait_for_the_end() {
    if !has_kvm() {
        return;
    }
    let mut source = dirtier();
    let (_destination, uri) = Vm::listen(&[]);
    // Wide, for what the terminal shows of the keys.
    let mut screen = Screen::new(300);
    let mut pty = move_at_terminal(&source, 300, &uri, &[]);
    screen.show(&pty.read_until(" downtime "));
    source.signal(Signal::STOP);
    // Two that come together may be one signal.
    until("ends", || {
        pty.type_in(b"\x03");
        std::thread::sleep(Duration::from_millis(500));
        pty.child.try_wait().unwrap().is_some()
    });
    assert_eq!(watch(pty, &mut screen), Some(1));
    let left = screen.left();
    let [line] = &left[..] else { panic!("{left:?}") };
    assert!(line.starts_with("vmm: ") && line.contains("interrupted"), "{line}");
    // It hears of the first when it goes on.
    source.signal(Signal::CONT);
    until("runs on here", || source.info()["state"] == "running");
    source.read_some(2);
}

#[test]
fn without_a_terminal_each_stage_has_a_line() {
    if !has_kvm() {
        return;
    }
    let source = dirtier();
    let (_destination, uri) = Vm::listen(&[]);
    let options = ["--timeout", "3s", "--on-timeout", "stop-and-copy", "--downtime-limit", "1ms"];
    let answer = source.try_move(&uri, &[&SLOW[..], &options].concat());
    answer.check_moved();
    let stages = "vmm: pre-migration\nvmm: reservation\nvmm: pre-copy\nvmm: stop-and-copy\n";
    let rest = answer.err.strip_prefix(stages).unwrap_or_else(|| panic!("{answer:?}"));
    let known = ["vmm: commitment", "vmm: activation"];
    assert!(rest.lines().all(|line| known.contains(&line)), "{answer:?}");
}
