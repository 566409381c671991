//! `vmm snapshot`, a client of the VM, and `vmm restore`, which stays with the VM as `vmm run` does.

use std::path::{Path, PathBuf};
use std::sync::mpsc;

use super::args::{Arg, Args, Stop, absolute, usage, utf8};
use super::here::Here;
use super::limits::{LimitOptions, in_options};
use super::listen::live;
use super::migrate::{cancel_on_signal, error};
use super::progress::{Display, milliseconds};
use super::run::RunError;
use super::units::format_measured;
use super::{Outcome, print, print_json};
use crate::api::client::Client;
use crate::api::socket;
use crate::downtime::Downtime;
use crate::event::{Event, Request, SNAPSHOT_DOWNTIME_LIMIT_MS_DEFAULT, SnapshotRequest};
use crate::migrate::arriving::{LocalHost, Overrides};
use crate::migrate::restoring::{self, Load};
use crate::signals;

/// The help of `vmm snapshot`.
pub const SNAPSHOT_HELP: &str = "\
usage: vmm snapshot VM DIR [--live [OPTION]...] [--json]

Writes a VM's memory and state to DIR, which must not exist, and lets it go on as it was. DIR appears whole
and on stable storage, or not at all: what a crash leaves is DIR.partial-ID, which the next snapshot to DIR
removes. VM is a name or a control socket's path.

Disks are not in it: they are files of yours. To copy them at the same moment, pause the VM first, and
resume it when both are done. A restored guest has to find its disks as they were.

  --live   let the guest run while most of its memory is written (default: it stands meanwhile), in rounds
           like those of 'vmm migrate', until it need stand only for a moment for what it has changed since
  --json   progress and result as JSON, one object a line

with --live:
  --downtime-limit TIME   stop the guest when the predicted downtime is at most this (default 300ms)
  --timeout TIME          how long the rounds may take (default 10m)
  --on-timeout WHAT       then: abort (default; no snapshot is written), stop-and-copy (whatever the
                          downtime), throttle (slow the guest down until the limit is met; give up at
                          twice TIME)

The guest runs on while what was written is made durable (commitment). Ctrl-C cancels at any time: nothing
is left of the snapshot, and the guest runs on.

example: vmm snapshot web /var/lib/vmm/web.snap --live
";

/// The help of `vmm restore`.
pub const RESTORE_HELP: &str = "\
usage: vmm restore DIR [OPTION]...

Lets the guest of a snapshot go on, as 'vmm run' does with one that boots, and stays with it until it ends.
A guest that was paused comes back paused. DIR is not changed and can be restored any number of times.

  --lazy                  run at once, and read memory as the guest touches it (default); DIR has to stay as
                          it is while the VM lives
  --eager                 read all memory first, and compare its checksums
  --clock real|saved      real (default): the time since the snapshot passes for the guest at once, so that
                          its clock is right and timers that ran out fire; saved: its clocks go on where
                          they were, and it is for the guest to find out what time it is
  --name NAME             the VM's name (default: as it was)
  --control PATH          its control socket
  --serial TARGET         its console: stdio (default), null, file:PATH, unix:PATH
  --disk id=ID,path=PATH  where the disk ID is now, if not where it was; repeatable
  --net id=ID,tap=NAME    the TAP of interface ID, if not the one it had; repeatable

exit status: that of 'vmm run'
example: vmm restore /var/lib/vmm/web.snap --name web2
";

