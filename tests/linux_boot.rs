//! Debian's stock kernels boot, as bzImage and as ELF, on few and many vCPUs, in little and much RAM; their
//! disks hold what was written, refuse what they must, and give back what is discarded.

#[path = "support/linux.rs"]
mod linux;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use linux::{Guest, guest_file};
use rustix::fs::{FallocateFlags, fallocate};

const MIB: usize = 1 << 20;

/// Bytes that no mistake makes, the same for the same seed.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut word = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..len / 8).flat_map(|_| word()).collect()
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// Tells the program that runs inside the guest, this one, which device to zero parts of.
const ZERO: &str = "VMM_TEST_ZERO";

/// Zeroes the 13th MiB of a block device, and the 14th so that its blocks are given back: write-zeroes without unmap
/// and with it, which the kernel does not replace by writes.
fn zero(device: &str) {
    let file = fs::File::options().write(true).open(device).unwrap();
    for (flag, mib) in [(FallocateFlags::ZERO_RANGE, 12), (FallocateFlags::PUNCH_HOLE, 13)] {
        fallocate(&file, flag | FallocateFlags::KEEP_SIZE, mib << 20, 1 << 20).unwrap();
    }
}

/// The path of a block device with the content of the file, where loop devices are ours to take: in the emulated host.
/// Elsewhere the file itself.
fn looped(file: &Path) -> String {
    let file = file.to_str().unwrap().to_owned();
    if !Path::new("/vmm/settings").exists() {
        return file;
    }
    for (program, args) in [("modprobe", &["loop"][..]), ("losetup", &["/dev/loop0", &file])] {
        let status = Command::new(program).args(args).status().unwrap();
        assert!(status.success(), "{program} {args:?}");
    }
    "/dev/loop0".to_owned()
}

/// Disks: one is written, one is read-only, one is discarded from, one bypasses the page cache, one is a block device.
#[test]
fn debian_6_12_bzimage_and_its_disks() {
    if let Ok(device) = std::env::var(ZERO) {
        return zero(&device);
    }
    let (old, new) = (pattern(1, 4 * MIB), pattern(2, MIB));
    let script = r#"
        echo "serial=$(cat /sys/block/vda/serial)"
        dd if=/new of=/dev/vda bs=4k seek=3 conv=notrunc,fsync 2>&1 || exit 1
        dd if=/new of=/dev/vdb bs=4k conv=fsync 2>&1 && exit 2
        echo "readonly=$(cat /sys/block/vdb/ro)"
        cmp /dev/vdb /old || exit 3
        blkdiscard -o 4194304 -l 8388608 /dev/vdc || exit 4
        VMM_TEST_ZERO=/dev/vdc /zero --exact debian_6_12_bzimage_and_its_disks --nocapture || exit 7
        dd if=/dev/vdc bs=1M skip=4 count=10 2>/dev/null | tr -d '\0' | wc -c | sed 's/^/left=/'
        dd if=/dev/vdd of=/read bs=64k iflag=direct 2>/dev/null && cmp /read /old || exit 5
        dd if=/new of=/dev/vdd bs=64k oflag=direct conv=notrunc,fsync 2>/dev/null || exit 6
        cmp /dev/vde /old || exit 8
        dd if=/new of=/dev/vde bs=64k seek=1 conv=notrunc,fsync 2>/dev/null || exit 9
    "#;
    let guest = Guest::new("6.12-cloud")
        .disk("written", &old, ",serial=S-12")
        .disk("kept", &old, ",readonly")
        .disk("thinned", &pattern(3, 16 * MIB), "")
        .disk("direct", &old, ",direct")
        .file("zero", fs::read(std::env::current_exe().unwrap()).unwrap())
        .file("new", new.clone())
        .file("old", old.clone())
        .run(script);
    fs::write(guest.path("looped"), &old).unwrap();
    let device = looped(&guest.path("looped"));
    let guest = guest.option("--disk", &device);
    let before = allocated(&guest.path("thinned"));
    let ended = guest.boot();
    ended.check_basics(1).check_value("serial", "S-12");
    ended.check_value("readonly", "1").check_value("left", "0");

    let mut expected = old.clone();
    expected[3 * 4096..][..MIB].copy_from_slice(&new);
    ended.check(fs::read(ended.path("written")).unwrap() == expected, "other bytes were written");
    ended.check(fs::read(ended.path("kept")).unwrap() == old, "a read-only disk was written");
    expected.clone_from(&old);
    expected[..MIB].copy_from_slice(&new);
    ended.check(fs::read(ended.path("direct")).unwrap() == expected, "direct: other bytes");

    // Of the two that are zeroed, the first may keep its blocks.
    let gone = before - allocated(&ended.path("thinned"));
    ended.check([9 << 20, 10 << 20].contains(&gone), &format!("{gone} bytes of the image freed"));
    let mut expected = pattern(3, 16 * MIB);
    expected[4 * MIB..14 * MIB].fill(0);
    ended.check(fs::read(ended.path("thinned")).unwrap() == expected, "more was discarded");
    if device.starts_with("/dev/loop") {
        // What was written went through a loop device, which lets go of its file with all of it written.
        let status = Command::new("losetup").args(["-d", &device]).status().unwrap();
        assert!(status.success());
    }
    expected.clone_from(&old);
    expected[64 << 10..][..MIB].copy_from_slice(&new);
    ended.check(fs::read(ended.path("looped")).unwrap() == expected, "block device: other bytes");
}

