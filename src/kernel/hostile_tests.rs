//! Kernels that are damaged or made to harm: each is refused, or loads what it claims, and ends.

use proptest::prelude::*;

use super::ram::Ram;
use super::testing::*;
use super::*;

#[test]
fn every_damaged_byte_of_a_payload_is_found() {
    for (name, payload) in PACKED {
        let image = bzimage("6.1.0", payload);
        // Past the magic: a damaged magic is an unknown compression. A byte that means nothing (a
        // time, a file's name, a code that no one uses) may change, if the kernel does not.
        let magic = 9;
        for at in magic..payload.len() {
            let mut bad = image.clone();
            bad[CODE_START + PAYLOAD_OFFSET + at] ^= 0x10;
            let ram = ram();
            match load_bytes(&bad, &ram).map_err(|error| error.problem) {
                Ok(_) => assert!(holds_tiny(&ram), "{name}: byte {at} goes unseen"),
                Err(Problem::Damaged { format, .. }) => assert_eq!(format, name),
                Err(Problem::DoesNotFit { .. }) => assert!(at + 4 >= payload.len()),
                Err(other) => panic!("{name}: byte {at}: {other}"),
            }
        }
    }
}

#[test]
fn a_wrong_unpacked_length_is_found() {
    for (name, payload) in PACKED {
        for delta in [-1i32, 1, -20_000, 1 << 20] {
            let mut payload = payload.to_vec();
            let at = payload.len() - 4;
            let len = i32::try_from(TINY.len()).unwrap() + delta;
            put(&mut payload, at, &len.to_le_bytes());
            match problem(&bzimage("6.1.0", &payload)) {
                Problem::Damaged { format, .. } => assert_eq!(format, name),
                other => panic!("{name} {delta}: {other}"),
            }
        }
    }
}

#[test]
fn each_truncation_is_refused() {
    let elf_need = 24976;
    for (whole, need) in [(bzimage("6.1.0", PACKED[1].1), None), (TINY.to_vec(), Some(elf_need))] {
        let need = need.unwrap_or(whole.len());
        for len in (1..need).step_by(7).chain([need - 1]) {
            match problem(&whole[..len]) {
                Problem::Truncated { have, need } => assert!(have < need, "{have} {need}"),
                Problem::NotAKernel(_) | Problem::OtherArch(_) => assert!(len < 0x206),
                other => panic!("{len}: {other}"),
            }
        }
        assert!(load_bytes(&whole[..need], &ram()).is_ok());
    }
}

#[test]
fn contradictory_elf_headers_are_refused() {
    let phdr = |n: usize, at: usize| 64 + 56 * n + at;
    let edits: [(usize, u64); 6] = [
        (phdr(0, 24), 0x8000),         // below 1 MiB
        (phdr(0, 24), u64::MAX - 100), // wraps
        (phdr(0, 24), 0x120_0000),     // overlaps the second segment
        (phdr(0, 40), 100),            // longer in the file than in memory
        (phdr(2, 32), 1 << 17),        // notes past the end
        (phdr(0, 0), 3),               // PT_INTERP
    ];
    for (at, value) in edits {
        let mut elf = TINY.to_vec();
        put(&mut elf, at, &value.to_le_bytes());
        let problem = problem(&elf);
        assert!(
            matches!(
                problem,
                Problem::Malformed(_) | Problem::Truncated { .. } | Problem::NotAKernel(_)
            ),
            "{problem}"
        );
    }
    let mut pvh = TINY.to_vec();
    put(&mut pvh, 512 + 16, &0x500_0000u64.to_le_bytes());
    assert!(matches!(problem(&pvh), Problem::Malformed(_)), "PVH entry outside");
}

/// Overwrites 1 to 8 places of `bytes`, most of them in the headers, and may cut the end off.
fn mutated(bytes: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let len = bytes.len();
    let place = prop_oneof![0..len.min(1024), 0..len];
    let value = prop_oneof![
        any::<u8>().prop_map(u64::from),
        any::<u64>(),
        (0u32..64).prop_map(|shift| 1 << shift),
        Just(u64::MAX),
    ];
    let edit = (place, value, 1usize..=8);
    let cut = prop_oneof![3 => Just(len), 1 => 0..len];
    (proptest::collection::vec(edit, 1..8), cut).prop_map(move |(edits, cut)| {
        let mut bytes = bytes.clone();
        for (at, value, width) in edits {
            let end = (at + width).min(len);
            bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
        }
        bytes.truncate(cut);
        bytes
    })
}

/// Loads into RAM with guard space around it in the same file, and checks that the space stays zero.
fn load_guarded(image: &[u8]) {
    const GUARD: u64 = 64 << 10;
    const RAM: u64 = 24 << 20;
    let file = tempfile::tempfile().unwrap();
    file.set_len(RAM + 2 * GUARD).unwrap();
    let ram = ram_in_file(&file, GUARD, usize::try_from(RAM).unwrap());
    if let Ok(loaded) = load_bytes(image, &ram) {
        assert!(loaded.end <= RAM);
        let (Entry::Linux64 { entry, .. } | Entry::Pvh { entry }) = loaded.entry;
        assert!((KERNEL_START_MIN..RAM).contains(&entry));
    }
    for at in [0, GUARD + RAM] {
        let mut guard = vec![0xff; usize::try_from(GUARD).unwrap()];
        file.read_exact_at(&mut guard, at).unwrap();
        assert!(guard.iter().all(|byte| *byte == 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_mutated_elf_stays_in_ram(image in mutated(TINY.to_vec())) {
        load_guarded(&image);
    }

    #[test]
    fn a_mutated_image_stays_in_ram(
        image in prop::sample::select(&PACKED[..])
            .prop_flat_map(|(_, payload)| mutated(bzimage("6.15.0", payload))),
    ) {
        load_guarded(&image);
    }

    /// The checksums of the image are right, those who attack would see to that.
    #[test]
    fn a_mutated_payload_stays_in_ram(
        payload in prop::sample::select(&PACKED[..])
            .prop_flat_map(|(_, payload)| mutated(payload.to_vec())),
    ) {
        load_guarded(&bzimage("6.1.0", &payload));
    }

    #[test]
    fn a_stream_loads_alike_in_pieces_of_any_size(
        cuts in proptest::collection::vec(0..TINY.len(), 0..20),
    ) {
        let mut cuts = cuts;
        cuts.extend([0, TINY.len()]);
        cuts.sort_unstable();
        let guest = ram();
        let ram = Ram::new(&guest);
        let mut loader = elf::Loader::new(&ram, TINY.len() as u64);
        for pair in cuts.windows(2) {
            loader.feed(&TINY[pair[0]..pair[1]]).unwrap();
        }
        prop_assert_eq!(loader.finish().unwrap().end(), TINY_END);
        prop_assert!(holds_tiny(&guest));
    }
}
