//! Sessions over real sockets: from `ls` to both ends' tickets, through restarts.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::{PATIENCE, Server, dial, dial_with, live, open, recv};
use adit_client::control::maintain::NotConnected;
use adit_client::control::{ControlChannel, Ended, State, hello, maintain};
use adit_client::enrol::EnrolError;
use adit_client::exit::{Exit, Failure};
use adit_client::identity::Identity;
use adit_mediator::organisation::Organisation;
use adit_mediator::server::Mediator;
use adit_protocol::control::{
    Answer, Candidates, Closed, Down, List, Open, RefusedCode, RelayTicket, RelayUp, Renew, Tickets, Up,
};
use adit_protocol::leg::{self, Status};
use adit_protocol::ticket::Ticket;
use adit_protocol::{Role, SessionId};
use data_encoding::BASE64URL_NOPAD;
use stun_rs::attributes::stun::{MessageIntegrity, UserName, XorMappedAddress};
use stun_rs::methods::BINDING;
use stun_rs::{HMACKey, MessageClass, MessageDecoderBuilder, MessageEncoderBuilder, StunMessageBuilder};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

struct Scene {
    server: Server,
    agent: Identity,
    technician: Identity,
}

async fn scene() -> Scene {
    let server = Server::start().await;
    let agent = server.device(Role::Agent, "desk", &["site=a", "os=linux"]).await;
    let technician = server.device(Role::Technician, "laptop", &["site=a"]).await;
    Scene { server, agent, technician }
}

#[tokio::test]
async fn from_list_to_grant_with_an_audit_line_before_it() {
    let Scene { server, agent, technician } = scene().await;
    let mut technician_channel = dial(&technician).await;
    technician_channel.send(Up::List(List { request: 3 })).await.expect("sends");
    let Down::Agents(agents) = recv(&mut technician_channel).await else { panic!("no list") };
    assert_eq!((agents.request, agents.agents.len()), (3, 1));
    assert_eq!((agents.agents[0].name.as_str(), agents.agents[0].online), ("desk", false));

    let mut agent_channel = dial(&agent).await;
    technician_channel.send(Up::List(List { request: 4 })).await.expect("sends");
    let Down::Agents(agents) = recv(&mut technician_channel).await else { panic!("no list") };
    assert!(agents.agents[0].online && agents.agents[0].last_seen > 0);

    let (grant, offer) = open(&mut technician_channel, &mut agent_channel, "desk").await;
    let audit: Vec<_> = server.audit().into_iter().filter(|line| line["event"] != "enrolled").collect();
    assert_eq!(audit.len(), 1);
    assert_eq!(audit[0]["event"], "grant");
    assert_eq!(audit[0]["session"], SessionId::try_from(&grant.session[..]).expect("16 bytes").to_string());
    assert_eq!(audit[0]["technician"]["id"], technician.device_id.to_string());
    assert_eq!(audit[0]["agent"]["name"], "desk");
    assert_eq!(audit[0]["targets"][0], "127.0.0.1:3389");
    assert_eq!(audit[0]["rule"], "grant 1: site=a");
    assert!(audit[0]["from"].as_str().is_some_and(|from| from.starts_with("127.0.0.1:")));

    assert_eq!((grant.request, offer.request, &grant.session), (7, 0, &offer.session));
    assert_eq!((&grant.peer[..], &offer.peer[..]), (&agent.device_id.0[..], &technician.device_id.0[..]));
    assert_eq!(grant.peer_key, agent.public_key());
    assert_eq!(
        (grant.local_ice.clone(), grant.remote_ice.clone()),
        (offer.remote_ice.clone(), offer.local_ice)
    );
    let ice = grant.local_ice.expect("there");
    assert_eq!((ice.ufrag.len(), ice.password.len()), (8, 24));
    assert_eq!(offer.targets, ["127.0.0.1:3389"]);
    assert_eq!((grant.via.as_str(), offer.via.as_str()), ("auto", "auto"));
    assert_eq!((grant.relays.len(), offer.relays.len()), (1, 1));
    assert_eq!(grant.relays[0].addresses, offer.relays[0].addresses);

    let said = Closed { session: grant.session, reason: "done".into(), bytes_sent: 10, bytes_received: 20 };
    technician_channel.send(Up::Closed(said)).await.expect("sends");
    let Down::Closed(closed) = recv(&mut agent_channel).await else { panic!("not closed") };
    assert_eq!(closed.reason, "done");
    technician_channel.send(Up::List(List { request: 5 })).await.expect("sends");
    recv(&mut technician_channel).await;
    let line = server.audit().pop().expect("a line");
    assert_eq!(
        (&line["event"], &line["bytes_sent"], &line["bytes_received"]),
        (&"closed".into(), &10.into(), &20.into())
    );
}

