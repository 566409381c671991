//! By what a source in doubt sees that somebody had its disk in the meantime: size and time of modification.
//!
//! Invariant: after [`mark_changed`] no [`Fingerprint`] that was taken before it equals one taken after.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant, SystemTime};

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

/// File systems keep times as coarse as this at most (FAT: 2 s).
const COARSEST: Duration = Duration::from_secs(2);

/// Sets the time of modification to now, once that differs. An exact time may be set by the file's owner only; whoever may
/// write may set the kernel's (utimensat(2)). Never one that is yet to come: a write before then would set it back.
pub(super) fn mark_changed(file: &File) -> io::Result<()> {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    until_it_differs(
        Fingerprint::of(file)?,
        || match file.set_modified(SystemTime::now()) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                Ok(rustix::fs::futimens(file, &times)?)
            }
            set => set,
        },
        || Fingerprint::of(file),
    )
}

/// Marks again and again until what is found isn't what was `before`.
fn until_it_differs(
    before: Fingerprint,
    mut mark: impl FnMut() -> io::Result<()>,
    found: impl Fn() -> io::Result<Fingerprint>,
) -> io::Result<()> {
    let began = Instant::now();
    while began.elapsed() <= COARSEST {
        mark()?;
        if found()? != before {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(io::Error::other("its time of modification stands still"))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn times_may_be_coarse() {
        // A file system that keeps a time in so many milliseconds.
        let tick = Duration::from_millis(300);
        let kept = Cell::new(0);
        let epoch = Instant::now();
        let at =
            |ticks: u32| Fingerprint { len: 9, modified: SystemTime::UNIX_EPOCH + tick * ticks };
        let now = || u32::try_from(epoch.elapsed().as_millis() / tick.as_millis()).unwrap();
        kept.set(now());
        let before = at(kept.get());
        let mark = || {
            kept.set(now());
            Ok(())
        };
        until_it_differs(before, mark, || Ok(at(kept.get()))).unwrap();
        // The guest's next write is no earlier.
        assert!(now() >= kept.get() && at(kept.get()) != before);
        assert!(until_it_differs(before, || Ok(()), || Ok(before)).is_err());
    }

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
