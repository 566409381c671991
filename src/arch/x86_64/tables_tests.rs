//! Tests of the tables as a kernel reads them: checksums, lengths, pointers, and that everything is
//! described. With `ACPI_DUMP=DIR` the tables are written there, for `iasl -d`.

use vm_memory::GuestAddress;

use super::*;

const BARE: Description<'_> =
    Description { cpus: 1, virtio: &[], vmgenid_address: None, vmclock_address: None };

fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap()
}

fn read(ram: &GuestRam, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// A table with its header checked.
fn table(ram: &GuestRam, address: u64, signature: &[u8; 4]) -> Vec<u8> {
    assert_eq!(address % 16, 0);
    let len = u32_at(&read(ram, address, 36), 4);
    let table = read(ram, address, usize::try_from(len).unwrap());
    assert_eq!(&table[..4], signature);
    assert_eq!(sum(&table), 0, "checksum of {}", String::from_utf8_lossy(signature));
    if let Some(dir) = std::env::var_os("ACPI_DUMP") {
        let name = String::from_utf8_lossy(signature).to_lowercase() + ".dat";
        std::fs::write(std::path::Path::new(&dir).join(name), &table).unwrap();
    }
    table
}

/// RSDP to XSDT to FADT (and its DSDT) and MADT.
fn tables(ram: &GuestRam, rsdp: u64) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
    let rsdp = read(ram, rsdp, 36);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
    let xsdt = table(ram, u64_at(&rsdp, 24), b"XSDT");
    assert_eq!(xsdt.len(), 36 + 2 * 8);
    let fadt = table(ram, u64_at(&xsdt, 36), b"FACP");
    let madt = table(ram, u64_at(&xsdt, 44), b"APIC");
    let dsdt = table(ram, u64_at(&fadt, 140), b"DSDT");
    (fadt, madt, dsdt)
}

fn slots(count: u32) -> Vec<(u64, u32)> {
    (0..count).map(|i| (layout::virtio_base(i).unwrap(), layout::virtio_gsi(i).unwrap())).collect()
}

fn count(haystack: &[u8], needle: &[u8]) -> usize {
    haystack.windows(needle.len()).filter(|w| *w == needle).count()
}

#[test]
fn everything_is_described() {
    let ram = ram();
    let virtio = slots(layout::VIRTIO_SLOTS_MAX);
    let vmgenid_address = Some(layout::VMGENID_PAGE.0);
    let vmclock_address = Some(layout::VMCLOCK_PAGE.0);
    let d = Description { cpus: 4, virtio: &virtio, vmgenid_address, vmclock_address };
    let rsdp = build(&ram, &d).unwrap();
    assert_eq!(rsdp, layout::ACPI.0);
    let (_, madt, dsdt) = tables(&ram, rsdp);
    assert_eq!(u32_at(&madt, 36), 0xfee0_0000);
    assert_eq!(u32_at(&madt, 40), 0, "no PICs");
    for cpu in 0..4_u8 {
        let at = 44 + 8 * usize::from(cpu);
        assert_eq!(madt[at..at + 8], [0, 8, cpu, cpu, 1, 0, 0, 0]);
    }
    assert_eq!(madt[76..], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    assert_eq!(count(&dsdt, b"LNRO0005"), 18);
    for name in [
        "V000",
        "V011",
        "COM1",
        "GED_",
        "VGEN",
        "VCLK",
        "AMZNC10C",
        "_S5_",
        "ACPI0013",
        "VM_Gen_Counter",
    ] {
        assert!(count(&dsdt, name.as_bytes()) >= 1, "{name}");
    }
    for (base, gsi) in virtio {
        let base = u32::try_from(base).unwrap().to_le_bytes();
        let memory = [&[0x86, 9, 0, 1][..], &base[..], &[0, 2, 0, 0]].concat();
        assert_eq!(count(&dsdt, &memory), 1);
        let line = [&[0x89, 6, 0, 3, 1][..], &gsi.to_le_bytes()].concat();
        assert_eq!(count(&dsdt, &line), 1);
    }
}

#[test]
fn the_fadt_tells_how_to_sleep_and_reset_and_what_is_missing() {
    let ram = ram();
    let d = BARE;
    let rsdp = build(&ram, &d).unwrap();
    let (fadt, _, dsdt) = tables(&ram, rsdp);
    assert_eq!(fadt.len(), 276);
    let boot_arch = u16::from_le_bytes([fadt[109], fadt[110]]);
    assert_eq!(boot_arch, 0x24, "no VGA, no RTC, no 8042");
    let flags = u32_at(&fadt, 112);
    assert_eq!(flags, 1 << 20 | 1 << 12 | 1 << 10 | 1 << 5 | 1 << 4 | 1);
    let io = |port: u8| [1, 8, 0, 1, port, 6, 0, 0, 0, 0, 0, 0];
    assert_eq!(fadt[116..128], io(2), "reset register");
    assert_eq!(fadt[128], 1, "reset value");
    assert_eq!(fadt[244..256], io(0), "sleep control");
    assert_eq!(fadt[256..268], io(1), "sleep status");
    assert_eq!(count(&dsdt, b"VGEN") + count(&dsdt, b"LNRO0005"), 0);
}

#[test]
fn as_many_cpus_as_fit() {
    let ram = ram();
    let most = Description {
        cpus: 255,
        virtio: &slots(18),
        vmgenid_address: Some(1 << 33),
        vmclock_address: Some(0xd_f000),
    };
    let rsdp = build(&ram, &most).unwrap();
    let (_, madt, _) = tables(&ram, rsdp);
    assert_eq!(madt.len(), 44 + 255 * 8 + 12);
    let more = Description { cpus: 256, ..most };
    assert!(matches!(build(&ram, &more), Err(TablesError::Range(255))));
}

#[test]
fn what_does_not_fit_is_refused() {
    let small = GuestRam::from_ranges(&[(GuestAddress(0), 0x9000)]).unwrap();
    let d = BARE;
    assert!(matches!(build(&small, &d), Err(TablesError::Memory)));
    let far = Description { virtio: &[(1 << 32, 6)], ..d };
    assert!(matches!(build(&ram(), &far), Err(TablesError::Range(0x1_0000_0000))));
    let many = vec![(layout::VIRTIO_MMIO_BASE, 6); 4000];
    let crowd = Description { virtio: &many, ..d };
    assert!(matches!(build(&ram(), &crowd), Err(TablesError::Room { .. })));
}
