//! Boot and start: how long until a guest speaks, and what its VMM takes of memory meanwhile.

use std::time::Duration;

use crate::peer::{Guest, Peer};
use crate::process::Watched;
use crate::table::{Goal, Row, Table};
use crate::{Result, Settings};

/// The stock guest's initramfs.
pub const INITRAMFS: &str = "initramfs-6.12-cloud.cpio";
/// How long a guest is left idle before its VMM's memory is looked at.
const IDLE: Duration = Duration::from_secs(3);

const BOOT: &[Row] = &[("boot", "exec to first line of userspace", "ms", Goal::Share(0.7))];
const START: &[Row] =
    &[("start", "exec to first byte of the smallest guest", "ms", Goal::Share(0.08))];
const MEMORY: &[Row] = &[("memory", "resident, less the guest's RAM", "MiB", Goal::Most(3.0))];
const STRAIGHT: &[Row] = &[
    ("512M", "exec to first byte, 512 MiB", "ms", Goal::Most(5.0)),
    ("8G", "exec to first byte, 8 GiB", "ms", Goal::Most(5.0)),
];

/// From exec to what a pattern tells, in ms.
fn exec_to(peer: Peer, guest: &Guest, wanted: &str) -> Result<f64> {
    let mut vm = Watched::spawn(&mut peer.boot(guest)?)?;
    let at = vm.wait_for(wanted)?;
    Ok((at - vm.start).as_secs_f64() * 1e3)
}

/// A stock kernel to its userspace.
pub fn boot(settings: &Settings) {
    let mut table = Table::new("Boot: stock 6.12, 256 MiB, 1 vCPU", BOOT, &settings.peers);
    settings.each("boot", |peer| {
        let guest = Guest::stock(256, INITRAMFS, "");
        table.note(peer, "boot", exec_to(peer, &guest, "init: userspace is up")?);
        Ok(())
    });
    table.print();
}

/// The smallest guest.
pub fn start(settings: &Settings) {
    let mut table = Table::new("Start: a guest of 17 bytes, 256 MiB", START, &settings.peers);
    settings.each("start", |peer| {
        table.note(peer, "start", exec_to(peer, &Guest::tiny(256), "")?);
        Ok(())
    });
    table.print();
}

/// The smallest guest where there may be no stock kernel: this machine's own KVM.
pub fn straight(settings: &Settings) {
    let title = "Start, on this machine's /dev/kvm";
    let mut table = Table::new(title, STRAIGHT, &settings.peers);
    for (row, mem_mib) in [("512M", 512), ("8G", 8192)] {
        settings.each(row, |peer| {
            table.note(peer, row, exec_to(peer, &Guest::tiny(mem_mib), "")?);
            Ok(())
        });
    }
    table.print();
}

/// What the VMM of an idle guest takes.
pub fn memory(settings: &Settings) {
    let title = "Memory of the VMM: a stock guest of 256 MiB, idle for 3 s";
    let mut table = Table::new(title, MEMORY, &settings.peers);
    settings.each("memory", |peer| {
        let guest = Guest::stock(256, INITRAMFS, "");
        let mut vm = Watched::spawn(&mut peer.boot(&guest)?)?;
        vm.wait_for("leave the shell")?;
        vm.watch_for(IDLE);
        let kib = u32::try_from(vm.own_memory_kib()?)?;
        table.note(peer, "memory", f64::from(kib) / 1024.0);
        Ok(())
    });
    table.print();
    if let Ok(file) = std::fs::metadata("vmm") {
        let kib = u32::try_from(file.len() / 1024).unwrap_or(u32::MAX);
        let missed = if kib > 4096 { ": **missed**" } else { "" };
        println!("\nThe binary: {:.2} MiB (goal: ≤ 4){missed}", f64::from(kib) / 1024.0);
    }
}
