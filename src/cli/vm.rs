//! `vmm info`, `pause`, `resume` and `stop`: one request to one VM.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use super::args::{Arg, Args, Stop, set_once, usage, utf8};
use super::units::{format_size, parse_duration_ms};
use super::{Error, Outcome, print, print_json};
use crate::api::client::{Client, ClientError};
use crate::api::socket;
use crate::config::{NAME_BYTES_MAX, check_name};
use crate::event::Request;
use crate::log;

/// The help of `vmm info`.
pub const INFO_HELP: &str = "\
usage: vmm info VM [--json]

Shows a VM: its state, process and configuration. VM is a name or a control socket's path.

  --json   as the VM's own JSON (sizes in bytes; see src/api/API.md, GET /vm)

example: vmm info web
";

/// The help of `vmm pause`.
pub const PAUSE_HELP: &str = "\
usage: vmm pause VM [--json]

Stops a VM's vCPUs, once its devices' I/O has ended; its memory stays. A VM that is paused stays so. Where storage takes
long, Ctrl-C or vmm resume takes the pause back, as do 30 s. VM is a name or a control socket's path.

  --json   print the VM's state as JSON, as 'vmm info --json' does

example: vmm pause web
";

/// The help of `vmm resume`.
pub const RESUME_HELP: &str = "\
usage: vmm resume VM [--json]

Lets a paused VM's vCPUs run again. A VM that runs stays so. VM is a name or a control socket's path.

  --json   print the VM's state as JSON, as 'vmm info --json' does

example: vmm resume web
";

/// The help of `vmm stop`.
pub const STOP_HELP: &str = "\
usage: vmm stop VM [--force] [--timeout TIME] [--json]

Presses a VM's power button and waits until it has powered off; when --timeout is over, ends it by force.
VM is a name or a control socket's path.

  --force          end the VM at once, as if its power were cut: the guest can't write back what it has cached
  --timeout TIME   how long the guest may take to power off: 10s, 2m, ... (default 30s)
  --json           print how it ended as a JSON object: ended, forced

example: vmm stop web --timeout 1m
";

/// The default of `vmm stop --timeout`, in milliseconds.
const STOP_TIMEOUT_MS: u64 = 30_000;
/// How long a VM may take to answer what it can answer at once.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a VM may take to write the console's last output and to let go of what it held after its guest has.
const EXIT_TIMEOUT: Duration = Duration::from_secs(20);

/// `vmm info`
///
/// # Errors
/// Wrong usage.
pub fn info(args: Args) -> Result<Outcome, Stop> {
    let options = parse(args, &["json"])?;
    Ok(options.ask(&Request::Info).and_then(|info| {
        if options.json { print_json(&info) } else { print(&describe(&options, &info)) }
    }))
}

/// `vmm pause`
///
/// # Errors
/// Wrong usage.
pub fn pause(args: Args) -> Result<Outcome, Stop> {
    change(args, &Request::Pause)
}

/// `vmm resume`
///
/// # Errors
/// Wrong usage.
pub fn resume(args: Args) -> Result<Outcome, Stop> {
    change(args, &Request::Resume)
}

fn change(args: Args, request: &Request) -> Result<Outcome, Stop> {
    let options = parse(args, &["json"])?;
    Ok(options
        .ask(request)
        .and_then(|info| if options.json { print_json(&info) } else { Ok(ExitCode::SUCCESS) }))
}

/// `vmm stop`
///
/// # Errors
/// Wrong usage.
pub fn stop(args: Args) -> Result<Outcome, Stop> {
    let options = parse(args, &["json", "force", "timeout"])?;
    Ok(stop_vm(&options))
}

fn stop_vm(options: &Options) -> Outcome {
    let mut forced = options.force;
    let mut result = Err(ClientError::TimedOut);
    if !forced {
        let timeout = Duration::from_millis(options.timeout_ms.unwrap_or(STOP_TIMEOUT_MS));
        result = options.end(&Request::Stop { force: false }, timeout);
        if matches!(result, Err(ClientError::TimedOut)) {
            log::print(&format!("{}: didn't power off in time: ending it by force", options.vm));
            forced = true;
        }
    }
    if forced {
        result = match options.end(&Request::Stop { force: true }, ANSWER_TIMEOUT) {
            // Only without --force: it ended between the two requests.
            Err(e) if is_absent(&e) && !options.force => Ok(Value::Null),
            other => other,
        };
    }
    let ended = result.map_err(|e| options.error(e))?;
    if options.json {
        return print_json(&json!({ "ended": ended, "forced": forced }));
    }
    Ok(ExitCode::SUCCESS)
}

fn is_absent(error: &ClientError) -> bool {
    matches!(error, ClientError::Dead { .. } | ClientError::NoSuchVm { .. })
}

/// What these commands take.
#[derive(Debug)]
struct Options {
    /// As the user named it.
    vm: String,
    json: bool,
    force: bool,
    timeout_ms: Option<u64>,
}

