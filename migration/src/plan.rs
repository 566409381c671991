//! What a guest needs of the host that is to take it: the body of `Reserve`, and of a snapshot's header.
//!
//! The destination holds every item of a [`Plan`] against what it has before a page moves. The structs
//! are frozen as of protocol 1; a change is a new protocol version.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::message::Reads;
use crate::pages::Run;
use crate::state::Section;

/// The page space of guest RAM. Others (a disk, say) get other numbers.
pub const SPACE_RAM: u16 = 0;
/// Most regions of a page space.
pub const REGIONS_MAX: usize = 64;
/// Most sections of a guest.
pub const SECTIONS_MAX: usize = 4096;
/// All sections of a guest together, in bytes.
const SECTIONS_BYTES_MAX: usize = 16 << 20;

/// The name of one migration, the same over reconnections: 16 random bytes chosen by the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MigrationId(pub [u8; 16]);

impl std::fmt::Display for MigrationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Pages of a space that follow each other, in one piece at both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Number of the first page.
    pub first_page: u64,
    /// How many pages, at least 1.
    pub pages: u64,
}

impl Region {
    /// The region's pages. `None`: empty or beyond the address space.
    #[must_use]
    pub fn run(self) -> Option<Run> {
        Run::new(self.first_page, self.pages)
    }
}

/// A numbered space of pages: RAM today, and room for disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// [`SPACE_RAM`] or another number.
    pub id: u16,
    /// Ascending, without overlap.
    pub regions: Vec<Region>,
}

impl Space {
    /// How many pages the space has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.regions.iter().map(|region| region.pages).sum()
    }

    /// Whether one region holds the whole run.
    #[must_use]
    pub fn contains(&self, run: Run) -> bool {
        self.regions.iter().filter_map(|r| r.run()).any(|region| region.contains(run))
    }
}

/// One section by name: what will be saved at the source and restored at the destination.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SectionId {
    /// The section's kind.
    pub kind: String,
    /// Which of its kind.
    pub instance: u32,
    /// In a [`Plan`]: the version to be sent. Of a destination's part: the newest it reads.
    pub version: u16,
}

impl std::fmt::Display for SectionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{} version {}", self.kind, self.instance, self.version)
    }
}

/// One CPUID leaf as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// EAX of the question.
    pub function: u32,
    /// ECX of the question.
    pub index: u32,
    /// EAX, EBX, ECX, EDX of the answer.
    pub registers: [u32; 4],
}

/// What the guest's vCPUs need. This crate carries it; the two hosts' machines understand it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuNeeds {
    /// `"x86_64"` or another architecture's name.
    pub arch: String,
    /// The CPU model the guest was started with.
    pub model: String,
    /// How many vCPUs.
    pub vcpus: u32,
    /// CPUID as the guest sees it.
    pub cpuid: Vec<CpuidLeaf>,
    /// Numbers of the MSRs that will be written at the destination.
    pub msrs: Vec<u32>,
    /// Size of the XSAVE area, in bytes.
    pub xsave_bytes: u32,
    /// XSAVE components in use by XCR0.
    pub xcr0: u64,
    /// XSAVE components in use by IA32_XSS.
    pub xss: u64,
    /// The TSC frequency that the guest was told, in kHz. 0: none.
    pub tsc_khz: u32,
}

/// A disk the guest has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskNeed {
    /// Its id, which `--disk id=` at the destination names.
    pub id: String,
    /// Its path at the source, the destination's choice where it is told no other.
    pub path: String,
    /// Its size, in bytes.
    pub bytes: u64,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

/// A network interface the guest has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetNeed {
    /// Its id, which `--net id=` at the destination names.
    pub id: String,
    /// Its TAP at the source, the destination's choice where it is told no other.
    pub tap: String,
    /// Its MAC address.
    pub mac: [u8; 6],
}

/// Everything the destination has to provide.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The guest's name.
    pub name: String,
    /// Whether the guest was paused when the plan was made; `End` says how it arrives.
    pub paused: bool,
    /// The machine's configuration, in the machine's own encoding.
    pub config: Vec<u8>,
    /// The page spaces, RAM among them.
    pub spaces: Vec<Space>,
    /// How many pages of RAM were ever touched, as far as known.
    pub touched_pages: u64,
    /// Every section that will be sent.
    pub sections: Vec<SectionId>,
    /// What the vCPUs need.
    pub cpu: CpuNeeds,
    /// The disks.
    pub disks: Vec<DiskNeed>,
    /// The network interfaces.
    pub nets: Vec<NetNeed>,
}

