//! What differs from system to system and is small. Larger things have a module for each system beside
//! their users: `status`, `stdio`, `service`.

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
use unix as system;
#[cfg(windows)]
use windows as system;
#[cfg(windows)]
pub(crate) use windows::{in_profile, take_over};

pub use system::raise_descriptor_limit;
pub(crate) use system::{
    COLOURS, Signals, asked_to_retire, create_private_dir, hand_over, limit_memory, limit_unsent,
    machine_name, out_of_descriptors, set_access, sync_dir, without_terminal,
};
