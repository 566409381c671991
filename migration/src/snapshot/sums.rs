//! The checksums of a snapshot's blocks, taken beside the writing where there is a thread for it: by then the next block is
//! being read and written.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, Receiver, Sender};

use super::BLOCK_LEN;
use super::storage::Storage;

/// Blocks that wait for their checksums, at most: each is a buffer of 1 MiB.
const OUT_MAX: usize = 2;

/// The checksums that are there, and whoever is at the others.
pub(super) struct Sums {
    done: BTreeMap<u32, u32>,
    beside: Option<Beside>,
}

struct Beside {
    blocks: Sender<(u32, Vec<u8>)>,
    /// The blocks in their order, each with its checksum and the buffer it was in.
    back: Receiver<(u32, u32, Vec<u8>)>,
    out: usize,
}

impl Sums {
    pub(super) fn new(storage: &mut dyn Storage) -> Self {
        let (blocks, next) = mpsc::channel::<(u32, Vec<u8>)>();
        let (give, back) = mpsc::channel();
        let take_all = move || {
            for (block, bytes) in next {
                // Nobody waits for it any more.
                if give.send((block, crc32fast::hash(&bytes), bytes)).is_err() {
                    return;
                }
            }
        };
        let beside = storage.beside(Box::new(take_all)).then_some(Beside { blocks, back, out: 0 });
        Self { done: BTreeMap::new(), beside }
    }

    /// Takes the checksum of a whole block, now or soon. Gives a buffer for the next.
    pub(super) fn take(&mut self, block: u32, bytes: Vec<u8>) -> Vec<u8> {
        let Some(beside) = &mut self.beside else {
            self.done.insert(block, crc32fast::hash(&bytes));
            return bytes;
        };
        beside.blocks.send((block, bytes)).expect("who is beside ends last");
        beside.out += 1;
        if beside.out > OUT_MAX { self.wait() } else { vec![0; BLOCK_LEN] }
    }

    /// All of them, once nothing is under way.
    pub(super) fn all(&mut self) -> &mut BTreeMap<u32, u32> {
        while self.beside.as_ref().is_some_and(|beside| beside.out > 0) {
            self.wait();
        }
        &mut self.done
    }

    /// Waits for one that is under way; gives its buffer.
    fn wait(&mut self) -> Vec<u8> {
        let beside = self.beside.as_mut().expect("something is under way");
        let (block, sum, buffer) = beside.back.recv().expect("who is beside ends last");
        beside.out -= 1;
        self.done.insert(block, sum);
        buffer
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::channel::Flow;
    use crate::snapshot::storage::Step;

    /// One with threads, or without.
    struct Threads(bool);

    impl Storage for Threads {
        fn beside(&mut self, work: Box<dyn FnOnce() + Send>) -> bool {
            self.0 && std::thread::Builder::new().spawn(work).is_ok()
        }

        fn take(&mut self, _: Step, _: &mut dyn FnMut() -> Flow) -> io::Result<Flow> {
            unreachable!("checksums take no step")
        }
    }

    #[test]
    fn each_block_has_the_checksum_of_what_was_written_last() {
        let block = |byte: u8| vec![byte; BLOCK_LEN];
        for threads in [false, true] {
            let mut sums = Sums::new(&mut Threads(threads));
            assert_eq!(sums.beside.is_some(), threads);
            let mut buffer = block(0);
            for (number, byte) in [(3, 1), (4, 2), (9, 3), (3, 4), (5, 5), (9, 6)] {
                buffer.fill(byte);
                buffer = sums.take(number, buffer);
                assert_eq!(buffer.len(), BLOCK_LEN);
                let out = sums.beside.as_ref().map_or(0, |beside| beside.out);
                assert!(out <= OUT_MAX, "{out} under way");
            }
            let expected: BTreeMap<u32, u32> = [(3, 4), (4, 2), (5, 5), (9, 6)]
                .map(|(number, byte)| (number, crc32fast::hash(&block(byte))))
                .into();
            assert_eq!(*sums.all(), expected, "threads: {threads}");
        }
    }
}
