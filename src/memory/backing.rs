//! What guest RAM is made of: a file in memory, with huge pages where we may, or a snapshot's.

use std::fs::File;
use std::io;

use rustix::fd::OwnedFd;
use rustix::fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};
use rustix::system::sysinfo;

use super::MemoryError;

/// The host's policy on huge pages for memory of programs: `always [madvise] never`.
const HUGE_POLICY: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
pub(super) const LESS_HINT: &str = ": give the guest less with --mem";
const HUGE_HINT: &str = ": reserve 2 MiB pages (sysctl vm.nr_hugepages) or drop --hugepages";

/// Where the pages of a new RAM come from.
#[derive(Debug)]
pub enum Backing {
    /// A fresh file, zeroed; of 2 MiB pages if `hugepages`.
    Fresh {
        /// Back it by 2 MiB pages from the host's pool. Without, it has huge pages where there are any.
        hugepages: bool,
    },
    /// A snapshot's memory file, mapped privately: pages are read when the guest first touches them.
    Private(File),
}

/// Opens it, with `len` bytes: the file, flags of its mapping, and what to do where that fails.
pub(super) fn open_backing(
    backing: Backing,
    len: u64,
) -> Result<(File, i32, &'static str), MemoryError> {
    match backing {
        Backing::Private(file) => Ok((file, libc::MAP_PRIVATE | libc::MAP_NORESERVE, "")),
        Backing::Fresh { hugepages } => {
            let (flags, map_flags, hint) = if hugepages {
                // Reserved when mapped: a guest must not die of SIGBUS when the pool runs dry.
                (MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, libc::MAP_SHARED, HUGE_HINT)
            } else {
                check_host(len, host_bytes())?;
                (MemfdFlags::empty(), libc::MAP_SHARED | libc::MAP_NORESERVE, LESS_HINT)
            };
            let fail =
                |e: rustix::io::Errno| MemoryError::Create { hint, source: io::Error::from(e) };
            let fd = match if hugepages { None } else { huge_tmpfs_file() } {
                Some(fd) => fd,
                None => memfd_create("vmm-guest-ram", flags | MemfdFlags::CLOEXEC).map_err(fail)?,
            };
            ftruncate(&fd, len).map_err(fail)?;
            Ok((File::from(fd), map_flags, hint))
        }
    }
}

/// An unnamed file on a tmpfs that is mounted nowhere and has huge pages, if the host's policy lets programs
/// have them (as other VMMs ask for) and we may mount (as root). With pages of 4 KiB a guest boots and goes on
/// after a move much slower: each page that it touches first is a fault, and each TLB entry covers less.
fn huge_tmpfs_file() -> Option<OwnedFd> {
    let policy = std::fs::read_to_string(HUGE_POLICY).ok()?;
    if policy.contains("[never]") {
        return None;
    }
    let make = || {
        let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&tmpfs, "huge", "within_size")?;
        // Without a limit, as a memfd has none; tmpfs would take half of the host's memory for one.
        fsconfig_set_string(&tmpfs, "size", "0")?;
        fsconfig_create(&tmpfs)?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        let root = fsmount(&tmpfs, flags, MountAttrFlags::MOUNT_ATTR_NOEXEC)?;
        openat(
            &root,
            ".",
            OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
            Mode::RUSR | Mode::WUSR,
        )
    };
    make().inspect_err(|e| tracing::debug!("no tmpfs with huge pages: {e}")).ok()
}

/// All the memory and swap of this host.
fn host_bytes() -> u64 {
    let info = sysinfo();
    (info.totalram + info.totalswap) * u64::from(info.mem_unit)
}

/// Refuses more RAM than the host could ever hold. Less may still be more than is free: guests seldom use all of
/// theirs, and how far a host is overcommitted is its user's business.
fn check_host(bytes: u64, host_bytes: u64) -> Result<(), MemoryError> {
    if bytes > host_bytes {
        return Err(MemoryError::Host { asked_mib: bytes >> 20, host_mib: host_bytes >> 20 });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_the_host_has_is_refused_and_overcommitting_is_not() {
        assert!(host_bytes() > 64 << 20);
        assert!(check_host(2 << 30, 2 << 30).is_ok());
        let error = check_host((2 << 30) + 1, 2 << 30).unwrap_err().to_string();
        let expected = "2048 MiB of guest memory, but this host has 2048 MiB with its swap: \
                        give the guest less with --mem";
        assert_eq!(error, expected);
    }
}
