//! What tests that run in both of two emulated hosts at once share: who is who, `vmm` and its guests, and waiting.

#![allow(dead_code, reason = "each test program uses a part")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The port of `vmm migrate --listen`.
pub const MIGRATION_PORT: u16 = 4444;
/// The port over which the two halves of a test talk.
pub const TEST_PORT: u16 = 4445;
/// Emulated CPUs on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// What tests/run tells.
pub fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: see tests/run"))
}

/// A file of the guest directory.
pub fn guest_file(name: &str) -> PathBuf {
    Path::new(&env("VMM_GUEST_DIR")).join(name)
}

/// `vmm` with arguments.
pub fn vmm(args: &[&str]) -> Command {
    let mut command = Command::new(env("VMM_BIN"));
    command.args(args);
    command
}

/// How a program ended, and all that it said.
pub fn finished(output: &Output) -> String {
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{}: {out}{err}", output.status)
}

/// Tries until it works, or the patience is over.
pub fn until<T>(what: &str, mut attempt: impl FnMut() -> Result<T, String>) -> T {
    let start = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(why) if start.elapsed() > PATIENCE => panic!("{what}: {why}"),
            Err(_) => sleep(Duration::from_millis(200)),
        }
    }
}

/// What is in a console's file.
pub fn console(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// Waits until the console's file says something, while `vmm` lives.
pub fn wait_for(path: &Path, text: &str, vmm: &mut Child) {
    until(text, || {
        if let Ok(Some(status)) = vmm.try_wait() {
            panic!("vmm ended with {status}: {}", console(path));
        }
        if console(path).contains(text) { Ok(()) } else { Err(console(path)) }
    });
}
