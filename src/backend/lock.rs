//! The lock that keeps two VMMs from writing one disk: an OFD lock over the whole file.
//!
//! Writers lock exclusively, readers together. The lock belongs to the open file, not to the process,
//! so it also tells two disks of one VMM apart, and the kernel drops it when the VMM dies. It spans the
//! bytes that QEMU locks in its images: the two keep out of each other's way.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Why a disk's lock could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another open file has it.
    #[error("disk {path}: locked by {holder}; stop it, or open the disk read-only in both", path = path.display())]
    Held {
        /// The disk.
        path: PathBuf,
        /// Who has it.
        holder: Holder,
    },
    /// The file system has no such locks.
    #[error("disk {path}: its file system has no locks, so it can't be kept from a second writer; move it to another one", path = path.display())]
    Unsupported {
        /// The disk.
        path: PathBuf,
    },
    /// The kernel refused otherwise.
    #[error("disk {path}: can't lock it", path = path.display())]
    Kernel {
        /// The disk.
        path: PathBuf,
        /// Its answer.
        #[source]
        source: io::Error,
    },
}

/// Who holds a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// This process: the disk was given twice.
    Myself,
    /// Another process of this host.
    Process {
        /// Its id.
        pid: u32,
        /// Its name, as far as the kernel keeps it (15 bytes).
        name: String,
    },
    /// A process that may not be looked into, or one of another host.
    Unknown,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Myself => write!(f, "another disk of this VM"),
            Self::Process { pid, name } => write!(f, "pid {pid} ({name})"),
            Self::Unknown => write!(f, "a process that can't be seen from here"),
        }
    }
}

/// How many may hold a lock at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Any number of readers, no writer.
    Shared,
    /// One writer.
    Exclusive,
}

impl LockMode {
    fn kernel_type(self) -> libc::c_int {
        match self {
            Self::Shared => libc::F_RDLCK,
            Self::Exclusive => libc::F_WRLCK,
        }
    }
}

/// Takes the lock, or says at once who has it. `path` is for the message.
pub fn take(file: &File, path: &Path, mode: LockMode) -> Result<(), LockError> {
    let path = || path.to_owned();
    match control(file, libc::F_OFD_SETLK, mode.kernel_type()) {
        Ok(_) => Ok(()),
        Err(e) => Err(match e.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => {
                LockError::Held { path: path(), holder: holder(file, mode) }
            }
            Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => {
                LockError::Unsupported { path: path() }
            }
            _ => LockError::Kernel { path: path(), source: e },
        }),
    }
}

/// Whether another open file's lock is in the way of this one.
pub fn is_held(file: &File, path: &Path, mode: LockMode) -> Result<bool, LockError> {
    control(file, libc::F_OFD_GETLK, mode.kernel_type())
        .map(|lock| libc::c_int::from(lock.l_type) != libc::F_UNLCK)
        .map_err(|source| LockError::Kernel { path: path.to_owned(), source })
}

/// Lets the lock go. Not having it is no error.
pub fn release(file: &File, path: &Path) -> Result<(), LockError> {
    control(file, libc::F_OFD_SETLK, libc::F_UNLCK)
        .map(drop)
        .map_err(|source| LockError::Kernel { path: path.to_owned(), source })
}

/// Who keeps `file` from being locked so.
fn holder(file: &File, mode: LockMode) -> Holder {
    // A process-wide (POSIX) lock stands in the way of ours too, and names its owner.
    match control(file, libc::F_OFD_GETLK, mode.kernel_type()) {
        Ok(lock) if lock.l_pid > 0 => u32::try_from(lock.l_pid).ok(),
        _ => find_holder(file, mode),
    }
    .map_or(Holder::Unknown, |pid| {
        if pid == std::process::id() {
            return Holder::Myself;
        }
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Holder::Process { pid, name: name.trim_end().to_owned() }
    })
}

/// The kernel names no owner of an OFD lock, but every open file's `fdinfo` lists its locks.
fn find_holder(file: &File, mode: LockMode) -> Option<u32> {
    let wanted = file.metadata().map(|m| (m.dev(), m.ino())).ok()?;
    let in_the_way = |line: &str| {
        line.starts_with("lock:") && (mode == LockMode::Exclusive || line.contains("WRITE"))
    };
    super::find_process(|pid, fd, path| {
        fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == wanted)
            && fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}"))
                .is_ok_and(|info| info.lines().any(in_the_way))
    })
}

fn control(file: &File, command: libc::c_int, kind: libc::c_int) -> io::Result<libc::flock> {
    // SAFETY: all zeroes is a valid `flock`: plain integers. From start to end, however it grows.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(kind).expect("lock types are 0 to 2");
    lock.l_whence = libc::c_short::try_from(libc::SEEK_SET).expect("it is 0");
    // SAFETY: the descriptor is open, and the kernel reads and writes `lock` during the call only.
    if unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(lock)
}

#[cfg(test)]
#[path = "lock_tests.rs"]
mod tests;
