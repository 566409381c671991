//! Twenty moves in a row of one stock guest at work, with an older kernel, between processes that take turns.

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
use travel::Link;
use work::{WORK, to_and_fro, work_and_move};

const MOVES: usize = 20;

#[test]
fn twenty_moves_in_a_row() {
    let load = Load { writer_mib: 4, rest_ms: 50, gentle: true, ..WORK };
    work_and_move("twenty_moves_in_a_row", ("6.1-cloud", 2, &load), |trip| {
        for turn in 0..MOVES {
            let link = if turn % 2 == 0 { Link::Unix } else { Link::Tcp };
            to_and_fro(trip, link, 1, turn);
        }
    });
}
