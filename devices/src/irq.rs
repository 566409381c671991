//! How a device asks for attention: an edge on an interrupt line that it owns.

/// One interrupt line. The root package implements it with an eventfd bound to a GSI (irqfd), tests
/// with a counter.
pub trait IrqLine: Send + Sync {
    /// Sends one edge. Never blocks and never fails from the device's point of view: an eventfd whose
    /// counter is full has an edge pending anyway.
    fn trigger(&self);
}
