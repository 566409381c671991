//! `vmm run` with tiny assembly guests, on whatever KVM there is: how a machine starts and ends, stops and
//! goes on without losing an access, and how its console behaves.

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::guests::Guest;
use support::pty::{COOKED, Pty};
use support::vm::{LONG, Place, Vm, has_kvm};

/// Each byte of the counter is one more than the last.
fn check_count(next: &mut u8, bytes: &[u8]) {
    for (at, byte) in bytes.iter().enumerate() {
        assert_eq!(byte, next, "byte {at} of {}: a write was lost or doubled", bytes.len());
        *next = next.wrapping_add(1);
    }
}

fn check_flood(lines: usize, output: &[u8]) {
    let text = std::str::from_utf8(output).expect("hexadecimal digits");
    for (number, line) in text.lines().enumerate() {
        assert_eq!(line, format!("{number:07x}"), "line {number}");
    }
    assert_eq!(output.len(), 8 * lines, "whole");
}

fn lines_on_stderr(stderr: &str) -> Vec<&str> {
    stderr.lines().collect()
}

#[test]
fn a_guest_prints_and_powers_off() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::hello(), &[]);
    assert_eq!(vm.read_to_end(), b"hello\n");
    assert_eq!(vm.wait(), (Some(0), String::new()));
    assert!(!vm.place.path("vm.sock").exists(), "the control socket is removed");
}

#[test]
fn several_vcpus_and_much_memory_are_as_good() {
    if !has_kvm() {
        return;
    }
    for options in [&["--cpus", "4"][..], &["--mem", "5G"], &["--cpus", "2", "--mem", "3G"]] {
        let mut vm = Vm::start(Guest::hello(), options);
        assert_eq!(vm.read_to_end(), b"hello\n", "{options:?}");
        assert_eq!(vm.wait(), (Some(0), String::new()), "{options:?}");
    }
}

#[test]
fn a_triple_fault_is_the_guests_failure() {
    if !has_kvm() {
        return;
    }
    for options in [&[][..], &["--on-reboot", "reset"]] {
        let mut vm = Vm::start(Guest::triple_fault(), options);
        let (status, stderr) = vm.wait();
        assert_eq!(status, Some(3), "{options:?}");
        assert_eq!(lines_on_stderr(&stderr), ["vmm: the guest failed: a vCPU met a triple fault"]);
    }
}

#[test]
fn a_reset_ends_the_vm_or_boots_it_again() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::reset(), &[]);
    assert_eq!(vm.wait(), (Some(0), String::new()));
    let mut vm = Vm::start(Guest::reset_after_hello(), &["--on-reboot", "reset"]);
    assert!(vm.read_some(60).starts_with(b"hello\nhello\nhello\n"));
    vm.signal(Signal::TERM);
    vm.close_stdout();
    assert_eq!(vm.wait().0, Some(0));
}

#[test]
fn stops_lose_no_access_and_double_none() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::counter(), &["--cpus", "2"]);
    let mut next = 0;
    for _ in 0..30 {
        check_count(&mut next, &vm.read_some(200));
        vm.tell(&["pause"]);
        vm.tell(&["resume"]);
    }
    check_count(&mut next, &vm.read_some(2000));
}

#[test]
fn a_paused_guest_prints_nothing_and_goes_on_where_it_was() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::counter(), &[]);
    let mut next = 0;
    check_count(&mut next, &vm.read_some(1000));
    vm.tell(&["pause"]);
    assert!(vm.tell(&["info"]).contains("paused"));
    // What was printed before the pause; then silence.
    loop {
        match vm.read(Duration::from_millis(300)) {
            rest if rest.is_empty() => break,
            rest => check_count(&mut next, &rest),
        }
    }
    vm.tell(&["pause"]);
    vm.tell(&["resume"]);
    assert!(vm.tell(&["info"]).contains("running"));
    check_count(&mut next, &vm.read_some(1000));
}

#[test]
fn storms_of_port_and_memory_accesses_survive_stops() {
    if !has_kvm() {
        return;
    }
    for guest in [Guest::pio_storm(), Guest::mmio_storm()] {
        let mut vm = Vm::start(guest, &[]);
        let mut seen = vm.read_some(2);
        for _ in 0..20 {
            vm.tell(&["pause"]);
            vm.tell(&["resume"]);
        }
        seen.extend(vm.read_some(2));
        assert!(seen.iter().all(|b| *b == b'.'), "{:?}", String::from_utf8_lossy(&seen));
    }
}

