//! vmm: the root of the workspace, where KVM, threads and the machine live.

pub mod api;
pub mod arch;
pub mod backend;
pub mod chain;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod dirty;
pub mod event;
pub mod io_thread;
pub mod irq;
pub mod kernel;
pub mod kick;
pub mod log;
pub mod machine;
pub mod memory;
pub mod migrate;
pub mod moving;
pub mod platform;
pub mod running;
pub mod signals;
pub mod throttle;
pub mod vcpu;
pub mod vm;
pub mod watch;
