//! Disks on files of the host: data and its alignment, dirty marks, discard, what is refused, the lock.

use std::fs;
use std::os::unix::fs::FileExt;

use tempfile::TempDir;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_devices::GuestRam;

use super::*;

const MIB: u64 = 1 << 20;

fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap()
}

fn slice(ram: &GuestRam, at: u64, len: usize) -> GuestSlice<'_> {
    ram.get_slice(GuestAddress(at), len).unwrap()
}

/// A directory beside the test binary: on a real file system, where /tmp may be a tmpfs.
fn dir() -> TempDir {
    let exe = std::env::current_exe().unwrap();
    tempfile::tempdir_in(exe.parent().unwrap()).unwrap()
}

fn image(dir: &TempDir, len: u64) -> DiskOptions {
    let path = dir.path().join("disk.img");
    File::create(&path).unwrap().set_len(len).unwrap();
    DiskOptions { path, read_only: false, direct: false }
}

fn open(options: &DiskOptions) -> (Disk, DiskHandle) {
    Disk::open(options, Locking::Now).unwrap()
}

fn message(options: &DiskOptions) -> String {
    Disk::open(options, Locking::Now).map(drop).unwrap_err().to_string()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect()
}

/// Writes and reads back `len` bytes at `offset`, from and to guest memory that starts at odd places.
fn round_trip(disk: &mut Disk, path: &Path, offset: u64, len: usize, addresses: [u64; 2]) {
    let ram = ram();
    let data = pattern(len);
    let half = len / 2;
    ram.write_slice(&data[..half], GuestAddress(addresses[0])).unwrap();
    ram.write_slice(&data[half..], GuestAddress(addresses[1])).unwrap();
    let halves = [slice(&ram, addresses[0], half), slice(&ram, addresses[1], len - half)];
    disk.write_at(&halves, offset).unwrap();
    let mut found = vec![0; len];
    File::open(path).unwrap().read_exact_at(&mut found, offset).unwrap();
    assert!(found == data, "written at {offset}");

    let far = 2 * MIB + addresses[0];
    disk.read_at(&[slice(&ram, far, len)], offset).unwrap();
    ram.read_slice(&mut found, GuestAddress(far)).unwrap();
    assert!(found == data, "read at {offset}");
}

#[test]
fn data_goes_to_its_place_and_comes_back() {
    let dir = dir();
    let options = image(&dir, 4 * MIB);
    let (mut disk, _) = open(&options);
    assert_eq!(disk.capacity_sectors(), 8192);
    round_trip(&mut disk, &options.path, 0, 4096, [0, 8192]);
    round_trip(&mut disk, &options.path, 512 * 3, 512 * 7, [17, 70001]);
    round_trip(&mut disk, &options.path, 3 * MIB, 1 << 20, [0, 600_000]);
    disk.flush().unwrap();
}

#[test]
fn direct_io_takes_any_guest_buffer() {
    let dir = dir();
    let options = DiskOptions { direct: true, ..image(&dir, 4 * MIB) };
    let (mut disk, _) = open(&options);
    round_trip(&mut disk, &options.path, 0, 8192, [0, 8192]);
    round_trip(&mut disk, &options.path, 512 * 3, 512 * 7, [17, 70001]);
    round_trip(&mut disk, &options.path, 3 * MIB, 1 << 20, [1, 600_000]);
}

#[test]
fn a_request_below_the_alignment_leaves_its_neighbours_alone() {
    let dir = dir();
    let options = image(&dir, MIB);
    let (mut disk, _) = open(&options);
    let before = pattern(1 << 20);
    fs::write(&options.path, &before).unwrap();
    disk.bounce = Bounce::new(4096, 4096);
    round_trip(&mut disk, &options.path, 512 * 9, 512 * 3, [3, 9000]);
    round_trip(&mut disk, &options.path, 512 * 17, 600 << 10, [3, 700_000]);
    disk.bounce.write_zeroes(&disk.file, 512, 1024).unwrap();
    let mut expected = before;
    expected[512 * 9..512 * 12].copy_from_slice(&pattern(512 * 3));
    expected[512 * 17..512 * 17 + (600 << 10)].copy_from_slice(&pattern(600 << 10));
    expected[512..1536].fill(0);
    assert!(fs::read(&options.path).unwrap() == expected);
}

