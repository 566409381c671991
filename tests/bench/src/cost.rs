//! What a move costs, on this machine's own /dev/kvm: real processes, guests of a few instructions.
//!
//! One guest of 4 GiB dirties half of it without pause while its first round goes over TCP's loopback; just before,
//! as much is copied from memory to memory through such a socket, the guest dirtying too. That is done to memory in use,
//! and to memory of the kind that guests have, which nobody used before: its first write is a page fault. Another of 8 GiB has four
//! vCPUs (three of them wait to be started) and little memory in use: its state is saved and restored, and its first round is
//! for what was never touched. A third prints without pause: the longest gap in that while it moves, beside the longest in a
//! second before. A fourth has 2 GiB of zeros. Both ends' own memory (what is not the guest's RAM) is looked at all the while.

use std::io;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::{Backing, Memory};

use crate::guests::Guest;
use crate::peer::Peer;
use crate::plain_copy::plain_copy;
use crate::process::{Watched, free_port, longest_gap, until_listening};
use crate::table::{Goal, Row, Table};
use crate::{Result, Settings, ring};

const ROWS: &[Row] = &[
    ("used", "plain copy of 2 GiB over TCP's loopback, to memory in use", "MiB/s", Goal::None),
    ("fresh", "... to fresh memory, as a guest's is when it arrives", "MiB/s", Goal::None),
    ("round", "first round, 2 GiB of a guest of 4 GiB", "MiB/s", Goal::None),
    ("share-used", "... of the plain copy to memory in use", "", Goal::Least(0.8)),
    ("share-fresh", "... of the plain copy to fresh memory", "", Goal::Least(0.8)),
    ("zero", "first round, 2 GiB of zeros", "MiB/s", Goal::Least(5120.0)),
    ("untouched", "first round, 8 GiB never touched", "MiB/s", Goal::Least(5120.0)),
    ("stall", "start of tracking, 8 GiB: longest stall of a vCPU", "ms", Goal::Most(1.0)),
    ("save", "save of all state, 4 vCPUs", "ms", Goal::Most(2.0)),
    ("restore", "restore of all state, 4 vCPUs", "ms", Goal::Most(5.0)),
    (
        "gap",
        "longest gap in a guest's output while it moves, beyond that in the second before",
        "ms",
        Goal::Most(10.0),
    ),
    ("source", "own memory of the source grows by", "MiB", Goal::Most(16.0)),
    ("destination", "own memory of the destination grows by", "MiB", Goal::Most(16.0)),
];
const DIRTY_MIB: u64 = 2048;
const LOOK: Duration = Duration::from_millis(20);
/// How long a guest's output is watched without a move.
const BEFORE: Duration = Duration::from_secs(1);
/// ... and at the destination.
const AFTER: Duration = Duration::from_millis(200);

/// A guest that has moved.
struct Moved {
    report: Value,
    /// By how many MiB the source's own memory grew, and the destination's beyond what the source's was.
    grown: [f64; 2],
    /// The longest time without output, from the order to move on.
    gap: Duration,
}

/// `bench cost`
pub fn measure(settings: &Settings) -> Result<()> {
    let title = "What a move costs, on this machine's /dev/kvm";
    let mut table = Table::new(title, ROWS, &[Peer::Vmm]);
    let parts = [
        "a move under load",
        "a move of state",
        "a move of a guest that prints",
        "a move of zeros",
    ];
    settings.each_of(&parts, &[Peer::Vmm], |which, peer| {
        if which == 0 {
            let plain = &mut None;
            let Moved { report, grown, .. } = moved(Guest::dirtier(DIRTY_MIB, 0), 4096, 1, |_| {
                *plain = Some((copy_into(false)?, copy_into(true)?));
                Ok(())
            })?;
            let round = &report["rounds"][0];
            let (mib, seconds) =
                (number(&round["bytes"])? / 1048576.0, number(&round["time_us"])? / 1e6);
            let (used, fresh) = plain.ok_or("no plain copy")?;
            table.note(peer, "used", used);
            table.note(peer, "fresh", fresh);
            table.note(peer, "round", mib / seconds);
            table.note(peer, "share-used", mib / seconds / used);
            table.note(peer, "share-fresh", mib / seconds / fresh);
            table.note(peer, "source", grown[0]);
            table.note(peer, "destination", grown[1]);
        } else if which == 1 {
            let Moved { report, .. } = moved(Guest::dirtier(16, 0), 8192, 4, |_| Ok(()))?;
            let downtime = &report["downtime"];
            let round = &report["rounds"][0];
            let untouched_mib = 8192.0 - number(&round["pages"])? / 256.0;
            table.note(peer, "untouched", untouched_mib / number(&round["time_us"])? * 1e6);
            table.note(peer, "stall", ring::stall_of_start_us(8192)? / 1e3);
            table.note(peer, "save", number(&downtime["save_us"])? / 1e3);
            table.note(peer, "restore", number(&downtime["restore_us"])? / 1e3);
        } else if which == 3 {
            let Moved { report, .. } = moved(Guest::zeroer(DIRTY_MIB), 4096, 1, |_| Ok(()))?;
            let round = &report["rounds"][0];
            let mib = number(&round["zero_pages"])? / 256.0;
            if mib < DIRTY_MIB as f64 {
                return Err(format!("only {mib} MiB of zeros").into());
            }
            table.note(peer, "zero", mib / number(&round["time_us"])? * 1e6);
        } else {
            let before = &mut None;
            let Moved { gap, .. } = moved(Guest::counter(), 512, 1, |source| {
                let start = Instant::now();
                source.watch_for(BEFORE);
                *before = Some(longest_gap(&[source], start));
                Ok(())
            })?;
            let before = before.ok_or("no gap before")?;
            table.note(peer, "gap", (gap.as_secs_f64() - before.as_secs_f64()) * 1e3);
        }
        Ok(())
    });
    table.print();
    Ok(())
}

