//! What stands behind the devices: disks and TAPs, by system calls straight on guest memory.

use std::fs;
use std::path::Path;

pub mod disk;
pub mod fingerprint;
pub mod lock;
pub mod tap;

mod bounce;
mod iovec;

/// The first process that has a file open for which `is_it(pid, fd, link)` holds, `link` being its entry
/// in `/proc/PID/fd`. Used to name who stands in the way; what may not be looked at is passed over.
fn find_process(mut is_it: impl FnMut(u32, &str, &Path) -> bool) -> Option<u32> {
    let number = |name: std::ffi::OsString| name.to_str()?.parse::<u32>().ok();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = number(process.file_name()) else { continue };
        let Ok(files) = fs::read_dir(process.path().join("fd")) else { continue };
        for file in files.flatten() {
            if file.file_name().to_str().is_some_and(|fd| is_it(pid, fd, &file.path())) {
                return Some(pid);
            }
        }
    }
    None
}
