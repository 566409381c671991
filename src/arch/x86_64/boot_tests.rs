//! Tests of what a kernel finds in RAM.

use std::io::Write;

use super::*;

const MIB: u64 = 1 << 20;

fn ram(bytes: u64) -> GuestRam {
    let ranges: Vec<_> = layout::ram_ranges(bytes)
        .into_iter()
        .map(|(start, len)| (start, usize::try_from(len).unwrap()))
        .collect();
    GuestRam::from_ranges(&ranges).unwrap()
}

fn linux(setup_header: Option<SetupHeader>) -> Loaded {
    Loaded {
        entry: Entry::Linux64 { entry: 16 * MIB, setup_header: setup_header.map(Box::new) },
        end: 40 * MIB,
        init_size: 30 * MIB,
    }
}

fn pvh() -> Loaded {
    Loaded { entry: Entry::Pvh { entry: 16 * MIB }, end: 40 * MIB, init_size: 0 }
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    file
}

fn boot<'a>(
    ram: &'a GuestRam,
    kernel: &'a Loaded,
    cmdline: &'a str,
    initrd: Option<&'a mut File>,
) -> Result<BootRegs, BootError> {
    prepare(BootInputs { ram, kernel, cmdline, initrd, rsdp: layout::ACPI.0 })
}

fn params(ram: &GuestRam) -> boot_params {
    ram.read_obj(layout::ZERO_PAGE).unwrap()
}

#[test]
fn linux_finds_its_parameters() {
    let ram = ram(64 * MIB);
    let initrd = vec![0xa5; 5000];
    boot(&ram, &linux(None), "console=ttyS0", Some(&mut file(&initrd))).unwrap();
    let params = params(&ram);
    let hdr = params.hdr;
    let (magic, flag, loader) = (hdr.header, hdr.boot_flag, hdr.type_of_loader);
    assert_eq!((magic, flag, loader), (HEADER_MAGIC, BOOT_FLAG, LOADER_OTHER));
    let rsdp = params.acpi_rsdp_addr;
    assert_eq!(rsdp, layout::ACPI.0);
    let (at, len) = (hdr.ramdisk_image, hdr.ramdisk_size);
    assert_eq!((at, len), (64 * (1 << 20) - 8192, 5000));
    let mut found = vec![0; initrd.len()];
    ram.read_slice(&mut found, GuestAddress(u64::from(at))).unwrap();
    assert_eq!(found, initrd);
    let mut cmdline = [0; 14];
    let at = hdr.cmd_line_ptr;
    ram.read_slice(&mut cmdline, GuestAddress(u64::from(at))).unwrap();
    assert_eq!(&cmdline, b"console=ttyS0\0");
}

/// Or no stock kernel reboots: see `reset_code`.
#[test]
fn the_reset_vector_writes_the_reset_register() {
    for kernel in [linux(None), pvh()] {
        let ram = ram(64 * MIB);
        boot(&ram, &kernel, "", None).unwrap();
        let code: [u8; 9] = ram.read_obj(GuestAddress(0xf_fff0)).unwrap();
        assert_eq!(code[..6], [0xb0, 1, 0xba, 0x02, 0x06, 0xee]);
    }
}

#[test]
fn every_boot_has_a_generation_id_of_its_own_where_linux_keeps_off() {
    let ram = ram(64 * MIB);
    let mut ids = vec![[0_u8; 16]];
    for kernel in [linux(None), pvh()] {
        boot(&ram, &kernel, "", None).unwrap();
        ids.push(ram.read_obj(GuestAddress(0xf_f000)).unwrap());
    }
    renew_generation(&ram).unwrap();
    ids.push(ram.read_obj(GuestAddress(0xf_f000)).unwrap());
    for (i, id) in ids.iter().enumerate() {
        assert!(!ids[..i].contains(id), "{ids:x?}");
    }
    let reserved = |&(start, len, kind): &(u64, u64, u32)| {
        kind == MEMORY_RESERVED && start <= 0xf_f000 && 0xf_f010 <= start + len
    };
    assert!(memory_map(&ram).iter().any(reserved));
}

#[test]
fn the_kernels_own_header_is_kept() {
    let ram = ram(64 * MIB);
    let header = SetupHeader {
        header: HEADER_MAGIC,
        version: 0x20f,
        init_size: 77,
        cmdline_size: 100,
        ..SetupHeader::default()
    };
    boot(&ram, &linux(Some(header)), "x", None).unwrap();
    let hdr = params(&ram).hdr;
    let (version, init_size, image) = (hdr.version, hdr.init_size, hdr.ramdisk_image);
    assert_eq!((version, init_size, image), (0x20f, 77, 0));
    let long = "x".repeat(101);
    let refused = boot(&ram, &linux(Some(header)), &long, None);
    assert!(matches!(refused, Err(BootError::CmdlineTooLong { len: 101, max: 100 })));
    boot(&ram, &linux(Some(header)), &long[1..], None).unwrap();
}