#[test]
fn reads_mark_guest_memory_dirty_also_when_they_fail() {
    let dir = dir();
    let options = image(&dir, MIB);
    let (mut disk, _) = open(&options);
    let ram = ram();
    disk.read_at(&[slice(&ram, 4096, 8192)], 0).unwrap();
    disk.file.set_len(512).unwrap();
    let error = disk.read_at(&[slice(&ram, 5 * 4096, 4096)], 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    let dirty: Vec<_> = (0..8).filter(|p| slice(&ram, p * 4096, 1).bitmap().dirty_at(0)).collect();
    assert_eq!(dirty, [1, 2, 5]);
}

#[test]
fn discard_and_unmapping_zeroes_give_storage_back() {
    let dir = dir();
    let options = image(&dir, MIB);
    fs::write(&options.path, pattern(1 << 20)).unwrap();
    let (mut disk, handle) = open(&options);
    handle.flush().unwrap();
    let blocks = || fs::metadata(&options.path).unwrap().blocks();
    let full = blocks();
    disk.discard(0, MIB / 2).unwrap();
    assert!(blocks() <= full - MIB / 2 / 512 + 16, "{} of {full}", blocks());
    disk.write_zeroes(MIB / 2, MIB / 4, true).unwrap();
    assert!(blocks() <= full - 3 * MIB / 4 / 512 + 16, "{} of {full}", blocks());
    let data = fs::read(&options.path).unwrap();
    assert_eq!(data.len(), 1 << 20);
    assert!(data[..3 << 18].iter().all(|b| *b == 0));
    assert!(data[3 << 18..] == pattern(1 << 20)[3 << 18..]);
}

#[test]
fn zeroes_are_written_where_they_were_asked_for() {
    let dir = dir();
    let options = image(&dir, 2 * MIB);
    let before = pattern(2 << 20);
    fs::write(&options.path, &before).unwrap();
    let (mut disk, _) = open(&options);
    disk.write_zeroes(512 * 5, 512 * 100, false).unwrap();
    // As where the file system can't: longer than the buffer, odd edges.
    disk.bounce.write_zeroes(&disk.file, 512 * 201, MIB).unwrap();
    let mut expected = before;
    expected[512 * 5..512 * 105].fill(0);
    expected[512 * 201..512 * 201 + (1 << 20)].fill(0);
    assert!(fs::read(&options.path).unwrap() == expected);
}

#[test]
fn what_is_no_disk_is_refused_in_one_line() {
    let dir = dir();
    let options = image(&dir, MIB);
    let path = options.path.display().to_string();
    let sized = |len| {
        File::options().write(true).open(&options.path).unwrap().set_len(len).unwrap();
        message(&options)
    };
    assert_eq!(
        sized(1000),
        format!(
            "disk {path}: its size, 1000 bytes, is not a multiple of 512; resize it with 'truncate -s'"
        )
    );
    assert_eq!(
        sized(0),
        format!("disk {path}: its size, 0 bytes, is nothing; resize it with 'truncate -s'")
    );
    let other = |path: &Path| {
        message(&DiskOptions { path: path.to_owned(), read_only: false, direct: false })
    };
    assert!(other(&dir.path().join("none")).ends_with("'truncate -s 1G'"));
    assert!(other(&options.path.join("below")).contains("no such file"));
    assert!(other(dir.path()).contains("is a directory; a disk is a raw"));
    assert!(other(Path::new("/dev/null")).contains("is a character device"));
}

#[test]
fn a_direct_disk_is_whole_blocks_long() {
    let dir = dir();
    let options = image(&dir, MIB);
    assert!(check_size(&options.path, MIB + 512, 4096).unwrap_err().to_string().contains("4096"));
    check_size(&options.path, MIB + 512, 512).unwrap();
}

#[test]
fn refused_permission_tells_what_to_do() {
    // By hand: root is refused nothing.
    let mut options = DiskOptions { path: "/x".into(), read_only: false, direct: true };
    let told = |options: &DiskOptions, code| {
        open_error(options, io::Error::from_raw_os_error(code)).to_string()
    };
    assert_eq!(
        told(&options, libc::EACCES),
        "disk /x: no permission to write; make it writable for this user, or add ',readonly'"
    );
    assert!(told(&options, libc::EINVAL).contains("leave 'direct' out"));
    options.read_only = true;
    assert!(told(&options, libc::EACCES).contains("no permission to read"));
    assert!(told(&options, libc::EIO).contains("can't open it"));
}

#[test]
fn a_read_only_disk_can_not_be_written_by_the_backend_either() {
    let dir = dir();
    let options = DiskOptions { read_only: true, ..image(&dir, MIB) };
    let (mut disk, _) = open(&options);
    assert!(disk.read_only());
    let ram = ram();
    let error = disk.write_at(&[slice(&ram, 0, 512)], 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBADF));
}

#[test]
fn the_lock_passes_by_hand() {
    let dir = dir();
    let options = image(&dir, MIB);
    let (source, source_handle) = open(&options);
    // A destination prepares while the source still runs.
    let (_destination, destination_handle) = Disk::open(&options, Locking::Later).unwrap();
    assert!(matches!(destination_handle.take_lock(), Err(LockError::Held { .. })));
    source_handle.release_lock().unwrap();
    destination_handle.take_lock().unwrap();
    assert!(matches!(source_handle.take_lock(), Err(LockError::Held { .. })));
    drop(source);
}
