//! Tests of `uri`: what parses prints as it was, what doesn't names the reason.

use super::{SOCKET_PATH_BYTES_MAX, Uri, UriError};

#[test]
fn good_uris_print_as_they_were_read() {
    for text in [
        "tcp:10.0.0.2:4444",
        "tcp:host-1.example.org:1",
        "tcp:[::1]:65535",
        "tcp:[fe80::1%eth0]:4444",
        "unix:/run/a b.sock",
        "unix:rel:with:colons",
        "stdio",
        "exec:ssh host vmm migrate --listen stdio",
    ] {
        let uri: Uri = text.parse().expect(text);
        assert_eq!(uri.to_string(), text);
        let json = serde_json::to_string(&uri).expect("a string");
        assert_eq!(serde_json::from_str::<Uri>(&json).expect(text), uri);
    }
    assert_eq!("tcp:[::1]:5".parse(), Ok(Uri::Tcp { host: "::1".into(), port: 5 }));
}

#[test]
fn bad_uris_name_the_reason() {
    let long = format!("unix:/{}", "x".repeat(SOCKET_PATH_BYTES_MAX));
    for (text, error) in [
        ("", UriError::Scheme),
        ("10.0.0.2:4444", UriError::Scheme),
        ("udp:1.2.3.4:5", UriError::Scheme),
        ("stdio:", UriError::Scheme),
        ("tcp:", UriError::Tcp),
        ("tcp:host", UriError::Tcp),
        ("tcp::4444", UriError::Host),
        ("tcp:a/b:4444", UriError::Host),
        ("tcp:::1:4444", UriError::Brackets),
        ("tcp:[::1]4444", UriError::Brackets),
        ("tcp:[host]:4444", UriError::Brackets),
        ("tcp:[fe80::1%]:4444", UriError::Brackets),
        ("tcp:host:0", UriError::Port),
        ("tcp:host:+5", UriError::Port),
        ("tcp:host:65536", UriError::Port),
        ("tcp:host:", UriError::Port),
        ("unix:", UriError::Path),
        ("unix:a\0b", UriError::Path),
        (long.as_str(), UriError::Path),
        ("exec:", UriError::Command),
        ("exec:  ", UriError::Command),
    ] {
        assert_eq!(text.parse::<Uri>(), Err(error), "{text}");
    }
}
