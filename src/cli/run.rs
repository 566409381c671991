//! `vmm run`: the VM's life from its command line to the exit status. What needs no KVM is checked before
//! KVM is opened, so that a wrong path is told at once.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use super::args::{Args, Stop};
pub use super::run_args::HELP;
use super::run_args::{self, RunArgs};
use super::{EXIT_GUEST_FAILED, Outcome};
use crate::api::server::Server;
use crate::api::socket::{self, ControlSocket};
use crate::config::{Config, CpuModel};
use crate::console::{Console, ConsoleError};
use crate::control::{self, ControlError, End};
use crate::event::{Event, GuestExit};
use crate::{log, signals};

/// Why a VM could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A file can't be looked at.
    #[error("{what} {path}")]
    File {
        /// What the file is for.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A file is of the wrong kind.
    #[error("{what} {path}: {problem}")]
    Kind {
        /// What the file is for.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Signals can't be received.
    #[error("can't receive signals")]
    Signals(#[source] io::Error),
    /// The control socket can't be served.
    #[error("can't serve the control socket")]
    Serve(#[source] io::Error),
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The machine.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// How long the end waits for the reader of the guest's last output.
pub(super) const CONSOLE_FLUSH_TIMEOUT: Duration = Duration::from_secs(10);

/// Parses and runs.
///
/// # Errors
/// Wrong usage.
pub fn command(args: Args) -> Result<Outcome, Stop> {
    let args = run_args::parse(args, &socket::default_name())?;
    Ok(run(args))
}

fn run(args: RunArgs) -> Outcome {
    let RunArgs { config, control } = args;
    check_files(&config)?;
    // Before any thread starts, so that all of them have the signals blocked.
    let signals = signals::block().map_err(RunError::Signals)?;
    let path = control.map_or_else(|| socket::path_of(&config.name), Ok)?;
    let socket = ControlSocket::bind(&path)?;
    let (events, inbox) = mpsc::channel();
    let server = Server::start(socket, &config.name, events.clone()).map_err(RunError::Serve)?;
    signals.send_to(events.clone()).map_err(RunError::Signals)?;
    let end = live(config, &server, &events, &inbox);
    // Clients who still wait learn now that the VM has ended, and the last answers are written.
    drop(inbox);
    drop(server);
    Ok(status(&end?))
}

/// The machine's life. The one place where the command line meets the machine.
fn live(
    config: Config,
    server: &Server,
    events: &Sender<Event>,
    inbox: &Receiver<Event>,
) -> Result<End, RunError> {
    let console = Arc::new(Console::open(&config.serial, events.clone())?);
    let end = control::run(config, &console, server, events, inbox);
    if !console.flush(CONSOLE_FLUSH_TIMEOUT) {
        tracing::warn!("the console's reader is too slow: some of the guest's output is lost");
    }
    Ok(end?)
}

/// The exit status of a VM's life, and the line that goes with it.
pub(super) fn status(end: &End) -> ExitCode {
    let failure = match end {
        End::Guest(GuestExit::PowerOff | GuestExit::Reset) => return ExitCode::SUCCESS,
        End::Moved(to) => {
            log::print(to);
            return ExitCode::SUCCESS;
        }
        End::Stopped(why) => {
            tracing::info!("{why}");
            return ExitCode::SUCCESS;
        }
        End::Guest(GuestExit::TripleFault) => "a vCPU met a triple fault",
        End::Guest(GuestExit::Panic) => "it reset itself without an orderly shutdown (a panic?)",
    };
    log::print(&format!("the guest failed: {failure}"));
    ExitCode::from(EXIT_GUEST_FAILED)
}

/// Looks at every file that the configuration names. What stands in them is for those who read them.
fn check_files(config: &Config) -> Result<(), RunError> {
    check_file("kernel", &config.boot.kernel)?;
    if let Some(initrd) = &config.boot.initrd {
        check_file("initrd", initrd)?;
    }
    if let CpuModel::File(path) = &config.cpu_model {
        check_file("CPU model (not host, x86-64-v2 or x86-64-v3)", path)?;
    }
    config.disks.iter().try_for_each(|disk| check_disk(&disk.path))
}

fn metadata(what: &'static str, path: &Path) -> Result<fs::Metadata, RunError> {
    fs::metadata(path).map_err(|source| RunError::File { what, path: path.into(), source })
}

/// A file that is read whole.
fn check_file(what: &'static str, path: &Path) -> Result<(), RunError> {
    let metadata = metadata(what, path)?;
    let problem = if metadata.is_dir() {
        "it is a directory"
    } else if !metadata.is_file() {
        "it is not a regular file"
    } else if metadata.len() == 0 {
        "it is empty"
    } else {
        return Ok(());
    };
    Err(RunError::Kind { what, path: path.into(), problem })
}

fn check_disk(path: &Path) -> Result<(), RunError> {
    let kind = metadata("disk", path)?.file_type();
    let problem = if kind.is_dir() {
        "it is a directory"
    } else if !kind.is_file() && !kind.is_block_device() {
        "it is neither a regular file nor a block device"
    } else {
        return Ok(());
    };
    Err(RunError::Kind { what: "disk", path: path.into(), problem })
}
