//! Where `tracing`'s events go: one line each to standard error, `vmm: ...`. Warnings and errors
//! only, or down to the level that `VMM_LOG` names. A subscriber of our own, since the
//! usual one is as big as the rest of the VMM.

use std::fmt;
use std::io::{self, Write as _};

use rustix::termios::{OutputModes, isatty, tcgetattr};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// The environment variable that names the level.
pub const VARIABLE: &str = "VMM_LOG";

/// Starts logging, once for the process.
pub fn start() {
    let wanted = std::env::var_os(VARIABLE).unwrap_or_default();
    let level = match wanted.to_str() {
        Some("") => Some(Level::WARN),
        Some(text) => text.parse().ok(),
        None => None,
    };
    let subscriber = Log { level: level.unwrap_or(Level::WARN) };
    if tracing::subscriber::set_global_default(subscriber).is_ok() && level.is_none() {
        tracing::warn!("{VARIABLE}: unknown level: it takes error, warn, info, debug or trace");
    }
}

struct Log {
    level: Level,
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level.into())
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let level = match *event.metadata().level() {
            Level::ERROR | Level::WARN => "",
            Level::INFO => "info: ",
            Level::DEBUG => "debug: ",
            Level::TRACE => "trace: ",
        };
        print(&format!("{level}{}{}", line.message, line.fields));
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message.push_str(&format!("{value:?}")),
            name => self.fields.push_str(&format!(" {name}={value:?}")),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

/// Writes `vmm: TEXT` to standard error as one line, whatever the text holds: text from a guest or a peer
/// can't move the user's cursor. Where the serial console has made the terminal raw, the line ends
/// with a carriage return too.
pub fn print(text: &str) {
    let mut line = String::from("vmm: ");
    for c in text.chars() {
        if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line.push_str(if terminal_is_raw() { "\r\n" } else { "\n" });
    // Where there is no standard error, there is nobody to tell.
    drop(io::stderr().write_all(line.as_bytes()));
}

fn terminal_is_raw() -> bool {
    let stderr = io::stderr();
    isatty(&stderr)
        && tcgetattr(&stderr).is_ok_and(|modes| !modes.output_modes.contains(OutputModes::OPOST))
}
