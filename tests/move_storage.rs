//! A destination whose storage hangs: it can be cancelled all the same.

mod support;

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use support::guests::Guest;
use support::lies::check_intact;
use support::moves::{EASY, until};
use support::vm::{Place, Vm, has_kvm};

/// Has a process hold a lease on a file: whoever opens it waits for that process, which does nothing, for as long as
/// `/proc/sys/fs/lease-break-time` says (45 s by default).
fn lease(path: &Path) -> Child {
    // F_SETLEASE, F_WRLCK. SIGIO asks for the lease.
    const PROGRAM: &str = "$SIG{IO} = 'IGNORE'; open(my $f, '+<', $ARGV[0]) or die $!; \
                           fcntl($f, 1024, 1) or die $!; $| = 1; print 'leased'; sleep 100;";
    let mut command = Command::new("perl");
    command.args(["-e", PROGRAM]).arg(path).stdout(Stdio::piped());
    let mut holder = command.spawn().expect("perl is there");
    holder.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).expect("a lease");
    holder
}

/// Whether somebody waits for a lease on a file.
fn is_awaited(path: &Path) -> bool {
    let inode = format!(":{} ", fs::metadata(path).unwrap().ino());
    let locks = fs::read_to_string("/proc/locks").unwrap();
    locks.lines().any(|line| line.contains("BREAKING") && line.contains(&inode))
}

#[test]
fn a_destination_whose_storage_hangs_can_be_cancelled() {
    if !has_kvm() {
        return;
    }
    let place = Place::new();
    let disks = ["here", "there"].map(|name| place.path(name));
    disks.iter().for_each(|disk| fs::write(disk, [0; 1 << 16]).unwrap());
    let option = format!("{},id=data", disks[0].display());
    let mut source = Vm::start(Guest::dirtier(4, 0), &["--disk", &option]);
    source.wait_until_up();
    let there = format!("id=data,path={}", disks[1].display());
    let (mut destination, uri) = Vm::listen(&["--disk", &there]);
    let mut holder = lease(&disks[1]);
    let client = source.start_move(&uri, &EASY);
    until("opens the disk", || is_awaited(&disks[1]));
    destination.signal(Signal::INT);
    client.wait().check_failed(&["reservation", "the destination says", "cancelled"]);
    assert_eq!(destination.wait().0, Some(1));
    assert!(is_awaited(&disks[1]), "it was cancelled when the disk was there");
    check_intact(&mut source);
    holder.kill().unwrap();
    holder.wait().unwrap();
}
