//! `vmm migrate`: its options, and the source's side as a client of the VM.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;

use super::args::{Arg, Args, Stop, usage, utf8};
use super::here::Here;
use super::keep::{self, KeepArgs};
use super::limits::{self, LimitOptions};
use super::listen::{self, ListenArgs};
use super::progress::Display;
use super::units::parse_bit_rate;
use super::{Error, Outcome, print, print_json, progress};
use crate::api::client::{Client, ClientError};
use crate::api::socket;
use crate::config::SerialTarget;
use crate::event::{DOWNTIME_LIMIT_MS_DEFAULT, MigrateRequest, Request, Resolution};
use crate::log;
use crate::migrate::uri::Uri;
use crate::signals;

/// The help of `vmm migrate`.
pub const HELP: &str = "\
usage: vmm migrate --listen URI [OPTION]...          on the destination host
       vmm migrate --connect URI VM [OPTION]...      on the source host
       vmm migrate --cancel VM
       vmm migrate --resolve resume|discard VM

Moves a running VM to another host: memory goes over while the guest runs, then it stands for a moment
and goes on at the destination, with its connections, time and data. URI is tcp:HOST:PORT ([ADDRESS] for
IPv6), unix:PATH, stdio (--listen only), or exec:COMMAND (--connect only), which carries the stream through
the command's standard input and output:

    vmm migrate --connect 'exec:ssh there vmm migrate --listen stdio' web

The command runs in the background of the VM's process (ssh needs a key: it can ask for no password); where
the guest stays, it is ended with all that it started. Where the guest has moved, it goes on to carry what
is said there on standard error until the VM there ends; it may be ended earlier, which does no harm.

with --connect:
  --downtime-limit TIME   stop the guest when the predicted downtime is at most this (default 50ms)
  --timeout TIME          how long pre-copy may take (default 10m)
  --on-timeout WHAT       then: abort (default; the guest stays), stop-and-copy (whatever the downtime),
                          throttle (slow the guest down until it converges; give up at twice TIME)
  --bandwidth RATE        send at most this, in bit/s: 100M, 1G
  --dry-run               reserve, check and forecast; move nothing
  --json                  progress and report as JSON, one object a line (fields: src/api/API.md)

with --listen:
  --name NAME             the VM's name here (default: as at the source)
  --control PATH          its control socket
  --serial TARGET         its console: stdio (default), null, file:PATH, unix:PATH; {name} in a path
                          stands for the VM's name. With --listen stdio, which has the stream there,
                          the default is a socket beside the control socket: NAME.tty
  --disk id=ID,path=PATH  where the disk ID is on this host, if not at the source's path; repeatable
  --net id=ID,tap=NAME    the TAP of interface ID on this host, if not the source's; repeatable
  --only-listed           take only a VM each of whose disks and TAPs is listed with --disk or --net: no
                          path or name of the source's is opened; none with --on-reboot reset
  --once                  take one VM and stay with it until it ends (default)
  --keep                  take VM after VM, each into a process of its own, until Ctrl-C, which they
                          survive; --serial is null then, or a path with {name}
  --json                  one JSON object a line on standard error as the migration goes

Ctrl-C at either end, or --cancel, cancels at any time before commitment: the guest runs on at the source.
--resolve is for a source that asked its destination to run the guest and never heard whether it does: resume
only if it doesn't and won't, discard if it does.

exit status: of --connect 0 when the guest has moved; of --listen that of 'vmm run' for the VM it took
example: vmm migrate --listen tcp:0.0.0.0:4444           (there)
         vmm migrate --connect tcp:10.0.0.2:4444 web     (here)
";

/// How long a VM may take to answer what it can answer at once.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a client that is interrupted twice waits for the answer to its first request.
const CANCEL_SENT_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Raw {
    listen: Option<String>,
    connect: Option<String>,
    cancel: bool,
    resolve: Option<String>,
    limits: LimitOptions,
    bandwidth: Option<String>,
    dry_run: bool,
    json: bool,
    once: bool,
    keep: bool,
    only_listed: bool,
    here: Here,
    vm: Option<String>,
    /// Options seen that belong to one side only.
    connect_only: Option<String>,
    listen_only: Option<String>,
}

