//! The certificates of web servers beside agents, as this technician has seen them, like `known_hosts` of OpenSSH: one
//! line for each, `AGENT HOST:PORT SHA-256` with the agent's device id, and the last line for an agent's target counts.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Name of the file in the state directory.
const FILE: &str = "known_certificates";

/// The file.
#[derive(Debug)]
pub struct Known {
    path: PathBuf,
}

impl Known {
    /// The one in `dir`. It need not be there.
    pub fn open(dir: &Path) -> Self {
        Self { path: dir.join(FILE) }
    }

    /// The SHA-256 that was noted last.
    ///
    /// # Errors
    /// The system's; `InvalidData` for a line that is none: to take no notice of it would be to trust anybody.
    pub fn of(&self, agent: &str, target: &str) -> io::Result<Option<[u8; 32]>> {
        let text = match fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut found = None;
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.is_empty()) {
            let wrong =
                || io::Error::new(ErrorKind::InvalidData, format!("line {} makes no sense", number + 1));
            let [of, to, shown] =
                <[&str; 3]>::try_from(line.split(' ').collect::<Vec<_>>()).map_err(|_| wrong())?;
            let shown = parse(shown).ok_or_else(wrong)?;
            if (of, to) == (quoted(agent).as_str(), target) {
                found = Some(shown);
            }
        }
        Ok(found)
    }

    /// Notes one. Several programs may do so at the same time.
    ///
    /// # Errors
    /// The system's.
    pub fn note(&self, agent: &str, target: &str, certificate: &[u8; 32]) -> io::Result<()> {
        let line = format!("{} {target} {}\n", quoted(agent), fingerprint(certificate));
        OpenOptions::new().create(true).append(true).open(&self.path)?.write_all(line.as_bytes())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A SHA-256 as other programs show it: `AB:CD:…`.
pub fn fingerprint(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":")
}

/// Reads what [`fingerprint`] writes, whatever its case, with colons or without.
pub fn parse(text: &str) -> Option<[u8; 32]> {
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b':').collect();
    let (pairs, []) = digits.as_chunks::<2>() else { return None };
    let value = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
    let bytes: Option<Vec<u8>> =
        pairs.iter().map(|[high, low]| Some(value(*high)? << 4 | value(*low)?)).collect();
    bytes?.try_into().ok()
}

/// An agent's name may have spaces.
fn quoted(agent: &str) -> String {
    agent.replace('%', "%25").replace(char::is_whitespace, "%20")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_one_counts_and_nonsense_is_no_trust() {
        let dir = tempfile::tempdir().expect("tempdir");
        let known = Known::open(dir.path());
        assert_eq!(known.of("pc", "nas:443").expect("reads"), None);
        known.note("my pc", "nas:443", &[1; 32]).expect("writes");
        known.note("pc", "nas:443", &[2; 32]).expect("writes");
        known.note("pc", "nas:443", &[0xab; 32]).expect("writes");
        assert_eq!(known.of("pc", "nas:443").expect("reads"), Some([0xab; 32]));
        assert_eq!(known.of("my pc", "nas:443").expect("reads"), Some([1; 32]));
        assert_eq!(known.of("pc", "nas:444").expect("reads"), None);
        fs::write(known.path(), "pc nas:443 AB\n").expect("writes");
        assert_eq!(known.of("other", "x:1").expect_err("nonsense").kind(), ErrorKind::InvalidData);
    }

    #[test]
    fn fingerprints_are_read_as_they_are_written() {
        let bytes = std::array::from_fn(|at| at as u8 * 7);
        let text = fingerprint(&bytes);
        assert!(text.starts_with("00:07:0E:"));
        assert_eq!(parse(&text), Some(bytes));
        assert_eq!(parse(&text.replace(':', "").to_lowercase()), Some(bytes));
        assert!(["", "AB", &text[1..], &format!("{text}:00"), "zz"].iter().all(|text| parse(text).is_none()));
    }
}