#[test]
fn memory_that_is_dirtied_survives_stops() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::dirtier(32, 0), &[]);
    let mut seen = vm.read_some(3);
    for _ in 0..20 {
        vm.tell(&["pause"]);
        vm.tell(&["resume"]);
        seen.extend(vm.read_some(1));
    }
    assert!(seen.iter().all(|b| *b == b'.'), "{:?}", String::from_utf8_lossy(&seen));
}

#[test]
fn stop_presses_the_button_and_force_does_not_ask() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::button(), &[]);
    vm.wait_until_up();
    vm.tell(&["stop"]);
    assert_eq!(vm.wait(), (Some(0), String::new()));
    let mut vm = Vm::start(Guest::spin(), &[]);
    vm.wait_until_up();
    vm.tell(&["stop", "--force"]);
    assert_eq!(vm.wait(), (Some(0), String::new()));
    let mut vm = Vm::start(Guest::spin(), &[]);
    vm.wait_until_up();
    vm.tell(&["pause"]);
    vm.tell(&["stop", "--force"]);
    assert_eq!(vm.wait(), (Some(0), String::new()));
}

#[test]
fn a_signal_ends_the_vm_with_its_output_written() {
    if !has_kvm() {
        return;
    }
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        let mut vm = Vm::start(Guest::counter(), &[]);
        let mut next = 0;
        check_count(&mut next, &vm.read_some(100));
        vm.signal(signal);
        check_count(&mut next, &vm.read_to_end());
        assert_eq!(vm.wait(), (Some(0), String::new()), "{signal:?}");
    }
}

#[test]
fn input_is_echoed_whole_whatever_its_length() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::echo(), &[]);
    // Sent before the guest listens, and far more than the port's FIFO holds. Not a terminal: Ctrl-a
    // is a byte like others.
    let text: Vec<u8> = (0..4000u32).map(|i| (i % 251) as u8).map(|b| b.max(5)).collect();
    vm.type_in(&text);
    assert_eq!(vm.read_some(text.len()), text);
    vm.type_in(b"\x01x");
    assert_eq!(vm.read_some(2), b"\x01x");
    vm.tell(&["pause"]);
    vm.type_in(b"typed while paused");
    assert!(vm.read(Duration::from_millis(200)).is_empty());
    vm.tell(&["resume"]);
    assert_eq!(vm.read_some(18), b"typed while paused");
    // The end of input is not the VM's end.
    vm.type_in(b"last");
    vm.close_stdin();
    assert_eq!(vm.read_some(4), b"last");
    assert!(vm.tell(&["info"]).contains("running"));
}

#[test]
fn a_reader_that_sleeps_loses_nothing_and_holds_no_vcpu() {
    if !has_kvm() {
        return;
    }
    // More than the pipe holds, and the console before a guest that waits has to.
    const LINES: usize = 5000;
    for rude in [0, 1] {
        let mut vm = Vm::start_narrow(Guest::flood(LINES as u64, rude), &[]);
        vm.wait_until_up();
        std::thread::sleep(Duration::from_secs(3));
        // A guest that waits for the reader still runs, and a vCPU that stood still would not come home.
        // A rude one may have written all that it has by now, and ended.
        if rude == 0 {
            vm.tell(&["pause"]);
            vm.tell(&["resume"]);
        }
        check_flood(LINES, &vm.read_to_end());
        assert_eq!(vm.wait(), (Some(0), String::new()), "rude {rude}");
    }
}

#[test]
fn a_reader_that_goes_away_does_not_end_the_vm() {
    if !has_kvm() {
        return;
    }
    let mut vm = Vm::start(Guest::flood(1000, 0), &[]);
    vm.read_some(8);
    vm.close_stdout();
    let (status, stderr) = vm.wait();
    assert_eq!(status, Some(0));
    let lines = lines_on_stderr(&stderr);
    assert!(matches!(lines[..], [line] if line.contains("dropped")), "{lines:?}");
}

