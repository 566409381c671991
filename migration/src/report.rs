//! What a migration tells: progress while it goes on, and a report at its end.
//!
//! The field names of everything serialisable here are stable: `--json` prints them, and tools read
//! them. Fields are added, never renamed. Times are in microseconds, sizes in bytes.

use serde::Serialize;

use crate::channel::Flow;

/// Xen's stages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// 0: the two ends meet.
    #[default]
    PreMigration,
    /// 1: the destination checks and makes the place.
    Reservation,
    /// 2: memory goes over while the guest runs.
    PreCopy,
    /// 3: the guest stands; what is left goes over.
    StopAndCopy,
    /// 4: the guest changes hands.
    Commitment,
    /// 5: the guest runs at the destination.
    Activation,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::PreMigration => "pre-migration",
            Self::Reservation => "reservation",
            Self::PreCopy => "pre-copy",
            Self::StopAndCopy => "stop-and-copy",
            Self::Commitment => "commitment",
            Self::Activation => "activation",
        })
    }
}

/// Where a migration stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Progress {
    /// The stage.
    pub stage: Stage,
    /// The round of pre-copy, from 0.
    pub round: u32,
    /// Time since the start.
    pub elapsed_us: u64,
    /// Bytes sent (at the source) or received (at the destination).
    pub bytes: u64,
    /// Pages of guest RAM.
    pub pages_total: u64,
    /// Pages still to go in this round.
    pub pages_left: u64,
    /// Pages that the guest dirties in a second, as last measured.
    pub dirty_pages_per_s: u64,
    /// Bytes that go over in a second, as last measured.
    pub send_bytes_per_s: u64,
    /// The downtime, should the guest be stopped at the end of this round.
    pub expected_downtime_us: u64,
    /// Time to the end of this round.
    pub expected_round_us: u64,
    /// The strongest throttle on any vCPU, in percent.
    pub throttle_percent: u8,
}

/// Watches a migration and may cancel it.
///
/// Asked between chunks and, while the peer keeps still, about every 100 ms. From a migration's
/// commitment on the answer has no effect.
pub trait Observer {
    /// Sees the progress, decides.
    fn observe(&mut self, progress: &Progress) -> Flow;
}

impl<F: FnMut(&Progress) -> Flow> Observer for F {
    fn observe(&mut self, progress: &Progress) -> Flow {
        self(progress)
    }
}

/// One round of pre-copy. The last entry of a report is the stop-and-copy.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Round {
    /// Pages sent, zero pages among them.
    pub pages: u64,
    /// Pages found to be zero.
    pub zero_pages: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Time it took.
    pub time_us: u64,
    /// Pages that the guest dirtied meanwhile.
    pub dirty_pages: u64,
    /// How many of them each vCPU dirtied, as far as it can be told. Empty: not known.
    pub dirty_by_vcpu: Vec<u64>,
    /// Pages that the guest dirtied in a second.
    pub dirty_pages_per_s: u64,
    /// The rate of data, the wait for the destination's word included.
    pub send_bytes_per_s: u64,
    /// The downtime predicted at the round's end.
    pub expected_downtime_us: u64,
    /// What each vCPU was throttled by, in percent. Empty: nothing.
    pub throttle_percent: Vec<u8>,
    /// The longest stall of a vCPU that the round caused, where measured.
    pub stall_us: Option<u64>,
}

/// The downtime in its parts, in the order of events.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Downtime {
    /// From the first kick to the guest at rest.
    pub stop_us: u64,
    /// Collecting the last dirty pages.
    pub dirty_us: u64,
    /// Sending the last pages.
    pub pages_us: u64,
    /// Saving the state and sending it.
    pub save_us: u64,
    /// Releasing the disks at the source, which goes on while the destination restores.
    pub release_us: u64,
    /// From the last byte of state sent to `Ready` read, without the restore.
    pub ready_us: u64,
    /// Restoring the state at the destination.
    pub restore_us: u64,
    /// From `Commit` to `Activated`, without the activation and the answer's way back.
    pub commit_us: u64,
    /// Taking the disks' locks and starting the vCPUs at the destination.
    pub activate_us: u64,
    /// From there to the guest's first sign: its first output, which an observer may see. `None`: it gave none within
    /// [`crate::message::FIRST_SIGN_US_MAX`], or the destination doesn't tell.
    pub first_sign_us: Option<u64>,
    /// All of it: from the first kick to the first sign, or where none is known to the vCPUs running.
    pub total_us: u64,
    /// What an observer of the guest's outputs sees: from its last sign at the source, which its own rhythm may put well
    /// before the first kick, to its first at the destination. `None`: one of them isn't known.
    pub silence_us: Option<u64>,
}

impl Downtime {
    /// Adds the guest's first sign, so long after the vCPUs ran. `silent_us`: how long it had given none when it stood.
    pub(crate) fn add_first_sign(&mut self, after_us: u64, silent_us: Option<u64>) {
        self.first_sign_us = Some(after_us);
        self.total_us = self.total_us.saturating_add(after_us);
        let since = self.total_us.saturating_sub(self.stop_us);
        self.silence_us = silent_us.map(|silent_us| silent_us.saturating_add(since));
    }
}

/// What was expected before, to be held against what came.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Forecast {
    /// Whether the downtime limit can be met at this bandwidth.
    pub converges: bool,
    /// Rounds of pre-copy.
    pub rounds: u32,
    /// Time of the whole migration.
    pub total_us: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// The downtime, to the vCPUs running: what the guest does then, and so its first sign, isn't forecast, nor limited.
    pub downtime_us: u64,
    /// The part of it that doesn't depend on pages.
    pub fixed_us: u64,
    /// Pages that the guest dirties in a second, over the longest sample.
    pub dirty_pages_per_s: u64,
    /// Bytes that go over in a second.
    pub send_bytes_per_s: u64,
}

/// How a migration ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest is at the source.
    #[default]
    NotMoved,
    /// The guest is at the destination.
    Moved,
    /// It isn't known yet.
    InDoubt,
}

/// The report of a migration, kept by the source.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// The migration's id, in hexadecimal.
    pub id: String,
    /// The guest's name.
    pub name: String,
    /// How it ended.
    pub outcome: Outcome,
    /// The protocol spoken.
    pub protocol: u16,
    /// The destination's program and version.
    pub destination: String,
    /// Warnings from the destination.
    pub warnings: Vec<String>,
    /// From connecting to the end.
    pub total_us: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Pages of guest RAM.
    pub pages: u64,
    /// The shortest round trip.
    pub round_trip_us: u64,
    /// How long the guest stood for the example at reservation; where more were taken, the least.
    pub example_stop_us: u64,
    /// How long the destination took to restore the example.
    pub trial_restore_us: Option<u64>,
    /// The rounds; the last is the stop-and-copy, if it came to that.
    pub rounds: Vec<Round>,
    /// The downtime, if the guest moved.
    pub downtime: Option<Downtime>,
    /// By how much the guest's own clock went on while none of its vCPUs ran, where measured.
    pub guest_stall_us: Option<u64>,
    /// What was expected: before the first page (`--dry-run`) or at the end of the first round.
    pub forecast: Option<Forecast>,
}

/// A span in whole microseconds.
#[must_use]
pub fn micros(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
