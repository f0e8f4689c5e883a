//! What runs through a tunnel while something happens to it.

mod echo;
mod greeter;
mod http;
mod noise;
mod ticks;
mod transfer;
mod web;

pub use echo::{echo, echoed};
pub use greeter::greeter;
pub use http::HttpServer;
pub use noise::{Noise, hex, sha256};
pub use ticks::{STALL, TickReport, TickServer, Ticking, tick};
pub use transfer::{TransferServer, download, stall, upload};
pub use web::WebServer;