#[test]
fn e820_leaves_out_the_hole_and_the_firmwares_memory() {
    let ram = ram(5 << 30);
    boot(&ram, &linux(None), "", None).unwrap();
    let params = params(&ram);
    let map: Vec<_> = params.e820_table[..usize::from(params.e820_entries)]
        .iter()
        .map(|e| (e.addr, e.size, e.r#type))
        .collect();
    assert_eq!(
        map,
        [(0, 0x9fc00, 1), (0x9fc00, 0x60400, 2), (MIB, (3 << 30) - MIB, 1), (4 << 30, 2 << 30, 1)]
    );
}

#[test]
fn an_initrd_stays_off_the_kernel_and_below_its_limit() {
    let small = ram(48 * MIB);
    // The kernel needs 16 + 30 MiB to unpack itself, though it ends at 40.
    let two = vec![1; 2 << 20];
    boot(&small, &linux(None), "", Some(&mut file(&two))).unwrap();
    let more = vec![1; (2 << 20) + 1];
    let refused = boot(&small, &linux(None), "", Some(&mut file(&more)));
    assert!(
        matches!(refused, Err(BootError::InitrdTooBig { initrd: 2_097_153, room: 2_097_152 })),
        "{refused:?}"
    );
    let big = ram(3 << 30);
    boot(&big, &linux(None), "", Some(&mut file(&two))).unwrap();
    let low = params(&big).hdr.ramdisk_image;
    assert_eq!(low, 0x7fe0_0000);
    let header = SetupHeader { xloadflags: 2, ..SetupHeader::default() };
    boot(&big, &linux(Some(header)), "", Some(&mut file(&two))).unwrap();
    let high = params(&big).hdr.ramdisk_image;
    assert_eq!(high, 0xbfe0_0000);
}

#[test]
fn an_initrd_that_is_no_file_is_refused() {
    let ram = ram(64 * MIB);
    let mut dir = File::open("/").unwrap();
    let refused = boot(&ram, &linux(None), "", Some(&mut dir));
    assert!(matches!(refused, Err(BootError::Initrd(_))), "{refused:?}");
}

#[test]
fn a_bad_command_line_is_refused() {
    let ram = ram(64 * MIB);
    let refused = boot(&ram, &pvh(), "a\0b", None);
    assert!(matches!(refused, Err(BootError::CmdlineZero)));
    let refused = boot(&ram, &pvh(), &"x".repeat(2048), None);
    assert!(matches!(refused, Err(BootError::CmdlineTooLong { len: 2048, max: 2047 })));
}

#[test]
fn pvh_finds_its_start_info() {
    let ram = ram(64 * MIB);
    boot(&ram, &pvh(), "quiet", Some(&mut file(b"cpio"))).unwrap();
    let info: hvm_start_info = ram.read_obj(layout::PVH_START_INFO).unwrap();
    assert_eq!((info.magic, info.version, info.nr_modules), (0x336e_c578, 1, 1));
    assert_eq!(info.rsdp_paddr, layout::ACPI.0);
    let module: hvm_modlist_entry = ram.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    let mut initrd = [0; 4];
    ram.read_slice(&mut initrd, GuestAddress(module.paddr)).unwrap();
    assert_eq!((&initrd, module.size), (b"cpio", 4));
    let mut cmdline = [0; 6];
    ram.read_slice(&mut cmdline, GuestAddress(info.cmdline_paddr)).unwrap();
    assert_eq!(&cmdline, b"quiet\0");
    assert_eq!(info.memmap_entries, 3);
    for (i, want) in memory_map(&ram).into_iter().enumerate() {
        let at = info.memmap_paddr + 24 * u64::try_from(i).unwrap();
        let got: hvm_memmap_table_entry = ram.read_obj(GuestAddress(at)).unwrap();
        assert_eq!((got.addr, got.size, got.type_), want);
    }
}

#[test]
fn the_page_tables_are_the_identity() {
    let ram = ram(64 * MIB);
    boot(&ram, &linux(None), "", None).unwrap();
    let read = |at: u64| -> u64 {
        let mut bytes = [0; 8];
        ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        u64::from_le_bytes(bytes)
    };
    for address in [0, 0x1234_5678, 0xbfff_ffff, 0xffff_ffff_u64] {
        let pml4 = read(layout::PAGE_TABLES.0);
        assert_eq!(pml4 & 0xfff, 3);
        let pdpt = read((pml4 & !0xfff) + (address >> 30) * 8);
        assert_eq!(pdpt & 0xfff, 3);
        let page = read((pdpt & !0xfff) + (address >> 21 & 511) * 8);
        assert_eq!(page, address & !0x1f_ffff | 0x83);
    }
}
