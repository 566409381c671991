//! The real binary with a real KVM and guests of a few instructions: a VM's whole life as its user sees
//! it, by console, signals, control socket and exit status. No guest here needs interrupts, so that a
//! software-only KVM will do.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(60);

/// Instructions of a guest that runs at 1 MiB in 64-bit mode.
#[derive(Default)]
struct Guest(Vec<u8>);

impl Guest {
    fn bytes(mut self, bytes: &[u8]) -> Guest {
        self.0.extend_from_slice(bytes);
        self
    }

    /// `mov dx, port; mov al, value; out dx, al`
    fn out(self, port: u16, value: u8) -> Guest {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }

    fn print(self, text: &str) -> Guest {
        text.bytes().fold(self, |guest, byte| guest.out(0x3f8, byte))
    }

    /// Sleep type 5, sleep enable.
    fn power_off(self) -> Guest {
        self.out(0x600, 5 << 2 | 1 << 5)
    }

    /// The keyboard controller's reset line.
    fn reset(self) -> Guest {
        self.out(0x64, 0xfe).spin()
    }

    /// `or dword [0xfee000f0], 0x100`: the local APIC in use, as a kernel has it when it panics.
    fn use_lapic(self) -> Guest {
        self.bytes(&[0xb8, 0xf0, 0x00, 0xe0, 0xfe]) // mov eax, 0xfee000f0
            .bytes(&[0x8b, 0x18]) // mov ebx, [rax]
            .bytes(&[0x81, 0xcb, 0, 1, 0, 0]) // or ebx, 0x100
            .bytes(&[0x89, 0x18]) // mov [rax], ebx
    }

    /// An interrupt table of no length, and an invalid instruction.
    fn triple_fault(self) -> Guest {
        self.bytes(&[0x0f, 0x01, 0x1d, 2, 0, 0, 0, 0x0f, 0x0b]).bytes(&[0; 10])
    }

    /// `jmp $`
    fn spin(self) -> Guest {
        self.bytes(&[0xeb, 0xfe])
    }

    /// Until a bit is set in what a port reads as: `mov dx, port; L: in al, dx; test al, bit; jz L`
    fn await_bit(self, port: u16, bit: u8) -> Guest {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0x66, 0xba, low, high, 0xec, 0xa8, bit, 0x74, 0xfb])
    }

    /// One byte from the serial port to the serial port.
    fn echo(self) -> Guest {
        self.await_bit(0x3fd, 1).bytes(&[0x66, 0xba, 0xf8, 0x03, 0xec, 0xee])
    }

    /// An ELF of one segment.
    fn elf(&self) -> Vec<u8> {
        const BASE: u64 = 0x10_0000;
        const HEAD: u64 = 64 + 56;
        let length = self.0.len() as u64;
        let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        elf.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64, version 1
        for word in [BASE, 64, 0] {
            elf.extend(word.to_le_bytes()); // entry, program headers, section headers
        }
        elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
        elf.extend([1, 0, 0, 0, 5, 0, 0, 0]); // PT_LOAD, readable and executable
        for word in [HEAD, BASE, BASE, length, length, 4096] {
            elf.extend(word.to_le_bytes());
        }
        elf.extend(&self.0);
        elf
    }
}

/// A directory with a guest's kernel in it.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new(guest: &Guest) -> World {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("kernel"), guest.elf()).expect("a file");
        World { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self) -> Command {
        let binary = std::env::var_os("VMM_BIN");
        let mut command = Command::new(binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_vmm").into()));
        command.current_dir(self.dir.path()).env_remove("VMM_LOG").stdin(Stdio::null());
        command
    }

    /// `vmm run` of the guest, with its control socket at `vm.sock`.
    fn run(&self, more: &[&str]) -> Vm {
        let mut command = self.command();
        let args = ["run", "--kernel", "kernel", "--mem", "32M", "--control", "./vm.sock"];
        command.args(args).args(more).stdout(Stdio::piped()).stderr(Stdio::piped());
        Vm { child: Some(command.stdin(Stdio::piped()).spawn().expect("the binary runs")) }
    }

    /// A client's command on this VM.
    fn ask(&self, args: &[&str]) -> Output {
        self.command().args(args).arg("./vm.sock").output().expect("the binary runs")
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.ask(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }
}

/// A VM's process; killed if a test ends before it.
struct Vm {
    child: Option<Child>,
}

impl Vm {
    fn child(&mut self) -> &mut Child {
        self.child.as_mut().expect("the VM runs")
    }

    /// Waits for a text on the console.
    fn reads(&mut self, wanted: &str) {
        let stdout = self.child().stdout.as_mut().expect("piped");
        let mut bytes = vec![0; wanted.len()];
        stdout.read_exact(&mut bytes).expect("output");
        assert_eq!(text(&bytes), wanted);
    }

    fn signal(&mut self, signal: Signal) {
        let pid = Pid::from_child(self.child());
        kill_process(pid, signal).expect("the VM runs");
    }

    /// Waits for the end: exit status, the rest of the console's output, standard error.
    fn ends(mut self) -> (Option<i32>, String, String) {
        let mut child = self.child.take().expect("the VM runs");
        let start = Instant::now();
        while child.try_wait().expect("our child").is_none() {
            if start.elapsed() > LONG {
                drop(child.kill());
                panic!("the VM didn't end");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let output = child.wait_with_output().expect("our child");
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

fn guest() -> Guest {
    Guest::default()
}

/// A guest that says that it runs, and does so for ever.
fn endless() -> Guest {
    guest().print("up").spin()
}

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
fn a_reboot_ends_or_begins_anew() {
    let world = World::new(&guest().print("boot ").reset());
    let (status, output, errors) = world.run(&["--on-reboot", "exit"]).ends();
    assert_eq!((status, output.as_str(), errors.as_str()), (Some(0), "boot ", ""));
    let mut vm = world.run(&["--on-reboot", "reset"]);
    vm.reads("boot boot boot ");
    vm.signal(Signal::TERM);
    assert_eq!(vm.ends().0, Some(0));
}

#[test]
fn input_reaches_the_guest() {
    let world = World::new(&guest().print(">").echo().echo().power_off().spin());
    let mut vm = world.run(&[]);
    vm.reads(">");
    vm.child().stdin.as_mut().expect("piped").write_all(b"ab").expect("the VM reads");
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
