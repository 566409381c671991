//! The closed enum that the control thread receives on its one channel: what the guest did, what a
//! vCPU met, what a client asked for, which signal came. Senders are leaves: they know this file only.

use std::sync::mpsc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::migrate::uri::Uri;

/// The error that ends a vCPU's thread.
pub type VcpuError = Box<dyn std::error::Error + Send + Sync>;

/// All that can happen to a VM from outside the control thread.
#[derive(Debug)]
pub enum Event {
    /// The guest ended itself.
    Guest(GuestExit),
    /// A vCPU can't run on: the VMM has failed.
    Vcpu {
        /// The vCPU's index, from 0.
        index: u32,
        /// Why.
        error: VcpuError,
    },
    /// A client of the control socket asks for something.
    Request {
        /// What.
        request: Request,
        /// Where the answer goes.
        reply: Reply,
    },
    /// This process received a signal that asks it to end (`SIGTERM`, `SIGINT`, `SIGHUP`).
    Signal(i32),
    /// The user typed Ctrl-a x.
    ConsoleQuit,
}

/// How the guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestExit {
    /// The guest powered off (ACPI S5).
    PowerOff,
    /// The guest rebooted after an orderly shutdown.
    Reset,
    /// The guest reset itself without an orderly shutdown, as a kernel does with `panic=`.
    Panic,
    /// A vCPU met a triple fault.
    TripleFault,
}

/// What a client can ask of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// What the VM is and does.
    Info,
    /// Stop the vCPUs; a VM that is paused stays so.
    Pause,
    /// Let the vCPUs run; a VM that runs does so already.
    Resume,
    /// Press the power button, or with `force` end the VM at once.
    Stop {
        /// Ask nothing of the guest.
        force: bool,
    },
    /// Move the VM to another host.
    Migrate(MigrateRequest),
    /// Cancel the migration that is under way; the guest runs on here.
    CancelMigration,
    /// Decide by hand who has a guest whose migration is in doubt.
    Resolve(Resolution),
    /// Write the VM's state to a directory.
    Snapshot(SnapshotRequest),
    /// Cancel the snapshot that is being written; nothing of it is left.
    CancelSnapshot,
}

impl Request {
    /// Checks what can be wrong with a request of the right shape.
    ///
    /// # Errors
    /// 400, naming the field.
    pub fn validate(&self) -> Result<(), ApiError> {
        match self {
            Request::Migrate(migrate) => migrate.validate(),
            Request::Snapshot(snapshot) => snapshot.validate(),
            _ => Ok(()),
        }
    }
}

/// The operator's word on a migration in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resolution {
    /// The destination doesn't run the guest and won't: it goes on here.
    Resume,
    /// The destination runs the guest: it is dropped here.
    Discard,
}

/// Where and how a VM migrates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// The destination.
    pub uri: Uri,
    /// The longest downtime that may be predicted when the guest is stopped, in milliseconds.
    #[serde(default = "default_downtime_limit_ms")]
    pub downtime_limit_ms: u64,
    /// The longest that pre-copy may take, in milliseconds.
    #[serde(default = "default_timeout_ms")]
    pub timeout_ms: u64,
    /// What happens when `timeout_ms` is over.
    #[serde(default)]
    pub on_timeout: OnTimeout,
    /// The most bits per second to send; unlimited if absent.
    #[serde(default)]
    pub bandwidth_bits_per_s: Option<u64>,
    /// Reserve, check and forecast, but move nothing.
    #[serde(default)]
    pub dry_run: bool,
}

impl MigrateRequest {
    fn validate(&self) -> Result<(), ApiError> {
        let problem = if self.uri == Uri::Stdio {
            "uri: a VM has no standard output to migrate through: use exec:CMD"
        } else if matches!(&self.uri, Uri::Unix(path) if !path.is_absolute()) {
            "uri: the socket's path must be absolute"
        } else if let Some(problem) = limits_problem(self.downtime_limit_ms, self.timeout_ms) {
            problem
        } else if self.bandwidth_bits_per_s.is_some_and(|rate| rate < BANDWIDTH_BITS_PER_S_MIN) {
            "bandwidth_bits_per_s: it must be at least 1000000"
        } else {
            return Ok(());
        };
        Err(ApiError::bad_request(problem))
    }
}

/// What is wrong with the limits of a migration or a snapshot.
fn limits_problem(downtime_limit_ms: u64, timeout_ms: u64) -> Option<&'static str> {
    if !(1..=DOWNTIME_LIMIT_MS_MAX).contains(&downtime_limit_ms) {
        Some("downtime_limit_ms: it must be 1 to 3600000")
    } else if !(1..=TIMEOUT_MS_MAX).contains(&timeout_ms) {
        Some("timeout_ms: it must be 1 to 604800000")
    } else {
        None
    }
}

