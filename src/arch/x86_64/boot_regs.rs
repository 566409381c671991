//! The boot CPU's first registers, and the tables they point at.
//!
//! Linux's 64-bit entry wants long mode on an identity map with flat segments (`__BOOT_CS` 0x10,
//! `__BOOT_DS` 0x18) and the zero page in RSI; PVH wants 32-bit protected mode without paging and the
//! start info in EBX. The other CPUs wait for the boot CPU's INIT and SIPI, as KVM creates them.

use kvm_bindings::{Msrs, kvm_dtable, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_devices::GuestRam;

use super::layout;
use super::msr::index::{MCG_CAP, MISC_ENABLE, MTRR_DEF_TYPE};
use super::vcpu_ioctl;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS with nothing but its fixed bit.
const RFLAGS_FIXED: u64 = 1 << 1;

/// Page table entries: present, writable, and a 2 MiB page (Intel SDM 3A, 4.5).
const PAGE_PRESENT: u64 = 1 << 0;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_2M: u64 = 1 << 7;
const TABLE: u64 = 0x1000;
const ENTRIES: u64 = 512;
/// Page directories: 4 GiB are mapped.
const DIRECTORIES: u64 = 4;

/// Top of a small stack for guests that have none of their own yet: below the page tables.
const STACK_TOP: u64 = layout::PAGE_TABLES.0 - 16;

const SELECTOR_CODE: u16 = 0x10;
const SELECTOR_DATA: u16 = 0x18;
const SELECTOR_TSS: u16 = 0x20;

/// `MTRRdefType`: MTRRs on, write-back where no range says otherwise. As firmware leaves it; without,
/// a Linux before 6.3 gives up its page attribute table.
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;
/// `MISC_ENABLE`: fast string operations. Without, Linux on Intel doesn't use `rep movsb`.
const MISC_FAST_STRINGS: u64 = 1;

/// `MCG_CAP`: one bank of machine-check registers. No machine check is ever passed on; a kernel
/// complains where there is no bank, and spends a dozen exits on each of KVM's 32.
const MCG_ONE_BANK: u64 = 1;

/// In which mode a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// 64-bit, paging on: Linux's 64-bit boot protocol.
    Long,
    /// 32-bit, paging off: PVH.
    Protected,
}

/// The boot CPU's registers at its first instruction.
#[derive(Clone, Copy, Debug)]
pub struct BootRegs {
    mode: Mode,
    entry: u64,
    info: u64,
}

impl BootRegs {
    pub(super) fn new(mode: Mode, entry: u64, info: u64) -> Self {
        Self { mode, entry, info }
    }

    /// Sets special registers, registers and FPU of the boot CPU. Its CPUID must be set.
    ///
    /// # Errors
    /// KVM's, for example when it refuses the entry point.
    pub fn apply(&self, vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        let mut sregs = vcpu.get_sregs()?;
        let (code, data, tss) = segments(self.mode);
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = tss;
        let limit = u16::try_from(size_of_val(&gdt(self.mode)) - 1).expect("five entries");
        sregs.gdt = kvm_dtable { base: layout::GDT.0, limit, ..kvm_dtable::default() };
        sregs.idt = kvm_dtable::default();
        sregs.cr0 = CR0_PE | CR0_ET | CR0_NE;
        sregs.cr3 = 0;
        sregs.cr4 = 0;
        sregs.efer = 0;
        if self.mode == Mode::Long {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES.0;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
        vcpu.set_sregs(&sregs)?;

        let mut regs = kvm_regs {
            rip: self.entry,
            rsp: STACK_TOP,
            rbp: STACK_TOP,
            rflags: RFLAGS_FIXED,
            ..kvm_regs::default()
        };
        match self.mode {
            Mode::Long => regs.rsi = self.info,
            Mode::Protected => regs.rbx = self.info,
        }
        vcpu.set_regs(&regs)?;
        // The x87 and SSE control words of a CPU after FNINIT: every exception masked.
        vcpu.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..kvm_fpu::default() })
    }
}

/// What a CPU's design and its firmware set before a kernel sees it. Call it once for each new vCPU, also
/// of a machine that is to be restored. A KVM that refuses these leaves a guest that is slower, not
/// broken: the returned MSRs were refused.
///
/// # Errors
/// KVM's.
pub fn init_msrs(vcpu: &VcpuFd) -> Result<Vec<u32>, kvm_ioctls::Error> {
    init_each(|index, set| {
        if index == MCG_CAP {
            return Ok(vcpu_ioctl::set_mcg_cap(vcpu, set).is_ok());
        }
        let entry = kvm_msr_entry { index, ..kvm_msr_entry::default() };
        let mut msr = Msrs::from_entries(&[entry]).expect("one entry fits");
        if vcpu.get_msrs(&mut msr)? == 0 {
            return Ok(false);
        }
        msr.as_mut_slice()[0].data |= set;
        Ok(vcpu.set_msrs(&msr)? == 1)
    })
}

