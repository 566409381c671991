//! The options that say how long a guest may stand, and what is done to reach that.

use super::args::{Args, Stop, usage};
use super::units::parse_duration_ms;
use crate::event::{OnTimeout, TIMEOUT_MS_DEFAULT};

/// The options as given.
#[derive(Default)]
pub struct LimitOptions {
    downtime_limit: Option<String>,
    timeout: Option<String>,
    on_timeout: Option<String>,
}

/// What they say.
pub struct Limits {
    /// The downtime that may be predicted, in milliseconds.
    pub downtime_limit_ms: u64,
    /// The time to get there, in milliseconds.
    pub timeout_ms: u64,
    /// And then.
    pub on_timeout: OnTimeout,
}

impl LimitOptions {
    /// Takes an option if it is one of these; false if it isn't.
    ///
    /// # Errors
    /// Wrong usage.
    pub fn option(&mut self, args: &mut Args, name: &str) -> Result<bool, Stop> {
        let value = match name {
            "downtime-limit" => &mut self.downtime_limit,
            "timeout" => &mut self.timeout,
            "on-timeout" => &mut self.on_timeout,
            _ => return Ok(false),
        };
        args.text_once(name, value)?;
        Ok(true)
    }

    /// Reads them.
    ///
    /// # Errors
    /// Wrong usage.
    pub fn read(&self, downtime_limit_ms_default: u64) -> Result<Limits, Stop> {
        let time = |option: &str, text: &Option<String>, default| match text {
            None => Ok(default),
            Some(text) => {
                parse_duration_ms(text).map_err(|e| usage(format!("--{option} '{text}': {e}")))
            }
        };
        let on_timeout = match self.on_timeout.as_deref() {
            None | Some("abort") => OnTimeout::Abort,
            Some("stop-and-copy") => OnTimeout::StopAndCopy,
            Some("throttle") => OnTimeout::Throttle,
            Some(other) => {
                return Err(usage(format!(
                    "--on-timeout '{other}': it takes abort, stop-and-copy or throttle"
                )));
            }
        };
        Ok(Limits {
            downtime_limit_ms: time(
                "downtime-limit",
                &self.downtime_limit,
                downtime_limit_ms_default,
            )?,
            timeout_ms: time("timeout", &self.timeout, TIMEOUT_MS_DEFAULT)?,
            on_timeout,
        })
    }
}

/// What is wrong with a field of a request, as these options have it.
#[must_use]
pub fn in_options(message: &str) -> Option<&'static str> {
    match message.split_once(": ") {
        Some(("downtime_limit_ms", _)) => Some("--downtime-limit: it takes 1ms to 1h"),
        Some(("timeout_ms", _)) => Some("--timeout: it takes 1ms to 168h"),
        _ => None,
    }
}
