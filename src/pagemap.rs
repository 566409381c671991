//! Which pages of a private mapping this process has copies of, by /proc/self/pagemap.
//!
//! A page that was only read is the file's; one that was written, by whomever (the VMM, a vCPU, a device), is
//! anonymous, in memory or swapped out. The kernel's admin-guide/mm/pagemap.rst has the format.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const PATH: &str = "/proc/self/pagemap";
/// An entry's bits.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// It belongs to a file, or to anonymous memory that is shared.
const OF_FILE: u64 = 1 << 61;
const ENTRY_LEN: usize = 8;
/// Entries read at once.
const ENTRIES_MAX: usize = 4096;

/// The file, opened.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
}

impl Pagemap {
    /// Opens it, and looks whether it knows a page that was just written: a kernel that shows nothing there
    /// would have us take the guest's memory for untouched.
    pub fn open() -> io::Result<Self> {
        let map = Self { file: File::open(PATH)? };
        let written = std::hint::black_box(Box::new(1_u8));
        let address = std::ptr::from_ref::<u8>(&written).addr() as u64;
        let mut known = false;
        map.copies(address & !(page_size() - 1), page_size(), |_, _| known = true)?;
        if known { Ok(map) } else { Err(io::Error::other("it doesn't show pages")) }
    }

    /// Finds the copies among the pages of `len` bytes at `address`, as offset and length in bytes of each
    /// piece. Both are whole pages.
    pub fn copies(
        &self,
        address: u64,
        len: u64,
        mut visit: impl FnMut(u64, u64),
    ) -> io::Result<()> {
        let (page, first, count) = (page_size(), address / page_size(), len / page_size());
        let mut entries = vec![0; ENTRIES_MAX * ENTRY_LEN];
        for done in (0..count).step_by(ENTRIES_MAX) {
            let part =
                usize::try_from(count - done).map_or(ENTRIES_MAX, |left| left.min(ENTRIES_MAX));
            let entries = &mut entries[..part * ENTRY_LEN];
            self.file.read_exact_at(entries, (first + done) * ENTRY_LEN as u64)?;
            let (entries, _) = entries.as_chunks::<ENTRY_LEN>();
            let mut at = done;
            for run in entries.chunk_by(|a, b| is_copy(*a) == is_copy(*b)) {
                let pages = run.len() as u64;
                if is_copy(run[0]) {
                    visit(at * page, pages * page);
                }
                at += pages;
            }
        }
        Ok(())
    }
}

fn is_copy(entry: [u8; ENTRY_LEN]) -> bool {
    #[expect(clippy::host_endian_bytes, reason = "the kernel's own words")]
    let entry = u64::from_ne_bytes(entry);
    entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0
}

fn page_size() -> u64 {
    rustix::param::page_size() as u64
}
