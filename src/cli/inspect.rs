//! `vmm inspect`: what a snapshot holds, or a recorded stream, record by record.

use std::fmt::Write as _;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use vmm_migration::inspect::{Item, inspect};
use vmm_migration::snapshot::{BLOCK_LEN, Snapshot, SnapshotError};
use vmm_migration::wire::WireError;

use super::args::{Arg, Args, Stop, usage, utf8};
use super::units::format_size;
use super::{Outcome, print, print_json, vm};

/// The help of `vmm inspect`.
pub const HELP: &str = "\
usage: vmm inspect DIR|FILE [--check] [--json]

Shows what a snapshot holds: whose it is, what it needs of a host, and the saved state of each part. Of a
FILE (a snapshot's 'state', or one direction of a migration, recorded) it shows each record as it stands,
up to the first one that is wrong.

  --check  also read a snapshot's memory and compare its checksums
  --json   one JSON object: of a DIR the snapshot, of a FILE one for each record (fields: src/api/API.md)

example: vmm inspect /var/lib/vmm/web.snap
";

/// Why nothing, or not all, is shown.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The snapshot.
    #[error("snapshot {}", dir.display())]
    Snapshot {
        /// Its directory.
        dir: PathBuf,
        /// What is wrong with it.
        #[source]
        source: SnapshotError,
    },
    /// The file can't be opened.
    #[error("{}", file.display())]
    Open {
        /// Its path.
        file: PathBuf,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// The stream in it.
    #[error("{} behind byte {offset}", file.display())]
    Stream {
        /// Its path.
        file: PathBuf,
        /// Where the last good record begins.
        offset: u64,
        /// What is wrong.
        #[source]
        source: WireError,
    },
}

/// `vmm inspect`
///
/// # Errors
/// Wrong usage.
pub fn command(mut args: Args) -> Result<Outcome, Stop> {
    let (mut path, mut json, mut check) = (None, false, false);
    while let Some(arg) = args.next_arg()? {
        match arg {
            Arg::Option(name) => match name.as_str() {
                "json" => json = true,
                "check" => check = true,
                _ => return Err(args.unknown(&name)),
            },
            Arg::Operand(operand) => {
                if let Some(other) = path.replace(utf8(operand, "DIR or FILE")?) {
                    return Err(usage(format!("more than one to inspect: the first is '{other}'")));
                }
            }
        }
    }
    let path = path.ok_or_else(|| usage("a snapshot's directory, or a file, is needed"))?;
    let path = PathBuf::from(path);
    if !path.is_dir() {
        if check {
            return Err(usage("--check goes with a snapshot's directory only"));
        }
        return Ok(stream(&path, json));
    }
    Ok(snapshot(&path, check, json))
}

fn snapshot(dir: &Path, check: bool, json: bool) -> Outcome {
    let failed = |source| InspectError::Snapshot { dir: dir.to_owned(), source };
    let snapshot = Snapshot::open(dir).map_err(failed)?;
    if check {
        let mut buffer = vec![0; BLOCK_LEN];
        // There are as many blocks as their numbers, which have 32 bits, can name.
        for block in (0..=u32::MAX).take_while(|block| u64::from(*block) < snapshot.blocks()) {
            snapshot.read_block(block, &mut buffer).map_err(failed)?;
        }
    }
    let value = describe(&snapshot);
    if json { print_json(&value) } else { print(&text(&value)) }
}

fn describe(snapshot: &Snapshot) -> Value {
    let header = &snapshot.header;
    let plan = &header.plan;
    let sections = snapshot.sections.iter().map(|s| {
        json!({ "kind": s.kind, "instance": s.instance, "version": s.version, "bytes": s.body.len() })
    });
    let nets = plan.nets.iter().map(|net| {
        let mac = net.mac.map(|byte| format!("{byte:02x}")).join(":");
        json!({ "id": net.id, "tap": net.tap, "mac": mac })
    });
    let regions = snapshot.ram().regions.iter();
    let regions = regions.map(|r| json!({ "first_page": r.first_page, "pages": r.pages }));
    json!({
        "id": header.id.to_string(),
        "software": header.software,
        "created_unix_ms": header.created_unix_ms,
        "name": plan.name,
        "state": if snapshot.paused { "paused" } else { "running" },
        "arch": plan.cpu.arch,
        "vcpus": plan.cpu.vcpus,
        "cpu_model": plan.cpu.model,
        "cpuid_leaves": plan.cpu.cpuid.len(),
        "msrs": plan.cpu.msrs.len(),
        "tsc_khz": plan.cpu.tsc_khz,
        "ram_pages": snapshot.ram().pages(),
        "ram_regions": regions.collect::<Vec<_>>(),
        "memory_blocks": snapshot.used_blocks().count(),
        "disks": plan.disks,
        "nets": nets.collect::<Vec<_>>(),
        "sections": sections.collect::<Vec<_>>(),
        "config": serde_json::from_slice::<Value>(&plan.config).unwrap_or(Value::Null),
    })
}

fn text(value: &Value) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a string never fails.
        let _ = writeln!(out, "{name:<10}{value}");
    };
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    line("snapshot", vm::text(&value["id"]));
    line("made by", vm::text(&value["software"]));
    line("made at", utc(number(&value["created_unix_ms"])));
    line("name", vm::text(&value["name"]));
    line("state", vm::text(&value["state"]));
    line("vCPUs", format!("{} of {}", value["vcpus"], vm::text(&value["arch"])));
    line("CPU model", vm::text(&value["cpu_model"]));
    line("TSC", format!("{} kHz", value["tsc_khz"]));
    line("RAM", format_size(number(&value["ram_pages"]).saturating_mul(4096)));
    line("memory", format!("{} MiB of it hold something", value["memory_blocks"]));
    let each = |field: &str| value[field].as_array().cloned().unwrap_or_default();
    for disk in each("disks") {
        let (id, path) = (vm::text(&disk["id"]), vm::text(&disk["path"]));
        let read_only = if disk["read_only"] == true { ", read-only" } else { "" };
        line("disk", format!("{id}: {path}, {}{read_only}", format_size(number(&disk["bytes"]))));
    }
    for net in each("nets") {
        let (id, tap, mac) = (vm::text(&net["id"]), vm::text(&net["tap"]), vm::text(&net["mac"]));
        line("net", format!("{id}: {tap}, {mac}"));
    }
    for s in each("sections") {
        let (kind, instance) = (vm::text(&s["kind"]), &s["instance"]);
        let what = format!("{kind}/{instance} version {}, {} bytes", s["version"], s["bytes"]);
        line("section", what);
    }
    out
}

