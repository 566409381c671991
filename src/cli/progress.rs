//! How a migration is shown: a bar on a terminal (see [`super::bar`]), a line a stage elsewhere, JSON for
//! programs; and the report at its end.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};

use serde_json::Value;

use super::bar::Bar;
use super::units::format_measured;

const PAGE_BYTES: u64 = 4096;
/// Of more vCPUs, only how many they are is told.
const VCPUS_TOLD_MAX: usize = 8;

/// Who looks.
pub enum Display {
    /// A program.
    Json,
    /// A person at a terminal.
    Bar(Bar),
    /// A log.
    Lines {
        /// The stage told last.
        stage: String,
    },
}

impl Display {
    /// For a program, or else for a person, at a terminal or not. `done` says what happens to the bytes here.
    #[must_use]
    pub fn new(json: bool, done: &'static str) -> Self {
        match (json, io::stderr().is_terminal()) {
            (true, _) => Self::Json,
            (false, true) => Self::Bar(Bar::new(done)),
            (false, false) => Self::Lines { stage: String::new() },
        }
    }

    /// Shows where a migration stands.
    pub fn show(&mut self, progress: &Value) {
        // Who can't be shown anything is told nothing: the migration goes on.
        let _ = match self {
            Self::Json => writeln!(io::stderr(), "{progress}"),
            Self::Bar(bar) => bar.show(progress),
            Self::Lines { stage } => {
                let now = progress["stage"].as_str().unwrap_or_default();
                if now == stage {
                    return;
                }
                now.clone_into(stage);
                match progress["message"].as_str() {
                    Some(message) => writeln!(io::stderr(), "vmm: {message}"),
                    None => writeln!(io::stderr(), "vmm: {now}"),
                }
            }
        };
    }

    /// Takes the bar away.
    pub fn clear(&mut self) {
        if let Self::Bar(bar) = self {
            bar.clear();
        }
    }
}

pub(super) fn number(value: &Value, field: &str) -> u64 {
    value[field].as_u64().unwrap_or(0)
}

pub(super) fn seconds(us: u64) -> String {
    format!("{}.{} s", us / 1_000_000, us / 100_000 % 10)
}

pub(super) fn milliseconds(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us / 100 % 10)
}

/// The report of a migration that happened, as text.
#[must_use]
pub fn report(r: &Value) -> String {
    let mut text = format!(
        "moved {} in {}, {} sent\n",
        r["name"].as_str().unwrap_or_default(),
        seconds(number(r, "total_us")),
        format_measured(number(r, "sent_bytes")),
    );
    text.push_str("round     pages      zero       bytes        time      dirtied\n");
    let none = Vec::new();
    let rounds = r["rounds"].as_array().unwrap_or(&none);
    for (i, round) in rounds.iter().enumerate() {
        let name = if i + 1 == rounds.len() { "stop".to_owned() } else { i.to_string() };
        let _ = writeln!(
            text,
            "{name:<5} {:>9} {:>9} {:>11} {:>11} {:>10}/s",
            number(round, "pages"),
            number(round, "zero_pages"),
            format_measured(number(round, "bytes")),
            milliseconds(number(round, "time_us")),
            format_measured(number(round, "dirty_pages_per_s").saturating_mul(PAGE_BYTES)),
        );
        text.push_str(&by_vcpu(round));
    }
    text.push_str(&downtime(&r["downtime"]));
    if let Some(stall) = r["guest_stall_us"].as_u64() {
        let _ =
            writeln!(text, "by the guest's own clock its vCPUs stood for {}", milliseconds(stall));
    }
    text.push_str(&forecast_beside(r));
    text.push_str(&warnings(r));
    text
}

/// A line with what was forecast, and what came. The guest's first sign is not forecast.
fn forecast_beside(r: &Value) -> String {
    let (f, downtime) = (&r["forecast"], &r["downtime"]);
    if !f.is_object() {
        return String::new();
    }
    let told = |bytes, time, downtime: &str| {
        format!("{} in {} with a downtime of {downtime}", format_measured(bytes), seconds(time))
    };
    let came = match (downtime.is_object(), number(downtime, "first_sign_us")) {
        (false, _) => "nobody knows what".to_owned(),
        (true, 0) => milliseconds(number(downtime, "total_us")),
        (true, sign) => {
            let us = number(downtime, "total_us").saturating_sub(sign);
            format!("{} to the vCPUs running", milliseconds(us))
        }
    };
    format!(
        "forecast: {}; it was {}\n",
        told(number(f, "bytes"), number(f, "total_us"), &milliseconds(number(f, "downtime_us"))),
        told(number(r, "sent_bytes"), number(r, "total_us"), &came),
    )
}

