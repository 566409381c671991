#![doc = include_str!("API.md")]

pub mod client;
pub mod http;
pub mod route;
pub mod server;
pub mod socket;
