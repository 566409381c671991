//! `vmm migrate --listen --keep`: takes guest after guest, each into a process of its own, which is
//! `vmm migrate --listen stdio` with the connection as its standard input and output.

use std::env;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use vmm_migration::destination;

use super::Outcome;
use super::listen::ListenError;
use super::run::RunError;
use crate::event::Event;
use crate::migrate::link::{self, Listener};
use crate::migrate::uri::Uri;
use crate::{log, signals};

/// How long to wait when connections can't be accepted (too many files are open, say).
const RETRY_PERIOD: Duration = Duration::from_millis(500);
/// Guests that one listener takes and that live at the same time.
const GUESTS_MAX: usize = 1024;
/// Connections that are told at the same time why they are turned away; more only end.
const TOLD_MAX: usize = 16;

/// The options.
pub struct KeepArgs {
    /// Where to listen.
    pub uri: Uri,
    /// What each guest's process is told on top of `migrate --listen stdio`.
    pub options: Vec<String>,
}

/// Listens until a signal comes. The guests that were taken live on: they are processes, and process
/// groups, of their own.
pub fn run(args: &KeepArgs) -> Outcome {
    // Before any thread starts, so that all of them have the signals blocked.
    let signals = signals::block().map_err(RunError::Signals)?;
    let (events, inbox) = mpsc::channel();
    signals.send_to(events).map_err(RunError::Signals)?;
    let program = env::current_exe().map_err(ListenError::Start)?;
    let listener = Listener::bind(&args.uri).map_err(ListenError::from)?;
    tracing::info!("waiting for guests on {}", args.uri);
    let (mut guests, turned_away): (Vec<Child>, _) = (Vec::new(), Arc::new(()));
    while !matches!(inbox.try_recv(), Ok(Event::Signal(_))) {
        // Each has said itself how it ended.
        guests.retain_mut(|guest| !matches!(guest.try_wait(), Ok(Some(_))));
        let connection = match listener.accept_for_another() {
            Ok(connection) => connection,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
            Err(e) => {
                log::print(&format!("can't accept a connection: {e}"));
                std::thread::sleep(RETRY_PERIOD);
                continue;
            }
        };
        let why = if guests.len() >= GUESTS_MAX {
            format!("{GUESTS_MAX} guests are here already: another is turned away")
        } else {
            match spawn(&program, &args.options, &connection) {
                Ok(guest) => {
                    guests.push(guest);
                    continue;
                }
                Err(e) => format!("can't start {} for a guest: {e}", program.display()),
            }
        };
        log::print(&why);
        refuse(connection, why, &turned_away);
    }
    listener.close();
    Ok(ExitCode::SUCCESS)
}

/// Tells a source why it is turned away, on a thread of its own, as it may be slow to listen. Each has a copy of `told`.
fn refuse(connection: OwnedFd, why: String, told: &Arc<()>) {
    let one = Arc::clone(told);
    if Arc::strong_count(told) > 1 + TOLD_MAX {
        return;
    }
    let tell = move || {
        if let Ok(channel) = link::over(connection) {
            destination::refuse(channel, &why);
        }
        drop(one);
    };
    if let Err(e) = std::thread::Builder::new().name("greet".to_owned()).spawn(tell) {
        tracing::warn!("a source isn't told why it is turned away: {e}");
    }
}

/// Starts a guest's process.
fn spawn(program: &Path, options: &[String], connection: &OwnedFd) -> io::Result<Child> {
    Command::new(program)
        .args(["migrate", "--listen", "stdio"])
        .args(options)
        .stdin(Stdio::from(connection.try_clone()?))
        .stdout(Stdio::from(connection.try_clone()?))
        // Ctrl-C is for the one who listens.
        .process_group(0)
        .spawn()
}
