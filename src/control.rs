//! The control thread: it owns the machine, at rest or in motion, and acts on one channel of events.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use serde_json::{Value, json};

use crate::api::server::Server;
use crate::config::{Config, OnReboot};
use crate::console::Console;
use crate::event::{ApiError, Event, GuestExit, MigrateRequest, Reply, Request, VcpuError};
use crate::machine::{Machine, MachineError, Origin};
use crate::moving::{Moved, Mover};
use crate::resting::{self, END_PATIENCE};
use crate::running::Running;
use crate::vm::Vm;

/// How a VM's life in this process ended, when nothing went wrong here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest powered off, or rebooted in good order with `--on-reboot exit`.
    Guest(GuestExit),
    /// It runs on another host, and where.
    Moved(String),
    /// Somebody stopped it: `vmm stop --force`, a signal, Ctrl-a x.
    Stopped(String),
}

/// Why a VM's life in this process ended badly.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The machine could not be built or started.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A vCPU can't go on.
    #[error("vCPU {index}: {error}")]
    Vcpu {
        /// Which one.
        index: u32,
        /// What KVM said.
        error: VcpuError,
    },
}

/// What the loop does after an event.
enum Next {
    Go(Vm),
    End(Result<End, ControlError>),
}

/// Builds the machine, boots it and sees it through to its end. `server` is its clients'.
pub fn run(
    config: Config,
    console: &Arc<Console>,
    server: &Server,
    events: &Sender<Event>,
    inbox: &Receiver<Event>,
) -> Result<End, ControlError> {
    let vm = Vm::Running(boot(config, console, events)?);
    serve(vm, console, server, events, inbox)
}

/// Sees a VM that is there already through to its end.
pub fn serve(
    vm: Vm,
    console: &Arc<Console>,
    server: &Server,
    events: &Sender<Event>,
    inbox: &Receiver<Event>,
) -> Result<End, ControlError> {
    let (deferred, stopping) = (VecDeque::new(), Vec::new());
    Control { console, server, events, inbox, deferred, stopping }.serve(vm)
}

fn boot(
    config: Config,
    console: &Arc<Console>,
    events: &Sender<Event>,
) -> Result<Running, MachineError> {
    let origin = Origin::boot(&config);
    let mut machine = Machine::new(config, origin, console, events.clone())?;
    machine.load_kernel()?;
    Ok(machine.start())
}

struct Control<'a> {
    console: &'a Arc<Console>,
    server: &'a Server,
    events: &'a Sender<Event>,
    inbox: &'a Receiver<Event>,
    /// Events that came during a migration.
    deferred: VecDeque<Event>,
    /// Clients of `vmm stop` who wait for the guest to power off.
    stopping: Vec<Reply>,
}

