//! What a destination reads beyond version 1 of everything: the record `Reads`.

use serde::{Deserialize, Serialize};

use crate::wire::{Algorithm, record};

/// The kind under which [`Reads`] lists the records of pages: version 1 is `Pages`, version 2 `Pages2`.
pub const PAGES_KIND: &str = "Pages";
/// The kind by which [`Reads`] announces `FirstSign`, in version 1.
pub const FIRST_SIGN_KIND: &str = "FirstSign";
/// The kind under which [`Reads`] lists the machine's configuration.
pub const CONFIG_KIND: &str = "config";

/// What the destination reads, sent before `HelloReply`. Optional: without it, version 1 of everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reads {
    /// The newest version of each kind of section of which that isn't 1; of [`PAGES_KIND`]; and [`FIRST_SIGN_KIND`], where
    /// that is told.
    pub newest: Vec<(String, u16)>,
}

impl Reads {
    /// What this release reads: these sections, and `Pages2`; and that it tells the first sign.
    #[must_use]
    pub fn new(mut sections: Vec<(String, u16)>) -> Self {
        sections.extend([(PAGES_KIND.to_owned(), 2), (FIRST_SIGN_KIND.to_owned(), 1)]);
        Self { newest: sections }
    }

    /// The newest version that the destination reads of a kind.
    #[must_use]
    pub fn version(&self, kind: &str) -> u16 {
        self.newest.iter().find(|(of, _)| of == kind).map_or(1, |(_, version)| *version)
    }

    /// The type of record in which pages go there: with this checksum, where the destination reads it.
    #[must_use]
    pub fn pages_record(&self, checksum: Algorithm) -> u32 {
        match checksum {
            Algorithm::Xxh64 if self.version(PAGES_KIND) >= 2 => record::PAGES2,
            Algorithm::Crc32 | Algorithm::Xxh64 => record::PAGES,
        }
    }

    /// Whether the destination tells the guest's first sign.
    #[must_use]
    pub fn first_sign(&self) -> bool {
        self.newest.iter().any(|(kind, _)| kind == FIRST_SIGN_KIND)
    }
}
