//! Tiny guests in assembly, which any KVM can run, and the file that `vmm run --kernel` boots them from.
//!
//! All of them stand in one blob, which is loaded at [`LOAD`]; each has its own entry, in the state that
//! PVH says (32-bit, no paging), and two parameters in the blob's first 16 bytes. They take no
//! interrupts and keep to instructions that KVM's emulator knows, since a software-only KVM emulates
//! everything at privilege level 0; what must be fast runs at level 3.

use std::arch::global_asm;
use std::path::{Path, PathBuf};

/// Guest-physical address of the blob.
const LOAD: u64 = 0x10_0000;
/// Bytes of RAM that the guests use, from [`LOAD`]: code, page tables, stack.
const EXTENT: u64 = 0x2_0000;

/// One guest: where it starts, and what it is told.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    entry: u64,
    parameters: [u64; 2],
}

macro_rules! guests {
    ($($(#[$doc:meta])* $name:ident($($parameter:ident),*) = $label:ident;)*) => {
        unsafe extern "C" { $(static $label: u8;)* static guests_start: u8; static guests_end: u8; }

        impl Guest {
            $($(#[$doc])* pub fn $name($($parameter: u64),*) -> Self {
                let given: &[u64] = &[$($parameter),*];
                let mut parameters = [0; 2];
                parameters[..given.len()].copy_from_slice(given);
                let (entry, start) = (&raw const $label, &raw const guests_start);
                Self { entry: LOAD + (entry.addr() - start.addr()) as u64, parameters }
            })*
        }
    };
}

guests! {
    /// Prints "hello" and powers off.
    hello() = guest_hello;
    /// Prints a byte that counts up, for ever: a byte lost, doubled or changed breaks the count.
    counter() = guest_counter;
    /// Prints `lines` lines of seven hexadecimal digits that count up, and powers off. If `rude`, it
    /// doesn't look whether the transmitter is ready.
    flood(lines, rude) = guest_flood;
    /// Prints what it receives, and powers off at an EOT (4).
    echo() = guest_echo;
    /// Writes and reads back the UART's scratch register for ever; prints a dot for every 4096 rounds,
    /// "E" at each difference.
    pio_storm() = guest_pio_storm;
    /// Reads the first virtio-mmio device's magic for ever; prints as `pio_storm` does.
    mmio_storm() = guest_mmio_storm;
    /// At privilege level 3, dirties `mib` MiB of RAM from 16 MiB on, for ever: each pass writes both
    /// ends of each page, and checks what the pass before wrote there. Prints a dot for each pass, and
    /// "E" and no more at a difference. Idles `delay` turns after each page.
    dirtier(mib, delay) = guest_dirtier;
    /// Writes a zero to each page of `mib` MiB of RAM from 16 MiB on, then prints as `counter` does.
    zeroer(mib) = guest_zeroer;
    /// Sends an ARP request by its interface, of which there is one and no disk: 10.9.8.7, at 02:00:00:00:00:2a, asks for
    /// 10.9.8.1. Then prints as `counter` does, and sends no more, whatever the device asks of its driver.
    arp() = guest_arp;
    /// Waits for the power button, by polling, and powers off.
    button() = guest_button;
    /// Does nothing, for ever.
    spin() = guest_spin;
    /// Ends in a triple fault.
    triple_fault() = guest_triple_fault;
    /// Writes the reset register.
    reset() = guest_reset;
    /// Prints "hello" and writes the reset register.
    reset_after_hello() = guest_reset_after_hello;
}

impl Guest {
    /// Writes the guest as an ELF kernel with a PVH note into `dir`, and gives its path.
    pub fn write_to(self, dir: &Path) -> PathBuf {
        let path = dir.join(format!("guest-{:x}.elf", self.entry));
        std::fs::write(&path, self.elf()).unwrap();
        path
    }

    fn elf(self) -> Vec<u8> {
        const HEADER: u16 = 64;
        const PROGRAM_HEADER: u16 = 56;
        let code = self.code();
        let note_at = HEADER + 2 * PROGRAM_HEADER;
        let note = pvh_note(self.entry);
        let code_at = 4096usize;

        let mut elf = Vec::new();
        elf.extend(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        for half in [2u16, 62] {
            elf.extend(half.to_le_bytes()); // ET_EXEC, EM_X86_64
        }
        elf.extend(1u32.to_le_bytes());
        for word in [self.entry, u64::from(HEADER), 0] {
            elf.extend(word.to_le_bytes()); // entry, program headers, section headers
        }
        elf.extend(0u32.to_le_bytes());
        for half in [HEADER, PROGRAM_HEADER, 2, 64, 0, 0] {
            elf.extend(half.to_le_bytes());
        }
        let load = (1u32, 7u32, code_at as u64, LOAD, code.len() as u64, EXTENT, 4096u64);
        let notes = (4, 4, u64::from(note_at), 0, note.len() as u64, note.len() as u64, 4);
        for (kind, flags, offset, address, in_file, in_memory, align) in [load, notes] {
            elf.extend(kind.to_le_bytes());
            elf.extend(flags.to_le_bytes());
            for word in [offset, address, address, in_file, in_memory, align] {
                elf.extend(word.to_le_bytes());
            }
        }
        elf.extend(note);
        elf.resize(code_at, 0);
        elf.extend(code);
        elf
    }

    fn code(self) -> Vec<u8> {
        let (start, end) = (&raw const guests_start, &raw const guests_end);
        // SAFETY: both symbols are the ends of one read-only section of this program.
        let mut code =
            unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }.to_vec();
        code[..8].copy_from_slice(&self.parameters[0].to_le_bytes());
        code[8..16].copy_from_slice(&self.parameters[1].to_le_bytes());
        code
    }
}

/// XEN_ELFNOTE_PHYS32_ENTRY (18) with the address of the entry.
fn pvh_note(entry: u64) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(u32::try_from(entry).unwrap().to_le_bytes());
    note
}

global_asm!(include_str!("guests.s"), options(att_syntax, raw));
