//! Verdicts on migrations that came here, kept in files beside the control sockets: whichever destination
//! process on this host a source in doubt reaches, it hears what became of its guest.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use vmm_migration::destination::Verdict;
use vmm_migration::plan::MigrationId;

use crate::api::socket;

/// How long a verdict is kept: a source in doubt asks every two seconds.
pub const VERDICT_KEPT: Duration = Duration::from_secs(600);
/// A verdict has a few reasons at most.
const VERDICT_BYTES_MAX: u64 = 64 << 10;
const SUFFIX: &str = "verdict";
/// What one is called that is being written; or was, by a process that was killed.
const PART_SUFFIX: &str = "part";

/// Where this host's verdicts are.
#[derive(Debug)]
pub struct Verdicts {
    /// None for a user without a runtime directory.
    dir: Option<PathBuf>,
    /// This process's own.
    own: Vec<Verdict>,
}

impl Verdicts {
    /// Those of this user on this host; the old ones are removed.
    #[must_use]
    pub fn of_this_host() -> Self {
        Self::in_directory(socket::directory().ok())
    }

    fn in_directory(dir: Option<PathBuf>) -> Self {
        let verdicts = Self { dir, own: Vec::new() };
        for path in verdicts.old() {
            // One that can't be removed harms nobody.
            let _ = fs::remove_file(path);
        }
        verdicts
    }

    fn old(&self) -> Vec<PathBuf> {
        let Some(entries) = self.dir.as_ref().and_then(|dir| fs::read_dir(dir).ok()) else {
            return Vec::new();
        };
        let is_old = |path: &Path| {
            let modified = fs::symlink_metadata(path).and_then(|metadata| metadata.modified());
            modified.is_ok_and(|at| {
                SystemTime::now().duration_since(at).is_ok_and(|age| age > VERDICT_KEPT)
            })
        };
        let paths = entries.flatten().map(|entry| entry.path());
        let is_ours = |path: &Path| {
            path.extension().is_some_and(|suffix| suffix == SUFFIX || suffix == PART_SUFFIX)
        };
        paths.filter(|path| is_ours(path) && is_old(path)).collect()
    }

    fn path(&self, id: MigrationId) -> Option<PathBuf> {
        Some(self.dir.as_ref()?.join(format!("{id}.{SUFFIX}")))
    }

    /// Keeps a verdict. Where that fails, only this process can answer for it, while it lives.
    pub fn keep(&mut self, verdict: &Verdict) {
        self.own.push(verdict.clone());
        let Some(path) = self.path(verdict.id) else { return };
        if let Err(e) = self.write(&path, &verdict.to_bytes()) {
            tracing::warn!("{}: the migration's verdict can't be kept: {e}", path.display());
        }
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        if let Some(dir) = &self.dir {
            socket::make_directory(dir).map_err(io::Error::other)?;
        }
        // Whole or not at all, for who reads it meanwhile.
        let part = path.with_extension(PART_SUFFIX);
        let written = File::create(&part).and_then(|mut file| file.write_all(bytes));
        written.and_then(|()| fs::rename(&part, path)).inspect_err(|_| {
            let _ = fs::remove_file(&part);
        })
    }

    /// The verdict on a migration, if one is known.
    #[must_use]
    pub fn find(&self, id: MigrationId) -> Option<Verdict> {
        if let Some(own) = self.own.iter().find(|verdict| verdict.id == id) {
            return Some(own.clone());
        }
        let mut bytes = Vec::new();
        let file = File::open(self.path(id)?).ok()?;
        file.take(VERDICT_BYTES_MAX).read_to_end(&mut bytes).ok()?;
        Verdict::from_bytes(&bytes).filter(|verdict| verdict.id == id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn never(id: u8) -> Verdict {
        Verdict::never_activated(MigrationId([id; 16]), "why")
    }

    #[test]
    fn what_is_kept_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("vmm");
        Verdicts::in_directory(Some(place.clone())).keep(&never(1));
        let others = Verdicts::in_directory(Some(place));
        assert_eq!(others.find(MigrationId([1; 16])), Some(never(1)));
        assert_eq!(others.find(MigrationId([2; 16])), None);
    }

    #[test]
    fn the_old_are_removed_and_the_damaged_say_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut verdicts = Verdicts::in_directory(Some(dir.path().into()));
        verdicts.keep(&never(1));
        verdicts.keep(&never(2));
        verdicts.keep(&never(3));
        let path = |id: u8| verdicts.path(MigrationId([id; 16])).unwrap();
        let file = File::options().write(true).open(path(1)).unwrap();
        file.set_modified(SystemTime::now() - VERDICT_KEPT * 2).unwrap();
        let part = path(5).with_extension(PART_SUFFIX);
        let file = File::create(&part).unwrap();
        file.set_modified(SystemTime::now() - VERDICT_KEPT * 2).unwrap();
        // Another's under this name, and half of one.
        fs::copy(path(2), path(4)).unwrap();
        fs::write(path(3), &never(3).to_bytes()[..9]).unwrap();
        let verdicts = Verdicts::in_directory(Some(dir.path().into()));
        let found: Vec<_> = (1..=4).map(|id| verdicts.find(MigrationId([id; 16]))).collect();
        assert_eq!(found, [None, Some(never(2)), None, None]);
        assert!(!part.exists());
    }

    #[test]
    fn without_a_directory_a_process_has_its_own() {
        let mut verdicts = Verdicts::in_directory(None);
        verdicts.keep(&never(1));
        assert_eq!(verdicts.find(MigrationId([1; 16])), Some(never(1)));
        assert_eq!(verdicts.find(MigrationId([2; 16])), None);
    }
}
