//! Stages 2 and 3 at the destination: pages straight into the vacant guest, then its state.

use super::{Common, Destination, Ended, Prepared, Restored};
use crate::channel::{ChannelError, Flow, Incoming, Pages};
use crate::chunk::Encoding;
use crate::error::MigrateError;
use crate::guest::Vacant;
use crate::message::{End, Message, Ready, Reasons, RoundAck, StopAndCopy};
use crate::pages::{PageSet, Run};
use crate::plan::{Plan, Sections};
use crate::report::{Observer, Stage, micros};
use crate::state::Section;
use crate::wire::WireError;

/// Stage 2 is over: the source has stopped its guest.
#[derive(Debug)]
pub struct Copied<V> {
    memory: Arriving<V>,
    stop: StopAndCopy,
}

/// The vacant guest, and which of its pages hold something.
#[derive(Debug)]
struct Arriving<V> {
    guest: V,
    plan: Plan,
    written: PageSet,
}

impl<V: Vacant> Destination<Prepared<V>> {
    /// What will be moved here.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.stage.plan
    }

    /// Whether the source only looks: it will leave, and nothing of its guest comes.
    #[must_use]
    pub fn is_dry_run(&self) -> bool {
        self.common.dry_run
    }

    /// Stage 2, iterative pre-copy: takes pages until the source stops its guest.
    ///
    /// # Errors
    /// The source left, or sent what can't be.
    pub fn precopy(
        mut self,
        observer: &mut dyn Observer,
    ) -> Result<Destination<Copied<V>>, Box<Ended>> {
        self.common.progress.stage = Stage::PreCopy;
        let Prepared { guest, plan } = self.stage;
        let mut memory = Arriving { guest, plan, written: PageSet::new() };
        let stop = self.common.rounds(&mut memory, observer)?;
        Ok(Destination { common: self.common, stage: Copied { memory, stop } })
    }
}

impl Common {
    fn rounds<V: Vacant>(
        &mut self,
        memory: &mut Arriving<V>,
        observer: &mut dyn Observer,
    ) -> Result<StopAndCopy, Box<Ended>> {
        loop {
            let reply = match self.next(observer) {
                Ok(Incoming::Pages(pages)) => {
                    self.pages(memory, pages, observer).map_err(|error| self.give_up(error))?;
                    continue;
                }
                Ok(Incoming::Message(Message::Ping(token, _))) => Message::Pong(token),
                Ok(Incoming::Message(Message::RoundEnd(end))) => {
                    self.progress.round = end.round.saturating_add(1);
                    memory.guest.round_ended();
                    self.asked = self.channel.now();
                    Message::RoundAck(RoundAck { round: end.round })
                }
                Ok(Incoming::Message(Message::StopAndCopy(stop))) => return Ok(stop),
                Ok(Incoming::Message(other)) => return Err(self.unexpected(&other, "Pages")),
                Err(error) => return Err(self.give_up(error)),
            };
            self.ask(observer).map_err(|error| self.give_up(error))?;
            let sent = self.exchange(observer, |channel, wait| channel.send(&reply, wait));
            sent.map_err(|error| self.give_up(error))?;
        }
    }

    /// Whoever is to be asked, however busy the source is.
    pub(super) fn ask(&self, observer: &mut dyn Observer) -> Result<(), MigrateError> {
        if observer.observe(&self.progress) == Flow::Cancel {
            let stage = self.progress.stage;
            return Err(MigrateError::Channel { stage, source: ChannelError::Cancelled });
        }
        Ok(())
    }

