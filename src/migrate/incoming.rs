//! The destination: waits for a source, takes its guest, and answers a source that lost our answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::time::{Duration, Instant};

use vmm_devices::serial::Serial;
use vmm_devices::virtio::net::Net;
use vmm_migration::channel::{Channel, Flow};
use vmm_migration::destination::{
    self, Destination, Ended, Farewell, Greeted, Opening, Options, Question,
};
use vmm_migration::message::{CONFIG_KIND, Reads};
use vmm_migration::report::{Observer, Progress};
use vmm_migration::state::Stateful;

use super::arriving::{Arrived, LocalHost};
use super::aside::LOOK;
use super::link::Listener;
use super::outgoing::software;
use super::verdicts::{VERDICT_KEPT, Verdicts};
use crate::config;
use crate::event::Event;

/// How long a source whose migration is over (a dry run's, say) may take to be gone here.
const LEAVING: Duration = Duration::from_secs(2);
/// Connections that are heard out at the same time; as many more are turned away with a word.
const GREETED_MAX: usize = 16;
/// What a source is told that comes second.
const BUSY: &str = "another migration is under way here: try again later";
/// What a connection is told where too many say nothing.
const CROWD: &str = "too many connections wait here to be heard: try again in ten seconds";
/// What a source is told where a guest has come already.
const TAKEN: &str =
    "a guest has come here already, and this listener takes one (with --keep, many)";
/// What follows for the guest when the connection is lost before it is handed over.
const GUEST_IS_GONE: &str = "; if the source is gone, the guest is gone: nothing of it runs here, and its disks are untouched";

/// What a destination came to over one connection.
pub enum Arrival {
    /// The guest is here.
    Taken(Box<Arrived>, Farewell),
    /// It isn't; the source was told why.
    Failed {
        /// One line.
        why: String,
        /// The source may be in doubt, and come back to ask.
        in_doubt: bool,
    },
    /// It was no source, or one that speaks another protocol, or the dry run of one that was refused: why.
    Stray(String),
    /// The source only looked (`--dry-run`), or came to ask.
    Nothing,
}

/// What a connection has turned out to be; or that it was no source, and why.
pub type Caller = Result<Opening, Box<Ended>>;

/// Accepts connections on a thread of its own, and hears on one for each what it wants: a connection that says
/// nothing keeps no source waiting, and a second source is refused at once. Dropping it ends the listening.
pub struct Door {
    /// A second source was refused; whoever says so unsets it.
    pub refused: Arc<AtomicBool>,
    listener: Arc<Listener>,
    callers: Receiver<(Caller, Option<Claim>)>,
}

/// The place of the one source, or asker, that a door lets in; free again when it is dropped.
pub struct Claim(Arc<AtomicU8>);

/// Nobody has the place.
const FREE: u8 = 0;
/// Somebody has it who only asks or looks, as far as is known: soon gone.
const BRIEF: u8 = 1;
/// A source has it, with its guest.
const MOVING: u8 = 2;

