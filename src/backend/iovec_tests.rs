//! Vectored I/O on guest memory, with more pieces than one call takes and files that end early.

use std::io::{Read, Seek, Write};

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_devices::{GuestRam, GuestSlice};

use super::*;

const PAGE: usize = 4096;

fn ram(pages: usize) -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), pages * PAGE)]).unwrap()
}

fn slice(ram: &GuestRam, at: u64, len: usize) -> GuestSlice<'_> {
    ram.get_slice(GuestAddress(at), len).unwrap()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect()
}

#[test]
fn more_pieces_than_one_call_takes_are_all_transferred() {
    let ram = ram(4);
    let data = pattern(3000 * 5);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&data).unwrap();
    let pieces: Vec<_> = (0..3000).map(|i| slice(&ram, i * 5, 5)).collect();
    IoVecs::new(&pieces).read_all_at(&file, 0).unwrap();
    let mut found = vec![0; data.len()];
    ram.read_slice(&mut found, GuestAddress(0)).unwrap();
    assert_eq!(found, data);

    let mut copy = tempfile::tempfile().unwrap();
    IoVecs::new(&pieces).write_all_at(&copy, 3).unwrap();
    copy.seek(io::SeekFrom::Start(3)).unwrap();
    found.clear();
    copy.read_to_end(&mut found).unwrap();
    assert_eq!(found, data);
}

#[test]
fn a_file_that_ends_early_is_an_error() {
    let ram = ram(1);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[1; 700]).unwrap();
    let error = IoVecs::new(&[slice(&ram, 0, 1024)]).read_all_at(&file, 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn advance_splits_a_piece_and_passes_whole_ones() {
    let ram = ram(1);
    let mut pieces = IoVecs::new(&[slice(&ram, 0, 10), slice(&ram, 10, 0), slice(&ram, 10, 20)]);
    let start = pieces.list[0].iov_base.addr();
    assert_eq!(pieces.list.len(), 2, "an empty piece is left out");
    pieces.advance(4);
    assert_eq!((pieces.list[0].iov_base.addr(), pieces.list[0].iov_len), (start + 4, 6));
    pieces.advance(6);
    assert_eq!(pieces.next().1, 1);
    pieces.advance(20);
    assert!(pieces.is_done());
}

#[test]
fn only_what_was_written_is_marked() {
    let ram = ram(6);
    let pieces = [slice(&ram, 0, PAGE), slice(&ram, 2 * 4096, 2 * PAGE)];
    mark_dirty(&pieces, PAGE + 1);
    let dirty: Vec<_> = (0..6).filter(|p| slice(&ram, p * 4096, 1).bitmap().dirty_at(0)).collect();
    assert_eq!(dirty, [0, 2]);
}
