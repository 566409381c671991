//! Disks: raw image files and block devices.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Advice, AtFlags, FallocateFlags, StatxFlags, fadvise};
use rustix::io::{Errno, retry_on_intr};
use vmm_devices::GuestSlice;
use vmm_devices::backend::BlockBackend;

use super::bounce::Bounce;
use super::fingerprint::{Fingerprint, mark_changed};
use super::iovec::{IoVecs, mark_dirty};
use super::lock::{self, LockError, LockMode, Obstacle};

/// Sector of the virtio block device, in bytes. A disk is a whole number of them.
const SECTOR_LEN: u64 = 512;
/// What `O_DIRECT` is taken to want, in bytes, where the kernel doesn't tell (before Linux 6.1).
const DIRECT_ALIGN_DEFAULT: u32 = 4096;
/// `BLKDISCARD` of linux/fs.h, `_IO(0x12, 119)`; libc has no name for it.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// Which disk, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// An image file or a block device.
    pub path: PathBuf,
    /// The guest may not write.
    pub read_only: bool,
    /// Pass by the host's page cache (`O_DIRECT`).
    pub direct: bool,
}

/// When a disk is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locking {
    /// While opening.
    Now,
    /// By [`DiskHandle::take_lock`], before the machine runs: the source of a migration still has it.
    Later,
}

