//! The lock that keeps two VMMs from writing one disk: an OFD lock over all that a file can hold.
//!
//! Where it ends, far beyond any disk's end, is each process's own choice: the kernel names no owner of such a lock, but
//! tells its range, by which a migration's destination knows the source's lock from anybody else's.
//!
//! Writers lock exclusively, readers together. The lock belongs to the open file, not to the process,
//! so it also tells two disks of one VMM apart, and the kernel drops it when the VMM dies. It spans the
//! bytes that QEMU locks in its images: the two keep out of each other's way.

use std::fmt;
use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

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

/// Disks end before this byte, locks behind it.
const DISK_BYTES_MAX: u64 = 1 << 62;

/// What is in the way of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Nothing.
    None,
    /// The lock that the migration's source has.
    Source,
    /// Another's.
    Other(Holder),
}

/// Where this process's locks end: chosen at random, once.
#[must_use]
pub fn mark() -> u64 {
    static MARK: OnceLock<u64> = OnceLock::new();
    // The standard library's seeds are the kernel's random numbers.
    *MARK.get_or_init(|| {
        DISK_BYTES_MAX | (RandomState::new().build_hasher().finish() % DISK_BYTES_MAX)
    })
}

/// Takes the lock, or says at once who has it. `path` is for the message.
pub fn take(file: &File, path: &Path, mode: LockMode) -> Result<(), LockError> {
    let path = || path.to_owned();
    match control(file, libc::F_OFD_SETLK, mode.kernel_type(), mark()) {
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

/// What is in the way of this lock, where the source's locks end at `source_mark`. One that doesn't say where is taken
/// for the owner of any lock on a disk that it writes.
pub fn obstacle(
    file: &File,
    path: &Path,
    mode: LockMode,
    source_mark: Option<u64>,
) -> Result<Obstacle, LockError> {
    let lock = control(file, libc::F_OFD_GETLK, mode.kernel_type(), WHOLE)
        .map_err(|source| LockError::Kernel { path: path.to_owned(), source })?;
    if libc::c_int::from(lock.l_type) == libc::F_UNLCK {
        return Ok(Obstacle::None);
    }
    // What the source only reads, it keeps no other reader from.
    let is_source = mode == LockMode::Exclusive
        && source_mark.is_none_or(|mark| {
            libc::c_int::from(lock.l_type) == libc::F_WRLCK
                && lock.l_start == 0
                && u64::try_from(lock.l_len) == Ok(mark)
        });
    Ok(if is_source { Obstacle::Source } else { Obstacle::Other(holder(file, mode)) })
}

/// Lets the lock go. Not having it is no error.
pub fn release(file: &File, path: &Path) -> Result<(), LockError> {
    control(file, libc::F_OFD_SETLK, libc::F_UNLCK, WHOLE)
        .map(drop)
        .map_err(|source| LockError::Kernel { path: path.to_owned(), source })
}

/// Who keeps `file` from being locked so.
fn holder(file: &File, mode: LockMode) -> Holder {
    // A process-wide (POSIX) lock stands in the way of ours too, and names its owner.
    match control(file, libc::F_OFD_GETLK, mode.kernel_type(), WHOLE) {
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

/// From start to end, however it grows.
const WHOLE: u64 = 0;

/// Of the bytes from 0 to before `end`.
fn control(
    file: &File,
    command: libc::c_int,
    kind: libc::c_int,
    end: u64,
) -> io::Result<libc::flock> {
    // SAFETY: all zeroes is a valid `flock`: plain integers.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_len = libc::off_t::try_from(end).map_err(io::Error::other)?;
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