/// `vmm migrate`
///
/// # Errors
/// Wrong usage.
pub fn command(mut args: Args) -> Result<Outcome, Stop> {
    let mut raw = Raw::default();
    while let Some(arg) = args.next_arg()? {
        match arg {
            Arg::Option(name) => raw.option(&mut args, &name)?,
            Arg::Operand(operand) => {
                let operand = utf8(operand, "VM")?;
                if let Some(other) = raw.vm.replace(operand) {
                    return Err(usage(format!("more than one VM: the first is '{other}'")));
                }
            }
        }
    }
    raw.run()
}

impl Raw {
    fn option(&mut self, args: &mut Args, name: &str) -> Result<(), Stop> {
        match name {
            "downtime-limit" | "timeout" | "on-timeout" | "bandwidth" | "dry-run" => {
                self.connect_only = Some(name.to_owned());
            }
            "name" | "control" | "serial" | "disk" | "net" | "once" | "keep" | "only-listed" => {
                self.listen_only = Some(name.to_owned());
            }
            _ => {}
        }
        match name {
            "listen" => args.text_once(name, &mut self.listen)?,
            "connect" => args.text_once(name, &mut self.connect)?,
            "cancel" => self.cancel = true,
            "resolve" => args.text_once(name, &mut self.resolve)?,
            "bandwidth" => args.text_once(name, &mut self.bandwidth)?,
            "dry-run" => self.dry_run = true,
            "json" => self.json = true,
            "once" => self.once = true,
            "keep" => self.keep = true,
            "only-listed" => self.only_listed = true,
            _ if self.limits.option(args, name)? || self.here.option(args, name)? => {}
            _ => return Err(args.unknown(name)),
        }
        Ok(())
    }

    fn run(self) -> Result<Outcome, Stop> {
        let ways = [self.listen.is_some(), self.connect.is_some(), self.cancel];
        let ways = ways.into_iter().chain([self.resolve.is_some()]).filter(|w| *w).count();
        if ways != 1 {
            return Err(usage(
                "exactly one of --listen, --connect, --cancel and --resolve is needed",
            ));
        }
        let (other, side) = match &self.listen {
            Some(_) => (&self.connect_only, "--connect"),
            None => (&self.listen_only, "--listen"),
        };
        if let Some(option) = other {
            return Err(usage(format!("--{option} goes with {side} only")));
        }
        if let Some(uri) = &self.listen {
            let uri = parse_uri("--listen", uri)?;
            return self.listen(uri);
        }
        if self.connect.is_none() {
            // Who adds --dry-run must not be obeyed in earnest.
            let stray = self.connect_only.as_deref().or(self.json.then_some("json"));
            if let Some(option) = stray {
                return Err(usage(format!("--{option} goes with neither --cancel nor --resolve")));
            }
        }
        let vm = self.vm.clone().ok_or_else(|| usage("a VM is needed: its name or socket"))?;
        if let Some(text) = &self.connect {
            let uri = parse_uri("--connect", text)?;
            let request = Request::Migrate(self.request(uri)?);
            request.validate().map_err(|e| usage(in_options(&e.message)))?;
            return Ok(migrate(&vm, &request, self.json, self.dry_run));
        }
        let request = match self.resolve.as_deref() {
            None => Request::CancelMigration,
            Some("resume") => Request::Resolve(Resolution::Resume),
            Some("discard") => Request::Resolve(Resolution::Discard),
            Some(other) => {
                return Err(usage(format!("--resolve '{other}': it takes resume or discard")));
            }
        };
        Ok(ask(&vm, &request).map(|_| ExitCode::SUCCESS))
    }

    fn request(&self, uri: Uri) -> Result<MigrateRequest, Stop> {
        let limits = self.limits.read(DOWNTIME_LIMIT_MS_DEFAULT)?;
        let bandwidth_bits_per_s = match &self.bandwidth {
            None => None,
            Some(text) => Some(
                parse_bit_rate(text).map_err(|e| usage(format!("--bandwidth '{text}': {e}")))?,
            ),
        };
        Ok(MigrateRequest {
            uri: absolute_uri(uri)?,
            downtime_limit_ms: limits.downtime_limit_ms,
            timeout_ms: limits.timeout_ms,
            on_timeout: limits.on_timeout,
            bandwidth_bits_per_s,
            dry_run: self.dry_run,
        })
    }

