//! CPU models: which CPU features a guest is shown, so that it can move between unlike hosts.
//!
//! A model is a mask for each register of feature bits. The guest gets exactly the model's features:
//! one that this host lacks is an error that names it, one that the model doesn't name is hidden. What
//! KVM provides on any CPU (its clock, the x2APIC) is no part of a model. Addresses have the host's bits, but for those
//! that a model has fewer of. Everything else of CPUID (brand, caches) stays the host's where the guest boots, and goes
//! with the guest when it moves.
//!
//! The two built-in models hide the bits of mitigations too, as those differ from CPU to CPU: a guest
//! that needs them is better off with the common model of its hosts (`vmm cpu --common A B`).

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::path::Path;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::cpu_features::{FEATURE_REGISTERS, FeatureRegister};
use super::cpu_levels::{PHYSICAL_BITS, V2, V3, bits_in};
use super::cpuid::{Reg, find, from_entries, set_xsave_size};
use crate::config::CpuModel;

/// Longest model file, in bytes.
const FILE_LEN_MAX: u64 = 64 << 10;
/// Leaf of XSAVE's components.
const XSAVE: u32 = 0xd;
/// Leaf of the bits of addresses.
const ADDRESSES: u32 = 0x8000_0008;
/// Bits of a physical address on any CPU with long mode, as far as paging goes.
const PHYSICAL: RangeInclusive<u8> = 32..=52;
/// Bits of a linear address with paging of four levels.
const LINEAR_BITS: u8 = 48;

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
    /// RAM that no address reaches.
    #[error(
        "the RAM goes to {last:#x}: physical addresses of {bits} bits, as --cpu-model {model} has here, don't reach it"
    )]
    Narrow {
        /// The model's name.
        model: String,
        /// Bits of a physical address.
        bits: u8,
        /// The RAM's last byte.
        last: u64,
    },
}

/// A CPU model, as its JSON file has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// For messages.
    pub name: String,
    /// The most bits of a physical address, 32 to 52; the host's where it isn't there, as in files of an earlier `vmm`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub physical_bits: Option<u8>,
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
        let [physical_bits, ..] = address_bits(host.as_slice());
        let physical_bits = Some(physical_bits).filter(|bits| PHYSICAL.contains(bits));
        Self::from_bits("host", physical_bits, |r| bits_of(host.as_slice(), r))
    }

    /// The psABI's level x86-64-v2, with the paging and system features of every such CPU.
    #[must_use]
    pub fn v2() -> Self {
        Self::from_bits("x86-64-v2", Some(PHYSICAL_BITS), |r| bits_in(V2, r))
    }

    /// The psABI's level x86-64-v3, with what else every server CPU since Haswell and Zen has.
    #[must_use]
    pub fn v3() -> Self {
        Self::from_bits("x86-64-v3", Some(PHYSICAL_BITS), |r| bits_in(V2, r) | bits_in(V3, r))
    }

    /// The features that both models have.
    #[must_use]
    pub fn common(a: &Self, b: &Self) -> Self {
        let physical_bits = a.physical_bits.into_iter().chain(b.physical_bits).min();
        let name = format!("{} and {}", a.name, b.name);
        Self::from_bits(&name, physical_bits, |r| a.bits(r) & b.bits(r))
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
        self.narrow_addresses(&mut entries);
        drop_xsave_components(&mut entries);
        Ok(from_entries(&entries))
    }

    /// No more bits of a physical address than the model has, and no more of a linear one than paging of four levels takes,
    /// but with LA57.
    fn narrow_addresses(&self, entries: &mut [kvm_cpuid_entry2]) {
        let la57 = entry(entries, 7, 0).is_some_and(|e| e.ecx >> 16 & 1 == 1);
        let Some(e) = find(entries, ADDRESSES, 0) else { return };
        let [physical, linear, guest, other] = e.eax.to_le_bytes();
        let physical = physical.min(self.physical_bits.unwrap_or(physical));
        let linear = if la57 { linear } else { linear.min(LINEAR_BITS) };
        // Bits that nested guests have, if not as many.
        let guest = if guest > physical { 0 } else { guest };
        e.eax = u32::from_le_bytes([physical, linear, guest, other]);
    }

    fn from_bits(
        name: &str,
        physical_bits: Option<u8>,
        bits: impl Fn(&FeatureRegister) -> u32,
    ) -> Self {
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
        Self { name: name.to_owned(), physical_bits, leaves }
    }

    fn bits(&self, r: &FeatureRegister) -> u32 {
        let leaf = self.leaves.iter().find(|l| (l.leaf.0, l.subleaf.0) == (r.leaf, r.subleaf));
        leaf.map_or(0, |l| l.reg(r.reg)) & r.bits & !r.by_kvm
    }

    /// What isn't a feature can't be modelled, and what is listed twice is a mistake.
    fn check(&self) -> Result<(), String> {
        if let Some(bits) = self.physical_bits.filter(|bits| !PHYSICAL.contains(bits)) {
            return Err(format!("physical addresses have 32 to 52 bits, not {bits}"));
        }
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

/// The CPUID that a guest of the chosen model, whose RAM has this last byte, sees on this host (`host` is
/// [`super::cpuid::host_cpuid`]'s).
///
/// # Errors
/// See [`ModelError`].
pub fn apply(choice: &CpuModel, host: &CpuId, ram_last: u64) -> Result<CpuId, ModelError> {
    let guest = match choice {
        CpuModel::Host => host.clone(),
        CpuModel::V2 => Model::v2().apply(host)?,
        CpuModel::V3 => Model::v3().apply(host)?,
        CpuModel::File(path) => Model::load(path)?.apply(host)?,
    };
    let [bits, _] = address_bits(guest.as_slice());
    // A host that tells no bits isn't held to any.
    if bits != 0 && ram_last.checked_shr(bits.into()).is_some_and(|beyond| beyond > 0) {
        return Err(ModelError::Narrow { model: choice.to_string(), bits, last: ram_last });
    }
    Ok(guest)
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
    let widths = address_bits(guest).into_iter().zip(address_bits(host));
    for ((a, b), what) in widths.zip(["physical", "linear"]) {
        if a > b {
            missing.push(format!("{what} addresses of {a} bits (here {b})"));
        }
    }
    missing
}

fn entry(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<kvm_cpuid_entry2> {
    entries.iter().find(|e| (e.function, e.index) == (leaf, subleaf)).copied()
}

fn bits_of(entries: &[kvm_cpuid_entry2], r: &FeatureRegister) -> u32 {
    entry(entries, r.leaf, r.subleaf).map_or(0, |e| r.reg.get(&e)) & r.bits
}

/// Bits of a physical address, and of a linear one.
fn address_bits(entries: &[kvm_cpuid_entry2]) -> [u8; 2] {
    let [physical, linear, ..] = entry(entries, ADDRESSES, 0).unwrap_or_default().eax.to_le_bytes();
    [physical, linear]
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
