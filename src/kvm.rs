//! `/dev/kvm` itself: opened, asked for what a machine needs, and for a VM.

use std::io;

use kvm_ioctls::{Kvm, VmFd};

use crate::arch;
use crate::machine::MachineError;

/// Opens `/dev/kvm`.
///
/// # Errors
/// It is missing, closed to us, or lacks a capability that a machine needs.
pub fn open_kvm() -> Result<Kvm, MachineError> {
    let kvm = Kvm::new().map_err(|e| {
        let why = io::Error::from_raw_os_error(e.errno());
        MachineError::NoKvm(match e.errno() {
            libc::ENOENT => "/dev/kvm is missing: load kvm-intel or kvm-amd, and turn on \
                             virtualization in the firmware (or nested, in the host of this VM)"
                .to_owned(),
            libc::EACCES | libc::EPERM => {
                "/dev/kvm: permission denied: join the group that owns it (usermod -aG kvm USER) \
                 or run as root"
                    .to_owned()
            }
            _ => format!("/dev/kvm can't be opened: {why}"),
        })
    })?;
    for (cap, name) in arch::REQUIRED_CAPS {
        if !kvm.check_extension(*cap) {
            return Err(MachineError::Capability(name));
        }
    }
    Ok(kvm)
}

/// Makes a VM (KVM API section 4.2). KVM gives up with EINTR where a signal comes meanwhile, such as the stop of a debugger.
///
/// # Errors
/// KVM's.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, MachineError> {
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            made => return made.map_err(MachineError::kvm("create a VM")),
        }
    }
}