impl Control<'_> {
    fn serve(mut self, mut vm: Vm) -> Result<End, ControlError> {
        loop {
            let event = match self.deferred.pop_front() {
                Some(event) => event,
                None => self.inbox.recv().expect("this thread holds a sender itself"),
            };
            vm = match self.handle(vm, event) {
                Next::Go(vm) => vm,
                Next::End(result) => return result,
            }
        }
    }

    fn handle(&mut self, vm: Vm, event: Event) -> Next {
        match event {
            Event::Guest(exit) => self.guest_exit(vm, exit),
            Event::Vcpu { index, error } => {
                drop(self.bring_home(vm, Some(END_PATIENCE)));
                Next::End(Err(ControlError::Vcpu { index, error }))
            }
            Event::Signal(signal) => self.end(vm, format!("ended by signal {signal}")),
            Event::ConsoleQuit => self.end(vm, "ended from the console".to_owned()),
            Event::Request { request, reply } => self.request(vm, request, reply),
        }
    }

    /// The guest ended itself: the machine comes to rest, and perhaps starts anew.
    fn guest_exit(&mut self, vm: Vm, exit: GuestExit) -> Next {
        let Some(machine) = self.bring_home(vm, None) else {
            self.answer_stopping(&Ok(json!({ "ended": exit })));
            return Next::End(Ok(End::Guest(exit)));
        };
        let exit = match exit {
            GuestExit::Reset if machine.reset_by_panic() => GuestExit::Panic,
            other => other,
        };
        // Who has gone away since waits for no end.
        self.stopping.retain(Reply::is_awaited);
        let again = exit == GuestExit::Reset
            && self.stopping.is_empty()
            && machine.config().on_reboot == OnReboot::Reset;
        if !again {
            self.answer_stopping(&Ok(json!({ "ended": exit })));
            return Next::End(Ok(End::Guest(exit)));
        }
        let config = machine.config().clone();
        // The old machine gives its disks and TAPs back before the new one takes them.
        drop(machine);
        self.forget_guest();
        tracing::info!("the guest resets");
        match boot(config, self.console, self.events) {
            Ok(running) => Next::Go(Vm::Running(running)),
            Err(e) => Next::End(Err(e.into())),
        }
    }

    /// Drops what a machine that is gone still told: its vCPUs went on until they were stopped, and what they did
    /// would count as the next machine's.
    fn forget_guest(&mut self) {
        self.deferred.extend(self.inbox.try_iter());
        self.deferred.retain(|event| !matches!(event, Event::Guest(_) | Event::Vcpu { .. }));
    }

    fn end(&mut self, vm: Vm, why: String) -> Next {
        drop(self.bring_home(vm, Some(END_PATIENCE)));
        self.answer_stopping(&Ok(json!({ "ended": "forced" })));
        Next::End(Ok(End::Stopped(why)))
    }

    fn bring_home(&mut self, vm: Vm, patience: Option<Duration>) -> Option<Machine> {
        resting::bring_home(vm, self.inbox, &mut self.deferred, patience)
    }

    /// What becomes of the VM, for those who want it stopped: also those who came since this began.
    fn answer_stopping(&mut self, answer: &Result<Value, ApiError>) {
        self.stopping.extend(self.deferred.drain(..).filter_map(|event| match event {
            Event::Request { request: Request::Stop { .. }, reply } => Some(reply),
            _ => None,
        }));
        for reply in self.stopping.drain(..) {
            reply.done(answer.clone());
        }
    }

    fn pause(&mut self, running: Running, reply: Reply) -> Next {
        let (vm, paused) = resting::pause(running, self.inbox, &mut self.deferred, &reply);
        reply.done(paused.map(|()| vm.info()));
        Next::Go(vm)
    }

    fn migrate(&mut self, vm: Vm, request: &MigrateRequest, reply: Reply) -> Next {
        let (console, server) = (self.console, self.server);
        let vacate = || {
            server.vacate();
            console.vacate();
        };
        let mover = Mover { inbox: self.inbox, deferred: &mut self.deferred };
        match mover.migrate(vm, request, reply, &vacate) {
            Moved::Away(to) => {
                // Who wants the guest stopped hears that it goes on elsewhere.
                self.answer_stopping(&Err(ApiError::conflict(&to)));
                Next::End(Ok(End::Moved(to)))
            }
            Moved::Here(vm) => Next::Go(vm),
            Moved::Ended(why) => Next::End(Ok(End::Stopped(why))),
        }
    }

    fn request(&mut self, vm: Vm, request: Request, reply: Reply) -> Next {
        match (request, vm) {
            (Request::Info, vm) => {
                reply.done(Ok(vm.info()));
                Next::Go(vm)
            }
            (Request::Pause, Vm::Running(running)) => self.pause(running, reply),
            (Request::Resume, Vm::Paused(machine)) => {
                let vm = Vm::Running(machine.start());
                reply.done(Ok(vm.info()));
                Next::Go(vm)
            }
            (Request::Pause | Request::Resume, vm) => {
                reply.done(Ok(vm.info()));
                Next::Go(vm)
            }
            (Request::Stop { force: true }, vm) => {
                self.stopping.push(reply);
                self.end(vm, "stopped by force".to_owned())
            }
            (Request::Stop { force: false }, Vm::Running(running)) => {
                running.press_power_button();
                self.stopping.push(reply);
                Next::Go(Vm::Running(running))
            }
            (Request::Stop { force: false }, vm) => {
                reply.done(Err(ApiError::conflict(
                    "the VM is paused and can't hear its power button: resume it, or stop --force",
                )));
                Next::Go(vm)
            }
            (Request::Migrate(request), vm) => self.migrate(vm, &request, reply),
            (Request::CancelMigration, vm) => {
                reply.done(Err(ApiError::conflict("no migration is under way")));
                Next::Go(vm)
            }
            (Request::Resolve(_), vm) => {
                reply.done(Err(ApiError::conflict("no migration of this VM is in doubt")));
                Next::Go(vm)
            }
            (Request::Snapshot(request), vm) => {
                let mover = Mover { inbox: self.inbox, deferred: &mut self.deferred };
                Next::Go(mover.snapshot(vm, &request, reply))
            }
            (Request::CancelSnapshot, vm) => {
                reply.done(Err(ApiError::conflict("no snapshot is being written")));
                Next::Go(vm)
            }
        }
    }
}