/// A line for each thing that the destination doesn't refuse the guest for, but that should be known.
fn warnings(r: &Value) -> String {
    let list = r["warnings"].as_array().map_or(&[][..], Vec::as_slice);
    // They are the peer's words, for a terminal: the crate made control characters spaces.
    list.iter().filter_map(Value::as_str).map(|line| format!("warning: {line}\n")).collect()
}

/// A line with the downtime and its parts, which as shown add up to it.
fn downtime(downtime: &Value) -> String {
    if !downtime.is_object() {
        return "downtime not known: the destination's answer was lost, and the guest's fate found out later\n"
            .to_owned();
    }
    let total = number(downtime, "total_us");
    let first_sign = downtime["first_sign_us"].as_u64();
    let names = ["stop", "dirty", "pages", "save", "ready", "restore", "commit", "activate"];
    let mut parts: Vec<_> =
        names.iter().map(|name| (*name, number(downtime, &format!("{name}_us")))).collect();
    let told = parts.iter().fold(first_sign.unwrap_or(0), |sum, part| sum.saturating_add(part.1));
    // Steps from one to the next: less than is shown goes with the last.
    match (total.saturating_sub(told), parts.last_mut()) {
        (between @ 0..100, Some((_, us))) => *us = us.saturating_add(between),
        (between, _) => parts.push(("between", between)),
    }
    parts.extend(first_sign.map(|us| ("first sign", us)));
    let mut text = format!("downtime {}:", milliseconds(total));
    let (mut until, mut comma) = (0_u64, " ");
    for (name, us) in parts {
        let from = until;
        until = until.saturating_add(us).min(total);
        // Rounded where it begins and ends, not by itself.
        let shown = (until / 100 - from / 100) * 100;
        let _ = write!(text, "{comma}{name} {}", milliseconds(shown));
        comma = ", ";
    }
    match number(downtime, "release_us") {
        0..1000 => {}
        release => {
            let _ = write!(text, "; the disks were released in {} of it", milliseconds(release));
        }
    }
    if let Some(silence) = downtime["silence_us"].as_u64() {
        let _ = write!(text, "; its outputs paused for {}", milliseconds(silence));
    }
    text.push('\n');
    text
}

/// A line on what each vCPU dirtied in a round and was throttled by, where there is something to tell apart.
fn by_vcpu(round: &Value) -> String {
    let list = |field: &str| round[field].as_array().cloned().unwrap_or_default();
    let (pages, throttle) = (list("dirty_by_vcpu"), list("throttle_percent"));
    if throttle.is_empty() && pages.len() < 2 {
        return String::new();
    }
    let throttled = |percent: &Value| match percent.as_u64() {
        Some(percent @ 1..) => format!(", throttled by {percent} %"),
        _ => String::new(),
    };
    if pages.is_empty() {
        return format!("      pages dirtied: not known by vCPU{}\n", throttled(&throttle[0]));
    }
    let mut parts: Vec<_> = (0..pages.len())
        .map(|i| {
            // The last value of a throttle goes for the rest.
            let percent = throttle.get(i).or(throttle.last()).map(throttled).unwrap_or_default();
            (i, pages[i].as_u64().unwrap_or(0), percent)
        })
        .filter(|(_, pages, percent)| *pages > 0 || !percent.is_empty())
        .map(|(i, pages, percent)| format!("{pages} by vCPU {i}{percent}"))
        .collect();
    let more = parts.len().saturating_sub(VCPUS_TOLD_MAX);
    parts.truncate(VCPUS_TOLD_MAX);
    if more > 0 {
        parts.push(format!("more by {more} others"));
    }
    if parts.is_empty() {
        String::new()
    } else {
        format!("      pages dirtied: {}\n", parts.join("; "))
    }
}

