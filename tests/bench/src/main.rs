//! What `make bench` runs: measures VMMs side by side and prints a table for each part.
//!
//! `bench` runs where the guests run, in a directory with the VMMs, the kernel and the initramfs
//! (tests/bench/run lays it out). The peers take turns within each run, so that whatever else the
//! machine does meets all of them; tables hold medians, and behind them the least and the greatest.
//! `bench straight|cost|ring` are parts that need no stock kernel. `bench guest ...` is the program inside
//! the guests.
//!
//! Not an example to follow: cargo can place such a program nowhere else.

mod boot;
mod cost;
mod guest;
#[path = "../../support/guests.rs"]
#[allow(dead_code, reason = "one of them is used here")]
mod guests;
mod io;
mod moves;
mod peer;
mod plain_copy;
mod process;
mod qmp;
mod ring;
mod snapshots;
mod table;

use std::process::ExitCode;

use peer::Peer;

/// What goes wrong is for a person to read.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Parts that run where stock kernels run.
const PARTS: &str = "boot start memory io move snapshot";

/// What is to be measured.
struct Settings {
    runs: usize,
    peers: Vec<Peer>,
    only: Vec<String>,
    /// RAM of the guests that move or are saved, in MiB.
    move_mib: Vec<u32>,
}

impl Settings {
    fn from_env() -> Result<Self> {
        let words = |name: &str, default: &str| -> Vec<String> {
            let value = std::env::var(name).ok().filter(|value| !value.is_empty());
            let value = value.unwrap_or_else(|| default.to_owned());
            value.split_whitespace().map(str::to_owned).collect()
        };
        let runs = words("BENCH_RUNS", "5").concat().parse()?;
        let peers = words("BENCH_PEERS", "vmm qemu");
        let peers = peers.iter().map(|name| name.parse()).collect::<Result<_>>()?;
        let move_mib = words("BENCH_MOVE_MIB", "512 4096");
        let move_mib =
            move_mib.iter().map(|mib| mib.parse()).collect::<std::result::Result<_, _>>()?;
        Ok(Self { runs, peers, only: words("BENCH_ONLY", PARTS), move_mib })
    }

    /// Takes a figure of each peer, so often. One that gives none is told of, and the others go on.
    fn each(&self, what: &str, mut measure: impl FnMut(Peer) -> Result<()>) {
        self.each_of(&[what], &self.peers, |_, peer| measure(peer));
    }

    /// As [`Self::each`], for several things in turn.
    fn each_of(
        &self,
        whats: &[&str],
        peers: &[Peer],
        mut measure: impl FnMut(usize, Peer) -> Result<()>,
    ) {
        for run in 1..=self.runs {
            for (at, what) in whats.iter().enumerate() {
                for peer in peers {
                    // Of the figure before.
                    let _ = std::fs::remove_file(process::ERRORS);
                    if let Err(error) = measure(at, *peer) {
                        let errors = std::fs::read_to_string(process::ERRORS).unwrap_or_default();
                        eprintln!("bench: {peer}, {what}: {error}\n{errors}");
                    }
                }
                eprintln!("bench: run {run} of {}: {what}", self.runs);
            }
        }
    }

    /// Those that can move and save their guests here.
    fn movers(&self) -> Vec<Peer> {
        let can = |peer: &&Peer| matches!(peer, Peer::Vmm | Peer::Qemu);
        self.peers.iter().filter(can).copied().collect()
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["guest", ref words @ ..] => guest::run(words),
        ["cost"] => Settings::from_env().and_then(|settings| cost::measure(&settings)),
        ["ring"] => Settings::from_env().and_then(|settings| ring::run(&settings)),
        ["straight"] => Settings::from_env().map(|settings| boot::straight(&settings)),
        [] => Settings::from_env().and_then(|settings| measure(&settings)),
        _ => Err("usage: bench [straight | cost | ring | guest ROLE ARGUMENTS]".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(settings: &Settings) -> Result<()> {
    for part in &settings.only {
        match part.as_str() {
            "boot" => boot::boot(settings),
            "start" => boot::start(settings),
            "memory" => boot::memory(settings),
            "io" => io::measure(settings)?,
            "move" => moves::measure(settings, &[0, moves::DIRTY_MIB])?,
            "move-idle" => moves::measure(settings, &[0])?,
            "move-dirtying" => moves::measure(settings, &[moves::DIRTY_MIB])?,
            "snapshot" => snapshots::measure(settings)?,
            // Those that tests/bench/run takes elsewhere.
            "straight" | "cost" | "ring" | "throughput" => {}
            other => return Err(format!("BENCH_ONLY: '{other}' is none of {PARTS}").into()),
        }
    }
    Ok(())
}
