//! Migration over TCP's loopback: total time, bytes, and the gap, by clocks that are not the VMM's own.
//!
//! The guest beats: a byte on its console each 5 ms, and by its CLOCK_MONOTONIC how late a beat is. From
//! outside the gap is what lies between the last byte out of the source and the first out of the
//! destination. QEMU's guests have a clock that stands still for a part of the stop, so that their own
//! gap tells less than what passed; ours sees all of it.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::io::initramfs;
use crate::peer::{Guest, Peer, qemu};
use crate::process::{Watched, free_port, until_listening};
use crate::qmp::Qmp;
use crate::table::{BySize, Goal, Row, Table};
use crate::{Result, Settings};

const BEAT_MS: u32 = 5;
/// What a guest dirties without pause, if it does.
pub const DIRTY_MIB: u32 = 64;
/// How long a guest beats before it moves, and after.
const SETTLE: Duration = Duration::from_secs(2);
/// What a source may still say when a move has failed.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// What both may take when the guest dirties memory; QEMU's default.
const DOWNTIME_LIMIT_MS: u32 = 300;

const IDLE: &[Row] = &[
    ("total", "total time", "ms", Goal::Share(0.5)),
    ("outside", "gap between the consoles", "ms", Goal::Share(0.25)),
    ("guest", "largest gap that the guest saw", "ms", Goal::Share(0.25)),
    ("told", "downtime that the VMM tells", "ms", Goal::None),
    ("off", "the VMM's word on the gap between the consoles is off by", "%", Goal::Most(10.0)),
    ("bytes", "sent", "MiB", Goal::None),
];
const DIRTYING: &[Row] = &[
    ("total", "total time", "ms", Goal::Share(1.0)),
    ("outside", "gap between the consoles", "ms", Goal::Share(0.3)),
    ("guest", "largest gap that the guest saw", "ms", Goal::Share(0.3)),
    ("told", "downtime that the VMM tells", "ms", Goal::None),
    ("off", "the VMM's word on the gap between the consoles is off by", "%", Goal::Most(10.0)),
    ("bytes", "sent", "MiB", Goal::None),
];

/// What a VMM says of a move.
struct Told {
    /// When the command to move was given, and when it said that it is done.
    start: Instant,
    end: Instant,
    downtime_ms: f64,
    /// What it says of the gap that an observer sees; for QEMU, which says nothing of it, the downtime.
    silence_ms: f64,
    bytes: f64,
}

/// Measures all sizes, each with guests that dirty so much.
///
/// # Errors
/// The guest can't be made.
pub fn measure(settings: &Settings, dirty_mibs: &[u32]) -> Result<()> {
    let initrd = initramfs()?;
    let peers = settings.movers();
    for &dirty_mib in dirty_mibs {
        let (rows, what) = match dirty_mib {
            0 => (IDLE, "idle".to_owned()),
            _ => (DIRTYING, format!("dirtying {dirty_mib} MiB without pause")),
        };
        let title = |mib| format!("Migration, TCP loopback: a stock guest of {mib} MiB, {what}");
        let mut sizes = BySize::new(&settings.move_mib, rows, &peers, title);
        let words = format!(" vmm.run=\"/bench guest beat {BEAT_MS} {dirty_mib}\"");
        sizes.measure(settings, &peers, |mem_mib, peer, table| {
            one(peer, Guest::stock(mem_mib, &initrd, &words), dirty_mib > 0, table)
        });
        sizes.print();
        if dirty_mib == 0 {
            sizes.print_growth("Downtime and RAM", &["outside", "guest", "told"]);
        }
    }
    Ok(())
}

