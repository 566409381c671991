//! A stock guest's network: a TAP in a network namespace, with this test at its other end.

#[path = "support/linux.rs"]
mod linux;
#[path = "support/net.rs"]
mod net;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;

use linux::{Ended, Guest, LONG, Vm};
use net::{in_namespace, ip};

const LEN: usize = 64 << 20;

/// 64 MiB in which no 16 bytes come twice.
fn data() -> Vec<u8> {
    let blocks = 0..(LEN / 16) as u64;
    blocks
        .flat_map(|n| [n.to_le_bytes(), n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()])
        .flatten()
        .collect()
}

/// The first word that a program prints, given `input`.
fn digest(program: &str, input: &[u8]) -> String {
    let mut child =
        Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
}

/// What the guest's driver agreed to, a digit for each bit: checksums, TSO and mergeable buffers both ways, and
/// what a move needs.
fn check_offloads(ended: &Ended) {
    let features: Vec<_> = ended.value("features").chars().collect();
    for (bit, name) in [
        (0, "CSUM"),
        (1, "GUEST_CSUM"),
        (3, "MTU"),
        (5, "MAC"),
        (7, "GUEST_TSO4"),
        (8, "GUEST_TSO6"),
        (11, "HOST_TSO4"),
        (12, "HOST_TSO6"),
        (15, "MRG_RXBUF"),
        (16, "STATUS"),
        (21, "GUEST_ANNOUNCE"),
        (28, "RING_INDIRECT_DESC"),
        (29, "RING_EVENT_IDX"),
        (32, "VERSION_1"),
    ] {
        ended.check(features.get(bit) == Some(&'1'), &format!("{name} isn't negotiated"));
    }
}

/// Another VM is told who has the TAP, or that there is none: one line, status 1.
fn vm_has_the_tap(vm: &mut Vm) {
    let second = Guest::new("6.12-cloud");
    vm.wait_for("init: userspace is up");
    for (tap, words) in [
        ("tap0", format!("tap 'tap0': in use by pid {}", vm.pid())),
        ("tap1", "tap 'tap1': no such interface; create it with 'ip tuntap add tap1".to_owned()),
    ] {
        let output = second.command().args(["--net", &format!("tap={tap}")]).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(&words) && stderr.lines().count() == 1, "{stderr}");
    }
}

/// The guest takes the data from one connection and gives it back on another.
#[test]
fn ping_and_64_mib_each_way() {
    in_namespace("ping_and_64_mib_each_way", || {
        ip("tuntap add tap0 mode tap");
        ip("address add 10.9.8.1/24 dev tap0");
        ip("link set tap0 up");
        let data = Arc::new(data());
        let (sent, received) = (Arc::clone(&data), channel());
        let out = TcpListener::bind("10.9.8.1:7001").unwrap();
        thread::spawn(move || out.accept().unwrap().0.write_all(&sent).unwrap());
        let back = TcpListener::bind("10.9.8.1:7002").unwrap();
        thread::spawn(move || {
            let mut got = Vec::with_capacity(LEN);
            back.accept().unwrap().0.read_to_end(&mut got).unwrap();
            received.0.send(got)
        });
        let script = r#"
            echo "mac=$(cat /sys/class/net/eth0/address)"
            echo "mtu=$(cat /sys/class/net/eth0/mtu)"
            echo "features=$(cat /sys/class/net/eth0/device/features)"
            ping -c 3 -W 20 10.9.8.1 || exit 1
            nc 10.9.8.1 7001 < /dev/null > /data || exit 2
            echo "sum=$(md5sum < /data | cut -d ' ' -f 1)"
            nc 10.9.8.1 7002 < /data || exit 3
            dmesg | grep -i 'eth0.*hw csum failure' && exit 4
            true
        "#;
        let guest = Guest::new("6.12-cloud").elf().cpus(2).mem("512M").run(script);
        let mut vm = guest
            .option("--net", "tap=tap0,mac=02:00:00:00:00:2a,mtu=1400")
            .cmdline("vmm.ip=10.9.8.2/24")
            .start();
        vm_has_the_tap(&mut vm);
        let ended = vm.wait();
        ended.check_basics(2);
        check_offloads(&ended);
        ended.check_value("mac", "02:00:00:00:00:2a").check_value("mtu", "1400");
        ended.check(ended.console.contains("3 packets received"), "ping lost packets");
        ended.check_value("sum", &digest("md5sum", &data));
        let back = received.1.recv_timeout(LONG).unwrap();
        ended.check(back == *data, "what came back isn't what was sent");
    });
}
