//! Sets of pages, runs of them, and how a batch of runs stands in a `Pages` record.
//!
//! A page has 4 KiB; its number is its guest-physical address over 4096. Numbers leave holes where the
//! guest has no RAM; a [`PageSet`] costs nothing there, nor where a whole block of 128 MiB is set, so
//! its size follows what is mixed and not the guest's RAM (at most one bit a page).

use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes of one page. Frozen: it is the unit of the protocol, whatever the host's page size.
pub const PAGE_SIZE: usize = 4096;
/// Pages end below this number: 52 bits of guest-physical address.
pub const PAGE_LIMIT: u64 = 1 << 40;
/// Pages in one block of a [`PageSet`].
pub const BLOCK_PAGES: u64 = 1 << 15;

const WORDS: usize = 512;

/// Pages that follow each other. Never empty; ends at most at [`PAGE_LIMIT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    first: u64,
    count: u64,
}

impl Run {
    /// The run of `count` pages from `first`. `None`: empty, or beyond [`PAGE_LIMIT`].
    #[must_use]
    pub fn new(first: u64, count: u64) -> Option<Self> {
        let end = first.checked_add(count)?;
        (count > 0 && end <= PAGE_LIMIT).then_some(Self { first, count })
    }

    /// The first page's number.
    #[must_use]
    pub fn first(self) -> u64 {
        self.first
    }

    /// How many pages.
    #[must_use]
    pub fn count(self) -> u64 {
        self.count
    }

    /// The number behind the last page's.
    #[must_use]
    pub fn end(self) -> u64 {
        self.first + self.count
    }

    /// The guest-physical address of the first byte.
    #[must_use]
    pub fn address(self) -> u64 {
        self.first * PAGE_SIZE as u64
    }

