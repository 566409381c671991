//! The serial port: a 16550A (National Semiconductor PC16550D) at eight ports.
//!
//! vm-superio holds the registers and the receive FIFO (64 bytes). What it leaves out stands here,
//! because its transmitter is always ready and tells so at every byte:
//!
//! - *Output flow.* While the [`Wire`] has no room, LSR shows the transmitter as busy and the
//!   transmitter-empty interrupt is withheld, so that drivers wait as they do on a real line. A driver
//!   that writes all the same loses nothing here: the wire takes every byte.
//! - *Input flow.* A driver that starts throws away what the FIFO holds. Bytes therefore stay with the
//!   console until the guest listens: it has enabled the receive interrupt, or it polls LSR.
//!   When the machine comes to rest, the console leaves here what it has read and the guest hasn't, and it goes
//!   with the guest: it is handed out, before anything newer, as the guest takes it.
//! - *Interrupt identification* by priority and by level, the receiver's above the transmitter's.
//! - *FIFO control.* Of FCR only "FIFOs on" can be seen by a guest (in IIR), so only that is state. The
//!   receive FIFO can be cleared and its depth doesn't change; the trigger level is always one byte.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::Sink;
use std::sync::Arc;

use vm_superio::serial::{NoEvents, Serial as Uart};

use crate::bus::BusDevice;
use crate::irq::IrqLine;
use crate::sign::Signs;

mod state;

pub use state::{SerialStateV1, SerialStateV2};

/// Ports that the device takes.
pub const SIZE: u64 = 8;
/// Depth of the receive FIFO in bytes.
pub const FIFO_LEN: usize = 64;
/// Most bytes that wait for room in it, while the machine is at rest and after.
pub const WAITING_LEN_MAX: usize = 16 << 10;

// Registers, as offsets.
const DATA: u8 = 0;
const IER: u8 = 1;
const IIR: u8 = 2;
const FCR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;

const IER_RECEIVE: u8 = 1 << 0;
const IER_TRANSMIT: u8 = 1 << 1;
const IER_VALID: u8 = 0x0f;
const IIR_NONE: u8 = 0b0001;
const IIR_TRANSMIT: u8 = 0b0010;
const IIR_RECEIVE: u8 = 0b0100;
const IIR_FIFO: u8 = 0b1100_0000;
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVE: u8 = 1 << 1;
const LCR_DLAB: u8 = 1 << 7;
const MCR_LOOP: u8 = 1 << 4;
const LSR_DATA: u8 = 1 << 0;
/// Holding register and shift register are empty.
const LSR_EMPTY: u8 = (1 << 5) | (1 << 6);

/// So many reads of LSR in a row, all with the transmitter ready, can only wait for input.
const POLLS: u8 = 2;

/// What the port's pins are joined to: a console.
pub trait Wire: Send {
    /// Takes what the guest sends. Never fails; may hold the caller up for some milliseconds where a
    /// guest ignores that there is no [`room`](Self::room).
    fn push(&mut self, bytes: &[u8]);

    /// Whether the guest may send now. After `false` the console sees to it that
    /// [`Serial::output_drained`] is called once it may.
    fn room(&self) -> bool;

    /// The guest takes input again, after [`Serial::input_room`] had said that it doesn't.
    fn input_wanted(&self);
}

/// The interrupt line, as vm-superio likes it.
struct Line(Arc<dyn IrqLine>);

impl vm_superio::Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.trigger();
        Ok(())
    }
}

/// Where the transmitter-empty interrupt stands, if it is enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transmit {
    /// The guest has seen it.
    Seen,
    /// The interrupt line had its edge; IIR shows it.
    Pending,
    /// Due as soon as the wire has room.
    Withheld,
}

/// The device.
pub struct Serial {
    // Glue.
    line: Arc<dyn IrqLine>,
    wire: Box<dyn Wire>,
    sign: Arc<Signs>,
    // State. `uart` never sees the transmitter's half: neither bytes nor its bit of IER.
    uart: Uart<Line, NoEvents, Sink>,
    interrupt_enable: u8,
    transmit: Transmit,
    fifo_enabled: bool,
    /// Input that the console has handed over, and the FIFO had no room for.
    waiting: VecDeque<u8>,
    // Not saved: console and guest ask again.
    polls: u8,
    input_refused: bool,
}

impl Serial {
    /// A port in its state after power-on.
    #[must_use]
    pub fn new(line: Arc<dyn IrqLine>, wire: Box<dyn Wire>, sign: Arc<Signs>) -> Self {
        Self {
            uart: Uart::new(Line(Arc::clone(&line)), std::io::sink()),
            line,
            wire,
            sign,
            interrupt_enable: 0,
            transmit: Transmit::Seen,
            fifo_enabled: false,
            waiting: VecDeque::new(),
            polls: 0,
            input_refused: false,
        }
    }

    /// How many bytes of input the guest takes now, 0 to [`FIFO_LEN`]. After 0 the device calls
    /// [`Wire::input_wanted`] once that changes.
    pub fn input_room(&mut self) -> usize {
        self.refill();
        // What waits comes first.
        let room = if self.waiting.is_empty() { self.fifo_room() } else { 0 };
        self.input_refused = room == 0;
        room
    }

    fn fifo_room(&mut self) -> usize {
        let listening = self.receive_enabled() || self.polls >= POLLS;
        if listening && !self.looped() { self.uart.fifo_capacity() } else { 0 }
    }

    /// Moves what waits into the FIFO.
    fn refill(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let count = self.fifo_room().min(self.waiting.len());
        let bytes: Vec<u8> = self.waiting.drain(..count).collect();
        // It has the room; and there is no other error.
        let _ = self.uart.enqueue_raw_bytes(&bytes);
    }

