//! Stock guests of one and of four vCPUs that keep their memory, their console and their time through a move by
//! either link, their clocks as an observer outside sees them; and that their RAM is mapped before they go on.

#[path = "support/answers.rs"]
mod answers;
#[path = "support/linux.rs"]
mod linux;
#[path = "support/load.rs"]
mod load;
#[path = "support/travel.rs"]
mod travel;

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use answers::{Moment, Observer};
use linux::Guest;
use load::Load;
use travel::{Link, Trip};

/// Lines typed before a move and after it: one of them finds the guest quick to answer.
const LINES_BESIDE: usize = 20;

/// Whether this host's kernel can map RAM ahead: from Linux 6.11 on.
fn maps_ahead() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(6), Some(11))
}

/// Types a line, and keeps when.
fn type_line(trip: &mut Trip, typed: &mut Vec<Moment>) {
    typed.push(Moment::now());
    trip.type_line();
}

/// Moves the guest on from its process number `stay`, and looks at its clocks: CLOCK_MONOTONIC goes on by no more than the
/// time that passes outside, and neither is further ahead of this host's afterwards, or behind it, than it was.
fn move_watched(trip: &mut Trip, stay: usize, link: Link, typed: &mut Vec<Moment>) {
    let uri = trip.listen(link, &[]);
    let consoles = [stay, stay + 1].map(|stay| trip.path(&format!("console.{stay}")));
    let observers = consoles.map(Observer::start);
    for _ in 0..LINES_BESIDE {
        type_line(trip, typed);
        trip.hears();
    }
    let mut client = trip.start_move(&uri, &["--downtime-limit", "3s"]);
    while client.try_wait().unwrap().is_none() {
        // What waits to be read would be answered late, and say less.
        if trip.has_heard() {
            type_line(trip, typed);
        }
        sleep(Duration::from_millis(20));
    }
    trip.arrive(client, &uri);
    for _ in 0..LINES_BESIDE {
        type_line(trip, typed);
        trip.hears();
    }
    trip.goes_on();
    let [before, after] = observers.map(Observer::answers);
    match answers::check(typed, &before, &after) {
        Ok(told) => eprintln!("{told}"),
        Err(wrong) => trip.fail(&wrong),
    }
}

/// A guest that only keeps its memory and its time moves twice, by either link.
fn take_clocks_along(name: &str, kernel: &'static str, cpus: u32) {
    if let Some(load) = Load::told() {
        return load::run(&load);
    }
    let load = Load { writers: 1, writer_mib: 4, rest_ms: 50, ..Load::default() };
    let guest = Guest::new(kernel).cpus(cpus).mem("160M");
    let mut trip = Trip::start(guest.file("load", load::program()).run(&load.script(name)));
    trip.log = "debug";
    let mut typed = Vec::new();
    for (stay, link) in [Link::Tcp, Link::Unix].into_iter().enumerate() {
        move_watched(&mut trip, stay, link, &mut typed);
        trip.check(
            trip.said_here().contains("of RAM mapped ahead") || !maps_ahead(),
            "its RAM wasn't in KVM's page tables when it went on",
        );
    }
    let told = trip.finish();
    let starts = format!("load: starts on {cpus} vCPUs");
    trip.check(told.0.contains(&starts), "it has other vCPUs");
}

#[test]
fn four_vcpus_take_their_clocks_along() {
    take_clocks_along("four_vcpus_take_their_clocks_along", "6.12-cloud", 4);
}

#[test]
fn four_vcpus_of_an_older_kernel() {
    take_clocks_along("four_vcpus_of_an_older_kernel", "6.1-cloud", 4);
}

#[test]
fn one_vcpu_of_a_newer_kernel() {
    take_clocks_along("one_vcpu_of_a_newer_kernel", "6.12-cloud", 1);
}