#[test]
fn debian_6_12_elf_on_4_vcpus_with_5_gib() {
    let script = r#"
        echo "kib=$(awk '/^MemTotal/ { print $2 }' /proc/meminfo)"
        echo "high=$(awk '/^1[0-9a-f]*-.*System RAM/ { print $1 }' /proc/iomem)"
        for cpu in 0 1 2 3; do taskset -c $cpu awk '{ print "on=" $39 }' /proc/self/stat; done
        for what in 'cpu cores' siblings; do
            echo "${what#cpu }=$(sed -n "s/^$what[[:space:]]*: //p" /proc/cpuinfo | tr '\n' ' ')"
        done
        echo "apicids=$(sed -n 's/^apicid[[:space:]]*: //p' /proc/cpuinfo | tr '\n' ' ')"
        awk '/LOC:/ { print "ticks=" ($2 > 0 && $3 > 0 && $4 > 0 && $5 > 0) }' /proc/interrupts
    "#;
    let ended = Guest::new("6.12-cloud").elf().cpus(4).mem("5G").run(script).boot();
    ended.check_basics(4).check_value("ticks", "1").check_value("apicids", "0 1 2 3");
    ended.check_value("cores", "4 4 4 4").check_value("siblings", "4 4 4 4");
    let kib: u64 = ended.value("kib").parse().unwrap();
    ended.check(kib > 4_900_000, "the guest sees less than 5 GiB");
    ended.check_value("high", "100000000-17fffffff");
    for cpu in 0..4 {
        ended.check(ended.console.contains(&format!("on={cpu}")), "a vCPU ran nothing");
    }
}

