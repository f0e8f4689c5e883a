//! Exit codes of every adit program, and what an error tells the person in front of it.

use std::process::ExitCode;

/// Exit codes that scripts rely on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed for a reason that has no code of its own.
    Failed = 1,
    /// Bad usage or configuration.
    Usage = 2,
    /// Refused: identity, policy or ticket.
    Refused = 3,
    /// Server, agent or target cannot be reached.
    Unreachable = 4,
    /// Timed out.
    TimedOut = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// An error that can end a program: `Display` says what failed and why.
pub trait Failure: std::error::Error {
    /// The code to end with.
    fn exit(&self) -> Exit;

    /// What to do next, one line; `None` when there is nothing that would help.
    fn remedy(&self) -> Option<String>;
}

/// One or two lines for people: what failed, why, and what to do next.
pub fn report(failure: &dyn Failure) -> String {
    match failure.remedy() {
        Some(remedy) => format!("error: {failure}\n  {remedy}"),
        None => format!("error: {failure}"),
    }
}
