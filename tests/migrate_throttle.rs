//! A stock guest of two busy vCPUs, of which one dirties memory faster than the link takes it: that one is
//! slowed down until the guest can move, and runs on unharmed.

#[path = "support/linux.rs"]
mod linux;
#[path = "support/load.rs"]
mod load;
#[path = "support/travel.rs"]
mod travel;

use linux::Guest;
use load::Load;
use serde_json::Value;
use travel::{Link, Trip};

/// This link takes 980 pages a second. On the slowest host that was seen (one emulated CPU for both vCPUs and both
/// VMMs) the guest dirties 1,400 or more.
const THIN: [&str; 8] = [
    "--bandwidth",
    "32M",
    "--downtime-limit",
    "800ms",
    "--timeout",
    "25s",
    "--on-timeout",
    "throttle",
];

fn list(round: &Value, field: &str) -> Vec<u64> {
    round[field].as_array().unwrap().iter().map(|number| number.as_u64().unwrap()).collect()
}

#[test]
fn the_vcpu_that_dirties_is_throttled() {
    const NAME: &str = "the_vcpu_that_dirties_is_throttled";
    if let Some(load) = Load::told() {
        return load::run(&load);
    }
    let load = Load { writers: 1, writer_mib: 16, ..Load::default() };
    // vCPU 1 counts for ever; all else is vCPU 0's.
    let script =
        format!("taskset 2 sh -c 'while :; do :; done' &\ntaskset -p 1 $$\n{}", load.script(NAME));
    let guest = Guest::new("6.12-cloud").cpus(2).mem("160M").file("load", load::program());
    let mut trip = Trip::start(guest.run(&script));
    let report = trip.move_on(Link::Tcp, &[], &THIN);

    let (_, rounds) = report["rounds"].as_array().unwrap().split_last().unwrap();
    for round in rounds {
        let (all, pages) = (round["dirty_pages"].as_u64().unwrap(), list(round, "dirty_by_vcpu"));
        let told = format!("{all} pages, by vCPU {pages:?}, {}", round["throttle_percent"]);
        eprintln!("{told}");
        trip.check(pages.len() == 2 && pages.iter().sum::<u64>() <= all, &told);
        trip.check(pages[0] > pages[1], &told);
    }
    let throttles = rounds.iter().map(|round| list(round, "throttle_percent"));
    let throttles: Vec<_> = throttles.filter(|percent| !percent.is_empty()).collect();
    let right = |percent: &Vec<u64>| percent.len() == 2 && percent[0] > percent[1];
    trip.check(
        !throttles.is_empty() && throttles.iter().all(right) && throttles[0][1] == 0,
        &format!("throttled by {throttles:?}"),
    );
    trip.goes_on();
    trip.finish();
}
