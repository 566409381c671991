//! Kernels good and bad, through `load`, as a user gives them.

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::testing::*;
use super::*;

fn linux64(loaded: &Loaded) -> (u64, Option<&SetupHeader>) {
    match &loaded.entry {
        Entry::Linux64 { entry, setup_header } => (*entry, setup_header.as_deref()),
        Entry::Pvh { .. } => panic!("entered by PVH"),
    }
}

#[test]
fn each_compression_gives_the_same_kernel() {
    for (name, payload) in PACKED {
        let ram = ram();
        let loaded = load_bytes(&bzimage("6.1.0-56", payload), &ram).expect(name);
        let (entry, header) = linux64(&loaded);
        assert_eq!(entry, TINY_ENTRY, "{name}");
        let header = header.expect(name);
        assert_eq!({ header.version }, 0x20f);
        assert_eq!({ header.xloadflags }, 0x7f);
        assert_eq!({ header.cmdline_size }, 2047);
        assert_eq!({ header.pref_address }, PREFERRED);
        assert_eq!((loaded.end, loaded.init_size), (TINY_END, INIT_SIZE.into()), "{name}");
        assert!(holds_tiny(&ram), "{name}");
        let tail = read(&ram, TINY_END, 4096);
        assert!(tail.iter().all(|byte| *byte == 0), "{name}: wrote past the kernel");
    }
}

#[test]
fn a_header_ends_where_its_jump_says() {
    let mut image = bzimage("6.1.0", PACKED[0].1);
    // 2.12's header ends after init_size: what follows is code, and no field.
    image[0x201] = u8::try_from(0x264 - 0x202).unwrap();
    put(&mut image, 0x264, &[0xcc; 8]);
    seal(&mut image);
    let loaded = load_bytes(&image, &ram()).unwrap();
    let header = *linux64(&loaded).1.unwrap();
    assert_eq!(({ header.init_size }, { header.handover_offset }), (INIT_SIZE, 0));
}

#[test]
fn an_elf_is_entered_by_its_pvh_note_or_else_at_its_entry() {
    let pvh = ram();
    let loaded = load_bytes(TINY, &pvh).unwrap();
    assert_eq!(loaded.entry, Entry::Pvh { entry: TINY_PVH_ENTRY });
    assert_eq!((loaded.end, loaded.init_size), (TINY_END, TINY_END - 0x100_0000));
    assert!(holds_tiny(&pvh));

    let mut plain = TINY.to_vec();
    let note = plain.windows(4).position(|bytes| bytes == b"Xen\0").unwrap();
    put(&mut plain, note, b"Not\0");
    assert_eq!(linux64(&load_bytes(&plain, &ram()).unwrap()), (TINY_ENTRY, None));

    // A virtual entry is translated by its segment; one outside of all segments is refused.
    put(&mut plain, 24, &0xffff_ffff_8100_0030u64.to_le_bytes());
    assert_eq!(linux64(&load_bytes(&plain, &ram()).unwrap()).0, 0x100_0030);
    put(&mut plain, 24, &0x300_0000u64.to_le_bytes());
    assert!(matches!(problem(&plain), Problem::Malformed(_)));
}

#[test]
fn an_unknown_compression_falls_back_to_the_images_own_entry() {
    let image = bzimage("6.1.0", b"?no such compression?");
    let ram = ram();
    let loaded = load_bytes(&image, &ram).unwrap();
    let (entry, header) = linux64(&loaded);
    assert_eq!(entry, PREFERRED + 0x200);
    assert_eq!(u64::from(header.unwrap().code32_start), PREFERRED);
    assert_eq!(loaded.end, PREFERRED + u64::from(INIT_SIZE));
    assert_eq!(read(&ram, PREFERRED, image.len() - CODE_START), image[CODE_START..]);

    let mut odd = image.clone();
    put(&mut odd, 0x258, &0x110_0000u64.to_le_bytes());
    let loaded = load_bytes(&odd, &ram).unwrap();
    assert_eq!(linux64(&loaded).0, 0x120_0200, "aligned up to kernel_alignment");

    let mut old = image.clone();
    put(&mut old, 0x206, &[0x0b, 0x02]);
    assert_eq!(
        problem(&old).to_string(),
        "speaks boot protocol 2.11, too old to enter in 64-bit mode: give Linux 3.8 or later"
    );
    let mut big = image;
    put(&mut big, 0x260, &0x6000_0000u32.to_le_bytes());
    assert_eq!(
        problem(&big).to_string(),
        "needs 1552 MiB of RAM and the guest has 48 MiB: give it more with --mem"
    );
}

#[test]
fn signed_images_and_images_without_crc_load() {
    let (name, lz4) = PACKED[4];
    assert_eq!(name, "lz4");
    let mut signed = bzimage("6.1.0", lz4);
    sign(&mut signed);
    assert!(load_bytes(&signed, &ram()).is_ok());
    let mut new = bzimage("6.15.0", lz4);
    let at = new.len() - 4;
    put(&mut new, at, &[0; 4]);
    assert!(load_bytes(&new, &ram()).is_ok());
    let mut old = bzimage("6.14.9", lz4);
    put(&mut old, at, &[0; 4]);
    assert_eq!(
        problem(&old).to_string(),
        "has a damaged lz4 payload, checksum or length is wrong (the image's CRC-32 doesn't match): \
         copy it again"
    );
}

