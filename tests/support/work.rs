//! A stock guest at work that moves between processes of one host: on its memory, a disk and a TCP stream, with its console and
//! its clocks watched all the while. In the end all that it did is right.

#![allow(dead_code, reason = "each test program uses a part")]

use std::fs;
use std::net::TcpListener;

use crate::image::check_image;
use crate::linux::{Guest, guest_file};
use crate::load::{self, Load};
use crate::net::{bridge, in_namespace};
use crate::travel::{Link, Trip};

/// The server of the guests' streams: an address of the bridge that their TAPs are on.
const SERVER: &str = "10.9.8.1:7001";
/// A clock may be wrong by that much more after a move than before. How wrong it was before is the guest
/// kernel's doing: it reads the time once, then counts ticks, and its first second has few of them.
const CLOCK_US_MAX: i64 = 50_000;
/// A downtime that a busy emulated host can keep.
pub const EASY: [&str; 2] = ["--downtime-limit", "3s"];

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
pub fn to_and_fro(trip: &mut Trip, link: Link, moves: usize, first: usize) {
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

pub const WORK: Load = Load {
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
pub fn work_and_move(
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
