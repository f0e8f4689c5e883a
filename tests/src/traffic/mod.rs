//! What runs through a tunnel while something happens to it.

mod http;
mod noise;
mod ticks;
mod transfer;

pub use http::HttpServer;
pub use noise::{Noise, hex, sha256};
pub use ticks::{TickReport, TickServer, Ticking, tick};
pub use transfer::{TransferServer, download, stall, upload};
