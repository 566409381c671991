//! A stock guest moves to another host and back, and its network follows: bridges that had learned where it was learn
//! where it is, and its TCP connection goes on. So does its time, though the hosts' real times are seconds apart. This
//! file runs in both of two emulated hosts at once: host 1 has the server and boots the guest, host 2 takes the guest in
//! for a while.

#[path = "support/linux.rs"]
mod linux;
#[path = "support/load.rs"]
mod load;
#[path = "support/net.rs"]
mod net;
#[path = "support/talk.rs"]
mod talk;
#[path = "support/travel.rs"]
mod travel;

use std::fs;
use std::net::TcpListener;
use std::process::Command;

use linux::Guest;
use load::{ClockWord, Load};
use net::ip;
use serde_json::{Value, json};
use talk::{Talk, until};
use travel::Trip;

const NAME: &str = "a_connection_follows_its_guest_to_another_host";
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x2a];
const SERVER: &str = "10.77.0.1:7001";
const PORT: u16 = 4444;
const THERE: &str = "tcp:10.77.0.2:4444";
const BACK: &str = "tcp:10.77.0.1:4444";
const EASY: [&str; 2] = ["--downtime-limit", "3s"];
/// A clock may be wrong by that much more after a move than before, and by what the two words that are compared may be wrong.
const CLOCK_US_MAX: i64 = 50_000;

/// The host's address moves from its Ethernet to a bridge, which has a TAP for the guest too.
fn bridge(host: &str) {
    // The modules are there; nothing loads them by itself.
    for module in ["bridge", "sch_ingress", "cls_u32", "act_police"] {
        let status = Command::new("modprobe").arg(module).status().unwrap();
        assert!(status.success(), "modprobe {module}");
    }
    ip("address flush dev eth0");
    ip("link add br0 type bridge");
    ip("link set eth0 master br0");
    ip("tuntap add tap0 mode tap");
    ip("link set tap0 master br0 up");
    ip(&format!("address add 10.77.0.{host}/24 dev br0"));
    ip("link set br0 up");
}

/// The port of the bridge behind which it believes the guest to be, if it has learned that.
fn learned() -> Option<&'static str> {
    // Entries of 16 bytes: the address, the port's number, and what doesn't matter here.
    let table = fs::read("/sys/class/net/br0/brforward").unwrap();
    let number = table.chunks(16).find(|entry| entry[..6] == MAC)?[6];
    let port = |name: &str| {
        let text = fs::read_to_string(format!("/sys/class/net/{name}/brport/port_no")).unwrap();
        u8::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap()
    };
    Some(["eth0", "tap0"].into_iter().find(|name| port(name) == number).expect("a port"))
}

