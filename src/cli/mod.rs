//! The command line: which command is meant, what went wrong in words, and the exit status.

pub mod args;
pub mod bar;
pub mod cpu;
pub mod here;
pub mod inspect;
pub mod keep;
pub mod limits;
pub mod list;
pub mod listen;
pub mod migrate;
pub mod progress;
pub mod run;
pub mod run_args;
pub mod snapshot;
pub mod units;
pub mod vm;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use serde_json::Value;

use self::args::{Args, Stop};
use crate::api::client::ClientError;
use crate::api::socket::SocketError;
use crate::machine::MachineError;
use crate::migrate::restoring::RestoreFault;

/// The VMM failed.
pub const EXIT_FAILED: u8 = 1;
/// The command line was wrong.
pub const EXIT_USAGE: u8 = 2;
/// The guest failed: a triple fault, or a panic.
pub const EXIT_GUEST_FAILED: u8 = 3;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Wrong usage of the command line itself.
    #[error("{message} (see '{command} --help')")]
    Usage {
        /// What is wrong.
        message: String,
        /// The command whose help says what is right.
        command: String,
    },
    /// A VM could not be asked, or refused.
    #[error("{vm}")]
    Vm {
        /// The VM, as the user named it.
        vm: String,
        /// What it said, or what stood between.
        #[source]
        source: ClientError,
    },
    /// There is no control socket.
    #[error("control socket")]
    Socket(#[from] SocketError),
    /// Running a VM failed.
    #[error(transparent)]
    Run(#[from] run::RunError),
    /// A guest could not be taken in.
    #[error(transparent)]
    Listen(#[from] listen::ListenError),
    /// A snapshot or a recorded stream is wrong.
    #[error(transparent)]
    Inspect(#[from] inspect::InspectError),
    /// The host's KVM, or a CPU model.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A snapshot could not be restored.
    #[error(transparent)]
    Restore(#[from] RestoreFault),
    /// Standard output can't be written.
    #[error("standard output")]
    Output(#[source] io::Error),
}

impl Error {
    /// The process's exit status.
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            Error::Usage { .. } => EXIT_USAGE,
            _ => EXIT_FAILED,
        }
    }

    /// Whether whoever read our output wanted no more of it (`vmm list | head -1`).
    #[must_use]
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Error::Output(e) if e.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// What a command gives back.
pub type Outcome = Result<ExitCode, Error>;

/// One command.
struct Command {
    name: &'static str,
    help: &'static str,
    /// Parses all arguments, and only then does something.
    run: fn(Args) -> Result<Outcome, Stop>,
}

const COMMANDS: [Command; 11] = [
    Command { name: "run", help: run::HELP, run: run::command },
    Command { name: "list", help: list::HELP, run: list::command },
    Command { name: "info", help: vm::INFO_HELP, run: vm::info },
    Command { name: "pause", help: vm::PAUSE_HELP, run: vm::pause },
    Command { name: "resume", help: vm::RESUME_HELP, run: vm::resume },
    Command { name: "stop", help: vm::STOP_HELP, run: vm::stop },
    Command { name: "migrate", help: migrate::HELP, run: migrate::command },
    Command { name: "snapshot", help: snapshot::SNAPSHOT_HELP, run: snapshot::snapshot },
    Command { name: "restore", help: snapshot::RESTORE_HELP, run: snapshot::restore },
    Command { name: "inspect", help: inspect::HELP, run: inspect::command },
    Command { name: "cpu", help: cpu::HELP, run: cpu::command },
];

const HELP: &str = "\
vmm runs Linux microVMs on KVM

usage: vmm COMMAND [OPTION]...
       vmm COMMAND --help
       vmm --version

  run       boot a VM and stay with it until it ends
  list      show the VMs of this user
  info      show one VM
  pause     stop a VM's vCPUs
  resume    let them run again
  stop      power a VM off
  migrate   move a running VM to another host, or take one in
  snapshot  write a VM to a directory
  restore   let the VM of a snapshot go on
  inspect   show what a snapshot or a recorded stream holds
  cpu       print this host's CPU model, or what several have in common

A VM is known by its --name, or by the path of its control socket (a path has a '/').

exit status: 0 the guest powered off or was stopped, or the command did its work
             1 something failed
             2 the command line is wrong
             3 the guest failed: a triple fault, or a reset without an orderly shutdown
               (what a kernel with panic= on its command line does when it panics)
environment: VMM_LOG=error|warn|info|debug|trace  what is told on standard error (warn)
             XDG_RUNTIME_DIR                      control sockets are in its vmm/ (root: /run/vmm)

example: vmm run --kernel vmlinuz --mem 512M --initrd initrd.img --name web
";

/// Runs the command that the arguments (without the program's name) ask for.
///
/// # Errors
/// What the command says; [`Error::status`] is the exit status.
pub fn main(args: impl IntoIterator<Item = OsString>) -> Outcome {
    let mut parser = lexopt::Parser::from_args(args);
    let name = match parser.next() {
        Ok(Some(lexopt::Arg::Value(name))) => name.to_string_lossy().into_owned(),
        Ok(Some(lexopt::Arg::Long("version") | lexopt::Arg::Short('V'))) => {
            return print(&format!("vmm {}\n", env!("CARGO_PKG_VERSION")));
        }
        Ok(Some(lexopt::Arg::Long("help") | lexopt::Arg::Short('h'))) => return print(HELP),
        Ok(None) => return Err(wrong("vmm", "a command is needed: ".to_owned() + &names())),
        Ok(Some(lexopt::Arg::Long(option))) => {
            let message = format!("unknown option --{option}: a command comes first: {}", names());
            return Err(wrong("vmm", message));
        }
        Ok(Some(lexopt::Arg::Short(letter))) => {
            let message = format!("unknown option -{letter}: a command comes first: {}", names());
            return Err(wrong("vmm", message));
        }
        Err(e) => return Err(wrong("vmm", e.to_string())),
    };
    if name == "help" {
        return help(parser);
    }
    let command = find(&name)?;
    match (command.run)(Args::new(parser, command.help)) {
        Ok(outcome) => outcome,
        Err(Stop::Help) => print(command.help),
        Err(Stop::Usage(message)) => Err(wrong(&format!("vmm {}", command.name), message)),
    }
}

/// `vmm help [COMMAND]`
fn help(mut parser: lexopt::Parser) -> Outcome {
    match parser.next() {
        Ok(Some(lexopt::Arg::Value(name))) => print(find(&name.to_string_lossy())?.help),
        _ => print(HELP),
    }
}

fn find(name: &str) -> Result<&'static Command, Error> {
    COMMANDS.iter().find(|command| command.name == name).ok_or_else(|| {
        let near = args::nearest(name, COMMANDS.iter().map(|command| command.name));
        let hint = match near {
            Some(near) => format!("do you mean {near}?"),
            None => format!("there are {}", names()),
        };
        wrong("vmm", format!("unknown command '{name}': {hint}"))
    })
}

fn names() -> String {
    COMMANDS.map(|command| command.name).join(", ")
}

fn wrong(command: &str, message: String) -> Error {
    Error::Usage { message, command: command.into() }
}

/// Writes a text to standard output.
///
/// # Errors
/// [`Error::Output`].
pub fn print(text: &str) -> Outcome {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::Output)?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a JSON value to standard output, on one line.
///
/// # Errors
/// [`Error::Output`].
pub fn print_json(value: &Value) -> Outcome {
    print(&format!("{value}\n"))
}
