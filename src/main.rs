//! The program `vmm`: what went wrong as one line on standard error, and the exit status.

use std::process::{ExitCode, abort};

use vmm::chain::chain;
use vmm::{cli, log};

fn main() -> ExitCode {
    abort_on_panic();
    log::start();
    match cli::main(std::env::args_os().skip(1)) {
        Ok(code) => code,
        // Whoever read our output wanted no more.
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            log::print(&chain(&error));
            ExitCode::from(error.status())
        }
    }
}

/// A bug in one thread ends the process, in builds that unwind too: no half of a VMM runs on.
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        abort();
    }));
}