/// Sets bits in each MSR by `set`, which says whether KVM took them. Returns those that it didn't.
fn init_each<E>(mut set: impl FnMut(u32, u64) -> Result<bool, E>) -> Result<Vec<u32>, E> {
    let mut refused = Vec::new();
    for (index, bits) in [
        (MCG_CAP, MCG_ONE_BANK),
        (MTRR_DEF_TYPE, MTRR_ON_WRITE_BACK),
        (MISC_ENABLE, MISC_FAST_STRINGS),
    ] {
        if !set(index, bits)? {
            refused.push(index);
        }
    }
    Ok(refused)
}

/// What the user is told of the MSRs that KVM refused to all of a machine's vCPUs, each named once.
#[must_use]
pub fn refused_text(mut refused: Vec<u32>) -> Option<String> {
    refused.sort_unstable();
    refused.dedup();
    let names: Vec<_> = refused.iter().map(|index| format!("{index:#x}")).collect();
    let names = (!names.is_empty()).then(|| names.join(", "))?;
    Some(format!("KVM refuses the first value of MSR {names}: the guest may be slower without"))
}

/// Flat code and data segments, and a task state segment that VT-x insists on.
fn segments(mode: Mode) -> (kvm_segment, kvm_segment, kvm_segment) {
    let flat = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let long = u8::from(mode == Mode::Long);
    let code = kvm_segment { selector: SELECTOR_CODE, type_: 11, l: long, db: 1 - long, ..flat };
    let data = kvm_segment { selector: SELECTOR_DATA, type_: 3, db: 1, ..flat };
    let tss = kvm_segment {
        selector: SELECTOR_TSS,
        limit: 0x67,
        type_: 11,
        present: 1,
        ..kvm_segment::default()
    };
    (code, data, tss)
}

/// A segment as its descriptor (Intel SDM 3A, 3.4.5). The base is 0 in all of ours.
fn descriptor(segment: &kvm_segment) -> u64 {
    let bit = |value: u8, at: u32| u64::from(value) << at;
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    (limit & 0xffff)
        | (limit & 0xf_0000) << 32
        | bit(segment.type_, 40)
        | bit(segment.s, 44)
        | bit(segment.dpl, 45)
        | bit(segment.present, 47)
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
}

/// Null, unused, code, data, and the first half of the task state segment's (the second is 0).
fn gdt(mode: Mode) -> [u64; 6] {
    let (code, data, tss) = segments(mode);
    [0, 0, descriptor(&code), descriptor(&data), descriptor(&tss), 0]
}

pub(super) fn write_gdt(ram: &GuestRam, mode: Mode) -> Result<(), GuestMemoryError> {
    let bytes: Vec<u8> = gdt(mode).iter().flat_map(|entry| entry.to_le_bytes()).collect();
    ram.write_slice(&bytes, layout::GDT)
}

/// An identity map of the low 4 GiB in 2 MiB pages.
pub(super) fn write_page_tables(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    let base = layout::PAGE_TABLES.0;
    let flags = PAGE_PRESENT | PAGE_WRITABLE;
    ram.write_slice(&((base + TABLE) | flags).to_le_bytes(), layout::PAGE_TABLES)?;
    let bytes = |entries: &mut dyn Iterator<Item = u64>| -> Vec<u8> {
        entries.flat_map(u64::to_le_bytes).collect()
    };
    let directories = bytes(&mut (0..DIRECTORIES).map(|i| (base + (2 + i) * TABLE) | flags));
    ram.write_slice(&directories, GuestAddress(base + TABLE))?;
    let pages = bytes(&mut (0..DIRECTORIES * ENTRIES).map(|i| i << 21 | PAGE_2M | flags));
    ram.write_slice(&pages, GuestAddress(base + 2 * TABLE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_msr_that_kvm_refuses_is_left_out_and_named_once() {
        let mut seen = Vec::new();
        let refused = init_each(|index, bits| {
            seen.push((index, bits));
            Ok::<_, ()>(index == MTRR_DEF_TYPE)
        });
        assert_eq!(seen, [(MCG_CAP, 1), (MTRR_DEF_TYPE, 0x806), (MISC_ENABLE, 1)]);
        assert_eq!(refused, Ok(vec![MCG_CAP, MISC_ENABLE]));
        assert_eq!(init_each(|_, _| Ok::<_, ()>(true)), Ok(vec![]));
        assert_eq!(init_each(|_, _| Err(5)), Err(5));

        let of_two = vec![MISC_ENABLE, MCG_CAP, MISC_ENABLE, MCG_CAP];
        let text = refused_text(of_two).unwrap();
        assert!(text.contains("MSR 0x179, 0x1a0: the guest may be slower"), "{text}");
        assert_eq!(refused_text(Vec::new()), None);
    }

    #[test]
    fn descriptors_are_the_well_known_ones() {
        // As in Linux's own boot GDT, with the accessed bit set as KVM's segments have it.
        assert_eq!(gdt(Mode::Long)[2], 0x00af_9b00_0000_ffff);
        assert_eq!(gdt(Mode::Protected)[2], 0x00cf_9b00_0000_ffff);
        assert_eq!(gdt(Mode::Long)[3], 0x00cf_9300_0000_ffff);
        assert_eq!(gdt(Mode::Long)[4], 0x0000_8b00_0000_0067);
    }
}