    fn listen(self, uri: Uri) -> Result<Outcome, Stop> {
        if let Some(vm) = &self.vm {
            return Err(usage(format!("unexpected '{vm}': --listen takes options only")));
        }
        if !self.keep {
            let mut overrides = self.here.overrides()?;
            overrides.stdio_taken = uri == Uri::Stdio;
            overrides.only_listed = self.only_listed;
            if overrides.stdio_taken && overrides.serial == Some(SerialTarget::Stdio) {
                return Err(usage(
                    "--serial stdio: standard input and output carry the stream with --listen stdio: \
                     take null, file: or unix:",
                ));
            }
            return Ok(listen::run(ListenArgs { uri, overrides, json: self.json }));
        }
        if self.once {
            return Err(usage("--once and --keep exclude each other"));
        }
        if uri == Uri::Stdio {
            return Err(usage("--keep: stdio is a single connection: listen on tcp: or unix:"));
        }
        let mut options = self.here.for_each_guest()?;
        let flags = [("--json", self.json), ("--only-listed", self.only_listed)];
        options
            .extend(flags.iter().filter(|(_, given)| *given).map(|(flag, _)| (*flag).to_owned()));
        Ok(keep::run(&KeepArgs { uri, options }))
    }
}

/// What is wrong with a field of the request, as the options have it.
fn in_options(message: &str) -> String {
    match message.split_once(": ") {
        Some(("uri", why)) => format!("--connect: {why}"),
        Some(("bandwidth_bits_per_s", _)) => "--bandwidth: it takes at least 1M".to_owned(),
        _ => limits::in_options(message).unwrap_or(message).to_owned(),
    }
}

fn parse_uri(option: &str, text: &str) -> Result<Uri, Stop> {
    Uri::from_str(text).map_err(|e| usage(format!("{option} '{text}': {e}")))
}

/// The VM's working directory isn't ours.
fn absolute_uri(uri: Uri) -> Result<Uri, Stop> {
    Ok(match uri {
        Uri::Unix(path) => Uri::Unix(absolute_path(path)?),
        other => other,
    })
}

fn absolute_path(path: PathBuf) -> Result<PathBuf, Stop> {
    std::path::absolute(&path).map_err(|e| usage(format!("{}: {e}", path.display())))
}

pub(super) fn error(vm: &str, source: ClientError) -> Error {
    Error::Vm { vm: vm.to_owned(), source }
}

fn ask(vm: &str, request: &Request) -> Result<Value, Error> {
    let mut client = Client::connect(&socket::resolve(vm)?).map_err(|e| error(vm, e))?;
    client.call(request, Some(ANSWER_TIMEOUT)).map_err(|e| error(vm, e))
}

/// Asks the VM to move, shows how it goes, and cancels it on Ctrl-C.
fn migrate(vm: &str, request: &Request, json: bool, dry_run: bool) -> Outcome {
    cancel_on_signal(vm, Request::CancelMigration).map_err(super::run::RunError::Signals)?;
    let mut client = Client::connect(&socket::resolve(vm)?).map_err(|e| error(vm, e))?;
    let mut display = Display::new(json, "sent");
    let result = client.call_with_progress(request, None, |value| display.show(&value));
    display.clear();
    let report = result.map_err(|e| error(vm, e))?;
    if json {
        return print_json(&report);
    }
    print(&if dry_run { progress::forecast(&report) } else { progress::report(&report) })
}

/// Turns the first signal that asks this process to end into a request that cancels; a second one ends
/// it, whether that was heard or not.
pub(super) fn cancel_on_signal(vm: &str, cancel: Request) -> std::io::Result<()> {
    let (events, signals) = mpsc::channel();
    signals::block()?.send_to(events)?;
    let vm = vm.to_owned();
    std::thread::Builder::new().name("signalled".to_owned()).spawn(move || {
        let _ = signals.recv();
        let there = vm.clone();
        // Too late, or gone: the end tells.
        let (asked, answered) = mpsc::channel();
        let request = move || {
            let _ = ask(&there, &cancel);
            drop(asked);
        };
        let spawned = std::thread::Builder::new().name("cancel".to_owned()).spawn(request);
        if spawned.is_err() || signals.recv().is_ok() {
            // The request is to be on its way.
            let _: Result<(), _> = answered.recv_timeout(CANCEL_SENT_TIMEOUT);
            if std::io::stderr().is_terminal() {
                eprint!("{}", super::bar::CLEAR);
            }
            log::print(&format!("{vm}: interrupted before the end was known: vmm info {vm}"));
            std::process::exit(i32::from(super::EXIT_FAILED));
        }
    })?;
    Ok(())
}
