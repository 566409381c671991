//! The destination: waits for a source, takes its guest, and answers a source that lost our answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use vmm_devices::serial::Serial;
use vmm_migration::channel::{Channel, Flow};
use vmm_migration::message::Reads;
use vmm_migration::report::{Observer, Progress};
use vmm_migration::state::Stateful;
use vmm_migration::target::{self, Ended, Farewell, Greeted, Opening, Options, Question, Target};

use super::arriving::{Arrived, Destination};
use super::link::Listener;
use super::outgoing::software;
use super::verdicts::{VERDICT_KEPT, Verdicts};
use crate::event::Event;

/// How long a source whose migration is over (a dry run's, say) may take to be gone here.
const LEAVING: Duration = Duration::from_secs(2);
/// Connections that are heard out at the same time.
const GREETED_MAX: usize = 16;
/// What a source is told that comes second.
const BUSY: &str = "another migration is under way here: try again later";
/// What a source is told where a guest has come already.
const TAKEN: &str =
    "a guest has come here already, and this listener takes one (with --keep, many)";
/// What follows for the guest when the connection is lost before it is handed over.
const GUEST_IS_GONE: &str = "; if the source is gone, the guest is gone: nothing of it runs here, and its disks are untouched";
/// How often a wait looks up.
const LOOK: Duration = Duration::from_millis(100);

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
    /// It was no source, or one that speaks another protocol: why.
    Stray(String),
    /// The source only looked (`--dry-run`), or came to ask.
    Nothing,
}

/// What a connection has turned out to be; or that it was no source, and why.
pub type Caller = Result<Opening, Box<Ended>>;

/// Accepts connections on a thread of its own, and hears on one for each what it wants: a connection that says
/// nothing keeps no source waiting, and a second source is refused at once. Dropping it ends the listening.
pub struct Door {
    listener: Arc<Listener>,
    callers: Receiver<(Caller, Option<Claim>)>,
}

/// The place of the one source, or asker, that a door lets in; free again when it is dropped.
pub struct Claim(Arc<AtomicBool>);

impl Claim {
    /// Claims the place, if the one before has gone or is just going.
    fn stake(busy: &Arc<AtomicBool>) -> Option<Self> {
        becomes_free(|| !busy.swap(true, Ordering::SeqCst)).then(|| Self(Arc::clone(busy)))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl Door {
    /// Opens the door.
    ///
    /// # Errors
    /// There can be no thread.
    pub fn open(listener: Listener) -> std::io::Result<Self> {
        let listener = Arc::new(listener);
        let (give, callers) = mpsc::channel();
        let listening = Arc::clone(&listener);
        std::thread::Builder::new()
            .name("listen".to_owned())
            .spawn(move || accept_all(&listening, &give))?;
        Ok(Self { listener, callers })
    }

    /// Waits for the next caller, until an event says to end. `None`: the end. No other source is let in
    /// before the claim is dropped.
    #[must_use]
    pub fn next(&self, events: &Receiver<Event>) -> Option<(Caller, Option<Claim>)> {
        loop {
            match self.callers.recv_timeout(LOOK) {
                Ok(caller) => return Some(caller),
                Err(mpsc::RecvTimeoutError::Disconnected) => return None,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            if let Ok(Event::Signal(_) | Event::ConsoleQuit) = events.try_recv() {
                return None;
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
                    Ok(Opening::Migrate(target)) => target.refuse(TAKEN),
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

/// Whether it is free, or becomes so while the one before is just going.
fn becomes_free(is_free: impl Fn() -> bool) -> bool {
    let until = Instant::now() + LEAVING;
    while !is_free() {
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

fn accept_all(listener: &Listener, give: &Sender<(Caller, Option<Claim>)>) {
    let busy = Arc::new(AtomicBool::new(false));
    let greeted = Arc::new(());
    loop {
        match listener.accept() {
            Ok(Some(channel)) => {
                // Each thread that hears one out has a copy.
                let room = || Arc::strong_count(&greeted) <= GREETED_MAX;
                if !becomes_free(|| room() && !busy.load(Ordering::SeqCst)) {
                    target::refuse(channel, BUSY);
                    continue;
                }
                let (busy, give, place) = (Arc::clone(&busy), give.clone(), Arc::clone(&greeted));
                let greet = move || {
                    greet(channel, &busy, &give);
                    drop(place);
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

/// The newest version of each section that has changed since the first.
fn reads() -> Reads {
    Reads::new(vec![(Serial::KIND.to_owned(), Serial::VERSION)])
}

/// Hears what a connection wants, and lets it in unless another has come first.
fn greet(channel: Channel, busy: &Arc<AtomicBool>, give: &Sender<(Caller, Option<Claim>)>) {
    let mut observer = |_: &Progress| Flow::Continue;
    let options = Options { reads: reads(), ..Options::new(software()) };
    let caller = target::accept(channel, options, &mut observer);
    let claim = if caller.is_ok() { Claim::stake(busy) } else { None };
    match caller {
        Ok(Opening::Migrate(target)) if claim.is_none() => target.refuse(BUSY),
        // It asks again.
        Ok(Opening::Question(_)) if claim.is_none() => {}
        // Nobody waits for callers any more: the connection ends.
        caller => drop(give.send((caller, claim))),
    }
}

/// Takes one guest from a caller, or learns why not. `verdicts` answers sources that ask.
pub fn take(
    caller: Caller,
    host: &mut Destination,
    verdicts: &mut Verdicts,
    observer: &mut dyn Observer,
) -> Arrival {
    let target = match caller {
        Ok(Opening::Migrate(target)) => target,
        Ok(Opening::Question(question)) => {
            // Whoever doesn't hear the answer asks again.
            answer_question(question, verdicts);
            return Arrival::Nothing;
        }
        Err(ended) => return Arrival::Stray(ended.error.line()),
    };
    match receive(target, host, observer) {
        Ok(arrival) => arrival,
        Err(ended) if ended.dry_run => Arrival::Nothing,
        Err(ended) => {
            if let Some(verdict) = &ended.verdict {
                verdicts.keep(verdict);
            }
            let mut why = ended.error.line();
            if ended.error.is_lost_connection() {
                why.push_str(GUEST_IS_GONE);
            }
            Arrival::Failed { why, in_doubt: ended.verdict.is_some() }
        }
    }
}

/// Gives whether the source has let go of the matter.
fn answer_question(question: Box<Question>, verdicts: &Verdicts) -> bool {
    let verdict = verdicts.find(question.id);
    question.answer(verdict.as_slice())
}

fn receive(
    target: Target<Greeted>,
    host: &mut Destination,
    observer: &mut dyn Observer,
) -> Result<Arrival, Box<Ended>> {
    let target = target.reserve(host, observer)?.precopy(observer)?.stop_and_copy(observer)?;
    let (arrived, farewell) = target.await_commit(observer)?.activate()?;
    Ok(Arrival::Taken(Box::new(arrived), farewell))
}
