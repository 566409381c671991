//! Power: sleep and reset registers and the event device of a hardware-reduced ACPI machine.
//!
//! One byte each, from the start of the range ([`SIZE`] ports): 0 sleep control, 1 sleep status
//! (ACPI 6.5, 4.8.3.7), 2 reset (4.8.3.6), 3 pending events of the Generic Event Device (5.6.9): the
//! event method reads it once per interrupt, which also clears it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_migration::state::{RestoreError, SaveError, Stateful};

use crate::bus::BusDevice;
use crate::irq::IrqLine;

/// Ports that the device takes.
pub const SIZE: u64 = 16;
/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register.
pub const RESET: u64 = 2;
/// Offset of the pending events.
pub const EVENTS: u64 = 3;
/// The value that resets when written to [`RESET`]: RESET_VALUE of the FADT.
pub const RESET_VALUE: u8 = 1;
/// The SLP_TYP that powers off: what the DSDT's `\_S5` must say.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Event bit: the power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 1 << 0;
/// Event bit: the VM generation id has changed.
pub const EVENT_VMGENID: u8 = 1 << 1;

/// SLP_EN: a sleep state is entered when it is written as 1.
const SLEEP_ENABLE: u8 = 1 << 5;
/// Where SLP_TYP stands: bits 2 to 4.
const SLEEP_TYPE_SHIFT: u32 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;

/// What a guest asks of its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// Power off (ACPI S5).
    Off,
    /// Reset.
    Reset,
}

/// Where [`PowerRequest`]s go: to the control thread. Must not block.
pub type PowerSink = Box<dyn Fn(PowerRequest) + Send>;

/// Hands on a guest's first request and swallows the rest, so that a guest that writes the register in
/// a loop while its vCPUs are being stopped fills no channel. Used by the devices that can ask.
pub(crate) struct Once {
    sink: Option<PowerSink>,
}

impl Once {
    pub(crate) fn new(sink: PowerSink) -> Self {
        Self { sink: Some(sink) }
    }

    pub(crate) fn ask(&mut self, request: PowerRequest) {
        if let Some(sink) = self.sink.take() {
            sink(request);
        }
    }
}

/// The device.
pub struct Power {
    // Glue.
    line: Arc<dyn IrqLine>,
    sink: Once,
    // State.
    events: u8,
}

impl Power {
    /// A power device with no event pending. `line` is the Generic Event Device's interrupt.
    #[must_use]
    pub fn new(line: Arc<dyn IrqLine>, sink: PowerSink) -> Self {
        Self { line, sink: Once::new(sink), events: 0 }
    }

    /// Presses the power button: the guest is asked to shut itself down.
    pub fn press_button(&mut self) {
        self.raise(EVENT_POWER_BUTTON);
    }

    /// Tells the guest that its generation id has changed: it is a copy.
    pub fn generation_changed(&mut self) {
        self.raise(EVENT_VMGENID);
    }

    fn raise(&mut self, event: u8) {
        self.events |= event;
        self.line.trigger();
    }
}

impl BusDevice for Power {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        // Sleep control and reset are write-only and read as zero, as does the status: WAK_STS is
        // never set, for a machine that has powered off doesn't wake.
        if let ([byte], EVENTS) = (data, offset) {
            *byte = std::mem::take(&mut self.events);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let [value] = *data else { return };
        match offset {
            SLEEP_CONTROL
                if value & SLEEP_ENABLE != 0
                    && (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK == SLEEP_TYPE_S5 =>
            {
                self.sink.ask(PowerRequest::Off);
            }
            RESET if value == RESET_VALUE => self.sink.ask(PowerRequest::Reset),
            _ => {}
        }
    }

    fn resume(&mut self) {
        // The edge may have gone to an interrupt controller whose state was replaced since.
        if self.events != 0 {
            self.line.trigger();
        }
    }
}

/// Version 1 of the saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerStateV1 {
    /// Events that the guest hasn't read yet.
    pub events: u8,
}

