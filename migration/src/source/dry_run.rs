//! A dry run at the source: what the migration would be like, and nothing of the guest goes over.

use std::time::Duration;

use super::sender::{Feed, Sender, WINDOW_PAGES};
use super::{Aborted, Common, Reserved, Source};
use crate::error::MigrateError;
use crate::forecast::{Basis, Sample, forecast};
use crate::guest::{GuestError, Live};
use crate::message::PING_PADDING_MAX;
use crate::pages::{PAGE_SIZE, PageSet, Run};
use crate::plan::Plan;
use crate::policy::Fixed;
use crate::report::{Forecast, Observer, Outcome, Report};

/// The spans of a forecast's samples, in milliseconds from a common start.
const SAMPLES_MS: [u64; 5] = [5, 20, 100, 300, 1000];
/// Padding sent to measure the bandwidth of a dry run: so much at first and at most, or a tenth of a second of a capped
/// link.
const PROBE_BYTES_MIN: u64 = 64 << 10;
const PROBE_BYTES_MAX: u64 = 512 << 20;
/// How long sending it takes at least, for the time to tell.
const PROBE_TIME: Duration = Duration::from_millis(50);
/// How long pages are sent after that, to see how fast they are read here and taken there.
const PROBE_PAGES_TIME: Duration = Duration::from_millis(100);
/// Less than this tells nothing of them.
const PROBE_PAGES_TIME_MIN: Duration = Duration::from_millis(2);
/// ... and so many at most: 128 MiB.
const PROBE_PAGES_MAX: u64 = 1 << 15;
/// What they hold: nothing of the guest's.
const PROBE_BYTE: u8 = 0x5a;

impl<L: Live> Source<Reserved<L>> {
    /// What this migration would be like, from a second's sampling of the dirty rate and a probe of the
    /// bandwidth. The guest runs on; nothing has moved; the destination is told to forget it.
    ///
    /// # Errors
    /// The forecast couldn't be made; the guest runs on.
    pub fn forecast(
        mut self,
        observer: &mut dyn Observer,
    ) -> Result<(L, Forecast, Report), Box<Aborted<L>>> {
        let Reserved { mut guest, plan, fixed, .. } = self.stage;
        match self.common.sample(&mut guest, &plan, fixed, observer) {
            Ok(made) => {
                guest.stop_tracking();
                let stage = self.common.progress.stage;
                let reasons = vec!["a dry run ends here".to_owned()];
                self.common.cancel(&MigrateError::Refused { stage, reasons });
                self.common.report.forecast = Some(made.clone());
                Ok((guest, made, self.common.report(Outcome::NotMoved)))
            }
            Err(error) => Err(self.common.abort(guest, error)),
        }
    }
}

/// The guest's pages are read, and others sent.
struct Masked<'a, L>(&'a mut L);

impl<L: Live> Feed for Masked<'_, L> {
    fn prepare(&mut self, _runs: &[Run]) -> Result<(), GuestError> {
        Ok(())
    }

    fn read(&mut self, run: Run, bytes: &mut [u8]) -> Result<(), GuestError> {
        self.0.read(run, bytes)?;
        bytes.fill(PROBE_BYTE);
        Ok(())
    }
}

