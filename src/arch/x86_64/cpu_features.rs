//! CPUID's feature bits by name, as Linux's /proc/cpuinfo has them (Intel SDM 2A CPUID, AMD APM 3
//! appendix E, Documentation/virt/kvm/x86/cpuid.rst).

use super::cpuid::Reg;

/// A register of feature bits.
#[derive(Clone, Copy, Debug)]
pub struct FeatureRegister {
    /// Leaf.
    pub leaf: u32,
    /// Subleaf.
    pub subleaf: u32,
    /// Register.
    pub reg: Reg,
    /// Bits that are a CPU's features: the others follow from the topology, from a control register, or
    /// repeat another leaf's.
    pub bits: u32,
    /// Bits that KVM provides on any CPU, so that a CPU model neither needs nor hides them.
    pub by_kvm: u32,
    /// Names from bit 0 up; `-` is none.
    names: &'static str,
}

impl FeatureRegister {
    /// A bit's name, or where it is.
    #[must_use]
    pub fn name(&self, bit: u32) -> String {
        let known = usize::try_from(bit).ok().and_then(|b| self.names.split_whitespace().nth(b));
        match known {
            Some(name) if name != "-" => name.to_owned(),
            _ => format!("CPUID {:#x}.{:#x} {:?} bit {bit}", self.leaf, self.subleaf, self.reg),
        }
    }

    /// The names of all bits of `value`.
    pub fn names(&self, value: u32) -> impl Iterator<Item = String> + '_ {
        (0..32).filter(move |bit| value >> bit & 1 == 1).map(|bit| self.name(bit))
    }
}

const fn register(leaf: u32, subleaf: u32, reg: Reg, names: &'static str) -> FeatureRegister {
    FeatureRegister { leaf, subleaf, reg, bits: u32::MAX, by_kvm: 0, names }
}

