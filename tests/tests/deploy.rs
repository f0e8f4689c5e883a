//! What `deploy/` names exists: command lines are parsed by the real parsers, sample configurations are read by
//! the real readers, and the files that others point to are there.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::PathBuf;

use adit_mediator::config::Config;
use adit_relay::config::ConfigFile;
use clap::Parser;
use yaml_rust2::{Yaml, YamlLoader};

fn deploy(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file)
}

fn read(file: &str) -> String {
    fs::read_to_string(deploy(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// Fails unless the program of this command line understands it.
fn understands(words: &[&str]) {
    let refused = match words[0].rsplit('/').next() {
        Some("adit-mediator") => adit_mediator::cli::Cli::try_parse_from(words).err(),
        Some("adit-relay") => adit_relay::cli::Cli::try_parse_from(words).err(),
        _ => panic!("no program of ours: {words:?}"),
    };
    assert!(refused.is_none(), "{words:?}: {}", refused.expect("an error"));
}

#[test]
fn the_units_start_what_the_programs_understand() {
    for name in ["adit-mediator", "adit-relay"] {
        let unit = read(&format!("systemd/{name}.service"));
        let line = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).expect("a command");
        assert_eq!(line, format!("/usr/bin/{name} run --data /var/lib/{name}"));
        understands(&line.split(' ').collect::<Vec<_>>());
        assert!(unit.contains(&format!("\nUser={name}\nStateDirectory={name}\n")), "{unit}");
        let users = read(&format!("sysusers/{name}.conf"));
        assert!(users.starts_with(&format!("u {name} - ")), "{users}");
    }
}

#[test]
fn the_sample_configurations_are_read() {
    let dir = tempfile::tempdir().expect("tempdir");
    let take = |file: &str| {
        fs::copy(deploy(file), dir.path().join("config.toml"))
            .unwrap_or_else(|error| panic!("{file}: {error}"));
    };
    take("examples/mediator.toml");
    let mediator = Config::load(dir.path()).expect("reads");
    assert!(mediator.p2p.ports == "40000-40100" && mediator.hosts.len() == 3, "{mediator:?}");
    take("examples/relay.toml");
    let relay = ConfigFile::load(dir.path()).expect("reads");
    assert_eq!((relay.limits.pairs, relay.hosts.as_slice()), (500, &["relay2.example.org".to_owned()][..]));
    take("examples/agent.toml");
    let agent = adit_client::config::Config::load(dir.path()).expect("reads").agent;
    assert_eq!(agent.allow.map(|allow| allow.len()), Some(3));
    let samples = fs::read_dir(deploy("examples")).expect("is there").count();
    assert_eq!(samples, 3, "a sample that this test does not read");
}

#[test]
fn the_compose_file_starts_what_the_programs_understand() {
    let text = read("compose.yaml");
    let parsed = YamlLoader::load_from_str(&text).expect("YAML");
    let services = parsed[0]["services"].as_hash().expect("services");
    assert_eq!(services.len(), 2);
    let volumes = parsed[0]["volumes"].as_hash().expect("volumes");
    for (name, service) in services {
        let hardened = &service["<<"];
        let of = |key: &str| if service[key].is_badvalue() { &hardened[key] } else { &service[key] };
        let command: Vec<&str> =
            of("command").as_vec().expect("a list").iter().filter_map(Yaml::as_str).collect();
        understands(&command);
        assert_eq!(of("network_mode").as_str(), Some("host"), "{name:?}");
        assert_eq!(of("cap_drop")[0].as_str(), Some("ALL"), "{name:?}");
        assert_eq!(of("cap_add").as_vec().map(Vec::len), Some(1), "{name:?}");
        let context = deploy(of("build")["context"].as_str().expect("a folder"));
        let file = context.join(of("build")["dockerfile"].as_str().expect("a file"));
        assert!(file.is_file(), "{}", file.display());
        // State outlives the container: the directory of the command is a volume, and that volume is declared.
        let volume = of("volumes")[0].as_str().expect("a volume");
        let (volume, dir) = volume.split_once(':').expect("VOLUME:DIR");
        assert!(volumes.contains_key(&Yaml::String(volume.to_owned())), "{volume}");
        assert!(command.ends_with(&["--data", dir]), "{command:?}");
        assert!(read("Containerfile").contains(dir), "the image does not have {dir}");
    }
    // The command lines in its comments, too.
    let commented = text.lines().filter_map(|line| line.split_once(" mediator adit-mediator "));
    let mut count = 0;
    for (_, arguments) in commented {
        understands(&["adit-mediator"].into_iter().chain(arguments.split(' ')).collect::<Vec<_>>());
        count += 1;
    }
    assert_eq!(count, 2);
}

/// Of the README, the lines of code that start one of the servers' programs.
#[test]
fn the_readme_says_what_the_programs_understand() {
    let text = read("../README.md");
    let mut count = 0;
    for line in text.lines() {
        let line = line.strip_prefix("sudo ").unwrap_or(line);
        if line.starts_with("adit-mediator ") || line.starts_with("adit-relay ") {
            let typed = line.split(['#', '<']).next().unwrap_or_default();
            understands(&typed.split_whitespace().collect::<Vec<_>>());
            count += 1;
        }
    }
    assert!(count > 5, "{count} command lines");
}

#[test]
fn the_image_has_the_programs_that_this_workspace_makes() {
    let text = read("Containerfile");
    let command = text.lines().find_map(|line| line.strip_prefix("CMD ")).expect("a command");
    let command: Vec<String> = serde_json::from_str(command).expect("a list");
    understands(&command.iter().map(String::as_str).collect::<Vec<_>>());
    let copied = text.lines().find(|line| line.contains("install --strip")).expect("programs");
    let programs: Vec<&str> =
        copied.split(' ').filter_map(|word| word.strip_prefix("target/release/")).collect();
    assert_eq!(programs, ["adit", "adit-relay", "adit-mediator"]);
    for crate_ in ["client", "relay", "mediator"] {
        let manifest = fs::read_to_string(deploy("..").join(crate_).join("Cargo.toml")).expect("reads");
        assert!(programs.iter().any(|program| manifest.contains(&format!("name = \"{program}\"\npath"))));
        // The packages have the same program, unit and user.
        let unit = if crate_ == "client" { "adit-agent".to_owned() } else { format!("adit-{crate_}") };
        for needed in [format!("../deploy/systemd/{unit}.service"), format!("../deploy/sysusers/{unit}.conf")]
        {
            assert!(
                manifest.contains(&needed) && deploy("..").join(crate_).join(&needed).is_file(),
                "{needed}"
            );
        }
    }
}