#[tokio::test]
async fn the_tickets_pair_at_the_embedded_relay() {
    let Scene { server: _server, agent, technician } = scene().await;
    let (mut technician_channel, mut agent_channel) = (dial(&technician).await, dial(&agent).await);
    let (grant, offer) = open(&mut technician_channel, &mut agent_channel, "desk").await;
    let (mut one, mut other) =
        tokio::join!(show(&technician, &grant.relays[0]), show(&agent, &offer.relays[0]));
    for leg in [&mut one, &mut other] {
        let status = timeout(PATIENCE, leg.read_u8()).await.expect("in time").expect("a byte");
        assert_eq!(Status::try_from(status), Ok(Status::Paired));
    }
    one.write_all(b"ping").await.expect("writes");
    let mut bytes = [0; 4];
    timeout(PATIENCE, other.read_exact(&mut bytes)).await.expect("in time").expect("reads");
    assert_eq!(&bytes, b"ping");
}

#[tokio::test]
async fn without_matching_tags_an_agent_does_not_exist() {
    let Scene { server, agent, technician } = scene().await;
    let _agent_channel = dial(&agent).await;
    let other_site = server.device(Role::Technician, "t-b", &["site=b"]).await;
    let untagged = server.device(Role::Technician, "t-none", &[]).await;
    let all = server.token_with(Role::Technician, &[], 1, 60, true).await;
    let all = server.enrol(&all, "t-all").await.expect("enrols");
    for (identity, expected) in [(&other_site, 0), (&untagged, 0), (&technician, 1), (&all, 1)] {
        let mut channel = dial(identity).await;
        channel.send(Up::List(List { request: 1 })).await.expect("sends");
        let Down::Agents(agents) = recv(&mut channel).await else { panic!("no list") };
        assert_eq!(agents.agents.len(), expected, "{}", identity.name);
        let refused = refusal(&mut channel, if expected == 0 { "desk" } else { "dusk" }).await;
        assert_eq!(refused.0, RefusedCode::UnknownAgent);
        assert_eq!(refused.1.contains("there are: desk"), expected == 1, "{}", refused.1);
    }
}

#[tokio::test]
async fn offline_agents_and_other_roles_are_refused() {
    let Scene { server: _server, agent, technician } = scene().await;
    let mut technician_channel = dial(&technician).await;
    let (code, message) = refusal(&mut technician_channel, "desk").await;
    assert_eq!(code, RefusedCode::AgentOffline);
    assert!(message.contains("never"), "{message}");
    let mut agent_channel = dial(&agent).await;
    assert_eq!(refusal(&mut agent_channel, "desk").await.0, RefusedCode::NotPermitted);
}

