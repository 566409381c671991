//! A disk in memory, for tests.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::GuestSlice;
use crate::backend::BlockBackend;

/// What is on it, what was done to it, and the error that calls give.
#[derive(Default)]
struct Inner {
    data: Vec<u8>,
    calls: Vec<String>,
    fault: Option<io::ErrorKind>,
}

/// A disk in memory; clones share it.
#[derive(Clone)]
pub(super) struct MemoryDisk {
    inner: Arc<Mutex<Inner>>,
    read_only: bool,
}

impl MemoryDisk {
    /// Each byte is the number of its sector.
    pub(super) fn new(sectors: u64) -> Self {
        let len = usize::try_from(sectors * 512).unwrap();
        let data = (0..len).map(|i| u8::try_from(i / 512).unwrap()).collect();
        let inner = Inner { data, ..Inner::default() };
        Self { inner: Arc::new(Mutex::new(inner)), read_only: false }
    }

    /// What is on it.
    pub(super) fn data(&self) -> Vec<u8> {
        self.inner.lock().unwrap().data.clone()
    }

    fn call(&self, name: String) -> io::Result<MutexGuard<'_, Inner>> {
        let mut inner = self.inner.lock().unwrap();
        inner.calls.push(name);
        match inner.fault {
            Some(kind) => Err(kind.into()),
            None => Ok(inner),
        }
    }

    /// The same, not writable.
    pub(super) fn read_only(sectors: u64) -> Self {
        Self { read_only: true, ..Self::new(sectors) }
    }

    /// The calls since the last look.
    pub(super) fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.inner.lock().unwrap().calls)
    }

    /// All calls fail so from now on.
    pub(super) fn fail(&self, kind: Option<io::ErrorKind>) {
        self.inner.lock().unwrap().fault = kind;
    }
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

impl BlockBackend for MemoryDisk {
    fn capacity_sectors(&self) -> u64 {
        self.inner.lock().unwrap().data.len() as u64 / 512
    }

    fn block_sizes(&self) -> (u32, u32) {
        (512, 4096)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&mut self, to: &[GuestSlice<'_>], mut offset: u64) -> io::Result<()> {
        let inner = self.call(format!("read {offset}"))?;
        for slice in to {
            slice.copy_from(&inner.data[at(offset)..at(offset) + slice.len()]);
            offset += slice.len() as u64;
        }
        Ok(())
    }

    fn write_at(&mut self, from: &[GuestSlice<'_>], mut offset: u64) -> io::Result<()> {
        let mut inner = self.call(format!("write {offset}"))?;
        for slice in from {
            slice.copy_to(&mut inner.data[at(offset)..at(offset) + slice.len()]);
            offset += slice.len() as u64;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.call("flush".to_owned()).map(drop)
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.call(format!("discard {offset}+{len}")).map(drop)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.call(format!("zero {offset}+{len} {may_unmap}")).map(drop)
    }
}
