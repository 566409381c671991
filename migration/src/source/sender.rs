//! Sends sets of pages: batches of runs, read into one buffer, tested for zero, checked and written.

use std::time::Duration;

use super::Common;
use crate::chunk::{Builder, DATA_PAGES_MAX};
use crate::error::MigrateError;
use crate::guest::{GuestError, Live, Memory};
use crate::pages::{PAGE_SIZE, PageSet, Run};
use crate::plan::SPACE_RAM;
use crate::report::Observer;

/// Pages armed at once in round 0: 64 MiB, which KVM write-protects in about 0.1 ms.
pub const WINDOW_PAGES: u64 = 1 << 14;

/// A capped link is given records of this many milliseconds, so that a cancellation is heard.
const CAPPED_RECORD_MS: u64 = 50;

/// ... but not of fewer pages.
const RECORD_PAGES_MIN: usize = 4;

/// What to do with pages right before they are read, and how to read them.
pub(super) trait Feed {
    fn prepare(&mut self, runs: &[Run]) -> Result<(), GuestError>;
    fn read(&mut self, run: Run, bytes: &mut [u8]) -> Result<(), GuestError>;
}

/// Pages of round 0, whose window is armed already; and of a guest that stands.
pub(super) struct AsTheyAre<'a, M>(pub(super) &'a mut M);

impl<M: Memory> Feed for AsTheyAre<'_, M> {
    fn prepare(&mut self, _runs: &[Run]) -> Result<(), GuestError> {
        Ok(())
    }

    fn read(&mut self, run: Run, bytes: &mut [u8]) -> Result<(), GuestError> {
        self.0.read(run, bytes)
    }
}

/// Pages of a later round, armed batch by batch.
pub(super) struct Rearmed<'a, L>(pub(super) &'a mut L);

impl<L: Live> Feed for Rearmed<'_, L> {
    fn prepare(&mut self, runs: &[Run]) -> Result<(), GuestError> {
        self.0.rearm(runs)
    }

    fn read(&mut self, run: Run, bytes: &mut [u8]) -> Result<(), GuestError> {
        self.0.read(run, bytes)
    }
}

/// What went out.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sent {
    pub(super) pages: u64,
    pub(super) zero_pages: u64,
    /// The time that went into pages with data. Looking for zeros isn't counted: it would make the
    /// link look slow.
    pub(super) data_time: Duration,
}

impl Sent {
    pub(super) fn data_bytes(&self) -> u64 {
        (self.pages - self.zero_pages) * PAGE_SIZE as u64
    }
}

/// The buffer of one migration, about 1 MiB.
pub(super) struct Sender {
    /// The type of record that pages go in.
    kind: u32,
    builder: Builder,
    batch: Vec<Run>,
    pub(super) sent: Sent,
    /// What the round didn't come to send, as it was cut short.
    pub(super) left: PageSet,
    /// The pages of the record being built, and since when.
    pending: u64,
    since: Duration,
}

impl Sender {
    pub(super) fn new(common: &Common) -> Self {
        let capped = |rate: u64| rate / 1000 * CAPPED_RECORD_MS / PAGE_SIZE as u64;
        let pages = common.options.bandwidth.map_or(DATA_PAGES_MAX as u64, capped);
        let pages = usize::try_from(pages)
            .unwrap_or(DATA_PAGES_MAX)
            .clamp(RECORD_PAGES_MIN, DATA_PAGES_MAX);
        Self {
            kind: common.reads.pages_record(common.options.pages_checksum),
            builder: Builder::new(SPACE_RAM, pages),
            batch: Vec::new(),
            sent: Sent::default(),
            left: PageSet::new(),
            pending: 0,
            since: common.channel.now(),
        }
    }

    /// Begins a round.
    pub(super) fn begin(&mut self, common: &Common) {
        self.sent = Sent::default();
        self.left.clear();
        self.since = common.channel.now();
    }

    /// Sends the pages of `set`, region by region, as [`Sender::send_window`].
    pub(super) fn send(
        &mut self,
        common: &mut Common,
        set: &PageSet,
        feed: &mut impl Feed,
        observer: &mut dyn Observer,
    ) -> Result<(), MigrateError> {
        common.progress.pages_left = set.len();
        for at in 0..common.regions.len() {
            let region = common.regions[at];
            self.send_window(common, set, region, feed, observer)?;
        }
        Ok(())
    }

    /// Sends the pages of `set` in `window`, which lies in one region. The last record may stay behind for [`Sender::flush`],
    /// and all that comes after the round was cut short stays in `left`.
    pub(super) fn send_window(
        &mut self,
        common: &mut Common,
        set: &PageSet,
        window: Run,
        feed: &mut impl Feed,
        observer: &mut dyn Observer,
    ) -> Result<(), MigrateError> {
        if common.regions.iter().any(|region| region.first() == window.first()) {
            self.builder.set_apart();
        }
        let mut runs = set.runs_in(window);
        let mut rest: Option<Run> = None;
        loop {
            if common.is_cut_short() {
                rest.into_iter().chain(runs).for_each(|run| self.left.insert(run));
                return Ok(());
            }
            let room = self.builder.room();
            let mut pages = 0;
            self.batch.clear();
            while pages < room
                && let Some(run) = rest.take().or_else(|| runs.next())
            {
                let piece = run.pieces(room - pages).next().expect("a run has pages");
                rest = Run::new(piece.end(), run.end() - piece.end());
                pages += piece.count();
                self.batch.push(piece);
            }
            if self.batch.is_empty() {
                return Ok(());
            }
            feed.prepare(&self.batch).map_err(common.guest_error("re-arming dirty tracking"))?;
            for &run in &self.batch {
                let read = self.builder.add(run, |bytes| feed.read(run, bytes));
                read.map_err(common.guest_error("reading guest memory"))?;
            }
            self.pending += pages;
            common.progress.pages_left = common.progress.pages_left.saturating_sub(pages);
            if self.builder.is_full() {
                self.flush(common, observer)?;
            } else {
                // Long zero runs send nothing for a while: the observer is asked all the same.
                let still = common.options.deadlines.still;
                common.exchange(still, observer, |_, _| Ok(()))?;
            }
        }
    }

    /// Sends what is collected.
    pub(super) fn flush(
        &mut self,
        common: &mut Common,
        observer: &mut dyn Observer,
    ) -> Result<(), MigrateError> {
        if !self.builder.is_empty() {
            let zero_pages = self.builder.zero_pages();
            let (kind, parts) = (self.kind, self.builder.parts());
            let still = common.options.deadlines.still;
            common
                .exchange(still, observer, |channel, wait| channel.send_pages(kind, parts, wait))?;
            let time = common.channel.now() - self.since;
            let data = self.pending - zero_pages;
            self.sent.pages += self.pending;
            self.sent.zero_pages += zero_pages;
            self.sent.data_time += share(time, data, self.pending);
            self.builder.clear();
        }
        self.pending = 0;
        self.since = common.channel.now();
        Ok(())
    }
}

/// `part` of `whole` of a span.
pub(crate) fn share(time: Duration, part: u64, whole: u64) -> Duration {
    let nanos = time.as_nanos() * u128::from(part) / u128::from(whole.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}
