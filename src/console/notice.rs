//! A notice between threads, and from a signal handler: an eventfd.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{EventfdFlags, eventfd};

/// Given any number of times, taken once.
#[derive(Debug)]
pub struct Notice(OwnedFd);

impl Notice {
    /// A notice that nobody has given yet.
    ///
    /// # Errors
    /// File descriptors are exhausted.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Gives notice.
    pub fn give(&self) {
        #[allow(clippy::host_endian_bytes, reason = "eventfd(2) asks for the host's order")]
        let one = 1u64.to_ne_bytes();
        // The only failure is a full counter, and then a notice is pending anyway.
        let _ = rustix::io::write(&self.0, &one);
    }

    /// Takes the notice. False if none was given.
    pub fn take(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }
}

impl AsFd for Notice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Notice {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
