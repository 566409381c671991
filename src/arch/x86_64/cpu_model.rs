//! CPU models: which CPU features a guest is shown, so that it can move between unlike hosts.
//!
//! A model is a mask for each register of feature bits. The guest gets exactly the model's features:
//! one that this host lacks is an error that names it, one that the model doesn't name is hidden. What
//! KVM provides on any CPU (its clock, the x2APIC) is no part of a model. Everything else of CPUID
//! (brand, caches) stays the host's where the guest boots, and goes with the guest when it moves.
//!
//! The two built-in models hide the bits of mitigations too, as those differ from CPU to CPU: a guest
//! that needs them is better off with the common model of its hosts (`vmm cpu --common A B`).

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::cpu_features::{FEATURE_REGISTERS, FeatureRegister};
use super::cpuid::{Reg, find, from_entries, set_xsave_size};
use crate::config::CpuModel;

/// Longest model file, in bytes.
const FILE_LEN_MAX: u64 = 64 << 10;
/// Leaf of XSAVE's components.
const XSAVE: u32 = 0xd;

/// Why a CPU model can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The host's CPU or KVM doesn't have it all.
    #[error("CPU model {model} needs what this host lacks: {features}")]
    Lacks {
        /// The model's name.
        model: String,
        /// Names of features.
        features: String,
    },
    /// No such file, or not readable.
    #[error("can't read CPU model {path}")]
    Read {
        /// As given.
        path: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Not a model.
    #[error("{path} is not a CPU model as `vmm cpu` prints it: {why}")]
    Parse {
        /// As given.
        path: String,
        /// What is wrong.
        why: String,
    },
}

/// A CPU model, as its JSON file has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// For messages.
    pub name: String,
    /// The features, by CPUID leaf and subleaf; those that aren't listed have none.
    pub leaves: Vec<ModelLeaf>,
}

/// The features of one leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelLeaf {
    /// CPUID's EAX on input.
    pub leaf: Hex,
    /// CPUID's ECX on input.
    #[serde(default)]
    pub subleaf: Hex,
    /// Bits of EAX.
    #[serde(default, skip_serializing_if = "Hex::is_zero")]
    pub eax: Hex,
    /// Bits of EBX.
    #[serde(default, skip_serializing_if = "Hex::is_zero")]
    pub ebx: Hex,
    /// Bits of ECX.
    #[serde(default, skip_serializing_if = "Hex::is_zero")]
    pub ecx: Hex,
    /// Bits of EDX.
    #[serde(default, skip_serializing_if = "Hex::is_zero")]
    pub edx: Hex,
}

/// A number that JSON holds as a string like `"0x1f"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hex(pub u32);

impl Hex {
    fn is_zero(&self) -> bool {
        self.0 == 0
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.strip_prefix("0x")
            .and_then(|digits| u32::from_str_radix(digits, 16).ok())
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom(format!("{text:?} is no number like \"0x1f\"")))
    }
}

impl ModelLeaf {
    fn new(leaf: u32, subleaf: u32) -> Self {
        let zero = Hex(0);
        let (leaf, subleaf) = (Hex(leaf), Hex(subleaf));
        Self { leaf, subleaf, eax: zero, ebx: zero, ecx: zero, edx: zero }
    }

    fn reg(&self, reg: Reg) -> u32 {
        match reg {
            Reg::Eax => self.eax.0,
            Reg::Ebx => self.ebx.0,
            Reg::Ecx => self.ecx.0,
            Reg::Edx => self.edx.0,
        }
    }

    fn set(&mut self, reg: Reg, bits: u32) {
        match reg {
            Reg::Eax => self.eax = Hex(bits),
            Reg::Ebx => self.ebx = Hex(bits),
            Reg::Ecx => self.ecx = Hex(bits),
            Reg::Edx => self.edx = Hex(bits),
        }
    }
}

impl Model {
    /// All that a host offers (`host` is [`super::cpuid::host_cpuid`]'s).
    #[must_use]
    pub fn of_host(host: &CpuId) -> Self {
        Self::from_bits("host", |r| bits_of(host.as_slice(), r))
    }

    /// The psABI's level x86-64-v2, with the paging and system features of every such CPU.
    #[must_use]
    pub fn v2() -> Self {
        Self::from_bits("x86-64-v2", |r| V2.iter().find(|b| at(b, r)).map_or(0, |b| b.3))
    }

    /// The psABI's level x86-64-v3, with what else every server CPU since Haswell and Zen has.
    #[must_use]
    pub fn v3() -> Self {
        let of =
            |set: &[Bits], r: &FeatureRegister| set.iter().find(|b| at(b, r)).map_or(0, |b| b.3);
        Self::from_bits("x86-64-v3", |r| of(V2, r) | of(V3, r))
    }

