//! Saved state of the serial port: its registers, and what was received and not read.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, Serial as Uart, SerialState};
use vmm_migration::state::{RestoreError, SaveError, Stateful};

use super::{FIFO_LEN, IER_TRANSMIT, IER_VALID, LSR_DATA, Line, Serial, Transmit};

/// Version 1 of the saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialStateV1 {
    /// DLL, the divisor latch's low byte.
    pub divisor_low: u8,
    /// DLM, the divisor latch's high byte.
    pub divisor_high: u8,
    /// IER.
    pub interrupt_enable: u8,
    /// LCR.
    pub line_control: u8,
    /// MCR.
    pub modem_control: u8,
    /// SCR.
    pub scratch: u8,
    /// Bit 0 of FCR.
    pub fifo_enabled: bool,
    /// The guest is still to learn that the transmitter is empty.
    pub transmit_pending: bool,
    /// Received and not read, oldest first; at most [`FIFO_LEN`] bytes.
    pub input: Vec<u8>,
}

impl Stateful for Serial {
    const KIND: &'static str = "serial";
    const VERSION: u16 = 1;
    type State = SerialStateV1;

    fn save(&self) -> Result<SerialStateV1, SaveError> {
        let Self {
            line: _,
            wire: _,
            uart,
            interrupt_enable,
            transmit,
            fifo_enabled,
            polls: _,
            input_refused: _,
        } = self;
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: _,         // The receiver's half of ours.
            interrupt_identification: _, // Which edges were seen: `resume` sends them anew.
            line_control,
            line_status: _, // Whether there is input.
            modem_control,
            modem_status: _, // Constant: the line is always up.
            scratch,
            in_buffer,
        } = uart.state();
        Ok(SerialStateV1 {
            divisor_low: baud_divisor_low,
            divisor_high: baud_divisor_high,
            interrupt_enable: *interrupt_enable,
            line_control,
            modem_control,
            scratch,
            fifo_enabled: *fifo_enabled,
            transmit_pending: *transmit != Transmit::Seen,
            input: in_buffer,
        })
    }

    fn restore(&mut self, state: SerialStateV1) -> Result<(), RestoreError> {
        let invalid = |why| RestoreError::Invalid { kind: Self::KIND, why };
        let (length, enable) = (state.input.len(), state.interrupt_enable);
        if length > FIFO_LEN || enable & !IER_VALID != 0 {
            return Err(invalid(format!("{length} bytes of input, interrupt enable {enable:#x}")));
        }
        let fresh = SerialState::default();
        let has_input = if state.input.is_empty() { 0 } else { LSR_DATA };
        let registers = SerialState {
            baud_divisor_low: state.divisor_low,
            baud_divisor_high: state.divisor_high,
            interrupt_enable: enable & !IER_TRANSMIT,
            line_control: state.line_control,
            line_status: fresh.line_status | has_input,
            modem_control: state.modem_control,
            scratch: state.scratch,
            in_buffer: state.input,
            ..fresh
        };
        let line = Line(Arc::clone(&self.line));
        self.uart = Uart::from_state(&registers, line, NoEvents, std::io::sink())
            .map_err(|e| invalid(e.to_string()))?;
        self.interrupt_enable = enable;
        let pending = state.transmit_pending && self.transmit_enabled();
        // Withheld until `resume` finds room on this side's wire.
        self.transmit = if pending { Transmit::Withheld } else { Transmit::Seen };
        self.fifo_enabled = state.fifo_enabled;
        self.polls = 0;
        Ok(())
    }
}
