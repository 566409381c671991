//! Tests of `route`: what the client writes the server reads as the same, and wrong requests say why.

use super::*;
use crate::event::{MigrateRequest, OnTimeout, SnapshotRequest};

fn http(method: &str, path: &str, body: &str) -> HttpRequest {
    HttpRequest {
        method: method.into(),
        path: path.into(),
        body: body.into(),
        streams: false,
        keep_alive: true,
    }
}

fn error(method: &str, path: &str, body: &str) -> (u16, String) {
    let error = read(&http(method, path, body)).expect_err("a wrong request");
    (error.status, error.message)
}

#[test]
fn every_request_survives_the_wire() {
    let migrate = MigrateRequest {
        uri: "tcp:[::1]:4444".parse().expect("a URI"),
        downtime_limit_ms: 7,
        timeout_ms: 8,
        on_timeout: OnTimeout::StopAndCopy,
        bandwidth_bits_per_s: Some(1_000_000),
        dry_run: true,
    };
    for request in [
        Request::Info,
        Request::Pause,
        Request::Resume,
        Request::Stop { force: false },
        Request::Stop { force: true },
        Request::Migrate(migrate),
        Request::CancelMigration,
        Request::Snapshot(SnapshotRequest::new("/snap".into(), true)),
        Request::CancelSnapshot,
    ] {
        let (method, path, body) = write(&request);
        assert!(methods(path).is_some_and(|methods| methods.contains(method)), "{method} {path}");
        let body = body.map_or_else(String::new, |body| body.to_string());
        assert_eq!(read(&http(method, path, &body)), Ok(Route::Control(request)));
    }
    assert_eq!(read(&http("GET", "/", "")), Ok(Route::Identity));
}

#[test]
fn a_migration_needs_only_its_uri() {
    let Ok(Route::Control(Request::Migrate(migrate))) =
        read(&http("PUT", "/migration", r#"{"uri":"unix:/s"}"#))
    else {
        panic!("a migration");
    };
    assert_eq!((migrate.downtime_limit_ms, migrate.timeout_ms), (50, 600_000));
    assert_eq!(migrate.on_timeout, OnTimeout::Abort);
    assert_eq!((migrate.bandwidth_bits_per_s, migrate.dry_run), (None, false));
}

#[test]
fn wrong_requests_say_why() {
    assert_eq!(error("GET", "/vms", "").0, 404);
    assert!(error("GET", "/vms", "").1.contains("/vm/stop"));
    assert_eq!(error("DELETE", "/vm", ""), (405, "/vm takes GET, PUT, not DELETE".into()));
    assert_eq!(error("GET", "/vm", "{}").0, 400);
    assert!(error("PUT", "/vm", "").1.contains("needs a JSON body"));
    assert!(error("PUT", "/vm", r#"{"state":"off"}"#).1.contains("paused"));
    assert!(error("PUT", "/vm/stop", r#"{"forse":true}"#).1.contains("forse"));
    assert_eq!(error("PUT", "/snapshot", r#"{"dir":"rel"}"#).0, 400);
    for (field, value) in [
        ("uri", r#""stdio""#),
        ("uri", r#""unix:rel""#),
        ("uri", r#""ftp:x""#),
        ("downtime_limit_ms", "0"),
        ("downtime_limit_ms", "3600001"),
        ("timeout_ms", "0"),
        ("timeout_ms", "-1"),
        ("on_timeout", r#""explode""#),
        ("bandwidth_bits_per_s", "999999"),
        ("speed", "1"),
    ] {
        let uri = if field == "uri" { "" } else { r#""uri":"unix:/s","# };
        let (status, message) =
            error("PUT", "/migration", &format!(r#"{{{uri}"{field}":{value}}}"#));
        assert_eq!(status, 400, "{field} {value}: {message}");
    }
    let deep = "[".repeat(10_000);
    assert_eq!(error("PUT", "/vm", &deep).0, 400);
}
