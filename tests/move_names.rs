//! Moves over TCP by IPv6 addresses, and by names that have several addresses.

mod support;

use std::fs;
use std::net::TcpListener;
use std::process::Command;

use support::guests::Guest;
use support::moves::{EASY, check_last_line, listen_output};
use support::vm::{Place, Vm, has_kvm};

/// Everything in `/etc` is what stands in that directory, for what follows.
const OTHER_ETC: &str = "mount --bind \"$0\" /etc && exec \"$@\"";

fn dirtier() -> Guest {
    Guest::dirtier(8, 0)
}

fn check_intact(vm: &mut Vm) {
    let dots = vm.read_some(3);
    assert!(dots.iter().all(|b| *b == b'.'), "its memory changed: {dots:?}");
}

#[test]
fn an_ipv6_address() {
    if !has_kvm() {
        return;
    }
    let mut source = Vm::start(dirtier(), &[]);
    check_intact(&mut source);
    let port = TcpListener::bind("[::1]:0").unwrap().local_addr().unwrap().port();
    let nobody = format!("tcp:[::1]:{port}");
    source.try_move(&nobody, &[]).check_failed(&["can't connect", &nobody, "refused"]);
    for bad in ["tcp:[::1:4444", "tcp:::1:4444", "tcp:[::1]4444", "tcp:[::x]:4444"] {
        let answer = source.try_move(bad, &[]);
        assert!(
            answer.status == Some(2) && answer.err.contains("stands in brackets"),
            "{answer:?}"
        );
    }
    let other = listen_output("tcp:[2001:db8::1]:4444");
    assert_eq!(other.status.code(), Some(1), "{other:?}");
    let err = String::from_utf8(other.stderr).unwrap();
    check_last_line(&err, &["can't listen on tcp:[2001:db8::1]:4444"]);
    let (mut destination, uri) = Vm::listen_tcp_at("[::1]", &[]);
    source.move_to(&uri, &EASY);
    check_intact(&mut destination);
}

/// Whichever of its addresses somebody listens at.
#[test]
fn a_name_with_several_addresses() {
    if !has_kvm() {
        return;
    }
    for host in ["127.0.0.1", "[::1]"] {
        let place = Place::new();
        let etc = place.path("etc");
        fs::create_dir(&etc).unwrap();
        fs::write(etc.join("hosts"), "::1 both.test\n127.0.0.1 both.test\n").unwrap();
        // Or else glibc gives the first one only.
        fs::write(etc.join("host.conf"), "multi on\n").unwrap();
        let inner = place.run(dirtier(), &[]);
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", OTHER_ETC]).arg(&etc).env_remove("VMM_LOG");
        command.arg(inner.get_program()).args(inner.get_args());
        let mut source = Vm::spawn(place, command);
        check_intact(&mut source);
        source
            .try_move("tcp:neither.test:4444", &[])
            .check_failed(&["can't connect", "neither.test"]);
        let (mut destination, uri) = Vm::listen_tcp_at(host, &[]);
        let port = uri.rsplit(':').next().unwrap();
        source.move_to(&format!("tcp:both.test:{port}"), &EASY);
        check_intact(&mut destination);
    }
}
