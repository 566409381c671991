//! Tests of the console with a serial port on a bus, and of the terminal in a child process on a pty.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use vmm_devices::bus::{Bus, SlotId};
use vmm_devices::irq::IrqLine;
use vmm_devices::serial::Serial;

use super::*;

#[path = "../../tests/support/pty.rs"]
mod pty;

use pty::{COOKED, Pty};

const LONG: Duration = Duration::from_secs(20);

struct NoLine;

impl IrqLine for NoLine {
    fn trigger(&self) {}
}

/// A serial port on a bus, as a guest that polls sees it.
struct Guest {
    bus: Arc<Bus>,
    slot: SlotId,
}

impl Guest {
    fn new(console: &Console) -> Self {
        let mut bus = Bus::default();
        let serial = Serial::new(Arc::new(NoLine), console.wire(), Arc::default());
        let slot = bus.insert(0x3f8..0x400, Box::new(serial)).unwrap();
        let guest = Self { bus: Arc::new(bus), slot };
        guest.attach(console);
        guest
    }

    fn attach(&self, console: &Console) {
        let (bus, slot) = (Arc::clone(&self.bus), self.slot);
        console.attach(Box::new(move |f| {
            bus.with_as(slot, |serial: &mut Serial| f(serial)).unwrap();
        }));
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.bus.read(0x3fd, &mut status);
        status[0]
    }

    fn send(&self, text: &[u8]) {
        for byte in text {
            self.bus.write(0x3f8, &[*byte]);
        }
    }

    /// Polls for `count` bytes of input.
    fn receive(&self, count: usize) -> Vec<u8> {
        let start = Instant::now();
        let mut all = Vec::new();
        while all.len() < count {
            assert!(start.elapsed() < LONG, "got only {all:?}");
            if self.status() & 1 == 0 {
                std::thread::yield_now();
                continue;
            }
            let mut byte = [0];
            self.bus.read(0x3f8, &mut byte);
            all.push(byte[0]);
        }
        all
    }
}

fn unix() -> (tempfile::TempDir, PathBuf, Console) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let (events, _) = channel();
    let console = Console::open(&SerialTarget::Unix(path.clone()), events).unwrap();
    (dir, path, console)
}

fn read_exactly(stream: &mut UnixStream, count: usize) -> Vec<u8> {
    stream.set_read_timeout(Some(LONG)).unwrap();
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_socket_carries_both_ways_and_clients_come_and_go() {
    let (_dir, path, console) = unix();
    let guest = Guest::new(&console);
    guest.send(b"boot\r\n");
    let mut first = UnixStream::connect(&path).unwrap();
    assert_eq!(read_exactly(&mut first, 6), b"boot\r\n");
    // More than the FIFO holds, and sent before the guest looks.
    let typed: Vec<u8> = (0..=255).cycle().take(1000).collect();
    first.write_all(&typed).unwrap();
    assert_eq!(guest.receive(typed.len()), typed);

    let mut second = UnixStream::connect(&path).unwrap();
    let mut told = String::new();
    second.set_read_timeout(Some(LONG)).unwrap();
    second.read_to_string(&mut told).unwrap();
    assert!(told.contains("another client"), "{told:?}");

    // What a client sent before it left still arrives, and its place is free.
    first.write_all(b"bye").unwrap();
    drop(first);
    assert_eq!(guest.receive(3), b"bye");
    let start = Instant::now();
    let mut third = loop {
        let mut third = UnixStream::connect(&path).unwrap();
        guest.send(b"$ ");
        if read_exactly(&mut third, 2) == b"$ " {
            break third;
        }
        assert!(start.elapsed() < LONG);
    };
    third.shutdown(std::net::Shutdown::Write).unwrap();
    guest.send(b"still here");
    let mut seen = Vec::new();
    while !seen.ends_with(b"still here") {
        seen.extend(read_exactly(&mut third, 1));
    }
    drop(console);
    assert!(!path.exists(), "the socket is removed");
}

#[test]
fn input_waits_while_the_machine_rests() {
    let (_dir, path, console) = unix();
    let mut guest = Guest::new(&console);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"1").unwrap();
    assert_eq!(guest.receive(1), b"1");
    assert_eq!(console.detach(), b"");
    let bus = Arc::get_mut(&mut guest.bus).expect("nobody else has the bus at rest");
    assert_eq!(bus.get_mut(guest.slot).kind(), "serial");
    client.write_all(b"2").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((0..3).map(|_| guest.status() & 1).max(), Some(0));
    guest.attach(&console);
    assert_eq!(guest.receive(1), b"2");
}

