//! The built-in CPU models: the psABI's levels x86-64-v2 and -v3, with what else every such CPU has.

use super::cpu_features::FeatureRegister;
use super::cpuid::Reg;

/// Bits of their guests' physical addresses, where the host has as many: no Haswell and no Zen has fewer. RAM of some 500
/// GiB fits.
pub(super) const PHYSICAL_BITS: u8 = 39;

/// Feature bits: leaf, subleaf, register, bits.
pub(super) type Bits = (u32, u32, Reg, u32);

/// Those of one register.
pub(super) fn bits_in(set: &[Bits], r: &FeatureRegister) -> u32 {
    let at = |bits: &&Bits| (bits.0, bits.1, bits.2) == (r.leaf, r.subleaf, r.reg);
    set.iter().find(at).map_or(0, |bits| bits.3)
}

/// x86-64-v2 and what every CPU since Nehalem and Bulldozer has.
pub(super) const V2: &[Bits] = &[
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
pub(super) const V3: &[Bits] = &[
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
