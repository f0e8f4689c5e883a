//! Stands in for [`crate::pipe`] where the system has no splice: there is no such pipe.

use std::io;

use tokio::net::TcpStream;

pub(crate) enum Pipe {}

impl Pipe {
    pub(crate) fn new() -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn grow(&mut self, _bytes: usize) -> io::Result<()> {
        match *self {}
    }

    pub(crate) fn capacity(&self) -> usize {
        match *self {}
    }

    pub(crate) fn filled(&self) -> usize {
        match *self {}
    }

    pub(crate) fn fill(&mut self, _from: &TcpStream, _limit: usize) -> io::Result<usize> {
        match *self {}
    }

    pub(crate) fn drain(&mut self, _to: &TcpStream) -> io::Result<usize> {
        match *self {}
    }
}
