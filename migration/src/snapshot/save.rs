//! Writes a snapshot: all of it while the guest stands, or nearly all while it runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::memory_offset;
use super::partial::{Partial, parent_of};
use super::{BLOCK_LEN, Header, MEMORY_FILE, STATE_FILE, SnapshotError, encode_state, file_error};
use crate::channel::Flow;
use crate::guest::{GuestError, Halted, Live, Memory};
use crate::pages::{PAGE_SIZE, PageSet, Run, is_zero};
use crate::plan::{SectionId, Space};
use crate::report::{Observer, Progress, Stage};
use crate::source::WINDOW_PAGES;
use crate::state::Section;

/// Rounds of a live snapshot, at most, before the guest is stopped.
const ROUNDS_MAX: u32 = 30;
/// No more dirty pages than these are left to the stop: 4 MiB.
const LAST_PAGES: u64 = 1024;
/// Where a round leaves more than this much of what it wrote, in percent, the next would be as long, and so would the stop.
const SHRINK_PERCENT: u64 = 90;

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
/// With `live` the guest runs while most of its memory is written. The files are written and synced
/// under another name beside `dir`, which is renamed at the end: after a crash there is either a whole
/// snapshot or none of this name. Disk locks stay held: the disks' contents are the caller's concern.
///
/// # Errors
/// The guest is handed back, running unless it couldn't be resumed.
pub fn save<L: Live>(
    dir: &Path,
    mut guest: L,
    mut header: Header,
    live: bool,
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
    let mut files = match Files::create(dir, &header) {
        Ok(files) => files,
        Err(error) => return not_saved(Ok(guest), error),
    };
    let mut left = match files.while_running(&mut guest, live, observer) {
        Ok(left) => left,
        Err(error) => {
            guest.stop_tracking();
            return not_saved(Ok(guest), error);
        }
    };
    let stop = Instant::now();
    let mut halted = match guest.stop() {
        Ok(halted) => halted,
        Err(mut failed) => {
            failed.guest.stop_tracking();
            let error = SnapshotError::Guest { doing: "stopping the guest", source: failed.error };
            return not_saved(Ok(failed.guest), error);
        }
    };
    let saved = files.while_stopped(&mut halted, &mut left, &header.plan.sections, observer);
    let paused = halted.paused();
    let guest = match halted.resume() {
        Ok(guest) => guest,
        Err(failed) => {
            let error = SnapshotError::Guest { doing: "resuming the guest", source: failed.error };
            return not_saved(Err(failed.guest), error);
        }
    };
    let stood = stop.elapsed();
    // The guest runs again: what is left is the disk's time, not the guest's.
    match saved.and_then(|sections| files.finish(dir, &header, &sections, paused)) {
        Ok(pages) => Ok(Saved { guest, header, pages, stood }),
        Err(error) => not_saved(Ok(guest), error),
    }
}

/// A snapshot's files, under their temporary name, and what is known of them.
struct Files {
    partial: Partial,
    ram: Space,
    written: PageSet,
    sums: BTreeMap<u32, u32>,
    stale: BTreeSet<u32>,
    buffer: Vec<u8>,
    progress: Progress,
}

impl Files {
    fn create(dir: &Path, header: &Header) -> Result<Self, SnapshotError> {
        if dir.symlink_metadata().is_ok() {
            return Err(SnapshotError::Exists(dir.display().to_string()));
        }
        let ram = header.plan.ram().cloned().filter(|_| header.plan.faults().is_empty());
        let ram = ram.ok_or_else(|| SnapshotError::Damaged("a plan without RAM".to_owned()))?;
        let files = Self {
            partial: Partial::create(dir, header.id)?,
            written: PageSet::new(),
            sums: BTreeMap::new(),
            stale: BTreeSet::new(),
            buffer: vec![0; BLOCK_LEN],
            progress: Progress { pages_total: ram.pages(), ..Progress::default() },
            ram,
        };
        let len = files.ram.pages() * PAGE_SIZE as u64;
        let memory = &files.partial.memory;
        memory.set_len(len).map_err(|source| file_error("write", &files.path(), source))?;
        Ok(files)
    }