/// Every register of feature bits.
pub const FEATURE_REGISTERS: &[FeatureRegister] = &[
    FeatureRegister {
        // Without OSXSAVE.
        bits: !(1 << 27),
        // x2APIC, TSC deadline, hypervisor.
        by_kvm: 1 << 21 | 1 << 24 | 1 << 31,
        ..register(
            1,
            0,
            Reg::Ecx,
            "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm \
             - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx \
             f16c rdrand hypervisor",
        )
    },
    FeatureRegister {
        // Without APIC, which APIC_BASE turns off, and HTT, which is topology.
        bits: !(1 << 9 | 1 << 28),
        ..register(
            1,
            0,
            Reg::Edx,
            "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - \
             dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
        )
    },
    register(
        7,
        0,
        Reg::Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm \
         zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt \
         avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    FeatureRegister {
        // Without OSPKE.
        bits: !(1 << 4),
        ..register(
            7,
            0,
            Reg::Ecx,
            "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq \
             avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid kl \
             bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
        )
    },
    register(
        7,
        0,
        Reg::Edx,
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl \
         md_clear rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig \
         arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d \
         arch_capabilities core_capabilities spec_ctrl_ssbd",
    ),
    register(
        7,
        1,
        Reg::Eax,
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs \
         fsrc - - - - fred lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam msrlist - - \
         invd_disable movrs",
    ),
    register(
        7,
        1,
        Reg::Edx,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - utmr prefetchiti \
         user_msr - - cet_sss avx10 - apx_f - mwait",
    ),
    register(
        7,
        2,
        Reg::Edx,
        "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no uc_lock_disable monitor_mitg_no",
    ),
    register(
        0xd,
        0,
        Reg::Eax,
        "xcr0_x87 xcr0_sse xcr0_avx xcr0_bndregs xcr0_bndcsr xcr0_opmask xcr0_zmm_hi256 \
         xcr0_hi16_zmm - xcr0_pkru - - - - - - - xcr0_tile_config xcr0_tile_data xcr0_apx",
    ),
    register(0xd, 1, Reg::Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    FeatureRegister {
        // Without CmpLegacy, which is topology.
        bits: !(1 << 1),
        ..register(
            0x8000_0001,
            0,
            Reg::Ecx,
            "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs \
             xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext \
             ptsc perfctr_llc mwaitx addr_mask_ext",
        )
    },
    FeatureRegister {
        // Without AMD's repetition of leaf 1.
        bits: !0x0183_f3ff,
        ..register(
            0x8000_0001,
            0,
            Reg::Edx,
            "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp \
             - lm 3dnowext 3dnow",
        )
    },
    register(0x8000_0007, 0, Reg::Edx, "- - - - - - - - invariant_tsc"),
    register(
        0x8000_0008,
        0,
        Reg::Ebx,
        "clzero irperf xsaveerptr invlpgb rdpru - mba - mcommit wbnoinvd - - amd_ibpb wbinvd_int \
         amd_ibrs amd_stibp amd_ibrs_always_on amd_stibp_always_on amd_ibrs_preferred \
         amd_ibrs_same_mode no_efer_lmsle invlpgb_nested - amd_ppin amd_ssbd virt_ssbd amd_ssb_no \
         cppc amd_psfd btc_no amd_ibpb_ret",
    ),
    register(
        0x8000_0021,
        0,
        Reg::Eax,
        "no_nested_data_bp non_serializing_fsgs_base lfence_rdtsc smm_page_cfg_lock - verw_clear \
         null_sel_clr_base upper_address_ignore auto_ibrs no_smm_ctl_msr fsrs fsrc - \
         prefetch_ctl_msr - - - cpuid_user_dis epsf fast_rep_scasb prefetchi - - - eraps - - sbpb \
         ibpb_brtype srso_no srso_user_kernel_no srso_msr_fix",
    ),
    register(0x8000_0021, 0, Reg::Ecx, "- tsa_sq_no tsa_l1_no"),
    FeatureRegister {
        by_kvm: u32::MAX,
        ..register(
            0x4000_0001,
            0,
            Reg::Eax,
            "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf \
             kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit \
             kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield kvm_async_pf_int \
             kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - \
             kvm_clocksource_stable",
        )
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    fn name(leaf: u32, subleaf: u32, reg: Reg, bit: u32) -> String {
        FEATURE_REGISTERS
            .iter()
            .find(|r| (r.leaf, r.subleaf, r.reg) == (leaf, subleaf, reg))
            .unwrap()
            .name(bit)
    }

    /// The last or a late name of each list, so that one name too many or too few is seen.
    #[test]
    fn names_stand_at_their_bits() {
        for (leaf, subleaf, reg, bit, want) in [
            (1, 0, Reg::Ecx, 31, "hypervisor"),
            (1, 0, Reg::Ecx, 13, "cx16"),
            (1, 0, Reg::Edx, 31, "pbe"),
            (1, 0, Reg::Edx, 26, "sse2"),
            (7, 0, Reg::Ebx, 31, "avx512vl"),
            (7, 0, Reg::Ebx, 18, "rdseed"),
            (7, 0, Reg::Ecx, 31, "pks"),
            (7, 0, Reg::Ecx, 22, "rdpid"),
            (7, 0, Reg::Edx, 31, "spec_ctrl_ssbd"),
            (7, 0, Reg::Edx, 20, "ibt"),
            (7, 1, Reg::Eax, 31, "movrs"),
            (7, 1, Reg::Eax, 22, "hreset"),
            (7, 1, Reg::Edx, 23, "mwait"),
            (7, 2, Reg::Edx, 7, "monitor_mitg_no"),
            (0xd, 0, Reg::Eax, 19, "xcr0_apx"),
            (0xd, 0, Reg::Eax, 9, "xcr0_pkru"),
            (0xd, 1, Reg::Eax, 3, "xsaves"),
            (0x8000_0001, 0, Reg::Ecx, 30, "addr_mask_ext"),
            (0x8000_0001, 0, Reg::Ecx, 22, "topoext"),
            (0x8000_0001, 0, Reg::Edx, 31, "3dnow"),
            (0x8000_0001, 0, Reg::Edx, 20, "nx"),
            (0x8000_0007, 0, Reg::Edx, 8, "invariant_tsc"),
            (0x8000_0008, 0, Reg::Ebx, 30, "amd_ibpb_ret"),
            (0x8000_0008, 0, Reg::Ebx, 24, "amd_ssbd"),
            (0x8000_0021, 0, Reg::Eax, 31, "srso_msr_fix"),
            (0x8000_0021, 0, Reg::Eax, 8, "auto_ibrs"),
            (0x4000_0001, 0, Reg::Eax, 24, "kvm_clocksource_stable"),
            (0x4000_0001, 0, Reg::Eax, 12, "kvm_poll_control"),
            (0xd, 0, Reg::Eax, 25, "CPUID 0xd.0x0 Eax bit 25"),
        ] {
            assert_eq!(name(leaf, subleaf, reg, bit), want);
        }
    }
}