impl Claim {
    /// Claims the place, if it is free or soon will be.
    fn stake(place: &Arc<AtomicU8>) -> Option<Self> {
        let until = Instant::now() + LEAVING;
        loop {
            match place.compare_exchange(FREE, BRIEF, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return Some(Self(Arc::clone(place))),
                Err(BRIEF) if Instant::now() < until => {}
                Err(_) => return None,
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// It is a source that brings its guest: whoever comes now is turned away at once.
    fn keep(&self) {
        self.0.store(MOVING, Ordering::SeqCst);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.store(FREE, Ordering::SeqCst);
    }
}

impl Door {
    /// Opens the door.
    ///
    /// # Errors
    /// There can be no thread.
    pub fn open(listener: Listener) -> std::io::Result<Self> {
        let listener = Arc::new(listener);
        let (give, callers) = mpsc::sync_channel(GREETED_MAX);
        let refused = Arc::new(AtomicBool::new(false));
        let (listening, told) = (Arc::clone(&listener), Arc::clone(&refused));
        std::thread::Builder::new()
            .name("listen".to_owned())
            .spawn(move || accept_all(&listening, &told, &give))?;
        Ok(Self { refused, listener, callers })
    }

    /// Waits for the next caller, until an event says to end, or to that time. `None`: the end. No other source is let
    /// in before the claim is dropped.
    #[must_use]
    pub fn next(
        &self,
        events: &Receiver<Event>,
        until: Option<Instant>,
    ) -> Option<(Caller, Option<Claim>)> {
        loop {
            // However many callers there are.
            let is_told = |event| matches!(event, Event::Signal(_) | Event::ConsoleQuit);
            if events.try_iter().any(is_told) || until.is_some_and(|until| Instant::now() >= until)
            {
                return None;
            }
            match self.callers.recv_timeout(LOOK) {
                Ok(caller) => return Some(caller),
                Err(mpsc::RecvTimeoutError::Disconnected) => return None,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Sees to it, on a thread of its own, that the source learns that its guest runs here: it may have
    /// lost our answer, and ask.
    pub fn say_farewell(
        self,
        mut farewell: Farewell,
        mut verdicts: Verdicts,
        claim: Option<Claim>,
    ) {
        verdicts.keep(&farewell.verdict);
        let answer = move || {
            if farewell.source_knows() {
                farewell.tell_first_sign();
                return;
            }
            drop(claim);
            let until = Instant::now() + VERDICT_KEPT;
            while let Ok((caller, _claim)) =
                self.callers.recv_timeout(until.saturating_duration_since(Instant::now()))
            {
                match caller {
                    Ok(Opening::Question(question)) => {
                        let ours = question.id == farewell.verdict.id;
                        if answer_question(question, &verdicts) && ours {
                            return;
                        }
                    }
                    Ok(Opening::Migrate(destination)) => destination.refuse(TAKEN),
                    Err(_) => {}
                }
            }
        };
        if let Err(e) = std::thread::Builder::new().name("farewell".to_owned()).spawn(answer) {
            tracing::warn!("a source that lost our answer won't get it again: {e}");
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.listener.close();
    }
}

/// Never waits for anybody but the next connection: each has a thread of its own, up to a number.
fn accept_all(
    listener: &Listener,
    refused: &Arc<AtomicBool>,
    give: &SyncSender<(Caller, Option<Claim>)>,
) {
    let place = Arc::new(AtomicU8::new(FREE));
    let greeted = Arc::new(());
    loop {
        match listener.accept() {
            Ok(Some(channel)) => {
                // Each thread that hears one out has a copy.
                let others = Arc::strong_count(&greeted) - 1;
                if others >= 2 * GREETED_MAX {
                    continue;
                }
                let (place, give, one) = (Arc::clone(&place), give.clone(), Arc::clone(&greeted));
                let refused = Arc::clone(refused);
                let greet = move || {
                    if others < GREETED_MAX {
                        greet(channel, &place, &refused, &give);
                    } else {
                        destination::refuse(channel, CROWD);
                    }
                    drop(one);
                };
                if let Err(e) = std::thread::Builder::new().name("greet".to_owned()).spawn(greet) {
                    tracing::warn!("a connection can't be heard: {e}");
                }
            }
            // The end, or the listener was closed.
            Ok(None) => return,
            Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => return,
            Err(e) => {
                tracing::warn!("can't accept a connection: {e}");
                std::thread::sleep(LOOK);
            }
        }
    }
}

/// The newest version of the configuration, and of each section that has changed since the first.
fn reads() -> Reads {
    Reads::new(vec![
        (CONFIG_KIND.to_owned(), config::VERSION),
        (Serial::KIND.to_owned(), Serial::VERSION),
        (Net::KIND.to_owned(), Net::VERSION),
    ])
}

/// Hears what a connection wants, and lets it in unless another has come first.
fn greet(
    channel: Channel,
    place: &Arc<AtomicU8>,
    refused: &AtomicBool,
    give: &SyncSender<(Caller, Option<Claim>)>,
) {
    let mut observer = |_: &Progress| Flow::Continue;
    let options = Options { reads: reads(), ..Options::new(software()) };
    let caller = destination::accept(channel, options, &mut observer);
    let claim = if caller.is_ok() { Claim::stake(place) } else { None };
    match caller {
        Ok(Opening::Migrate(destination)) if claim.is_none() => {
            refused.store(true, Ordering::SeqCst);
            destination.refuse(BUSY);
        }
        Ok(Opening::Question(question)) if claim.is_none() => {
            // What is kept in files can be told meanwhile. For the rest it asks again.
            let verdicts = Verdicts::of_this_host();
            if verdicts.find(question.id).is_some() {
                answer_question(question, &verdicts);
            }
        }
        // While a guest comes nobody hears of those that bring none, and they may be many.
        caller @ Err(_) => drop(give.try_send((caller, claim))),
        // Nobody waits for callers any more: the connection ends.
        caller => drop(give.send((caller, claim))),
    }
}

/// Takes one guest from a caller, or learns why not. `verdicts` answers sources that ask.
pub fn take(
    caller: Caller,
    claim: Option<&Claim>,
    host: &mut LocalHost,
    verdicts: &mut Verdicts,
    observer: &mut dyn Observer,
) -> Arrival {
    let destination = match caller {
        Ok(Opening::Migrate(destination)) => destination,
        Ok(Opening::Question(question)) => {
            // Whoever doesn't hear the answer asks again.
            answer_question(question, verdicts);
            return Arrival::Nothing;
        }
        Err(ended) => return Arrival::Stray(ended.error.line()),
    };
    match receive(destination, claim, host, observer) {
        Ok(arrival) => arrival,
        Err(ended) => {
            if let Some(verdict) = &ended.verdict {
                verdicts.keep(verdict);
            }
            if ended.dry_run && !ended.error.is_cancelled() {
                let is_over = ended.is_by_source();
                return if is_over { Arrival::Nothing } else { Arrival::Stray(ended.error.line()) };
            }
            let mut why = ended.error.line();
            if ended.error.is_lost_connection() {
                why.push_str(GUEST_IS_GONE);
            }
            Arrival::Failed { why, in_doubt: ended.in_doubt }
        }
    }
}

/// Gives whether the source has let go of the matter.
fn answer_question(question: Box<Question>, verdicts: &Verdicts) -> bool {
    let verdict = verdicts.find(question.id);
    question.answer(verdict.as_slice())
}

fn receive(
    destination: Destination<Greeted>,
    claim: Option<&Claim>,
    host: &mut LocalHost,
    observer: &mut dyn Observer,
) -> Result<Arrival, Box<Ended>> {
    let destination = destination.reserve(host, observer)?;
    if let Some(claim) = claim.filter(|_| !destination.is_dry_run()) {
        claim.keep();
    }
    let destination = destination.precopy(observer)?.stop_and_copy(observer)?;
    let (arrived, farewell) = destination.await_commit(observer)?.activate(observer)?;
    Ok(Arrival::Taken(Box::new(arrived), farewell))
}

#[cfg(test)]
#[path = "incoming_tests.rs"]
mod tests;
