//! [`PageSet`] against a plain ordered set.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn run(first: u64, count: u64) -> Run {
    Run::new(first, count).expect("a valid run")
}

/// Runs that meet the borders of blocks and words, and now and then cover whole blocks.
fn any_run() -> impl Strategy<Value = Run> {
    let first = prop_oneof![0..200_u64, BLOCK_PAGES - 130..BLOCK_PAGES + 130, 0..3 * BLOCK_PAGES];
    let count = prop_oneof![1..200_u64, BLOCK_PAGES..2 * BLOCK_PAGES + 70];
    (first, count).prop_map(|(first, count)| run(first, count))
}

#[test]
fn a_run_has_limits() {
    assert_eq!(Run::new(5, 0), None);
    assert_eq!(Run::new(PAGE_LIMIT, 1), None);
    assert_eq!(Run::new(u64::MAX, 2), None);
    assert_eq!(run(PAGE_LIMIT - 1, 1).end(), PAGE_LIMIT);
    let pieces: Vec<_> = run(3, 10).pieces(4).collect();
    assert_eq!(pieces, [run(3, 4), run(7, 4), run(11, 2)]);
    assert_eq!(run(0, 4).overlap(run(3, 9)), Some(run(3, 1)));
    assert_eq!(run(0, 4).overlap(run(4, 9)), None);
    assert_eq!(run(9, 4).overlap(run(0, 2)), None);
}

#[test]
fn a_full_set_is_small() {
    let one_tib = run(0, 1 << 28);
    let mut set = PageSet::from_iter([one_tib]);
    assert_eq!(set.len(), 1 << 28);
    assert!(set.memory_bytes() < 1 << 20, "{} bytes", set.memory_bytes());
    assert_eq!(set.runs().collect::<Vec<_>>(), [one_tib]);
    set.remove(run(1000, 1));
    assert_eq!(set.runs().collect::<Vec<_>>(), [run(0, 1000), run(1001, (1 << 28) - 1001)]);
    set.remove(one_tib);
    assert_eq!(set, PageSet::new());
}

#[test]
fn a_block_filled_by_bits_becomes_full() {
    let mut set = PageSet::new();
    set.insert_words(BLOCK_PAGES, &vec![u64::MAX; WORDS]);
    assert_eq!(set, PageSet::from_iter([run(BLOCK_PAGES, BLOCK_PAGES)]));
    set.insert_words(BLOCK_PAGES, &[1]);
    assert_eq!(set.len(), BLOCK_PAGES);
}

#[test]
fn words_are_pages() {
    let mut set = PageSet::new();
    set.insert_words(64, &[0b101, 0, 1 << 63]);
    assert_eq!(set.runs().collect::<Vec<_>>(), [run(64, 1), run(66, 1), run(255, 1)]);
    assert!(set.contains(66) && !set.contains(65));
}

#[test]
fn a_sparse_set_is_walked_without_its_holes() {
    let set = PageSet::from_iter([run(7, 1), run(PAGE_LIMIT - 1, 1)]);
    assert_eq!(set.runs().collect::<Vec<_>>(), [run(7, 1), run(PAGE_LIMIT - 1, 1)]);
    assert_eq!(set.runs_in(run(8, 1 << 30)).count(), 0);
}

#[test]
fn zero_is_found_at_every_byte() {
    let mut page = vec![0_u8; PAGE_SIZE];
    assert!(is_zero(&page));
    for at in 0..PAGE_SIZE {
        page[at] = 1;
        assert!(!is_zero(&page), "byte {at}");
        page[at] = 0;
    }
    assert!(is_zero(&[]) && is_zero(&[0; 129]) && !is_zero(&[0, 1]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn behaves_like_a_plain_set(
        steps in prop::collection::vec((any::<bool>(), any_run()), 1..6), window in any_run(),
    ) {
        let mut set = PageSet::new();
        let mut plain = BTreeSet::new();
        for (insert, run) in steps {
            if insert {
                set.insert(run);
                plain.extend(run.first()..run.end());
            } else {
                set.remove(run);
                plain.retain(|page| !(run.first()..run.end()).contains(page));
            }
        }
        prop_assert_eq!(set.len(), plain.len() as u64);
        let walked: Vec<u64> = set.runs().flat_map(|r| r.first()..r.end()).collect();
        prop_assert!(walked.iter().eq(plain.iter()));
        let inside: Vec<u64> = set.runs_in(window).flat_map(|r| r.first()..r.end()).collect();
        prop_assert!(inside.iter().eq(plain.range(window.first()..window.end())));
        let runs: Vec<Run> = set.runs().collect();
        prop_assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].first()), "not maximal");
        prop_assert_eq!(set.clone(), PageSet::from_iter(runs));
    }

    #[test]
    fn union_is_union(
        a in prop::collection::vec(any_run(), 0..5), b in prop::collection::vec(any_run(), 0..5),
    ) {
        let mut both = PageSet::from_iter(a.iter().copied());
        both.union(&PageSet::from_iter(b.iter().copied()));
        prop_assert_eq!(both, PageSet::from_iter(a.into_iter().chain(b)));
    }
}
