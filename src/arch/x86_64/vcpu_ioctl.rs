//! Calls on a vCPU that kvm-ioctls doesn't have: its TSC offset, its banks of machine-check registers, and
//! faults taken ahead.
//!
//! The TSC offset is guest TSC less host TSC (scaled to the guest's frequency), a device attribute of
//! the vCPU (Documentation/virt/kvm/devices/vcpu.rst, `KVM_VCPU_TSC_OFFSET`; Linux 5.16).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_pre_fault_memory,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno::Error;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

// The attributes it has for other architectures' vCPUs only.
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_X86_SETUP_MCE, KVMIO, 0x9c, u64);
ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

fn attribute(address: u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: address,
    }
}

/// Reads the TSC offset; `None` on a kernel that doesn't have the attribute.
pub fn tsc_offset(vcpu: &VcpuFd) -> Result<Option<u64>, Error> {
    let mut value = 0_u64;
    let attr = attribute(std::ptr::from_mut(&mut value).expose_provenance() as u64);
    // SAFETY: a vCPU's file; KVM reads `attr` and writes the eight bytes of `value`, alive and ours.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attr) };
    answer(result).map(|known| known.then_some(value))
}

/// Sets the TSC offset; `false` on a kernel that doesn't have the attribute.
pub fn set_tsc_offset(vcpu: &VcpuFd, value: u64) -> Result<bool, Error> {
    let attr = attribute(std::ptr::from_ref(&value).expose_provenance() as u64);
    // SAFETY: a vCPU's file; KVM reads `attr` and the eight bytes of `value`, which is alive.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attr) };
    answer(result)
}

fn answer(result: i32) -> Result<bool, Error> {
    match result {
        0 => Ok(true),
        _ => match Error::last() {
            // No device attributes on vCPUs at all, not this one, or no such ioctl.
            e if matches!(e.errno(), libc::ENXIO | libc::ENOTTY | libc::EINVAL) => Ok(false),
            e => Err(e),
        },
    }
}

/// Sets `MCG_CAP`, the machine-check capabilities: bits 0 to 7 are the number of banks, 1 to 32.
pub fn set_mcg_cap(vcpu: &VcpuFd, value: u64) -> Result<(), Error> {
    // SAFETY: a vCPU's file; KVM reads the eight bytes of `value`, which is alive.
    match unsafe { ioctl_with_ref(vcpu, KVM_X86_SETUP_MCE(), &value) } {
        0 => Ok(()),
        _ => Err(Error::last()),
    }
}

/// Another descriptor of the vCPU, for calls from another thread; one that runs keeps them waiting.
pub fn duplicate(vcpu: &VcpuFd) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is open for as long as `vcpu` is borrowed.
    unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) }.try_clone_to_owned()
}

/// Takes the page faults of `len` bytes of guest-physical memory at `address` ahead, both multiples of 4 KiB.
pub fn pre_fault(vcpu: &OwnedFd, address: u64, len: u64) -> Result<(), Error> {
    let mut range = kvm_pre_fault_memory { gpa: address, size: len, ..Default::default() };
    while range.size > 0 {
        let before = range.size;
        // SAFETY: a vCPU's file; KVM reads `range` and puts what is left to do there. It maps pages of slots
        // that the VM has, and changes no memory.
        if unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), &mut range) } != 0 {
            let e = Error::last();
            if e.errno() != libc::EINTR {
                return Err(e);
            }
        } else if range.size >= before {
            return Err(Error::new(libc::EIO));
        }
    }
    Ok(())
}
