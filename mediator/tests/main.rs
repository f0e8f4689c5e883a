//! The mediator, on loopback. One program for all files: each one more would be linked with everything once more.

#[cfg(unix)]
mod audit;
#[cfg(unix)]
mod backup;
#[cfg(unix)]
mod cli;
mod common;
#[cfg(target_os = "linux")]
mod disk;
mod enrolment;
#[cfg(unix)]
mod policy;
mod sessions;
