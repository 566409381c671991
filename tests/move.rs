//! `vmm migrate` between real processes, with tiny guests on any KVM: over every kind of link, idle and
//! dirtying, to and fro, paused, with a disk; and what it leaves alone when it only forecasts.

mod support;

use std::process::Command;

use serde_json::{Value, json};
use support::guests::Guest;
use support::moves::{Count, EASY, until};
use support::vm::{Place, Vm, binary, has_kvm};

/// A count that goes on where it was, in what the source printed and then the destination.
fn the_count_goes_on(mut source: Vm, (mut destination, uri): (Vm, String)) {
    let mut count = Count::default();
    count.check(&source.read_some(1000));
    count.check(&source.move_to(&uri, &EASY));
    let (status, stderr) = source.wait();
    assert_eq!(status, Some(0));
    assert!(stderr.starts_with(&format!("vmm: the guest moved to {uri} with a downtime of ")));
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    count.check(&destination.read_some(20_000));
    assert!(!source.place.path("vm.sock").exists(), "the source's control socket is removed");
    destination.tell(&["stop", "--force"]);
    count.check(&destination.read_to_end());
    let (status, stderr) = destination.wait();
    assert_eq!(status, Some(0), "{stderr}");
}

#[test]
fn over_a_unix_socket() {
    if has_kvm() {
        let destination = Vm::listen(&[]);
        let socket = destination.0.place.path("move.sock");
        the_count_goes_on(Vm::start(Guest::counter(), &[]), destination);
        assert!(!socket.exists(), "the destination's socket is removed");
    }
}

#[test]
fn over_tcp() {
    if has_kvm() {
        the_count_goes_on(Vm::start(Guest::counter(), &["--cpus", "2"]), Vm::listen_tcp(&[]));
    }
}

#[test]
fn through_a_command() {
    if !has_kvm() {
        return;
    }
    let mut source = Vm::start(Guest::counter(), &[]);
    let mut count = Count::default();
    count.check(&source.read_some(1000));
    let there = Place::new();
    let (console, socket) = (there.path("console"), there.path("vm.sock"));
    let uri = format!(
        "exec:{} migrate --listen stdio --serial file:{} --control {}",
        binary().display(),
        console.display(),
        socket.display()
    );
    let client = source.start_move(&uri, &["--json", EASY[0], EASY[1]]);
    count.check(&source.read_to_end());
    let answer = client.wait();
    assert_eq!(answer.status, Some(0), "{answer:?}");
    let report: serde_json::Value = serde_json::from_str(&answer.out).unwrap();
    assert!(report["downtime"]["total_us"].as_u64() > Some(0), "{report}");
    // Of its 64 MiB it has touched a few pages, in whole huge ones where there are any.
    let first_round = report["rounds"][0]["pages"].as_u64().unwrap();
    assert!((1..16384 / 4).contains(&first_round), "{report}");
    for line in answer.err.lines() {
        let progress: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(progress["stage"].is_string(), "{line}");
    }
    until("prints there", || std::fs::metadata(&console).is_ok_and(|file| file.len() > 10_000));
    assert!(there.tell(&["stop", "--force"]).status.success());
    until("has ended there", || !socket.exists());
    count.check(&std::fs::read(&console).unwrap());
    assert_eq!(source.wait().0, Some(0));
}

