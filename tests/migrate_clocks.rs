//! Stock guests of one and of four vCPUs that keep their memory, their console and their time through a move by
//! either link; and that their RAM is mapped before they go on.

#[path = "support/linux.rs"]
mod linux;
#[path = "support/load.rs"]
mod load;
#[path = "support/travel.rs"]
mod travel;

use std::fs;

use linux::Guest;
use load::Load;
use travel::{Link, Trip};

/// Whether this host's kernel can map RAM ahead: from Linux 6.11 on.
fn maps_ahead() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(6), Some(11))
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
    for link in [Link::Tcp, Link::Unix] {
        trip.move_on(link, &[], &["--downtime-limit", "3s"]);
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
