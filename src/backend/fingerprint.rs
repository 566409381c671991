//! By what a source in doubt sees that somebody had its disk in the meantime: size and time of modification.
//!
//! Invariant: after [`mark_changed`] no [`Fingerprint`] that was taken before it equals one taken after.

use std::fs::File;
use std::io;
use std::time::{Duration, SystemTime};

use rustix::fs::{Timespec, Timestamps, UTIME_NOW};

/// What changes when somebody writes the disk, or marks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    len: u64,
    modified: SystemTime,
}

impl Fingerprint {
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self { len: metadata.len(), modified: metadata.modified()? })
    }
}

/// Sets the time of modification to now. An exact time may be set by the file's owner only; whoever may write
/// may set the kernel's (utimensat(2)), which ticks a hundred times a second at least.
pub(super) fn mark_changed(file: &File) -> io::Result<()> {
    match file.set_modified(SystemTime::now()) {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {}
        set => return set,
    }
    let (before, now) = (Fingerprint::of(file)?, Timespec { tv_sec: 0, tv_nsec: UTIME_NOW });
    for _ in 0..100 {
        rustix::fs::futimens(file, &Timestamps { last_access: now, last_modification: now })?;
        if Fingerprint::of(file)? != before {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(io::Error::other("its time of modification stands still"))
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn whoever_may_write_can_mark_a_disk_as_changed_at_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_permissions(Permissions::from_mode(0o666)).unwrap();
        let marked = || {
            // Written at the same tick of the kernel's clock as it is marked.
            std::fs::write(file.path(), vec![0; 1 << 20]).unwrap();
            let before = Fingerprint::of(file.as_file()).unwrap();
            mark_changed(file.as_file()).unwrap();
            assert_ne!(Fingerprint::of(file.as_file()).unwrap(), before);
        };
        marked();
        let as_another_user = || {
            // That is this thread's alone.
            let nobody = rustix::process::Uid::from_raw(65534);
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            let refused = file.as_file().set_modified(SystemTime::now()).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
            marked();
        };
        std::thread::scope(|scope| scope.spawn(as_another_user).join().unwrap());
    }
}
