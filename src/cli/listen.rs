//! `vmm migrate --listen`: takes a guest in and stays with it, as `vmm run` does with one it booted.

use std::io;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use serde_json::json;
use vmm_migration::channel::Flow;
use vmm_migration::report::{Progress, Stage};

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
use crate::migrate::verdicts::{VERDICT_KEPT, Verdicts};
use crate::signals;

/// How long a signal is under way to the control thread.
const UNDER_WAY: Duration = Duration::from_millis(100);
/// What is said to who would have cancelled a move that is over.
const TOO_LATE: &str = "too late to cancel the move: the guest is here, and runs on";

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
    let mut watcher = Watcher {
        display: Display::new(json, "received"),
        inbox: &inbox,
        refused: Arc::clone(&door.refused),
        deferred: Vec::new(),
        is_too_late: false,
    };
    if matches!(watcher.display, Display::Bar(_)) {
        log::print(&format!("waiting for a guest on {uri}"));
    }
    // The last failure that leaves the source in doubt, and until when it is answered.
    let (mut failure, mut until) = (None, None);
    while let Some((caller, claim)) = door.next(&inbox, until) {
        let mut observer = |progress: &Progress| watcher.look(progress);
        let arrival =
            incoming::take(caller, claim.as_ref(), &mut host, &mut verdicts, &mut observer);
        watcher.display.clear();
        match arrival {
            Arrival::Taken(arrived, farewell) => {
                door.say_farewell(farewell, verdicts, claim);
                watcher.welcome(&arrived, &events, json);
                return live(*arrived, &events, inbox);
            }
            Arrival::Failed { why, in_doubt } => {
                if !in_doubt {
                    return Err(ListenError::Failed(why).into());
                }
                // The source may come back to ask; others may come with a guest.
                log::print(&format!("the migration failed: {why}"));
                (failure, until) = (Some(why), Some(Instant::now() + VERDICT_KEPT));
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

/// Shows how a migration goes on, and hears who would end it.
struct Watcher<'a> {
    display: Display,
    inbox: &'a mpsc::Receiver<Event>,
    /// A second source came.
    refused: Arc<AtomicBool>,
    /// What is the control thread's, once the guest is here.
    deferred: Vec<Event>,
    /// Somebody would have cancelled when the guest ran already.
    is_too_late: bool,
}

impl Watcher<'_> {
    /// The observer of a migration. In its last stage the guest runs, and the source hears of it next: what was meant to
    /// cancel the move doesn't end the guest.
    fn look(&mut self, progress: &Progress) -> Flow {
        let is_here = progress.stage == Stage::Activation;
        if !is_here {
            self.display.show(&json!(progress));
        }
        self.tell_refused();
        for event in self.inbox.try_iter() {
            let flow = match event {
                Event::Signal(_) | Event::ConsoleQuit => Flow::Cancel,
                Event::Request {
                    request: Request::CancelMigration | Request::Stop { force: true },
                    reply,
                } if is_here => {
                    reply.done(Err(ApiError::conflict(TOO_LATE)));
                    Flow::Continue
                }
                Event::Request { request, reply } if !is_here => answer(&request, reply, progress),
                other => {
                    self.deferred.push(other);
                    Flow::Continue
                }
            };
            match flow {
                Flow::Cancel if is_here => self.is_too_late = true,
                Flow::Cancel => return Flow::Cancel,
                Flow::Continue => {}
            }
        }
        Flow::Continue
    }

    /// One line, however many they are at a time.
    fn tell_refused(&mut self) {
        if self.refused.swap(false, Ordering::SeqCst) {
            self.display.clear();
            log::print("another source is refused: a migration is under way here");
        }
    }

    /// The guest is here: it gets the console, and the control thread reads next what is for it.
    fn welcome(mut self, arrived: &Arrived, events: &mpsc::Sender<Event>, json: bool) {
        // A person who hasn't read yet that it is here would cancel. Whoever sends another signal knows by the source.
        self.forget_interrupts(Duration::ZERO);
        if !json {
            log::print(&here(arrived.vm.config()));
        }
        if arrived.console.begin() {
            // The terminal is the guest's now, and no further Ctrl-C comes from there.
            self.forget_interrupts(UNDER_WAY);
        }
        if self.is_too_late {
            log::print(TOO_LATE);
        }
        for event in self.deferred {
            let _ = events.send(event);
        }
    }

    /// A Ctrl-C that came too late to cancel the move doesn't end the guest. Waits so long for one.
    fn forget_interrupts(&mut self, wait: Duration) {
        let until = Instant::now() + wait;
        let left = || until.saturating_duration_since(Instant::now());
        while let Ok(event) = self.inbox.recv_timeout(left()) {
            match event {
                Event::Signal(libc::SIGINT) => self.is_too_late = true,
                other => self.deferred.push(other),
            }
        }
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
        Request::Stop { force: true } => {
            reply.done(Ok(json!({ "ended": "forced" })));
            return Flow::Cancel;
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Answer;

    /// What a watcher makes of these events in a stage, and what it leaves to the control thread.
    fn look(stage: Stage, events: Vec<Event>) -> (Flow, bool, Vec<Event>) {
        let (sender, inbox) = mpsc::channel();
        events.into_iter().for_each(|event| sender.send(event).unwrap());
        let mut watcher = Watcher {
            display: Display::Lines { stage: stage.to_string() },
            inbox: &inbox,
            refused: Arc::default(),
            deferred: Vec::new(),
            is_too_late: false,
        };
        let flow = watcher.look(&Progress { stage, ..Progress::default() });
        (flow, watcher.is_too_late, watcher.deferred)
    }

    fn ask(request: Request) -> (Event, mpsc::Receiver<Answer>) {
        let (reply, answers) = Reply::channel();
        (Event::Request { request, reply }, answers)
    }

    #[test]
    fn until_the_guest_runs_a_signal_cancels() {
        for stage in [Stage::PreCopy, Stage::StopAndCopy, Stage::Commitment] {
            let (request, answers) = ask(Request::Info);
            let (flow, ..) = look(stage, vec![request, Event::Signal(libc::SIGTERM)]);
            assert_eq!(flow, Flow::Cancel, "{stage}: though another event came first");
            assert!(matches!(answers.try_recv(), Ok(Answer::Done(Ok(_)))));
            let (request, answers) = ask(Request::Stop { force: true });
            assert_eq!(look(stage, vec![request]).0, Flow::Cancel);
            assert_eq!(answers.try_recv(), Ok(Answer::Done(Ok(json!({ "ended": "forced" })))));
        }
    }

    #[test]
    fn what_comes_too_late_to_cancel_does_not_end_the_guest() {
        let (stop, stopped) = ask(Request::Stop { force: true });
        let (cancel, cancelled) = ask(Request::CancelMigration);
        let (info, informed) = ask(Request::Info);
        let signals = [Event::Signal(libc::SIGTERM), Event::ConsoleQuit];
        let events = [stop, cancel, info].into_iter().chain(signals).collect();
        let (flow, is_too_late, deferred) = look(Stage::Activation, events);
        assert_eq!((flow, is_too_late), (Flow::Continue, true));
        for answers in [stopped, cancelled] {
            let answer = answers.try_recv();
            assert!(matches!(&answer, Ok(Answer::Done(Err(e))) if e.status == 409), "{answer:?}");
        }
        // What it says of itself, the guest's control thread says.
        assert!(matches!(deferred[..], [Event::Request { request: Request::Info, .. }]));
        assert!(informed.try_recv().is_err());
    }
}
