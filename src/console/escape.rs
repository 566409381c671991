//! The escape of an interactive console: Ctrl-a, then one key.

/// Ctrl-a.
const PREFIX: u8 = 0x01;

/// What is shown at start on a terminal.
pub const NOTE: &str =
    "vmm: this terminal is the guest's; Ctrl-a x ends the VM, Ctrl-a h shows help";
/// What Ctrl-a h shows.
pub const HELP: &str = "\nvmm: Ctrl-a x  end the VM\n     Ctrl-a a  send Ctrl-a to the guest\n     Ctrl-a h  show this\n";

/// What a typed byte means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Typed {
    /// The guest gets this byte.
    Byte(u8),
    /// The user ends the VM.
    Quit,
    /// The user asks for help.
    Help,
    /// Half of an escape, or one that means nothing.
    Nothing,
}

/// Where in an escape the typing stands.
#[derive(Debug, Default)]
pub struct Escape {
    prefixed: bool,
}

impl Escape {
    /// Takes the next byte that was typed.
    pub fn feed(&mut self, byte: u8) -> Typed {
        if !std::mem::take(&mut self.prefixed) {
            self.prefixed = byte == PREFIX;
            return if self.prefixed { Typed::Nothing } else { Typed::Byte(byte) };
        }
        match byte {
            b'x' | b'X' => Typed::Quit,
            b'a' | b'A' | PREFIX => Typed::Byte(PREFIX),
            b'h' | b'H' | b'?' => Typed::Help,
            _ => Typed::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(text: &[u8]) -> Vec<Typed> {
        let mut escape = Escape::default();
        text.iter().map(|b| escape.feed(*b)).filter(|t| *t != Typed::Nothing).collect()
    }

    #[test]
    fn bytes_pass_and_escapes_act() {
        assert_eq!(feed(b"ax\x00\xff"), [b'a', b'x', 0, 0xff].map(Typed::Byte));
        assert_eq!(feed(b"\x01x"), [Typed::Quit]);
        assert_eq!(feed(b"\x01h"), [Typed::Help]);
        assert_eq!(feed(b"\x01a\x01\x01x"), [1, 1, b'x'].map(Typed::Byte));
        assert_eq!(feed(b"\x01zz"), [Typed::Byte(b'z')]);
    }
}
