//! The interrupt controllers that KVM emulates for the whole VM: two PICs, which no guest of ours
//! uses but KVM has, and the I/O APIC. (The local APICs belong to the vCPUs.)

use std::mem::offset_of;

use kvm_bindings::{
    KVM_IOAPIC_NUM_PINS, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_ioapic_state, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vmm_migration::state::{RestoreError, SaveError, Stateful};

use super::kvm_bytes::{decode, encode};

const KIND: &str = "irqchip";

/// The state of the interrupt controllers, version 1. Each field is a `kvm_irqchip`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChipStateV1 {
    /// The first PIC.
    pub pic_master: Vec<u8>,
    /// The second PIC.
    pub pic_slave: Vec<u8>,
    /// The I/O APIC.
    pub ioapic: Vec<u8>,
}

/// The interrupt controllers of a VM, as a part of its machine.
pub struct ChipPart<'a> {
    /// The VM.
    pub vm: &'a VmFd,
}

/// Whether any pin of the I/O APIC is unmasked.
pub(super) fn ioapic_pins_unmasked(vm: &VmFd) -> bool {
    /// Where the redirection table stands in a `kvm_irqchip` that holds a `kvm_ioapic_state`.
    const TABLE: usize = 8 + offset_of!(kvm_ioapic_state, redirtbl);
    /// Byte and bit of an entry's mask (82093AA, 3.2.4: bit 16).
    const MASK: (usize, u8) = (2, 1);
    let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..kvm_irqchip::default() };
    let read = vm.get_irqchip(&mut chip);
    let table = &encode(&chip)[TABLE..][..size_of::<u64>() * KVM_IOAPIC_NUM_PINS as usize];
    read.is_ok() && table.chunks(size_of::<u64>()).any(|entry| entry[MASK.0] & MASK.1 == 0)
}

impl Stateful for ChipPart<'_> {
    const KIND: &'static str = KIND;
    const VERSION: u16 = 1;
    type State = ChipStateV1;

    /// No vCPU runs, and no device raises a line.
    fn save(&self) -> Result<ChipStateV1, SaveError> {
        let get = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
            self.vm.get_irqchip(&mut chip).map(|()| encode(&chip)).map_err(|e| SaveError {
                kind: KIND,
                what: "KVM_GET_IRQCHIP",
                source: e.into(),
            })
        };
        Ok(ChipStateV1 {
            pic_master: get(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: get(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: get(KVM_IRQCHIP_IOAPIC)?,
        })
    }

    fn restore(&mut self, state: ChipStateV1) -> Result<(), RestoreError> {
        let ChipStateV1 { pic_master, pic_slave, ioapic } = state;
        for (id, name, bytes) in [
            (KVM_IRQCHIP_PIC_MASTER, "first PIC", pic_master),
            (KVM_IRQCHIP_PIC_SLAVE, "second PIC", pic_slave),
            (KVM_IRQCHIP_IOAPIC, "I/O APIC", ioapic),
        ] {
            let chip: kvm_irqchip = decode(KIND, name, &bytes)?;
            if chip.chip_id != id {
                let why = format!("the {name} is numbered {}, not {id}", chip.chip_id);
                return Err(RestoreError::Invalid { kind: KIND, why });
            }
            self.vm.set_irqchip(&chip).map_err(|e| RestoreError::Kernel {
                kind: KIND,
                what: "KVM_SET_IRQCHIP",
                source: e.into(),
            })?;
        }
        Ok(())
    }
}