#[test]
fn one_listener_takes_guest_after_guest() {
    if !has_kvm() {
        return;
    }
    let consoles = Place::new();
    let serial = format!("file:{}", consoles.path("{name}.log").display());
    let (mut listener, uri) = Vm::keep(&["--serial", &serial]);
    let sockets = listener.place.path("");
    let there = |command: &[&str]| {
        let mut client = Command::new(binary());
        client.args(command).env("XDG_RUNTIME_DIR", &sockets);
        client.output().unwrap()
    };
    // Both at the same time, each slow enough to be sure of that.
    let names = [1, 2].map(|n| format!("keep-{}-{n}", std::process::id()));
    let mut sources = names.each_ref().map(|name| {
        let mut vm = Vm::start(Guest::counter(), &["--name", name]);
        let mut count = Count::default();
        count.check(&vm.read_some(1000));
        (vm, count)
    });
    let slow = ["--bandwidth", "20M", EASY[0], EASY[1]];
    let clients = sources.each_ref().map(|(vm, _)| vm.start_move(&uri, &slow));
    for (((source, count), client), name) in sources.iter_mut().zip(clients).zip(&names) {
        count.check(&source.read_to_end());
        client.wait().check_moved();
        assert_eq!(source.wait().0, Some(0));
        let console = consoles.path(&format!("{name}.log"));
        until("prints there", || std::fs::metadata(&console).is_ok_and(|f| f.len() > 10_000));
    }
    // They survive the listener.
    listener.signal(rustix::process::Signal::INT);
    until("no longer listens", || !listener.place.path("move.sock").exists());
    for ((_, count), name) in sources.iter_mut().zip(&names) {
        let stopped = there(&["stop", "--force", name]);
        assert!(stopped.status.success(), "{stopped:?}");
        until("has ended", || !there(&["info", name]).status.success());
        count.check(&std::fs::read(consoles.path(&format!("{name}.log"))).unwrap());
    }
    let (status, err) = listener.wait();
    assert_eq!(status, Some(0), "{err}");
    assert!(names.iter().all(|name| err.contains(&format!("vmm: {name} is here\n"))), "{err}");
}

/// It checks its own memory, and prints a dot for each pass over it without a difference.
fn check_dirtier(vm: &mut Vm) {
    let dots = vm.read_some(20);
    assert!(dots.iter().all(|c| *c == b'.'), "its memory changed: {dots:?}");
}

#[test]
fn while_it_dirties_its_memory() {
    if !has_kvm() {
        return;
    }
    let mut source = Vm::start(Guest::dirtier(16, 0), &[]);
    check_dirtier(&mut source);
    let (mut destination, uri) = Vm::listen(&[]);
    let options = ["--timeout", "1s", "--on-timeout", "stop-and-copy", "--downtime-limit", "1ms"];
    let rest = source.move_to(&uri, &options);
    assert!(rest.iter().all(|c| *c == b'.'), "{rest:?}");

    check_dirtier(&mut destination);
    // On it goes, slowed down until it converges.
    let (mut third, uri) = Vm::listen(&[]);
    let options = ["--timeout", "1s", "--on-timeout", "throttle", "--downtime-limit", "2s"];
    let rest = destination.move_to(&uri, &options);
    assert!(rest.iter().all(|c| *c == b'.'), "{rest:?}");

    check_dirtier(&mut third);
}

/// A guest of which vCPU 0 dirties 16 MiB over and over, and vCPU 1 sleeps. It idles so long that in a hundredth of its time it can't
/// dirty more than a fast host sends.
fn lopsided() -> Vm {
    let mut vm = Vm::start(Guest::dirtier(16, 1_500), &["--cpus", "2"]);
    check_dirtier(&mut vm);
    vm
}
/// Two thirds of a second for these, in which a vCPU that a busy host keeps waiting dirties most of them too.
const THIN: [&str; 6] = ["--bandwidth", "200M", "--timeout", "5s", "--on-timeout", "throttle"];

/// Nothing slows it down: the thread that does is gone.
fn check_unthrottled(vm: &Vm) {
    // Its control thread answers when the move is over there.
    vm.info();
    assert!(!vm.has_thread("throttle"));
}

