//! Stock guests that rewrite memory faster than a slow link carries it: what becomes of a move when its time
//! is up, as the operator said. Whatever that is, nothing of the guest may be lost.

#[path = "support/linux.rs"]
mod linux;
#[path = "support/load.rs"]
mod load;
#[path = "support/net.rs"]
mod net;
#[path = "support/travel.rs"]
mod travel;

use std::net::TcpListener;

use linux::Guest;
use load::{Load, pace};
use net::{bridge, in_namespace};
use serde_json::Value;
use travel::{Link, Trip};

/// The link, in megabits and in bytes a second.
const LINK: &str = "64M";
const LINK_BYTES_PER_S: u64 = 8_000_000;
/// What is rewritten without rest, and how fast, on any host: more than the link carries, and not so much
/// more that the strongest throttle couldn't make it less.
const WRITER_MIB: u32 = 16;
const WRITER_MIB_PER_S: u32 = 48;
const DOWNTIME_LIMIT_MS: u64 = 700;
/// The time for pre-copy; its first round takes about as long.
const TIMEOUT: &str = "11s";
/// The server of a guest's stream: an address of the bridge that its TAPs are on.
const SERVER: &str = "10.9.7.1:7001";
/// A clock may be wrong by that much more after a move than before; see tests/migrate.rs.
const CLOCK_US_MAX: i64 = 50_000;

const WORK: Load = Load {
    writers: 1,
    writer_mib: WRITER_MIB,
    rest_ms: 0,
    mib_per_s: WRITER_MIB_PER_S,
    pace: true,
    disk: false,
    server: None,
    gentle: true,
};

fn guest() -> Guest {
    Guest::new("6.12-cloud").cpus(2).mem("128M").file("load", load::program())
}

/// The options of a move over the slow link.
fn slowly(on_timeout: &str) -> Vec<String> {
    let limit = format!("{DOWNTIME_LIMIT_MS}ms");
    let words = ["--bandwidth", LINK, "--timeout", TIMEOUT, "--downtime-limit", &limit];
    words.iter().chain(&["--on-timeout", on_timeout]).map(|word| (*word).to_owned()).collect()
}

fn words(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}

/// The writer's pace where the guest is now, in all the words that it said of it there.
fn paces(trip: &Trip) -> Vec<u64> {
    let console = trip.console_here();
    let whole = console.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    whole.filter_map(pace).collect()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("no number: {value}"))
}

/// The rounds of a report's pre-copy.
fn rounds(report: &Value) -> &[Value] {
    let rounds = report["rounds"].as_array().unwrap();
    let (_stop, rounds) = rounds.split_last().unwrap();
    for round in rounds {
        eprintln!("{round}");
    }
    rounds
}

/// While the guest isn't slowed down, more is dirty again at the end of a round than the limit lets go over while
/// it stands: as it goes on like this, it can't move.
fn check_too_fast(trip: &Trip, rounds: &[Value]) {
    let most = LINK_BYTES_PER_S * DOWNTIME_LIMIT_MS / 1000;
    let free = |round: &&Value| round["throttle_percent"].as_array().unwrap().is_empty();
    for round in rounds.iter().filter(free) {
        let dirty = number(&round["dirty_pages"]);
        trip.check(dirty * 4096 > most, &format!("{dirty} dirty pages: {round}"));
    }
    trip.check(rounds.iter().filter(free).count() > 1, "its time was up too soon");
}

#[test]
fn throttled_until_it_fits() {
    const NAME: &str = "throttled_until_it_fits";
    if let Some(load) = Load::told() {
        return load::run(&load);
    }
    let mut trip = Trip::start(guest().run(&WORK.script(NAME)));
    trip.until("the guest tells of its pace", |trip| paces(trip).len() >= 4);
    let mut before = paces(&trip);
    before.remove(0);
    before.sort_unstable();
    let before = before[before.len() / 2];
    let bytes_per_s = before * (u64::from(WRITER_MIB) << 20) / 1000;
    trip.check(bytes_per_s > LINK_BYTES_PER_S, &format!("it writes {bytes_per_s} bytes a second"));
    let report = trip.move_on(Link::Tcp, &[], &words(&slowly("throttle")));
    let rounds = rounds(&report);
    check_too_fast(&trip, rounds);
    let last = rounds.last().unwrap();
    let throttle = last["throttle_percent"].as_array().unwrap();
    trip.check(throttle.iter().any(|percent| number(percent) >= 20), "it wasn't throttled");
    let expected_us = number(&last["expected_downtime_us"]);
    trip.check(expected_us <= DOWNTIME_LIMIT_MS * 1000, "stopped before the limit was met");
    // Full speed again: no word of it would ever be so high with the throttle on.
    trip.until(&format!("it is as fast as before, {before}"), |trip| {
        paces(trip).iter().any(|pace| *pace >= before / 2)
    });
    eprintln!("pace before {before}, after {:?}", paces(&trip));
    trip.finish();
}

