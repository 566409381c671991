//! Whether a host has what a guest needs besides its CPU: disks that nobody else has, TAPs, memory. All that is
//! missing is told, one line each.

use rustix::fs::{Access, access};
use vmm_migration::plan::Plan;

use super::cgroup;
use crate::arch::layout;
use crate::backend::disk::{Disk, DiskError, DiskHandle, Locking};
use crate::backend::lock::{LockError, Obstacle};
use crate::backend::tap::Tap;
use crate::chain::chain;
use crate::config::{Config, CpuModel, OnReboot};
use crate::memory::PAGE_SIZE;

/// What the disks' locks tell at reservation.
#[derive(Default)]
pub(super) struct Locks {
    /// The source's are seen on all writable disks, and there is one.
    pub seen: bool,
    /// Somebody else holds these.
    pub reasons: Vec<String>,
    /// The source's aren't seen on these.
    pub warnings: Vec<String>,
}

/// Looks for the source's locks, which end at `mark` if it told, and for anybody else's.
pub(super) fn locks(disks: &[DiskHandle], mark: Option<u64>) -> Locks {
    let mut locks = Locks::default();
    let mut unseen = 0;
    for disk in disks {
        match disk.obstacle(mark) {
            Ok(Obstacle::Source) => locks.seen = true,
            Ok(Obstacle::None) if !disk.is_writable() => {}
            Ok(Obstacle::None) => {
                unseen += 1;
                locks.warnings.push(format!(
                    "disk {}: the source's lock isn't seen here: it is another file than there, or its file \
                     system shares no locks",
                    disk.path().display()
                ));
            }
            Ok(Obstacle::Other(holder)) => {
                let held = LockError::Held { path: disk.path().to_owned(), holder };
                locks.reasons.push(chain(&held));
            }
            // Where a lock can't be looked for, none can be taken.
            Err(e) => locks.reasons.push(chain(&e)),
        }
    }
    locks.seen &= unseen == 0;
    locks
}

/// The guest's disks as they are here, and what is wrong with them.
pub(super) fn disks(config: &Config, plan: &Plan) -> (Vec<DiskHandle>, Vec<String>) {
    let (mut disks, mut reasons) = (Vec::new(), Vec::new());
    for disk in &config.disks {
        let Some(need) = plan.disks.iter().find(|need| need.id == disk.id) else {
            reasons.push(format!("disk {}: the source doesn't tell its size", disk.id));
            continue;
        };
        let opened = Disk::open(&disk.options(), Locking::Later);
        match opened.and_then(|(_, handle)| Ok((handle.len()?, handle))) {
            Err(DiskError::Missing { path }) => reasons.push(format!(
                "disk {id}: {} is not here: say where it is with --disk id={id},path=PATH",
                path.display(),
                id = disk.id
            )),
            Err(e) => reasons.push(chain(&e)),
            Ok((bytes, handle)) => {
                if bytes != need.bytes {
                    reasons.push(format!(
                        "disk {}: {} has {bytes} bytes here, {} at the source",
                        disk.id,
                        disk.path.display(),
                        need.bytes
                    ));
                }
                disks.push(handle);
            }
        }
    }
    (disks, reasons)
}

pub(super) fn layout_reason(config: &Config, plan: &Plan) -> Option<String> {
    let ours = layout::ram_ranges(config.ram_bytes);
    let ours = ours.iter().map(|(start, len)| (start.0 / PAGE_SIZE, len / PAGE_SIZE));
    let theirs = plan.ram()?.regions.iter().map(|r| (r.first_page, r.pages));
    (!ours.eq(theirs)).then(|| "guest RAM is laid out differently here".to_owned())
}

/// TAPs that are missing here, or that somebody else has.
pub(super) fn tap_reasons(config: &Config) -> Vec<String> {
    let here = config.nets.iter().filter_map(|net| Some((net, Tap::open(&net.tap).err()?)));
    here.map(|(net, e)| {
        format!("{}: say which it is here with --net id={},tap=NAME", chain(&e), net.id)
    })
    .collect()
}

/// What the guest needs to boot again and isn't here, where `vmm` is to boot it again: it runs until then all the same.
pub(super) fn reboot_warnings(config: &Config) -> Vec<String> {
    if config.on_reboot == OnReboot::Exit {
        return Vec::new();
    }
    let model = match &config.cpu_model {
        CpuModel::File(path) => Some(("CPU model", path)),
        CpuModel::Host | CpuModel::V2 | CpuModel::V3 => None,
    };
    let kernel = [("kernel", &config.boot.kernel)];
    let initrd = config.boot.initrd.iter().map(|path| ("initrd", path));
    let missing = kernel.into_iter().chain(initrd).chain(model).filter_map(|(what, path)| {
        // Not opened: a FIFO would wait for who writes it.
        let e = access(path, Access::READ_OK).err()?;
        Some(format!(
            "the guest can't reboot here, and ends where it does: {what} {}: {e}",
            path.display()
        ))
    });
    missing.collect()
}

/// Not enough memory for what the guest has touched. Huge pages come from a pool of their own, where all of the RAM is
/// reserved when it is mapped, or not.
pub(super) fn memory_reason(hugepages: bool, plan: &Plan) -> Option<String> {
    if hugepages {
        return None;
    }
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    memory_lacking(plan.touched_pages, &meminfo, cgroup::left_bytes())
}

fn memory_lacking(touched_pages: u64, meminfo: &str, group_bytes: Option<u64>) -> Option<String> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let host_kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse().ok());
    let needed_kib = touched_pages.saturating_mul(PAGE_SIZE / 1024);
    let leaves = [
        (host_kib, "this host has"),
        (group_bytes.map(|bytes| bytes >> 10), "the control group of this process has"),
    ];
    let least = leaves.into_iter().filter_map(|(kib, who)| Some((kib?, who))).min();
    least.filter(|(kib, _)| needed_kib > *kib).map(|(kib, who)| {
        format!("the guest uses {} MiB of memory, {who} {} MiB left", needed_kib >> 10, kib >> 10)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_held_against_what_is_left() {
        let meminfo = "MemTotal:  4000000 kB\nMemFree:  9 kB\nMemAvailable:    1024 kB\n";
        assert_eq!(memory_lacking(256, meminfo, None), None);
        assert_eq!(
            memory_lacking(257 + 256, meminfo, Some(4 << 20)).unwrap(),
            "the guest uses 2 MiB of memory, this host has 1 MiB left"
        );
        assert_eq!(
            memory_lacking(256, meminfo, Some((1 << 20) - 1)).unwrap(),
            "the guest uses 1 MiB of memory, the control group of this process has 0 MiB left"
        );
        assert!(memory_lacking(u64::MAX, meminfo, None).is_some());
        assert_eq!(
            memory_lacking(u64::MAX, "nothing", None),
            None,
            "who can't tell doesn't refuse"
        );
    }
}
