//! Samples of figures, and the table of their medians: one column for each peer, and the goal.

use crate::peer::Peer;
use crate::{Result, Settings};

/// The size that larger guests are held against, and how much more what doesn't depend on RAM may be there.
const GROWS_FROM_MIB: u32 = 512;
const GROWTH_MAX: f64 = 1.2;

/// What a figure should be.
#[derive(Clone, Copy)]
pub enum Goal {
    /// At most this share of QEMU's.
    Share(f64),
    /// At least so many times QEMU's.
    Times(f64),
    /// At most this, whatever the others do.
    Most(f64),
    /// At least this.
    Least(f64),
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
            let (cells, word) = (cells.join(" | "), word(met));
            println!("| {label} ({unit}) | {cells} | {told} | {goal} | {word} |");
        }
    }
}

/// The same table for guests of several sizes.
pub struct BySize {
    sizes_mib: Vec<u32>,
    titles: Vec<String>,
    tables: Vec<Table>,
}

impl BySize {
    /// Empty ones.
    pub fn new(
        sizes_mib: &[u32],
        rows: &'static [Row],
        peers: &[Peer],
        title: impl Fn(u32) -> String,
    ) -> Self {
        let titles: Vec<String> = sizes_mib.iter().map(|mib| title(*mib)).collect();
        let tables = titles.iter().map(|title| Table::new(title, rows, peers)).collect();
        Self { sizes_mib: sizes_mib.to_vec(), titles, tables }
    }

    /// Fills them, size after size within each run.
    pub fn measure(
        &mut self,
        settings: &Settings,
        peers: &[Peer],
        mut one: impl FnMut(u32, Peer, &mut Table) -> Result<()>,
    ) {
        let titles: Vec<&str> = self.titles.iter().map(String::as_str).collect();
        settings.each_of(&titles, peers, |at, peer| {
            one(self.sizes_mib[at], peer, &mut self.tables[at])
        });
    }

    /// Prints them.
    pub fn print(&self) {
        self.tables.iter().for_each(Table::print);
    }

    /// Prints how some rows grow with the guest, from 512 MiB (or the smallest) to the largest.
    pub fn print_growth(&self, title: &str, rows: &[&str]) {
        let sizes = || self.sizes_mib.iter().zip(&self.tables);
        let small = sizes().find(|(mib, _)| **mib == GROWS_FROM_MIB).or_else(|| sizes().next());
        let (Some((from_mib, from)), Some((to_mib, to))) = (small, sizes().next_back()) else {
            return;
        };
        if from_mib == to_mib {
            return;
        }
        let peers: Vec<String> = to.peers.iter().map(ToString::to_string).collect();
        println!("\n{title}: {to_mib} MiB beside {from_mib} MiB\n");
        println!("| median : median | {} | goal | |", peers.join(" | "));
        println!("|---|{}---|---|", "---|".repeat(peers.len()));
        for (name, label, ..) in to.rows.iter().filter(|(name, ..)| rows.contains(name)) {
            let of = |table: &Table, peer| median(&table.sorted(name, peer));
            let ratio = |peer| of(to, peer).zip(of(from, peer)).map(|(to, from)| to / from);
            let cell = |peer: &Peer| ratio(*peer).map_or("-".to_owned(), |r| format!("{r:.3}"));
            let cells: Vec<String> = to.peers.iter().map(cell).collect();
            let (goal, met) = Goal::Most(GROWTH_MAX).judge(ratio(Peer::Vmm), None);
            println!("| {label} | {} | {goal} | {} |", cells.join(" | "), word(met));
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
            Self::Least(least) => (format!("≥ {least}"), ours.map(|ours| ours >= least)),
            Self::None => (String::new(), None),
        }
    }
}

fn word(met: Option<bool>) -> &'static str {
    met.map_or("", |met| if met { "met" } else { "**missed**" })
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
