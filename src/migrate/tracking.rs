//! Which pages of guest RAM were touched, and which were written since.
//!
//! Page numbers are guest-physical addresses over 4096. Every memory slot starts at a multiple of 64
//! pages, so that a word of KVM's dirty log is a word of a [`PageSet`].

use std::io;

use kvm_ioctls::VmFd;
use vm_memory::{Bytes, GuestAddress};
use vmm_migration::guest::GuestError;
use vmm_migration::pages::{PageSet, Run};

use crate::dirty;
use crate::memory::{Memory, MemorySlot, PAGE_SIZE};

/// Pages between two runs from which on they are re-armed by two calls: a call costs less than KVM's walk
/// over so many words without a bit.
const REARM_GAP_PAGES: u64 = 1 << 14;

/// Turns the dirty log on: from here on all writes are noted.
pub fn start(vm: &VmFd, memory: &Memory) -> Result<(), GuestError> {
    memory.reset_written();
    Ok(memory.register(vm, true)?)
}

/// Turns the dirty log off.
pub fn stop(vm: &VmFd, memory: &Memory) {
    // The slots exist and only a flag changes; if KVM refuses, the guest runs on all the same, slower.
    if let Err(e) = memory.register(vm, false) {
        tracing::warn!("dirty tracking stays on: {e}");
    }
}

/// Adds every page written since it was last re-armed: by vCPUs (the log is read, not cleared) and by
/// devices (the bitmap is read and cleared).
pub fn written(vm: &VmFd, memory: &Memory, into: &mut PageSet) -> Result<(), GuestError> {
    for slot in memory.slots() {
        let first = slot.start / PAGE_SIZE;
        into.insert_words(first, &dirty::read(vm, slot)?);
    }
    memory.take_written(|slot, words| into.insert_words(slot.start / PAGE_SIZE, words));
    Ok(())
}

/// Re-arms exactly these pages, which are ascending.
pub fn rearm(vm: &VmFd, memory: &Memory, runs: &[Run]) -> Result<(), GuestError> {
    let mut rest = runs;
    while let Some(first) = rest.first() {
        let slot = slot_of(memory, *first)?;
        let slot_run = Run::new(slot.start / PAGE_SIZE, slot.len / PAGE_SIZE);
        let mut last = *first;
        let mut count = 0;
        for run in rest {
            let near = run.first() - last.first() <= REARM_GAP_PAGES;
            if !near || !slot_run.is_some_and(|s| s.contains(*run)) {
                break;
            }
            last = *run;
            count += 1;
        }
        let (group, after) = rest.split_at(count.max(1));
        rearm_group(vm, slot, group)?;
        rest = after;
    }
    Ok(())
}

fn rearm_group(vm: &VmFd, slot: &MemorySlot, runs: &[Run]) -> Result<(), GuestError> {
    let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return Ok(()) };
    let slot_first = slot.start / PAGE_SIZE;
    let start = (first.first() - slot_first) / 64 * 64;
    let end = (last.end() - slot_first).next_multiple_of(64).min(slot.len / PAGE_SIZE);
    let mut bits = vec![0u64; usize::try_from((end - start).div_ceil(64))?];
    for run in runs {
        for page in run.first()..run.end() {
            let bit = page - slot_first - start;
            bits[usize::try_from(bit / 64)?] |= 1 << (bit % 64);
        }
    }
    Ok(dirty::clear(vm, slot, start, u32::try_from(end - start)?, &bits)?)
}

/// Arms tracking for a whole window, then adds those of its pages that were ever touched.
pub fn first_pages(
    vm: &VmFd,
    memory: &Memory,
    window: Run,
    into: &mut PageSet,
) -> Result<(), GuestError> {
    let slot = slot_of(memory, window)?;
    let slot_first = slot.start / PAGE_SIZE;
    let count = u32::try_from(window.count())?;
    let bits = vec![u64::MAX; usize::try_from(window.count().div_ceil(64))?];
    dirty::clear(vm, slot, window.first() - slot_first, count, &bits)?;
    memory.touched(slot, window.address() - slot.start, window.bytes(), |offset, len| {
        let first = (slot.start + offset) / PAGE_SIZE;
        let end = (slot.start + offset + len).div_ceil(PAGE_SIZE);
        if let Some(run) = Run::new(first, end - first).and_then(|run| run.overlap(window)) {
            into.insert(run);
        }
    })?;
    Ok(())
}

/// How many pages were ever touched.
pub fn touched_pages(memory: &Memory) -> io::Result<u64> {
    let mut bytes = 0;
    for slot in memory.slots() {
        memory.touched(slot, 0, slot.len, |_, len| bytes += len)?;
    }
    Ok(bytes / PAGE_SIZE)
}

/// Copies pages out of guest RAM.
pub fn read(memory: &Memory, run: Run, bytes: &mut [u8]) -> Result<(), GuestError> {
    Ok(memory.ram().read_slice(bytes, GuestAddress(run.address()))?)
}

fn slot_of(memory: &Memory, run: Run) -> Result<&MemorySlot, GuestError> {
    memory
        .slots()
        .iter()
        .find(|s| s.start <= run.address() && run.address() + run.bytes() <= s.start + s.len)
        .ok_or_else(|| format!("no RAM at {:#x}", run.address()).into())
}
