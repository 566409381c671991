//! The one table of the API: which method and path is which [`Request`], read by the server
//! and written by the client.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::http::HttpRequest;
use crate::event::{ApiError, Request, Resolution};

/// What a path and method ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// `GET /`: who listens here. Answered without the control thread.
    Identity,
    /// Anything else.
    Control(Request),
}

const PATHS: [(&str, &str); 6] = [
    ("/", "GET"),
    ("/vm", "GET, PUT"),
    ("/vm/stop", "PUT"),
    ("/migration", "PUT, DELETE"),
    ("/migration/resolution", "PUT"),
    ("/snapshot", "PUT, DELETE"),
];

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PutVm {
    state: PutState,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum PutState {
    Paused,
    Running,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PutStop {
    #[serde(default)]
    force: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PutResolution {
    decision: Resolution,
}

/// Finds what a request asks for.
///
/// # Errors
/// 400 for a body that doesn't fit, 404 for an unknown path, 405 for the wrong method.
pub fn read(http: &HttpRequest) -> Result<Route, ApiError> {
    let request = match (http.method.as_str(), http.path.as_str()) {
        ("GET", "/") => {
            no_body(http)?;
            return Ok(Route::Identity);
        }
        ("GET", "/vm") => {
            no_body(http)?;
            Request::Info
        }
        ("PUT", "/vm") => match body::<PutVm>(http)?.state {
            PutState::Paused => Request::Pause,
            PutState::Running => Request::Resume,
        },
        ("PUT", "/vm/stop") if http.body.is_empty() => Request::Stop { force: false },
        ("PUT", "/vm/stop") => Request::Stop { force: body::<PutStop>(http)?.force },
        ("PUT", "/migration") => Request::Migrate(body(http)?),
        ("DELETE", "/migration") => {
            no_body(http)?;
            Request::CancelMigration
        }
        ("PUT", "/migration/resolution") => Request::Resolve(body::<PutResolution>(http)?.decision),
        ("PUT", "/snapshot") => Request::Snapshot(body(http)?),
        ("DELETE", "/snapshot") => {
            no_body(http)?;
            Request::CancelSnapshot
        }
        (method, path) => return Err(unknown(method, path)),
    };
    request.validate()?;
    Ok(Route::Control(request))
}

/// How a request is sent: method, path and body.
#[must_use]
pub fn write(request: &Request) -> (&'static str, &'static str, Option<Value>) {
    match request {
        Request::Info => ("GET", "/vm", None),
        Request::Pause => ("PUT", "/vm", Some(json!({ "state": "paused" }))),
        Request::Resume => ("PUT", "/vm", Some(json!({ "state": "running" }))),
        Request::Stop { force } => ("PUT", "/vm/stop", Some(json!({ "force": force }))),
        Request::Migrate(migrate) => ("PUT", "/migration", Some(json!(migrate))),
        Request::CancelMigration => ("DELETE", "/migration", None),
        Request::Resolve(decision) => {
            ("PUT", "/migration/resolution", Some(json!({ "decision": decision })))
        }
        Request::Snapshot(snapshot) => ("PUT", "/snapshot", Some(json!(snapshot))),
        Request::CancelSnapshot => ("DELETE", "/snapshot", None),
    }
}

/// The methods that a path takes, if there is such a path.
#[must_use]
pub fn methods(path: &str) -> Option<&'static str> {
    PATHS.iter().find(|(known, _)| *known == path).map(|(_, methods)| *methods)
}

fn unknown(method: &str, path: &str) -> ApiError {
    match methods(path) {
        Some(methods) => {
            let message = format!("{path} takes {methods}, not {}", method.escape_default());
            ApiError { status: 405, message }
        }
        None => {
            let known: Vec<_> = PATHS.iter().map(|(path, _)| *path).collect();
            let path: String = path.chars().take(80).flat_map(char::escape_default).collect();
            let message = format!("no such path: {path} (there are {})", known.join(" "));
            ApiError { status: 404, message }
        }
    }
}

fn no_body(http: &HttpRequest) -> Result<(), ApiError> {
    if http.body.is_empty() {
        return Ok(());
    }
    Err(ApiError::bad_request(format!("{} {} takes no body", http.method, http.path)))
}

fn body<T: DeserializeOwned>(http: &HttpRequest) -> Result<T, ApiError> {
    if http.body.is_empty() {
        let message = format!("{} {} needs a JSON body", http.method, http.path);
        return Err(ApiError::bad_request(message));
    }
    serde_json::from_slice(&http.body).map_err(|e| ApiError::bad_request(format!("body: {e}")))
}

#[cfg(test)]
#[path = "route_tests.rs"]
mod tests;
