//! `vmm migrate --listen`: takes a guest in and stays with it, as `vmm run` does with one it booted.

use std::io;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::json;
use vmm_migration::channel::Flow;
use vmm_migration::report::Progress;

use super::Outcome;
use super::progress::Display;
use super::run::{self, CONSOLE_FLUSH_TIMEOUT};
use crate::config::{Config, SerialTarget};
use crate::control;
use crate::event::{ApiError, Event, Reply, Request};
use crate::log;
use crate::migrate::arriving::{Arrived, LocalHost, Overrides};
use crate::migrate::incoming::{self, Arrival, Door};
use crate::migrate::link::{LinkError, Listener};
use crate::migrate::uri::Uri;
use crate::migrate::verdicts::Verdicts;
use crate::signals;

/// How long a signal is under way to the control thread.
const UNDER_WAY: Duration = Duration::from_millis(100);

/// Why no guest was taken in.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The migration failed.
    #[error("the migration failed: {0}")]
    Failed(String),
    /// There can be no thread.
    #[error("can't start listening")]
    Start(#[source] io::Error),
}

/// The options.
pub struct ListenArgs {
    /// Where to listen.
    pub uri: Uri,
    /// What differs on this host.
    pub overrides: Overrides,
    /// Progress as JSON.
    pub json: bool,
}

/// Waits for a source, takes its guest, sees it through to its end.
pub fn run(args: ListenArgs) -> Outcome {
    let ListenArgs { uri, overrides, json } = args;
    // Before any thread starts, so that all of them have the signals blocked.
    let signals = signals::block().map_err(run::RunError::Signals)?;
    let (events, inbox) = mpsc::channel();
    signals.send_to(events.clone()).map_err(run::RunError::Signals)?;
    let listener = Listener::bind(&uri).map_err(ListenError::from)?;
    let door = Door::open(listener).map_err(ListenError::Start)?;
    let mut host = LocalHost { overrides, events: events.clone() };
    let mut verdicts = Verdicts::of_this_host();
    let mut display = Display::new(json, "received");
    if matches!(display, Display::Bar(_)) {
        log::print(&format!("waiting for a guest on {uri}"));
    }
    let mut deferred = Vec::new();
    let mut failure = None;
    while let Some((caller, claim)) = door.next(&inbox) {
        let mut observer = |progress: &Progress| {
            display.show(&json!(progress));
            match inbox.try_recv() {
                Ok(Event::Signal(_) | Event::ConsoleQuit) => Flow::Cancel,
                Ok(Event::Request { request, reply }) => answer(&request, reply, progress),
                Ok(other) => {
                    deferred.push(other);
                    Flow::Continue
                }
                Err(_) => Flow::Continue,
            }
        };
        let arrival =
            incoming::take(caller, claim.as_ref(), &mut host, &mut verdicts, &mut observer);
        display.clear();
        match arrival {
            Arrival::Taken(arrived, farewell) => {
                door.say_farewell(farewell, verdicts, claim);
                for event in deferred {
                    // The control thread reads them next.
                    let _ = events.send(event);
                }
                if !json {
                    log::print(&here(arrived.vm.config()));
                }
                if arrived.console.begin() {
                    forget_interrupts(&inbox, &events);
                }
                return live(*arrived, &events, inbox);
            }
            Arrival::Failed { why, in_doubt } => {
                if !in_doubt {
                    return Err(ListenError::Failed(why).into());
                }
                // The source may come back to ask; others may come with a guest.
                log::print(&format!("the migration failed: {why}"));
                failure = Some(why);
            }
            // There is no other connection to wait for.
            Arrival::Stray(why) if uri == Uri::Stdio => return Err(ListenError::Failed(why).into()),
            // A port scanner doesn't end the wait for the guest.
            Arrival::Stray(why) => log::print(&format!("a connection brought no guest: {why}")),
            Arrival::Nothing => {}
        }
        drop(claim);
    }
    match failure {
        Some(why) => Err(ListenError::Failed(why).into()),
        None => Ok(ExitCode::SUCCESS),
    }
}

/// A Ctrl-C that came too late to cancel the move doesn't end the guest: the terminal is the guest's now, and no further one
/// comes from there.
fn forget_interrupts(inbox: &mpsc::Receiver<Event>, events: &mpsc::Sender<Event>) {
    let until = Instant::now() + UNDER_WAY;
    let mut others = Vec::new();
    while let Ok(event) = inbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
        if !matches!(event, Event::Signal(libc::SIGINT)) {
            others.push(event);
        }
    }
    for event in others {
        let _ = events.send(event);
    }
}

/// The word that a guest has come, and where its console is if that is to be connected to.
fn here(config: &Config) -> String {
    match &config.serial {
        SerialTarget::Unix(path) => {
            format!("{} is here, its console at unix:{}", config.name, path.display())
        }
        _ => format!("{} is here", config.name),
    }
}

/// Answers a client of the VM that is about to be here.
fn answer(request: &Request, reply: Reply, progress: &Progress) -> Flow {
    match request {
        Request::Info => reply.done(Ok(json!({
            "state": "arriving", "pid": std::process::id(), "migration": progress,
        }))),
        Request::CancelMigration => {
            reply.done(Ok(json!({})));
            return Flow::Cancel;
        }
        // The client learns that it has ended.
        Request::Stop { force: true } => return Flow::Cancel,
        _ => reply.done(Err(ApiError::conflict(
            "the VM is arriving: wait until it is here, or cancel it (vmm migrate --cancel VM)",
        ))),
    }
    Flow::Continue
}

/// Stays with a guest that came from elsewhere until it ends.
pub(super) fn live(
    arrived: Arrived,
    events: &mpsc::Sender<Event>,
    inbox: mpsc::Receiver<Event>,
) -> Outcome {
    let Arrived { vm, server, console } = arrived;
    let end = control::serve(vm, &console, &server, events, &inbox).map_err(run::RunError::from);
    if !console.flush(CONSOLE_FLUSH_TIMEOUT) {
        tracing::warn!("the console's reader is too slow: some of the guest's output is lost");
    }
    drop(inbox);
    drop(server);
    Ok(run::status(&end?))
}