/// Moves one guest.
fn one(peer: Peer, mut guest: Guest, dirtying: bool, table: &mut Table) -> Result<()> {
    let [source_socket, destination_socket] = ["/tmp/bench.source", "/tmp/bench.destination"];
    for socket in [source_socket, destination_socket] {
        // Left by the one before.
        let _ = std::fs::remove_file(socket);
    }
    guest.control = Some(source_socket.to_owned());
    let mut source = Watched::spawn(&mut peer.boot(&guest)?)?;
    source.wait_for("beats")?;
    source.watch_for(SETTLE);
    let port = free_port()?;
    let uri = format!("tcp:127.0.0.1:{port}");
    let mut destination = match peer {
        Peer::Qemu => {
            guest.control = Some(destination_socket.to_owned());
            Watched::spawn(qemu(&guest).args(["-incoming", &uri]))?
        }
        _ => {
            let mut command = Command::new("./vmm");
            command.args(["migrate", "--listen", &uri, "--control", destination_socket]);
            Watched::spawn(&mut command)?
        }
    };
    until_listening(port)?;
    let told = match peer {
        Peer::Qemu => move_qemu(source_socket, &uri)?,
        _ => move_vmm(source_socket, &uri, dirtying).inspect_err(|_| {
            source.watch_for(LAST_WORDS);
            eprintln!("bench: the source's console:\n{}", source.text());
        })?,
    };
    destination.wait_for("")?;
    destination.watch_for(SETTLE);
    source.watch_for(Duration::from_millis(100));
    let (left, came) = (source.last(), destination.wait_for("")?);
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let outside = left.map_or(0.0, |left| ms(came.saturating_duration_since(left)));
    let gaps = source.text_since(told.start) + &destination.text();
    let gaps = gaps.lines().filter_map(|line| line.strip_prefix("gap ")?.trim().parse().ok());
    let largest_us: u32 = gaps.max().ok_or_else(|| format!("no gap: {}", destination.text()))?;
    table.note(peer, "total", ms(told.end - told.start));
    table.note(peer, "outside", outside);
    table.note(peer, "guest", f64::from(largest_us) / 1e3);
    table.note(peer, "told", told.downtime_ms);
    table.note(peer, "off", (told.silence_ms / outside - 1.0).abs() * 1e2);
    table.note(peer, "bytes", told.bytes / f64::from(1 << 20));
    Ok(())
}

fn move_qemu(socket: &str, uri: &str) -> Result<Told> {
    let mut qmp = Qmp::connect(socket)?;
    qmp.enable(&["events"])?;
    qmp.call("migrate-set-parameters", json!({"downtime-limit": DOWNTIME_LIMIT_MS}))?;
    let start = Instant::now();
    qmp.call("migrate", json!({"uri": uri}))?;
    qmp.until_migrated()?;
    let end = Instant::now();
    let info = qmp.call("query-migrate", json!({}))?;
    let number = |value: &Value| value.as_f64().ok_or_else(|| format!("query-migrate: {info}"));
    let downtime_ms = number(&info["downtime"])?;
    let bytes = number(&info["ram"]["transferred"])?;
    Ok(Told { start, end, downtime_ms, silence_ms: downtime_ms, bytes })
}

fn move_vmm(socket: &str, uri: &str, dirtying: bool) -> Result<Told> {
    let mut command = Command::new("./vmm");
    command.args(["migrate", "--connect", uri, "--json", socket]);
    if dirtying {
        command.args(["--downtime-limit", &format!("{DOWNTIME_LIMIT_MS}ms")]);
    }
    let mut client = Watched::spawn(&mut command)?;
    let text = client.wait_for_end()?;
    let end = client.last().ok_or("it told nothing")?;
    let last = text.lines().last().unwrap_or_default();
    let report: Value = serde_json::from_str(last)?;
    eprintln!("bench:   {last}");
    let number = |value: &Value| value.as_f64().ok_or_else(|| format!("report: {last}"));
    let downtime_ms = number(&report["downtime"]["total_us"])? / 1e3;
    let silence_ms = report["downtime"]["silence_us"].as_f64().map_or(downtime_ms, |us| us / 1e3);
    let bytes = number(&report["sent_bytes"])?;
    Ok(Told { start: client.start, end, downtime_ms, silence_ms, bytes })
}
