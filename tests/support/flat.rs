//! Guests of a few flat instructions, written byte by byte, and `vmm run` of them in a directory of their own. None
//! needs interrupts, so that a software-only KVM will do.

#![allow(dead_code, reason = "each test program uses a part")]

use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// How long anything may take that happens at once.
pub const LONG: Duration = Duration::from_secs(60);

/// Instructions of a guest that runs at 1 MiB in 64-bit mode.
#[derive(Default)]
pub struct Guest(pub Vec<u8>);

impl Guest {
    /// More of them.
    pub fn bytes(mut self, bytes: &[u8]) -> Guest {
        self.0.extend_from_slice(bytes);
        self
    }

    /// `mov dx, port; mov al, value; out dx, al`
    pub fn out(self, port: u16, value: u8) -> Guest {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }

    /// Writes a text to the serial port.
    pub fn print(self, text: &str) -> Guest {
        text.bytes().fold(self, |guest, byte| guest.out(0x3f8, byte))
    }

    /// Sleep type 5, sleep enable.
    pub fn power_off(self) -> Guest {
        self.out(0x600, 5 << 2 | 1 << 5)
    }

    /// The keyboard controller's reset line.
    pub fn reset(self) -> Guest {
        self.out(0x64, 0xfe).spin()
    }

    /// `or dword [0xfee000f0], 0x100`: the local APIC in use, as a kernel has it when it panics.
    pub fn use_lapic(self) -> Guest {
        self.bytes(&[0xb8, 0xf0, 0x00, 0xe0, 0xfe]) // mov eax, 0xfee000f0
            .bytes(&[0x8b, 0x18]) // mov ebx, [rax]
            .bytes(&[0x81, 0xcb, 0, 1, 0, 0]) // or ebx, 0x100
            .bytes(&[0x89, 0x18]) // mov [rax], ebx
    }

    /// An interrupt table of no length, and an invalid instruction.
    pub fn triple_fault(self) -> Guest {
        self.bytes(&[0x0f, 0x01, 0x1d, 2, 0, 0, 0, 0x0f, 0x0b]).bytes(&[0; 10])
    }

    /// `jmp $`
    pub fn spin(self) -> Guest {
        self.bytes(&[0xeb, 0xfe])
    }

    /// Until a bit is set in what a port reads as: `mov dx, port; L: in al, dx; test al, bit; jz L`
    pub fn await_bit(self, port: u16, bit: u8) -> Guest {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0x66, 0xba, low, high, 0xec, 0xa8, bit, 0x74, 0xfb])
    }

    /// `mov eax, address; mov dword [rax], value`
    pub fn store(self, address: u32, value: u32) -> Guest {
        self.bytes(&[0xb8])
            .bytes(&address.to_le_bytes())
            .bytes(&[0xc7, 0])
            .bytes(&value.to_le_bytes())
    }

    /// Until a bit is set in a word: `mov eax, address; L: mov ebx, [rax]; test bl, bit; jz L`
    pub fn await_bit_at(self, address: u32, bit: u8) -> Guest {
        let spin = [0x8b, 0x18, 0xf6, 0xc3, bit, 0x74, 0xf9];
        self.bytes(&[0xb8]).bytes(&address.to_le_bytes()).bytes(&spin)
    }

    /// One byte from the serial port to the serial port.
    pub fn echo(self) -> Guest {
        self.await_bit(0x3fd, 1).bytes(&[0x66, 0xba, 0xf8, 0x03, 0xec, 0xee])
    }

    /// An ELF of one segment.
    pub fn elf(&self) -> Vec<u8> {
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
pub struct World {
    /// The directory.
    pub dir: tempfile::TempDir,
}

impl World {
    /// With the guest in the file `kernel`.
    pub fn new(guest: &Guest) -> World {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("kernel"), guest.elf()).expect("a file");
        World { dir }
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `vmm`, in it.
    pub fn command(&self) -> Command {
        let binary = std::env::var_os("VMM_BIN");
        let mut command = Command::new(binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_vmm").into()));
        command.current_dir(self.dir.path()).env_remove("VMM_LOG").stdin(Stdio::null());
        command
    }

    /// `vmm run` of the guest, with its control socket at `vm.sock`.
    pub fn run(&self, more: &[&str]) -> Vm {
        self.start(self.command(), more)
    }

    /// As [`Self::run`], with what it does told on standard error.
    pub fn run_logging(&self, more: &[&str]) -> Vm {
        let mut command = self.command();
        command.env("VMM_LOG", "info");
        self.start(command, more)
    }

    fn start(&self, mut command: Command, more: &[&str]) -> Vm {
        let args = ["run", "--kernel", "kernel", "--mem", "32M", "--control", "./vm.sock"];
        command.args(args).args(more).stdout(Stdio::piped()).stderr(Stdio::piped());
        Vm { child: Some(command.stdin(Stdio::piped()).spawn().expect("the binary runs")) }
    }

    /// A client's command on this VM.
    pub fn ask(&self, args: &[&str]) -> Output {
        self.command().args(args).arg("./vm.sock").output().expect("the binary runs")
    }

    /// As [`Self::ask`], which must succeed with JSON.
    pub fn json(&self, args: &[&str]) -> Value {
        let output = self.ask(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }
}

/// A VM's process; killed if a test ends before it.
pub struct Vm {
    /// None once its end was awaited.
    pub child: Option<Child>,
}

impl Vm {
    /// The process.
    pub fn child(&mut self) -> &mut Child {
        self.child.as_mut().expect("the VM runs")
    }

    /// Waits for a text on the console.
    pub fn reads(&mut self, wanted: &str) {
        let stdout = self.child().stdout.as_mut().expect("piped");
        let mut bytes = vec![0; wanted.len()];
        stdout.read_exact(&mut bytes).expect("output");
        assert_eq!(text(&bytes), wanted);
    }

    /// Types on the console.
    pub fn types(&mut self, text: &str) {
        let stdin = self.child().stdin.as_mut().expect("piped");
        stdin.write_all(text.as_bytes()).expect("the VM reads");
    }

    /// Sends a signal.
    pub fn signal(&mut self, signal: Signal) {
        let pid = Pid::from_child(self.child());
        kill_process(pid, signal).expect("the VM runs");
    }

    /// Waits for the end: exit status, the rest of the console's output, standard error.
    pub fn ends(mut self) -> (Option<i32>, String, String) {
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

/// Bytes that are text.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// A guest without instructions yet.
pub fn guest() -> Guest {
    Guest::default()
}

/// A guest that says that it runs, and does so for ever.
pub fn endless() -> Guest {
    guest().print("up").spin()
}
