//! How the two halves of a test in two emulated hosts talk: JSON over TCP, a line at a time.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::linux::LONG;

/// Where host 2 listens for host 1.
const TALK: &str = "10.77.0.2:4445";

/// One half's end.
pub struct Talk {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Talk {
    /// Host 1's: waits until host 2 awaits it.
    #[track_caller]
    pub fn connect() -> Self {
        Self::new(until("host 2 listens for its other half", || TcpStream::connect(TALK).ok()))
    }

    /// Host 2's.
    pub fn accept(listener: &TcpListener) -> Self {
        Self::new(listener.accept().unwrap().0)
    }

    /// Lets host 1 connect.
    pub fn listen() -> TcpListener {
        TcpListener::bind(TALK).unwrap()
    }

    fn new(stream: TcpStream) -> Self {
        let reader = BufReader::new(stream.try_clone().unwrap());
        Self { stream, reader }
    }

    pub fn say(&mut self, word: &Value) {
        writeln!(self.stream, "{word}").unwrap();
    }

    #[track_caller]
    pub fn hear(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        serde_json::from_str(&line)
            .unwrap_or_else(|e| panic!("the other host's test says {line:?}: {e}"))
    }
}

/// Waits until an attempt gives something.
#[track_caller]
pub fn until<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(start.elapsed() < LONG, "not in {LONG:?}: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
