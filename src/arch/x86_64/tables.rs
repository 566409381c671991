//! The ACPI tables: how a stock kernel finds the CPUs, the devices and the power switch of a machine
//! that has no firmware (ACPI 6.5, hardware-reduced).
//!
//! RSDP, XSDT, FADT, MADT, and a DSDT with COM1, the virtio-mmio devices, the generic event device with
//! the power button, the VM generation id and the `VMClock`. They say as plainly as they can what isn't there (RTC,
//! VGA, keyboard controller, PIC), since a kernel that is left to find out spends its time probing.

use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO,
    If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace, Package,
    Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::Bytes;
use vmm_devices::{GuestRam, power};

use super::layout;

const OEM: [u8; 6] = *b"VMM   ";
const OEM_TABLE: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;
/// Length of a table's header, in bytes.
const HEADER_LEN: u32 = 36;
/// Revision of a DSDT whose integers have 64 bits.
const DSDT_REVISION: u8 = 2;

/// FADT `IAPC_BOOT_ARCH`: no VGA (bit 2), no CMOS RTC (bit 5); neither legacy devices (bit 0) nor a
/// keyboard controller (bit 1).
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;

/// What the tables describe.
#[derive(Clone, Copy, Debug)]
pub struct Description<'a> {
    /// vCPUs, 1 to [`crate::config::CPUS_MAX`]; their APIC ids are 0 up.
    pub cpus: u32,
    /// Each virtio device's register base and interrupt line, in the order of their slots.
    pub virtio: &'a [(u64, u32)],
    /// Address of the VM generation id, if there is one.
    pub vmgenid_address: Option<u64>,
    /// Address of the page of the `VMClock`, if there is one.
    pub vmclock_address: Option<u64>,
}

/// Why the tables can't be written.
#[derive(Debug, thiserror::Error)]
pub enum TablesError {
    /// Too many devices for the room.
    #[error("the ACPI tables need {needed} bytes, there is room for {room}")]
    Room {
        /// Bytes needed.
        needed: u64,
        /// Bytes that fit.
        room: u64,
    },
    /// A device or CPU that ACPI's 32-bit resources or 8-bit ids can't name.
    #[error("{0:#x} can't be described in an ACPI table")]
    Range(u64),
    /// The RAM ends below the tables.
    #[error("the guest's RAM has no room for the ACPI tables: give the machine more memory")]
    Memory,
}

/// Writes the tables into guest RAM, and returns the address of the RSDP.
///
/// # Errors
/// See [`TablesError`].
pub fn build(ram: &GuestRam, d: &Description<'_>) -> Result<u64, TablesError> {
    let mut room = Room { bytes: vec![0; Rsdp::len()] };
    let dsdt = room.add(&bytes(&dsdt(d)?));
    let fadt = room.add(&bytes(&fadt(dsdt)));
    let madt = room.add(&bytes(&madt(d.cpus)?));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = room.add(&bytes(&xsdt));
    room.bytes[..Rsdp::len()].copy_from_slice(&bytes(&Rsdp::new(OEM, xsdt)));

    let (needed, room_len) = (room.end() - layout::ACPI.0, layout::ACPI_END - layout::ACPI.0);
    if needed > room_len {
        return Err(TablesError::Room { needed, room: room_len });
    }
    ram.write_slice(&room.bytes, layout::ACPI).map_err(|_| TablesError::Memory)?;
    Ok(layout::ACPI.0)
}

/// Tables one after another from [`layout::ACPI`].
struct Room {
    bytes: Vec<u8>,
}

impl Room {
    /// Appends a table at a multiple of 16, and returns its address.
    fn add(&mut self, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let address = self.end();
        self.bytes.extend_from_slice(table);
        address
    }

    fn end(&self) -> u64 {
        layout::ACPI.0 + u64::try_from(self.bytes.len()).expect("64-bit host")
    }
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut sink = Vec::new();
    aml.to_aml_bytes(&mut sink);
    sink
}

/// An 8-bit register in port space.
fn port(offset: u64) -> GAS {
    let address = u64::from(layout::POWER_PORT) + offset;
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
}

fn fadt(dsdt: u64) -> impl Aml {
    // In a hardware-reduced machine the two button flags mean: not in the fixed hardware.
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS);
    fadt.finalize()
}

/// The interrupt controllers. Its flags say that there are no PICs.
fn madt(cpus: u32) -> Result<MADT, TablesError> {
    let mut madt = MADT::new(
        OEM,
        OEM_TABLE,
        OEM_REVISION,
        LocalInterruptController::Address(layout::LAPIC_BASE),
    );
    for cpu in 0..cpus {
        // 255 is every CPU's address, and no CPU's.
        let id = u8::try_from(cpu).ok().filter(|id| *id < 255);
        let id = id.ok_or(TablesError::Range(u64::from(cpu)))?;
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC_BASE, 0));
    Ok(madt)
}