#[test]
fn what_is_no_kernel_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let give = "give a bzImage or vmlinux for x86-64";
    assert_eq!(line(dir.path()), format!("isn't a Linux kernel but a directory: {give}"));
    let tail = "can't be opened: give the path of a readable bzImage or vmlinux";
    assert_eq!(line(&dir.path().join("missing")), tail);
    assert_eq!(
        line(Path::new("/dev/zero")),
        format!("isn't a Linux kernel but a device or a pipe: {give}")
    );
    let mut disk = vec![0; 2048];
    put(&mut disk, 1080, &[0x53, 0xef]);
    let mut module = TINY.to_vec();
    module[16] = 1;
    for (bytes, what) in [
        (&b""[..], "an empty file"),
        (b"#!/bin/sh\n", "a script"),
        (b"070701", "a cpio archive (an initramfs?)"),
        (b"nothing known", "something else"),
        (&disk, "an ext4 file system"),
        (&module, "an object file (a kernel module?)"),
        (PACKED[0].1, "a gzip file (an initramfs, or a packed vmlinux?)"),
    ] {
        assert_eq!(problem(bytes).to_string(), format!("isn't a Linux kernel but {what}: {give}"));
    }
    let error = load(&dir.path().join("k"), &ram()).unwrap_err();
    assert!(error.to_string().starts_with(&format!("kernel {}/k: ", dir.path().display())));
    let source = std::error::Error::source(&error).expect("the system's word");
    assert!(source.to_string().contains("No such file"));
}

#[test]
fn kernels_for_other_processors_are_named() {
    let mut arm64 = vec![0; 4096];
    put(&mut arm64, 56, b"ARM\x64");
    let mut elf_arm = TINY.to_vec();
    elf_arm[18] = 183;
    let mut elf_be = TINY.to_vec();
    put(&mut elf_be, 4, &[2, 2]);
    put(&mut elf_be, 18, &[0, 21]);
    let mut elf_32 = TINY.to_vec();
    put(&mut elf_32, 4, &[1]);
    put(&mut elf_32, 18, &[3]);
    let mut bz_32 = bzimage("6.1.0", PACKED[0].1);
    put(&mut bz_32, 0x236, &[0, 0]);
    let mut pe = vec![0; 4096];
    put(&mut pe, 0, b"MZ");
    put(&mut pe, 0x3c, &[0x80]);
    put(&mut pe, 0x80, b"PE\0\0\x64\x50");
    for (bytes, arch) in [
        (arm64, "arm64"),
        (elf_arm, "arm64"),
        (elf_be, "POWER"),
        (elf_32, "32-bit x86"),
        (bz_32, "32-bit x86"),
        (pe, "RISC-V"),
    ] {
        let text = format!("is for {arch}: this VMM needs a kernel for x86-64");
        assert_eq!(problem(&bytes).to_string(), text);
    }
}

#[test]
fn a_kernel_that_does_not_fit_states_both_sizes() {
    let small = GuestRam::from_ranges(&[(GuestAddress(0), 18 << 20)]).unwrap();
    let need = "needs 19 MiB of RAM and the guest has 18 MiB: give it more with --mem";
    for image in [TINY.to_vec(), bzimage("6.1.0", PACKED[1].1)] {
        assert_eq!(load_bytes(&image, &small).unwrap_err().problem.to_string(), need);
    }
    // The claim is checked before a byte is unpacked.
    let mut bomb = PACKED[1].1.to_vec();
    let at = bomb.len() - 4;
    put(&mut bomb, at, &[0xff; 4]);
    assert_eq!(
        problem(&bzimage("6.1.0", &bomb)).to_string(),
        "needs 4096 MiB of RAM and the guest has 48 MiB: give it more with --mem"
    );
    // RAM enough in all, but not where the kernel goes.
    let mut hole = TINY.to_vec();
    put(&mut hole, 64 + 24, &0x280_0000u64.to_le_bytes());
    assert!(matches!(problem(&hole), Problem::Malformed(_)));
}

#[test]
fn ram_in_a_file_gets_the_same_bytes_and_marks_but_no_zero_page() {
    let image = bzimage("6.1.0", PACKED[1].1);
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 << 20).unwrap();
    let in_file = ram_in_file(&file, 1 << 20, 32 << 20);
    let anonymous = ram();
    for ram in [&in_file, &anonymous] {
        load_bytes(&image, ram).unwrap();
        assert!(holds_tiny(ram));
        let region = ram.find_region(GuestAddress(0)).unwrap();
        let marked: Vec<usize> = (0usize..(32 << 20) / 4096)
            .filter(|page| GuestMemoryRegion::bitmap(region).dirty_at(page * 4096))
            .collect();
        assert_eq!(marked, [0x1000, 0x1001, 0x1200, 0x1203]);
    }
    // Nothing before the region's part of the file, nothing after it.
    let mut outside = vec![0xff; 1 << 20];
    file.read_exact_at(&mut outside, 0).unwrap();
    assert!(outside.iter().all(|byte| *byte == 0));
    file.read_exact_at(&mut outside, 33 << 20).unwrap();
    assert!(outside.iter().all(|byte| *byte == 0));
}

#[test]
fn ram_whose_file_refuses_writes_is_written_through_its_mapping() {
    let flags = rustix::fs::MemfdFlags::ALLOW_SEALING | rustix::fs::MemfdFlags::CLOEXEC;
    let file: File = rustix::fs::memfd_create("ram", flags).unwrap().into();
    file.set_len(32 << 20).unwrap();
    let ram = ram_in_file(&file, 0, 32 << 20);
    rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::FUTURE_WRITE).unwrap();
    assert!(file.write_all_at(b"x", 0).is_err());
    load_bytes(TINY, &ram).unwrap();
    assert!(holds_tiny(&ram));
}