/// `vmm snapshot`
///
/// # Errors
/// Wrong usage.
pub fn snapshot(mut args: Args) -> Result<Outcome, Stop> {
    let (mut live, mut json, mut operands) = (false, false, Vec::new());
    let (mut limits, mut live_only) = (LimitOptions::default(), None);
    while let Some(arg) = args.next_arg()? {
        match arg {
            Arg::Option(name) => match name.as_str() {
                "live" => live = true,
                "json" => json = true,
                _ if limits.option(&mut args, &name)? => live_only = Some(name),
                _ => return Err(args.unknown(&name)),
            },
            Arg::Operand(operand) => operands.push(utf8(operand, "VM or DIR")?),
        }
    }
    let [vm, dir] = <[String; 2]>::try_from(operands)
        .map_err(|_| usage("a VM (its name or socket) and a directory to make are needed"))?;
    if let Some(option) = live_only.filter(|_| !live) {
        return Err(usage(format!("--{option} goes with --live only")));
    }
    let limits = limits.read(SNAPSHOT_DOWNTIME_LIMIT_MS_DEFAULT)?;
    let request = Request::Snapshot(SnapshotRequest {
        dir: absolute("DIR", &dir)?,
        live,
        downtime_limit_ms: limits.downtime_limit_ms,
        timeout_ms: limits.timeout_ms,
        on_timeout: limits.on_timeout,
    });
    request.validate().map_err(|e| usage(in_options(&e.message).unwrap_or(&e.message)))?;
    Ok(write(&vm, &request, json))
}

fn write(vm: &str, request: &Request, json: bool) -> Outcome {
    cancel_on_signal(vm, Request::CancelSnapshot).map_err(RunError::Signals)?;
    let mut client = Client::connect(&socket::resolve(vm)?).map_err(|e| error(vm, e))?;
    let mut display = Display::new(json, "written");
    let result = client.call_with_progress(request, None, |value| display.show(&value));
    display.clear();
    let written = result.map_err(|e| error(vm, e))?;
    if json {
        return print_json(&written);
    }
    let bytes = format_measured(written["memory_bytes"].as_u64().unwrap_or(0));
    let stood = match written["stood_us"].as_u64() {
        Some(us) => format!("; the guest stood for {}", milliseconds(us)),
        None => String::new(),
    };
    let dir = written["dir"].as_str().unwrap_or_default();
    print(&format!("{dir}: {bytes} of memory{stood}\n"))
}

/// `vmm restore`
///
/// # Errors
/// Wrong usage.
pub fn restore(mut args: Args) -> Result<Outcome, Stop> {
    let (mut dir, mut here, mut load, mut clock) = (None, Here::default(), None, None);
    while let Some(arg) = args.next_arg()? {
        match arg {
            Arg::Option(name) => {
                let given = match name.as_str() {
                    "lazy" => Load::Lazy,
                    "eager" => Load::Eager,
                    "clock" => {
                        args.text_once(&name, &mut clock)?;
                        continue;
                    }
                    _ if here.option(&mut args, &name)? => continue,
                    _ => return Err(args.unknown(&name)),
                };
                if load.replace(given).is_some_and(|other| other != given) {
                    return Err(usage("--lazy and --eager exclude each other"));
                }
            }
            Arg::Operand(operand) => {
                if let Some(other) = dir.replace(utf8(operand, "DIR")?) {
                    return Err(usage(format!("more than one directory: the first is '{other}'")));
                }
            }
        }
    }
    let dir: PathBuf = dir.ok_or_else(|| usage("a snapshot's directory is needed"))?.into();
    let downtime = match clock.as_deref() {
        None | Some("real") => Downtime::Passes,
        Some("saved") => Downtime::StandsStill,
        Some(other) => return Err(usage(format!("--clock '{other}': real or saved"))),
    };
    Ok(run(&dir, load.unwrap_or_default(), downtime, here.overrides()?))
}

fn run(dir: &Path, load: Load, downtime: Downtime, overrides: Overrides) -> Outcome {
    // Before any thread starts, so that all of them have the signals blocked.
    let signals = signals::block().map_err(RunError::Signals)?;
    let (events, inbox) = mpsc::channel();
    let here = LocalHost { overrides, events: events.clone() };
    signals.send_to(events.clone()).map_err(RunError::Signals)?;
    // Nobody else sends anything before the guest runs.
    let cancelled = || matches!(inbox.try_recv(), Ok(Event::Signal(_) | Event::ConsoleQuit));
    let arrived = restoring::restore(dir, load, downtime, &here, &cancelled)?;
    live(arrived, &events, inbox)
}
