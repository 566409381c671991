//! Big buffers for the time of a load, given back to the host when dropped.
//!
//! An own mapping and not the heap: glibc keeps what is freed there, and the VMM shall stay small. In
//! huge pages where the host allows it: faulting 57 MB in by 4 KiB costs half as much as unpacking it.

use std::ops::{Deref, DerefMut};

use memmap2::{Advice, MmapMut};

use super::error::Problem;

/// A zeroed buffer of its own pages.
pub(super) struct Scratch {
    map: MmapMut,
    len: usize,
}

impl Scratch {
    /// A buffer of `len` bytes; the host gives its pages when they are touched.
    pub(super) fn new(len: u64) -> Result<Self, Problem> {
        let too_big = || Problem::Memory(std::io::ErrorKind::OutOfMemory.into());
        let len = usize::try_from(len).map_err(|_| too_big())?;
        let map = MmapMut::map_anon(len.max(1)).map_err(Problem::Memory)?;
        // Advice: a host without huge pages serves small ones.
        let _ = map.advise(Advice::HugePage);
        Ok(Self { map, len })
    }
}

impl Deref for Scratch {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.map[..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.map[..self.len]
    }
}
