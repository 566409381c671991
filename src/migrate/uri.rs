//! Where a migration's stream comes from or goes to, as text: `tcp:HOST:PORT`, `unix:PATH`, `stdio`
//! or `exec:CMD`. Parsing resolves no names and opens nothing.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The longest path of a UNIX socket in bytes: `sockaddr_un.sun_path` less its NUL.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// One end of a migration's stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Uri {
    /// A TCP address. `host` is a name, an IPv4 address or an IPv6 address without brackets
    /// (with `%ZONE` if it has one).
    Tcp {
        /// Name or address.
        host: String,
        /// The port, never 0.
        port: u16,
    },
    /// A UNIX socket.
    Unix(PathBuf),
    /// Standard input and output.
    Stdio,
    /// A shell command whose standard input and output carry the stream.
    Exec(String),
}

/// Why a text is no [`Uri`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// None of the schemes.
    #[error("unknown kind of address: it takes tcp:HOST:PORT, unix:PATH, stdio or exec:CMD")]
    Scheme,
    /// `tcp:` without `HOST:PORT`.
    #[error("it takes tcp:HOST:PORT")]
    Tcp,
    /// A host that no name or address has.
    #[error("the host is neither a name nor an address")]
    Host,
    /// A bare IPv6 address, or a bad one in brackets.
    #[error("an IPv6 address stands in brackets, like tcp:[::1]:4444")]
    Brackets,
    /// A port out of range.
    #[error("the port must be 1 to 65535")]
    Port,
    /// A path that no socket can have.
    #[error("the path of a UNIX socket has 1 to {SOCKET_PATH_BYTES_MAX} bytes")]
    Path,
    /// `exec:` without a command.
    #[error("exec: needs a command")]
    Command,
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Uri, UriError> {
        if text == "stdio" {
            return Ok(Uri::Stdio);
        }
        let (scheme, rest) = text.split_once(':').ok_or(UriError::Scheme)?;
        match scheme {
            "tcp" => parse_tcp(rest),
            "unix" if rest.is_empty() || rest.len() > SOCKET_PATH_BYTES_MAX => Err(UriError::Path),
            "unix" if rest.contains('\0') => Err(UriError::Path),
            "unix" => Ok(Uri::Unix(rest.into())),
            "exec" if rest.trim().is_empty() || rest.contains('\0') => Err(UriError::Command),
            "exec" => Ok(Uri::Exec(rest.into())),
            _ => Err(UriError::Scheme),
        }
    }
}

fn parse_tcp(rest: &str) -> Result<Uri, UriError> {
    let (host, port) = match rest.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once("]:").ok_or(UriError::Brackets)?;
            let (address, zone) = host.split_once('%').map_or((host, None), |(a, z)| (a, Some(z)));
            if address.parse::<Ipv6Addr>().is_err() || zone.is_some_and(|z| !is_host(z)) {
                return Err(UriError::Brackets);
            }
            (host, port)
        }
        None => {
            let (host, port) = rest.rsplit_once(':').ok_or(UriError::Tcp)?;
            if host.contains(':') {
                return Err(UriError::Brackets);
            }
            if !is_host(host) {
                return Err(UriError::Host);
            }
            (host, port)
        }
    };
    let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    let port = port.parse().ok().filter(|&port: &u16| digits && port != 0).ok_or(UriError::Port)?;
    Ok(Uri::Tcp { host: host.into(), port })
}

/// Whether a text can be a host's name (RFC 1123, with the underscore that real names have).
fn is_host(text: &str) -> bool {
    (1..=253).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Uri::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Uri::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Uri::Unix(path) => write!(f, "unix:{}", path.display()),
            Uri::Stdio => f.write_str("stdio"),
            Uri::Exec(command) => write!(f, "exec:{command}"),
        }
    }
}

impl Serialize for Uri {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Uri {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Uri, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
#[path = "uri_tests.rs"]
mod tests;