    /// Of `memory`.
    fn path(&self) -> PathBuf {
        self.partial.path.join(MEMORY_FILE)
    }

    /// Finds what was ever touched and, if `live`, writes it round by round. Gives what is to be written
    /// once the guest stands.
    fn while_running<L: Live>(
        &mut self,
        guest: &mut L,
        live: bool,
        observer: &mut dyn Observer,
    ) -> Result<PageSet, SnapshotError> {
        let tracking = |source| SnapshotError::Guest { doing: "dirty tracking", source };
        self.progress.stage = Stage::PreCopy;
        let mut left = PageSet::new();
        guest.start_tracking().map_err(tracking)?;
        let regions = self.ram.regions.clone();
        for window in regions.iter().filter_map(|r| r.run()).flat_map(|r| r.pieces(WINDOW_PAGES)) {
            guest.first_pages(window, &mut left).map_err(tracking)?;
        }
        let mut goes_on = live && left.len() > LAST_PAGES;
        while goes_on {
            let before = left.len();
            let first = self.progress.round == 0;
            self.write_set(&left, observer, |run, bytes| {
                if !first {
                    guest.rearm(&[run])?;
                }
                guest.read(run, bytes)
            })?;
            left.clear();
            guest.dirty_pages(&mut left).map_err(tracking)?;
            self.progress.round += 1;
            goes_on = is_worth_another(self.progress.round, before, left.len());
        }
        Ok(left)
    }

    fn while_stopped<H: Halted>(
        &mut self,
        guest: &mut H,
        left: &mut PageSet,
        listed: &[SectionId],
        observer: &mut dyn Observer,
    ) -> Result<Vec<Section>, SnapshotError> {
        let failed = |doing| move |source| SnapshotError::Guest { doing, source };
        self.progress.stage = Stage::StopAndCopy;
        guest.dirty_pages(left).map_err(failed("collecting the last dirty pages"))?;
        self.write_set(left, observer, |run, bytes| Memory::read(guest, run, bytes))?;
        guest.sections(listed).map_err(failed("saving the guest's state"))
    }

    fn write_set(
        &mut self,
        set: &PageSet,
        observer: &mut dyn Observer,
        mut read: impl FnMut(Run, &mut [u8]) -> Result<(), GuestError>,
    ) -> Result<(), SnapshotError> {
        self.progress.pages_left = set.len();
        let regions = self.ram.regions.clone();
        for run in regions.iter().filter_map(|r| r.run()).flat_map(|region| set.runs_in(region)) {
            let mut rest = Some(run);
            while let Some(run) = rest {
                // Pieces end where blocks do: a block written whole has its checksum at once.
                let outside =
                    || SnapshotError::Damaged("a page outside the guest's RAM".to_owned());
                let first =
                    Run::new(run.first(), 1).and_then(|page| memory_offset(&self.ram, page));
                let offset = first.ok_or_else(outside)?;
                let room = BLOCK_LEN as u64 - offset % BLOCK_LEN as u64;
                let piece = run.pieces(room / PAGE_SIZE as u64).next().expect("a run has pages");
                memory_offset(&self.ram, piece).ok_or_else(outside)?;
                let len = usize::try_from(piece.bytes()).expect("at most 1 MiB");
                let mut buffer = std::mem::take(&mut self.buffer);
                let result = read(piece, &mut buffer[..len])
                    .map_err(|source| SnapshotError::Guest { doing: "reading memory", source })
                    .and_then(|()| self.write(piece, offset, &buffer[..len]));
                self.buffer = buffer;
                result?;
                self.progress.pages_left -= piece.count();
                self.progress.bytes += piece.bytes();
                if observer.observe(&self.progress) == Flow::Cancel {
                    return Err(SnapshotError::Cancelled);
                }
                rest = Run::new(piece.end(), run.end() - piece.end());
            }
        }
        Ok(())
    }