/// MiB per second of a plain copy.
fn copy_into(fresh: bool) -> Result<f64> {
    let memory = vec![0x5a; usize::try_from(DIRTY_MIB)? << 20];
    let range = (GuestAddress(0), DIRTY_MIB << 20);
    let into = Memory::new(&[range], Backing::Fresh { hugepages: false })?;
    if !fresh {
        into.ram().write_slice(&memory, range.0)?;
    }
    Ok(plain_copy(&memory, |from, mut at, len| {
        let end = at + len;
        while at < end {
            let read = into.ram().read_volatile_from(GuestAddress(at as u64), from, end - at);
            match read.map_err(io::Error::other)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => at += count,
            }
        }
        Ok(())
    })?)
}

fn number(value: &Value) -> Result<f64> {
    value.as_f64().ok_or_else(|| format!("the report has {value} for a number").into())
}

/// Boots the guest, waits for its first pass, does something meanwhile, and moves it after one round.
fn moved(
    guest: Guest,
    mem_mib: u32,
    cpus: u32,
    meanwhile: impl FnOnce(&mut Watched) -> Result<()>,
) -> Result<Moved> {
    let dir = std::env::temp_dir().join(format!("vmm-bench-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let [source_socket, destination_socket] = ["source", "destination"].map(|name| dir.join(name));
    let vmm = |words: &[&str]| {
        let mut command = Command::new("./vmm");
        command.args(words);
        command
    };
    let mut boot = vmm(&["run", "--mem", &format!("{mem_mib}M"), "--cpus", &cpus.to_string()]);
    boot.arg("--kernel").arg(guest.write_to(&dir)).arg("--control").arg(&source_socket);
    let mut source = Watched::spawn(&mut boot)?;
    source.wait_for(".")?;
    meanwhile(&mut source)?;
    let uri = format!("tcp:127.0.0.1:{}", free_port()?);
    let mut listen = vmm(&["migrate", "--listen", &uri]);
    let mut destination = Watched::spawn(listen.arg("--control").arg(&destination_socket))?;
    until_listening(uri.rsplit(':').next().unwrap_or_default().parse()?)?;
    let before = source.own_anonymous_kib()?;
    let mut most = [before; 2];
    let mut connect = vmm(&["migrate", "--connect", &uri, "--json", "--downtime-limit", "60s"]);
    let start = Instant::now();
    let mut client = Watched::spawn(connect.arg(&source_socket))?;
    while client.watch_for(LOOK) {
        for (most, end) in most.iter_mut().zip([&source, &destination]) {
            // One that has ended has nothing more.
            *most = (*most).max(end.own_anonymous_kib().unwrap_or(0));
        }
    }
    let text = client.wait_for_end()?;
    destination.wait_for(".")?;
    source.watch_for(AFTER);
    destination.watch_for(AFTER);
    let gap = longest_gap(&[&source, &destination], start);
    drop((source, destination));
    std::fs::remove_dir_all(&dir)?;
    let report = serde_json::from_str(text.lines().last().unwrap_or_default())?;
    let grown = most.map(|most| (most - before) as f64 / 1024.0);
    Ok(Moved { report, grown, gap })
}
