//! Device models: what a guest sees on its buses, and nothing of how the host runs it.
//!
//! Invariant: this crate knows no KVM, starts no threads and holds no `unsafe`. System calls on guest
//! memory (vectored file and TAP I/O) are behind the backend traits that the root package implements.
#![forbid(unsafe_code)]

pub mod backend;
pub mod bus;
pub mod irq;
pub mod limit;
pub mod power;
pub mod reset;
pub mod serial;
pub mod sign;
pub mod virtio;

/// Guest RAM, with a bitmap of the pages that the VMM and its devices wrote (KVM's dirty log sees
/// only the vCPUs' writes; a move unites the two). Cloning is cheap and shares the memory.
pub type GuestRam = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;

/// A piece of guest RAM as a backend sees it: bounds-checked, and volatile because the guest runs.
pub type GuestSlice<'a> =
    vm_memory::VolatileSlice<'a, vm_memory::bitmap::BS<'a, vm_memory::bitmap::AtomicBitmap>>;
