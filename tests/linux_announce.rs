//! The network hears from the VMM where a guest is after a move: of a guest that sent one frame in its life and says
//! nothing by itself, on TAPs in a network namespace. Also between releases, of which the one before knew no
//! addresses. Needs /dev/net/tun, and root or user namespaces; the emulated host has them.

#[path = "support/net.rs"]
mod net;
mod support;

use std::num::NonZeroU32;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use net::{in_namespace, ip};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketType, recv, socket};
use support::guests::Guest;
use support::moves::{Count, EASY};
use support::relay::Relay;
use support::vm::{LONG, Vm};
use vmm_migration::wire::record;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x2a];
/// How often a guest is announced.
const ROUNDS: usize = 5;
/// ... and in how much time, at least, of its four pauses of 100 ms.
const SPAN_MIN: Duration = Duration::from_millis(300);

/// What a frame to everyone says, by its EtherType and operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    /// ARP's question for an address, by who says that another is its own.
    Asks { own: [u8; 4], other: [u8; 4] },
    /// An unasked answer.
    Answers { own: [u8; 4], other: [u8; 4] },
    /// RARP's question.
    Rarp,
}

/// What a destination says of a guest whose address it knows, and of one whose address it doesn't.
const OWN: [u8; 4] = [10, 9, 8, 7];
const KNOWN: [Word; 3] =
    [Word::Rarp, Word::Asks { own: OWN, other: OWN }, Word::Answers { own: OWN, other: OWN }];
const UNKNOWN: [Word; 1] = [Word::Rarp];

/// Hears what comes in by any TAP, from the guest's MAC: when, and what.
struct Ear(Receiver<(Instant, Word)>);

impl Ear {
    /// Listens from now on, on a thread of its own: what is heard when doesn't hang on what the test does meanwhile.
    fn open() -> Self {
        // ETH_P_ALL, in network order.
        let all = Protocol::from_raw(NonZeroU32::new(0x0003_u16.to_be().into()).unwrap());
        let socket = socket(AddressFamily::PACKET, SocketType::RAW, Some(all)).unwrap();
        let (heard, words) = channel();
        std::thread::spawn(move || {
            let mut frame = [0; 4096];
            loop {
                let (_, len) = recv(&socket, &mut frame, RecvFlags::empty()).unwrap();
                let now = Instant::now();
                if frame[6..12] == MAC && heard.send((now, word(&frame[..len]))).is_err() {
                    return;
                }
            }
        });
        Self(words)
    }

    /// The next word from the guest's MAC.
    fn hear(&self) -> (Instant, Word) {
        self.0.recv_timeout(LONG).expect("something is heard of the guest")
    }

    /// How long the rounds took, from the first word to the last.
    fn hear_rounds_of(&self, words: &[Word]) -> Duration {
        let mut times = Vec::new();
        for round in 0..ROUNDS {
            for expected in words {
                let (time, word) = self.hear();
                assert_eq!(word, *expected, "in round {round}");
                times.push(time);
            }
        }
        *times.last().unwrap() - times[0]
    }
}

fn word(frame: &[u8]) -> Word {
    assert_eq!(frame[..6], [0xff; 6]);
    assert_eq!((&frame[14..20], &frame[22..28]), (&[0, 1, 8, 0, 6, 4][..], &MAC[..]));
    let address = |at: usize| frame[at..at + 4].try_into().unwrap();
    let (own, other) = (address(28), address(38));
    match [frame[12], frame[13], frame[20], frame[21]] {
        [8, 6, 0, 1] => Word::Asks { own, other },
        [8, 6, 0, 2] => Word::Answers { own, other },
        [0x80, 0x35, 0, 3] => Word::Rarp,
        _ => panic!("the guest's MAC sends {frame:x?}"),
    }
}

/// Moves the guest to a TAP, over a relay that keeps such records from both ends. Gives where it is, and the version in
/// which its interface went.
fn moved_on(mut source: Vm, tap: &str, hidden: u32, count: &mut Count) -> (Vm, u16) {
    let (mut destination, _) = Vm::listen(&["--net", &format!("id=net,tap={tap}")]);
    let relay = Relay::hiding(&destination.place.path("move.sock"), hidden);
    count.check(&source.move_to(&relay.uri(), &EASY));
    assert_eq!(source.wait().0, Some(0));
    count.check(&destination.read_some(100));
    let versions = relay.versions("virtio-net");
    assert_eq!((versions.len(), versions[0]), (2, versions[1]), "the example, and the state");
    (destination, versions[0])
}

#[test]
fn a_guests_address_is_announced_for_it() {
    in_namespace("a_guests_address_is_announced_for_it", || {
        for tap in ["tap0", "tap1"] {
            ip(&format!("tuntap add {tap} mode tap"));
            ip(&format!("link set {tap} up"));
        }
        let ear = Ear::open();
        let net = "tap=tap0,id=net,mac=02:00:00:00:00:2a";
        let mut guest = Vm::start(Guest::arp(), &["--net", net]);
        assert_eq!(ear.hear().1, Word::Asks { own: OWN, other: [10, 9, 8, 1] });
        let mut count = Count::default();
        count.check(&guest.read_some(100));
        // And again from there: what is known is known to the next one.
        let mut spans = Vec::new();
        let mut version;
        for tap in ["tap1", "tap0"] {
            (guest, version) = moved_on(guest, tap, u32::MAX, &mut count);
            assert_eq!(version, 2);
            spans.push(ear.hear_rounds_of(&KNOWN));
        }
        // To a destination that doesn't say what it reads, and from such a source.
        (guest, version) = moved_on(guest, "tap1", record::READS, &mut count);
        assert_eq!(version, 1);
        spans.push(ear.hear_rounds_of(&UNKNOWN));
        (guest, version) = moved_on(guest, "tap0", u32::MAX, &mut count);
        assert_eq!(version, 2);
        spans.push(ear.hear_rounds_of(&UNKNOWN));
        // A switch that wakes up late has to hear of it too. One that is heard of late here seems shorter than it was.
        assert!(spans.iter().any(|span| *span >= SPAN_MIN), "announced at once: {spans:?}");
        guest.tell(&["stop", "--force"]);
        count.check(&guest.read_to_end());
        assert_eq!(guest.wait().0, Some(0));
    });
}