#[tokio::test]
async fn an_agent_that_says_no_closes_the_session() {
    let Scene { server, agent, technician } = scene().await;
    let (mut technician_channel, mut agent_channel) = (dial(&technician).await, dial(&agent).await);
    let (grant, _) = open(&mut technician_channel, &mut agent_channel, "desk").await;
    let answer =
        Answer { session: grant.session.clone(), accepted: false, reason: "busy".into(), flight: vec![] };
    agent_channel.send(Up::Answer(answer)).await.expect("sends");
    let Down::Closed(closed) = recv(&mut technician_channel).await else { panic!("not closed") };
    assert_eq!((&closed.session, closed.reason.contains("busy")), (&grant.session, true));
    // The line is on its way before the next request is read.
    agent_channel.send(Up::List(List { request: 1 })).await.expect("sends");
    recv(&mut agent_channel).await;
    assert_eq!(server.audit().pop().expect("a line")["event"], "refused");
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn without_an_audit_record_there_is_no_grant() {
    let mut server = Server::start().await;
    let agent = server.device(Role::Agent, "desk", &["site=a"]).await;
    let technician = server.device(Role::Technician, "laptop", &["site=a"]).await;
    server.stop().await;
    let record = server.dir.path().join("audit.jsonl");
    std::fs::remove_file(&record).expect("removes");
    std::os::unix::fs::symlink("/dev/full", &record).expect("links");
    server.run().await.expect("runs again");
    let token = server.token(Role::Agent, &["site=a"], 1).await;
    let enrolled = server.enrol(&token, "another").await;
    assert!(matches!(enrolled, Err(EnrolError::Unavailable(_))), "{enrolled:?}");
    let (mut technician_channel, mut agent_channel) = (dial(&technician).await, dial(&agent).await);
    assert_eq!(refusal(&mut technician_channel, "desk").await.0, RefusedCode::Unavailable);
    server.stop().await;
    let next = timeout(PATIENCE, agent_channel.recv()).await.expect("in time");
    assert!(matches!(next, Err(Ended::ByPeer | Ended::Broken(_))), "{next:?}");
    // Nothing of the refused enrolment has happened: neither a restart lets it in, nor is the token spent.
    std::fs::remove_file(&record).expect("removes");
    server.run().await.expect("runs again");
    let mut technician_channel = dial(&technician).await;
    assert_eq!(refusal(&mut technician_channel, "another").await.0, RefusedCode::UnknownAgent);
    server.enrol(&token, "another").await.expect("enrols");
    assert_eq!(server.audit().last().expect("a line")["event"], "enrolled");
}

#[tokio::test]
async fn candidates_and_what_the_handshake_shows_reach_the_other_end() {
    let Scene { server, agent, technician } = scene().await;
    let (mut technician_channel, mut agent_channel) = (dial(&technician).await, dial(&agent).await);
    let (grant, _) = open(&mut technician_channel, &mut agent_channel, "desk").await;
    let candidates =
        Candidates { session: grant.session.clone(), candidates: vec![1, 2, 3], seen: "192.0.2.1:9".into() };
    technician_channel.send(Up::Candidates(candidates)).await.expect("sends");
    let Down::Candidates(got) = recv(&mut agent_channel).await else { panic!("no candidates") };
    assert_eq!((got.candidates.as_slice(), got.seen.as_str()), (&[1, 2, 3][..], ""));

    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("binds");
    let session = SessionId::try_from(&grant.session[..]).expect("16 bytes");
    let password = grant.local_ice.expect("there").password;
    for (password, proven) in [("wrong".to_owned(), false), (password, true)] {
        let request = handshake(&format!("{session}:technician"), &password);
        socket.send_to(&request, server.udp).await.expect("sends");
        let mut buffer = [0; 512];
        let length = timeout(PATIENCE, socket.recv(&mut buffer)).await.expect("in time").expect("an answer");
        assert!(length * 10 <= request.len() * 16);
        let (answer, _) = MessageDecoderBuilder::default().build().decode(&buffer[..length]).expect("STUN");
        let mapped =
            answer.get::<XorMappedAddress>().expect("there").as_xor_mapped_address().expect("is one");
        assert_eq!(*mapped.socket_address(), socket.local_addr().expect("bound"));
        if proven {
            let Down::Candidates(got) = recv(&mut agent_channel).await else { panic!("no candidates") };
            assert_eq!(got.seen, socket.local_addr().expect("bound").to_string());
        }
    }
}

#[tokio::test]
async fn both_wishes_for_tickets_are_one_and_a_third_is_another() {
    let Scene { server: _server, agent, technician } = scene().await;
    let (mut technician_channel, mut agent_channel) = (dial(&technician).await, dial(&agent).await);
    let (grant, _) = open(&mut technician_channel, &mut agent_channel, "desk").await;
    let wish = || Up::Renew(Renew { session: grant.session.clone() });
    let mut serials = vec![claims(&grant.relays[0]).serial];
    technician_channel.send(wish()).await.expect("sends");
    serials.push(both_tickets(&mut technician_channel, &mut agent_channel).await);
    // The agent's wish for the same, then one more of the technician's.
    agent_channel.send(wish()).await.expect("sends");
    agent_channel.send(Up::List(List { request: 1 })).await.expect("sends");
    assert!(matches!(recv(&mut agent_channel).await, Down::Refused(_)));
    technician_channel.send(wish()).await.expect("sends");
    serials.push(both_tickets(&mut technician_channel, &mut agent_channel).await);
    assert!(serials.is_sorted_by(|a, b| a < b), "{serials:?}");
}

#[tokio::test]
async fn a_relay_that_comes_up_or_comes_back_brings_new_tickets() {
    let Scene { server, agent, technician } = scene().await;
    let (mut technician_channel, mut agent_channel) = (dial(&technician).await, dial(&agent).await);
    open(&mut technician_channel, &mut agent_channel, "desk").await;
    let token = server.token(Role::Relay, &[], 1).await;
    let wanted = adit_client::enrol::Enrolment {
        hosts: vec!["192.0.2.9".into()],
        ..crate::common::wanted(server.device_dir("relay-1"), "relay-1")
    };
    let relay = adit_client::enrol::enrol(&token, &wanted).await.expect("enrols");
    assert_eq!(relay.ticket_key.map(|key| key.len()), Some(32));
    let relay_channel = dial(&relay).await;
    for epoch in [5, 6] {
        let up = RelayUp { epoch, addresses: vec!["192.0.2.9:8002".into()], ..Default::default() };
        // The second time it says nothing new.
        relay_channel.send(Up::RelayUp(up.clone())).await.expect("sends");
        relay_channel.send(Up::RelayUp(up)).await.expect("sends");
        for channel in [&mut technician_channel, &mut agent_channel] {
            let Down::Tickets(tickets) = recv(channel).await else { panic!("no tickets") };
            let epochs: Vec<u64> = tickets.relays.iter().map(|ticket| claims(ticket).epoch).collect();
            assert_eq!((epochs.len(), epochs[1]), (2, epoch));
        }
    }
}

#[tokio::test]
async fn a_restarted_mediator_takes_back_what_both_ends_name() {
    let Scene { mut server, agent, technician } = scene().await;
    let (mut technician_channel, mut agent_channel) = (dial(&technician).await, dial(&agent).await);
    let (grant, _) = open(&mut technician_channel, &mut agent_channel, "desk").await;
    server.stop().await;
    server.run().await.expect("runs again");

    let named = |peer| vec![live(&grant.session, peer)];
    let mut agent_channel = dial_with(&agent, named(technician.device_id)).await;
    let mut technician_channel = dial_with(&technician, named(agent.device_id)).await;
    let serial = both_tickets(&mut technician_channel, &mut agent_channel).await;
    assert!(serial > claims(&grant.relays[0]).serial);
    // An agent process that does not know the session any more has lost it.
    let _agent_channel = dial(&agent).await;
    let Down::Closed(closed) = recv(&mut technician_channel).await else { panic!("not closed") };
    assert_eq!(closed.session, grant.session);
}

#[tokio::test]
async fn a_session_that_only_one_end_names_or_nobody_may_have_is_not_restored() {
    let Scene { server, agent, technician: _technician } = scene().await;
    let stranger = server.device(Role::Technician, "t-b", &["site=b"]).await;
    let session = [9; 16];
    let mut agent_channel = dial_with(&agent, vec![live(&session, stranger.device_id)]).await;
    let mut stranger_channel = dial_with(&stranger, vec![live(&session, agent.device_id)]).await;
    for channel in [&mut agent_channel, &mut stranger_channel] {
        let Down::Closed(closed) = recv(channel).await else { panic!("not closed") };
        assert_eq!(closed.session, session);
    }
    assert!(!server.audit().iter().any(|line| line["event"] == "restored"));
}

#[tokio::test]
async fn an_agent_that_goes_away_keeps_its_session() {
    let Scene { server: _server, agent, technician } = scene().await;
    let (mut technician_channel, mut agent_channel) = (dial(&technician).await, dial(&agent).await);
    let (grant, _) = open(&mut technician_channel, &mut agent_channel, "desk").await;
    drop(agent_channel);
    let mut agent_channel = dial_with(&agent, vec![live(&grant.session, technician.device_id)]).await;
    technician_channel.send(Up::Renew(Renew { session: grant.session.clone() })).await.expect("sends");
    both_tickets(&mut technician_channel, &mut agent_channel).await;
}

#[tokio::test]
async fn a_maintained_channel_comes_back_and_says_hello_again() {
    let Scene { mut server, agent, technician } = scene().await;
    let hellos = Arc::new(AtomicUsize::new(0));
    let counted = hellos.clone();
    let (control, mut down) = maintain(
        adit_client::identity::Live::new(agent),
        move || {
            counted.fetch_add(1, Ordering::Relaxed);
            hello(vec![])
        },
        None,
    );
    let welcome = timeout(PATIENCE, control.connected()).await.expect("in time").expect("connects");
    assert_eq!(welcome.name, "desk");
    let mut state = control.state();
    server.stop().await;
    let lost = state.wait_for(|state| matches!(state, State::Disconnected { .. }));
    timeout(PATIENCE, lost).await.expect("in time").expect("still kept");
    assert_eq!(control.send(Up::List(List { request: 1 })).await, Err(NotConnected));
    server.run().await.expect("runs again");
    timeout(PATIENCE, control.connected()).await.expect("in time").expect("connects");
    assert!(hellos.load(Ordering::Relaxed) >= 2);

    let mut technician_channel = dial(&technician).await;
    let open = Open { request: 1, agent: "desk".into(), ..Open::default() };
    technician_channel.send(Up::Open(open)).await.expect("sends");
    let offer = timeout(PATIENCE, down.recv()).await.expect("in time");
    assert!(matches!(offer, Some(Down::Offer(_))), "{offer:?}");
    let Some(Down::Offer(offer)) = offer else { return };
    assert!(matches!(recv(&mut technician_channel).await, Down::Granted(_)));
    // The last words of a channel that is closed arrive.
    let last = Closed { session: offer.session, reason: "bye".into(), ..Closed::default() };
    control.send(Up::Closed(last)).await.expect("sends");
    control.close().await;
    let Down::Closed(closed) = recv(&mut technician_channel).await else { panic!("not closed") };
    assert_eq!(closed.reason, "bye");
    let ended = timeout(PATIENCE, state.wait_for(|_| false)).await.expect("in time");
    assert!(ended.is_err());
}

#[tokio::test]
async fn a_taken_port_names_its_setting() {
    let server = Server::start().await;
    let bind = async |dir: &std::path::Path| {
        let organisation = Organisation::load(dir).expect("loads");
        let Err(error) = Mediator::bind(organisation, true).await else { panic!("bound twice") };
        assert_eq!(error.exit(), Exit::Usage);
        error
    };
    let error = bind(server.dir.path()).await;
    assert!(error.to_string().contains("runs on"), "{error}");
    let other = tempfile::tempdir().expect("tempdir");
    Organisation::init(other.path(), &["127.0.0.1".into()]).expect("init");
    let config = server.dir.path().join("config.toml");
    std::fs::copy(config, other.path().join("config.toml")).expect("copies");
    let error = bind(other.path()).await;
    assert!(error.remedy().is_some_and(|remedy| remedy.contains("[listen] https")), "{:?}", error.remedy());
}

async fn refusal(channel: &mut ControlChannel, agent: &str) -> (RefusedCode, String) {
    channel.send(Up::Open(Open { request: 2, agent: agent.into(), ..Open::default() })).await.expect("sends");
    let Down::Refused(refused) = recv(channel).await else { panic!("not refused") };
    assert_eq!(refused.request, 2);
    (refused.code(), refused.message)
}

/// The serial number of the tickets that both ends get next.
async fn both_tickets(technician: &mut ControlChannel, agent: &mut ControlChannel) -> u64 {
    let mut serials = vec![];
    for (channel, leg) in [(technician, Role::Technician), (agent, Role::Agent)] {
        let Down::Tickets(Tickets { relays, .. }) = recv(channel).await else { panic!("no tickets") };
        let claims = claims(&relays[0]);
        assert_eq!(claims.leg, leg);
        serials.push(claims.serial);
    }
    assert_eq!(serials[0], serials[1]);
    serials[0]
}

/// What a ticket says, as its holder reads it: PASETO v4.public, payload before the 64-byte signature.
fn claims(ticket: &RelayTicket) -> Ticket {
    let payload = ticket.ticket.strip_prefix("v4.public.").expect("a ticket");
    let bytes = BASE64URL_NOPAD.decode(payload.as_bytes()).expect("base64url");
    serde_json::from_slice(&bytes[..bytes.len() - 64]).expect("claims")
}

async fn show(identity: &Identity, ticket: &RelayTicket) -> TcpStream {
    let preamble = leg::encode(&ticket.ticket, &claims(ticket), |message| identity.sign(message));
    let mut stream = TcpStream::connect(&ticket.addresses[0]).await.expect("connects");
    stream.write_all(&preamble).await.expect("writes");
    stream
}

fn handshake(username: &str, password: &str) -> Vec<u8> {
    let message = StunMessageBuilder::new(BINDING, MessageClass::Request)
        .with_attribute(UserName::new(username).expect("a name"))
        .with_attribute(MessageIntegrity::new(HMACKey::new_short_term(password).expect("a key")))
        .build();
    let mut buffer = vec![0; 256];
    let length = MessageEncoderBuilder::default().build().encode(&mut buffer, &message).expect("fits");
    buffer.truncate(length);
    buffer
}