/// A DSDT: its header, then what `children` write.
struct Dsdt(Vec<u8>);

impl Aml for Dsdt {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let mut sdt = Sdt::new(*b"DSDT", HEADER_LEN, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
        sdt.append_slice(&self.0);
        sink.vec(sdt.as_slice());
    }
}

fn dsdt(d: &Description<'_>) -> Result<Dsdt, TablesError> {
    let mut aml = Vec::new();
    let s5 = Package::new(vec![&power::SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]);
    Name::new("_S5_".into(), &s5).to_aml_bytes(&mut aml);
    let mut devices = serial();
    devices.extend(power_button());
    if let Some(address) = d.vmgenid_address {
        devices.extend(vmgenid(address)?);
    }
    if let Some(address) = d.vmclock_address {
        devices.extend(vmclock(address)?);
    }
    devices.extend(event_device(d.vmgenid_address.is_some()));
    for (slot, &(base, gsi)) in d.virtio.iter().enumerate() {
        devices.extend(virtio(slot, base, gsi)?);
    }
    aml.extend(Scope::raw("_SB_".into(), devices));
    Ok(Dsdt(aml))
}

/// A resource: an interrupt line, edge-triggered, active high, for one device alone.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn serial() -> Vec<u8> {
    let ports = u8::try_from(layout::SERIAL_PORTS).expect("eight");
    bytes(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, ports),
                    &edge(layout::SERIAL_GSI),
                ]),
            ),
        ],
    ))
}

fn power_button() -> Vec<u8> {
    bytes(&Device::new(
        "PWRB".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &ZERO),
        ],
    ))
}

/// Microsoft's "Virtual Machine Generation ID": where the id is.
fn vmgenid(address: u64) -> Result<Vec<u8>, TablesError> {
    let half = |value: u64| u32::try_from(value).map_err(|_| TablesError::Range(address));
    let (low, high) = (half(address & 0xffff_ffff)?, half(address >> 32)?);
    Ok(bytes(&Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"VMGENCTR"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    )))
}

/// The UAPI group's `VMClock`: where its page is.
fn vmclock(address: u64) -> Result<Vec<u8>, TablesError> {
    let base = u32::try_from(address).map_err(|_| TablesError::Range(address))?;
    let page = Memory32Fixed::new(false, base, layout::VMCLOCK_PAGE_LEN);
    Ok(bytes(&Device::new(
        "VCLK".into(),
        vec![
            &Name::new("_HID".into(), &"AMZNC10C"),
            &Name::new("_CID".into(), &"VMCLOCK"),
            &Name::new("_DDN".into(), &"VMCLOCK"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&page])),
        ],
    )))
}

/// The generic event device (ACPI 6.5, 5.6.9): one interrupt, whose handler asks the status register,
/// which clears itself, and passes on what it says.
fn event_device(with_vmgenid: bool) -> Vec<u8> {
    /// "Status changed" for the power button, "generation changed" for the id.
    const NOTIFICATION: u8 = 0x80;
    let status = u64::from(layout::POWER_PORT) + power::EVENTS;
    let pressed = And::new(&ZERO, &Local(0), &power::EVENT_POWER_BUTTON);
    let changed = And::new(&ZERO, &Local(0), &power::EVENT_VMGENID);
    let (button, generation) = (Path::new("\\_SB_.PWRB"), Path::new("\\_SB_.VGEN"));
    let notify_button = Notify::new(&button, &NOTIFICATION);
    let notify_generation = Notify::new(&generation, &NOTIFICATION);
    let on_button = If::new(&pressed, vec![&notify_button]);
    let on_generation = If::new(&changed, vec![&notify_generation]);
    let register = Path::new("ESTS");
    let read = Store::new(&Local(0), &register);
    let mut handler: Vec<&dyn Aml> = vec![&read, &on_button];
    if with_vmgenid {
        handler.push(&on_generation);
    }
    bytes(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&edge(layout::GED_GSI)])),
            &OpRegion::new("EREG".into(), OpRegionSpace::SystemIO, &status, &1_u8),
            &Field::new(
                "EREG".into(),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"ESTS", 8)],
            ),
            &Method::new("_EVT".into(), 1, true, handler),
        ],
    ))
}

/// A virtio-mmio device under the id that Linux's driver knows it by.
fn virtio(slot: usize, base: u64, gsi: u32) -> Result<Vec<u8>, TablesError> {
    let base = u32::try_from(base).map_err(|_| TablesError::Range(base))?;
    let uid = u32::try_from(slot).map_err(|_| TablesError::Range(u64::MAX))?;
    Ok(bytes(&Device::new(
        format!("V{slot:03X}").as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &uid),
            &Name::new("_CCA".into(), &1_u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, base, layout::VIRTIO_MMIO_WINDOW),
                    &edge(gsi),
                ]),
            ),
        ],
    )))
}

#[cfg(test)]
#[path = "tables_tests.rs"]
mod tests;
