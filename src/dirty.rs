//! Which pages were written: KVM's dirty log (the vCPUs' writes) united with the bitmap in guest RAM
//! (the devices' and the VMM's own).
//!
//! The log is used with `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: reading it clears nothing, and
//! [`DirtyLog::clear`] re-arms a chunk of pages just before they are sent, so that a page dirtied in
//! between is sent once and `mmu_lock` is held for short times only. With `INITIALLY_SET` turning the
//! log on write-protects nothing, so the guest is not stalled.

use std::io;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use crate::memory::{MemorySlot, PAGE_SIZE};

mod nr {
    //! The ioctl number that kvm-ioctls lacks (KVM API 4.117).
    #![allow(missing_docs, reason = "the macro writes a public function without docs")]
    use super::{KVMIO, ioctl_iowr_nr, kvm_clear_dirty_log};
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}
use nr::KVM_CLEAR_DIRTY_LOG;

/// Asks KVM to let us clear the dirty log ourselves. Returns whether a slot's log starts with all pages
/// set (no stall when it is turned on). Called once, before any memory slot exists.
pub fn enable_manual_protect(vm: &VmFd) -> io::Result<bool> {
    let offered =
        vm.check_extension_raw(u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)).cast_unsigned();
    if offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
        return Err(io::Error::from_raw_os_error(libc::ENOTSUP));
    }
    let wanted = offered & (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
    let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
    cap.args[0] = u64::from(wanted);
    vm.enable_cap(&cap)?;
    Ok(wanted & KVM_DIRTY_LOG_INITIALLY_SET != 0)
}

/// Reads a slot's dirty log (KVM API 4.8): one bit a page, 64 pages a word. Clears nothing.
pub fn read(vm: &VmFd, slot: &MemorySlot) -> io::Result<Vec<u64>> {
    let len = usize::try_from(slot.len).map_err(io::Error::other)?;
    Ok(vm.get_dirty_log(slot.id, len)?)
}

/// Re-arms the pages set in `bits` (KVM API 4.117), which start at page `first` of the slot. `first` is a
/// multiple of 64; `pages` too, unless it reaches the slot's end.
pub fn clear(vm: &VmFd, slot: &MemorySlot, first: u64, pages: u32, bits: &[u64]) -> io::Result<()> {
    let words = usize::try_from(pages.div_ceil(64)).map_err(io::Error::other)?;
    assert!(bits.len() >= words, "a bit for each page to clear");
    assert!((first + u64::from(pages)) * PAGE_SIZE <= slot.len, "pages within the slot");
    let request = kvm_clear_dirty_log {
        slot: slot.id,
        num_pages: pages,
        first_page: first,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bits.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: KVM reads `pages` bits from `dirty_bitmap`, which `bits` holds (asserted above), and
    // writes nothing; `request` lives through the call.
    let answer = unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &request) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
