//! The client without a network. One program for all files: each one more would be linked with everything once more.

mod forwarding;
mod intercepted;
mod switching;
mod threats;
