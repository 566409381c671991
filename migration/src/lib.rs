//! The language of saved state and, above it, the choreography of a move.
//!
//! This crate is the ground floor: it knows no KVM, no devices, no threads and no `unsafe`, so that
//! both ends of a migration run against a fake guest in one test process. `PROTOCOL.md` beside this
//! crate's `Cargo.toml` specifies what goes over the wire and into files.
#![forbid(unsafe_code)]

pub mod channel;
pub mod chunk;
pub mod destination;
pub mod error;
pub mod forecast;
pub mod guest;
pub mod inspect;
pub mod message;
pub mod pages;
pub mod plan;
pub mod policy;
pub mod report;
pub mod snapshot;
pub mod source;
pub mod state;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod wire;