/// Parses the options of which `allowed` holds those of this command.
fn parse(mut args: Args, allowed: &[&str]) -> Result<Options, Stop> {
    let mut vm = None;
    let mut options = Options { vm: String::new(), json: false, force: false, timeout_ms: None };
    while let Some(arg) = args.next_arg()? {
        match arg {
            Arg::Option(name) if !allowed.contains(&name.as_str()) => {
                return Err(args.unknown(&name));
            }
            Arg::Option(name) if name == "json" => options.json = true,
            Arg::Option(name) if name == "force" => options.force = true,
            Arg::Option(name) => {
                let text = args.text(&name)?;
                let ms = parse_duration_ms(&text)
                    .map_err(|e| usage(format!("--{name} '{text}': {e}")))?;
                set_once(&name, &mut options.timeout_ms, ms)?;
            }
            Arg::Operand(operand) => {
                let operand = utf8(operand, "VM")?;
                if let Some(other) = vm.replace(operand) {
                    return Err(usage(format!("more than one VM: the first is '{other}'")));
                }
            }
        }
    }
    if options.force && options.timeout_ms.is_some() {
        return Err(usage("--force and --timeout exclude each other: --force doesn't wait"));
    }
    options.vm = vm.ok_or_else(|| usage("a VM is needed: its name or its socket's path"))?;
    if !options.vm.contains('/') {
        check_name("VM name", &options.vm, NAME_BYTES_MAX).map_err(|e| usage(e.to_string()))?;
    }
    Ok(options)
}

impl Options {
    fn connect(&self) -> Result<Client, Error> {
        let path: PathBuf = socket::resolve(&self.vm)?;
        Client::connect(&path).map_err(|e| self.error(e))
    }

    /// Sends a request that ends the VM, and waits until it has let go of its disks and socket.
    /// Gives back how the guest ended, null if the VM didn't come to tell.
    fn end(&self, request: &Request, timeout: Duration) -> Result<Value, ClientError> {
        let path = socket::resolve(&self.vm).map_err(|e| ClientError::Protocol(e.to_string()))?;
        let mut client = Client::connect(&path)?;
        let ended = match client.call(request, Some(timeout)) {
            Ok(mut answer) => answer.get_mut("ended").map_or(Value::Null, Value::take),
            // It ended while we asked: that is what we wanted.
            Err(ClientError::Gone) => Value::Null,
            Err(ClientError::Refused(e)) if e.status == 410 => Value::Null,
            Err(e) => return Err(e),
        };
        if client.wait_gone(EXIT_TIMEOUT) { Ok(ended) } else { Err(ClientError::StillThere) }
    }

    fn ask(&self, request: &Request) -> Result<Value, Error> {
        self.connect()?.call(request, Some(ANSWER_TIMEOUT)).map_err(|e| self.error(e))
    }

    fn error(&self, source: ClientError) -> Error {
        Error::Vm { vm: self.vm.clone(), source }
    }
}

/// What `vmm info` prints. A field that this VM's release doesn't tell is left out.
fn describe(options: &Options, info: &Value) -> String {
    let config = &info["config"];
    let boot = &config["boot"];
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        if value != "-" {
            out.push_str(&format!("{name:<10}{value}\n"));
        }
    };
    line("name", text(&config["name"]));
    line("state", text(&info["state"]));
    for errand in ["migration", "snapshot"] {
        line(errand, text(&info[errand]["stage"]));
    }
    line("message", text(&info["message"]));
    line("pid", text(&info["pid"]));
    let socket = socket::resolve(&options.vm).ok();
    line("socket", socket.map_or_else(|| "-".into(), |path| path.display().to_string()));
    line("vCPUs", text(&config["cpus"]));
    line("RAM", size(&config["ram_bytes"]));
    line("kernel", text(&boot["kernel"]));
    line("initrd", text(&boot["initrd"]));
    line("cmdline", text(&boot["cmdline"]));
    for disk in config["disks"].as_array().into_iter().flatten() {
        let readonly = if disk["readonly"] == true { ", read-only" } else { "" };
        line("disk", format!("{}: {}{readonly}", text(&disk["id"]), text(&disk["path"])));
    }
    for net in config["nets"].as_array().into_iter().flatten() {
        let (id, tap, mac) = (text(&net["id"]), text(&net["tap"]), text(&net["mac"]));
        line("net", format!("{id}: {tap}, {mac}"));
    }
    out
}

/// A field of an answer as text on one line; `-` if it isn't there. What a terminal would obey is escaped.
pub fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        // Quotation marks stand as they are: a kernel's command line has many.
        Value::String(text) => text.split_inclusive(['"', '\'']).map(unquoted).collect(),
        other => other.to_string(),
    }
}

/// Text that holds a quotation mark at its end only.
fn unquoted(text: &str) -> String {
    let rest = text.trim_end_matches(['"', '\'']);
    format!("{}{}", rest.escape_debug(), &text[rest.len()..])
}

/// A field that is a size in bytes.
pub fn size(value: &Value) -> String {
    value.as_u64().map_or_else(|| text(value), format_size)
}
