//! Saved state of the serial port: its registers, what was received and not read, and what waits to be.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, Serial as Uart, SerialState};
use vmm_migration::state::{RestoreError, SaveError, Stateful, from_body, to_body};

use super::{FIFO_LEN, IER_TRANSMIT, IER_VALID, LSR_DATA, Line, Serial, Transmit, WAITING_LEN_MAX};

/// Version 1 of the saved state. Frozen.
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

/// Version 2: with the input that waits for room in the FIFO, which version 1 lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialStateV2 {
    /// As it was.
    pub v1: SerialStateV1,
    /// Comes after `v1.input`, oldest first; at most [`WAITING_LEN_MAX`] bytes.
    pub waiting: Vec<u8>,
}

impl From<SerialStateV1> for SerialStateV2 {
    fn from(v1: SerialStateV1) -> Self {
        Self { v1, waiting: Vec::new() }
    }
}

impl Stateful for Serial {
    const KIND: &'static str = "serial";
    const VERSION: u16 = 2;
    type State = SerialStateV2;

    fn save(&self) -> Result<SerialStateV2, SaveError> {
        let Self {
            line: _,
            wire: _,
            sign: _,
            uart,
            interrupt_enable,
            transmit,
            fifo_enabled,
            waiting,
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
        let v1 = SerialStateV1 {
            divisor_low: baud_divisor_low,
            divisor_high: baud_divisor_high,
            interrupt_enable: *interrupt_enable,
            line_control,
            modem_control,
            scratch,
            fifo_enabled: *fifo_enabled,
            transmit_pending: *transmit != Transmit::Seen,
            input: in_buffer,
        };
        Ok(SerialStateV2 { v1, waiting: waiting.iter().copied().collect() })
    }

    fn restore(&mut self, state: SerialStateV2) -> Result<(), RestoreError> {
        let invalid = |why| RestoreError::Invalid { kind: Self::KIND, why };
        let SerialStateV2 { v1: state, waiting } = state;
        if waiting.len() > WAITING_LEN_MAX {
            return Err(invalid(format!("{} bytes of input wait", waiting.len())));
        }
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
        self.waiting = waiting.into();
        self.polls = 0;
        Ok(())
    }

    fn upgrade(version: u16, body: &[u8]) -> Option<Result<SerialStateV2, RestoreError>> {
        let v1 = || from_body::<SerialStateV1>(Self::KIND, version, body);
        (version == 1).then(|| v1().map(Into::into))
    }

    fn downgrade(state: &SerialStateV2, version: u16) -> Option<Vec<u8>> {
        if version != 1 {
            return None;
        }
        if !state.waiting.is_empty() {
            let count = state.waiting.len();
            tracing::warn!(
                "serial: {count} bytes of input that the guest hasn't read are lost: the destination's \
                 vmm is older than this one and has no place for them"
            );
        }
        Some(to_body(&state.v1))
    }
}
