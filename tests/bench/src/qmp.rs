//! QEMU's monitor protocol, as much of it as a migration takes.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use crate::Result;
use crate::process::{WAIT_MAX, until};

/// A connection to a QEMU.
pub struct Qmp {
    lines: BufReader<UnixStream>,
    /// Events that came while an answer was awaited.
    events: Vec<Value>,
}

impl Qmp {
    /// Connects as soon as the socket is there.
    pub fn connect(path: &str) -> Result<Self> {
        until("opens its monitor", || Path::new(path).exists())?;
        let mut stream = None;
        until("answers at its monitor", || {
            stream = UnixStream::connect(path).ok();
            stream.is_some()
        })?;
        let stream = stream.expect("connected");
        stream.set_read_timeout(Some(WAIT_MAX))?;
        let mut qmp = Self { lines: BufReader::new(stream), events: Vec::new() };
        qmp.line()?;
        qmp.call("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.lines.read_line(&mut line)? == 0 {
            return Err("QEMU closed its monitor".into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Runs a command.
    #[allow(clippy::needless_pass_by_value, reason = "it is made for the call")]
    pub fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        self.lines.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut line = self.line()?;
            if line.get("event").is_some() {
                self.events.push(line);
            } else if line.get("error").is_some() {
                return Err(format!("QEMU: {command}: {line}").into());
            } else {
                return Ok(line["return"].take());
            }
        }
    }

    /// Turns capabilities of migration on.
    pub fn enable(&mut self, capabilities: &[&str]) -> Result<()> {
        let list: Vec<Value> =
            capabilities.iter().map(|name| json!({"capability": name, "state": true})).collect();
        self.call("migrate-set-capabilities", json!({"capabilities": list})).map(drop)
    }

    /// Waits until a migration has come to its end.
    pub fn until_migrated(&mut self) -> Result<()> {
        loop {
            let event = if self.events.is_empty() { self.line()? } else { self.events.remove(0) };
            if event["event"] == "MIGRATION" {
                match event["data"]["status"].as_str() {
                    Some("completed") => return Ok(()),
                    Some(status @ ("failed" | "cancelled")) => {
                        return Err(format!("QEMU: the migration {status}").into());
                    }
                    _ => {}
                }
            }
        }
    }
}