    /// The machine comes to rest: takes what the console has read for the guest, as much as may wait, and
    /// says how many bytes that is.
    pub fn keep(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(WAITING_LEN_MAX - self.waiting.len());
        self.waiting.extend(&bytes[..count]);
        count
    }

    /// Gives the guest input. Takes as many bytes as [`Self::input_room`] says, and says how many.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let room = self.input_room().min(bytes.len());
        self.uart.enqueue_raw_bytes(&bytes[..room]).unwrap_or(0)
    }

    /// The console has room for output again.
    pub fn output_drained(&mut self) {
        if self.transmit == Transmit::Withheld {
            self.transmitter_empty();
        }
    }

    fn receive_enabled(&self) -> bool {
        self.interrupt_enable & IER_RECEIVE != 0
    }

    fn transmit_enabled(&self) -> bool {
        self.interrupt_enable & IER_TRANSMIT != 0
    }

    fn divisor_latched(&mut self) -> bool {
        self.uart.read(LCR) & LCR_DLAB != 0
    }

    fn looped(&mut self) -> bool {
        self.uart.read(MCR) & MCR_LOOP != 0
    }

    fn has_input(&mut self) -> bool {
        self.uart.read(LSR) & LSR_DATA != 0
    }

    /// The transmitter has become empty, or was found so when its interrupt was enabled.
    fn transmitter_empty(&mut self) {
        if !self.transmit_enabled() {
            self.transmit = Transmit::Seen;
        } else if !self.wire.room() {
            self.transmit = Transmit::Withheld;
        } else if self.transmit != Transmit::Pending {
            self.transmit = Transmit::Pending;
            self.line.trigger();
        }
    }

    /// Calls for the input that was refused, as soon as the guest is ready for a FIFO full.
    fn call_for_input(&mut self) {
        if !self.has_input() {
            self.refill();
        }
        if self.input_refused && !self.has_input() && self.input_room() > 0 {
            self.wire.input_wanted();
        }
    }

    fn clear_received(&mut self) {
        let line_control = self.uart.read(LCR);
        self.set(LCR, line_control & !LCR_DLAB);
        while self.has_input() {
            self.uart.read(DATA);
        }
        self.set(LCR, line_control);
    }

    /// Writes a register of vm-superio's. Its errors are those of its sink and of a line that can't
    /// fail, so there are none.
    fn set(&mut self, register: u8, value: u8) {
        let _ = self.uart.write(register, value);
    }

    fn identify_interrupt(&mut self) -> u8 {
        let fifo = if self.fifo_enabled { IIR_FIFO } else { 0 };
        let id = if self.receive_enabled() && self.has_input() {
            // Tells vm-superio that its edge was seen, so that the next byte gives a new one.
            self.uart.read(IIR);
            IIR_RECEIVE
        } else if self.transmit_enabled() && self.transmit == Transmit::Pending {
            self.transmit = Transmit::Seen;
            IIR_TRANSMIT
        } else {
            IIR_NONE
        };
        fifo | id
    }

    fn read_register(&mut self, register: u8) -> u8 {
        let latched = self.divisor_latched();
        if register != LSR && (register != DATA || latched) {
            self.polls = 0;
        }
        match register {
            IIR => self.identify_interrupt(),
            IER if !latched => self.interrupt_enable,
            LSR => {
                let status = self.uart.read(LSR);
                if !self.wire.room() {
                    self.polls = 0;
                    return status & !LSR_EMPTY;
                }
                self.polls = self.polls.saturating_add(1);
                self.call_for_input();
                status
            }
            DATA if !latched => {
                let byte = self.uart.read(DATA);
                self.call_for_input();
                byte
            }
            _ => self.uart.read(register),
        }
    }

    fn write_register(&mut self, register: u8, value: u8) {
        self.polls = 0;
        let latched = self.divisor_latched();
        match register {
            DATA if !latched => {
                if self.looped() {
                    self.set(DATA, value);
                } else {
                    self.sign.note();
                    self.wire.push(&[value]);
                }
                self.transmitter_empty();
            }
            IER if !latched => {
                self.set(IER, value & !IER_TRANSMIT);
                let old = std::mem::replace(&mut self.interrupt_enable, value & IER_VALID);
                if (old ^ value) & IER_TRANSMIT != 0 {
                    self.transmit = Transmit::Seen;
                    self.transmitter_empty();
                }
            }
            FCR => {
                let enable = value & FCR_ENABLE != 0;
                if enable != self.fifo_enabled || (enable && value & FCR_CLEAR_RECEIVE != 0) {
                    self.clear_received();
                }
                self.fifo_enabled = enable;
            }
            _ => self.set(register, value),
        }
        self.call_for_input();
    }
}

impl BusDevice for Serial {
    /// A wide access is one of single bytes at consecutive ports, as a bus of 8 bits splits it.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            *byte = u8::try_from(register).map_or(0xff, |r| self.read_register(r));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (register, byte) in (offset..).zip(data) {
            if let Ok(register) = u8::try_from(register) {
                self.write_register(register, *byte);
            }
        }
    }

    fn resume(&mut self) {
        self.refill();
        // The edge may have gone to an interrupt controller whose state was replaced since.
        let receive = self.receive_enabled() && self.has_input();
        let transmit = self.transmit_enabled() && self.transmit == Transmit::Pending;
        if receive || transmit {
            self.line.trigger();
        }
        self.output_drained();
    }
}

#[cfg(test)]
#[path = "serial_tests.rs"]
mod tests;
