//! How fast the first round goes, beside a plain copy of the same memory through the same kind of socket.
//!
//! `cargo run --release -p vmm-migration --example throughput [MiB]`

use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use vmm_migration::channel::{Channel, Clock, Flow, SystemClock};
use vmm_migration::chunk::Builder;
use vmm_migration::destination::{self, Opening};
use vmm_migration::guest::{
    Active, Changes, Example, Failed, GuestError, Halted, Host, Live, Locks, Memory, Reserved,
    Since, Vacant,
};
use vmm_migration::message::Reads;
use vmm_migration::pages::{PAGE_SIZE, PageSet, Run};
use vmm_migration::plan::{CpuNeeds, MigrationId, Plan, Region, SPACE_RAM, SectionId, Space};
use vmm_migration::policy::Limits;
use vmm_migration::report::Progress;
use vmm_migration::source::{self, Commitment, Deadlines, Options};
use vmm_migration::state::Section;
use vmm_migration::wire::{Algorithm, Checksum, RecordHead};

#[path = "../../tests/bench/src/plain_copy.rs"]
mod plain_copy;

use plain_copy::plain_copy;

/// MiB per second of a plain copy to fresh memory.
fn copied(memory: &[u8]) -> io::Result<f64> {
    let mut into = vec![0; memory.len()];
    plain_copy(memory, |from, at, len| from.read_exact(&mut into[at..at + len]))
}

/// A guest that does nothing: memory alone.
struct Still(Vec<u8>);

impl Still {
    fn bytes(&mut self, run: Run) -> &mut [u8] {
        let at = usize::try_from(run.address()).expect("within memory");
        &mut self.0[at..at + usize::try_from(run.bytes()).expect("within memory")]
    }
}

impl Memory for Still {
    fn dirty_pages(&mut self, _into: &mut PageSet) -> Result<(), GuestError> {
        Ok(())
    }

    fn read(&mut self, run: Run, bytes: &mut [u8]) -> Result<(), GuestError> {
        bytes.copy_from_slice(self.bytes(run));
        Ok(())
    }
}

impl Live for Still {
    type Halted = Still;

    fn plan(&mut self, _: u16) -> Result<Plan, GuestError> {
        let pages = (self.0.len() / PAGE_SIZE) as u64;
        Ok(Plan {
            name: "still".into(),
            paused: false,
            config: Vec::new(),
            spaces: vec![Space { id: SPACE_RAM, regions: vec![Region { first_page: 0, pages }] }],
            touched_pages: pages,
            sections: Vec::new(),
            cpu: CpuNeeds::default(),
            disks: Vec::new(),
            nets: Vec::new(),
        })
    }

    fn example(&mut self, _listed: &[SectionId]) -> Result<Example, GuestError> {
        Ok(Example::default())
    }

    fn start_tracking(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn first_pages(&mut self, window: Run, into: &mut PageSet) -> Result<(), GuestError> {
        into.insert(window);
        Ok(())
    }

    fn rearm(&mut self, _runs: &[Run]) -> Result<(), GuestError> {
        Ok(())
    }

    fn throttle(&mut self, _percent: &[u8]) -> Result<(), GuestError> {
        Ok(())
    }

    fn stop_tracking(&mut self) {}

    fn stop(self) -> Result<Still, Failed<Self>> {
        Ok(self)
    }
}

impl Halted for Still {
    type Live = Still;

    fn sections(&mut self, _listed: &[SectionId]) -> Result<Vec<Section>, GuestError> {
        Ok(Vec::new())
    }

    fn paused(&self) -> bool {
        false
    }

    fn release_disks(&mut self, _poll: &mut dyn FnMut() -> Flow) -> Result<Flow, GuestError> {
        Ok(Flow::Continue)
    }

    fn retake_disks(&mut self, _changes: Changes) -> Result<Locks, GuestError> {
        Ok(Locks::Taken)
    }

    fn resume(self) -> Result<Still, Failed<Self>> {
        Ok(self)
    }
}

struct Place;

impl Host for Place {
    type Vacant = Still;

    fn reserve(
        &mut self,
        plan: &Plan,
        _: Option<u64>,
        _: &mut dyn FnMut() -> Flow,
    ) -> Result<Reserved<Still>, Vec<String>> {
        let pages = usize::try_from(plan.touched_pages).expect("it fits");
        let guest = Still(vec![0; pages * PAGE_SIZE]);
        Ok(Reserved { guest, locks_seen: false, warnings: Vec::new() })
    }
}

impl Vacant for Still {
    type Running = Vec<u8>;

    fn parts(&self) -> Vec<SectionId> {
        Vec::new()
    }

    fn try_restore(
        &mut self,
        _example: &[Section],
        _saved: Since,
    ) -> Result<Vec<String>, Vec<String>> {
        Ok(Vec::new())
    }

    fn pages_mut(&mut self, run: Run) -> Result<&mut [u8], GuestError> {
        Ok(self.bytes(run))
    }

    fn zero(&mut self, run: Run) -> Result<(), GuestError> {
        self.bytes(run).fill(0);
        Ok(())
    }

