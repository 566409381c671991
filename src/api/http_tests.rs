//! Tests of `http`: what a request may look like, and that nothing hostile gets further than an error.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

/// A stream that yields given pieces and takes what is written.
struct Pieces {
    pieces: VecDeque<Vec<u8>>,
    written: Vec<u8>,
}

impl Read for Pieces {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some(mut piece) = self.pieces.pop_front() else { return Ok(0) };
        let count = piece.len().min(buf.len());
        buf[..count].copy_from_slice(&piece[..count]);
        if count < piece.len() {
            self.pieces.push_front(piece.split_off(count));
        }
        Ok(count)
    }
}

impl Write for Pieces {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.written.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn connection(bytes: &[u8], piece_bytes: usize) -> Connection<Pieces> {
    let pieces = bytes.chunks(piece_bytes.max(1)).map(<[u8]>::to_vec).collect();
    Connection::new(Pieces { pieces, written: Vec::new() })
}

fn status_of(bytes: &[u8]) -> u16 {
    match connection(bytes, 4096).read_request() {
        Err(HttpError::Refused(error)) => error.status,
        other => panic!("{other:?} is no refusal"),
    }
}

#[test]
fn requests_arrive_whole_however_they_are_cut() {
    let bytes = b"PUT /vm HTTP/1.1\r\nHost: x\r\nAccept: text/plain, application/x-ndjson;q=1\r\ncontent-length: 4\r\n\r\nbodyGET / HTTP/1.0\r\n\r\n";
    for piece_bytes in [1, 2, 7, 4096] {
        let mut connection = connection(bytes, piece_bytes);
        let first = connection.read_request().expect("a good request");
        assert_eq!((first.method.as_str(), first.path.as_str()), ("PUT", "/vm"));
        assert_eq!(first.body, b"body");
        assert!(first.streams && first.keep_alive);
        let second = connection.read_request().expect("a second request");
        assert_eq!((second.method.as_str(), second.body.len()), ("GET", 0));
        assert!(!second.keep_alive);
        assert!(!connection.wait().expect("the end"));
    }
}

#[test]
fn a_client_that_asks_before_its_body_is_told_to_go_on() {
    let head = b"PUT /vm HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n".to_vec();
    let pieces = VecDeque::from([head, b"{}".to_vec()]);
    let mut connection = Connection::new(Pieces { pieces, written: Vec::new() });
    assert_eq!(connection.read_request().expect("a request").body, b"{}");
    assert_eq!(connection.stream.written, b"HTTP/1.1 100 Continue\r\n\r\n");
}

#[test]
fn bad_requests_have_their_status() {
    assert_eq!(status_of(b"hello\r\n\r\n"), 400);
    assert_eq!(status_of(b"GET / HTTP/2.0\r\n\r\n"), 505);
    assert_eq!(status_of(b"PUT / HTTP/1.1\r\nContent-Length: x\r\n\r\n"), 400);
    assert_eq!(status_of(b"PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"), 400);
    assert_eq!(status_of(b"PUT / HTTP/1.1\r\nContent-Length: +1\r\n\r\n"), 400);
    let huge = b"PUT / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n";
    assert_eq!(status_of(huge), 400);
    assert_eq!(status_of(b"PUT / HTTP/1.1\r\nContent-Length: 65537\r\n\r\n"), 413);
    let twice = b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx";
    assert_eq!(status_of(twice), 400);
    assert_eq!(status_of(b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), 501);
    let both = b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(status_of(both), 400);
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(33));
    assert_eq!(status_of(many.as_bytes()), 431);
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(HEAD_BYTES_MAX));
    assert_eq!(status_of(long.as_bytes()), 431);
    let endless = vec![b'x'; 1 << 20];
    assert_eq!(status_of(&endless), 431);
}

#[test]
fn a_request_that_stops_short_is_truncated() {
    let whole = b"PUT /vm HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody";
    for length in 0..whole.len() {
        let result = connection(&whole[..length], 4096).read_request();
        assert!(matches!(result, Err(HttpError::Truncated)), "{length}: {result:?}");
    }
}

#[test]
fn answers_are_limited_too() {
    let long = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", ANSWER_BYTES_MAX + 1);
    assert!(matches!(
        connection(long.as_bytes(), 4096).read_answer_head(),
        Err(HttpError::Answer("its body is too long"))
    ));
    for bad in ["fffffffffffffffff\r\n", "zz\r\n", "7fffffff\r\n", "1\r\nxyz"] {
        let result = connection(bad.as_bytes(), 4096).read_chunk();
        assert!(matches!(result, Err(HttpError::Answer(_))), "{bad}: {result:?}");
    }
    let good = connection(b"3;x=y\r\nabc\r\n", 1).read_chunk().expect("a chunk");
    assert_eq!(good, b"abc");
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in hostile(), piece_bytes in 1_usize..64) {
        if let Ok(request) = connection(&bytes, piece_bytes).read_request() {
            prop_assert!(request.body.len() <= bytes.len());
            // What passes goes on to the table of paths and JSON.
            let _: Result<_, ApiError> = crate::api::route::read(&request);
        }
        let _: Result<_, HttpError> = connection(&bytes, piece_bytes).read_answer_head();
        let _: Result<_, HttpError> = connection(&bytes, piece_bytes).read_chunk();
    }
}

/// Raw bytes, and requests put together from likely and unlikely parts.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        Just("GET ".to_owned()),
        Just("PUT /vm HTTP/1.1\r\n".to_owned()),
        Just("PUT /migration HTTP/1.1\r\n".to_owned()),
        Just("HTTP/1.1 200 OK\r\n".to_owned()),
        Just("Content-Length: 18\r\n".to_owned()),
        Just("Transfer-Encoding: chunked\r\n".to_owned()),
        Just("\r\n".to_owned()),
        Just("\n".to_owned()),
        Just(r#"{"state":"paused"}"#.to_owned()),
        Just(r#"{"uri":"tcp:[::1]:1"}"#.to_owned()),
        "\\PC{0,20}",
    ];
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..512),
        proptest::collection::vec(part, 0..12).prop_map(|parts| parts.concat().into_bytes()),
    ]
}