    /// The features that both models have.
    #[must_use]
    pub fn common(a: &Self, b: &Self) -> Self {
        Self::from_bits(&format!("{} and {}", a.name, b.name), |r| a.bits(r) & b.bits(r))
    }

    /// Reads a model's file.
    ///
    /// # Errors
    /// See [`ModelError`].
    pub fn load(path: &Path) -> Result<Self, ModelError> {
        let shown = || path.display().to_string();
        let parse = |why: String| ModelError::Parse { path: shown(), why };
        let mut text = String::new();
        File::open(path)
            .and_then(|file| file.take(FILE_LEN_MAX + 1).read_to_string(&mut text))
            .map_err(|source| ModelError::Read { path: shown(), source })?;
        if u64::try_from(text.len()).is_ok_and(|len| len > FILE_LEN_MAX) {
            return Err(parse(format!("it is longer than {FILE_LEN_MAX} bytes")));
        }
        let model: Self = serde_json::from_str(&text).map_err(|e| parse(e.to_string()))?;
        model.check().map_err(parse)?;
        Ok(model)
    }

    /// As a file that [`Self::load`] reads.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("strings and numbers only") + "\n"
    }

    /// The CPUID of a guest of this model on this host.
    ///
    /// # Errors
    /// The features that the host lacks, by name.
    pub fn apply(&self, host: &CpuId) -> Result<CpuId, ModelError> {
        let mut entries = host.as_slice().to_vec();
        let mut lacks = Vec::new();
        for r in FEATURE_REGISTERS {
            let (wanted, has) = (self.bits(r), bits_of(&entries, r));
            lacks.extend(r.names(wanted & !has));
            if let Some(e) = find(&mut entries, r.leaf, r.subleaf) {
                *r.reg.of(e) &= wanted | !r.bits | r.by_kvm;
            }
        }
        if !lacks.is_empty() {
            return Err(ModelError::Lacks { model: self.name.clone(), features: lacks.join(", ") });
        }
        drop_xsave_components(&mut entries);
        Ok(from_entries(&entries))
    }

    fn from_bits(name: &str, bits: impl Fn(&FeatureRegister) -> u32) -> Self {
        let mut leaves: Vec<ModelLeaf> = Vec::new();
        for r in FEATURE_REGISTERS {
            let bits = bits(r) & r.bits & !r.by_kvm;
            if bits == 0 {
                continue;
            }
            let at = leaves.iter().position(|l| (l.leaf.0, l.subleaf.0) == (r.leaf, r.subleaf));
            let at = at.unwrap_or_else(|| {
                leaves.push(ModelLeaf::new(r.leaf, r.subleaf));
                leaves.len() - 1
            });
            leaves[at].set(r.reg, bits);
        }
        Self { name: name.to_owned(), leaves }
    }

    fn bits(&self, r: &FeatureRegister) -> u32 {
        let leaf = self.leaves.iter().find(|l| (l.leaf.0, l.subleaf.0) == (r.leaf, r.subleaf));
        leaf.map_or(0, |l| l.reg(r.reg)) & r.bits & !r.by_kvm
    }

    /// What isn't a feature can't be modelled, and what is listed twice is a mistake.
    fn check(&self) -> Result<(), String> {
        for (i, leaf) in self.leaves.iter().enumerate() {
            let at = format!("leaf {:#x}, subleaf {:#x}", leaf.leaf.0, leaf.subleaf.0);
            let same = |l: &ModelLeaf| (l.leaf, l.subleaf) == (leaf.leaf, leaf.subleaf);
            if self.leaves[..i].iter().any(same) {
                return Err(format!("{at} is there twice"));
            }
            for reg in Reg::ALL {
                let known = FEATURE_REGISTERS
                    .iter()
                    .find(|r| (r.leaf, r.subleaf, r.reg) == (leaf.leaf.0, leaf.subleaf.0, reg));
                let stray = leaf.reg(reg) & !known.map_or(0, |r| r.bits & !r.by_kvm);
                if stray != 0 {
                    return Err(format!("{at}: {reg:?} bits {stray:#x} are no CPU features"));
                }
            }
        }
        Ok(())
    }
}

/// The CPUID that a guest of the chosen model sees on this host (`host` is [`super::cpuid::host_cpuid`]'s).
///
/// # Errors
/// See [`ModelError`].
pub fn apply(choice: &CpuModel, host: &CpuId) -> Result<CpuId, ModelError> {
    match choice {
        CpuModel::Host => Ok(host.clone()),
        CpuModel::V2 => Model::v2().apply(host),
        CpuModel::V3 => Model::v3().apply(host),
        CpuModel::File(path) => Model::load(path)?.apply(host),
    }
}