#[test]
fn the_vcpu_that_dirties_is_throttled() {
    if !has_kvm() {
        return;
    }
    let mut source = lopsided();
    let (mut destination, uri) = Vm::listen(&[]);
    let options = [&THIN[..], &["--json", "--downtime-limit", "200ms"]].concat();
    let answer = source.try_move(&uri, &options);
    assert_eq!(answer.status, Some(0), "{answer:?}");
    assert!(source.read_to_end().iter().all(|c| *c == b'.'));
    let report: Value = serde_json::from_str(&answer.out).unwrap();
    let list = |round: &Value, field: &str| -> Vec<u64> {
        round[field].as_array().unwrap().iter().map(|number| number.as_u64().unwrap()).collect()
    };
    let rounds = report["rounds"].as_array().unwrap();
    let (_, pre_copy) = rounds.split_last().unwrap();
    for round in pre_copy {
        let (all, pages) = (round["dirty_pages"].as_u64().unwrap(), list(round, "dirty_by_vcpu"));
        assert!(pages.len() == 2 && pages[0] >= 9 * pages[1] && pages[0] <= all, "{round}");
    }
    let throttles = pre_copy.iter().map(|round| list(round, "throttle_percent"));
    let throttles: Vec<_> = throttles.filter(|percent| !percent.is_empty()).collect();
    assert!(!throttles.is_empty(), "{report}");
    assert!(throttles.iter().all(|percent| percent[0] >= 20 && percent[1] <= 5), "{throttles:?}");
    check_dirtier(&mut destination);
    check_unthrottled(&destination);
}

/// Moves a guest that can't move so fast, until it is throttled, and cancels that; then it goes on here. `None`: the
/// move came to its end before, as it does if a busy host kept the guest waiting, or these processes for seconds.
fn cancelled_once_throttled() -> Option<Vm> {
    let source = lopsided();
    let (_destination, uri) = Vm::listen(&[]);
    let options = [&THIN[..], &["--json", "--downtime-limit", "1ms"]].concat();
    let mut client = source.start_move(&uri, &options);
    client.until_told(|progress| progress["throttle_percent"].as_u64() > Some(0));
    // The client's end tells whether that was in time.
    source.place.tell(&["migrate", "--cancel"]);
    let answer = client.wait();
    let last = answer.err.lines().last().unwrap_or_default();
    (answer.status == Some(1) && last.contains("cancelled")).then_some(source)
}

#[test]
fn a_throttle_that_came_to_nothing_is_lifted() {
    if !has_kvm() {
        return;
    }
    let mut source = (0..10).find_map(|_| cancelled_once_throttled()).expect("one of ten in time");
    check_unthrottled(&source);
    check_dirtier(&mut source);
}

#[test]
fn ten_times_to_and_fro() {
    if !has_kvm() {
        return;
    }
    let mut count = Count::default();
    let mut here = Vm::start(Guest::counter(), &["--name", "wanderer"]);
    for turn in 0..10 {
        let (there, uri) = if turn % 2 == 0 { Vm::listen(&[]) } else { Vm::listen_tcp(&[]) };
        count.check(&here.read_some(1000));
        count.check(&here.move_to(&uri, &EASY));
        assert_eq!(here.wait().0, Some(0), "move {turn}");
        here = there;
    }
    count.check(&here.read_some(10_000));
    assert_eq!(here.info()["config"]["name"], "wanderer");
}

#[test]
fn what_is_typed_arrives_once() {
    if !has_kvm() {
        return;
    }
    let mut here = Vm::start(Guest::echo(), &[]);
    for word in [&b"here"[..], b"there", b"and back"] {
        here.type_in(word);
        assert_eq!(here.read_some(word.len()), word);
        let (there, uri) = Vm::listen(&[]);
        here.try_move(&uri, &EASY).check_moved();
        assert_eq!(here.read_to_end(), b"");
        here = there;
    }
    here.type_in(b"end\x04");
    assert_eq!(here.read_to_end(), b"end");
    assert_eq!(here.wait().0, Some(0), "a guest that powers off ends the destination's process");
}