/// The largest [`MigrateRequest::downtime_limit_ms`]: an hour.
pub const DOWNTIME_LIMIT_MS_MAX: u64 = 3_600_000;
/// The largest [`MigrateRequest::timeout_ms`]: a week.
pub const TIMEOUT_MS_MAX: u64 = 604_800_000;
/// The smallest [`MigrateRequest::bandwidth_bits_per_s`]: one Mbit/s.
pub const BANDWIDTH_BITS_PER_S_MIN: u64 = 1_000_000;
/// The default of [`MigrateRequest::downtime_limit_ms`].
pub const DOWNTIME_LIMIT_MS_DEFAULT: u64 = 50;
/// The default of [`SnapshotRequest::downtime_limit_ms`]: nobody waits for an answer of the guest's from elsewhere, and a
/// disk's rate varies more than a link's.
pub const SNAPSHOT_DOWNTIME_LIMIT_MS_DEFAULT: u64 = 300;
/// The default of [`MigrateRequest::timeout_ms`]: ten minutes.
pub const TIMEOUT_MS_DEFAULT: u64 = 600_000;

fn default_downtime_limit_ms() -> u64 {
    DOWNTIME_LIMIT_MS_DEFAULT
}

fn default_snapshot_downtime_limit_ms() -> u64 {
    SNAPSHOT_DOWNTIME_LIMIT_MS_DEFAULT
}

fn default_timeout_ms() -> u64 {
    TIMEOUT_MS_DEFAULT
}

/// What a migration or a live snapshot that doesn't converge in time does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnTimeout {
    /// It is given up; the guest stays at the source.
    #[default]
    Abort,
    /// The guest is stopped and moved, or written, whatever the downtime.
    StopAndCopy,
    /// The vCPUs are throttled until it converges.
    Throttle,
}

/// Where and how a snapshot is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// The directory to make; absolute, since the VM's working directory isn't the client's.
    pub dir: std::path::PathBuf,
    /// Whether the guest runs on while its RAM is written.
    #[serde(default)]
    pub live: bool,
    /// Of a live one: the longest downtime that may be predicted when the guest is stopped, in milliseconds.
    #[serde(default = "default_snapshot_downtime_limit_ms")]
    pub downtime_limit_ms: u64,
    /// Of a live one: the longest that memory may be written while the guest runs, in milliseconds.
    #[serde(default = "default_timeout_ms")]
    pub timeout_ms: u64,
    /// Of a live one: what happens when `timeout_ms` is over.
    #[serde(default)]
    pub on_timeout: OnTimeout,
}

impl SnapshotRequest {
    /// With the limits that a request has which names none.
    #[must_use]
    pub fn new(dir: std::path::PathBuf, live: bool) -> Self {
        Self {
            dir,
            live,
            downtime_limit_ms: SNAPSHOT_DOWNTIME_LIMIT_MS_DEFAULT,
            timeout_ms: TIMEOUT_MS_DEFAULT,
            on_timeout: OnTimeout::default(),
        }
    }

    fn validate(&self) -> Result<(), ApiError> {
        let limits = limits_problem(self.downtime_limit_ms, self.timeout_ms);
        match limits {
            _ if !self.dir.is_absolute() => {
                Err(ApiError::bad_request("dir: it must be an absolute path"))
            }
            Some(problem) => Err(ApiError::bad_request(problem)),
            None => Ok(()),
        }
    }
}

/// One message to the client that made a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// The request is under way. Any number of them comes before `Done`.
    Progress(Value),
    /// Nothing to tell: sent to learn whether anybody waits.
    Still,
    /// The request's end.
    Done(Result<Value, ApiError>),
}

/// Why a request failed, in HTTP's terms.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The HTTP status, 400 to 599.
    pub status: u16,
    /// One line: what is wrong and what to do.
    pub message: String,
}

impl ApiError {
    /// The request itself is wrong (400).
    pub fn bad_request(message: impl Into<String>) -> ApiError {
        ApiError { status: 400, message: message.into() }
    }

    /// The request doesn't fit the VM's present state (409).
    pub fn conflict(message: impl Into<String>) -> ApiError {
        ApiError { status: 409, message: message.into() }
    }

    /// The VMM failed (500).
    pub fn internal(message: impl Into<String>) -> ApiError {
        ApiError { status: 500, message: message.into() }
    }
}

/// The way back to the client that made a request. A client that went away is no error: what it
/// asked for is carried out all the same. A `Reply` that is dropped answers that the VM ended.
#[derive(Debug)]
pub struct Reply(pub mpsc::Sender<Answer>);

impl Reply {
    /// A reply and where its answers arrive.
    #[must_use]
    pub fn channel() -> (Reply, mpsc::Receiver<Answer>) {
        let (sender, receiver) = mpsc::channel();
        (Reply(sender), receiver)
    }

    /// Tells how far the request is. False if the client has gone away.
    pub fn progress(&self, value: Value) -> bool {
        self.0.send(Answer::Progress(value)).is_ok()
    }

    /// Whether the client still waits, as far as is known.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        self.0.send(Answer::Still).is_ok()
    }

    /// Ends the request.
    pub fn done(self, result: Result<Value, ApiError>) {
        // A client that has gone away needs no answer.
        drop(self.0.send(Answer::Done(result)));
    }
}
