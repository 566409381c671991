//! Golden bytes and hostile input for the framing.

use std::cell::Cell;
use std::hash::Hasher;
use std::time::Duration;

use proptest::prelude::*;
use twox_hash::XxHash64;

use super::*;

fn section() -> Section {
    Section { kind: "serial".into(), instance: 7, version: 2, body: vec![1, 2, 3] }
}

#[test]
fn preamble_is_frozen() {
    let bytes = preamble(StreamKind::Live);
    assert_eq!(&bytes, b"VMMOVE\r\n\x01\0\x01\0\0\0\0\0");
    assert!(check_preamble(&bytes, StreamKind::Live).is_ok());
    let other = check_preamble(&bytes, StreamKind::Snapshot).unwrap_err();
    assert!(matches!(other, WireError::Kind { found: 1, .. }));
    assert_eq!(parse_preamble(&preamble(StreamKind::Snapshot)).unwrap(), StreamKind::Snapshot);
}

#[test]
fn every_wrong_byte_of_the_preamble_is_found() {
    for at in 0..PREAMBLE_LEN {
        for bit in 0..8 {
            let mut bytes = preamble(StreamKind::Live);
            bytes[at] ^= 1 << bit;
            assert!(check_preamble(&bytes, StreamKind::Live).is_err(), "byte {at} bit {bit}");
        }
    }
}

#[test]
fn record_is_frozen() {
    let mut out = Vec::new();
    put_record(&mut out, record::SECTION, &encode_section(&section()));
    let golden = b"\x04\0\0\0\x10\0\0\0\x06serial\x07\0\0\0\x02\0\x01\x02\x03";
    assert_eq!(&out[..24], golden);
    // CRC-32/ISO-HDLC, computed here bit by bit so that the choice of crate is not the specification.
    let mut crc = !0_u32;
    for byte in golden {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    assert_eq!(out[24..], (!crc).to_le_bytes());
}

/// Public values of XXH64 with seed 0, so that the choice of crate is not the specification; `xxhsum -H64` prints the
/// same. In one piece and in pieces.
#[test]
fn xxh64_is_what_the_world_takes_it_for() {
    let spammish: &[u8] = b"Nobody inspects the spammish repetition";
    for (text, hash) in [
        (&b""[..], 0xef46_db37_51d8_e999),
        (b"a", 0xd24e_c4f1_a98c_6e5b),
        (b"abc", 0x44bc_2cf5_ad77_0999),
        (spammish, 0xfbce_a83c_8a37_8bf1_u64),
    ] {
        for piece in 1..=text.len().max(1) {
            let mut hasher = XxHash64::with_seed(0);
            text.chunks(piece).for_each(|bytes| hasher.write(bytes));
            assert_eq!(hasher.finish(), hash, "{piece} bytes at a time");
        }
    }
}

#[test]
fn pages2_is_frozen() {
    let mut out = Vec::new();
    let sum = put_record(&mut out, record::PAGES2, b"abcd");
    assert_eq!(out, *b"\x1a\0\0\0\x04\0\0\0abcd\x43\xc9\x17\x05");
    assert_eq!(sum, u32::from_le_bytes(*out.last_chunk().unwrap()));
}

/// By a clock of which each second look is so much later: what is computed doesn't matter.
#[test]
fn the_fastest_is_the_one_of_the_best_turn() {
    let fastest = |crc32: [u64; 4], xxh64: [u64; 4]| {
        let steps: Vec<u64> = crc32.into_iter().chain(xxh64).flat_map(|us| [3, us]).collect();
        let (looks, time) = (Cell::new(0), Cell::new(0));
        let algorithm = Algorithm::fastest(|| {
            time.set(time.get() + steps[looks.get()]);
            looks.set(looks.get() + 1);
            Duration::from_micros(time.get())
        });
        assert_eq!(looks.get(), steps.len());
        algorithm
    };
    assert_eq!(fastest([2; 4], [1; 4]), Algorithm::Xxh64);
    assert_eq!(fastest([1; 4], [2; 4]), Algorithm::Crc32);
    assert_eq!(fastest([90, 80, 1, 70], [2; 4]), Algorithm::Crc32, "interrupted thrice");
    assert_eq!(fastest([2; 4], [90, 80, 70, 1]), Algorithm::Xxh64, "interrupted thrice");
    assert_eq!(fastest([0; 4], [0; 4]), Algorithm::Xxh64, "a clock too coarse to tell");
}

#[test]
fn a_checksum_may_be_taken_in_pieces() {
    let body: Vec<u8> = (0..200).collect();
    for kind in [record::PAGES, record::PAGES2] {
        let sum = put_record(&mut Vec::new(), kind, &body);
        for piece in 1..body.len() {
            let mut pieces = Checksum::new(RecordHead::new(kind, body.len()));
            body.chunks(piece).for_each(|bytes| pieces.update(bytes));
            assert_eq!(pieces.value(), sum, "{} in pieces of {piece}", record_name(kind));
        }
    }
}

#[test]
fn record_reads_back() {
    let mut out = Vec::new();
    let crc = put_record(&mut out, record::SECTION, &encode_section(&section()));
    let mut body = Vec::new();
    let (head, read_crc) = read_record(&mut out.as_slice(), &mut body).unwrap();
    assert_eq!((head.kind, head.optional, read_crc), (record::SECTION, false, crc));
    assert_eq!(decode_section(&body).unwrap(), section());
}

#[test]
fn every_wrong_bit_of_a_record_is_found() {
    for kind in [record::SECTION, record::PAGES, record::PAGES2] {
        let mut good = Vec::new();
        put_record(&mut good, kind, &encode_section(&section()).repeat(5));
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bytes = good.clone();
                bytes[at] ^= 1 << bit;
                let result = read_record(&mut bytes.as_slice(), &mut Vec::new());
                assert!(result.is_err(), "{} byte {at} bit {bit}", record_name(kind));
            }
        }
    }
}

