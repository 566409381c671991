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
#[path = "support/work.rs"]
mod work;

use load::Load;
use travel::{Link, Trip};
use work::{EASY, WORK, to_and_fro, work_and_move};

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