/// The guest prints more than its console takes, and nobody reads until after the move has begun.
#[test]
fn a_console_that_is_read_late_loses_nothing() {
    if !has_kvm() {
        return;
    }
    let mut source = Vm::start_narrow(Guest::flood(4000, 0), &[]);
    let mut text = source.read_some(1);
    let (mut destination, uri) = Vm::listen(&[]);
    let client = source.start_move(&uri, &EASY);
    until("is on its way", || {
        let info = source.place.tell(&["info", "--json"]);
        let info: Value = serde_json::from_slice(&info.stdout).unwrap_or_default();
        let stage = info["migration"]["stage"].as_str().unwrap_or_default();
        // Or it has gone.
        info.is_null() || !["", "pre-migration", "reservation"].contains(&stage)
    });
    text.extend(source.read_to_end());
    client.wait().check_moved();
    text.extend(destination.read_to_end());
    let text = String::from_utf8(text).unwrap();
    for (number, line) in text.lines().enumerate() {
        assert_eq!(line, format!("{number:07x}"));
    }
    assert_eq!(text.len(), 8 * 4000);
}

#[test]
fn paused_it_arrives_paused() {
    if !has_kvm() {
        return;
    }
    let mut source = Vm::start(Guest::counter(), &[]);
    let mut count = Count::default();
    count.check(&source.read_some(1000));
    source.tell(&["pause"]);
    let (mut destination, uri) = Vm::listen(&[]);
    count.check(&source.move_to(&uri, &EASY));
    assert_eq!(destination.info()["state"], "paused");
    destination.tell(&["resume"]);
    count.check(&destination.read_some(1000));
}

#[test]
fn a_dry_run_moves_nothing() {
    if !has_kvm() {
        return;
    }
    let mut source = Vm::start(Guest::dirtier(8, 0), &[]);
    check_dirtier(&mut source);
    let (mut destination, uri) = Vm::listen(&[]);
    let answer = source.try_move(&uri, &["--dry-run", "--bandwidth", "1M"]);
    assert_eq!(answer.status, Some(0), "{answer:?}");
    assert!(answer.out.starts_with("will not converge at this bandwidth"), "{answer:?}");
    check_dirtier(&mut source);
    assert_eq!(source.info()["state"], "running");
    // The destination waits on, and takes the guest when it comes in earnest.
    let answer = source.try_move(&uri, &["--dry-run", EASY[0], EASY[1]]);
    assert!(answer.out.starts_with("it would converge: about "), "{answer:?}");
    source.move_to(&uri, &EASY);
    check_dirtier(&mut destination);
}

#[test]
fn a_disk_has_one_owner_at_a_time() {
    if !has_kvm() {
        return;
    }
    let disks = Place::new();
    let image = disks.path("image");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let option = format!("{},id=data", image.display());
    let refused = |holder: &Vm| {
        let place = Place::new();
        let output = place.run(Guest::hello(), &["--disk", &option]).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(&format!("pid {}", holder.info()["pid"])), "{stderr}");
    };
    let mut source = Vm::start(Guest::counter(), &["--disk", &option]);
    source.wait_until_up();
    refused(&source);
    // By another name, at the destination.
    let link = disks.path("link");
    std::os::unix::fs::symlink(&image, &link).unwrap();
    let there = format!("id=data,path={}", link.display());
    let (destination, uri) = Vm::listen(&["--disk", &there]);
    source.move_to(&uri, &EASY);
    refused(&destination);
    assert_eq!(destination.info()["config"]["disks"][0]["path"], json!(link));
    drop(destination);
    let output = Place::new().run(Guest::hello(), &["--disk", &option]).output().unwrap();
    assert!(output.status.success(), "the lock outlives its holder: {output:?}");
}

#[test]
fn a_vm_may_end_where_it_went() {
    if !has_kvm() {
        return;
    }
    let mut source = Vm::start(Guest::button(), &[]);
    source.wait_until_up();
    let (mut destination, uri) = Vm::listen(&["--name", "other", "--serial", "null"]);
    source.try_move(&uri, &EASY).check_moved();
    assert_eq!(source.wait().0, Some(0));
    assert_eq!(destination.info()["config"]["name"], "other");
    destination.tell(&["stop"]);
    assert_eq!(destination.wait().0, Some(0));
    let gone = Command::new(binary()).args(["info", "other"]).output().unwrap();
    assert_eq!(gone.status.code(), Some(1));
}
