//! Stock guests that move between processes of one host while they work: memory, disk, network, console and
//! clocks are watched from inside and outside, and nothing may be lost. Also what a move may meet: a paused
//! guest, a change of mind.

#[path = "support/image.rs"]
mod image;
#[path = "support/linux.rs"]
mod linux;
#[path = "support/load.rs"]
mod load;
#[path = "support/net.rs"]
mod net;
#[path = "support/travel.rs"]
mod travel;

use std::fs;
use std::net::TcpListener;

use image::check_image;
use linux::{Guest, guest_file};
use load::Load;
use net::{bridge, in_namespace};
use travel::{Link, Trip};

/// The server of the guests' streams: an address of the bridge that their TAPs are on.
const SERVER: &str = "10.9.8.1:7001";
/// A clock may be wrong by that much more after a move than before. How wrong it was before is the guest
/// kernel's doing: it reads the time once, then counts ticks, and its first second has few of them.
const CLOCK_US_MAX: i64 = 50_000;
/// A downtime that a busy emulated host can keep.
const EASY: [&str; 2] = ["--downtime-limit", "3s"];

/// Runs `test`, the body of the test `name`, in a network namespace with a bridge and two TAPs on it; or, in
/// the guest, what the guest does in it.
fn with_guest(name: &str, test: impl FnOnce()) {
    if let Some(load) = Load::told() {
        return load::run(&load);
    }
    in_namespace(name, || {
        bridge("10.9.8.1/24", &["tap0", "tap1"]);
        test();
    });
}

/// A guest that works as told, with a disk and an interface.
fn guest(kernel: &'static str, cpus: u32, name: &str, load: &Load) -> Guest {
    let image = fs::read(guest_file("root.ext4")).unwrap();
    let guest = Guest::new(kernel).cpus(cpus).mem("192M").disk("disk", &image, ",id=data");
    guest
        .option("--net", "tap=tap0,id=net,mac=02:00:00:00:00:2a")
        .cmdline("vmm.ip=10.9.8.2/24")
        .file("load", load::program())
        .run(&load.script(name))
}

/// Moves the guest that often to the other TAP and back. Its clock stays as right as it was.
fn to_and_fro(trip: &mut Trip, link: Link, moves: usize, first: usize) {
    for turn in first..first + moves {
        let before = trip.clock();
        let there = format!("id=net,tap=tap{}", (turn + 1) % 2);
        trip.move_on(link, &["--net", &there], &EASY);
        let after = trip.clock();
        let change = (after.ahead_us - before.ahead_us).abs();
        eprintln!("clock before {before:?}, after {after:?}");
        trip.check(
            change <= CLOCK_US_MAX + before.error_us + after.error_us,
            &format!("the wall clock was {before:?} before the move and is {after:?}"),
        );
    }
}

const WORK: Load = Load {
    writers: 1,
    writer_mib: 16,
    rest_ms: 20,
    mib_per_s: 0,
    pace: false,
    disk: true,
    server: Some(SERVER),
    gentle: false,
};

/// A guest at work moves as `then` has it, and all that it did is right in the end.
fn work_and_move(
    name: &str,
    (kernel, cpus, load): (&'static str, u32, &Load),
    then: impl FnOnce(&mut Trip),
) {
    with_guest(name, || {
        let server = load::serve(TcpListener::bind(SERVER).unwrap());
        let mut trip = Trip::start(guest(kernel, cpus, name, load));
        then(&mut trip);
        let told = trip.finish();
        let served = server.join().unwrap();
        trip.check(
            served == Ok(told.number("stream_blocks")),
            &format!("the server says {served:?}"),
        );
        if load.disk {
            check_image(&trip.path("disk"), told.number("disk_blocks"));
        }
        for name in ["gap_us", "passes", "disk_blocks", "stream_blocks"] {
            eprintln!("{name} {}", told.number(name));
        }
    });
}

#[test]
fn two_vcpus_over_tcp() {
    work_and_move("two_vcpus_over_tcp", ("6.12-cloud", 2, &WORK), |trip| {
        to_and_fro(trip, Link::Tcp, 2, 0);
    });
}

/// With less to do, as the emulated host has one CPU for all.
#[test]
fn four_vcpus_keep_their_connection() {
    let load = Load { writer_mib: 4, rest_ms: 50, disk: false, gentle: true, ..WORK };
    work_and_move("four_vcpus_keep_their_connection", ("6.12-cloud", 4, &load), |trip| {
        to_and_fro(trip, Link::Tcp, 1, 0);
    });
}

/// An older kernel; on the way a move is cancelled, and one happens while the guest is paused.
#[test]
fn one_vcpu_over_unix_sockets() {
    work_and_move("one_vcpu_over_unix_sockets", ("6.1-cloud", 1, &WORK), |trip| {
        to_and_fro(trip, Link::Unix, 2, 0);
        cancelled(trip);
        paused(trip, "id=net,tap=tap1");
        to_and_fro(trip, Link::Tcp, 1, 3);
    });
}

/// The operator changes his mind when some of the memory has gone over: the guest stays.
fn cancelled(trip: &mut Trip) {
    let uri = trip.listen(Link::Unix, &["--net", "id=net,tap=tap1"]);
    let client = trip.start_move(&uri, &["--bandwidth", "10M"]);
    trip.until("pre-copy has begun", |trip| {
        let migration = &trip.info()["migration"];
        migration["stage"] == "pre-copy" && migration["bytes"].as_u64() > Some(1 << 20)
    });
    trip.type_line();
    trip.ask(&["migrate", "--cancel"]);
    let output = client.wait_with_output().unwrap();
    trip.check(output.status.code() == Some(1), &format!("{output:?}"));
    trip.check(
        trip.progress().contains("cancel"),
        &format!("the client said {:?}", trip.progress()),
    );
    let said = trip.forget_destination();
    trip.check(said.contains("cancel"), &format!("the destination said {said:?}"));
    trip.check(trip.info()["state"] == "running", "the guest doesn't run on");
    trip.type_line();
    trip.goes_on();
    trip.hears();
}

/// What is paused arrives paused, with what was typed meanwhile, and goes on when told to.
fn paused(trip: &mut Trip, there: &str) {
    trip.ask(&["pause"]);
    trip.type_line();
    trip.type_line();
    let uri = trip.listen(Link::Unix, &["--net", there]);
    let client = trip.start_move(&uri, &EASY);
    trip.arrive(client, &uri);
    trip.check(trip.info()["state"] == "paused", "it doesn't arrive paused");
    std::thread::sleep(std::time::Duration::from_millis(500));
    trip.check(trip.console_here().is_empty(), "a paused guest talks");
    trip.ask(&["resume"]);
    trip.goes_on();
    trip.hears();
}
