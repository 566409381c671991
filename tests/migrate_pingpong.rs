//! Twenty moves in a row of one stock guest, with an older kernel, between processes that take turns.

#[path = "support/linux.rs"]
mod linux;
#[path = "support/load.rs"]
mod load;
#[path = "support/travel.rs"]
mod travel;

use linux::Guest;
use load::Load;
use travel::{Link, Trip};

const MOVES: usize = 20;

#[test]
fn twenty_moves_in_a_row() {
    const NAME: &str = "twenty_moves_in_a_row";
    if let Some(load) = Load::told() {
        return load::run(&load);
    }
    let load = Load { writers: 1, writer_mib: 4, rest_ms: 50, ..Load::default() };
    let guest = Guest::new("6.1-cloud").cpus(2).mem("128M");
    let mut trip = Trip::start(guest.file("load", load::program()).run(&load.script(NAME)));
    for turn in 0..MOVES {
        let link = if turn % 2 == 0 { Link::Unix } else { Link::Tcp };
        trip.move_on(link, &[], &["--downtime-limit", "2s"]);
    }
    let told = trip.finish();
    trip.check(told.number("passes") > 20, "the guest's memory was hardly written");
}
