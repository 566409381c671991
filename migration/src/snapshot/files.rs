//! A snapshot's two files while they are written: pages go in, checksums come out, and the name comes last.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::partial::{Partial, create_private, parent_of};
use super::rounds::{Bounds, Written};
use super::storage::{Step, Storage};
use super::sums::Sums;
use super::{BLOCK_LEN, Header, MEMORY_FILE, STATE_FILE, SnapshotError};
use super::{encode_state, file_error, memory_offset};
use crate::channel::Flow;
use crate::guest::GuestError;
use crate::pages::{PAGE_SIZE, PageSet, Run, is_zero};
use crate::plan::Space;
use crate::report::{Observer, Progress, Stage, micros};
use crate::state::Section;

/// A snapshot's files, under their temporary name, and what is known of them.
pub(super) struct Files {
    partial: Partial,
    pub(super) ram: Space,
    /// Pages of `memory` that hold something, or did.
    written: PageSet,
    sums: Sums,
    /// Blocks written in pieces, whose checksums are to be made.
    stale: BTreeSet<u32>,
    buffer: Vec<u8>,
    began: Instant,
    pub(super) progress: Progress,
}

impl Files {
    /// Makes them, empty.
    pub(super) fn create(
        dir: &Path,
        header: &Header,
        storage: &mut dyn Storage,
    ) -> Result<Self, SnapshotError> {
        if dir.symlink_metadata().is_ok() {
            return Err(SnapshotError::Exists(dir.display().to_string()));
        }
        let ram = header.plan.ram().cloned().filter(|_| header.plan.faults().is_empty());
        let ram = ram.ok_or_else(|| SnapshotError::Damaged("a plan without RAM".to_owned()))?;
        let files = Self {
            partial: Partial::create(dir, header.id)?,
            written: PageSet::new(),
            sums: Sums::new(storage),
            stale: BTreeSet::new(),
            buffer: vec![0; BLOCK_LEN],
            began: Instant::now(),
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

    /// Writes these pages as `read` gives them, until all are written or the time is up.
    pub(super) fn write_set(
        &mut self,
        set: &PageSet,
        bounds: Option<&Bounds>,
        observer: &mut dyn Observer,
        mut read: impl FnMut(Run, &mut [u8]) -> Result<(), GuestError>,
    ) -> Result<Written, SnapshotError> {
        self.progress.pages_left = set.len();
        let mut sum = Written::default();
        let regions = self.ram.regions.clone();
        for run in regions.iter().filter_map(|r| r.run()).flat_map(|region| set.runs_in(region)) {
            let mut rest = Some(run);
            while let Some(run) = rest {
                if bounds.is_some_and(Bounds::is_reached) {
                    sum.left.insert(run);
                    break;
                }
                let (piece, offset) = self.first_piece(run)?;
                let len = usize::try_from(piece.bytes()).expect("at most 1 MiB");
                let mut buffer = std::mem::take(&mut self.buffer);
                let start = Instant::now();
                let result = read(piece, &mut buffer[..len])
                    .map_err(|source| SnapshotError::Guest { doing: "reading memory", source })
                    .and_then(|()| self.write(piece, offset, &buffer[..len]));
                self.buffer = buffer;
                let kept = result?;
                if kept > 0 {
                    self.sum(offset, len)?;
                }
                sum.add(start.elapsed(), kept, piece.count());
                self.progress.pages_left -= piece.count();
                self.progress.bytes += piece.bytes();
                self.look(observer)?;
                rest = Run::new(piece.end(), run.end() - piece.end());
            }
        }
        Ok(sum)
    }

    /// The first piece of a run, which ends where a block does so that a block written whole has its checksum at once,
    /// and where it lies in `memory`.
    fn first_piece(&self, run: Run) -> Result<(Run, u64), SnapshotError> {
        let outside = || SnapshotError::Damaged("a page outside the guest's RAM".to_owned());
        let first = Run::new(run.first(), 1).and_then(|page| memory_offset(&self.ram, page));
        let offset = first.ok_or_else(outside)?;
        let room = BLOCK_LEN as u64 - offset % BLOCK_LEN as u64;
        let piece = run.pieces(room / PAGE_SIZE as u64).next().expect("a run has pages");
        memory_offset(&self.ram, piece).ok_or_else(outside)?;
        Ok((piece, offset))
    }

    /// Tells the observer, and hears it.
    fn look(&mut self, observer: &mut dyn Observer) -> Result<(), SnapshotError> {
        self.progress.elapsed_us = micros(self.began.elapsed());
        match observer.observe(&self.progress) {
            Flow::Continue => Ok(()),
            Flow::Cancel => Err(SnapshotError::Cancelled),
        }
    }

    /// Writes a piece of one block, leaving holes where it is zero and always was. Gives how many pages were written.
    fn write(&mut self, run: Run, offset: u64, bytes: &[u8]) -> Result<u64, SnapshotError> {
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
        Ok(kept.len())
    }

    /// Sees to the checksum of a block, `len` bytes of which are in the buffer and were written at `offset`.
    fn sum(&mut self, offset: u64, len: usize) -> Result<(), SnapshotError> {
        let block = u32::try_from(offset / BLOCK_LEN as u64)
            .map_err(|_| SnapshotError::Damaged("RAM of over 4 PiB".to_owned()))?;
        if len == BLOCK_LEN {
            self.stale.remove(&block);
            self.buffer = self.sums.take(block, std::mem::take(&mut self.buffer));
        } else {
            self.stale.insert(block);
        }
        Ok(())
    }

    /// Makes durable what was written of `memory` so far; no longer than the time allows.
    pub(super) fn sync_memory(
        &mut self,
        bounds: &Bounds,
        storage: &mut dyn Storage,
        observer: &mut dyn Observer,
    ) -> Result<(), SnapshotError> {
        let step = self.memory_sync()?;
        self.take(step, "write", Some(bounds), storage, observer)
    }

    fn memory_sync(&self) -> Result<Step, SnapshotError> {
        let path = self.path();
        match self.partial.memory.try_clone() {
            Ok(file) => Ok(Step::Sync { file, path }),
            Err(source) => Err(file_error("write", &path, source)),
        }
    }

    /// The checksums of blocks written in pieces, then `state`, then the name, each durable before the next. Gives how many
    /// pages of `memory` hold something.
    pub(super) fn finish(
        mut self,
        dir: &Path,
        header: &Header,
        sections: &[Section],
        paused: bool,
        storage: &mut dyn Storage,
        observer: &mut dyn Observer,
    ) -> Result<u64, SnapshotError> {
        self.progress.stage = Stage::Commitment;
        self.progress.throttle_percent = 0;
        self.sum_stale(observer)?;
        let sync = self.memory_sync()?;
        self.take(sync, "write", None, storage, observer)?;

        let path = self.partial.path.join(STATE_FILE);
        let failed = |source| file_error("write", &path, source);
        let file = create_private(&path).map_err(failed)?;
        let bytes = encode_state(header, sections, paused, self.sums.all());
        let again = file.try_clone().map_err(failed)?;
        let write = Step::Write { file, path: path.clone(), bytes };
        self.take(write, "write", None, storage, observer)?;
        let sync = Step::Sync { file: again, path };
        self.take(sync, "write", None, storage, observer)?;

        let sync = sync_of(&self.partial.path)?;
        self.take(sync, "write", None, storage, observer)?;
        let parent = sync_of(parent_of(dir))?;
        let rename = Step::Rename { from: self.partial.path.clone(), to: dir.to_owned() };
        self.take(rename, "create", None, storage, observer)?;
        self.take(parent, "write", None, storage, observer).inspect_err(|_| {
            // It goes with what is dropped here.
            let _ = fs::rename(dir, &self.partial.path);
        })?;
        Ok(self.written.len())
    }

    /// Reads blocks that were written in pieces back, for their checksums.
    fn sum_stale(&mut self, observer: &mut dyn Observer) -> Result<(), SnapshotError> {
        let total = self.ram.pages() * PAGE_SIZE as u64;
        for block in std::mem::take(&mut self.stale) {
            let offset = u64::from(block) * BLOCK_LEN as u64;
            let len = usize::try_from((total - offset).min(BLOCK_LEN as u64)).expect("1 MiB");
            let read = self.partial.memory.read_exact_at(&mut self.buffer[..len], offset);
            read.map_err(|source| file_error("read", &self.path(), source))?;
            self.sums.all().insert(block, crc32fast::hash(&self.buffer[..len]));
            self.look(observer)?;
        }
        Ok(())
    }

    /// Takes a step, and looks meanwhile who wants to know or to cancel.
    fn take(
        &mut self,
        step: Step,
        doing: &'static str,
        bounds: Option<&Bounds>,
        storage: &mut dyn Storage,
        observer: &mut dyn Observer,
    ) -> Result<(), SnapshotError> {
        self.look(observer)?;
        let (path, is_left) = match &step {
            Step::Write { path, .. } | Step::Sync { path, .. } => (path.clone(), true),
            Step::Rename { to, .. } => (to.clone(), false),
        };
        let mut result = Ok(());
        let mut poll = || {
            result = self.look(observer);
            let is_over = result.is_err() || bounds.is_some_and(Bounds::is_reached);
            if is_over && is_left { Flow::Cancel } else { Flow::Continue }
        };
        match storage.take(step, &mut poll) {
            Ok(Flow::Continue) => Ok(()),
            Ok(Flow::Cancel) => result,
            // Another snapshot of this name was quicker.
            Err(e)
                if matches!(e.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists) =>
            {
                Err(SnapshotError::Exists(path.display().to_string()))
            }
            Err(source) => Err(file_error(doing, &path, source)),
        }
    }
}

/// Makes the names in a directory durable.
fn sync_of(dir: &Path) -> Result<Step, SnapshotError> {
    match File::open(dir) {
        Ok(file) => Ok(Step::Sync { file, path: dir.to_owned() }),
        Err(source) => Err(file_error("open", dir, source)),
    }
}

/// Where a page of a run begins in the run's bytes.
fn index(run: Run, page: Run) -> usize {
    usize::try_from(page.first() - run.first()).expect("at most 256") * PAGE_SIZE
}
