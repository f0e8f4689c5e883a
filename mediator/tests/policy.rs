//! Who may reach whom, changed by the operator's commands while the mediator runs.

use std::fs;
use std::process::{Command, Output};

use crate::common::{PATIENCE, Server, dial, open, recv, wanted};
use adit_client::control::{ControlChannel, Ended, State, hello};
use adit_client::exit::{Exit, Failure};
use adit_client::hub::{Hub, NotOpened};
use adit_client::identity::revocation::Revocations;
use adit_client::identity::{Identity, Live};
use adit_client::session::SessionEvent;
use adit_client::via::Via;
use adit_protocol::Role;
use adit_protocol::control::{Closed, Down, Grant, List, Open, Up};
use adit_tunnel::session::End;
use serde_json::Value;
use tokio::time::timeout;

/// Runs a command of the operator on the server's directory: exit code, standard output, standard error.
fn operator(server: &Server, arguments: &str) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_adit-mediator"));
    command.args(arguments.split(' ')).arg("--data").arg(server.dir.path()).env_remove("ADIT_LOG");
    let Output { status, stdout, stderr } = command.output().expect("runs");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (status.code().expect("an exit code"), text(stdout), text(stderr))
}

fn done(server: &Server, arguments: &str) -> String {
    let (code, stdout, stderr) = operator(server, arguments);
    assert_eq!(code, 0, "{arguments}: {stdout}{stderr}");
    stdout + &stderr
}

