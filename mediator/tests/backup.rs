//! Backup while everything is in use, and restore: every device comes back; from a damaged file, nothing does.

use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::{PATIENCE, Server, dial, dial_with, live, open, recv};
use adit_client::control::{ControlChannel, hello};
use adit_client::identity::revocation::Revocations;
use adit_client::identity::{Identity, Live, Peer};
use adit_mediator::backup::{BackupError, Restored, Seal, Sealed, Unseal, restore, write};
use adit_mediator::error::Error;
use adit_mediator::organisation::Organisation;
use adit_mediator::store::{Reach, Store};
use adit_protocol::Role;
use adit_protocol::control::Down;
use age::x25519;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::timeout;

const PASSPHRASE: &str = "a passphrase for tests";

/// Runs `adit-mediator COMMAND FILE … --data DIR` with a passphrase: exit code, standard output, standard error.
fn run(command: &str, file: &Path, more: &[&str], dir: &Path, passphrase: &str) -> (i32, Vec<u8>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_adit-mediator"))
        .arg(command)
        .arg(file)
        .args(more)
        .arg("--data")
        .arg(dir)
        .env("ADIT_BACKUP_PASSPHRASE", passphrase)
        .env_remove("ADIT_LOG")
        .stdin(Stdio::null())
        .output()
        .expect("runs");
    let code = output.status.code().expect("an exit code");
    (code, output.stdout, String::from_utf8(output.stderr).expect("text"))
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> =
        fs::read_dir(dir).expect("reads").map(|entry| entry.expect("reads").path()).collect();
    all.sort();
    all
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("is there").permissions().mode() & 0o777
}

/// The next list of revoked certificates that this channel brings.
async fn next_list(channel: &mut ControlChannel) -> Vec<u8> {
    loop {
        if let Down::Revocations(new) = recv(channel).await {
            return new.list;
        }
    }
}

fn operator(server: &Server, arguments: &[&str]) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_adit-mediator"));
    command.args(arguments).arg("--data").arg(server.dir.path()).env_remove("ADIT_LOG");
    let output = command.output().expect("runs");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Enrols agents and changes grants as fast as it goes, until told to stop.