impl Common {
    fn sample<L: Live>(
        &mut self,
        guest: &mut L,
        plan: &Plan,
        fixed: Fixed,
        observer: &mut dyn Observer,
    ) -> Result<Forecast, MigrateError> {
        let send_bytes_per_s = self.probe_link(observer)?;
        guest.start_tracking().map_err(self.guest_error("starting dirty tracking"))?;
        let (mut armed, mut some) = (PageSet::new(), PageSet::new());
        let enough = PROBE_PAGES_MAX.min(pages_in(send_bytes_per_s, PROBE_PAGES_TIME));
        for window in self.regions.clone().into_iter().flat_map(|r| r.pieces(WINDOW_PAGES)) {
            armed.clear();
            let arming = guest.first_pages(window, &mut armed);
            arming.map_err(self.guest_error("starting dirty tracking"))?;
            for run in armed.runs() {
                let room = enough.saturating_sub(some.len());
                Run::new(run.first(), run.count().min(room))
                    .into_iter()
                    .for_each(|run| some.insert(run));
            }
        }
        let (start, mut dirty) = (self.channel.now(), PageSet::new());
        let mut samples = Vec::new();
        for end in SAMPLES_MS.map(Duration::from_millis) {
            self.rest((start + end).saturating_sub(self.channel.now()), observer)?;
            let collected = guest.dirty_pages(&mut dirty);
            collected.map_err(self.guest_error("collecting dirty pages"))?;
            let time = self.channel.now() - start;
            samples.push(Sample { time, pages: dirty.len() });
        }
        let pages_bytes_per_s = self.probe_pages(guest, &some, observer)?;
        let send_bytes_per_s = send_bytes_per_s.min(pages_bytes_per_s);
        let limits = self.options.limits;
        let made = forecast(&Basis {
            samples,
            pages: self.progress.pages_total,
            touched_pages: plan.touched_pages,
            send_bytes_per_s,
            fixed: fixed.time(send_bytes_per_s),
            downtime: limits.downtime,
            timeout: limits.timeout,
        });
        Ok(made)
    }

    /// Measures the link with padding, which the destination reads and drops: more and more of it, until it takes
    /// long enough to tell.
    fn probe_link(&mut self, observer: &mut dyn Observer) -> Result<u64, MigrateError> {
        let tenth = self.options.bandwidth.map_or(u64::MAX, |rate| rate / 10);
        let most = tenth.clamp(1, PROBE_BYTES_MAX);
        let round_trip = Duration::from_micros(self.report.round_trip_us);
        let mut bytes = PROBE_BYTES_MIN.min(most);
        self.begin_within(self.options.deadlines.reserve);
        loop {
            let start = self.channel.now();
            let padding = bytes.min(PING_PADDING_MAX as u64);
            let records = bytes / padding;
            for token in 0..records {
                self.ping(token, usize::try_from(padding).unwrap_or(PING_PADDING_MAX), observer)?;
            }
            for token in 0..records {
                self.pong(token, observer)?;
            }
            let time = (self.channel.now() - start).saturating_sub(round_trip);
            if time >= PROBE_TIME || bytes >= most {
                let rate = rate(records * padding, time);
                self.deadline = None;
                return Ok(self.options.bandwidth.map_or(rate, |cap| rate.min(cap)));
            }
            bytes = (bytes * 2).min(most);
        }
    }

    /// Measures how fast pages are read here, and taken by the destination's memory, which nobody used before: over a
    /// quick link that is what limits a migration. They are sent as in its first round, with another content; the
    /// destination drops them with all the rest.
    fn probe_pages<L: Live>(
        &mut self,
        guest: &mut L,
        pages: &PageSet,
        observer: &mut dyn Observer,
    ) -> Result<u64, MigrateError> {
        let start = self.channel.now();
        let mut sender = Sender::new(self);
        sender.begin(self);
        self.begin_within(self.options.deadlines.reserve);
        sender.send(self, pages, &mut Masked(guest), observer)?;
        sender.flush(self, observer)?;
        self.ping(0, 0, observer)?;
        self.pong(0, observer)?;
        self.deadline = None;
        let round_trip = Duration::from_micros(self.report.round_trip_us);
        let time = (self.channel.now() - start).saturating_sub(round_trip);
        let tells = time >= PROBE_PAGES_TIME_MIN && sender.sent.data_bytes() > 0;
        Ok(if tells { rate(sender.sent.data_bytes(), time) } else { u64::MAX })
    }
}

/// Bytes a second.
fn rate(bytes: u64, time: Duration) -> u64 {
    let sent = u128::from(bytes) * 1_000_000_000;
    u64::try_from(sent / time.as_nanos().max(1)).unwrap_or(u64::MAX)
}

/// The pages that go over in a time.
fn pages_in(bytes_per_s: u64, time: Duration) -> u64 {
    let bytes = u128::from(bytes_per_s) * time.as_millis() / 1000;
    u64::try_from(bytes / PAGE_SIZE as u128).unwrap_or(u64::MAX)
}