/// A root file system on a disk is booted, filled, emptied, trimmed and left clean. The test types what
/// the guest waits for. Its kernel's header names no payload, as if it were packed in a way that nobody knows here: the
/// guest unpacks itself, entered at the image's own 64-bit entry.
#[test]
fn debian_6_1_bzimage_with_its_root_on_a_disk() {
    let root = fs::read(guest_file("root.ext4")).unwrap();
    let script = "cat /proc/mounts; uname -r; nproc; echo kept > /kept; \
                  dd if=/dev/urandom of=/big bs=1M count=24 && sync && echo filled; read word; \
                  echo got-$word; rm /big && sync && fstrim -v /";
    let mut image = fs::read(guest_file("vmlinuz-6.1-cloud")).unwrap();
    image[0x24c..0x250].fill(0);
    let guest = Guest::new("6.1-cloud").image(&image).cpus(2).disk("root", &root, "");
    let image = guest.path("root");
    let mut vm = guest.cmdline(&format!("root=/dev/vda rw vmm.run=\"{script}\"")).start();
    vm.wait_for("filled");
    let full = allocated(&image);
    vm.type_in("something\n");
    let ended = vm.wait();
    ended.check_success();
    ended.check(ended.console.contains("/dev/vda / ext4 rw"), "the root isn't the disk");
    ended.check(ended.console.contains("got-something"), "what was typed didn't arrive");
    let freed = full.saturating_sub(allocated(&image));
    ended.check(freed >= 20 << 20, &format!("fstrim freed {freed} bytes of the image's 24 MiB"));
    let image = fs::read(&image).unwrap();
    ended.check(image.windows(5).any(|bytes| bytes == b"kept\n"), "the file isn't in the image");
    // s_state of the superblock: EXT2_VALID_FS.
    ended.check(image[1024 + 0x3a] & 1 == 1, "the file system wasn't unmounted");
}

#[test]
fn debian_6_1_elf_in_little_ram() {
    let ended = Guest::new("6.1-cloud").elf().mem("96M").run("").boot();
    ended.check_basics(1);
}

/// Its virtio drivers and its file system are modules of its own.
#[test]
fn debian_6_12_generic_with_its_modules() {
    let data = pattern(4, MIB);
    let script = r#"
        for name in virtio_mmio virtio_blk virtio_rng; do
            echo "$name=$(grep -c "^$name .*Live" /proc/modules)"
        done
        cmp /dev/vda /data && echo "disk=same"
    "#;
    let guest = Guest::new("6.12-generic").cpus(2).disk("data", &data, "").file("data", data);
    let ended = guest.run(script).boot();
    ended.check_basics(2).check_value("disk", "same");
    for name in ["virtio_mmio", "virtio_blk", "virtio_rng"] {
        ended.check_value(name, "1");
    }
}

/// With as little of a userland as there can be: in an emulated host 32 vCPUs share two CPUs.
#[test]
fn many_vcpus_come_online() {
    let init = "#!/bin/busybox sh\n\
                busybox mount -t sysfs sysfs /sys\n\
                echo \"online=$(busybox cat /sys/devices/system/cpu/online)\"\n\
                busybox poweroff -f\n";
    let guest = Guest::new("6.12-cloud").elf().cpus(32).mem("512M");
    let ended = guest.file("many", init.as_bytes().to_vec()).cmdline("rdinit=/many").boot();
    ended.check_status(0).check_value("online", "0-31");
}

const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

fn huge_pages(what: &str) -> u64 {
    let text = fs::read_to_string(Path::new(HUGE_PAGES).join(what)).unwrap();
    text.trim().parse().unwrap()
}

/// Sets the number of this host's huge pages, which only root may.
fn reserve_huge_pages(count: u64) {
    let _ = fs::write(Path::new(HUGE_PAGES).join("nr_hugepages"), count.to_string());
}

#[test]
fn ram_from_huge_pages_or_a_word_why_not() {
    const NEEDED: u64 = 64;
    let before = huge_pages("nr_hugepages");
    reserve_huge_pages(before + NEEDED);
    let guest = Guest::new("6.12-cloud").elf().mem("128M").flag("--hugepages").run("");
    if huge_pages("free_hugepages") >= NEEDED {
        let mut vm = guest.start();
        vm.wait_for("init: userspace is up");
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", vm.pid())).unwrap();
        if !smaps.contains("KernelPageSize:     2048 kB") {
            vm.fail("no mapping of huge pages");
        }
        vm.wait().check_basics(1);
    } else {
        let output = guest.command().output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("vm.nr_hugepages") && stderr.lines().count() == 1, "{stderr}");
    }
    reserve_huge_pages(before);
}
