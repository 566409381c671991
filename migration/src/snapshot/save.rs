//! Writes a snapshot: all of it while the guest stands, or nearly all while it runs.

use std::path::Path;
use std::time::{Duration, Instant};

use super::files::Files;
use super::rounds::Start;
use super::storage::Storage;
use super::{Header, SnapshotError};
use crate::guest::{Halted, Live, Memory};
use crate::pages::PageSet;
use crate::plan::SectionId;
use crate::policy::Limits;
use crate::report::{Observer, Stage};
use crate::source::WINDOW_PAGES;
use crate::state::Section;

/// A snapshot that was written.
#[derive(Debug)]
pub struct Saved<L> {
    /// The guest, which goes on.
    pub guest: L,
    /// The header.
    pub header: Header,
    /// Pages of `memory` that hold something.
    pub pages: u64,
    /// How long the guest stood for it; it may have been paused anyway.
    pub stood: Duration,
}

/// A snapshot that wasn't. Nothing of it is left.
#[derive(Debug)]
pub struct NotSaved<L, H> {
    /// The guest, which goes on; or stands, whole, if it couldn't be resumed.
    pub guest: Result<L, H>,
    /// Why.
    pub error: SnapshotError,
}

/// Writes a snapshot of the guest into `dir`, which must not exist yet, and lets the guest go on.
///
/// With `live` the guest runs while most of its memory is written, until these limits are met. The files are written and
/// synced under another name beside `dir`, which is renamed at the end: after a crash there is either a whole
/// snapshot or none of this name. Disk locks stay held: the disks' contents are the caller's concern.
///
/// # Errors
/// The guest is handed back, running unless it couldn't be resumed.
pub fn save<L: Live>(
    dir: &Path,
    mut guest: L,
    mut header: Header,
    live: Option<Limits>,
    storage: &mut dyn Storage,
    observer: &mut dyn Observer,
) -> Result<Saved<L>, Box<NotSaved<L, L::Halted>>> {
    let not_saved = |guest, error| Err(Box::new(NotSaved { guest, error }));
    match guest.plan(u16::MAX) {
        Ok(plan) => header.plan = plan,
        Err(source) => {
            let error = SnapshotError::Guest { doing: "describing the guest", source };
            return not_saved(Ok(guest), error);
        }
    }
    let mut files = match Files::create(dir, &header, storage) {
        Ok(files) => files,
        Err(error) => return not_saved(Ok(guest), error),
    };
    let ran = while_running(&mut files, &mut guest, &header.plan.sections, live, storage, observer);
    let mut left = match ran {
        Ok(left) => left,
        Err(error) => {
            guest.stop_tracking();
            return not_saved(Ok(guest), error);
        }
    };
    let before = Duration::from_micros(guest.stall_us().unwrap_or(0));
    let stop = Instant::now();
    let mut halted = match guest.stop() {
        Ok(halted) => halted,
        Err(mut failed) => {
            failed.guest.stop_tracking();
            let error = SnapshotError::Guest { doing: "stopping the guest", source: failed.error };
            return not_saved(Ok(failed.guest), error);
        }
    };
    let saved = while_stopped(&mut files, &mut halted, &mut left, &header.plan.sections, observer);
    let paused = halted.paused();
    let guest = match halted.resume() {
        Ok(guest) => guest,
        Err(failed) => {
            let error = SnapshotError::Guest { doing: "resuming the guest", source: failed.error };
            return not_saved(Err(failed.guest), error);
        }
    };
    let stood = stop.elapsed().saturating_add(before);
    // The guest runs again: what is left is the disk's time, not the guest's.
    let done =
        saved.and_then(|sections| files.finish(dir, &header, &sections, paused, storage, observer));
    match done {
        Ok(pages) => Ok(Saved { guest, header, pages, stood }),
        Err(error) => not_saved(Ok(guest), error),
    }
}

/// Finds what was ever touched and, with limits, writes it round by round. Gives what is to be written once the guest
/// stands.
fn while_running<L: Live>(
    files: &mut Files,
    guest: &mut L,
    listed: &[SectionId],
    live: Option<Limits>,
    storage: &mut dyn Storage,
    observer: &mut dyn Observer,
) -> Result<PageSet, SnapshotError> {
    let tracking = |source| SnapshotError::Guest { doing: "dirty tracking", source };
    let stop = match live {
        None => Duration::ZERO,
        Some(_) => files.try_stop(guest, listed, None, observer)?.unwrap_or_default(),
    };
    files.progress.stage = Stage::PreCopy;
    let mut touched = PageSet::new();
    guest.start_tracking().map_err(tracking)?;
    let began = Instant::now();
    let regions = files.ram.regions.clone();
    for window in regions.iter().filter_map(|r| r.run()).flat_map(|r| r.pieces(WINDOW_PAGES)) {
        guest.first_pages(window, &mut touched).map_err(tracking)?;
    }
    match live {
        Some(limits) => {
            let start = Start { began, stop, listed };
            files.rounds(guest, touched, start, limits, storage, observer)
        }
        None => {
            // As long as storage takes, or until somebody cancels.
            let _ = files.settle(guest, None, observer)?;
            Ok(touched)
        }
    }
}

fn while_stopped<H: Halted>(
    files: &mut Files,
    guest: &mut H,
    left: &mut PageSet,
    listed: &[SectionId],
    observer: &mut dyn Observer,
) -> Result<Vec<Section>, SnapshotError> {
    let failed = |doing| move |source| SnapshotError::Guest { doing, source };
    files.progress.stage = Stage::StopAndCopy;
    guest.dirty_pages(left).map_err(failed("collecting the last dirty pages"))?;
    files.write_set(left, None, observer, |run, bytes| Memory::read(guest, run, bytes))?;
    guest.sections(listed).map_err(failed("saving the guest's state"))
}
