//! The guest's first sign: its first output, which an observer beyond it may see.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// When a guest first put out anything in its machine's life: a byte on its serial line, or a notification of a virtqueue. Its
/// accesses to registers don't count: a driver makes some long before anything comes of them. To note it again is one load.
#[derive(Debug, Default)]
pub struct FirstSign(OnceLock<Instant>);

impl FirstSign {
    /// The guest gave a sign just now.
    #[inline]
    pub fn note(&self) {
        if self.0.get().is_none() {
            self.note_first();
        }
    }

    #[cold]
    fn note_first(&self) {
        self.0.get_or_init(Instant::now);
    }

    /// How long ago it gave the first one. `None`: it gave none yet.
    #[must_use]
    pub fn ago(&self) -> Option<Duration> {
        self.0.get().map(Instant::elapsed)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::bus::BusDevice;
    use crate::serial::{Serial, Wire};
    use crate::virtio::testing::CountingLine;

    #[test]
    fn only_the_first_counts() {
        let sign = FirstSign::default();
        assert_eq!(sign.ago(), None);
        sign.note();
        let first = sign.0.get().copied();
        sign.note();
        assert_eq!((sign.0.get().copied(), sign.ago().is_some()), (first, true));
    }

    struct Nowhere;

    impl Wire for Nowhere {
        fn push(&mut self, _: &[u8]) {}

        fn room(&self) -> bool {
            true
        }

        fn input_wanted(&self) {}
    }

    #[test]
    fn a_byte_on_the_line_is_one_and_no_other_access_to_the_port() {
        let sign = Arc::new(FirstSign::default());
        let line = Arc::new(CountingLine::default());
        let mut serial = Serial::new(line, Box::new(Nowhere), Arc::clone(&sign));
        for register in 0..8 {
            serial.read(register, &mut [0]);
            serial.write(1 + register % 7, &[0]);
        }
        // A byte that goes round and comes in again, and half of the baud rate.
        for (register, value) in [(4, 0x10), (0, b'a'), (4, 0), (3, 0x80), (0, 1), (3, 0)] {
            serial.write(register, &[value]);
        }
        assert_eq!(sign.ago(), None);
        serial.write(0, b"a");
        assert!(sign.ago().is_some());
    }
}