/// The forecast of a dry run, as text.
#[must_use]
pub fn forecast(r: &Value) -> String {
    let f = &r["forecast"];
    let verdict = match f["converges"].as_bool() {
        Some(true) => "it would converge",
        _ => "will not converge at this bandwidth within these limits",
    };
    format!(
        "{verdict}: about {} and {} in {} rounds, downtime {} (of it {} fixed); the guest dirties {}/s, {}/s \
         go over\n",
        seconds(number(f, "total_us")),
        format_measured(number(f, "bytes")),
        number(f, "rounds"),
        milliseconds(number(f, "downtime_us")),
        milliseconds(number(f, "fixed_us")),
        format_measured(number(f, "dirty_pages_per_s").saturating_mul(PAGE_BYTES)),
        format_measured(number(f, "send_bytes_per_s")),
    ) + &warnings(r)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The parts of the line, in tenths of a millisecond, and what they should add up to.
    fn sums(downtime: &Value) -> (Vec<u64>, u64) {
        let line = super::downtime(downtime);
        let tenths = |text: &str| -> u64 {
            let number = text.trim_end_matches(" ms").rsplit(' ').next().unwrap();
            number.replace('.', "").parse().unwrap()
        };
        let (parts, _) = line.trim_end().split_once(';').unwrap_or((line.trim_end(), ""));
        let (total, parts) = parts.split_once(": ").unwrap();
        (parts.split(", ").map(tenths).collect(), tenths(total))
    }

    #[test]
    fn the_parts_of_the_downtime_add_up() {
        let downtime = |total: u64, sign: Option<u64>| {
            json!({
                "stop_us": 3149, "dirty_us": 349, "pages_us": 1149, "save_us": 2049, "release_us": 5949,
                "ready_us": 6649, "restore_us": 2649, "commit_us": 1949, "activate_us": 2349,
                "first_sign_us": sign, "total_us": total,
            })
        };
        let all = 3149 + 349 + 1149 + 2049 + 6649 + 2649 + 1949 + 2349;
        for between in [0, 9, 1234] {
            for sign in [None, Some(15_049)] {
                let downtime = downtime(all + between + sign.unwrap_or(0), sign);
                let (parts, total) = sums(&downtime);
                assert_eq!(parts.iter().sum::<u64>(), total, "{downtime}");
                assert_eq!(
                    parts.len() - usize::from(sign.is_some()),
                    8 + usize::from(between > 99)
                );
            }
        }
        // A peer's numbers may be anything.
        for total in [0, 1, u64::MAX] {
            let odd = json!({ "total_us": total, "stop_us": u64::MAX, "restore_us": 7, "first_sign_us": 9 });
            let (parts, total) = sums(&odd);
            assert_eq!(parts.iter().sum::<u64>(), total);
        }
        let line = super::downtime(&downtime(all, None));
        assert!(
            line.starts_with("downtime 20.2 ms: stop 3.1 ms, dirty 0.3 ms, pages 1.2 ms, "),
            "{line}"
        );
        assert!(line.ends_with("; the disks were released in 5.9 ms of it\n"), "{line}");
    }

    #[test]
    fn a_downtime_that_nobody_measured_is_not_told() {
        let text = report(&json!({ "name": "web", "downtime": null, "rounds": [] }));
        assert!(text.contains("\ndowntime not known: ") && !text.contains("0.0 ms:"), "{text}");
    }

    #[test]
    fn what_was_forecast_stands_beside_what_came() {
        let report = |downtime: &Value| {
            forecast_beside(&json!({
                "forecast": { "bytes": 3 << 20, "total_us": 1_200_000, "downtime_us": 17_800 },
                "sent_bytes": 4 << 20, "total_us": 1_300_000, "downtime": downtime,
            }))
        };
        let expected = "forecast: 3.0 MiB in 1.2 s with a downtime of 17.8 ms; it was 4.0 MiB in 1.3 s with a downtime of ";
        for (downtime, told) in [
            (
                json!({ "total_us": 90_100, "first_sign_us": 70_000 }),
                "20.1 ms to the vCPUs running\n",
            ),
            (json!({ "total_us": 90_100, "first_sign_us": null }), "90.1 ms\n"),
            (Value::Null, "nobody knows what\n"),
        ] {
            assert_eq!(report(&downtime).strip_prefix(expected), Some(told));
        }
        assert_eq!(forecast_beside(&json!({ "forecast": null })), "");
    }

    #[test]
    fn warnings_are_told() {
        let r = json!({ "name": "web", "warnings": ["slow", "old"] });
        for text in [report(&r), forecast(&r)] {
            assert!(text.ends_with("\nwarning: slow\nwarning: old\n"), "{text}");
        }
        assert!(!report(&json!({ "warnings": [] })).contains("warning"));
    }

    #[test]
    fn who_dirtied_is_told_where_it_is_known() {
        let line = |pages: &[u64], throttle: &[u8]| {
            by_vcpu(&json!({ "dirty_by_vcpu": pages, "throttle_percent": throttle }))
        };
        for nothing in
            [line(&[], &[]), line(&[5], &[]), line(&[0, 0], &[0, 0]), by_vcpu(&json!({}))]
        {
            assert_eq!(nothing, "");
        }
        assert_eq!(line(&[5, 0, 6], &[]), "      pages dirtied: 5 by vCPU 0; 6 by vCPU 2\n");
        assert_eq!(
            line(&[5, 900, 0], &[0, 50, 0]),
            "      pages dirtied: 5 by vCPU 0; 900 by vCPU 1, throttled by 50 %\n"
        );
        assert_eq!(line(&[5], &[20]), "      pages dirtied: 5 by vCPU 0, throttled by 20 %\n");
        let unknown = "      pages dirtied: not known by vCPU, throttled by 50 %\n";
        assert_eq!(line(&[], &[50]), unknown);
        let many = line(&[1; 254], &[]);
        assert!(many.ends_with("; 1 by vCPU 7; more by 246 others\n"), "{many}");
    }
}
