//! Why a migration didn't happen, or can't be told to have happened.

use crate::channel::{ChannelError, Peer};
use crate::guest::{GuestError, Locks};
use crate::report::Stage;

/// Why a migration ended early.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The connection, the protocol or the peer; also a cancellation.
    #[error("{stage} failed")]
    Channel {
        /// How far it had come.
        stage: Stage,
        /// What happened.
        #[source]
        source: ChannelError,
    },
    /// The guest on this side.
    #[error("{stage}: {doing} failed")]
    Guest {
        /// How far it had come.
        stage: Stage,
        /// What it was asked.
        doing: &'static str,
        /// What it said.
        #[source]
        source: GuestError,
    },
    /// This side won't or can't take the guest.
    #[error("{stage}: {}", .reasons.join("; "))]
    Refused {
        /// How far it had come.
        stage: Stage,
        /// Why, one line each.
        reasons: Vec<String>,
    },
    /// The time for pre-copy is up.
    #[error(
        "no convergence: a stop would take {downtime_ms} ms; the guest dirties {dirty_mib_per_s} MiB/s \
         and {send_mib_per_s} MiB/s go over (see --downtime-limit, --timeout, --on-timeout)"
    )]
    NoConvergence {
        /// The downtime predicted last, in milliseconds.
        downtime_ms: u128,
        /// The dirty rate.
        dirty_mib_per_s: u64,
        /// The send rate.
        send_mib_per_s: u64,
    },
    /// The time for pre-copy is up before the first round is.
    #[error(
        "no convergence: {pages_left} pages of the first round are left to go (see --timeout, --on-timeout, \
         --bandwidth)"
    )]
    TooSlow {
        /// About how many pages.
        pages_left: u64,
    },
    /// The limit can't be met by any guest on these hosts.
    #[error(
        "a stop takes {fixed_ms} ms before the first page (state, restore, round trips, flush of disks), over the limit \
         of {limit_ms} ms: raise --downtime-limit"
    )]
    Unreachable {
        /// The fixed cost of the stop, in milliseconds.
        fixed_ms: u128,
        /// The downtime limit, in milliseconds.
        limit_ms: u128,
    },
}

impl MigrateError {
    /// The destination gave the guest back once it was ready.
    pub(crate) fn never_activated(reasons: Vec<String>) -> Self {
        let source = ChannelError::Peer(Peer::Destination, reasons);
        Self::Channel { stage: Stage::Activation, source }
    }

    /// Whether it is the observer's own doing.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Channel { source: ChannelError::Cancelled, .. })
    }

    /// Whether the connection is lost, and with it all news of the peer.
    #[must_use]
    pub fn is_lost_connection(&self) -> bool {
        use ChannelError::{Closed, Io, Overdue, TimedOut};
        matches!(self, Self::Channel { source: Closed(_) | TimedOut { .. } | Overdue | Io(_), stage } if *stage != Stage::PreMigration)
    }

    /// The error and its causes, in one line.
    #[must_use]
    pub fn line(&self) -> String {
        let mut line = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            line.push_str(": ");
            line.push_str(&error.to_string());
            source = error.source();
        }
        line
    }
}

/// Why a guest that should go on at the source doesn't yet. It is whole; trying again may do.
#[derive(Debug, thiserror::Error)]
pub enum StuckError {
    /// A disk is not there for it.
    #[error("{}", match .0 {
        Locks::Held => "the guest stands: a disk's lock is held by another process",
        Locks::Changed => "the guest stands: a disk has changed since it was stopped",
        Locks::Taken => "the guest stands",
    })]
    Locks(Locks),
    /// The machine failed.
    #[error("the guest stands: it can't go on")]
    Guest(#[source] GuestError),
}
