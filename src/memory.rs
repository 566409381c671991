//! Guest RAM: an unnamed file in memory, its mappings, and the KVM memory slots over them.
//!
//! One file backs all of RAM, range after range without holes, so that an offset in the file is an
//! offset in RAM: snapshots and hand-overs use the same numbering. Where we may, it lies on a tmpfs of its
//! own that gives huge pages, else it is a memfd.

use std::fs::File;
use std::io;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::{Errno, retry_on_intr};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestRegionMmap, MmapRegion,
};
use vmm_devices::GuestRam;
use vmm_migration::pages::{PageSet, Run};

pub use self::backing::Backing;
use self::backing::{LESS_HINT, open_backing};
use crate::pagemap::Pagemap;

mod backing;

/// Size of a page in KVM's dirty log and in a migration, in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// Size of a huge page, in bytes.
const HUGE_PAGE_SIZE: u64 = 2 << 20;
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// Why guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The memfd could not be made.
    #[error("can't create guest memory{hint}")]
    Create {
        /// What to do about it, for `--hugepages`.
        hint: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// More than the host has, so that it could never hold it.
    #[error(
        "{asked_mib} MiB of guest memory, but this host has {host_mib} MiB with its swap{LESS_HINT}"
    )]
    Host {
        /// Asked for.
        asked_mib: u64,
        /// What there is in all.
        host_mib: u64,
    },
    /// The range could not be mapped.
    #[error("can't map {mib} MiB of guest memory{hint}: {why}")]
    Map {
        /// Size of the range that failed.
        mib: u64,
        /// What to do about it.
        hint: &'static str,
        /// The kernel's answer.
        why: String,
    },
    /// KVM refused a memory slot.
    #[error("KVM refused the memory slot at {address:#x} of {mib} MiB")]
    Slot {
        /// Guest-physical start.
        address: u64,
        /// Size.
        mib: u64,
        /// The kernel's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// One KVM memory slot: a contiguous range of guest-physical addresses.
#[derive(Clone, Copy, Debug)]
pub struct MemorySlot {
    /// KVM's slot number.
    pub id: u32,
    /// Guest-physical start.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Offset in the file.
    pub file_offset: u64,
}

/// Guest RAM and its slots.
#[derive(Debug)]
pub struct Memory {
    ram: GuestRam,
    slots: Vec<MemorySlot>,
    /// The file in memory, or that of a private mapping.
    file: File,
    kind: Kind,
    /// Of private memory: tells which pages were written. Without it, all count as touched.
    pagemap: Option<Pagemap>,
}

/// What tells which pages were touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The file's holes.
    Sparse,
    /// The page tables: a file of the host's pool of huge pages shows no holes.
    Pool,
    /// The file's holes, and what this process has copies of.
    Private,
}

impl Memory {
    /// Maps the given guest-physical ranges over one backing.
    pub fn new(ranges: &[(GuestAddress, u64)], backing: Backing) -> Result<Self, MemoryError> {
        let total: u64 = ranges.iter().map(|r| r.1).sum();
        let kind = match backing {
            Backing::Private(_) => Kind::Private,
            Backing::Fresh { hugepages: true } => Kind::Pool,
            Backing::Fresh { hugepages: false } => Kind::Sparse,
        };
        let (file, flags, hint) = open_backing(backing, total)?;
        let pagemap = (kind == Kind::Private)
            .then(Pagemap::open)
            .and_then(|opened| opened.inspect_err(|e| tracing::debug!("no pagemap: {e}")).ok());
        let mut regions = Vec::new();
        let mut slots = Vec::new();
        let mut file_offset = 0;
        for (id, &(start, len)) in (0u32..).zip(ranges) {
            let fail = |why: String| MemoryError::Map { mib: len >> 20, hint, why };
            let size = usize::try_from(len).map_err(|e| fail(e.to_string()))?;
            let shared = file.try_clone().map_err(|e| fail(e.to_string()))?;
            let mapping: MmapRegion<AtomicBitmap> =
                MmapRegionBuilder::new_with_bitmap(size, bitmap(size))
                    .with_file_offset(FileOffset::new(shared, file_offset))
                    .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                    .with_mmap_flags(flags)
                    .build()
                    .map_err(|e| fail(e.to_string()))?;
            let region = GuestRegionMmap::new(mapping, start)
                .ok_or_else(|| fail("the range wraps".to_owned()))?;
            regions.push(region);
            slots.push(MemorySlot { id, start: start.0, len, file_offset });
            file_offset += len;
        }
        let ram = GuestRam::from_regions(regions).map_err(|e| MemoryError::Map {
            mib: total >> 20,
            hint,
            why: e.to_string(),
        })?;
        Ok(Self { ram, slots, file, kind, pagemap })
    }