/// Why a guest with this CPUID can't go on at a host: each feature that is missing there, by name, and
/// whatever else differs and can't. Empty if it can. `host` is [`super::cpuid::host_cpuid`]'s there.
#[must_use]
pub fn missing(guest: &CpuId, host: &CpuId) -> Vec<String> {
    let (guest, host) = (guest.as_slice(), host.as_slice());
    let mut missing = Vec::new();
    let vendor = |entries| {
        let e = entry(entries, 0, 0).unwrap_or_default();
        [e.ebx, e.edx, e.ecx]
    };
    if vendor(guest) != vendor(host) {
        let (a, b) = (vendor_name(vendor(guest)), vendor_name(vendor(host)));
        missing.push(format!("a CPU of {a} (this is {b})"));
    }
    for r in FEATURE_REGISTERS {
        missing.extend(r.names(bits_of(guest, r) & !bits_of(host, r)));
    }
    for component in guest.iter().filter(|e| e.function == XSAVE && e.index >= 2 && e.eax != 0) {
        let there = entry(host, XSAVE, component.index).unwrap_or_default();
        // Size and offset; a component that is missing as a whole is named above.
        if there.eax != 0 && (there.eax, there.ebx) != (component.eax, component.ebx) {
            missing.push(format!(
                "XSAVE component {} of {} bytes at {} (here {} at {})",
                component.index, component.eax, component.ebx, there.eax, there.ebx
            ));
        }
    }
    let widths = |entries| entry(entries, 0x8000_0008, 0).unwrap_or_default().eax;
    for (shift, what) in [(0, "physical"), (8, "linear")] {
        let (a, b) = (widths(guest) >> shift & 0xff, widths(host) >> shift & 0xff);
        if a > b {
            missing.push(format!("{what} addresses of {a} bits (here {b})"));
        }
    }
    missing
}

/// Feature bits: leaf, subleaf, register, bits.
type Bits = (u32, u32, Reg, u32);

fn at(bits: &Bits, r: &FeatureRegister) -> bool {
    (bits.0, bits.1, bits.2) == (r.leaf, r.subleaf, r.reg)
}

/// x86-64-v2 and what every CPU since Nehalem and Bulldozer has.
const V2: &[Bits] = &[
    // sse3 ssse3 cx16 sse4_1 sse4_2 popcnt
    (1, 0, Reg::Ecx, 1 << 0 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23),
    // fpu de pse tsc msr pae mce cx8 sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2
    (1, 0, Reg::Edx, 0x078b_f9fd),
    // lahf_lm
    (0x8000_0001, 0, Reg::Ecx, 1 << 0),
    // syscall nx rdtscp lm
    (0x8000_0001, 0, Reg::Edx, 1 << 11 | 1 << 20 | 1 << 27 | 1 << 29),
];

/// What x86-64-v3 adds, and what every server CPU since Haswell and Zen has beside it.
const V3: &[Bits] = &[
    // pclmulqdq fma movbe aes xsave avx f16c rdrand
    (1, 0, Reg::Ecx, 1 << 1 | 1 << 12 | 1 << 22 | 1 << 25 | 1 << 26 | 1 << 28 | 1 << 29 | 1 << 30),
    // fsgsbase bmi1 avx2 smep bmi2
    (7, 0, Reg::Ebx, 1 << 0 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 8),
    // x87 sse avx
    (0xd, 0, Reg::Eax, 7),
    // xsaveopt
    (0xd, 1, Reg::Eax, 1),
    // abm (lzcnt)
    (0x8000_0001, 0, Reg::Ecx, 1 << 5),
    // pdpe1gb
    (0x8000_0001, 0, Reg::Edx, 1 << 26),
];

fn entry(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<kvm_cpuid_entry2> {
    entries.iter().find(|e| (e.function, e.index) == (leaf, subleaf)).copied()
}

fn bits_of(entries: &[kvm_cpuid_entry2], r: &FeatureRegister) -> u32 {
    entry(entries, r.leaf, r.subleaf).map_or(0, |e| r.reg.get(&e)) & r.bits
}

/// Drops the XSAVE components that leaf 0xD.0 EAX no longer names, and all of the leaf without XSAVE.
fn drop_xsave_components(entries: &mut Vec<kvm_cpuid_entry2>) {
    let xsave = entry(entries, 1, 0).is_some_and(|e| e.ecx >> 26 & 1 == 1);
    let enabled = entry(entries, XSAVE, 0).map_or(0, |e| e.eax);
    entries.retain(|e| {
        e.function != XSAVE || xsave && (e.index < 2 || e.index < 32 && enabled >> e.index & 1 == 1)
    });
    set_xsave_size(entries);
}

fn vendor_name(words: [u32; 3]) -> String {
    let mut name = String::new();
    for byte in words.iter().flat_map(|w| w.to_le_bytes()) {
        let shown = if byte.is_ascii_graphic() { char::from(byte) } else { '?' };
        write!(name, "{shown}").expect("a String takes everything");
    }
    name
}

#[cfg(test)]
#[path = "cpu_model_tests.rs"]
mod tests;
