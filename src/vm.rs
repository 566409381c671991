//! A VM as its user has it: running, or paused.

use serde_json::{Value, json};

use crate::config::Config;
use crate::machine::{Core, Machine};
use crate::running::Running;

/// A machine in motion, or at rest because its user paused it.
pub enum Vm {
    /// Its vCPUs run.
    Running(Running),
    /// They don't, until its user resumes it.
    Paused(Machine),
}

impl Vm {
    /// The machine in motion, unless its user paused it.
    #[must_use]
    pub fn go_on(machine: Machine, paused: bool) -> Self {
        if paused { Self::Paused(machine) } else { Self::Running(machine.start()) }
    }

    /// Brings the machine to rest.
    #[must_use]
    pub fn stop(self) -> Machine {
        match self {
            Self::Running(running) => running.stop(),
            Self::Paused(machine) => machine,
        }
    }

    /// What the machine was built from.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.core().config
    }

    pub(crate) fn core(&self) -> &Core {
        match self {
            Self::Running(running) => running.core(),
            Self::Paused(machine) => &machine.core,
        }
    }

    /// What `vmm info` tells, under the given state.
    #[must_use]
    pub fn describe(config: &Config, state: &str) -> Value {
        json!({ "state": state, "pid": std::process::id(), "config": config })
    }

    /// What `vmm info` tells.
    #[must_use]
    pub fn info(&self) -> Value {
        let state = if matches!(self, Self::Running(_)) { "running" } else { "paused" };
        Self::describe(self.config(), state)
    }
}