#[test]
fn every_cut_is_truncated() {
    let mut good = Vec::new();
    put_record(&mut good, record::SECTION, &encode_section(&section()));
    for len in 0..good.len() {
        let result = read_record(&mut &good[..len], &mut Vec::new());
        assert!(matches!(result, Err(WireError::Truncated)), "{len} bytes");
    }
}

#[test]
fn a_lying_length_allocates_nothing() {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&record::HELLO.to_le_bytes());
    bytes.extend_from_slice(&u32::MAX.to_le_bytes());
    let mut body = Vec::new();
    let error = read_record(&mut bytes.as_slice(), &mut body).unwrap_err();
    assert_eq!(error.to_string(), "a Hello record of 4294967295 bytes is over the limit of 65536");
    assert_eq!(body.capacity(), 0);
}

#[test]
fn a_section_at_its_limit_fits_its_record() {
    let big = Section { kind: "k".repeat(32), instance: 0, version: 1, body: vec![0; 1 << 20] };
    let mut out = Vec::new();
    put_record(&mut out, record::SECTION, &encode_section(&big));
    assert_eq!(decode_section(&out[8..out.len() - 4]).unwrap(), big);
}

#[test]
fn digest_sees_order() {
    let value = |crcs: &[u32]| {
        let mut digest = Digest::default();
        crcs.iter().for_each(|crc| digest.add(*crc));
        digest.value()
    };
    assert_eq!(value(&[]), (0, 0));
    assert_ne!(value(&[1, 2]), value(&[2, 1]));
    assert_ne!(value(&[1, 1]), value(&[1]));
}

proptest! {
    #[test]
    fn sections_round_trip(
        kind in "[!-~]{1,32}", instance: u32, version in 1_u16.., body: Vec<u8>,
    ) {
        let section = Section { kind, instance, version, body };
        prop_assert_eq!(decode_section(&encode_section(&section)).unwrap(), section);
    }

    #[test]
    fn hostile_bytes_never_panic(bytes: Vec<u8>) {
        let mut body = Vec::new();
        let _ = read_record(&mut bytes.as_slice(), &mut body);
        prop_assert!(body.capacity() <= RECORD_LEN_MAX as usize);
        let _ = decode_section(&bytes);
    }
}