#[test]
fn given_up_then_stopped_for_long() {
    const NAME: &str = "given_up_then_stopped_for_long";
    if let Some(load) = Load::told() {
        return load::run(&load);
    }
    in_namespace(NAME, || {
        bridge("10.9.7.1/24", &["tap0", "tap1"]);
        let server = load::serve(TcpListener::bind(SERVER).unwrap());
        let load = Load { mib_per_s: 0, server: Some(SERVER), ..WORK };
        let guest = guest().option("--net", "tap=tap0,id=net").cmdline("vmm.ip=10.9.7.2/24");
        let mut trip = Trip::start(guest.run(&load.script(NAME)));
        given_up(&mut trip);
        let fast = ["--downtime-limit", "3s"];
        trip.move_on(Link::Unix, &["--net", "id=net,tap=tap1"], &fast);
        let stall_us = stopped_for_long(&mut trip);
        let told = trip.finish();
        // It looks at its clock all the time, so its largest gap has all of the stall in it.
        let gap_us = told.number("gap_us");
        trip.check(gap_us >= stall_us, &format!("a stall of {stall_us} us, a gap of {gap_us}"));
        let served = server.join().unwrap();
        let blocks = told.number("stream_blocks");
        trip.check(served == Ok(blocks), &format!("the server says {served:?}"));
    });
}

/// The guest runs on where it is, and the destination that awaited it says why it ends.
fn given_up(trip: &mut Trip) {
    let uri = trip.listen(Link::Tcp, &["--net", "id=net,tap=tap1"]);
    let client = trip.start_move(&uri, &words(&slowly("abort")));
    let output = client.wait_with_output().unwrap();
    trip.check(output.status.code() == Some(1), &format!("{output:?}"));
    let said = trip.progress();
    trip.check(said.contains("dirties"), &format!("the client said {said:?}"));
    let said = trip.forget_destination();
    trip.check(said.contains("dirties"), &format!("the destination said {said:?}"));
    trip.check(trip.info()["state"] == "running", "the guest doesn't run on");
    trip.type_line();
    trip.goes_on();
    trip.hears();
}

/// All that it rewrites goes over while it stands; its clocks know how long that was: gives what they are said to have seen.
fn stopped_for_long(trip: &mut Trip) -> u64 {
    let before = trip.clock();
    let there = ["--net", "id=net,tap=tap0"];
    let report = trip.move_on(Link::Tcp, &there, &words(&slowly("stop-and-copy")));
    check_too_fast(trip, rounds(&report));
    // The limit is on the stop; the guest's first sign comes after it.
    let downtime = &report["downtime"];
    let first_sign_us = downtime["first_sign_us"].as_u64().unwrap_or(0);
    let downtime_us = number(&downtime["total_us"]) - first_sign_us;
    let long = downtime_us > DOWNTIME_LIMIT_MS * 1000;
    trip.check(long, &format!("a downtime of {downtime_us} us is within the limit"));
    let stall_us = number(&report["guest_stall_us"]);
    let near = stall_us.abs_diff(downtime_us) < downtime_us / 10;
    trip.check(near, &format!("a stall of {stall_us} us, a downtime of {downtime_us}"));
    let after = trip.clock();
    eprintln!("clock before {before:?}, after {after:?}");
    let change = (after.ahead_us - before.ahead_us).abs();
    trip.check(
        change <= CLOCK_US_MAX + before.error_us + after.error_us,
        &format!("the wall clock was {before:?} before the move and is {after:?}"),
    );
    stall_us
}