impl Stateful for Power {
    const KIND: &'static str = "power";
    const VERSION: u16 = 1;
    type State = PowerStateV1;

    fn save(&self) -> Result<PowerStateV1, SaveError> {
        let Self { line: _, sink: _, events } = self;
        Ok(PowerStateV1 { events: *events })
    }

    fn restore(&mut self, state: PowerStateV1) -> Result<(), RestoreError> {
        let PowerStateV1 { events } = state;
        if events & !(EVENT_POWER_BUTTON | EVENT_VMGENID) != 0 {
            let why = format!("unknown events {events:#x}");
            return Err(RestoreError::Invalid { kind: Self::KIND, why });
        }
        self.events = events;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::{Receiver, channel};

    use vmm_migration::state::Saved;

    use super::*;

    #[derive(Default)]
    struct Edges(AtomicU32);

    impl IrqLine for Edges {
        fn trigger(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn device() -> (Power, Arc<Edges>, Receiver<PowerRequest>) {
        let edges = Arc::new(Edges::default());
        let (asked, requests) = channel();
        let sink = Box::new(move |r| asked.send(r).unwrap());
        (Power::new(edges.clone(), sink), edges, requests)
    }

    #[test]
    fn only_s5_with_sleep_enable_powers_off_and_once() {
        let (mut power, _, requests) = device();
        for value in 0..=0xffu8 {
            if value & 0b11_1100 != 0b11_0100 {
                power.write(SLEEP_CONTROL, &[value]);
            }
        }
        power.write(SLEEP_CONTROL, &[0x34, 0x34]);
        power.write(SLEEP_STATUS, &[0x34]);
        assert!(requests.try_recv().is_err());
        power.write(SLEEP_CONTROL, &[0x34]);
        power.write(SLEEP_CONTROL, &[0x34]);
        assert_eq!(requests.iter().next(), Some(PowerRequest::Off));
        assert!(requests.try_recv().is_err(), "the second request is swallowed");
    }

    #[test]
    fn only_the_reset_value_resets() {
        let (mut power, _, requests) = device();
        power.write(RESET, &[0]);
        power.write(RESET, &[0xff]);
        power.write(RESET, &[1, 0]);
        assert!(requests.try_recv().is_err());
        power.write(RESET, &[RESET_VALUE]);
        assert_eq!(requests.try_recv(), Ok(PowerRequest::Reset));
    }

    #[test]
    fn events_interrupt_and_are_read_once() {
        let (mut power, edges, _requests) = device();
        power.press_button();
        power.generation_changed();
        assert_eq!(edges.0.load(Ordering::SeqCst), 2);
        let mut word = [0xff; 2];
        power.read(EVENTS, &mut word);
        assert_eq!(word, [0, 0], "a wide read is no event read");
        let mut byte = [0xff];
        power.read(EVENTS, &mut byte);
        assert_eq!(byte, [3]);
        power.read(EVENTS, &mut byte);
        assert_eq!(byte, [0]);
        for offset in (0..SIZE).filter(|o| *o != EVENTS) {
            byte = [0xff];
            power.read(offset, &mut byte);
            assert_eq!(byte, [0]);
        }
    }

    #[test]
    fn a_pending_event_moves_and_interrupts_again() {
        let (mut source, _, _requests) = device();
        source.press_button();
        let section = source.save_section(0).unwrap();
        assert_eq!((section.kind.as_str(), &section.body[..]), ("power", &[1][..]));
        let (mut destination, edges, _requests) = device();
        destination.restore_section(&section).unwrap();
        destination.resume();
        assert_eq!(edges.0.load(Ordering::SeqCst), 1);
        let mut byte = [0];
        destination.read(EVENTS, &mut byte);
        assert_eq!(byte, [EVENT_POWER_BUTTON]);
        destination.resume();
        assert_eq!(edges.0.load(Ordering::SeqCst), 1, "nothing is pending any more");
    }

    #[test]
    fn unknown_events_are_refused() {
        let (mut power, _, _requests) = device();
        assert!(power.restore(PowerStateV1 { events: 4 }).is_err());
    }
}