fn tc(args: &str) -> String {
    let output =
        Command::new("tc").args(args.split_whitespace()).output().expect("tc, of iproute2");
    assert!(output.status.success(), "tc {args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Counts what comes from the guest's MAC over the Ethernet: RARP, and ARP by which it names itself, from its VMM and
/// from its kernel.
fn count_announcements() {
    // Offsets from the end of the Ethernet header, whose source address is at -8; ARP's target at 24.
    let from = "match u32 0x02000000 0xffffffff at -8 match u16 0x002a 0xffff at -4";
    let count = "action police rate 1gbit burst 1mb conform-exceed pass";
    tc("qdisc add dev eth0 ingress");
    tc(&format!("filter add dev eth0 parent ffff: prio 1 protocol 0x8035 u32 {from} {count}"));
    let itself = "match u32 0x0a4d0009 0xffffffff at 24";
    // The VMM's frames have Ethernet's least length, the kernel's end after ARP's 28 bytes.
    let padding = "match u32 0 0xffffffff at 40";
    for (order, length) in [(2, padding), (3, "")] {
        tc(&format!(
            "filter add dev eth0 parent ffff: prio {order} protocol arp u32 {from} {itself} {length} {count}"
        ));
    }
}

/// How many of each came.
fn announcements() -> Vec<u64> {
    let shown = tc("-s filter show dev eth0 parent ffff:");
    let counts = shown.lines().filter_map(|line| {
        let (_, rest) = line.trim().strip_prefix("Sent ")?.split_once(" bytes ")?;
        rest.split(' ').next()?.parse().ok()
    });
    let counts: Vec<u64> = counts.collect();
    assert_eq!(counts.len(), 3, "{shown}");
    counts
}

/// What one half tells the other when the guest has gone there.
fn word(trip: &Trip, typed: u64, report: &Value, clock: ClockWord) -> Value {
    json!({
        "console": trip.console(),
        "typed": typed,
        "downtime_us": report["downtime"]["total_us"],
        "ahead_us": clock.ahead_us,
        "error_us": clock.error_us,
    })
}

/// The guest has come, and works on. Its clock has gone on by no more than what passed outside, and by no less than that without
/// the downtime, whatever the hosts' own clocks say.
fn comes(trip: &mut Trip, word: &Value) -> ClockWord {
    let number = |name: &str| word[name].as_i64().unwrap();
    let typed = word["typed"].as_u64().unwrap();
    trip.take_over(word["console"].as_str().unwrap().to_owned(), typed);
    trip.type_line();
    trip.goes_on();
    trip.hears();
    // Words of the connection from after the move.
    let clock = trip.clock();
    let change = clock.ahead_us - number("ahead_us");
    let slack = CLOCK_US_MAX + number("error_us") + clock.error_us;
    let least = -number("downtime_us") - slack;
    eprintln!("its clock is ahead by {change} us more, of {least} to {slack}");
    trip.check(
        (least..=slack).contains(&change),
        &format!("by {change} us, of {least} to {slack}"),
    );
    clock
}

/// The operator is told that the hosts' clocks are apart.
fn check_warning(trip: &Trip, report: &Value, words: &str) {
    trip.check(report["warnings"].to_string().contains(words), &report["warnings"].to_string());
}

/// Host 1: the guest works with the server here, leaves, and comes back.
fn first() {
    bridge("1");
    count_announcements();
    let server = load::serve(TcpListener::bind(SERVER).unwrap());
    let load =
        Load { writers: 1, writer_mib: 4, rest_ms: 50, server: Some(SERVER), ..Load::default() };
    let guest = Guest::new("6.1-cloud")
        .cpus(2)
        .mem("160M")
        .option("--net", "tap=tap0,mac=02:00:00:00:00:2a")
        .cmdline("vmm.ip=10.77.0.9/24")
        .file("load", load::program())
        .run(&load.script(NAME));
    // Its first frames, which ask everyone where the server is, are to reach host 2 as well.
    let mut talk = Talk::connect();
    let mut trip = Trip::start(guest);
    assert_eq!(talk.hear()["learned"], "eth0", "host 2 has never heard of the guest");
    assert_eq!(learned(), Some("tap0"));
    assert_eq!(announcements(), [0, 0, 0]);
    trip.type_line();
    trip.hears();
    let clock = trip.clock();
    let client = trip.start_move(THERE, &EASY);
    let report = trip.arrive(client, THERE);
    check_warning(&trip, &report, "s ahead of the source's");
    let counts = until("the guest is announced", || {
        Some(announcements()).filter(|counts| !counts.contains(&0))
    });
    eprintln!("RARP, and gratuitous ARP of the VMM and of the guest: {counts:?} frames");
    assert_eq!(learned(), Some("eth0"));

    let mut back = Trip::expect(PORT, &[]);
    talk.say(&word(&trip, 1, &report, clock));
    comes(&mut back, &talk.hear());
    assert_eq!(learned(), Some("tap0"));
    let told = back.finish();
    assert_eq!(server.join().unwrap(), Ok(told.number("stream_blocks")));
    talk.say(&json!("ended"));
}

/// Sets this host's real time ahead by five seconds.
fn set_clock_ahead() {
    let output = Command::new("sh").args(["-c", "date -s @$(($(date +%s) + 5))"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// Host 2: takes the guest in, and gives it back to a host that is behind.
fn second() {
    set_clock_ahead();
    bridge("2");
    let listener = Talk::listen();
    let mut trip = Trip::expect(PORT, &[]);
    let mut talk = Talk::accept(&listener);
    // From its frames to everyone, as from those that flooded before: what is sent to the guest from
    // there would go nowhere, were this not to change.
    until("the guest was heard of", learned);
    talk.say(&json!({ "learned": learned() }));
    let came = talk.hear();
    assert_eq!(learned(), Some("tap0"));
    let clock = comes(&mut trip, &came);
    let client = trip.start_move(BACK, &EASY);
    let report = trip.arrive(client, BACK);
    check_warning(&trip, &report, "s behind the source's");
    until("the guest is known to be gone", || learned().filter(|port| *port == "eth0"));
    talk.say(&word(&trip, 2, &report, clock));
    assert_eq!(talk.hear(), "ended");
}

#[test]
fn a_connection_follows_its_guest_to_another_host() {
    if let Some(load) = Load::told() {
        return load::run(&load);
    }
    match std::env::var("HOST").expect("HOST: see tests/run").as_str() {
        "1" => first(),
        _ => second(),
    }
}
