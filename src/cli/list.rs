//! `vmm list`: the VMs whose control sockets are in this user's directory.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::args::{Arg, Args, Stop, usage};
use super::{Outcome, print, print_json, vm};
use crate::api::client::{Client, ClientError};
use crate::api::socket;
use crate::event::Request;

/// The command's help.
pub const HELP: &str = "\
usage: vmm list [--json]

Shows the VMs whose control sockets are in $XDG_RUNTIME_DIR/vmm (root: /run/vmm). A VM with a --control of
its own is not among them. States: running, paused, arriving (a migration brings it), migrating, in-doubt,
snapshotting, pausing and stopping (its storage takes long), dead (its process was killed, the socket is left until a
VM of that name starts, or any VM if it was vm-PID), busy (no answer within a second), error.

  --json   as a JSON array of objects: name, socket, state; for a VM that answers also pid and (once it is here) config,
           for one in state error also error

example: vmm list
";

/// How long a VM may take to answer.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Parses and runs.
///
/// # Errors
/// Wrong usage.
pub fn command(mut args: Args) -> Result<Outcome, Stop> {
    let mut json = false;
    while let Some(arg) = args.next_arg()? {
        match arg {
            Arg::Option(name) if name == "json" => json = true,
            Arg::Option(name) => return Err(args.unknown(&name)),
            Arg::Operand(operand) => {
                let operand = operand.to_string_lossy();
                return Err(usage(format!("unexpected '{operand}': list takes no VM")));
            }
        }
    }
    Ok(list(json))
}

fn list(json: bool) -> Outcome {
    let vms: Vec<Value> = socket::list(&socket::directory()?)?
        .into_iter()
        .filter_map(|(name, path)| look(&name, &path))
        .collect();
    if json { print_json(&Value::Array(vms)) } else { print(&table(&vms)) }
}

/// What is known of one VM; nothing if it ended just now.
fn look(name: &str, path: &Path) -> Option<Value> {
    let asked = Client::connect(path).and_then(|mut vm| vm.call(&Request::Info, Some(TIMEOUT)));
    let mut info = match asked {
        Ok(Value::Object(info)) => Value::Object(info),
        Err(ClientError::NoSuchVm { .. } | ClientError::Gone) => return None,
        Err(ClientError::Dead { .. }) => json!({ "state": "dead" }),
        Err(ClientError::TimedOut) => json!({ "state": "busy" }),
        Err(ClientError::Connect { source, .. }) => {
            json!({ "state": "error", "error": source.to_string() })
        }
        Err(e) => json!({ "state": "error", "error": e.to_string() }),
        Ok(_) => json!({ "state": "error", "error": "its answer is not a JSON object" }),
    };
    info["name"] = json!(name);
    info["socket"] = json!(path);
    Some(info)
}

fn table(vms: &[Value]) -> String {
    let mut rows = vec![["NAME", "STATE", "PID", "CPUS", "RAM"].map(str::to_owned)];
    for info in vms {
        let config = &info["config"];
        rows.push([
            vm::text(&info["name"]),
            vm::text(&info["state"]),
            vm::text(&info["pid"]),
            vm::text(&config["cpus"]),
            vm::size(&config["ram_bytes"]),
        ]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths = [0, 1, 2, 3, 4].map(width);
    let mut out = String::new();
    for row in &rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_aligned_and_takes_any_answer() {
        let vms = [
            json!({ "name": "a-long-name", "state": "running", "pid": 7,
                    "config": { "cpus": 2, "ram_bytes": 1 << 29 } }),
            json!({ "name": "b", "state": "dead" }),
            json!({ "name": "c", "state": ["odd"], "config": 5 }),
        ];
        assert_eq!(
            table(&vms),
            "NAME         STATE    PID  CPUS  RAM\n\
             a-long-name  running  7    2     512 MiB\n\
             b            dead     -    -     -\n\
             c            [\"odd\"]  -    -     -\n"
        );
    }
}
