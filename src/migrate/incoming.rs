//! The destination: waits for a source, takes its guest, and answers a source that lost our answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use vmm_migration::channel::{Channel, Flow};
use vmm_migration::report::{Observer, Progress};
use vmm_migration::target::{self, Ended, Farewell, Greeted, Opening, Options, Question, Target};

use super::arriving::{Arrived, Destination};
use super::link::Listener;
use super::outgoing::software;
use super::verdicts::{VERDICT_KEPT, Verdicts};
use crate::event::Event;

/// How long a source whose migration is over (a dry run's, say) may take to be gone here.
const LEAVING: Duration = Duration::from_millis(500);
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

/// Accepts connections on a thread of its own, so that a second source is refused at once. Dropping
/// it ends the listening.
pub struct Door {
    listener: Arc<Listener>,
    channels: Receiver<Channel>,
    busy: Arc<AtomicBool>,
}

impl Door {
    /// Opens the door.
    ///
    /// # Errors
    /// There can be no thread.
    pub fn open(listener: Listener) -> std::io::Result<Self> {
        let listener = Arc::new(listener);
        let busy = Arc::new(AtomicBool::new(false));
        let (give, channels) = mpsc::channel();
        let (listening, occupied) = (Arc::clone(&listener), Arc::clone(&busy));
        std::thread::Builder::new()
            .name("listen".to_owned())
            .spawn(move || accept_all(&listening, &occupied, &give))?;
        Ok(Self { listener, channels, busy })
    }

    /// Waits for the next connection, until an event says to end. `None`: the end.
    #[must_use]
    pub fn next(&self, events: &Receiver<Event>) -> Option<Channel> {
        loop {
            match self.channels.recv_timeout(LOOK) {
                Ok(channel) => return Some(channel),
                Err(mpsc::RecvTimeoutError::Disconnected) => return None,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            if let Ok(Event::Signal(_) | Event::ConsoleQuit) = events.try_recv() {
                return None;
            }
        }
    }

    /// The connection is dealt with: the next one may come.
    pub fn free(&self) {
        self.busy.store(false, Ordering::SeqCst);
    }

    /// Sees to it, on a thread of its own, that the source learns that its guest runs here: it may have
    /// lost our answer, and ask.
    pub fn say_farewell(self, mut farewell: Farewell, mut verdicts: Verdicts) {
        verdicts.keep(&farewell.verdict);
        let answer = move || {
            if farewell.source_knows() {
                return;
            }
            let until = Instant::now() + VERDICT_KEPT;
            self.free();
            while let Ok(channel) =
                self.channels.recv_timeout(until.saturating_duration_since(Instant::now()))
            {
                let mut observer = |_: &Progress| Flow::Continue;
                match target::accept(channel, Options::new(software()), &mut observer) {
                    Ok(Opening::Question(question)) => {
                        let ours = question.id == farewell.verdict.id;
                        if answer_question(question, &verdicts) && ours {
                            return;
                        }
                    }
                    // It hears of the end of its connection.
                    Ok(Opening::Migrate(_)) | Err(_) => {}
                }
                self.free();
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

/// Claims the door, if the one before has gone or is just going.
fn becomes_busy(busy: &AtomicBool) -> bool {
    let until = Instant::now() + LEAVING;
    while busy.swap(true, Ordering::SeqCst) {
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

fn accept_all(listener: &Listener, busy: &AtomicBool, give: &Sender<Channel>) {
    loop {
        match listener.accept() {
            Ok(Some(channel)) if !becomes_busy(busy) => {
                target::refuse(channel, "another migration is under way here: try again later");
            }
            Ok(Some(channel)) => {
                if give.send(channel).is_err() {
                    return;
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

/// Takes one guest over one connection, or learns why not. `verdicts` answers sources that ask.
pub fn take(
    channel: Channel,
    host: &mut Destination,
    verdicts: &mut Verdicts,
    observer: &mut dyn Observer,
) -> Arrival {
    let target = match target::accept(channel, Options::new(software()), observer) {
        Ok(Opening::Migrate(target)) => target,
        Ok(Opening::Question(question)) => {
            // Whoever doesn't hear the answer asks again.
            answer_question(question, verdicts);
            return Arrival::Nothing;
        }
        Err(ended) if ended.error.is_cancelled() => {
            return Arrival::Failed { why: ended.error.line(), in_doubt: false };
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
    let (arrived, farewell) = target.await_commit(observer)?.activate()?.into_parts();
    Ok(Arrival::Taken(Box::new(arrived), farewell))
}
