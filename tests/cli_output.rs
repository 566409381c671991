//! What the real binary writes, and where it can't: pipes that close, a full device, a raw terminal.

use std::fs;
use std::process::{Command, Stdio};

fn command(args: &[&str]) -> Command {
    let binary = std::env::var_os("VMM_BIN");
    let mut command = Command::new(binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_vmm").into()));
    command.args(args).env_remove("VMM_LOG").stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    drop(reader);
    let output = command(&["--help"]).stdout(writer).stderr(Stdio::piped()).spawn();
    let output = output.and_then(std::process::Child::wait_with_output).expect("the binary runs");
    assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let output = command(&["--help"]).stdout(full).stderr(Stdio::piped()).spawn();
    let output = output.and_then(std::process::Child::wait_with_output).expect("the binary runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("standard output: No space left"));
}

#[test]
fn an_unknown_log_level_is_told() {
    let output = command(&["--version"]).env("VMM_LOG", "loud").output();
    let output = output.expect("the binary runs");
    assert!(output.status.success());
    assert_eq!(
        text(&output.stderr),
        "vmm: VMM_LOG: unknown level: it takes error, warn, info, debug or trace\n"
    );
}

#[test]
fn on_a_raw_terminal_lines_begin_at_the_left() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
    let user = openpt(flags).expect("a terminal");
    grantpt(&user).expect("a terminal");
    unlockpt(&user).expect("a terminal");
    let path = ptsname(&user, Vec::new()).expect("a terminal");
    let open = || {
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).open(path.to_str().expect("UTF-8")).expect("a terminal")
    };
    let ends = |raw: bool| {
        let terminal = open();
        let mut modes = tcgetattr(&terminal).expect("a terminal");
        if raw {
            modes.make_raw();
        }
        tcsetattr(&terminal, OptionalActions::Now, &modes).expect("a terminal");
        let status = command(&["frobnicate"]).stderr(terminal).status();
        assert_eq!(status.expect("the binary runs").code(), Some(2));
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            let mut bytes = [0; 256];
            let count = rustix::io::read(&user, &mut bytes).expect("a line");
            line.extend_from_slice(&bytes[..count]);
        }
        text(&line)
    };
    // Cooked, the terminal itself adds the carriage return; raw, the VMM does. Never both.
    for line in [ends(false), ends(true)] {
        assert!(line.ends_with("--help')\r\n") && !line.contains("\r\r"), "{line:?}");
    }
}
