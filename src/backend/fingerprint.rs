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

/// Sets the time of modification to a later one. An exact time may be set by the file's owner only; whoever may write
/// may set the kernel's (utimensat(2)), and waits until that differs.
pub(super) fn mark_changed(file: &File) -> io::Result<()> {
    let before = Fingerprint::of(file)?;
    let set = |time| file.set_modified(time).and_then(|()| Fingerprint::of(file));
    match mark_later(before, SystemTime::now(), set) {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {}
        marked => return marked,
    }
    let (now, began) = (Timespec { tv_sec: 0, tv_nsec: UTIME_NOW }, Instant::now());
    while began.elapsed() <= COARSEST {
        rustix::fs::futimens(file, &Timestamps { last_access: now, last_modification: now })?;
        if Fingerprint::of(file)? != before {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(stands_still())
}

/// Sets now, or what comes after the time before on a file system whose times are coarser than that. `set` gives what
/// is found then.
fn mark_later(
    before: Fingerprint,
    now: SystemTime,
    mut set: impl FnMut(SystemTime) -> io::Result<Fingerprint>,
) -> io::Result<()> {
    for later in [Duration::ZERO, COARSEST / 2, COARSEST] {
        if set(now.max(before.modified) + later)? != before {
            return Ok(());
        }
    }
    Err(stands_still())
}

fn stands_still() -> io::Error {
    io::Error::other("its time of modification stands still")
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn times_may_be_coarse() {
        let at = |ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
        let since = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        for tick_ms in [1, 1000, 2000] {
            let kept = |time| {
                let ms = u64::try_from(since(time).as_millis()).unwrap();
                Fingerprint { len: 9, modified: at(ms / tick_ms * tick_ms) }
            };
            // The last write is of now, or of a moment before or after: clocks may go back.
            for now in [9999, 10_000, 10_350, 11_999] {
                let (before, mut marked) = (kept(at(10_300)), None);
                let set = |time| {
                    marked = Some(kept(time));
                    Ok(kept(time))
                };
                mark_later(before, at(now), set).unwrap();
                assert!(marked.unwrap().modified > before.modified, "{tick_ms} ms, {now}");
            }
        }
        let before = Fingerprint { len: 9, modified: at(1) };
        assert!(mark_later(before, at(2), |_| Ok(before)).is_err());
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