#[test]
fn a_file_is_appended_to_and_null_takes_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    for text in [&b"one "[..], b"two"] {
        let console = Console::open(&SerialTarget::File(path.clone()), channel().0).unwrap();
        Guest::new(&console).send(text);
        assert!(console.flush(LONG));
    }
    assert_eq!(std::fs::read(&path).unwrap(), b"one two");
    let console = Console::open(&SerialTarget::Null, channel().0).unwrap();
    let guest = Guest::new(&console);
    guest.send(&vec![0; 100_000]);
    assert_eq!(guest.status(), 0x60);
    assert_eq!(console.detach(), b"");
    assert!(console.flush(LONG));
}

#[test]
fn what_cannot_be_opened_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let open = |target| Console::open(&target, channel().0).err().map(|e| e.to_string());
    let path = dir.path().to_owned();
    let shown = path.display();
    assert_eq!(open(SerialTarget::File(path.clone())), Some(format!("--serial file:{shown}")));
    assert_eq!(
        open(SerialTarget::Unix(path.clone())),
        Some(format!("--serial unix:{shown}: exists and is not a socket: give another path"))
    );
    let path = path.join("s");
    let _holder = Console::open(&SerialTarget::Unix(path.clone()), channel().0).unwrap();
    let shown = path.display();
    assert_eq!(
        open(SerialTarget::Unix(path.clone())),
        Some(format!("--serial unix:{shown}: in use by a live VM: give another path"))
    );
}

// The terminal. The test starts itself again as a child whose controlling terminal is a new pty.

const ROLE: &str = "VMM_TEST_CONSOLE_ROLE";

/// The child: has the console, writes "ready", echoes one byte and goes out as its role says.
fn child(role: &str) {
    let (events, inbox) = channel();
    let console = Console::open(&SerialTarget::Stdio, events).unwrap();
    let guest = Guest::new(&console);
    guest.send(b"ready");
    if role == "quit" {
        wait_for_quit(&inbox);
    } else {
        guest.send(&guest.receive(1));
    }
    assert!(console.flush(LONG));
    match role {
        "panic" => panic!("as the test wants it"),
        "exit" => std::process::exit(7),
        "signal" => std::thread::sleep(LONG),
        "abort" => std::process::abort(),
        "overflow" => drop(overflow(1)),
        _ => {}
    }
}

/// A real fault, for whose handling std needs the alternate stack.
#[allow(unconditional_recursion, reason = "to overflow the stack")]
fn overflow(depth: u64) -> u64 {
    std::hint::black_box(overflow(std::hint::black_box(depth) + 1)) + depth
}

fn wait_for_quit(inbox: &Receiver<Event>) {
    let event = inbox.recv_timeout(LONG).unwrap();
    assert!(matches!(event, Event::ConsoleQuit), "{event:?}");
}

/// This test again, as the child, on a new terminal.
fn spawn(test: &str, role: &str) -> Pty {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--quiet"]).env(ROLE, role);
    Pty::spawn(&command)
}

#[test]
fn the_terminal_is_restored_on_every_way_out() {
    let test = "console::tests::the_terminal_is_restored_on_every_way_out";
    if let Ok(role) = std::env::var(ROLE) {
        return child(&role);
    }
    for role in ["end", "exit", "panic", "signal", "abort", "overflow", "quit"] {
        let mut pty = spawn(test, role);
        let note = pty.read_until("ready");
        assert!(note.contains("Ctrl-a x"), "{note}");
        assert!(!pty.modes().intersects(COOKED), "{role}: raw");
        // Ctrl-c and Ctrl-z are the guest's.
        pty.type_in(if role == "quit" { b"\x03\x1a\x01x" } else { b"\x03" });
        if role != "quit" {
            pty.read_until("\x03");
        }
        if role == "signal" {
            let pid = i32::try_from(pty.child.id()).unwrap();
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        }
        let status = pty.child.wait().unwrap();
        match role {
            "end" | "quit" => assert!(status.success(), "{role}: {status}"),
            "exit" => assert_eq!(status.code(), Some(7)),
            "panic" => assert_eq!(status.code(), Some(101)),
            _ => assert!(status.signal().is_some(), "{role}: {status}"),
        }
        assert!(pty.modes().contains(COOKED), "{role}: restored");
    }
}