fn devices(server: &Server) -> Vec<Value> {
    let (code, stdout, _) = operator(server, "devices --json --all");
    assert_eq!(code, 0);
    stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

async fn reachable(channel: &mut ControlChannel) -> Vec<String> {
    channel.send(Up::List(List { request: 1 })).await.expect("sends");
    match recv(channel).await {
        Down::Agents(agents) => agents.agents.into_iter().map(|agent| agent.name).collect(),
        other => panic!("{other:?}"),
    }
}

async fn ends(channel: &mut ControlChannel) {
    loop {
        match timeout(PATIENCE, channel.recv()).await.expect("in time") {
            Ok(_) => {}
            Err(Ended::ByPeer | Ended::Broken(_)) => return,
            Err(other) => panic!("{other:?}"),
        }
    }
}

async fn refused(identity: &Identity) -> String {
    let dialled = timeout(PATIENCE, ControlChannel::dial(identity, hello(vec![]))).await.expect("in time");
    let error = dialled.expect_err("refused");
    assert_eq!(error.exit(), Exit::Refused, "{error}");
    error.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn grants_decide_and_count_at_once() {
    let server = Server::start().await;
    let desk = server.device(Role::Agent, "desk", &["customer=acme", "site=a"]).await;
    server.device(Role::Agent, "till", &["customer=globex"]).await;
    let technician = server.device(Role::Technician, "anna", &[]).await;
    let (mut anna, mut agent) = (dial(&technician).await, dial(&desk).await);
    assert_eq!(reachable(&mut anna).await, [""; 0]);

    assert!(done(&server, "allow anna --tag customer=acme --tag site=a").contains("1 of the agents"));
    assert_eq!(reachable(&mut anna).await, ["desk"]);
    done(&server, "allow anna --tag customer=globex");
    assert_eq!(reachable(&mut anna).await, ["desk", "till"]);
    let (code, stdout, _) = operator(&server, "grants anna --json");
    let grants: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!((code, grants.len(), &grants[0]["agents"]), (0, 2, &1.into()));

    // A session that a grant alone permitted ends with it, at both ends.
    let (grant, _) = open(&mut anna, &mut agent, "desk").await;
    let (code, _, stderr) = operator(&server, "deny anna 99");
    assert_eq!(code, 2);
    assert!(stderr.contains("grant 1: customer=acme site=a"), "{stderr}");
    assert!(done(&server, "deny anna 1").contains("1 session ended"));
    for channel in [&mut anna, &mut agent] {
        let Down::Closed(closed) = recv(channel).await else { panic!("not closed") };
        assert_eq!(closed.session, grant.session);
    }
    assert_eq!(reachable(&mut anna).await, ["till"]);
    done(&server, "deny anna --all");
    assert_eq!(reachable(&mut anna).await, [""; 0]);
    done(&server, "allow anna --all-agents");
    assert_eq!(reachable(&mut anna).await, ["desk", "till"]);

    // The agent's tags count as they are now.
    done(&server, "deny anna --all");
    done(&server, "allow anna --tag site=b");
    done(&server, "tag desk site=b");
    assert_eq!(reachable(&mut anna).await, ["desk"]);
    done(&server, "tag desk --remove site");
    assert_eq!(reachable(&mut anna).await, [""; 0]);
    let events: Vec<String> =
        server.audit().iter().map(|line| line["event"].as_str().unwrap_or_default().to_owned()).collect();
    for event in ["enrolled", "allowed", "grant", "denied", "closed", "tagged"] {
        assert!(events.iter().any(|known| known == event), "{event}: {events:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_device_gets_a_certificate_with_its_name_before_the_next_session() {
    let server = Server::start().await;
    server.device(Role::Agent, "desk", &["site=a"]).await;
    let technician = server.device(Role::Technician, "anna", &["site=a"]).await;
    let live = Live::load(&server.device_dir("desk")).expect("loads");
    let (mut anna, mut agent) = (dial(&technician).await, dial(&live.get()).await);
    assert!(done(&server, "rename desk front-desk").contains("1 certificate renewed"));
    let Down::Update(update) = recv(&mut agent).await else { panic!("no certificate") };
    live.update(update).expect("is ours");
    assert_eq!(Live::load(&server.device_dir("desk")).expect("loads").get().name, "front-desk");
    open(&mut anna, &mut agent, "front-desk").await;

    let (code, _, stderr) = operator(&server, "rename front-desk anna");
    assert_eq!(code, 0, "names are unique in a role only: {stderr}");
    server.device(Role::Agent, "till", &[]).await;
    let (code, _, stderr) = operator(&server, "rename till anna --role agent");
    assert_eq!(code, 2);
    assert!(stderr.contains("taken"), "{stderr}");
    let (code, _, stderr) = operator(&server, "tag anna a=b");
    assert_eq!(code, 2);
    assert!(stderr.contains("several roles") && stderr.contains("--role"), "{stderr}");
    let (code, _, stderr) = operator(&server, "revoke nobody");
    assert_eq!(code, 2);
    assert!(stderr.contains("anna, till"), "{stderr}");

    // While the key is away there is no certificate, and so no new name.
    let key = server.dir.path().join("root-key.pem");
    std::fs::rename(&key, server.dir.path().join("elsewhere")).expect("takes it offline");
    let (code, _, stderr) = operator(&server, "rename till counter");
    assert_eq!(code, 2);
    assert!(stderr.contains("offline"), "{stderr}");
}

/// THREATS row 22.
#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_device_is_out_at_once_and_everybody_knows() {
    let server = Server::start().await;
    server.device(Role::Agent, "desk", &["site=a"]).await;
    let technician = server.device(Role::Technician, "anna", &["site=a"]).await;
    let live = Live::load(&server.device_dir("desk")).expect("loads");
    let (mut anna, mut agent) = (dial(&technician).await, dial(&live.get()).await);
    let (grant, _) = open(&mut anna, &mut agent, "desk").await;

    let start = std::time::Instant::now();
    let said = done(&server, "revoke anna");
    assert!(said.contains("1 session ended") && said.contains("1 control channel closed"), "{said}");
    // The stolen device hears that its session is over before its channel ends.
    let over = loop {
        match recv(&mut anna).await {
            Down::Closed(over) => break over,
            Down::Revocations(_) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(over.session, grant.session);
    ends(&mut anna).await;
    let mut list = None;
    let mut closed = None;
    while list.is_none() || closed.is_none() {
        match recv(&mut agent).await {
            Down::Revocations(new) => list = Some(new.list),
            Down::Closed(said) => closed = Some(said),
            other => panic!("{other:?}"),
        }
    }
    println!("cut after {:?}", start.elapsed());
    assert!(start.elapsed().as_secs() < 5);
    assert_eq!(closed.expect("there").session, grant.session);
    assert!(live.revoke(&list.expect("there")).expect("is ours"));
    assert!(live.get().revoked.newest().has(&technician.public_key()));

    // It cannot come back: not with its key, not with its token, not by a name of its own.
    assert!(refused(&technician).await.contains("revoked"));
    // Who was away hears of it when it comes.
    let till = server.device(Role::Agent, "till", &[]).await;
    let mut till_channel = dial(&till).await;
    let Down::Revocations(new) = recv(&mut till_channel).await else { panic!("no list") };
    let (known, told) = (live.get().revoked.newest(), Revocations::read(&new.list, &till.root));
    assert_eq!(told.expect("is ours").number, known.number);
    // Who knows it is not told again.
    let mut agent = dial(&live.get()).await;
    assert!(matches!(reachable_refused(&mut agent).await, Down::Refused(_)));
    let listed = devices(&server);
    let anna = listed.iter().find(|device| device["name"] == "anna").expect("is listed");
    assert!(anna["revoked"].is_u64() && anna["online"] == false);
    // Its name is free.
    server.device(Role::Technician, "anna2", &[]).await;
    done(&server, "rename anna2 anna");
}

async fn reachable_refused(channel: &mut ControlChannel) -> Down {
    channel.send(Up::List(List { request: 1 })).await.expect("sends");
    recv(channel).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_while_the_key_is_away_reaches_the_others_when_it_is_back() {
    let server = Server::start().await;
    let desk = server.device(Role::Agent, "desk", &[]).await;
    let thief = server.device(Role::Technician, "thief", &["a=b"]).await;
    let mut agent = dial(&desk).await;
    let (key, away) = (server.dir.path().join("root-key.pem"), server.dir.path().join("elsewhere"));
    std::fs::rename(&key, &away).expect("takes it offline");
    assert!(done(&server, "revoke thief").contains("offline"));
    assert!(refused(&thief).await.contains("revoked"));
    std::fs::rename(&away, &key).expect("puts it back");
    done(&server, "tag desk a=b");
    let mut list = None;
    while list.is_none() {
        if let Down::Revocations(new) = recv(&mut agent).await {
            list = Some(Revocations::read(&new.list, &desk.root).expect("is ours"));
        }
    }
    assert!(list.expect("there").has(&thief.public_key()));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_machines_with_one_identity_are_noticed() {
    let server = Server::start().await;
    let desk = server.device(Role::Agent, "desk", &[]).await;
    let come = async |instance| {
        let hello = adit_protocol::control::Hello { instance, ..hello(vec![]) };
        timeout(PATIENCE, ControlChannel::dial(&desk, hello)).await.expect("in time")
    };
    let mut first = come(1).await.expect("dials");
    let _second = come(2).await.expect("a restarted process, for all that is known");
    ends(&mut first).await;
    let error = match come(1).await {
        Err(error) => error.to_string(),
        // Refused right after the welcome.
        Ok(mut channel) => match recv(&mut channel).await {
            Down::Refused(refused) => refused.message,
            other => panic!("{other:?}"),
        },
    };
    assert!(error.contains("same identity"), "{error}");
    let cloned = devices(&server).into_iter().find(|device| device["name"] == "desk").expect("is listed");
    assert!(cloned["cloned"].is_u64() && cloned["online"] == true, "{cloned}");
    assert!(server.audit().iter().any(|line| line["event"] == "cloned"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_taken_is_refused_and_a_machine_installed_anew_takes_it_back() {
    let server = Server::start().await;
    let old = server.device(Role::Agent, "desk", &["site=a"]).await;
    let mut channel = dial(&old).await;
    let token = server.token(Role::Agent, &["site=a"], 1).await;
    let mut anew = wanted(server.device_dir("reinstalled"), "desk");
    let error = adit_client::enrol::enrol(&token, &anew).await.expect_err("taken");
    assert_eq!(error.exit(), Exit::Refused);
    assert!(error.to_string().contains(&old.device_id.to_string()), "{error}");
    assert!(error.to_string().contains("--replace"), "{error}");

    let rollout = server.token(Role::Agent, &["site=a"], 5).await;
    anew.replace = true;
    let error = adit_client::enrol::enrol(&rollout, &anew).await.expect_err("not with a rollout's token");
    assert!(error.to_string().contains("may not replace"), "{error}");
    let new = adit_client::enrol::enrol(&token, &anew).await.expect("enrols");
    ends(&mut channel).await;
    assert!(refused(&old).await.contains("revoked"));
    assert_ne!(new.device_id, old.device_id);
    let list = loop {
        if let Down::Revocations(new) = recv(&mut dial(&new).await).await {
            break new.list;
        }
    };
    assert!(Revocations::read(&list, &new.root).expect("is ours").has(&old.public_key()));
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_learn_a_new_address_over_the_old_one() {
    let server = Server::start().await;
    server.device(Role::Agent, "desk", &["site=a"]).await;
    let technician = server.device(Role::Technician, "anna", &["site=a"]).await;
    let live = Live::load(&server.device_dir("desk")).expect("loads");
    let (mut anna, mut agent) = (dial(&technician).await, dial(&live.get()).await);
    open(&mut anna, &mut agent, "desk").await;
    assert_eq!(done(&server, "hosts").lines().collect::<Vec<_>>(), ["127.0.0.1"]);
    done(&server, "hosts add localhost");
    let mut told = 0;
    while told < 2 {
        match recv(&mut agent).await {
            Down::Update(update) => {
                live.update(update).expect("is ours");
                told += 1;
            }
            // The session's relay moved, too.
            Down::Tickets(tickets) => {
                assert!(tickets.relays[0].addresses.iter().any(|address| address.starts_with("localhost:")));
                told += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    let (code, _, stderr) = operator(&server, "hosts remove 192.0.2.1");
    assert_eq!(code, 2);
    assert!(stderr.contains("there are: 127.0.0.1, localhost"), "{stderr}");
    done(&server, "hosts remove 127.0.0.1");
    let (code, ..) = operator(&server, "hosts remove localhost");
    assert_eq!(code, 2, "one has to stay");
    let again = Live::load(&server.device_dir("desk")).expect("loads").get();
    assert_eq!(again.servers.len(), 2);
    assert!(again.servers[1].starts_with("localhost:"), "{:?}", again.servers);
    // Who comes by the old address is told in the welcome.
    let channel = dial(&again).await;
    assert_eq!(channel.welcome.servers, again.servers[1..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_sees_a_certificate_for_the_hosts_and_is_asked_for_none() {
    let server = Server::start().await;
    let desk = server.device(Role::Agent, "desk", &[]).await;
    let mut roots = rustls::RootCertStore::empty();
    let pem = std::fs::read(server.dir.path().join("web-root.pem")).expect("reads");
    use rustls::pki_types::pem::PemObject;
    roots
        .add(rustls::pki_types::CertificateDer::from_pem_slice(&pem).expect("a certificate"))
        .expect("a root");
    let mut config = rustls::ClientConfig::builder_with_provider(adit_client::tls::provider())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    let stream = tokio::net::TcpStream::connect(&desk.servers[0]).await.expect("connects");
    let name = rustls::pki_types::ServerName::try_from("127.0.0.1").expect("a name");
    let mut stream = connector.connect(name, stream).await.expect("trusted, for this very address");
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    stream.write_all(b"GET /control HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("writes");
    let mut answer = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("in time").unwrap_or_default();
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_tries_every_port_from_here_and_from_an_agent() {
    let server = Server::start().await;
    server.device(Role::Agent, "desk", &[]).await;
    let live = Live::load(&server.device_dir("desk")).expect("loads");
    let (hub, _offers) = adit_client::hub::Hub::start(live);
    timeout(PATIENCE, hub.control().connected()).await.expect("in time").expect("connects");
    let (code, stdout, stderr) = operator(&server, "doctor --from desk --json");
    let findings: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let texts: Vec<&str> = findings.iter().filter_map(|finding| finding["text"].as_str()).collect();
    assert_eq!(code, 0, "{texts:#?}{stderr}");
    for from in ["here", "desk"] {
        for what in ["mediator at", "relay at", "STUN at"] {
            assert!(
                texts.iter().any(|text| text.starts_with(&format!("from {from}: {what}"))),
                "{from} {what}: {texts:#?}"
            );
        }
    }
    assert!(texts.iter().any(|text| text.contains("strangers away")), "{texts:#?}");
    assert!(texts.iter().any(|text| text.contains("nothing else")), "{texts:#?}");
    let (code, _, stderr) = operator(&server, "doctor --from nobody");
    assert_eq!((code, stderr.contains("there are: desk")), (2, true), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_names_what_does_not_work() {
    let mut server = Server::start().await;
    let config = server.dir.path().join("config.toml");
    let text = std::fs::read_to_string(&config).expect("reads");
    std::fs::write(&config, text.replace("hosts = [", "hosts = [\"nothing.invalid\", ")).expect("writes");
    let (code, stdout, _) = operator(&server, "doctor");
    assert_eq!(code, 1, "{stdout}");
    assert!(stdout.contains("FAULT nothing.invalid does not resolve"), "{stdout}");
    server.stop().await;
    let (code, stdout, _) = operator(&server, "doctor");
    assert_eq!(code, 1);
    assert!(stdout.contains("no mediator runs") && stdout.contains("systemctl start"), "{stdout}");
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_tells_what_there_is_to_know() {
    let server = Server::start().await;
    let desk = server.device(Role::Agent, "desk", &["site=a"]).await;
    server.device(Role::Technician, "anna", &["site=a"]).await;
    let channel = dial(&desk).await;
    let listed = devices(&server);
    let by_name = |name: &str| listed.iter().find(|device| device["name"] == name).expect("is listed");
    let desk = by_name("desk");
    assert_eq!(
        (&desk["role"], &desk["online"], &desk["tags"][0]),
        (&"agent".into(), &true.into(), &"site=a".into())
    );
    assert!(desk["address"].as_str().is_some_and(|address| address.starts_with("127.0.0.1:")));
    assert!(desk["version"].as_str().is_some_and(|version| version.starts_with("adit ")));
    assert!(desk["expires"].as_u64() > desk["enrolled"].as_u64());
    let anna = by_name("anna");
    assert_eq!((&anna["online"], &anna["last_seen"]), (&false.into(), &Value::Null));
    let table = done(&server, "devices");
    assert!(
        table.contains("NAME") && table.contains("never seen") && table.contains("online for"),
        "{table}"
    );
    assert!(!done(&server, "devices --tag site=b").contains("desk"));
    channel.close().await;
}

/// A technician's hub, and a session with the agent `desk` that it was granted.
async fn granted(technician: Identity) -> (Hub, Grant) {
    let (hub, _) = Hub::start(Live::new(technician));
    let mut state = hub.control().state();
    let connected = state.wait_for(|state| matches!(state, State::Connected(_)));
    timeout(PATIENCE, connected).await.expect("in time").expect("runs");
    let open = |request| Up::Open(Open { request, agent: "desk".into(), ..Open::default() });
    let Ok(Down::Granted(grant)) = hub.request(PATIENCE, open).await else { panic!("not granted") };
    (hub, grant)
}

#[tokio::test]
async fn a_session_ends_with_the_mediators_refusal_of_its_device() {
    let mut server = Server::start().await;
    let desk = server.device(Role::Agent, "desk", &["site=a"]).await;
    let anna = server.device(Role::Technician, "anna", &["site=a"]).await;
    let _desk = dial(&desk).await;
    let (hub, grant) = granted(anna).await;
    let mut session = hub.open_session(End::Technician, grant, Via::Relay, None, None).expect("a session");
    // Revoked while there is no channel that could say so.
    server.stop().await;
    done(&server, "revoke anna");
    server.run().await.expect("runs again");
    let closed = async {
        loop {
            if let SessionEvent::Closed { reason } = session.events.recv().await.expect("runs") {
                return reason;
            }
        }
    };
    let reason = timeout(PATIENCE, closed).await.expect("in time");
    assert!(reason.contains("revoked"), "{reason}");
}

#[tokio::test]
async fn an_end_that_overtakes_its_session_is_not_forgotten() {
    let server = Server::start().await;
    let desk = server.device(Role::Agent, "desk", &["site=a"]).await;
    let anna = server.device(Role::Technician, "anna", &["site=a"]).await;
    let mut desk = dial(&desk).await;
    let (hub, grant) = granted(anna).await;
    let Down::Offer(_) = recv(&mut desk).await else { panic!("no offer") };
    let closed = Closed { session: grant.session.clone(), reason: "no".into(), ..Closed::default() };
    desk.send(Up::Closed(closed)).await.expect("sends");
    // The answers stand behind it on both channels.
    desk.send(Up::List(List { request: 1 })).await.expect("sends");
    assert!(matches!(recv(&mut desk).await, Down::Refused(_)));
    hub.request(PATIENCE, |request| Up::List(List { request })).await.expect("an answer");
    let opened = hub.open_session(End::Technician, grant, Via::Relay, None, None);
    assert_eq!(opened.err(), Some(NotOpened::Ended("no".into())));
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_are_taken_away_although_no_record_can_be_written() {
    let mut server = Server::start().await;
    let desk = server.device(Role::Agent, "desk", &["site=a"]).await;
    let anna = server.device(Role::Technician, "anna", &["site=a"]).await;
    let ben = server.device(Role::Technician, "ben", &["site=a"]).await;
    server.stop().await;
    let record = server.dir.path().join("audit.jsonl");
    fs::remove_file(&record).expect("removes");
    std::os::unix::fs::symlink("/dev/full", &record).expect("links");
    server.run().await.expect("runs again");
    let (_desk, mut anna_channel, mut ben_channel) = (dial(&desk).await, dial(&anna).await, dial(&ben).await);
    assert_eq!(reachable(&mut anna_channel).await, ["desk"]);
    let (_, grants, _) = operator(&server, "grants anna --json");
    let grant = serde_json::from_str::<Value>(&grants).expect("JSON")["grant"].clone();
    let (code, _, stderr) = operator(&server, "allow anna --tag site=b");
    assert!(code == 1 && stderr.contains("nothing was changed"), "{stderr}");
    assert!(done(&server, &format!("deny anna {grant}")).contains("warning: no audit record"));
    assert_eq!(reachable(&mut anna_channel).await, [""; 0]);
    // Nor where it cannot even be opened.
    fs::remove_file(&record).expect("removes");
    fs::create_dir(&record).expect("makes");
    assert!(done(&server, "revoke ben").contains("warning: no audit record"));
    ends(&mut ben_channel).await;
    assert!(refused(&ben).await.contains("revoked"));
}