    /// The run's length in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.count * PAGE_SIZE as u64
    }

    /// Whether all of `other` is in this run.
    #[must_use]
    pub fn contains(self, other: Run) -> bool {
        self.first <= other.first && other.end() <= self.end()
    }

    /// The pages in both.
    #[must_use]
    pub fn overlap(self, other: Run) -> Option<Run> {
        let first = self.first.max(other.first);
        Run::new(first, self.end().min(other.end()).checked_sub(first)?)
    }

    /// The run cut into pieces of at most `count_max` pages.
    ///
    /// # Panics
    /// If `count_max` is 0.
    pub fn pieces(self, count_max: u64) -> impl Iterator<Item = Run> {
        assert!(count_max > 0, "pieces of no pages");
        let mut at = self.first;
        std::iter::from_fn(move || {
            let piece = Run::new(at, count_max.min(self.end() - at))?;
            at = piece.end();
            Some(piece)
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Block {
    Full,
    Mixed(Box<[u64; WORDS]>),
}

/// A set of pages of one page space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    blocks: BTreeMap<u64, Block>,
    count: u64,
}

impl PageSet {
    /// The empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Whether no page is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether the page is in the set.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        let (block, word, bit) = place(page);
        match self.blocks.get(&block) {
            None => false,
            Some(Block::Full) => true,
            Some(Block::Mixed(words)) => words[word] >> bit & 1 != 0,
        }
    }

    /// Adds every page of the run.
    pub fn insert(&mut self, run: Run) {
        self.change(run, true);
    }

    /// Takes every page of the run out.
    pub fn remove(&mut self, run: Run) {
        self.change(run, false);
    }

    /// Adds the pages whose bits are set: bit `i` of word `w` is page `first + 64 * w + i`. This is the
    /// layout of KVM's dirty log and of vm-memory's bitmap.
    ///
    /// # Panics
    /// If `first` is no multiple of 64 or a set bit is beyond [`PAGE_LIMIT`].
    pub fn insert_words(&mut self, first: u64, words: &[u64]) {
        assert!(first.is_multiple_of(64), "bitmap starts at page {first}, no multiple of 64");
        for (at, &bits) in (first..).step_by(64).zip(words) {
            if bits != 0 {
                assert!(at < PAGE_LIMIT, "a bit beyond the last page");
                let (block, word, _) = place(at);
                self.set_bits(block, word, bits);
            }
        }
    }

    /// Adds every page of `other`.
    pub fn union(&mut self, other: &PageSet) {
        for (&index, block) in &other.blocks {
            match block {
                Block::Full => self.insert(block_run(index)),
                Block::Mixed(words) => {
                    for (word, &bits) in words.iter().enumerate().filter(|(_, bits)| **bits != 0) {
                        self.set_bits(index, word, bits);
                    }
                }
            }
        }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.blocks.clear();
        self.count = 0;
    }

    /// The longest runs of the set, ascending.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.runs_in(Run { first: 0, count: PAGE_LIMIT })
    }

    /// The longest runs of the set's pages within `window`, ascending.
    pub fn runs_in(&self, window: Run) -> impl Iterator<Item = Run> + '_ {
        let mut at = window.first;
        std::iter::from_fn(move || {
            let first = self.next(at, window.end(), true)?;
            let end = self.next(first, window.end(), false).unwrap_or(window.end());
            at = end;
            Run::new(first, end - first)
        })
    }

    /// An upper bound of the set's memory, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let mixed = self.blocks.values().filter(|b| matches!(b, Block::Mixed(_))).count();
        mixed * WORDS * 8 + self.blocks.len() * 64
    }

    /// The first page from `at` and below `end` that is in the set (or, if `!set`, is not).
    fn next(&self, mut at: u64, end: u64, set: bool) -> Option<u64> {
        while at < end {
            let (index, word, bit) = place(at);
            let found = match self.blocks.get(&index) {
                Some(Block::Mixed(words)) => {
                    next_bit(words, word, bit, set).map(|offset| index * BLOCK_PAGES + offset)
                }
                Some(Block::Full) if set => Some(at),
                None if !set => Some(at),
                Some(Block::Full) => None,
                None => return self.next_block(index, end).and_then(|b| self.next(b, end, true)),
            };
            if let Some(page) = found {
                return (page < end).then_some(page);
            }
            at = (index + 1) * BLOCK_PAGES;
        }
        None
    }

    /// The first page of the next block behind `index` that holds anything.
    fn next_block(&self, index: u64, end: u64) -> Option<u64> {
        let (&next, _) = self.blocks.range(index + 1..).next()?;
        Some(next * BLOCK_PAGES).filter(|page| *page < end)
    }

    fn set_bits(&mut self, index: u64, word: usize, bits: u64) {
        let block = self.blocks.entry(index).or_insert_with(empty);
        if let Block::Mixed(words) = block {
            self.count += u64::from((bits & !words[word]).count_ones());
            words[word] |= bits;
            if words[word] == u64::MAX && words.iter().all(|word| *word == u64::MAX) {
                *block = Block::Full;
            }
        }
    }

    fn change(&mut self, run: Run, set: bool) {
        let mut at = run.first;
        while at < run.end() {
            let index = at / BLOCK_PAGES;
            let end = run.end().min((index + 1) * BLOCK_PAGES);
            if end - at == BLOCK_PAGES {
                let old = if set {
                    self.blocks.insert(index, Block::Full)
                } else {
                    self.blocks.remove(&index)
                };
                self.count -= old.as_ref().map_or(0, block_len);
                self.count += if set { BLOCK_PAGES } else { 0 };
            } else {
                self.change_block(index, at % BLOCK_PAGES..at % BLOCK_PAGES + (end - at), set);
            }
            at = end;
        }
    }

    fn change_block(&mut self, index: u64, pages: Range<u64>, set: bool) {
        if !set {
            match self.blocks.get_mut(&index) {
                None => return,
                Some(block @ Block::Full) => *block = Block::Mixed(Box::new([u64::MAX; WORDS])),
                Some(Block::Mixed(_)) => {}
            }
        }
        let mut at = pages.start;
        while at < pages.end {
            let (_, word, bit) = place(at);
            let count = (64 - bit).min(pages.end - at);
            let bits = (u64::MAX >> (64 - count)) << bit;
            if set {
                self.set_bits(index, word, bits);
            } else if let Some(Block::Mixed(words)) = self.blocks.get_mut(&index) {
                self.count -= u64::from((bits & words[word]).count_ones());
                words[word] &= !bits;
            }
            at += count;
        }
        if !set && self.blocks.get(&index).is_some_and(|block| block_len(block) == 0) {
            self.blocks.remove(&index);
        }
    }
}

impl FromIterator<Run> for PageSet {
    fn from_iter<I: IntoIterator<Item = Run>>(runs: I) -> Self {
        let mut set = Self::new();
        runs.into_iter().for_each(|run| set.insert(run));
        set
    }
}

fn empty() -> Block {
    Block::Mixed(Box::new([0; WORDS]))
}

fn block_len(block: &Block) -> u64 {
    match block {
        Block::Full => BLOCK_PAGES,
        Block::Mixed(words) => words.iter().map(|word| u64::from(word.count_ones())).sum(),
    }
}

fn block_run(index: u64) -> Run {
    Run { first: index * BLOCK_PAGES, count: BLOCK_PAGES }
}

/// A page's block, the word in it and the bit in that.
fn place(page: u64) -> (u64, usize, u64) {
    let word = usize::try_from(page % BLOCK_PAGES / 64).expect("below 512");
    (page / BLOCK_PAGES, word, page % 64)
}

/// The offset in the block of the first bit that is `set`, from bit `bit` of word `word` on.
fn next_bit(words: &[u64; WORDS], word: usize, bit: u64, set: bool) -> Option<u64> {
    let pick = |bits: u64| if set { bits } else { !bits };
    let mut bits = pick(words[word]) & (u64::MAX << bit);
    let mut at = word;
    while bits == 0 {
        at += 1;
        bits = pick(*words.get(at)?);
    }
    Some(at as u64 * 64 + u64::from(bits.trailing_zeros()))
}

/// Whether every byte is 0. Written so that the compiler turns the inner loop into vectors; a page with
/// something in it is left at its first 128 bytes, as a rule.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<128>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
#[path = "pages_tests.rs"]
mod tests;