impl Plan {
    /// The space of guest RAM.
    #[must_use]
    pub fn ram(&self) -> Option<&Space> {
        self.spaces.iter().find(|space| space.id == SPACE_RAM)
    }

    /// What can't be true of any guest: for the destination, to which a plan is hostile input.
    #[must_use]
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        match self.spaces.as_slice() {
            [ram] if ram.id == SPACE_RAM => faults.extend(layout_fault(ram)),
            spaces => faults.push(format!("{} page spaces, expected one, of RAM", spaces.len())),
        }
        if self.sections.len() > SECTIONS_MAX {
            faults.push(format!("{} sections, at most {SECTIONS_MAX}", self.sections.len()));
        }
        let mut seen = BTreeSet::new();
        for id in &self.sections {
            if !seen.insert((&id.kind, id.instance)) {
                faults.push(format!("section {}/{} is listed twice", id.kind, id.instance));
            }
        }
        let disks = self.disks.iter().map(|disk| &disk.id);
        let nets = self.nets.iter().map(|net| &net.id);
        for (what, ids) in [("disk", disks.collect::<Vec<_>>()), ("net", nets.collect())] {
            let mut seen = BTreeSet::new();
            let twice = ids.into_iter().filter(|id| !seen.insert(*id));
            faults.extend(twice.map(|id| format!("{what} {id} is listed twice")));
        }
        faults
    }

    /// Lists each section in a version that the destination reads: the newest that both know.
    pub fn lower_to(&mut self, reads: &Reads) {
        for id in &mut self.sections {
            id.version = id.version.min(reads.version(&id.kind));
        }
    }

    /// What of the listed sections the destination's parts can't take, and which parts get none.
    #[must_use]
    pub fn section_reasons(&self, parts: &[SectionId]) -> Vec<String> {
        let mut reasons = Vec::new();
        for id in &self.sections {
            let same = |part: &&SectionId| part.kind == id.kind && part.instance == id.instance;
            match parts.iter().find(same) {
                None => {
                    reasons.push(format!("no part here takes section {}/{}", id.kind, id.instance))
                }
                Some(part) if id.version > part.version => reasons.push(format!(
                    "section {id} is newer than this vmm, which reads up to version {}",
                    part.version
                )),
                Some(_) if id.version == 0 => reasons.push(format!("section {id} can't be")),
                Some(_) => {}
            }
        }
        for part in parts {
            if !self.sections.iter().any(|id| id.kind == part.kind && id.instance == part.instance)
            {
                reasons.push(format!("section {}/{} is missing", part.kind, part.instance));
            }
        }
        reasons
    }

    /// How sections that came differ from those listed: none may be missing, unknown or there twice.
    #[must_use]
    pub fn mismatch(&self, sections: &[Section]) -> Vec<String> {
        let mut listed: BTreeSet<_> =
            self.sections.iter().map(|id| (id.kind.as_str(), id.instance, id.version)).collect();
        let mut reasons = Vec::new();
        for Section { kind, instance, version, .. } in sections {
            if !listed.remove(&(kind.as_str(), *instance, *version)) {
                let found = format!("section {kind}/{instance} version {version}");
                reasons.push(format!("{found} was not announced, or came twice"));
            }
        }
        let missing = |(kind, instance, version)| {
            format!("section {kind}/{instance} version {version} is missing")
        };
        reasons.extend(listed.into_iter().map(missing));
        reasons
    }
}

/// A guest's sections as they come, within their limits.
#[derive(Debug, Default)]
pub(crate) struct Sections {
    list: Vec<Section>,
    bytes: usize,
}

impl Sections {
    /// Takes one more. Gives whether a guest may have so much.
    #[must_use]
    pub(crate) fn push(&mut self, section: Section) -> bool {
        self.bytes += section.body.len();
        let fits = self.list.len() < SECTIONS_MAX && self.bytes <= SECTIONS_BYTES_MAX;
        if fits {
            self.list.push(section);
        }
        fits
    }

    /// How many came.
    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    /// All that came.
    pub(crate) fn into_vec(self) -> Vec<Section> {
        self.list
    }
}

fn layout_fault(space: &Space) -> Option<String> {
    let regions = &space.regions;
    if regions.is_empty() || regions.len() > REGIONS_MAX {
        return Some(format!("{} RAM regions, expected 1 to {REGIONS_MAX}", regions.len()));
    }
    let mut end = 0;
    for region in regions {
        match region.run() {
            Some(run) if run.first() >= end => end = run.end(),
            _ => return Some(format!("RAM region at page {} is invalid", region.first_page)),
        }
    }
    None
}
