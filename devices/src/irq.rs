//! How a device asks for attention: an edge on an interrupt line that it owns.

/// One interrupt line. The root package implements it with a pin of KVM's I/O APIC, tests with a counter.
pub trait IrqLine: Send + Sync {
    /// Sends one edge, from any thread. Never blocks and never fails from the device's point of view.
    fn trigger(&self);
}
