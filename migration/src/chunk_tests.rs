//! Golden bytes of a `Pages` body, and that every page of a batch is in its table once.

use proptest::prelude::*;

use super::*;

fn run(first: u64, count: u64) -> Run {
    Run::new(first, count).expect("a valid run")
}

/// The table and the data of a body.
fn parse(body: &[u8]) -> Result<(u16, Vec<Entry>, Vec<u8>), WireError> {
    let (head, mut rest) = body.split_first_chunk().ok_or(bad("short"))?;
    let (space, runs) = decode_head(*head)?;
    let mut entries = Vec::new();
    for _ in 0..runs {
        let (entry, tail) = rest.split_first_chunk().ok_or(bad("short"))?;
        entries.push(decode_entry(*entry)?);
        rest = tail;
    }
    Ok((space, entries, rest.to_vec()))
}

fn fill(bytes: &mut [u8], value: u8) -> Result<(), ()> {
    bytes.fill(value);
    Ok(())
}

#[test]
fn body_is_frozen() {
    let mut builder = Builder::new(0, 4);
    let fill = |bytes: &mut [u8]| {
        bytes.fill(0);
        bytes[PAGE_SIZE] = 0xab;
        Ok::<(), ()>(())
    };
    builder.add(run(0x1_0000_0002, 3), fill).unwrap();
    let body = builder.parts().concat();
    let table = b"\0\0\0\0\x03\0\0\0\
        \x02\0\0\0\x01\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\
        \x03\0\0\0\x01\0\0\0\x01\0\0\0\x01\0\0\0\0\x10\0\0\
        \x04\0\0\0\x01\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0";
    assert_eq!(&body[..table.len()], table);
    assert_eq!(body[table.len()], 0xab);
    assert_eq!(body.len(), table.len() + PAGE_SIZE);
    assert_eq!(builder.zero_pages(), 2);
}

#[test]
fn a_zero_run_of_any_length_is_one_entry() {
    let mut builder = Builder::new(0, DATA_PAGES_MAX);
    for piece in run(0, 1 << 14).pieces(DATA_PAGES_MAX as u64) {
        builder.add(piece, |bytes| fill(bytes, 0)).unwrap();
    }
    let (_, entries, data) = parse(&builder.parts().concat()).unwrap();
    assert_eq!(entries, [Entry { run: run(0, 1 << 14), encoding: Encoding::Zero, len: 0 }]);
    assert_eq!(data, []);
}

#[test]
fn a_run_ends_where_its_region_does() {
    let mut builder = Builder::new(0, 4);
    builder.add(run(1, 2), |bytes| fill(bytes, 7)).unwrap();
    builder.set_apart();
    builder.add(run(3, 1), |bytes| fill(bytes, 7)).unwrap();
    builder.add(run(4, 1), |bytes| fill(bytes, 7)).unwrap();
    let (_, entries, _) = parse(&builder.parts().concat()).unwrap();
    assert_eq!(entries.iter().map(|entry| entry.run).collect::<Vec<_>>(), [run(1, 2), run(3, 2)]);
}

#[test]
fn a_full_record_is_within_its_limit() {
    let mut builder = Builder::new(0, usize::MAX);
    let mut page = 0;
    while !builder.is_full() {
        let value = u8::from(page % 16 == 0);
        builder.add(run(page, 1), |bytes| fill(bytes, value)).unwrap();
        page += 2;
    }
    let len: usize = builder.parts().iter().map(|part| part.len()).sum();
    assert!(len <= crate::wire::len_max(record::PAGES) as usize, "{len} bytes");
}

#[test]
fn entries_that_lie_are_refused() {
    let good = encode_entry(Entry { run: run(1, 2), encoding: Encoding::Raw, len: 8192 });
    assert!(decode_entry(good).is_ok());
    for (at, value) in [(8, 0), (8, 3), (12, 0), (12, 2), (13, 1), (7, 0xff), (17, 0x21)] {
        let mut lie = good;
        lie[at] = value;
        assert!(decode_entry(lie).is_err(), "byte {at} = {value}");
    }
    assert!(decode_head([0, 0, 0, 0, 1, 8, 0, 0]).is_err(), "2049 runs");
    assert!(decode_head([0, 0, 1, 0, 0, 0, 0, 0]).is_err(), "a reserved byte");
}

proptest! {
    #[test]
    fn a_batch_reads_back(zeros in prop::collection::vec(any::<bool>(), 1..40), split in 1_u64..9) {
        let mut builder = Builder::new(3, 40);
        let all = run(100, zeros.len() as u64);
        for piece in all.pieces(split) {
            builder.add(piece, |bytes| {
                for (page, bytes) in (piece.first()..).zip(bytes.chunks_mut(PAGE_SIZE)) {
                    let zero = zeros[usize::try_from(page - 100).unwrap()];
                    bytes.fill(if zero { 0 } else { page.to_le_bytes()[0] });
                }
                Ok::<(), ()>(())
            }).unwrap();
        }
        let (space, entries, data) = parse(&builder.parts().concat()).unwrap();
        prop_assert_eq!(space, 3);
        let mut data = data.chunks(PAGE_SIZE);
        let mut next = 100;
        for entry in entries {
            prop_assert_eq!(entry.run.first(), next);
            for page in entry.run.pieces(1) {
                let zero = zeros[usize::try_from(page.first() - 100).unwrap()];
                prop_assert_eq!(entry.encoding == Encoding::Zero, zero);
                if !zero {
                    let byte = page.first().to_le_bytes()[0];
                    prop_assert!(data.next().unwrap().iter().all(|b| *b == byte));
                }
            }
            next = entry.run.end();
        }
        prop_assert_eq!(next, all.end());
        prop_assert_eq!(data.count(), 0);
    }

    #[test]
    fn hostile_tables_never_panic(head: [u8; 8], entry: [u8; 20]) {
        let _ = decode_head(head);
        let _ = decode_entry(entry);
    }
}