/// A time as ISO 8601 has it.
fn utc(unix_ms: u64) -> String {
    let (days, second) = (unix_ms / 86_400_000, unix_ms / 1000 % 86_400);
    // Years that begin in March, in eras of 400, from 0000-03-01: so the leap day comes last.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let march_month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * march_month + 2) / 5 + 1, (march_month + 2) % 12 + 1);
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

fn stream(path: &Path, json: bool) -> Outcome {
    let opened = File::open(path);
    let file = opened.map_err(|source| InspectError::Open { file: path.to_owned(), source })?;
    let (mut offset, mut shown) = (0, Ok(std::process::ExitCode::SUCCESS));
    let show = |item: &Item| {
        if json { print_json(&record(item)) } else { print(&record_text(item)) }
    };
    let result = inspect(&mut BufReader::new(file), |item| {
        offset = item.offset;
        if shown.is_ok() {
            shown = show(&item);
        }
    });
    shown?;
    let file = path.to_owned();
    result.map_err(|source| InspectError::Stream { file, offset, source })?;
    Ok(std::process::ExitCode::SUCCESS)
}

fn record(item: &Item) -> Value {
    json!({
        "offset": item.offset,
        "kind": item.kind,
        "name": item.name,
        "optional": item.optional,
        "bytes": item.len,
        "text": item.text,
    })
}

/// A record's head, and what it says beside it or, if that is long, under it.
fn record_text(item: &Item) -> String {
    let safe = |line: &str| line.chars().flat_map(escape).collect::<String>();
    let lines: Vec<_> = item.text.lines().map(safe).collect();
    let between = if lines.len() > 1 { "\n    " } else { " " };
    let text = lines.join("\n    ");
    format!("{:>10} {} ({} bytes){between}{text}\n", item.offset, item.name, item.len)
}

/// A stream's text can't move the user's cursor.
fn escape(c: char) -> impl Iterator<Item = char> {
    let plain = (!c.is_control()).then_some(c);
    let escaped = c.is_control().then(|| c.escape_default());
    plain.into_iter().chain(escaped.into_iter().flatten())
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn times_are_dates() {
        for (unix_ms, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400_000, "2000-02-29T00:00:00Z"),
            (951_868_799_999, "2000-02-29T23:59:59Z"),
            (951_868_800_000, "2000-03-01T00:00:00Z"),
            (1_767_225_599_000, "2025-12-31T23:59:59Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(unix_ms), text);
        }
        assert!(utc(u64::MAX).ends_with('Z'));
    }
}
