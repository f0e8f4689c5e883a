//! Every parser that sees hostile bytes, with the corpora of the fuzzer (`tests/fuzz`).

#[path = "../fuzz/src/lib.rs"]
#[allow(dead_code, unreachable_pub, reason = "the fuzzer's crate as it stands")]
mod fuzz;

use std::path::PathBuf;
use std::time::Instant;

use fuzz::PARSERS;

fn corpus(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name)
}

/// THREATS.md row 11: every prefix of every valid message, and everything that a fuzzer ever found worth keeping.
#[test]
fn row_11_malformed_frames() {
    for parser in &PARSERS {
        let start = Instant::now();
        let (mut prefixes, mut flipped) = (0, 0);
        let seeds = (parser.seeds)();
        for seed in &seeds {
            assert!((parser.run)(seed), "{}: a valid message is refused: {seed:02x?}", parser.name);
            for length in 0..seed.len() {
                let taken = (parser.run)(&seed[..length]);
                assert!(!(taken && parser.whole), "{}: {length} bytes of {seed:02x?}", parser.name);
                prefixes += 1;
            }
            for at in 0..seed.len() * 8 {
                let mut bad = seed.clone();
                bad[at / 8] ^= 1 << (at % 8);
                (parser.run)(&bad);
                flipped += 1;
            }
        }
        let mut replayed = 0;
        for entry in std::fs::read_dir(corpus(parser.name)).expect("there is a corpus") {
            (parser.run)(&std::fs::read(entry.expect("reads").path()).expect("reads"));
            replayed += 1;
        }
        assert!(replayed >= seeds.len(), "{}: {replayed} files in the corpus", parser.name);
        println!(
            "{}: {} messages, {prefixes} prefixes, {flipped} flipped bits, {replayed} files, {:?}",
            parser.name,
            seeds.len(),
            start.elapsed()
        );
    }
}

/// Writes the valid messages into the corpora: after a change of the wire format.
#[test]
#[ignore = "changes files"]
fn write_corpus() {
    for parser in &PARSERS {
        let dir = corpus(parser.name);
        std::fs::create_dir_all(&dir).expect("makes it");
        for (number, seed) in (parser.seeds)().iter().enumerate() {
            std::fs::write(dir.join(format!("valid-{number:02}")), seed).expect("writes");
        }
    }
}
