//! Weak TLS, and none.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use adit_mediator::organisation::Organisation;

use super::alone;
use super::program::Program;

/// Row 19: nothing older than TLS 1.3, as a scanner sees it, and no HTTP without TLS.
#[test]
fn row_19_weak_tls() {
    let _alone = alone();
    // A scanner earns penalties within a second: then there would be nothing to see.
    let program = Program::start_with(None, "[limits]\nexempt = [\"127.0.0.1\"]\n");
    for (port, tls) in [(program.https, true), (program.relay, false)] {
        let scan = Command::new("sslscan").args(["--no-colour", &port.to_string()]).output();
        let scan = String::from_utf8(scan.expect("sslscan (Debian: sslscan) starts").stdout).unwrap();
        for old in ["SSLv2", "SSLv3", "TLSv1.0", "TLSv1.1", "TLSv1.2"] {
            assert!(scan.contains(&format!("{old:<10}disabled\n")), "{old}: {scan}");
        }
        // The relay's own port knows no TLS at all: it forwards what two devices have encrypted for each other.
        let spoken = scan.contains("TLSv1.3   enabled\n");
        assert_eq!(spoken, tls, "{scan}");
        let ciphers: Vec<&str> = scan.lines().filter(|line| line.contains(" bits  TLS_")).collect();
        let strong = |line: &&str| {
            ["AES_128_GCM", "AES_256_GCM", "CHACHA20_POLY1305"].iter().any(|s| line.contains(s))
        };
        assert!(ciphers.iter().all(|line| line.contains("TLSv1.3 ") && strong(line)), "{scan}");
        assert_eq!(ciphers.is_empty(), !tls, "{scan}");
        let weak = |line: &str| line.contains("vulnerable to") && !line.contains("not vulnerable to");
        assert!(!scan.lines().any(weak), "{scan}");
        println!("row 19: {port}: {} ciphers of TLS 1.3, nothing older", ciphers.len());

        let mut plain = TcpStream::connect(port).unwrap();
        plain.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        plain.write_all(b"GET / HTTP/1.1\r\nHost: adit.example.org\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        // A reset is an end, too.
        let _ = plain.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/"), "HTTP without TLS: {}", String::from_utf8_lossy(&answer));
    }

    // What names HTTP does not start.
    let dir = tempfile::tempdir().unwrap();
    Organisation::init(dir.path(), &["127.0.0.1".into()]).unwrap();
    std::fs::write(dir.path().join("config.toml"), "hosts = [\"http://127.0.0.1\"]\n").unwrap();
    let mut run = Command::new(env!("CARGO_BIN_EXE_adit-mediator"));
    let run = run.arg("run").arg("--data").arg(dir.path()).output().unwrap();
    let said = String::from_utf8(run.stderr).unwrap();
    println!("row 19: {}", said.trim());
    assert!(
        run.status.code() == Some(2) && said.contains("\"http://127.0.0.1\" is not a host name"),
        "{said}"
    );
}
