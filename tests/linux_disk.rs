//! Block devices as disks, on a loop device. That needs a host whose loop devices are ours to take: the
//! emulated one, which this test starts when it isn't in it.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm::backend::disk::{Disk, DiskOptions, Locking};
use vmm_devices::GuestRam;
use vmm_devices::backend::BlockBackend;

const MIB: u64 = 1 << 20;

/// Runs `test`, which is the body of the test `name`, in the emulated host.
fn in_emulated_host(name: &str, test: fn()) {
    if Path::new("/vmm/settings").exists() {
        return test();
    }
    let mut script = tempfile::NamedTempFile::new().unwrap();
    writeln!(script, "#!/bin/sh\nexec /vmm/test --exact {name} --nocapture").unwrap();
    let file = format!("{}:test", std::env::current_exe().unwrap().display());
    let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/host/run"))
        .args(["--file", &file, "--"])
        .arg(script.path())
        .output()
        .unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains(" 1 passed"), "in the host: {out}{err}");
}

fn run(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).status().unwrap();
    assert!(status.success(), "{program} {args:?}");
}

fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn a_block_device_is_read_written_discarded_and_zeroed() {
    in_emulated_host("a_block_device_is_read_written_discarded_and_zeroed", || {
        let image = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(image.path(), vec![0xaa; 8 << 20]).unwrap();
        run("modprobe", &["loop"]);
        run("losetup", &["/dev/loop0", image.path().to_str().unwrap()]);
        for direct in [false, true] {
            let options = DiskOptions { path: "/dev/loop0".into(), read_only: false, direct };
            let (mut disk, handle) = Disk::open(&options, Locking::Now).unwrap();
            assert_eq!(disk.capacity_sectors(), 8 * MIB / 512);
            assert_eq!(disk.block_sizes().0, 512);
            assert!(Disk::open(&options, Locking::Now).is_err(), "it is locked");

            let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
            ram.write_slice(&[0x55; 3000], GuestAddress(100)).unwrap();
            let slice = |at, len| ram.get_slice(GuestAddress(at), len).unwrap();
            disk.write_at(&[slice(100, 1000), slice(1100, 1560)], 512).unwrap();
            disk.read_at(&[slice(0x8000, 4096)], 0).unwrap();
            let mut found = [0; 4096];
            ram.read_slice(&mut found, GuestAddress(0x8000)).unwrap();
            assert!(found[..512].iter().all(|b| *b == 0xaa));
            assert!(found[512..3072].iter().all(|b| *b == 0x55));

            let before = allocated(image.path());
            disk.discard(MIB, 2 * MIB).unwrap();
            disk.write_zeroes(3 * MIB, MIB, true).unwrap();
            disk.write_zeroes(4 * MIB + 512, 1024, false).unwrap();
            handle.flush().unwrap();
            assert!(direct || allocated(image.path()) <= before - 3 * MIB);
            disk.read_at(&[slice(0x8000, 4096)], 4 * MIB).unwrap();
            ram.read_slice(&mut found, GuestAddress(0x8000)).unwrap();
            assert!(found[512..1536].iter().all(|b| *b == 0));
            assert!(found[1536..].iter().all(|b| *b == 0xaa));
            disk.read_at(&[slice(0x8000, 4096)], 4 * MIB - 4096).unwrap();
            ram.read_slice(&mut found, GuestAddress(0x8000)).unwrap();
            assert_eq!(found, [0; 4096]);
        }
        run("losetup", &["-d", "/dev/loop0"]);
    });
}