    fn restore(&mut self, _sections: &[Section], _saved: Since) -> Result<(), Vec<String>> {
        Ok(())
    }

    fn activate(self, _paused: bool) -> Result<Active<Vec<u8>>, GuestError> {
        Ok(Active { running: self.0, guest_stall_us: None, first_sign: None })
    }
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let a = TcpStream::connect(listener.local_addr().expect("its address")).expect("connect");
    let b = listener.accept().expect("accept").0;
    for socket in [&a, &b] {
        socket.set_nodelay(true).expect("TCP_NODELAY");
        socket.set_read_timeout(Some(Duration::from_millis(100))).expect("SO_RCVTIMEO");
        socket.set_write_timeout(Some(Duration::from_millis(100))).expect("SO_SNDTIMEO");
    }
    (a, b)
}

fn mib(memory: &[u8]) -> f64 {
    f64::from(u32::try_from(memory.len() >> 20).expect("less than 4 PiB"))
}

fn migration(memory: &[u8], checksum: Algorithm) -> f64 {
    let (a, b) = pair();
    let guest = Still(memory.to_vec());
    let options = Options {
        id: MigrationId([1; 16]),
        software: "throughput".into(),
        limits: Limits::default(),
        bandwidth: None,
        pages_checksum: checksum,
        deadlines: Deadlines::default(),
        dry_run: false,
    };
    let moved = std::thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let mut observer = |_: &Progress| Flow::Continue;
            let channel = Channel::new(b, SystemClock::default());
            let opening = destination::accept(
                channel,
                destination::Options::new("throughput"),
                &mut observer,
            );
            let Ok(Opening::Migrate(destination)) = opening else { panic!("no migration") };
            let activation = destination
                .reserve(&mut Place, &mut observer)
                .and_then(|destination| destination.precopy(&mut observer))
                .and_then(|destination| destination.stop_and_copy(&mut observer))
                .and_then(|destination| destination.await_commit(&mut observer))
                .and_then(|destination| destination.activate(&mut observer));
            assert!(activation.expect("activated").0 == memory, "another memory");
        });
        let mut observer = |_: &Progress| Flow::Continue;
        let channel = Channel::new(a, SystemClock::default());
        let commitment = source::migrate(channel, options, guest, &mut observer);
        let Ok(Commitment::Moved(moved)) = commitment else { panic!("not moved") };
        destination.join().expect("the destination");
        moved
    });
    let first = &moved.report.rounds[0];
    let downtime = moved.report.downtime.map_or(0, |downtime| downtime.total_us);
    println!("    round 0: {} us, downtime of an idle guest: {downtime} us", first.time_us);
    mib(memory) * 1e6 / f64::from(u32::try_from(first.time_us).expect("over an hour"))
}

/// What the source itself costs, without a socket: the best of many short turns, so that a busy machine
/// shows in none of them.
fn source_alone(value: u8, checksum: Algorithm) -> f64 {
    const LEN: usize = 16 << 20;
    let mut guest = Still(vec![value; LEN]);
    let mut builder = Builder::new(SPACE_RAM, 256);
    let whole = Run::new(0, (LEN / PAGE_SIZE) as u64).expect("a run");
    let kind = Reads::new(Vec::new()).pages_record(checksum);
    let best = (0..100).map(|_| {
        let start = Instant::now();
        for piece in whole.pieces(256) {
            builder.add(piece, |bytes| guest.read(piece, bytes)).expect("room");
            if builder.is_full() {
                let parts = builder.parts();
                let len = parts[0].len() + parts[1].len();
                let mut sum = Checksum::new(RecordHead::new(kind, len));
                parts.iter().for_each(|part| sum.update(part));
                std::hint::black_box(sum.value());
                builder.clear();
            }
        }
        builder.clear();
        start.elapsed()
    });
    16.0 / best.min().expect("a hundred").as_secs_f64()
}

fn main() {
    let (start, clock) = (Instant::now(), SystemClock::default());
    // As `vmm` chooses it.
    let checksum = Algorithm::fastest(|| clock.now());
    println!("fastest checksum: {checksum:?}, found in {} us", start.elapsed().as_micros());
    println!("source alone, data:  {:.0} MiB/s", source_alone(1, checksum));
    println!("source alone, zeros: {:.0} MiB/s", source_alone(0, checksum));
    let mib: usize = std::env::args().nth(1).map_or(512, |arg| arg.parse().expect("MiB"));
    let mut memory = vec![0_u8; mib << 20];
    let mut value = 1_u8;
    for page in memory.chunks_mut(PAGE_SIZE) {
        value = value.wrapping_mul(29).wrapping_add(7) | 1;
        page.fill(value);
    }
    for _ in 0..3 {
        println!("plain copy: {:.0} MiB/s", copied(&memory).expect("TCP"));
        println!("round 0:    {:.0} MiB/s", migration(&memory, checksum));
    }
    memory.fill(0);
    println!("zero pages: {:.0} MiB/s", migration(&memory, checksum));
}
