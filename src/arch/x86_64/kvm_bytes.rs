//! KVM's structs as bytes of saved state.
//!
//! They are the kernel's ABI, so their layout is frozen, and saved state holds them as they are. The
//! serde of kvm-bindings pads or truncates what has the wrong length; here that is an error.

use vmm_migration::state::RestoreError;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A struct's bytes.
pub fn encode<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}

/// A struct from exactly as many bytes as it has. `what` names it in the error.
pub fn decode<T: FromBytes>(
    kind: &'static str,
    what: &str,
    bytes: &[u8],
) -> Result<T, RestoreError> {
    T::read_from_bytes(bytes).map_err(|_| RestoreError::Invalid {
        kind,
        why: format!("{what} has {} bytes, not {}", bytes.len(), size_of::<T>()),
    })
}
