//! Vectored I/O on guest memory: the only place that turns guest slices into pointers.
//!
//! Guest memory is shared with running vCPUs, so no Rust reference to it may exist; the kernel copies
//! to and from the bare pointers.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;

use vm_memory::bitmap::Bitmap;
use vmm_devices::GuestSlice;

/// The most pieces that one system call takes (`UIO_MAXIOV`).
const IOV_LEN_MAX: usize = 1024;

/// Pieces of memory for one transfer, and how much of them is done.
pub(super) struct IoVecs<'a> {
    list: Vec<libc::iovec>,
    first: usize,
    memory: PhantomData<GuestSlice<'a>>,
}

impl<'a> IoVecs<'a> {
    /// The pieces of `slices`. They must be borrowed from mapped guest memory, which never goes away
    /// while a `GuestSlice` lives.
    pub(super) fn new(slices: &[GuestSlice<'a>]) -> Self {
        // The guard that `ptr_guard_mut` returns can go at once: it keeps alive only mappings made on
        // demand (Xen's), which this build of vm-memory doesn't have.
        let piece = |s: &GuestSlice<'_>| libc::iovec {
            iov_base: s.ptr_guard_mut().as_ptr().cast(),
            iov_len: s.len(),
        };
        let mut list = Vec::with_capacity(slices.len() + 1);
        list.extend(slices.iter().filter(|s| !s.is_empty()).map(piece));
        Self { list, first: 0, memory: PhantomData }
    }

    /// Adds a piece of the VMM's own memory at the end, if there is room for one in one system call.
    pub(super) fn push(&mut self, bytes: &'a mut [u8]) {
        if self.list.len() < IOV_LEN_MAX {
            self.list
                .push(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() });
        }
    }

    fn is_done(&self) -> bool {
        self.first == self.list.len()
    }

    /// The pieces for the next system call, and their number.
    fn next(&self) -> (*const libc::iovec, libc::c_int) {
        let rest = &self.list[self.first..];
        let count = libc::c_int::try_from(rest.len().min(IOV_LEN_MAX)).expect("at most 1024");
        (rest.as_ptr(), count)
    }

    /// `count` bytes are done.
    fn advance(&mut self, mut count: usize) {
        while count > 0 {
            let piece = &mut self.list[self.first];
            if count < piece.iov_len {
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(count).cast();
                piece.iov_len -= count;
                return;
            }
            count -= piece.iov_len;
            self.first += 1;
        }
    }

    /// One `readv`.
    pub(super) fn read(&self, file: &File) -> io::Result<usize> {
        let (list, count) = self.next();
        // SAFETY: `list` has `count` pieces, each of them memory that is mapped and writable while
        // `self` lives, and that no Rust reference but the borrowed one of `push` points to.
        retry(|| unsafe { libc::readv(file.as_raw_fd(), list, count) })
    }

    /// One `writev`.
    pub(super) fn write(&self, file: &File) -> io::Result<usize> {
        let (list, count) = self.next();
        // SAFETY: as in `read`; the kernel only reads the pieces.
        retry(|| unsafe { libc::writev(file.as_raw_fd(), list, count) })
    }

    /// Fills all pieces from `offset` of the file.
    pub(super) fn read_all_at(mut self, file: &File, mut offset: u64) -> io::Result<()> {
        while !self.is_done() {
            let (list, count) = self.next();
            let at = file_offset(offset)?;
            // SAFETY: as in `read`.
            let done = retry(|| unsafe { libc::preadv(file.as_raw_fd(), list, count, at) })?;
            if done == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.advance(done);
            offset += done as u64;
        }
        Ok(())
    }

    /// Writes all pieces at `offset` of the file.
    pub(super) fn write_all_at(mut self, file: &File, mut offset: u64) -> io::Result<()> {
        while !self.is_done() {
            let (list, count) = self.next();
            let at = file_offset(offset)?;
            // SAFETY: as in `write`.
            let done = retry(|| unsafe { libc::pwritev(file.as_raw_fd(), list, count, at) })?;
            if done == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.advance(done);
            offset += done as u64;
        }
        Ok(())
    }
}

/// Marks the first `len` bytes of `slices` as written by the VMM.
pub(super) fn mark_dirty(slices: &[GuestSlice<'_>], mut len: usize) {
    for slice in slices {
        let here = len.min(slice.len());
        slice.bitmap().mark_dirty(0, here);
        len -= here;
        if len == 0 {
            return;
        }
    }
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Calls until it isn't interrupted by a signal; -1 becomes the error in `errno`.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(done) => return Ok(done),
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
}

#[cfg(test)]
#[path = "iovec_tests.rs"]
mod tests;
