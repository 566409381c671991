//! kvmclock as the guest sees it: what KVM last wrote for a vCPU into guest RAM, and the TSC since.
//!
//! The layout and the sum are those of Documentation/virt/kvm/x86/msr.rst, `MSR_KVM_SYSTEM_TIME_NEW`. Where KVM's
//! own clock isn't made from the TSC (no master clock), the two drift apart until KVM writes anew.

use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};
use vmm_devices::GuestRam;

use super::msr;

/// `struct pvclock_vcpu_time_info`.
const LEN: usize = 32;
/// In the MSR: KVM writes the page.
const ENABLED: u64 = 1;

/// The time that the guest would read on this vCPU when its TSC is `tsc`, in nanoseconds. `None`: it has no such
/// page, or what stands there is no clock.
#[must_use]
pub fn seen_ns(vcpu: &VcpuFd, ram: &GuestRam, tsc: u64) -> Option<u64> {
    let page = msr::get(vcpu, msr::index::KVM_SYSTEM_TIME_NEW).ok()??;
    if page & ENABLED == 0 {
        return None;
    }
    let mut info = [0; LEN];
    ram.read_slice(&mut info, GuestAddress(page & !ENABLED)).ok()?;
    at(&info, tsc)
}

fn at(info: &[u8; LEN], tsc: u64) -> Option<u64> {
    let word = |at: usize| Some(u32::from_le_bytes(*info.get(at..)?.first_chunk()?));
    let long = |at: usize| Some(u64::from_le_bytes(*info.get(at..)?.first_chunk()?));
    let (version, tsc_then, system_ns) = (word(0)?, long(8)?, long(16)?);
    let (multiplier, shift) = (word(24)?, i8::from_le_bytes([info[28]]));
    // Odd: KVM is writing. Zero: it never did.
    if version == 0 || version % 2 != 0 || !(-32..=31).contains(&shift) {
        return None;
    }
    let ticks = u128::from(tsc.checked_sub(tsc_then)?);
    let by = u32::from(shift.unsigned_abs());
    let shifted = if shift < 0 { ticks >> by } else { ticks << by };
    let since_ns = shifted.checked_mul(u128::from(multiplier))? >> 32;
    system_ns.checked_add(u64::try_from(since_ns).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(version: u32, multiplier: u32, shift: i8) -> [u8; LEN] {
        let mut info = [0; LEN];
        info[..4].copy_from_slice(&version.to_le_bytes());
        info[8..16].copy_from_slice(&1000_u64.to_le_bytes());
        info[16..24].copy_from_slice(&5_000_000_u64.to_le_bytes());
        info[24..28].copy_from_slice(&multiplier.to_le_bytes());
        info[28] = shift.to_le_bytes()[0];
        info
    }

    #[test]
    fn time_goes_on_with_the_tsc() {
        // 2 GHz: half a nanosecond a tick; 500 MHz: two, as one shifted left.
        assert_eq!(at(&info(2, 1 << 31, 0), 1000), Some(5_000_000));
        assert_eq!(at(&info(2, 1 << 31, 0), 3000), Some(5_001_000));
        assert_eq!(at(&info(2, 1 << 31, 2), 3000), Some(5_004_000));
        assert_eq!(at(&info(2, 1 << 31, -1), 3000), Some(5_000_500));
    }

    #[test]
    fn what_is_no_clock_tells_nothing() {
        assert_eq!(at(&[0; LEN], 3000), None);
        assert_eq!(at(&info(3, 1 << 31, 0), 3000), None);
        assert_eq!(at(&info(2, 1 << 31, 0), 999), None);
        assert_eq!(at(&info(2, u32::MAX, 31), u64::MAX), None);
        for shift in [i8::MIN, -33, 32, i8::MAX] {
            assert_eq!(at(&info(2, 1, shift), 3000), None);
        }
    }
}