async fn hammer(
    server: &Server,
    technician: &Identity,
    stop: &AtomicBool,
    done: &watch::Sender<usize>,
) -> Vec<Identity> {
    let token = server.token(Role::Agent, &["customer=acme"], 10_000).await;
    let store = Store::open(&server.dir.path().join("state.db")).await.expect("opens");
    let mut enrolled = vec![];
    while !stop.load(Ordering::Relaxed) {
        let name = format!("agent-{}", enrolled.len());
        enrolled.push(server.enrol(&token, &name).await.expect("enrols"));
        for _ in 0..10 {
            let tags = ["customer=acme".to_owned()];
            store
                .allow(technician.device_id, &Reach { tags: &tags, all: false, redirector: false }, 1)
                .await
                .expect("allows");
        }
        done.send_replace(enrolled.len());
    }
    store.close().await;
    enrolled
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_backup_under_load_brings_every_device_back() {
    let mut server = Server::start().await;
    let desk = server.device(Role::Agent, "desk", &["customer=acme"]).await;
    let anna = server.device(Role::Technician, "anna", &["customer=acme"]).await;
    let unused = server.token(Role::Agent, &[], 1).await;
    server.device(Role::Technician, "before", &[]).await;
    operator(&server, &["revoke", "before"]);
    let (mut agent, mut technician) = (dial(&desk).await, dial(&anna).await);
    let first = next_list(&mut agent).await;
    next_list(&mut technician).await;
    let (grant, _) = open(&mut technician, &mut agent, "desk").await;
    let keep = tempfile::tempdir().expect("tempdir");
    let file = keep.path().join("adit.age");

    // While the mediator runs and others write.
    let (stop, (done, mut news)) = (AtomicBool::new(false), watch::channel(0));
    let take = async {
        let before = *news.wait_for(|done| *done >= 3).await.expect("its sender is ours");
        let (dir, to) = (server.dir.path().to_owned(), file.clone());
        let taken = tokio::task::spawn_blocking(move || run("backup", &to, &[], &dir, PASSPHRASE));
        let taken = taken.await.expect("no panic");
        // The writer was not held up, and goes on.
        let after = *news.borrow();
        news.wait_for(|done| *done > after).await.expect("its sender is ours");
        stop.store(true, Ordering::Relaxed);
        (taken, before, after)
    };
    let (enrolled, (taken, before, after)) =
        timeout(PATIENCE * 3, async { tokio::join!(hammer(&server, &anna, &stop, &done), take) })
            .await
            .expect("in time");
    let (code, _, stderr) = taken;
    assert_eq!(code, 0, "{stderr}");
    assert!(after > before, "nothing was written during the backup");
    let bytes = fs::metadata(&file).expect("is there").len();
    assert_eq!((mode(&file), stderr.contains(&format!("{} KiB", bytes / 1024))), (0o600, true), "{stderr}");
    assert!(!entries(server.dir.path()).iter().any(|path| path.to_string_lossy().contains(".backup-")));

    // The server goes on for a while: a revocation that the backup does not know.
    server.device(Role::Technician, "after", &[]).await;
    operator(&server, &["revoke", "after"]);
    let second = next_list(&mut agent).await;
    let kept = Live::load(&server.device_dir("desk")).expect("loads");
    assert!(kept.revoke(&first).expect("is ours") && kept.revoke(&second).expect("is ours"));
    server.stop().await;
    let old: Vec<serde_json::Value> = server.audit();

    // It is destroyed, and comes back elsewhere.
    server.dir = tempfile::tempdir().expect("tempdir");
    let (code, _, stderr) = run("restore", &file, &[], server.dir.path(), PASSPHRASE);
    assert_eq!(code, 0, "{stderr}");
    for said in ["restored to", "void", "next: adit-mediator run"] {
        assert!(stderr.contains(said), "{said}: {stderr}");
    }
    for secret in ["root-key.pem", "server-key.pem", "ticket-key.pem", "state.db", "audit.jsonl"] {
        assert_eq!(mode(&server.dir.path().join(secret)), 0o600, "{secret}");
    }
    server.run().await.expect("runs");

    // Every device in it comes back with the identity that it has, and each has its line in the audit log.
    let store = Store::open(&server.dir.path().join("state.db")).await.expect("opens");
    let known: HashSet<_> = store.devices().await.expect("reads").iter().map(|device| device.id).collect();
    let audit = server.audit();
    let lines: HashSet<_> = audit
        .iter()
        .filter(|line| line["event"] == "enrolled")
        .map(|line| line["device"]["id"].as_str().expect("an id").to_owned())
        .collect();
    assert!(known.iter().all(|id| lines.contains(&id.to_string())), "a device without its line");
    assert!(audit.len() < old.len() + 1 && audit[..audit.len() - 1] == old[..audit.len() - 1]);
    assert_eq!(audit.last().expect("lines")["event"], "restored backup");
    assert!(audit.iter().any(|line| line["event"] == "backed up"));
    let mut back = 0;
    for identity in &enrolled {
        let dialled =
            timeout(PATIENCE, ControlChannel::dial(identity, hello(vec![]))).await.expect("in time");
        assert_eq!(dialled.is_ok(), known.contains(&identity.device_id), "{}", identity.name);
        back += usize::from(dialled.is_ok());
    }
    assert!((before..enrolled.len()).contains(&back), "{before}, {back}, {}", enrolled.len());
    println!(
        "backup of {bytes} bytes: {before} agents before it, {after} when it was done, {back} of {} in it",
        enrolled.len()
    );

    // The session that ran is taken back, with tickets newer than all before.
    let named = |peer| vec![live(&grant.session, peer)];
    let mut agent = dial_with(&kept.get(), named(anna.device_id)).await;
    let mut technician = dial_with(&anna, named(desk.device_id)).await;
    for channel in [&mut agent, &mut technician] {
        let tickets = async {
            loop {
                match recv(channel).await {
                    Down::Tickets(tickets) => return tickets,
                    Down::Closed(closed) => panic!("{closed:?}"),
                    _ => {}
                }
            }
        };
        assert_eq!(timeout(PATIENCE, tickets).await.expect("in time").session, grant.session);
    }

    // What is revoked from now on counts at a device that has seen a newer list than the backup.
    server.device(Role::Technician, "later", &[]).await;
    operator(&server, &["revoke", "later"]);
    let third = next_list(&mut agent).await;
    assert!(kept.revoke(&third).expect("is ours"), "a device passed over the list made after the restore");
    let numbers =
        [&first, &second, &third].map(|list| Revocations::read(list, &desk.root).expect("is ours").number);
    assert!(numbers.is_sorted_by(|one, other| one < other), "{numbers:?}");

    // Nobody knows whether a token was used meanwhile.
    assert!(server.enrol(&unused, "newcomer").await.is_err());
    server.device(Role::Agent, "newcomer", &[]).await;
    server.stop().await;
}

/// An organisation with a few devices, and a backup of it to an age identity.
async fn sample() -> (TempDir, Vec<u8>, x25519::Identity) {
    let dir = tempfile::tempdir().expect("tempdir");
    Organisation::init(dir.path(), &["a.example.org".into()]).expect("init");
    let identity = x25519::Identity::generate();
    let (written, bytes) = write(dir.path(), seal(&identity), true, vec![]).await.expect("writes");
    assert_eq!((written.bytes, written.has_key), (bytes.len() as u64, true));
    (dir, bytes, identity)
}

fn seal(identity: &x25519::Identity) -> Seal {
    Seal::recipients(&[identity.to_public().to_string()]).expect("a recipient")
}

fn unseal(identity: &x25519::Identity) -> Unseal {
    use age::secrecy::ExposeSecret;
    let copy = x25519::Identity::from_str(identity.to_string().expose_secret()).expect("one");
    Unseal::Identities(vec![Box::new(copy)])
}

async fn restore_bytes(bytes: Vec<u8>, identity: &x25519::Identity, dir: &Path) -> Result<Restored, Error> {
    let sealed = Sealed::read(std::io::Cursor::new(bytes))?;
    restore(dir, sealed, unseal(identity), None).await
}

#[tokio::test]
async fn nothing_comes_of_a_file_that_is_cut_off_or_changed() {
    let (_dir, bytes, identity) = sample().await;
    let parent = tempfile::tempdir().expect("tempdir");
    let (absent, empty) = (parent.path().join("absent"), parent.path().join("empty"));
    fs::create_dir(&empty).expect("makes");
    let mut tried = 0;
    let cut = (0..50).map(|part| bytes[..bytes.len() * part / 50].to_vec());
    let last = bytes[..bytes.len() - 1].to_vec();
    let more = [bytes.clone(), vec![0]].concat();
    let flipped = (0..100).map(|part| {
        let mut bytes = bytes.clone();
        let at = bytes.len() * part / 100;
        bytes[at] ^= 1 << (part % 8);
        bytes
    });
    // Every byte of the head.
    let head = (0..300).map(|at| {
        let mut bytes = bytes.clone();
        bytes[at] ^= 4;
        bytes
    });
    for bad in cut.chain([last, more]).chain(flipped).chain(head) {
        let dir = if tried % 2 == 0 { &absent } else { &empty };
        let error = restore_bytes(bad, &identity, dir).await.expect_err("is refused");
        assert!(
            matches!(
                error,
                Error::Backup(BackupError::Damaged(_) | BackupError::Locked | BackupError::WantsIdentity)
            ),
            "{tried}: {error:?}"
        );
        assert!(!absent.exists() && entries(&empty).is_empty(), "{tried}");
        tried += 1;
    }
    let error =
        restore_bytes(bytes.clone(), &x25519::Identity::generate(), &empty).await.expect_err("is refused");
    assert!(matches!(error, Error::Backup(BackupError::Locked)), "{error:?}");
    assert!(entries(&empty).is_empty());
    println!("{tried} damaged copies of a backup of {} bytes", bytes.len());

    // A whole one is taken into either, and never into a directory that is in use.
    for dir in [&absent, &empty] {
        restore_bytes(bytes.clone(), &identity, dir).await.expect("restores");
        Organisation::load(dir).expect("loads");
        let before = entries(dir);
        let error = restore_bytes(bytes.clone(), &identity, dir).await.expect_err("is refused");
        assert!(matches!(error, Error::NotEmpty(_)), "{error:?}");
        assert_eq!(entries(dir), before);
    }
}

#[tokio::test]
async fn a_restore_that_was_cut_off_is_no_organisation_and_can_be_repeated() {
    let (_dir, bytes, identity) = sample().await;
    let dir = tempfile::tempdir().expect("tempdir");
    restore_bytes(bytes.clone(), &identity, dir.path()).await.expect("restores");
    fs::create_dir(dir.path().join(".restore")).expect("makes");
    fs::rename(dir.path().join("state.db"), dir.path().join(".restore/state.db")).expect("moves");
    assert!(matches!(Organisation::load(dir.path()), Err(Error::HalfRestored(_))));
    restore_bytes(bytes, &identity, dir.path()).await.expect("restores");
    Organisation::load(dir.path()).expect("loads");
    assert!(!dir.path().join(".restore").exists());
}

/// An archive with these entries: name, contents; of a link: what it leads to.
fn archive(identity: &x25519::Identity, files: &[(&str, &[u8], Option<&str>)]) -> Vec<u8> {
    let recipient = identity.to_public();
    let encryptor = age::Encryptor::with_recipients(std::iter::once(&recipient as &dyn age::Recipient));
    let mut archive = tar::Builder::new(encryptor.expect("one").wrap_output(vec![]).expect("writes"));
    for (name, contents, link) in files {
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(contents.len() as u64);
        header.set_mode(0o777);
        if let Some(link) = link {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_link_name_literal(link).expect("sets");
        }
        header.set_cksum();
        archive.append(&header, *contents).expect("appends");
    }
    archive.into_inner().expect("ends").finish().expect("ends")
}

#[tokio::test]
async fn an_archive_that_somebody_else_made_puts_nothing_anywhere() {
    // Whoever knows the recipient can encrypt to it.
    let (dir, _, identity) = sample().await;
    let manifest: (&str, &[u8], Option<&str>) =
        ("backup.json", br#"{"format":1,"made":1,"software":"x"}"#, None);
    let file = |name| (name, fs::read(dir.path().join(name)).expect("reads"));
    let whole: Vec<(&str, Vec<u8>)> =
        ["config.toml", "root.pem", "server.pem", "server-key.pem", "ticket-key.pem", "relay-id", "state.db"]
            .map(file)
            .into();
    let with = |extra: &[(&'static str, &'static [u8], Option<&'static str>)]| {
        let mut files = vec![manifest];
        files.extend(whole.iter().map(|(name, contents)| (*name, contents.as_slice(), None)));
        files.extend(extra);
        archive(&identity, &files)
    };
    let large = vec![b'#'; 70_000];
    let mut cases: Vec<(&str, Vec<u8>)> = vec![
        ("a path", with(&[("../evil", b"x", None)])),
        ("a path of a file we know", with(&[("../root-key.pem", b"x", None)])),
        ("an absolute path", with(&[("/tmp/evil", b"x", None)])),
        ("a directory before it", with(&[("./root-key.pem", b"x", None)])),
        ("another file", with(&[("authorized_keys", b"x", None)])),
        ("a link", with(&[("audit.jsonl", b"", Some("/etc/passwd"))])),
        ("a file twice", with(&[("relay-id", b"x", None)])),
        ("the manifest twice", with(&[manifest])),
        ("nothing", archive(&identity, &[])),
        ("only a manifest", archive(&identity, &[manifest])),
        ("no manifest", archive(&identity, &[("relay-id", b"x", None)])),
        ("a large small file", archive(&identity, &[manifest, ("relay-id", &large, None)])),
        ("a large manifest", archive(&identity, &[("backup.json", &large, None)])),
        (
            "a later form",
            archive(&identity, &[("backup.json", br#"{"format":2,"made":1,"software":"x"}"#, None)]),
        ),
        ("a key of somebody else", with(&[("root-key.pem", b"x", None)])),
    ];
    for (index, (name, _)) in whole.iter().enumerate() {
        let files = whole.iter().enumerate().filter(|(at, _)| *at != index);
        let files: Vec<_> = std::iter::once(manifest)
            .chain(files.map(|(_, (name, contents))| (*name, contents.as_slice(), None)))
            .collect();
        cases.push((name, archive(&identity, &files)));
        let files: Vec<_> = std::iter::once(manifest)
            .chain(whole.iter().enumerate().map(|(at, (name, contents))| {
                (*name, if at == index { b"nonsense".as_slice() } else { contents.as_slice() }, None)
            }))
            .collect();
        cases.push((name, archive(&identity, &files)));
    }
    let parent = tempfile::tempdir().expect("tempdir");
    let dir = parent.path().join("d");
    for (what, bytes) in &cases {
        let error = restore_bytes(bytes.clone(), &identity, &dir).await.expect_err(what);
        assert!(entries(parent.path()).is_empty(), "{what}: {error}");
    }
    println!("{} hostile archives", cases.len());
    restore_bytes(with(&[]), &identity, &dir).await.expect("without an audit log and the enrolment key");
}

#[test]
fn the_commands_say_what_is_wrong_and_change_nothing() {
    let parent = tempfile::tempdir().expect("tempdir");
    let (data, file) = (parent.path().join("d"), parent.path().join("b.age"));
    let (code, _, stderr) = run("backup", &file, &[], &data, PASSPHRASE);
    assert!(code == 2 && stderr.contains("adit-mediator init"), "{stderr}");
    Organisation::init(&data, &["a.example.org".into()]).expect("init");
    let commented = format!("# ours\n{}", fs::read_to_string(data.join("config.toml")).expect("reads"));
    fs::write(data.join("config.toml"), &commented).expect("writes");

    assert_eq!(run("backup", &file, &[], &data, "short").0, 2);
    assert_eq!(run("backup", &file, &["--recipient", "age1nonsense"], &data, "").0, 2);
    assert!(!file.exists());
    assert_eq!(run("backup", &file, &[], &data, PASSPHRASE).0, 0);
    let (code, _, stderr) = run("backup", &file, &[], &data, PASSPHRASE);
    assert!(code == 2 && stderr.contains("--force"), "{stderr}");
    assert_eq!(run("backup", &file, &["--force"], &data, PASSPHRASE).0, 0);
    assert_eq!(run("backup", &parent.path().join("no/where.age"), &[], &data, PASSPHRASE).0, 1);
    assert_eq!(entries(parent.path()), [file.clone(), data.clone()], "a temporary file is left");

    let new = parent.path().join("new");
    let (code, _, stderr) = run("restore", &file, &[], &new, "another passphrase");
    assert!(code == 3 && stderr.contains("does not open"), "{stderr}");
    let key = parent.path().join("identity");
    let identity = x25519::Identity::generate();
    {
        use age::secrecy::ExposeSecret;
        fs::write(&key, identity.to_string().expose_secret()).expect("writes");
    }
    let identity_file = key.to_str().expect("text");
    assert_eq!(run("restore", &file, &["--identity", identity_file], &new, "").0, 2);
    assert_eq!(run("restore", &file, &["--host", "a b"], &new, PASSPHRASE).0, 2);
    assert!(!new.exists());

    // To another address: the rest of the configuration stays, and the certificate names it.
    let (code, _, stderr) = run("restore", &file, &["--host", "b.example.org,192.0.2.7"], &new, PASSPHRASE);
    assert!(code == 0 && stderr.contains("know this server as a.example.org"), "{stderr}");
    let config = fs::read_to_string(new.join("config.toml")).expect("reads");
    assert_eq!(config, commented.replace(r#"["a.example.org"]"#, r#"["b.example.org", "192.0.2.7"]"#));
    let (old, moved) = (Organisation::load(&data).expect("loads"), Organisation::load(&new).expect("loads"));
    assert_eq!(moved.identity.servers, ["b.example.org:443", "192.0.2.7:443"]);
    assert_eq!(old.identity.root, moved.identity.root);
    assert_ne!(old.identity.certificate, moved.identity.certificate);
    let names = |der: &[u8]| der.windows(13).any(|window| window == b"b.example.org");
    assert!(names(&moved.identity.certificate) && !names(&old.identity.certificate));
    assert_eq!(
        Peer::from_certificate(&moved.identity.certificate).expect("one").device_id,
        old.identity.device_id
    );

    // Standard output, an age recipient, no enrolment key.
    let recipient = identity.to_public().to_string();
    let more = ["--recipient", &recipient, "--without-enrolment-key"];
    let (code, stdout, stderr) = run("backup", Path::new("-"), &more, &data, "");
    assert!(code == 0 && stderr.contains("is not in it"), "{stderr}");
    let third = parent.path().join("third");
    let mut child = Command::new(env!("CARGO_BIN_EXE_adit-mediator"))
        .args(["restore", "-", "--identity", identity_file, "--data"])
        .arg(&third)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    child.stdin.take().expect("piped").write_all(&stdout).expect("reads it");
    assert_eq!(child.wait().expect("ends").code(), Some(0));
    let mut stderr = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut stderr).expect("text");
    assert!(stderr.contains("put root-key.pem"), "{stderr}");
    assert!(!third.join("root-key.pem").exists() && third.join("ticket-key.pem").exists());
    assert!(Organisation::load(&third).expect("loads").authority().expect("reads").is_none());
    let (code, _, stderr) = run("restore", Path::new("/dev/null"), &[], &parent.path().join("x"), PASSPHRASE);
    assert!(code == 1 && stderr.contains("damaged"), "{stderr}");
    let (code, _, _) = run("restore", &file, &[], &data, PASSPHRASE);
    assert_eq!(code, 2, "the directory is in use");
}