    /// One record of pages.
    fn pages<V: Vacant>(
        &mut self,
        memory: &mut Arriving<V>,
        mut pages: Pages,
        observer: &mut dyn Observer,
    ) -> Result<(), MigrateError> {
        let stage = self.progress.stage;
        let guest_error = |doing| move |source| MigrateError::Guest { stage, doing, source };
        let kind = pages.kind;
        let outside = |what| MigrateError::Channel {
            stage,
            source: WireError::Malformed { kind, what }.into(),
        };
        self.ask(observer)?;
        let entries = std::mem::take(&mut pages.entries);
        for entry in entries {
            if !memory.plan.spaces.iter().any(|s| s.id == pages.space && s.contains(entry.run)) {
                return Err(outside("a run outside the guest's memory"));
            }
            match entry.encoding {
                Encoding::Zero => memory.zero(entry.run).map_err(guest_error("zeroing pages"))?,
                Encoding::Raw => {
                    memory.written.insert(entry.run);
                    let bytes = memory.guest.pages_mut(entry.run);
                    let bytes = bytes.map_err(guest_error("writing pages"))?;
                    if bytes.len() != entry.len {
                        return Err(outside("a run of another length than the guest's memory"));
                    }
                    self.exchange(observer, |channel, wait| {
                        channel.recv_data(&mut pages, bytes, wait)
                    })?;
                }
            }
        }
        self.exchange(observer, |channel, wait| channel.recv_pages_end(pages, wait))
    }
}

impl<V: Vacant> Arriving<V> {
    /// Only what was written needs zeroing.
    fn zero(&mut self, run: Run) -> Result<(), crate::guest::GuestError> {
        let written: Vec<Run> = self.written.runs_in(run).collect();
        for run in written {
            self.guest.zero(run)?;
            self.written.remove(run);
        }
        Ok(())
    }
}

impl<V: Vacant> Destination<Copied<V>> {
    /// Stage 3, stop-and-copy: the last pages, the sections, the digest; restores the guest and says
    /// `Ready`.
    ///
    /// # Errors
    /// Something didn't arrive whole or can't be restored; or the source left, perhaps in doubt (then
    /// there is a verdict).
    pub fn stop_and_copy(
        self,
        observer: &mut dyn Observer,
    ) -> Result<Destination<Restored<V>>, Box<Ended>> {
        let Destination { mut common, stage } = self;
        let Copied { mut memory, stop } = stage;
        common.progress.stage = Stage::StopAndCopy;
        common.progress.pages_left = stop.pages;
        let start = common.channel.now();
        let (sections, end) = common.last_burst(&mut memory, observer)?;
        let came = common.channel.now();
        let receive_us = micros(came - start);
        let reasons = memory.plan.mismatch(&sections);
        if !reasons.is_empty() {
            return Err(common.failed(reasons));
        }
        let start = common.channel.now();
        let restored = memory.guest.restore(&sections, common.saved_since(came));
        restored.map_err(|reasons| common.failed(reasons))?;
        let restore_us = micros(common.channel.now() - start);
        let ready = Message::Ready(Ready { receive_us, restore_us });
        match common.exchange(observer, |channel, wait| channel.send(&ready, wait)) {
            Ok(()) => {
                let stage = Restored { guest: memory.guest, paused: end.paused };
                Ok(Destination { common, stage })
            }
            Err(error) => Err(common.never_activated(error)),
        }
    }
}

impl Common {
    fn last_burst<V: Vacant>(
        &mut self,
        memory: &mut Arriving<V>,
        observer: &mut dyn Observer,
    ) -> Result<(Vec<Section>, End), Box<Ended>> {
        let mut sections = Sections::default();
        loop {
            let (records, digest) = self.channel.received_digest();
            match self.next(observer) {
                Ok(Incoming::Pages(pages)) => {
                    self.pages(memory, pages, observer).map_err(|error| self.give_up(error))?;
                }
                Ok(Incoming::Message(Message::Section(section))) => {
                    if !sections.push(section) {
                        return Err(self.failed(vec!["the state is too large".to_owned()]));
                    }
                }
                Ok(Incoming::Message(Message::End(end))) => {
                    let whole = usize::try_from(end.sections) == Ok(sections.len())
                        && (end.records, end.digest) == (records, digest);
                    if !whole {
                        return Err(self.failed(vec!["the stream's digest is wrong".to_owned()]));
                    }
                    return Ok((sections.into_vec(), end));
                }
                Ok(Incoming::Message(other)) => return Err(self.unexpected(&other, "End")),
                Err(error) => return Err(self.give_up(error)),
            }
        }
    }

    /// Gives up for reasons of this side.
    fn failed(&mut self, reasons: Vec<String>) -> Box<Ended> {
        self.tell(&Message::Failed(Reasons::new(reasons.clone())));
        self.ended(MigrateError::Refused { stage: self.progress.stage, reasons })
    }
}