/// Why a disk can't be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is nothing.
    #[error("disk {path}: no such file; create it, for example with 'truncate -s 1G'", path = path.display())]
    Missing {
        /// The disk.
        path: PathBuf,
    },
    /// There is something else.
    #[error("disk {path}: is {what}; a disk is a raw image file or a block device", path = path.display())]
    Kind {
        /// The disk.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The user may not.
    #[error("disk {path}: no permission to {mode}; {advice}", path = path.display())]
    Permission {
        /// The disk.
        path: PathBuf,
        /// To do what.
        mode: &'static str,
        /// What helps.
        advice: &'static str,
    },
    /// Its size can't be a disk's.
    #[error("disk {path}: its size, {len} bytes, {why}; resize it with 'truncate -s'", path = path.display())]
    Size {
        /// The disk.
        path: PathBuf,
        /// Size in bytes.
        len: u64,
        /// What is wrong with it.
        why: String,
    },
    /// `direct` was asked for and can't be.
    #[error("disk {path}: its file system can't do direct I/O; leave 'direct' out", path = path.display())]
    DirectUnsupported {
        /// The disk.
        path: PathBuf,
    },
    /// It can't be locked.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The kernel refused otherwise.
    #[error("disk {path}: can't {what}", path = path.display())]
    Kernel {
        /// The disk.
        path: PathBuf,
        /// What it was asked for.
        what: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
}

/// An open disk, for the device.
pub struct Disk {
    file: Arc<File>,
    bounce: Bounce,
    len: u64,
    block_sizes: (u32, u32),
    is_block_device: bool,
    read_only: bool,
}

/// What the machine does with a disk besides its device: locking and making durable. Usable from any
/// thread, also while the device works.
#[derive(Clone, Debug)]
pub struct DiskHandle {
    file: Arc<File>,
    path: PathBuf,
    mode: LockMode,
}

impl DiskHandle {
    /// Takes the lock: exclusively, for a read-only disk together with other readers.
    pub fn take_lock(&self) -> Result<(), LockError> {
        lock::take(&self.file, &self.path, self.mode)
    }

    /// Lets the lock go; [`Self::flush`] comes before, so that the next holder finds all that was written.
    pub fn release_lock(&self) -> Result<(), DiskError> {
        Ok(lock::release(&self.file, &self.path)?)
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size in bytes.
    pub fn len(&self) -> Result<u64, DiskError> {
        (&*self.file).seek(SeekFrom::End(0)).map_err(self.kernel("find its size"))
    }

    /// Whether it has no bytes, which [`Disk::open`] refuses.
    pub fn is_empty(&self) -> Result<bool, DiskError> {
        Ok(self.len()? == 0)
    }

    /// Whether the guest may write it.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.mode == LockMode::Exclusive
    }

    /// What is in the way of our lock, where the migration's source says where its own end.
    pub fn obstacle(&self, source_mark: Option<u64>) -> Result<Obstacle, LockError> {
        lock::obstacle(&self.file, &self.path, self.mode, source_mark)
    }

    /// What changes when somebody writes the disk: size and time of modification.
    pub fn fingerprint(&self) -> Result<Fingerprint, DiskError> {
        Fingerprint::of(&self.file).map_err(self.kernel("read its attributes"))
    }

    /// Changes the time of modification, which tells whoever kept a [`Fingerprint`] that the disk has another
    /// owner.
    pub fn mark_changed(&self) -> Result<(), DiskError> {
        mark_changed(&self.file).map_err(self.kernel("mark it as changed"))
    }

    /// Drops what this host has cached of a block device that the guest may write: on storage that hosts share it can be
    /// older than what another host wrote meanwhile. Network file systems see to that themselves when the lock is taken.
    pub fn forget_cached(&self) {
        let is_block_device = self.file.metadata().is_ok_and(|m| m.file_type().is_block_device());
        if self.is_writable() && is_block_device {
            // A block that is in use just now stays; who reads it then is no guest of ours.
            let _ = fadvise(&self.file, 0, None, Advice::DontNeed);
        }
    }

    fn kernel(&self, what: &'static str) -> impl FnOnce(io::Error) -> DiskError + '_ {
        move |source| DiskError::Kernel { path: self.path.clone(), what, source }
    }

    /// Makes what was written durable. A migration does that while the guest still runs, so that little is left to do
    /// before [`Self::release_lock`] in the downtime.
    pub fn flush(&self) -> Result<(), DiskError> {
        if self.mode == LockMode::Shared {
            return Ok(());
        }
        self.file.sync_data().map_err(self.kernel("write its data to storage"))
    }
}

impl Disk {
    /// Opens, checks and (unless [`Locking::Later`]) locks a disk.
    pub fn open(options: &DiskOptions, locking: Locking) -> Result<(Self, DiskHandle), DiskError> {
        let path = || options.path.clone();
        // Before it is opened: opening a FIFO or a terminal would do things.
        let found = std::fs::metadata(&options.path).map_err(|e| open_error(options, e))?;
        check_kind(&options.path, &found)?;
        let file = open_file(options)?;
        let kernel = |what| move |source| DiskError::Kernel { path: path(), what, source };
        let metadata = file.metadata().map_err(kernel("read its attributes"))?;
        check_kind(&options.path, &metadata)?;
        let is_block_device = metadata.file_type().is_block_device();
        let len = (&file).seek(SeekFrom::End(0)).map_err(kernel("find its size"))?;
        let block_sizes = block_sizes(&file, &metadata).map_err(kernel("find its block size"))?;
        let bounce = match options.direct {
            true => direct_bounce(&file, options, block_sizes.0)?,
            false => Bounce::new(1, 1),
        };
        check_size(&options.path, len, u64::from(block_sizes.0).max(bounce.offset_align()))?;
        let mode = if options.read_only { LockMode::Shared } else { LockMode::Exclusive };
        let file = Arc::new(file);
        let handle = DiskHandle { file: file.clone(), path: path(), mode };
        if locking == Locking::Now {
            handle.take_lock()?;
        }
        let read_only = options.read_only;
        Ok((Self { file, bounce, len, block_sizes, is_block_device, read_only }, handle))
    }
}

impl BlockBackend for Disk {
    fn capacity_sectors(&self) -> u64 {
        self.len / SECTOR_LEN
    }

    fn block_sizes(&self) -> (u32, u32) {
        self.block_sizes
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&mut self, to: &[GuestSlice<'_>], offset: u64) -> io::Result<()> {
        if !self.bounce.is_aligned(to, offset) {
            return self.bounce.read(&self.file, to, offset);
        }
        let result = IoVecs::new(to).read_all_at(&self.file, offset);
        mark_dirty(to, usize::MAX);
        result
    }

    fn write_at(&mut self, from: &[GuestSlice<'_>], offset: u64) -> io::Result<()> {
        if !self.bounce.is_aligned(from, offset) {
            return self.bounce.write(&self.file, from, offset);
        }
        IoVecs::new(from).write_all_at(&self.file, offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        if !self.is_block_device {
            let hole = FallocateFlags::PUNCH_HOLE;
            return fallocate(&self.file, hole, offset, len).map_err(unsupported);
        }
        // Whole blocks only: it is a hint, and what is left out merely stays allocated.
        let block = u64::from(self.block_sizes.0);
        let (start, end) = (offset.next_multiple_of(block), (offset + len) / block * block);
        if start >= end {
            return Ok(());
        }
        let range = [start, end - start];
        // SAFETY: the kernel reads the two numbers that `range` holds, during the call only.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), BLKDISCARD, range.as_ptr()) } {
            -1 => Err(unsupported(io::Error::last_os_error())),
            _ => Ok(()),
        }
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        let kind = if may_unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match fallocate(&self.file, kind, offset, len) {
            Ok(()) => Ok(()),
            // The file system can't, or (a block device) the range isn't whole blocks.
            Err(Errno::OPNOTSUPP | Errno::INVAL) => {
                self.bounce.write_zeroes(&self.file, offset, len)
            }
            Err(e) => Err(e.into()),
        }
    }
}

/// The file keeps its size.
fn fallocate(file: &File, kind: FallocateFlags, offset: u64, len: u64) -> Result<(), Errno> {
    let kind = kind | FallocateFlags::KEEP_SIZE;
    retry_on_intr(|| rustix::fs::fallocate(file, kind, offset, len))
}

fn unsupported(e: impl Into<io::Error>) -> io::Error {
    let e = e.into();
    match e.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS) => io::ErrorKind::Unsupported.into(),
        _ => e,
    }
}

fn open_file(options: &DiskOptions) -> Result<File, DiskError> {
    OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .custom_flags(if options.direct { libc::O_DIRECT } else { 0 })
        .open(&options.path)
        .map_err(|e| open_error(options, e))
}

fn open_error(options: &DiskOptions, source: io::Error) -> DiskError {
    let path = options.path.clone();
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => DiskError::Missing { path },
        Some(libc::EINVAL) if options.direct => DiskError::DirectUnsupported { path },
        Some(libc::EACCES | libc::EPERM | libc::EROFS) if options.read_only => {
            let advice = "make it readable for this user";
            DiskError::Permission { path, mode: "read", advice }
        }
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => {
            let advice = "make it writable for this user, or add ',readonly'";
            DiskError::Permission { path, mode: "write", advice }
        }
        _ => DiskError::Kernel { path, what: "open it", source },
    }
}

fn check_kind(path: &Path, metadata: &Metadata) -> Result<(), DiskError> {
    let kind = metadata.file_type();
    let what = match kind {
        k if k.is_file() || k.is_block_device() => return Ok(()),
        k if k.is_dir() => "a directory",
        k if k.is_char_device() => "a character device",
        k if k.is_fifo() => "a FIFO",
        _ => "a socket",
    };
    Err(DiskError::Kind { path: path.to_owned(), what })
}

fn check_size(path: &Path, len: u64, unit: u64) -> Result<(), DiskError> {
    let why = match (len, unit) {
        (0, _) => "is nothing".to_owned(),
        (_, unit) if !len.is_multiple_of(unit) => format!("is not a multiple of {unit}"),
        _ => return Ok(()),
    };
    Err(DiskError::Size { path: path.to_owned(), len, why })
}

/// Logical and physical block size. An image file's logical block is always a sector, whatever it
/// lies on: the partition table inside counts in them.
fn block_sizes(file: &File, metadata: &Metadata) -> io::Result<(u32, u32)> {
    let valid = |len: u32| len.is_power_of_two() && (512..=1 << 16).contains(&len);
    let (logical, physical) = if metadata.file_type().is_block_device() {
        (rustix::fs::ioctl_blksszget(file)?, rustix::fs::ioctl_blkpbszget(file)?)
    } else {
        (512, u32::try_from(metadata.blksize()).unwrap_or(0))
    };
    let logical = if valid(logical) { logical } else { 512 };
    Ok((logical, if valid(physical) { physical.max(logical) } else { 4096.max(logical) }))
}

/// What direct I/O on this file wants aligned.
fn direct_bounce(file: &File, options: &DiskOptions, logical: u32) -> Result<Bounce, DiskError> {
    let path = || options.path.clone();
    let stat =
        rustix::fs::statx(file.as_fd(), "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).map_err(
            |e| DiskError::Kernel { path: path(), what: "read its attributes", source: e.into() },
        )?;
    let told = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN);
    let (memory, offset) = match told {
        true => (stat.stx_dio_mem_align, stat.stx_dio_offset_align.max(logical)),
        false => (DIRECT_ALIGN_DEFAULT, DIRECT_ALIGN_DEFAULT.max(logical)),
    };
    let usable = |align: u32| align.is_power_of_two() && align <= 1 << 16;
    if !usable(memory) || !usable(offset) {
        return Err(DiskError::DirectUnsupported { path: path() });
    }
    Ok(Bounce::new(memory as usize, offset as usize))
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
