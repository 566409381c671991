//! The machine's architecture: everything that a guest's CPU, firmware and boot protocol decide.
//!
//! One module per architecture, re-exported as if it were this one. Here stands the only
//! `cfg(target_arch)` of the tree.

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("vmm runs on x86_64 only so far");
