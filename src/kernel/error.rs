//! What can be wrong with a kernel file, each in one line that says what to do.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// A kernel that can't be loaded: which file, and why.
#[derive(Debug)]
pub struct KernelError {
    path: PathBuf,
    pub(super) problem: Problem,
}

impl KernelError {
    pub(super) fn new(path: &Path, problem: Problem) -> Self {
        Self { path: path.to_owned(), problem }
    }

    /// What is wrong, without the file's name.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel {}: {}", self.path.display(), self.problem)
    }
}

impl std::error::Error for KernelError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.problem)
    }
}

/// Why a kernel can't be loaded. Sizes are in bytes and shown in MiB where they are big.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// It is missing, or we may not read it.
    #[error("can't be opened: give the path of a readable bzImage or vmlinux")]
    Open(#[source] io::Error),
    /// It ends before its own headers say.
    #[error("is truncated: it has {have} bytes and its headers call for {need}: copy it again")]
    Truncated {
        /// Bytes in the file.
        have: u64,
        /// Bytes that its headers promise.
        need: u64,
    },
    /// It is something else.
    #[error("isn't a Linux kernel but {0}: give a bzImage or vmlinux for x86-64")]
    NotAKernel(&'static str),
    /// It is a kernel or a program for another processor.
    #[error("is for {0}: this VMM needs a kernel for x86-64")]
    OtherArch(String),
    /// Its boot protocol lacks what we need.
    #[error("speaks boot protocol {}.{:02}, too old to enter in 64-bit mode: give Linux 3.8 or later", .0 >> 8, .0 & 0xff)]
    TooOld(u16),
    /// Its headers contradict themselves.
    #[error("is malformed: {0}")]
    Malformed(&'static str),
    /// Its packed payload fails a check.
    #[error("has a damaged {format} payload, checksum or length is wrong ({what}): copy it again")]
    Damaged {
        /// The payload's compression.
        format: &'static str,
        /// What the decoder found.
        what: String,
    },
    /// The guest is too small for it.
    #[error("needs {} of RAM and the guest has {}: give it more with --mem", mib(*.need), mib(*.ram))]
    DoesNotFit {
        /// Guest-physical address past the last byte that it needs.
        need: u64,
        /// Bytes of guest RAM.
        ram: u64,
    },
    /// The host failed to read the file.
    #[error("can't be read")]
    Read(#[source] io::Error),
    /// The host failed to give memory for it.
    #[error("can't be written to the guest's memory")]
    Memory(#[source] io::Error),
}

/// Bytes in whole MiB, rounded up, or in bytes below one.
fn mib(bytes: u64) -> String {
    if bytes < 1 << 20 {
        format!("{bytes} bytes")
    } else {
        format!("{} MiB", bytes.div_ceil(1 << 20))
    }
}
