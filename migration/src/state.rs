//! Saved state: what a stateful part of a machine is saved to and restored from.
//!
//! A part implements [`Stateful`] with a frozen, serialisable `State` type. The object-safe [`Saved`]
//! comes for free and turns the part into a [`Section`]: kind, instance, version and a postcard body.
//! A change of a released state is a new struct (`StateV2`), a `From<StateV1>` in
//! [`Stateful::upgrade`], the way back in [`Stateful::downgrade`] (a source writes what its destination
//! reads), and golden bytes of both; released versions are never edited.

use serde::{Serialize, de::DeserializeOwned};

/// Longest body of one section, in bytes. Vcpu state with a large XSAVE area is under 20 KiB.
pub const SECTION_LEN_MAX: usize = 1 << 20;

/// One part's saved state, as it stands in a stream or in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// What kind of part it is, for example `"virtio-blk"`. At most 32 bytes of ASCII.
    pub kind: String,
    /// Which one of its kind: the vCPU's index, the device's slot.
    pub instance: u32,
    /// Version of the body's layout, from 1.
    pub version: u16,
    /// The state, encoded by postcard.
    pub body: Vec<u8>,
}

/// Why a part refused its saved state. The part is unusable afterwards; the machine is dropped.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The body is not what this version's layout says.
    #[error("{kind}: the saved state of version {version} can't be decoded")]
    Decode {
        /// The section's kind.
        kind: &'static str,
        /// The section's version.
        version: u16,
    },
    /// Made by a newer release than this one.
    #[error("{kind}: saved state has version {found}, this vmm reads up to {newest}")]
    TooNew {
        /// The section's kind.
        kind: &'static str,
        /// The version found.
        found: u16,
        /// The newest version read here.
        newest: u16,
    },
    /// Decoded, but the values can't be of this part.
    #[error("{kind}: saved state is invalid: {why}")]
    Invalid {
        /// The section's kind.
        kind: &'static str,
        /// What is wrong.
        why: String,
    },
    /// The kernel refused it.
    #[error("{kind}: the kernel refused the saved state: {what}")]
    Kernel {
        /// The section's kind.
        kind: &'static str,
        /// The call that failed.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
}

/// Why a part's state could not be read.
#[derive(Debug, thiserror::Error)]
#[error("{kind}: can't save state: {what}")]
pub struct SaveError {
    /// The part's kind.
    pub kind: &'static str,
    /// The call that failed.
    pub what: &'static str,
    /// The kernel's answer.
    #[source]
    pub source: std::io::Error,
}

/// A part of a machine that has state to carry.
///
/// `save` of a part destructures its volatile state exhaustively, so that a new field can't be
/// forgotten. `restore` treats its input as hostile.
pub trait Stateful {
    /// The section's kind: the name of the part, frozen once released.
    const KIND: &'static str;
    /// Version of [`Self::State`], from 1.
    const VERSION: u16;
    /// The frozen layout of the newest version.
    type State: Serialize + DeserializeOwned;

    /// Reads the part's state. Called at rest only.
    fn save(&self) -> Result<Self::State, SaveError>;

    /// Puts a saved state into a freshly built part.
    fn restore(&mut self, state: Self::State) -> Result<(), RestoreError>;

    /// Turns the body of an older version into the newest. `None`: no such version was released.
    fn upgrade(_version: u16, _body: &[u8]) -> Option<Result<Self::State, RestoreError>> {
        None
    }

    /// Turns the newest state into the body of an older version, for a destination that reads no newer one.
    /// What that version has no place for is left out. `None`: no such version was released.
    fn downgrade(_state: &Self::State, _version: u16) -> Option<Vec<u8>> {
        None
    }
}

/// [`Stateful`], object-safe: what a machine's list of parts holds.
pub trait Saved {
    /// The section's kind.
    fn kind(&self) -> &'static str;
    /// The newest version that this part writes and reads.
    fn version(&self) -> u16;
    /// Saves into a section of the given instance and version.
    fn save_as(&self, instance: u32, version: u16) -> Result<Section, SaveError>;
    /// Saves into a section of the given instance, in the newest version.
    fn save_section(&self, instance: u32) -> Result<Section, SaveError> {
        self.save_as(instance, self.version())
    }
    /// Restores from a section of this kind.
    fn restore_section(&mut self, section: &Section) -> Result<(), RestoreError>;
}

impl<T: Stateful> Saved for T {
    fn kind(&self) -> &'static str {
        T::KIND
    }

    fn version(&self) -> u16 {
        T::VERSION
    }

    fn save_as(&self, instance: u32, version: u16) -> Result<Section, SaveError> {
        let state = self.save()?;
        let older = || T::downgrade(&state, version);
        let body = if version == T::VERSION { Some(to_body(&state)) } else { older() };
        let body = body.ok_or_else(|| SaveError {
            kind: T::KIND,
            what: "write it in an older version",
            source: std::io::Error::other(format!("version {version} is unknown")),
        })?;
        Ok(Section { kind: T::KIND.to_owned(), instance, version, body })
    }

    fn restore_section(&mut self, section: &Section) -> Result<(), RestoreError> {
        self.restore(decode::<T>(section)?)
    }
}

/// Reads the state in a section of `T`'s kind, of any version up to `T`'s.
///
/// # Errors
/// The version is newer, or the body is malformed.
pub fn decode<T: Stateful>(section: &Section) -> Result<T::State, RestoreError> {
    let found = section.version;
    if found > T::VERSION {
        return Err(RestoreError::TooNew { kind: T::KIND, found, newest: T::VERSION });
    }
    let malformed = RestoreError::Decode { kind: T::KIND, version: found };
    if found < T::VERSION {
        return T::upgrade(found, &section.body).ok_or(malformed)?;
    }
    from_body(T::KIND, found, &section.body)
}

/// The body of a section: a state's encoding.
#[must_use]
pub fn to_body<S: Serialize>(state: &S) -> Vec<u8> {
    postcard::to_stdvec(state).expect("plain data encodes into memory")
}

/// The state that a body is, wholly. `kind` and `version` are for the error.
///
/// # Errors
/// It isn't.
pub fn from_body<S: DeserializeOwned>(
    kind: &'static str,
    version: u16,
    body: &[u8],
) -> Result<S, RestoreError> {
    match postcard::take_from_bytes(body) {
        Ok((state, [])) => Ok(state),
        _ => Err(RestoreError::Decode { kind, version }),
    }
}
