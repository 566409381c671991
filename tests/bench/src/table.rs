//! Samples of figures, and the table of their medians: one column for each peer, and the goal.

use crate::peer::Peer;

/// What a figure should be.
#[derive(Clone, Copy)]
pub enum Goal {
    /// At most this share of QEMU's.
    Share(f64),
    /// At least so many times QEMU's.
    Times(f64),
    /// At most this, whatever the others do.
    Most(f64),
    /// None; it is told for what it tells.
    None,
}

/// A row: what it is called when noted, what it says, its unit, its goal.
pub type Row = (&'static str, &'static str, &'static str, Goal);

/// A table that fills.
pub struct Table {
    title: String,
    rows: &'static [Row],
    peers: Vec<Peer>,
    samples: Vec<(&'static str, Peer, f64)>,
}

impl Table {
    /// An empty one.
    pub fn new(title: &str, rows: &'static [Row], peers: &[Peer]) -> Self {
        let (title, peers) = (title.to_owned(), peers.to_vec());
        Self { title, rows, peers, samples: Vec::new() }
    }

    /// Takes a sample in.
    pub fn note(&mut self, peer: Peer, row: &str, value: f64) {
        let (name, ..) = self.rows.iter().find(|(name, ..)| *name == row).expect("a row of it");
        eprintln!("bench:   {peer} {name} {value:.2}");
        self.samples.push((name, peer, value));
    }

    /// A peer's samples of a row, sorted.
    fn sorted(&self, row: &str, peer: Peer) -> Vec<f64> {
        let of = self.samples.iter().filter(|(name, of, _)| *name == row && *of == peer);
        let mut values: Vec<f64> = of.map(|(_, _, value)| *value).collect();
        values.sort_by(f64::total_cmp);
        values
    }

    /// Prints it.
    pub fn print(&self) {
        let peers: Vec<String> = self.peers.iter().map(ToString::to_string).collect();
        println!("\n{}\n", self.title);
        println!("| median (least, greatest) | {} | vmm : qemu | goal | |", peers.join(" | "));
        println!("|---|{}---|---|---|", "---|".repeat(peers.len()));
        for (name, label, unit, goal) in self.rows {
            let cells = self.peers.iter().map(|peer| cell(&self.sorted(name, *peer)));
            let cells: Vec<String> = cells.collect();
            let of = |peer| median(&self.sorted(name, peer));
            let (ours, theirs) = (of(Peer::Vmm), of(Peer::Qemu));
            let ratio = ours.zip(theirs).map(|(ours, theirs)| ours / theirs);
            let told = ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.3}"));
            let (goal, met) = goal.judge(ours, ratio);
            let word = met.map_or("", |met| if met { "met" } else { "**missed**" });
            println!("| {label} ({unit}) | {} | {told} | {goal} | {word} |", cells.join(" | "));
        }
    }
}

impl Goal {
    /// What it says, and whether it is met, where that is known.
    fn judge(self, ours: Option<f64>, ratio: Option<f64>) -> (String, Option<bool>) {
        match self {
            Self::Share(most) => (format!("≤ {most} × qemu"), ratio.map(|ratio| ratio <= most)),
            Self::Times(least) => (format!("≥ {least} × qemu"), ratio.map(|ratio| ratio >= least)),
            Self::Most(most) => (format!("≤ {most}"), ours.map(|ours| ours <= most)),
            Self::None => (String::new(), None),
        }
    }
}

fn median(sorted: &[f64]) -> Option<f64> {
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        len if len % 2 == 1 => Some(sorted[half]),
        _ => Some(f64::midpoint(sorted[half - 1], sorted[half])),
    }
}

fn cell(sorted: &[f64]) -> String {
    match (median(sorted), sorted) {
        (Some(median), [least, .., greatest]) => {
            format!("{} ({}, {})", number(median), number(*least), number(*greatest))
        }
        (Some(median), _) => number(median),
        (None, _) => "-".to_owned(),
    }
}

/// Three digits that mean something.
fn number(value: f64) -> String {
    match value {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
