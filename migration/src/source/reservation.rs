//! Stages 0 and 1: greets the destination, learns what it reads, and has it make a place for the guest.

use std::time::Duration;

use super::{Common, Connected, Options, PINGS, Reserved, Source};
use crate::channel::Channel;
use crate::chunk::Encoding;
use crate::error::MigrateError;
use crate::guest::Live;
use crate::message::{
    self, Accepted, CONFIG_KIND, Hello, HelloReply, LockMark, Message, PROTOCOL_MAX, PROTOCOL_MIN,
    Reads, Reserve,
};
use crate::plan::Plan;
use crate::policy::Fixed;
use crate::report::{Observer, Progress, Report, Stage, micros};
use crate::source::Aborted;
use crate::state::Section;
use crate::wire::{HEAD_LEN, SUM_LEN};

impl Source<Connected> {
    /// Stage 0, pre-migration: greets the destination over a fresh connection.
    ///
    /// # Errors
    /// No answer, no common protocol, or the destination refuses; no guest is concerned.
    pub fn connect(
        channel: Channel,
        options: Options,
        observer: &mut dyn Observer,
    ) -> Result<Self, MigrateError> {
        let started = channel.now();
        let report = Report { id: options.id.to_string(), ..Report::default() };
        let progress = Progress::default();
        let mut common = Box::new(Common {
            channel,
            options,
            progress,
            report,
            started,
            regions: Vec::new(),
            deadline: None,
            cut_at: None,
            time_up_at: None,
            reads: Reads::default(),
            sections: Vec::new(),
        });
        // The destination learns why, not only that the connection ended: it is about to wait for a guest.
        let reply = common.greet(observer).inspect_err(|error| common.cancel(error))?;
        common.report.protocol = reply.protocol;
        common.report.destination = reply.software;
        Ok(Self { common, stage: Connected(()) })
    }

    /// Stage 1, reservation: the destination checks the guest's plan, makes a place for it, and tries to
    /// restore an example of its state.
    ///
    /// # Errors
    /// The destination refuses, with every reason; the guest runs on.
    pub fn reserve<L: Live>(
        mut self,
        mut guest: L,
        observer: &mut dyn Observer,
    ) -> Result<Source<Reserved<L>>, Box<Aborted<L>>> {
        self.common.progress.stage = Stage::Reservation;
        match self.common.reserve(&mut guest, observer) {
            Ok((plan, accepted, fixed)) => {
                let locks_seen = accepted.locks_seen;
                let stage = Reserved { guest, plan, locks_seen, fixed };
                Ok(Source { common: self.common, stage })
            }
            Err(error) => Err(self.common.abort(guest, error)),
        }
    }
}

impl Common {
    /// `Hello`, and what the destination answers, which has to be something to go on with.
    fn greet(&mut self, observer: &mut dyn Observer) -> Result<HelloReply, MigrateError> {
        let hello = Message::Hello(Hello {
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
            id: self.options.id,
            software: self.options.software.clone(),
        });
        let still = self.options.deadlines.still;
        self.begin_within(still);
        self.exchange(still, observer, |channel, wait| {
            channel.put_preamble();
            let sent = channel.send(&hello, wait);
            // Also of a destination that turned us away without listening: its reason comes next.
            channel.recv_preamble(wait).and(sent)
        })?;
        let reply = self.hello_reply(observer)?;
        let mut reasons = Vec::new();
        if message::negotiate(reply.protocol, reply.protocol).is_none() {
            reasons.push(format!(
                "the destination chose protocol {}, the source speaks {PROTOCOL_MIN} to {PROTOCOL_MAX}",
                reply.protocol
            ));
        }
        if reply.encodings & Encoding::KNOWN != Encoding::KNOWN {
            reasons.push("the destination doesn't take zero or raw pages".to_owned());
        }
        if !reasons.is_empty() {
            return Err(MigrateError::Refused { stage: Stage::PreMigration, reasons });
        }
        Ok(reply)
    }

    /// `HelloReply`, and before it, unless the destination is an older one, what it reads.
    fn hello_reply(&mut self, observer: &mut dyn Observer) -> Result<HelloReply, MigrateError> {
        let still = self.options.deadlines.still;
        self.begin_within(still);
        let first = self.receive("HelloReply", still, observer, |message| match message {
            Message::Reads(_) | Message::HelloReply(_) => Ok(message),
            other => Err(other),
        })?;
        if let Message::HelloReply(reply) = first {
            return Ok(reply);
        }
        if let Message::Reads(reads) = first {
            self.reads = reads;
        }
        self.receive("HelloReply", still, observer, |message| match message {
            Message::HelloReply(reply) => Ok(reply),
            other => Err(other),
        })
    }