#[test]
fn a_terminal_is_raw_for_the_guest_and_restored_after_it() {
    if !has_kvm() {
        return;
    }
    for ending in ["quit", "signal", "power off", "stop"] {
        let place = Place::new();
        let mut pty = Pty::spawn(&place.run(Guest::echo(), &[]));
        pty.read_until("Ctrl-a x");
        pty.type_in(b"\x03\x1a\x01aready");
        pty.read_until("\x03\x1a\x01ready");
        assert!(!pty.modes().intersects(COOKED), "{ending}: raw");
        pty.type_in(b"\x01h");
        pty.read_until("end the VM\r\n");
        match ending {
            "quit" => pty.type_in(b"\x01x"),
            "power off" => pty.type_in(b"\x04"),
            "stop" => assert!(place.tell(&["stop", "--force"]).status.success()),
            _ => {
                let pid = i32::try_from(pty.child.id()).unwrap();
                let pid = rustix::process::Pid::from_raw(pid).unwrap();
                rustix::process::kill_process(pid, Signal::TERM).unwrap();
            }
        }
        assert!(pty.child.wait().unwrap().success(), "{ending}");
        assert!(pty.modes().contains(COOKED), "{ending}: restored");
    }
}

#[test]
fn ctrl_a_x_ends_a_vm_that_is_paused_or_deaf() {
    if !has_kvm() {
        return;
    }
    for paused in [false, true] {
        let place = Place::new();
        let mut pty = Pty::spawn(&place.run(Guest::spin(), &[]));
        pty.read_until("Ctrl-a x");
        let start = Instant::now();
        while !place.tell(&["info"]).status.success() {
            assert!(start.elapsed() < LONG);
        }
        if paused {
            assert!(place.tell(&["pause"]).status.success());
        }
        pty.type_in(&[b'.'; 500]);
        pty.type_in(b"\x01x");
        assert!(pty.child.wait().unwrap().success());
        assert!(pty.modes().contains(COOKED));
    }
}

#[test]
fn a_vm_in_the_background_leaves_the_terminal_alone_until_it_is_fetched() {
    if !has_kvm() {
        return;
    }
    let place = Place::new();
    let vmm = place.run(Guest::echo(), &[]);
    let mut shell = Command::new("sh");
    // A line typed at the shell brings the job to the foreground.
    shell.args(["-m", "-c", "\"$@\" & read line; fg", "sh"]);
    shell.arg(vmm.get_program()).args(vmm.get_args());
    let mut pty = Pty::spawn(&shell);
    pty.read_until("Ctrl-a x");
    assert!(pty.modes().contains(COOKED), "the shell's");
    // A VM that had read from the terminal would be stopped, and not answer.
    pty.type_in(b"typed at the shell");
    assert!(place.tell(&["info"]).status.success());
    pty.type_in(b"\n");
    let start = Instant::now();
    while pty.modes().intersects(COOKED) {
        assert!(start.elapsed() < LONG, "never raw");
    }
    pty.type_in(b"<guest's>");
    pty.read_until("<guest's>");
    pty.type_in(b"\x04");
    assert!(pty.child.wait().unwrap().success());
    assert!(pty.modes().contains(COOKED), "restored");
}

#[test]
fn an_error_after_the_console_opened_restores_the_terminal() {
    if !has_kvm() {
        return;
    }
    let place = Place::new();
    let kernel = place.path("nokernel");
    std::fs::write(&kernel, b"not a kernel").unwrap();
    let mut command = Command::new(support::vm::binary());
    command.args(["run", "--mem", "64M", "--kernel"]).arg(&kernel);
    command.arg("--control").arg(place.path("vm.sock"));
    let mut pty = Pty::spawn(&command);
    pty.read_until("nokernel");
    assert_eq!(pty.child.wait().unwrap().code(), Some(1));
    assert!(pty.modes().contains(COOKED));
}

#[test]
fn a_serial_socket_serves_the_guest() {
    if !has_kvm() {
        return;
    }
    let place = Place::new();
    let path = place.path("console");
    let serial = format!("unix:{}", path.display());
    let mut child = place.run(Guest::echo(), &["--serial", &serial]).spawn().unwrap();
    drop(talk(&path, "first"));
    let mut client = talk(&path, "second");
    client.write_all(b"\x04").unwrap();
    assert!(child.wait().unwrap().success());
    assert!(!path.exists(), "the socket is removed");
}

/// Becomes the one client of a console's socket, once it is there and free, and has a word echoed.
fn talk(path: &Path, word: &str) -> UnixStream {
    let start = Instant::now();
    loop {
        assert!(start.elapsed() < LONG, "nobody echoes {word}");
        let Ok(mut client) = UnixStream::connect(path) else { continue };
        client.set_read_timeout(Some(LONG)).unwrap();
        let mut echo = vec![0; word.len()];
        let echoed = client.write_all(word.as_bytes()).and_then(|()| client.read_exact(&mut echo));
        if echoed.is_ok() && echo == word.as_bytes() {
            return client;
        }
    }
}
