//! Stock guests move from one host to another over a network: this file runs in both of two emulated
//! hosts at once. Host 1 boots a guest and sends it off; host 2 takes it in and judges. Its disk is storage that
//! both hosts reach: a block device, written to past the hosts' page caches, or by way of them: then the source has to write
//! its own through, and the destination to forget what it has.

#[path = "support/hosts.rs"]
mod hosts;

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::net::{TcpListener, TcpStream};

use hosts::{MIGRATION_PORT, TEST_PORT, console, env, finished, guest_file, until, vmm, wait_for};

/// The guests that move, one after the other: kernel and vCPUs. No two have as many.
const GUESTS: [(&str, u32); 3] = [("6.12-cloud", 1), ("6.1-cloud", 2), ("6.12-cloud", 4)];

/// The guest, by its vCPUs, whose disk goes by way of the hosts' caches.
const CACHED: u32 = 2;

/// The storage that both hosts reach, and how long a block on it is.
const SHARED: &str = "/dev/vdb";
const BLOCK_LEN: usize = 512;

/// Host 1: boots a guest that counts, on its console and in the blocks of its disk, and moves it.
fn source(kernel: &str, cpus: u32) {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("console");
    // A tick is told when its block is on the disk, and the one before can be read there: the guest has neither in its own cache.
    let (cache, how) = if cpus == CACHED {
        ("", "oflag=direct conv=notrunc")
    } else {
        (",direct", "conv=notrunc,fsync")
    };
    let count = format!(
        "until [ -b /dev/vda ]; do usleep 50000; done; grep -c ^processor /proc/cpuinfo; i=0; \
         while :; do \
         [ $i = 0 ] || [ $(dd if=/dev/vda bs=512 skip=$((i-1)) count=1 iflag=direct 2>/dev/null) = $last ] || exit 1; \
         last=block-$i-of-{cpus}; \
         printf '%-511s\\n' $last | dd of=/dev/vda bs=512 seek=$i {how} 2>/dev/null || exit 1; \
         echo tick $i $(cut -d. -f1 /proc/uptime) $(date +%s); i=$((i+1)); usleep 50000; done"
    );
    let initrd = guest_file(&format!("initramfs-{kernel}.cpio"));
    let mut running = vmm(&["run", "--mem", "128M", "--name", "wanderer", "--kernel"])
        .arg(guest_file(&format!("vmlinux-{kernel}")))
        .args(["--cpus", &cpus.to_string(), "--disk", &format!("{SHARED}{cache},id=data")])
        .arg("--initrd")
        .arg(initrd)
        .arg("--serial")
        .arg(format!("file:{}", log.display()))
        .args(["--cmdline", &format!("console=ttyS0 quiet panic=-1 vmm.run=\"{count}\"")])
        .spawn()
        .unwrap();
    wait_for(&log, "tick 5 ", &mut running);
    assert!(console(&log).contains(&format!("\n{cpus}\r\ntick 0 ")), "{}", console(&log));
    let uri = format!("tcp:{}:{MIGRATION_PORT}", env("PEER"));
    let report = until("the destination never took the guest", || {
        // Generous: a fifth of a second is little on two emulated CPUs.
        let output = vmm(&["migrate", "--connect", &uri, "--downtime-limit", "2s", "--json"])
            .arg("wanderer")
            .output()
            .unwrap();
        if output.status.success() { Ok(output) } else { Err(finished(&output)) }
    });
    let last = String::from_utf8_lossy(&report.stdout).lines().last().unwrap().to_owned();
    assert!(last.contains("\"outcome\":\"moved\""), "{last}");
    let status = running.wait().unwrap();
    assert!(status.success(), "vmm run at the source: {status}");
    let mut stream = until("the other host's test", || {
        TcpStream::connect((env("PEER"), TEST_PORT)).map_err(|e| e.to_string())
    });
    stream.write_all(&fs::read(&log).unwrap()).unwrap();
}

/// Host 2: takes the guest in, and holds both consoles together. What it has of the disk is in its cache before, and stays as
/// long as the disk is open.
fn destination(cpus: u32) {
    let mut shared = File::open(SHARED).unwrap();
    shared.read_to_end(&mut Vec::new()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("console");
    let listener = TcpListener::bind(("0.0.0.0", TEST_PORT)).unwrap();
    let mut running = vmm(&["migrate", "--listen", &format!("tcp:0.0.0.0:{MIGRATION_PORT}")])
        .arg("--serial")
        .arg(format!("file:{}", log.display()))
        .spawn()
        .unwrap();
    let mut whole = String::new();
    listener.accept().unwrap().0.read_to_string(&mut whole).unwrap();
    until("ten more ticks", || match console(&log).matches("tick ").count() {
        0..10 => Err(console(&log)),
        _ => Ok(()),
    });
    let stopped = vmm(&["stop", "--force", "wanderer"]).output().unwrap();
    assert!(stopped.status.success(), "{}", finished(&stopped));
    assert!(running.wait().unwrap().success());
    whole.push_str(&console(&log));
    let (mut next, mut uptime, mut date) = (0, 0, 0);
    let lines: Vec<_> = whole.split('\n').filter(|line| line.contains("tick")).collect();
    // The last line may be cut off by the stop.
    for line in &lines[..lines.len() - 1] {
        let fields: Vec<u64> = line
            .trim_end()
            .strip_prefix("tick ")
            .unwrap_or_else(|| panic!("a line came apart: {line:?} in {whole}"))
            .split(' ')
            .map(|field| field.parse().unwrap_or_else(|_| panic!("{line:?} in {whole}")))
            .collect();
        assert_eq!(fields[0], next, "a line was lost or doubled: {whole}");
        assert!(fields[1] >= uptime && fields[2] >= date, "time went back: {line:?} in {whole}");
        assert!(uptime == 0 || fields[1] - uptime < 60, "time jumped: {line:?} in {whole}");
        (next, uptime, date) = (next + 1, fields[1], fields[2]);
    }
    assert!(next >= 15, "too few ticks: {whole}");
    let mut disk = vec![0; usize::try_from(next).unwrap() * BLOCK_LEN];
    shared.rewind().unwrap();
    shared.read_exact(&mut disk).unwrap();
    for (number, block) in disk.chunks(BLOCK_LEN).enumerate() {
        let found = String::from_utf8_lossy(block);
        assert_eq!(
            found,
            format!("{:<511}\n", format!("block-{number}-of-{cpus}")),
            "block {number}"
        );
    }
}

#[test]
fn stock_guests_move_to_another_host_over_tcp() {
    for (kernel, cpus) in GUESTS {
        match env("HOST").as_str() {
            "1" => source(kernel, cpus),
            _ => destination(cpus),
        }
    }
}