    fn reserve<L: Live>(
        &mut self,
        guest: &mut L,
        observer: &mut dyn Observer,
    ) -> Result<(Plan, Accepted, Fixed), MigrateError> {
        let mut plan = guest
            .plan(self.reads.version(CONFIG_KIND))
            .map_err(self.guest_error("describing the guest"))?;
        plan.lower_to(&self.reads);
        let faults = plan.faults();
        if !faults.is_empty() {
            return Err(MigrateError::Refused { stage: Stage::Reservation, reasons: faults });
        }
        self.progress.pages_total = plan.ram().map_or(0, crate::plan::Space::pages);
        let regions = plan.ram().map_or(&[][..], |ram| &ram.regions);
        self.regions = regions.iter().filter_map(|region| region.run()).collect();
        self.report.name.clone_from(&plan.name);
        self.report.pages = self.progress.pages_total;
        self.sections.clone_from(&plan.sections);
        let example = self.example(guest, observer)?;
        let state_bytes = example.sections.iter().map(record_bytes).sum();
        let example_sections = u32::try_from(example.sections.len()).unwrap_or(u32::MAX);
        let reserve = Reserve { plan, example_sections, dry_run: self.options.dry_run };
        let reserve = Message::Reserve(Box::new(reserve));
        let mark = guest.lock_mark().map(|end| Message::LockMark(LockMark { end }));
        let deadlines = self.options.deadlines;
        self.begin_within(deadlines.reserve);
        self.exchange(deadlines.still, observer, |channel, wait| {
            mark.iter().for_each(|mark| channel.put(mark));
            channel.put(&reserve);
            example.sections.into_iter().for_each(|s| channel.put(&Message::Section(s)));
            channel.flush(wait)
        })?;
        self.begin_within(deadlines.reserve);
        let accepted = self.receive("Accepted", deadlines.reserve, observer, |m| match m {
            Message::Accepted(accepted) => Ok(accepted),
            other => Err(other),
        })?;
        let Message::Reserve(reserve) = reserve else { unreachable!("made above") };
        let round_trip = self.round_trip(observer)?;
        // Only what follows is of any size. What went before isn't paid for: pings have no time to wait for it.
        self.channel.set_bandwidth(self.options.bandwidth);
        self.report.round_trip_us = micros(round_trip);
        self.report.warnings.clone_from(&accepted.warnings);
        self.report.trial_restore_us = accepted.trial_restore_us;
        let fixed = Fixed {
            stop: Duration::from_micros(example.stop_us),
            state_bytes,
            restore: Duration::from_micros(accepted.trial_restore_us.unwrap_or(0)),
            round_trip,
            flush: Duration::ZERO,
        };
        Ok((reserve.plan, accepted, fixed))
    }

    fn round_trip(&mut self, observer: &mut dyn Observer) -> Result<Duration, MigrateError> {
        let mut shortest = Duration::MAX;
        for token in 0..PINGS {
            let start = self.channel.now();
            self.begin_within(self.options.deadlines.still);
            self.ping(token, 0, observer)?;
            self.pong(token, observer)?;
            shortest = shortest.min(self.channel.now() - start);
        }
        self.deadline = None;
        Ok(shortest)
    }

    pub(crate) fn ping(
        &mut self,
        token: u64,
        padding: usize,
        observer: &mut dyn Observer,
    ) -> Result<(), MigrateError> {
        let still = self.options.deadlines.still;
        self.exchange(still, observer, |channel, wait| {
            channel.send(&Message::Ping(token, padding), wait)
        })
    }

    pub(crate) fn pong(
        &mut self,
        token: u64,
        observer: &mut dyn Observer,
    ) -> Result<(), MigrateError> {
        self.receive("Pong to this Ping", self.options.deadlines.still, observer, |message| {
            match message {
                Message::Pong(found) if found == token => Ok(()),
                other => Err(other),
            }
        })
    }
}

/// A section's record, in bytes.
fn record_bytes(section: &Section) -> u64 {
    const NUMBERS: usize = 1 + 4 + 2;
    (HEAD_LEN + NUMBERS + section.kind.len() + section.body.len() + SUM_LEN) as u64
}
