//! The keyboard controller's reset line and nothing else of an i8042, for guests told `reboot=k`.
//!
//! Ports 0x60 to 0x64. The status register reads as "output full, input empty" for ever: a driver that
//! looks for a controller drains it, finds that it never runs dry and gives up at once (Linux:
//! "No controller found"), while one that waits to send the reset command may send it at once.

use serde::{Deserialize, Serialize};
use vmm_migration::state::{RestoreError, SaveError, Stateful};

use crate::bus::BusDevice;
use crate::power::{Once, PowerRequest, PowerSink};

/// Ports that the device takes, from 0x60.
pub const SIZE: u64 = 5;

/// Offset of the command (write) and status (read) register: port 0x64.
const COMMAND: u64 = 4;
/// Pulse output line 0, which is wired to the CPU's reset.
const COMMAND_RESET: u8 = 0xfe;
/// All ones but bit 1, "input buffer full".
const STATUS: u8 = 0xfd;

/// The device.
pub struct ResetLine {
    sink: Once,
}

impl ResetLine {
    /// A reset line that asks `sink` for the reset.
    #[must_use]
    pub fn new(sink: PowerSink) -> Self {
        Self { sink: Once::new(sink) }
    }
}

impl BusDevice for ResetLine {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let ([byte], COMMAND) = (data, offset) {
            *byte = STATUS;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if (offset, data) == (COMMAND, &[COMMAND_RESET]) {
            self.sink.ask(PowerRequest::Reset);
        }
    }
}

/// Version 1 of the saved state: there is none, but that the device is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetLineStateV1;

impl Stateful for ResetLine {
    const KIND: &'static str = "i8042-reset";
    const VERSION: u16 = 1;
    type State = ResetLineStateV1;

    fn save(&self) -> Result<ResetLineStateV1, SaveError> {
        let Self { sink: _ } = self;
        Ok(ResetLineStateV1)
    }

    fn restore(&mut self, ResetLineStateV1: ResetLineStateV1) -> Result<(), RestoreError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use vmm_migration::state::Saved;

    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let (asked, requests) = channel();
        let mut line = ResetLine::new(Box::new(move |r| asked.send(r).unwrap()));
        for command in (0..=0xff).filter(|c| *c != COMMAND_RESET) {
            line.write(COMMAND, &[command]);
        }
        line.write(0, &[COMMAND_RESET]);
        line.write(COMMAND, &[COMMAND_RESET, 0]);
        assert!(requests.try_recv().is_err());
        line.write(COMMAND, &[COMMAND_RESET]);
        assert_eq!(requests.try_recv(), Ok(PowerRequest::Reset));
    }

    #[test]
    fn a_probe_finds_no_controller_and_a_reset_need_not_wait() {
        let mut line = ResetLine::new(Box::new(|_| ()));
        let mut status = [0];
        line.read(COMMAND, &mut status);
        assert_eq!(status[0] & 1, 1, "the output never runs dry");
        assert_eq!(status[0] & 2, 0, "a command may be sent at once");
        let section = line.save_section(0).unwrap();
        assert!(section.body.is_empty());
        line.restore_section(&section).unwrap();
    }
}
