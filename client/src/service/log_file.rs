//! The log of a service that has no standard error: a file that never grows past a bound.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Then the file becomes the old one, in the place of the one before.
#[cfg(windows)]
const MOST_BYTES: u64 = 4 << 20;

/// Writes to `NAME`, and keeps what was there before in `NAME.old`.
#[derive(Debug)]
pub(crate) struct LogFile {
    path: PathBuf,
    file: File,
    bytes: u64,
    most: u64,
}

impl LogFile {
    /// Goes on with the file at `path`, or begins it.
    ///
    /// # Errors
    /// What the system said.
    #[cfg(windows)]
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Self::with_bound(path, MOST_BYTES)
    }

    fn with_bound(path: &Path, most: u64) -> io::Result<Self> {
        let file = File::options().append(true).create(true).open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, bytes, most })
    }

    /// Someone may have the file open: then it is begun anew, and what was there is gone.
    fn begin_anew(&mut self) -> io::Result<()> {
        let mut old = self.path.clone().into_os_string();
        old.push(".old");
        let renamed = fs::rename(&self.path, old);
        self.file = File::options().append(true).create(true).open(&self.path)?;
        if renamed.is_err() {
            self.file.set_len(0)?;
        }
        self.bytes = 0;
        Ok(())
    }
}

impl Write for LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.bytes + line.len() as u64 > self.most {
            self.begin_anew()?;
        }
        let written = self.file.write(line)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_keeps_two_files_and_goes_on_after_a_restart() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("service.log");
        let write = |line: &str| {
            LogFile::with_bound(&path, 10)
                .and_then(|mut log| log.write_all(line.as_bytes()))
                .expect("writes");
        };
        ["one\n", "two\n", "three\n", "four\n", "five\n"].into_iter().for_each(write);
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).expect("reads");
        assert_eq!((read("service.log.old"), read("service.log")), ("three\n".into(), "four\nfive\n".into()));
    }
}