    /// Writes a piece of one block, leaving holes where it is zero and always was.
    fn write(&mut self, run: Run, offset: u64, bytes: &[u8]) -> Result<(), SnapshotError> {
        let block = u32::try_from(offset / BLOCK_LEN as u64)
            .map_err(|_| SnapshotError::Damaged("RAM of over 4 PiB".to_owned()))?;
        let zero = |page: &Run| is_zero(&bytes[index(run, *page)..][..PAGE_SIZE]);
        let keep = |page: &Run| !zero(page) || self.written.contains(page.first());
        let kept: PageSet = run.pieces(1).filter(keep).collect();
        for piece in kept.runs_in(run) {
            let at = index(run, piece);
            let part = &bytes[at..at + usize::try_from(piece.bytes()).expect("at most 1 MiB")];
            let written = self.partial.memory.write_all_at(part, offset + at as u64);
            written.map_err(|source| file_error("write", &self.path(), source))?;
            self.written.insert(piece);
        }
        if bytes.len() == BLOCK_LEN && !kept.is_empty() {
            self.stale.remove(&block);
            self.sums.insert(block, crc32fast::hash(bytes));
        } else if !kept.is_empty() {
            self.stale.insert(block);
        }
        Ok(())
    }

    /// The checksums of blocks written in pieces, then `state`, then the name.
    fn finish(
        mut self,
        dir: &Path,
        header: &Header,
        sections: &[Section],
        paused: bool,
    ) -> Result<u64, SnapshotError> {
        let path = self.path();
        let total = self.ram.pages() * PAGE_SIZE as u64;
        let memory = &self.partial.memory;
        for block in std::mem::take(&mut self.stale) {
            let offset = u64::from(block) * BLOCK_LEN as u64;
            let len = usize::try_from((total - offset).min(BLOCK_LEN as u64)).expect("1 MiB");
            let read = memory.read_exact_at(&mut self.buffer[..len], offset);
            read.map_err(|source| file_error("read", &path, source))?;
            self.sums.insert(block, crc32fast::hash(&self.buffer[..len]));
        }
        memory.sync_all().map_err(|source| file_error("write", &path, source))?;
        let path = self.partial.path.join(STATE_FILE);
        let state = encode_state(header, sections, paused, &self.sums);
        let written = File::create_new(&path).and_then(|mut file| {
            file.write_all(&state)?;
            file.sync_all()
        });
        written.map_err(|source| file_error("write", &path, source))?;
        let sync = |path: &Path| File::open(path).and_then(|dir| dir.sync_all());
        sync(&self.partial.path)
            .and_then(|()| fs::rename(&self.partial.path, dir))
            .and_then(|()| sync(parent_of(dir)))
            .map_err(|source| match source.kind() {
                // Another snapshot of this name was quicker.
                ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists => {
                    SnapshotError::Exists(dir.display().to_string())
                }
                _ => file_error("create", dir, source),
            })?;
        Ok(self.written.len())
    }
}

/// Where a page of a run begins in the run's bytes.
fn index(run: Run, page: Run) -> usize {
    usize::try_from(page.first() - run.first()).expect("at most 256") * PAGE_SIZE
}

/// Whether a live snapshot goes on while the guest runs, after so many rounds, the last of which began with `before` pages
/// and ended with `left`.
fn is_worth_another(rounds: u32, before: u64, left: u64) -> bool {
    let shrank = u128::from(left) * 100 <= u128::from(before) * u128::from(SHRINK_PERCENT);
    left > LAST_PAGES && rounds < ROUNDS_MAX && shrank
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_go_on_while_they_make_the_stop_shorter() {
        assert!(is_worth_another(1, 1 << 20, 1 << 16));
        assert!(is_worth_another(2, 10_000, 9000));
        assert!(!is_worth_another(2, 10_000, 9001), "the guest dirties as fast as the disk takes");
        assert!(!is_worth_another(1, 10_000, 20_000));
        assert!(!is_worth_another(1, 1 << 20, LAST_PAGES), "what is left is little");
        assert!(is_worth_another(1, 1 << 20, LAST_PAGES + 1));
        // They end: each is shorter than the one before, and there is a most.
        let lasts = |percent: u64| {
            let (mut before, mut rounds) = (1_u64 << 28, 1);
            while is_worth_another(rounds, before, before * percent / 100) {
                (before, rounds) = (before * percent / 100, rounds + 1);
            }
            rounds
        };
        assert_eq!((lasts(10), lasts(50), lasts(90), lasts(91)), (6, 18, ROUNDS_MAX, 1));
    }
}