    /// The mapped RAM.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The memory slots in address order.
    #[must_use]
    pub fn slots(&self) -> &[MemorySlot] {
        &self.slots
    }

    /// Total size in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.slots.iter().map(|s| s.len).sum()
    }

    /// Whether there is no RAM at all, which no machine has.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Forgets which pages the VMM and its devices wrote.
    pub fn reset_written(&self) {
        for region in self.ram.iter() {
            bitmap_of(region).reset();
        }
    }

    /// Hands each slot's bitmap of pages that the VMM and its devices wrote (64 pages a word) to
    /// `visit`, and clears it.
    pub fn take_written(&self, mut visit: impl FnMut(&MemorySlot, &[u64])) {
        for (slot, region) in self.slots.iter().zip(self.ram.iter()) {
            visit(slot, &bitmap_of(region).get_and_reset());
        }
    }

    /// Finds what was ever touched of `len` bytes at `offset` of a slot, as offset and length in bytes of
    /// each piece. Untouched memory reads as zero.
    pub fn touched(
        &self,
        slot: &MemorySlot,
        offset: u64,
        len: u64,
        mut visit: impl FnMut(u64, u64),
    ) -> io::Result<()> {
        match self.kind {
            Kind::Sparse => return self.data(slot, offset, len, visit),
            Kind::Pool => return self.mapped(slot, offset, len, visit),
            Kind::Private => {}
        }
        let found = self.touched_privately(slot, offset, len);
        // What a file that was cut short has lost would look untouched.
        if self.file.metadata()?.len() < self.len() {
            return Err(io::Error::other("the snapshot's memory file was cut short"));
        }
        match found {
            Ok(pages) => pages.runs().for_each(|run| visit(run.address(), run.bytes())),
            Err(e) => {
                tracing::debug!("all private memory counts as touched: {e}");
                visit(offset, len);
            }
        }
        Ok(())
    }

    /// What the snapshot had and what was written since, as pages from the slot's start.
    fn touched_privately(&self, slot: &MemorySlot, offset: u64, len: u64) -> io::Result<PageSet> {
        let region = self.ram.find_region(GuestAddress(slot.start));
        let (Some(pagemap), Some(region)) = (&self.pagemap, region) else {
            return Err(io::Error::other("no pagemap"));
        };
        let mut pages = PageSet::new();
        self.data(slot, offset, len, |at, len| insert(&mut pages, at, len))?;
        let mapped = region.as_ptr() as u64 + offset;
        pagemap.copies(mapped, len, |at, len| insert(&mut pages, offset + at, len))?;
        Ok(pages)
    }

    /// Finds what of `len` bytes at `offset` of a slot this process's page tables have an entry for, in whole huge pages:
    /// whoever touches a page of the pool does so by them.
    fn mapped(
        &self,
        slot: &MemorySlot,
        offset: u64,
        len: u64,
        mut visit: impl FnMut(u64, u64),
    ) -> io::Result<()> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let huge_page = at / HUGE_PAGE_SIZE * HUGE_PAGE_SIZE;
            let next = end.min(huge_page + HUGE_PAGE_SIZE);
            let page = self.ram.get_slice(GuestAddress(slot.start + huge_page), 1);
            let page = page.map_err(io::Error::other)?.ptr_guard().as_ptr();
            let mut resident = 0_u8;
            // SAFETY: the address is that of a page of this memory's own mapping, which `self` keeps, and mincore(2)
            // writes one byte for one page. It touches nothing else.
            let done = unsafe { libc::mincore(page.cast_mut().cast(), 1, &raw mut resident) };
            if done != 0 {
                return Err(io::Error::last_os_error());
            }
            if resident & 1 != 0 {
                visit(at, next - at);
            }
            at = next;
        }
        Ok(())
    }

    /// Finds what of `len` bytes at `offset` of a slot the file has data for.
    fn data(
        &self,
        slot: &MemorySlot,
        offset: u64,
        len: u64,
        mut visit: impl FnMut(u64, u64),
    ) -> io::Result<()> {
        let start = slot.file_offset + offset;
        data_in(&self.file, start, start + len, |at, len| visit(at - slot.file_offset, len))
    }

    /// Makes `len` bytes at `offset` of a slot read as zero. Whole huge pages go back to the host; a hole in
    /// one would only split it, so that what is touched around them is written.
    pub fn discard(&self, slot: &MemorySlot, offset: u64, len: u64) -> io::Result<()> {
        let (start, end) = (slot.file_offset + offset, slot.file_offset + offset + len);
        let huge_end = end / HUGE_PAGE_SIZE * HUGE_PAGE_SIZE;
        let huge_start = start.next_multiple_of(HUGE_PAGE_SIZE).min(huge_end.max(start));
        let huge_end = huge_end.max(huge_start);
        if huge_end > huge_start {
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            retry_on_intr(|| fallocate(&self.file, punch, huge_start, huge_end - huge_start))?;
        }
        for (start, end) in [(start, huge_start), (huge_end, end)] {
            let mut result = Ok(());
            self.touched(slot, start - slot.file_offset, end - start, |offset, len| {
                let address = GuestAddress(slot.start + offset);
                result = std::mem::replace(&mut result, Ok(())).and(self.clear(address, len));
            })?;
            result?;
        }
        Ok(())
    }

    /// Writes zeros.
    fn clear(&self, address: GuestAddress, len: u64) -> io::Result<()> {
        for done in (0..len).step_by(ZEROS.len()) {
            let count =
                usize::try_from(len - done).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
            let at = address.unchecked_add(done);
            self.ram.write_slice(&ZEROS[..count], at).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Gives the slots to KVM (KVM API 4.35), with or without a dirty log. Called again to turn
    /// the log on or off: only the flag changes, so mappings stay.
    pub fn register(&self, vm: &VmFd, log_dirty_pages: bool) -> Result<(), MemoryError> {
        for (slot, region) in self.slots.iter().zip(self.ram.iter()) {
            let userspace_addr = region.as_ptr() as u64;
            let area = kvm_userspace_memory_region {
                slot: slot.id,
                flags: if log_dirty_pages { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: slot.start,
                memory_size: slot.len,
                userspace_addr,
            };
            // SAFETY: the range is `region`'s own live mapping of exactly `slot.len` bytes. The
            // machine that owns this memory and the VM fd drops the VM before the mapping.
            unsafe { vm.set_user_memory_region(area) }.map_err(|e| MemoryError::Slot {
                address: slot.start,
                mib: slot.len >> 20,
                source: e,
            })?;
        }
        Ok(())
    }
}

fn bitmap_of(region: &GuestRegionMmap<AtomicBitmap>) -> &AtomicBitmap {
    let mapping: &MmapRegion<AtomicBitmap> = region;
    mapping.bitmap()
}

/// Finds what a file has data for between two offsets: where each piece begins, and its length in bytes. The rest of it is
/// holes.
pub fn data_in(
    file: &File,
    start: u64,
    end: u64,
    mut visit: impl FnMut(u64, u64),
) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let data = match seek(file, SeekFrom::Data(at)) {
            // No data up to the end of the file.
            Err(Errno::NXIO) => break,
            found => found?.min(end),
        };
        at = seek(file, SeekFrom::Hole(data))?.min(end);
        if at > data {
            visit(data, at - data);
        }
    }
    Ok(())
}

/// Adds every page that has some of `len` bytes at `offset`.
fn insert(pages: &mut PageSet, offset: u64, len: u64) {
    let first = offset / PAGE_SIZE;
    if let Some(run) = Run::new(first, (offset + len).div_ceil(PAGE_SIZE) - first) {
        pages.insert(run);
    }
}

fn bitmap(len: usize) -> AtomicBitmap {
    let page = usize::try_from(PAGE_SIZE).ok().and_then(std::num::NonZeroUsize::new);
    AtomicBitmap::new(len, page.expect("a page has a size that fits"))
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
