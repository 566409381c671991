//! Migration at this end: the machine behind `vmm_migration`'s traits, and what carries the stream.
//!
//! - [`uri`], [`link`], [`carrier`]: where the stream goes and how its bytes get there;
//! - [`tracking`]: which pages of guest RAM were touched and written; `dirtiers`: by which vCPU;
//! - [`cpu`]: what a guest's vCPUs need of a host; `fitting` (and `cgroup`): whether the rest of it is there;
//! - [`leaving`]: the source's guest, live and halted; [`outgoing`] drives it;
//! - [`arriving`]: the destination's guest, `mapping`: its RAM in KVM's page tables before it runs; [`incoming`]
//!   drives it; [`verdicts`]: what is told a source in doubt;
//! - [`snapshotting`], [`restoring`]: a guest into a directory, and out of it;
//! - `aside`: what may take long, while somebody waits and looks up.

pub mod arriving;
pub(crate) mod aside;
pub mod carrier;
mod cgroup;
pub mod cpu;
mod dirtiers;
mod fitting;
pub mod incoming;
pub mod leaving;
pub mod link;
mod mapping;
pub mod outgoing;
pub mod restoring;
pub mod snapshotting;
pub mod tracking;
pub mod uri;
pub mod verdicts;
