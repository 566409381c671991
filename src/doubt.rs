//! The control thread while nobody knows who has a guest that was to move: it tries to find out, and answers its
//! clients and obeys orders all the while.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde_json::json;
use vmm_migration::channel::Flow;
use vmm_migration::report::{Observer, Progress};
use vmm_migration::source::Decision;

use crate::config::Config;
use crate::event::{ApiError, Event, Reply, Request, Resolution};
use crate::migrate::outgoing::{Departure, Pending};
use crate::migrate::uri::Uri;
use crate::vm::Vm;

/// How often a source in doubt tries to find out.
const RETRY_PERIOD: Duration = Duration::from_secs(2);

/// What the control thread hears meanwhile.
pub struct Doubt<'a> {
    inbox: &'a Receiver<Event>,
    deferred: &'a mut VecDeque<Event>,
    config: &'a Config,
    /// What is known, for who asks.
    known: String,
    word: Option<Word>,
}

/// What ends the wait.
enum Word {
    Decided(Decision, Reply),
    /// An order to end the VM.
    End(Event),
}

/// An order to end came before it was known.
pub struct Ended {
    /// Which.
    pub why: String,
    /// What was known.
    pub known: String,
}

impl<'a> Doubt<'a> {
    /// Begins. `deferred` has what came during the migration, and takes what has to wait for the end.
    pub fn new(
        inbox: &'a Receiver<Event>,
        deferred: &'a mut VecDeque<Event>,
        config: &'a Config,
    ) -> Self {
        Self { inbox, deferred, config, known: String::new(), word: None }
    }

    /// Tries until it is known who has the guest, or somebody says so.
    ///
    /// # Errors
    /// The VM is to end.
    pub fn settle(mut self, mut pending: Pending, uri: &Uri) -> Result<Departure, Ended> {
        loop {
            self.known = pending.explain();
            self.recall();
            self.wait();
            let departure = match self.word.take() {
                None => pending.retry(uri, &mut self),
                Some(Word::Decided(decision, operator)) => {
                    let departure = pending.decide(decision);
                    operator.done(match &departure {
                        Departure::Pending(still) => Err(ApiError::conflict(still.explain())),
                        _ => Ok(json!({})),
                    });
                    departure
                }
                Some(Word::End(event)) => {
                    return Err(Ended { why: end(event), known: self.known });
                }
            };
            match departure {
                Departure::Pending(still) => pending = still,
                settled => {
                    self.too_late(&settled);
                    return Ok(settled);
                }
            }
        }
    }

    /// An order to end that came when nobody knew yet that it would be in doubt.
    fn recall(&mut self) {
        if self.word.is_none()
            && let Some(at) = self.deferred.iter().position(is_end)
        {
            self.word = self.deferred.remove(at).map(Word::End);
        }
    }

    /// Waits a while, or for a word.
    fn wait(&mut self) {
        let until = Instant::now() + RETRY_PERIOD;
        while self.word.is_none() {
            match self.inbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(event) => self.hear(event),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn hear(&mut self, event: Event) {
        match event {
            event if is_end(&event) && self.word.is_none() => self.word = Some(Word::End(event)),
            Event::Request { request: Request::Info, reply } => {
                let mut info = Vm::describe(self.config, "in-doubt");
                info["message"] = json!(self.known);
                reply.done(Ok(info));
            }
            Event::Request { request: Request::Resolve(resolution), reply }
                if self.word.is_none() =>
            {
                let decision = match resolution {
                    Resolution::Resume => Decision::Resume,
                    Resolution::Discard => Decision::Discard,
                };
                self.word = Some(Word::Decided(decision, reply));
            }
            Event::Request { reply, request }
                if !matches!(request, Request::Stop { force: true }) =>
            {
                reply.done(Err(ApiError::conflict(self.known.clone())));
            }
            // The guest stands: these are of its last moments, and matter if it goes on. Or it is another order to end.
            other => self.deferred.push_back(other),
        }
    }

    /// It became known just as a word on it came.
    fn too_late(&mut self, settled: &Departure) {
        match (self.word.take(), settled) {
            (None, _) => {}
            (Some(Word::Decided(Decision::Discard, operator)), Departure::Moved { .. })
            | (Some(Word::Decided(Decision::Resume, operator)), Departure::Stayed { .. }) => {
                operator.done(Ok(json!({})));
            }
            (Some(Word::Decided(_, operator)), Departure::Moved { .. }) => {
                operator.done(Err(ApiError::conflict("it is known by now: the guest has moved")));
            }
            (Some(Word::Decided(_, operator)), _) => {
                operator.done(Err(ApiError::conflict("it is known by now: the guest is here")));
            }
            // It ends if it is here.
            (Some(Word::End(event)), _) => self.deferred.push_front(event),
        }
    }
}

impl Observer for Doubt<'_> {
    /// Cancels a try for the sake of a word.
    fn observe(&mut self, _progress: &Progress) -> Flow {
        while let Ok(event) = self.inbox.try_recv() {
            self.hear(event);
        }
        if self.word.is_some() { Flow::Cancel } else { Flow::Continue }
    }
}

fn is_end(event: &Event) -> bool {
    matches!(
        event,
        Event::Signal(_)
            | Event::ConsoleQuit
            | Event::Request { request: Request::Stop { force: true }, .. }
    )
}

/// Answers whoever gave an order to end; what it was.
fn end(event: Event) -> String {
    match event {
        Event::Signal(signal) => format!("ended by signal {signal}"),
        Event::ConsoleQuit => "ended from the console".to_owned(),
        Event::Request { reply, .. } => {
            reply.done(Ok(json!({ "ended": "forced" })));
            "stopped by force".to_owned()
        }
        Event::Guest(_) | Event::Vcpu { .. } => unreachable!("no order"),
    }
}
