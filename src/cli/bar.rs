//! The bar that a person at a terminal sees while a migration or a snapshot goes on: one line, redrawn.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::time::{Duration, Instant};

use rustix::termios::tcgetwinsize;
use serde_json::Value;

use super::progress::{milliseconds, number, seconds};
use super::units::format_measured;
use crate::log;

/// Width of the bar, in characters.
const BAR_WIDTH: u64 = 20;
/// Width of a terminal that doesn't say its own.
const COLUMNS_DEFAULT: usize = 80;
const PAGE_BYTES: u64 = 4096;
/// Columns that are left free, for the `^C` that the terminal shows: a line that wraps could not be redrawn.
const COLUMNS_FREE: usize = 3;
/// To the start of the line, and clears it.
pub(super) const CLEAR: &str = "\r\x1b[K";
/// The least time between two drawings within a stage.
const REDRAW_PERIOD: Duration = Duration::from_millis(100);
/// The rate shown is that of about this time, in microseconds.
const RATE_SPAN_US: u64 = 2_000_000;

/// The bar's line, and what it has seen.
#[derive(Debug)]
pub struct Bar {
    /// What happens to the bytes here: `sent`, `received`, `written`.
    done: &'static str,
    /// Something stands on the line now.
    drawn: bool,
    /// Stage and time of the last drawing.
    last: Option<(String, Instant)>,
    /// Time since the start, in microseconds, and bytes: of the last [`RATE_SPAN_US`].
    seen: VecDeque<(u64, u64)>,
    /// The most pages that were ever left: all that the guest uses.
    pages: u64,
}

impl Bar {
    /// Nothing is drawn yet.
    #[must_use]
    pub fn new(done: &'static str) -> Self {
        Self { done, drawn: false, last: None, seen: VecDeque::new(), pages: 0 }
    }

    /// Draws where it stands, unless it has just been drawn. A message gets lines of its own, in full.
    pub fn show(&mut self, progress: &Value) -> io::Result<()> {
        if let Some(message) = progress["message"].as_str() {
            self.clear();
            log::print(message);
            return Ok(());
        }
        let columns = columns();
        let text = self.line(progress, columns);
        let stage = progress["stage"].as_str().unwrap_or_default();
        let now = Instant::now();
        if let Some((last, at)) = &self.last
            && last == stage
            && now < *at + REDRAW_PERIOD
        {
            return Ok(());
        }
        self.last = Some((stage.to_owned(), now));
        self.drawn = true;
        let mut out = io::stderr().lock();
        write!(out, "{CLEAR}{}", cut(&text, columns))?;
        out.flush()
    }

    /// Takes the line away.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.drawn) {
            let mut out = io::stderr().lock();
            let _ = write!(out, "{CLEAR}").and_then(|()| out.flush());
        }
    }

    /// All that is known; where the terminal is too narrow for that, in few words, the least important last, and with
    /// as much of a bar as there is room for.
    fn line(&mut self, p: &Value, columns: usize) -> String {
        let rate = self.rate(number(p, "elapsed_us"), number(p, "bytes"));
        let left = number(p, "pages_left");
        self.pages = self.pages.max(left);
        let stage = p["stage"].as_str().unwrap_or_default();
        let (mut text, mut short) = (self.bar(left, BAR_WIDTH) + stage, vec![stage.to_owned()]);
        if stage == "pre-copy" {
            // Writing to a string never fails.
            let _ = write!(text, " round {}", number(p, "round"));
            short = vec![format!("{stage} {}", number(p, "round"))];
        }
        let mut last = Vec::new();
        if !matches!(stage, "pre-migration" | "reservation") {
            let bytes = format_measured(number(p, "bytes"));
            let _ = write!(text, " · {bytes} {} · {}/s", self.done, format_measured(rate));
            last = vec![format!("{}/s", format_measured(rate)), bytes];
            let us = left.saturating_mul(PAGE_BYTES).saturating_mul(1_000_000).checked_div(rate);
            // What is made durable at the end takes what it takes.
            if let (Some(us), true) = (us, self.pages > 0 && stage != "commitment") {
                let _ = write!(text, " · {} left", seconds(us));
                short.push(format!("{} left", seconds(us)));
            }
        }
        if number(p, "round") > 0 && number(p, "expected_downtime_us") > 0 {
            let dirty = number(p, "dirty_pages_per_s").saturating_mul(PAGE_BYTES);
            let us = number(p, "expected_downtime_us");
            let dirty = format!("dirties {}/s", format_measured(dirty));
            let _ = write!(text, " · downtime {} · {dirty}", milliseconds(us));
            let downtime = if us < 1_000_000 { milliseconds(us) } else { seconds(us) };
            short.extend([format!("stop {downtime}"), dirty.replace("dirties", "dirty")]);
        }
        if number(p, "throttle_percent") > 0 {
            let _ = write!(text, " · throttled {} %", number(p, "throttle_percent"));
            short.push(format!("throttled {} %", number(p, "throttle_percent")));
        }
        let room = columns.saturating_sub(COLUMNS_FREE);
        if text.chars().count() <= room {
            return text;
        }
        short.extend(last);
        // What doesn't fit is left out, not cut.
        while short.len() > 1 && short.join(", ").len() > room {
            short.pop();
        }
        let short = short.join(", ");
        let bars = [BAR_WIDTH, BAR_WIDTH / 2].map(|width| self.bar(left, width));
        let bar = bars.into_iter().find(|bar| bar.len() + short.len() <= room);
        bar.unwrap_or_default() + &short
    }

    /// The bar itself. The destination doesn't know how much is left.
    fn bar(&self, left: u64, width: u64) -> String {
        match width.saturating_mul(self.pages - left).checked_div(self.pages) {
            None => String::new(),
            Some(done) => {
                let cells = (0..width).map(|i| if i < done { '#' } else { '.' });
                format!("[{}] ", cells.collect::<String>())
            }
        }
    }

    /// Bytes per second over the last moments.
    fn rate(&mut self, elapsed_us: u64, bytes: u64) -> u64 {
        self.seen.push_back((elapsed_us, bytes));
        while self.seen.len() > 2 && self.seen[1].0.saturating_add(RATE_SPAN_US) < elapsed_us {
            self.seen.pop_front();
        }
        let (since_us, before) = self.seen[0];
        let bytes = bytes.saturating_sub(before).saturating_mul(1_000_000);
        bytes.checked_div(elapsed_us.saturating_sub(since_us)).unwrap_or(0)
    }
}

