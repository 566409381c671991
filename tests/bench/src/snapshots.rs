//! Snapshots on tmpfs: how long a full one takes, and from exec of its restore to the guest's first output.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::io::initramfs;
use crate::peer::{Guest, Peer, qemu};
use crate::process::Watched;
use crate::qmp::Qmp;
use crate::table::{BySize, Goal, Row, Table};
use crate::{Result, Settings};

const SOCKET: &str = "/tmp/bench.sock";
const SNAPSHOT: &str = "/tmp/bench.snapshot";
const SETTLE: Duration = Duration::from_secs(1);

const ROWS: &[Row] = &[
    ("write", "a full snapshot", "ms", Goal::Share(0.8)),
    ("restore", "restore, exec to the guest's first output", "ms", Goal::Share(0.1)),
    ("disk", "blocks of the snapshot", "MiB", Goal::None),
];

/// Measures both, in several sizes.
///
/// # Errors
/// The guest can't be made.
pub fn measure(settings: &Settings) -> Result<()> {
    let initrd = initramfs()?;
    let peers = settings.movers();
    let sizes_mib = [&[256], &settings.move_mib[..]].concat();
    let title = |mib| {
        format!(
            "Snapshot on tmpfs: a stock guest of {mib} MiB, idle (vmm: --lazy; QEMU: mapped-ram)"
        )
    };
    let mut sizes = BySize::new(&sizes_mib, ROWS, &peers, title);
    sizes.measure(settings, &peers, |mem_mib, peer, table| {
        let words = " vmm.run=\"/bench guest beat 5 0\"";
        one(peer, Guest::stock(mem_mib, &initrd, words), table)
    });
    sizes.print();
    sizes.print_growth("Restore and RAM", &["restore"]);
    Ok(())
}

fn one(peer: Peer, mut guest: Guest, table: &mut Table) -> Result<()> {
    // Left by the one before.
    let _ = std::fs::remove_file(SOCKET);
    let _ = std::fs::remove_file(SNAPSHOT);
    let _ = std::fs::remove_dir_all(SNAPSHOT);
    guest.control = Some(SOCKET.to_owned());
    let mut vm = Watched::spawn(&mut peer.boot(&guest)?)?;
    vm.wait_for("beats")?;
    vm.watch_for(SETTLE);
    let time = match peer {
        Peer::Qemu => {
            let mut qmp = Qmp::connect(SOCKET)?;
            qmp.enable(&["events", "mapped-ram"])?;
            let start = Instant::now();
            qmp.call("migrate", json!({"uri": format!("file:{SNAPSHOT}")}))?;
            qmp.until_migrated()?;
            start.elapsed()
        }
        _ => {
            let mut command = Command::new("./vmm");
            let mut client = Watched::spawn(command.args(["snapshot", SOCKET, SNAPSHOT]))?;
            client.wait_for_end()?;
            client.start.elapsed()
        }
    };
    table.note(peer, "write", time.as_secs_f64() * 1e3);
    table.note(peer, "disk", allocated_mib(Path::new(SNAPSHOT))?);
    drop(vm);
    let _ = std::fs::remove_file(SOCKET);
    let mut restored = match peer {
        Peer::Qemu => {
            let restored = Watched::spawn(qemu(&guest).args(["-incoming", "defer"]))?;
            let mut qmp = Qmp::connect(SOCKET)?;
            qmp.enable(&["mapped-ram"])?;
            qmp.call("migrate-incoming", json!({"uri": format!("file:{SNAPSHOT}")}))?;
            restored
        }
        _ => {
            let mut command = Command::new("./vmm");
            Watched::spawn(command.args(["restore", SNAPSHOT, "--lazy", "--control", SOCKET]))?
        }
    };
    let first = restored.wait_for("")?;
    table.note(peer, "restore", (first - restored.start).as_secs_f64() * 1e3);
    Ok(())
}

/// What a file, or the files of a directory, take on disk.
fn allocated_mib(path: &Path) -> Result<f64> {
    use std::os::unix::fs::MetadataExt;
    let metadata = path.metadata()?;
    if metadata.is_dir() {
        return std::fs::read_dir(path)?.map(|entry| allocated_mib(&entry?.path())).sum();
    }
    Ok(f64::from(u32::try_from(metadata.blocks())?) * 512.0 / f64::from(1 << 20))
}
