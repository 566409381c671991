//! What the tests that run real machines share.
#![allow(dead_code, reason = "each test program uses a part")]

pub mod disk;
pub mod forge;
pub mod guests;
pub mod lies;
pub mod moves;
pub mod pty;
pub mod relay;
pub mod vm;
