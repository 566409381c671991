//! The real binary with a real KVM and guests of a few instructions: a VM's whole life as its user sees
//! it, by console, signals, control socket and exit status. No guest here needs interrupts, so that a
//! software-only KVM will do.

#[path = "support/flat.rs"]
mod flat;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use flat::{Vm, World, endless, guest, text};
use rustix::process::Signal;
use serde_json::json;

#[test]
fn a_guest_that_powers_off_is_status_0() {
    let world = World::new(&guest().print("hello\n").power_off().spin());
    let (status, output, errors) = world.run(&[]).ends();
    assert_eq!((status, output.as_str(), errors.as_str()), (Some(0), "hello\n", ""));
    assert!(!world.path("vm.sock").exists());
}

#[test]
fn a_guest_that_fails_is_status_3_and_says_how() {
    for (end, words) in [
        (guest().triple_fault(), "vmm: the guest failed: a vCPU met a triple fault\n"),
        (guest().use_lapic().reset(), "vmm: the guest failed: it reset itself"),
    ] {
        let world = World::new(&guest().print("x").bytes(&end.0));
        let (status, output, errors) = world.run(&[]).ends();
        assert_eq!((status, output.as_str()), (Some(3), "x"), "{errors}");
        assert!(errors.starts_with(words) && errors.lines().count() == 1, "{errors}");
    }
}

#[test]
fn input_reaches_the_guest() {
    let world = World::new(&guest().print(">").echo().echo().power_off().spin());
    let mut vm = world.run(&[]);
    vm.reads(">");
    vm.types("ab");
    let (status, output, _) = vm.ends();
    assert_eq!((status, output.as_str()), (Some(0), "ab"));
}

#[test]
fn signals_end_it_with_status_0() {
    let world = World::new(&endless());
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        let mut vm = world.run(&[]);
        vm.reads("up");
        vm.signal(signal);
        let (status, _, errors) = vm.ends();
        assert_eq!((status, errors.as_str()), (Some(0), ""), "{signal:?}");
        assert!(!world.path("vm.sock").exists(), "{signal:?}");
    }
}

#[test]
fn a_signal_that_the_parent_ignores_is_ignored() {
    let world = World::new(&endless());
    let mut command = Command::new("sh");
    let line = r#"trap "" HUP; exec "$0" run --kernel kernel --mem 32M --control ./vm.sock"#;
    let binary = world.command().get_program().to_owned();
    command.args(["-c", line]).arg(binary).current_dir(world.dir.path());
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut vm = Vm { child: Some(child.expect("a shell")) };
    vm.reads("up");
    vm.signal(Signal::HUP);
    // It still answers after the signal, and another signal ends it.
    assert_eq!(world.json(&["info", "--json"])["state"], "running");
    assert!(vm.child().try_wait().expect("our child").is_none());
    vm.signal(Signal::TERM);
    assert_eq!(vm.ends().0, Some(0));
}

#[test]
fn it_is_shown_paused_resumed_and_stopped_by_force() {
    let world = World::new(&endless());
    let mut vm = world.run(&["--name", "life", "--cpus", "1"]);
    vm.reads("up");
    let info = world.json(&["info", "--json"]);
    assert_eq!((&info["state"], &info["pid"]), (&json!("running"), &json!(vm.child().id())));
    assert_eq!(
        (&info["config"]["name"], &info["config"]["ram_bytes"]),
        (&json!("life"), &json!(32 << 20))
    );
    assert_eq!(world.json(&["pause", "--json"])["state"], "paused");
    assert_eq!(world.json(&["pause", "--json"])["state"], "paused");
    assert_eq!(world.ask(&["stop"]).status.code(), Some(1));
    assert_eq!(world.json(&["resume", "--json"])["state"], "running");
    assert_eq!(
        world.json(&["stop", "--force", "--json"]),
        json!({ "ended": "forced", "forced": true })
    );
    assert!(!world.path("vm.sock").exists());
    assert_eq!(vm.ends().0, Some(0));
}

#[test]
fn the_power_button_is_heard_or_force_follows() {
    let hears = guest().print("up").await_bit(0x603, 1).print("bye").power_off().spin();
    let world = World::new(&hears);
    let mut vm = world.run(&[]);
    vm.reads("up");
    assert_eq!(world.json(&["stop", "--json"]), json!({ "ended": "power_off", "forced": false }));
    let (status, output, _) = vm.ends();
    assert_eq!((status, output.as_str()), (Some(0), "bye"));

    let world = World::new(&endless());
    let mut vm = world.run(&[]);
    vm.reads("up");
    let ended = world.json(&["stop", "--json", "--timeout", "100ms"]);
    assert_eq!(ended, json!({ "ended": "forced", "forced": true }));
    assert_eq!(vm.ends().0, Some(0));
}

#[test]
fn a_name_is_taken_while_its_vm_lives() {
    let world = World::new(&endless());
    let mut first = world.run(&[]);
    first.reads("up");
    let (status, _, errors) = world.run(&[]).ends();
    let pid = format!("in use by a live VM (pid {})", first.child().id());
    assert!(status == Some(1) && errors.contains(&pid), "{errors}");
    // Killed, it leaves its socket, and the next VM replaces it.
    first.child().kill().expect("the VM runs");
    assert_eq!(first.ends().0, None);
    assert!(world.path("vm.sock").exists());
    let dead = world.ask(&["info"]);
    assert!(text(&dead.stderr).contains("the VM is dead, only its socket is left"));
    let mut second = world.run(&[]);
    second.reads("up");
    second.signal(Signal::TERM);
    assert_eq!(second.ends().0, Some(0));
    assert!(!world.path("vm.sock").exists());
}

#[test]
fn a_request_that_is_under_way_at_the_end_is_answered() {
    // The guest tells that the button was pressed, so that the request surely is under way.
    let world = World::new(&guest().print("up").await_bit(0x603, 1).print("no").spin());
    let mut vm = world.run(&[]);
    vm.reads("up");
    let mut waiting = UnixStream::connect(world.path("vm.sock")).expect("it listens");
    waiting.write_all(b"PUT /vm/stop HTTP/1.1\r\n\r\n").expect("it reads");
    vm.reads("no");
    vm.signal(Signal::TERM);
    let mut answer = String::new();
    waiting.read_to_string(&mut answer).expect("it answers");
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("forced"), "{answer}");
    assert_eq!(vm.ends().0, Some(0));
}
