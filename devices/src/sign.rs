//! The guest's signs: its outputs, which an observer beyond it may see; the first, and while somebody watches the last.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// When a guest put out anything in its machine's life: a byte on its serial line, or a notification of a virtqueue. Its
/// accesses to registers don't count: a driver makes some long before anything comes of them. To note a sign that is not the
/// first, and that nobody watches for, is two loads.
#[derive(Debug)]
pub struct Signs {
    first: OnceLock<Instant>,
    /// Nanoseconds from the first to the last, or one of these.
    last_ns: AtomicU64,
}

/// Nobody watches for the last.
const UNWATCHED: u64 = u64::MAX;
/// Somebody does, and none has come since.
const NONE_YET: u64 = u64::MAX - 1;

impl Default for Signs {
    fn default() -> Self {
        Self { first: OnceLock::new(), last_ns: AtomicU64::new(UNWATCHED) }
    }
}

impl Signs {
    /// The guest gave a sign just now.
    #[inline]
    pub fn note(&self) {
        if self.first.get().is_none() || self.last_ns.load(Ordering::Relaxed) != UNWATCHED {
            self.note_time();
        }
    }

    #[cold]
    fn note_time(&self) {
        let nanos = self.first.get_or_init(Instant::now).elapsed().as_nanos();
        let nanos = u64::try_from(nanos).unwrap_or(NONE_YET).min(NONE_YET - 1);
        // Who stopped watching meanwhile isn't made to watch again.
        let _ = self.last_ns.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| {
            (last != UNWATCHED).then_some(nanos)
        });
    }

    /// How long ago it gave the first one. `None`: it gave none yet.
    #[must_use]
    pub fn first_ago(&self) -> Option<Duration> {
        self.first.get().map(Instant::elapsed)
    }

    /// From now on the last one is remembered, or (`false`) no more.
    pub fn watch(&self, watched: bool) {
        self.last_ns.store(if watched { NONE_YET } else { UNWATCHED }, Ordering::Relaxed);
    }

    /// How long ago it gave the last one. `None`: it gave none while it was watched, or it isn't.
    #[must_use]
    pub fn last_ago(&self) -> Option<Duration> {
        match self.last_ns.load(Ordering::Relaxed) {
            UNWATCHED | NONE_YET => None,
            nanos => Some(self.first_ago()?.saturating_sub(Duration::from_nanos(nanos))),
        }
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
    fn the_first_stays_and_the_last_is_known_while_it_is_watched() {
        let signs = Signs::default();
        assert_eq!((signs.first_ago(), signs.last_ago()), (None, None));
        signs.note();
        let first = signs.first.get().copied();
        signs.note();
        assert_eq!((signs.first.get().copied(), signs.last_ago()), (first, None));
        signs.watch(true);
        assert_eq!(signs.last_ago(), None, "none since");
        std::thread::sleep(Duration::from_millis(2));
        signs.note();
        let (last, first_ago) = (signs.last_ago().unwrap(), signs.first_ago().unwrap());
        assert!(last + Duration::from_millis(2) <= first_ago, "{last:?} {first_ago:?}");
        signs.watch(false);
        signs.note();
        assert_eq!((signs.first.get().copied(), signs.last_ago()), (first, None));
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
        let sign = Arc::new(Signs::default());
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
        assert_eq!(sign.first_ago(), None);
        serial.write(0, b"a");
        assert!(sign.first_ago().is_some());
    }
}
