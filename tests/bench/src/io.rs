//! Disk and network: a guest reads and writes an image on tmpfs, and talks TCP over a TAP with the host.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;

use crate::boot::INITRAMFS;
use crate::peer::Guest;
use crate::process::{Watched, until};
use crate::table::{Goal, Row, Table};
use crate::{Result, Settings};

/// Size of the image, and of what goes over TCP each way.
const DISK_MIB: usize = 128;
const NET_MIB: usize = 256;
/// How often each guest does it all: which threads share a CPU changes from one time to the next, and a figure by
/// twice with it.
const TIMES: usize = 3;
const DISK: &str = "/tmp/bench.disk";
const TAP: &str = "bench0";

const ROWS: &[Row] = &[
    ("read", "disk, sequential read", "MiB/s", Goal::Times(1.2)),
    ("write", "disk, sequential write and fsync", "MiB/s", Goal::Times(1.2)),
    ("direct", "disk, sequential direct write and fsync", "MiB/s", Goal::Times(1.2)),
    ("send", "TCP out of the guest", "MiB/s", Goal::Times(1.2)),
    ("receive", "TCP into the guest", "MiB/s", Goal::Times(1.2)),
];

/// Makes the initramfs of the guests that run this program, and gives its path.
pub fn initramfs() -> Result<String> {
    let path = "/tmp/bench.initramfs";
    let mut archive = std::fs::read(INITRAMFS)?;
    let program = std::fs::read("/proc/self/exe")?;
    for (name, mode, content) in [("bench", 0o100_755, &program[..]), ("TRAILER!!!", 0, &[])] {
        let (len, name_len) = (content.len(), name.len() + 1);
        // newc: inode, mode, owner, group, links, time, length, device, device of a device file, name's length, sum
        let header = format!("070701{0:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{len:08x}", 0, 1)
            + &format!("{0:08x}{0:08x}{0:08x}{0:08x}{name_len:08x}{0:08x}", 0);
        for part in [format!("{header}{name}\0").as_bytes(), content] {
            archive.extend(part);
            archive.resize(archive.len().next_multiple_of(4), 0);
        }
    }
    // QEMU's microvm puts the archive at the end of RAM, in whole pages, over the ACPI tables that its
    // firmware has put there: nearly a page left free at the end saves them.
    archive.resize(archive.len().next_multiple_of(4096) + 4, 0);
    std::fs::write(path, archive)?;
    Ok(path.to_owned())
}

/// Runs `ip`.
fn ip(args: &str) -> Result<()> {
    let status = Command::new("ip").args(args.split(' ')).status()?;
    if status.success() { Ok(()) } else { Err(format!("ip {args}: {status}").into()) }
}

/// The host's ends of the connections: port 5001 takes everything, port 5002 gives.
fn serve() -> Result<()> {
    let sink = TcpListener::bind("10.9.0.1:5001")?;
    let source = TcpListener::bind("10.9.0.1:5002")?;
    std::thread::spawn(move || {
        // A thread for each: the connection of a guest that was killed stays, and others come.
        for mut stream in sink.incoming().flatten() {
            std::thread::spawn(move || {
                let mut piece = vec![0; 1 << 20];
                while let Ok(1..) = stream.read(&mut piece) {}
            });
        }
    });
    std::thread::spawn(move || {
        let piece = vec![0x5a; 1 << 20];
        for stream in source.incoming() {
            let Ok(mut stream) = stream else { continue };
            for _ in 0..NET_MIB {
                // A guest that is gone takes no more.
                let _ = stream.write_all(&piece);
            }
        }
    });
    Ok(())
}

/// Measures both in one guest each.
///
/// # Errors
/// The network or the image can't be made.
pub fn measure(settings: &Settings) -> Result<()> {
    ip(&format!("tuntap add {TAP} mode tap vnet_hdr"))?;
    ip(&format!("address add 10.9.0.1/24 dev {TAP}"))?;
    ip(&format!("link set {TAP} up"))?;
    serve()?;
    let initrd = initramfs()?;
    let title =
        "Disk and network of a stock guest, 256 MiB, 1 vCPU (an image on tmpfs; a TAP, no vhost)";
    let mut table = Table::new(title, ROWS, &settings.peers);
    settings.each("io", |peer| {
        // Written anew, so that no holes are read.
        std::fs::write(DISK, vec![0xa5; DISK_MIB << 20])?;
        // What has been read is to be read again from the disk.
        let once = format!(
            "echo 3 > /proc/sys/vm/drop_caches; /bench guest disk /dev/vda; /bench guest net 10.9.0.1 {NET_MIB};"
        );
        let run = once.repeat(TIMES);
        let words = format!(" vmm.ip=10.9.0.2/24 vmm.run=\"{run}\"");
        let mut guest = Guest::stock(256, &initrd, &words);
        (guest.disk, guest.tap) = (Some(DISK.to_owned()), Some(TAP));
        let mut vm = Watched::spawn(&mut peer.boot(&guest)?)?;
        vm.wait_for("init: exit")?;
        let text = vm.text();
        let mut found = 0;
        for line in text.lines().filter_map(|line| line.strip_prefix("result ")) {
            let words: Vec<&str> = line.split(' ').collect();
            let &[row, bytes, time_us] = &words[..] else { continue };
            let (bytes, time_us): (u32, u32) = (bytes.parse()?, time_us.parse()?);
            let mib = f64::from(bytes) / f64::from(1 << 20);
            table.note(peer, row, mib / (f64::from(time_us) / 1e6));
            found += 1;
        }
        drop(vm);
        // The TAP takes the next one when the last has let it go.
        until("lets the TAP go", || !carrier())?;
        if found == ROWS.len() * TIMES { Ok(()) } else { Err(text.into()) }
    });
    table.print();
    std::fs::remove_file(DISK)?;
    ip(&format!("link delete {TAP}"))
}

/// Whether somebody has the TAP.
fn carrier() -> bool {
    std::fs::read_to_string(format!("/sys/class/net/{TAP}/carrier")).is_ok_and(|c| c.trim() == "1")
}