/// A line that doesn't wrap.
fn cut(text: &str, columns: usize) -> String {
    let room = columns.saturating_sub(COLUMNS_FREE);
    if text.chars().count() <= room {
        return text.to_owned();
    }
    text.chars().take(room.saturating_sub(1)).chain(['…']).collect()
}

fn columns() -> usize {
    match tcgetwinsize(io::stderr()) {
        Ok(size) if size.ws_col > 0 => usize::from(size.ws_col),
        _ => COLUMNS_DEFAULT,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_round_fills_the_bar_and_later_ones_say_what_is_measured() {
        let mut bar = Bar::new("sent");
        let at = |us: u64, left: u64, round: u32| {
            json!({ "stage": "pre-copy", "round": round, "elapsed_us": us, "pages_left": left,
                    "bytes": us, "dirty_pages_per_s": 256, "expected_downtime_us": 1500 })
        };
        assert_eq!(
            bar.line(&at(0, 512, 0), 200),
            "[....................] pre-copy round 0 · 0 B sent · 0 B/s"
        );
        assert_eq!(
            bar.line(&at(1 << 20, 256, 0), 200),
            "[##########..........] pre-copy round 0 · 1.0 MiB sent · 976.5 KiB/s · 1.0 s left"
        );
        assert_eq!(
            bar.line(&at(2 << 20, 0, 1), 200),
            "[####################] pre-copy round 1 · 2.0 MiB sent · 976.5 KiB/s · 0.0 s left \
             · downtime 1.5 ms · dirties 1.0 MiB/s"
        );
    }

    #[test]
    fn eighty_columns_show_what_matters() {
        let mut bar = Bar::new("sent");
        let at = |us: u64| {
            json!({ "stage": "pre-copy", "round": 12, "elapsed_us": us, "pages_left": 9000,
                    "bytes": 30 * us, "dirty_pages_per_s": 90_000, "expected_downtime_us": 6_718_234 })
        };
        bar.line(&at(0), 80);
        let line = bar.line(&at(1_000_000), 80);
        assert_eq!(
            line,
            "pre-copy 12, 1.2 s left, stop 6.7 s, dirty 351.5 MiB/s, 28.6 MiB/s, 28.6 MiB"
        );
        let narrow = |bar: &mut Bar, columns| bar.line(&at(1_000_000), columns);
        assert_eq!(narrow(&mut bar, 40), "pre-copy 12, 1.2 s left, stop 6.7 s");
        assert_eq!(narrow(&mut bar, 37), "pre-copy 12, 1.2 s left");
        assert_eq!(narrow(&mut bar, 51), "[..........] pre-copy 12, 1.2 s left, stop 6.7 s");
        assert_eq!(narrow(&mut bar, 5), "pre-copy 12");
    }

    #[test]
    fn any_number_has_its_line() {
        for n in [1, u64::MAX / 2, u64::MAX] {
            let mut bar = Bar::new("sent");
            for elapsed in [0, n] {
                let progress = json!({ "stage": "pre-copy", "round": n, "elapsed_us": elapsed,
                    "pages_left": n, "bytes": elapsed, "dirty_pages_per_s": n,
                    "expected_downtime_us": n, "throttle_percent": n });
                assert!(bar.line(&progress, 300).contains("[....................]"));
                bar.line(&progress, 80);
            }
        }
    }

    #[test]
    fn before_any_page_only_the_stage_is_told() {
        let mut bar = Bar::new("received");
        let progress = json!({ "stage": "reservation", "bytes": 1 << 24, "elapsed_us": 5 });
        assert_eq!(bar.line(&progress, 80), "reservation");
    }

    #[test]
    fn a_line_never_reaches_the_last_columns() {
        assert_eq!(cut("abc·d", 8), "abc·d");
        assert_eq!(cut("abc·d", 7), "abc…");
        assert_eq!(cut("abc", 1), "…");
    }
}
