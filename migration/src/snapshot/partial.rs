//! The directory in which a snapshot is written before it has its name: locked as long as somebody writes it, so that
//! what a crash left can be told from it, and removed by the next snapshot of that name.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{MEMORY_FILE, STATE_FILE, SnapshotError, file_error};
use crate::plan::MigrationId;

/// What follows the snapshot's name, before its id.
const MARK: &str = ".partial-";
/// Digits of an id.
const ID_DIGITS: usize = 32;
/// How often somebody who cleans up may be quicker than the first lock.
const TRIES: u32 = 10;

/// Such a directory with its empty `memory`. Dropping it removes what still has this name.
pub(super) struct Partial {
    pub(super) path: PathBuf,
    /// Locked.
    pub(super) memory: File,
}

impl Partial {
    /// Makes it beside `dir`, after removing what nobody writes any more.
    pub(super) fn create(dir: &Path, id: MigrationId) -> Result<Self, SnapshotError> {
        remove_abandoned(dir);
        let mut path = dir.as_os_str().to_owned();
        path.push(format!("{MARK}{id}"));
        let path = PathBuf::from(path);
        let mut tries = TRIES;
        loop {
            let made = DirBuilder::new().mode(0o700).create(&path);
            made.map_err(|source| file_error("create", &path, source))?;
            let file = path.join(MEMORY_FILE);
            tries -= 1;
            let source = match create_private(&file) {
                Ok(memory) => {
                    // Where nothing can be locked, nothing is removed either.
                    let _ = memory.lock();
                    if is_at(&memory, &file) {
                        return Ok(Self { path, memory });
                    }
                    ErrorKind::NotFound.into()
                }
                Err(source) => source,
            };
            // Another snapshot of this name took it for a leftover, before it was locked.
            let was_removed = source.kind() == ErrorKind::NotFound;
            let _ = fs::remove_dir(&path);
            if !was_removed || tries == 0 {
                return Err(file_error("create", &file, source));
            }
        }
    }
}

/// A new file for its owner only: it holds all that the guest keeps secret.
pub(super) fn create_private(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After the rename there is nothing of this name.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The directory that a path's name is in.
pub(super) fn parent_of(dir: &Path) -> &Path {
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Removes what snapshots of this name left that were killed. What can't be removed stays.
fn remove_abandoned(dir: &Path) {
    let (Some(name), Ok(entries)) = (dir.file_name(), fs::read_dir(parent_of(dir))) else { return };
    for entry in entries.flatten() {
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_dir && is_partial_of(name, &entry.file_name()) {
            remove_unless_locked(&entry.path());
        }
    }
}

fn is_partial_of(name: &OsStr, found: &OsStr) -> bool {
    let rest = found.as_bytes().strip_prefix(name.as_bytes());
    let id = rest.and_then(|rest| rest.strip_prefix(MARK.as_bytes()));
    id.is_some_and(|id| id.len() == ID_DIGITS && id.iter().all(u8::is_ascii_hexdigit))
}

/// Nothing but the two files is taken away: a directory with more in it is none of ours.
fn remove_unless_locked(path: &Path) {
    let file = path.join(MEMORY_FILE);
    let _lock = match File::options().read(true).write(true).open(&file) {
        Ok(memory) if memory.try_lock().is_ok() => Some(memory),
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        _ => return,
    };
    for name in [STATE_FILE, MEMORY_FILE] {
        let _ = fs::remove_file(path.join(name));
    }
    let _ = fs::remove_dir(path);
}

/// Whether this is the file of that name.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.symlink_metadata()) {
        (Ok(file), Ok(there)) => (file.dev(), file.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(dir: &Path, id: u8) -> Partial {
        Partial::create(dir, MigrationId([id; 16])).unwrap()
    }

    #[test]
    fn nobody_else_may_read_it() {
        let place = tempfile::tempdir().unwrap();
        let partial = create(&place.path().join("snap"), 1);
        let mode = |metadata: fs::Metadata| metadata.mode() & 0o777;
        assert_eq!(mode(fs::metadata(&partial.path).unwrap()), 0o700);
        assert_eq!(mode(partial.memory.metadata().unwrap()), 0o600);
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<_> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_nobody_writes_is_removed_by_the_next_of_that_name() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("s");
        let one = create(&dir, 1);
        let two = create(&dir, 2);
        assert!(one.path.exists() && two.path.exists(), "neither is in the other's way");
        let (kept, left) = (names(place.path())[1].clone(), one.path.clone());
        // As by a kill: the lock is gone, the files aren't.
        one.memory.unlock().unwrap();
        fs::write(left.join(STATE_FILE), "half").unwrap();
        std::mem::forget(one);
        let empty = place.path().join(format!("s.partial-{}", "a".repeat(32)));
        fs::create_dir(&empty).unwrap();
        let other = create(&place.path().join("s2"), 3);
        assert!(left.exists() && empty.exists(), "that is another snapshot's");
        let three = create(&dir, 4);
        assert!(!left.exists() && !empty.exists());
        let three_name = three.path.file_name().unwrap().to_str().unwrap().to_owned();
        let other_name = other.path.file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(names(place.path()), [kept, three_name, other_name]);
        drop((two, three, other));
        assert!(names(place.path()).is_empty());
    }

    #[test]
    fn what_isn_t_ours_stays() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("s");
        let id = "0".repeat(32);
        let more = place.path().join(format!("s.partial-{id}"));
        fs::create_dir(&more).unwrap();
        fs::write(more.join("mine"), "").unwrap();
        let elsewhere = place.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        fs::write(elsewhere.join(MEMORY_FILE), "").unwrap();
        let link = place.path().join(format!("s.partial-{}", "1".repeat(32)));
        std::os::unix::fs::symlink(&elsewhere, &link).unwrap();
        for name in ["s.partial-1", "s.partial-", "s.partial-zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz"] {
            fs::create_dir(place.path().join(name)).unwrap();
        }
        let before = names(place.path());
        drop(create(&dir, 9));
        assert_eq!(names(place.path()), before);
        assert!(elsewhere.join(MEMORY_FILE).exists() && more.join("mine").exists());
    }
}
