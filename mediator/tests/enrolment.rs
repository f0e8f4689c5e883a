//! Enrolment over real sockets: one-time tokens, repeated tries, and everything that can be wrong.

use std::fs;

use crate::common::{Server, wanted};
use adit_client::control::{ControlChannel, ControlError, hello};
use adit_client::enrol::{EnrolError, enrol};
use adit_client::exit::{Exit, Failure};
use adit_client::identity::{certificate, store};
use adit_protocol::Role;
use adit_protocol::token::EnrolmentToken;
use tokio::task::JoinSet;

#[tokio::test]
async fn a_token_becomes_an_identity_that_the_mediator_knows() {
    let server = Server::start().await;
    let token = server.token(Role::Agent, &["site=a"], 1).await;
    let token: EnrolmentToken = token.to_string().parse().expect("reads back");
    let identity = server.enrol(&token, "desk").await.expect("enrols");
    assert_eq!((identity.role, identity.name.as_str()), (Role::Agent, "desk"));
    assert_eq!(identity.tags, ["site=a"]);
    assert_eq!(certificate::fingerprint(&identity.root).expect("root"), token.fingerprint);
    let loaded = store::load(&server.device_dir("desk")).expect("loads");
    assert_eq!(loaded.device_id, identity.device_id);
    let channel = crate::common::dial(&loaded).await;
    assert_eq!(channel.welcome.name, "desk");
    assert_eq!(channel.welcome.p2p_ports, "40000-41000");
    let own = channel.welcome.mediator_stun as usize;
    assert_eq!(channel.welcome.stun[..own], [server.udp.to_string()]);
    assert_eq!(channel.welcome.stun[own..], identity.servers, "the second STUN port is that of HTTPS");
}

#[tokio::test]
async fn of_64_at_once_exactly_one_gets_a_one_time_token() {
    let server = Server::start().await;
    let token = server.token(Role::Agent, &[], 1).await;
    let mut tries = JoinSet::new();
    for number in 0..64 {
        let (token, name) = (token.clone(), format!("desk-{number}"));
        let wanted = wanted(server.device_dir(&name), &name);
        tries.spawn(async move { enrol(&token, &wanted).await });
    }
    let outcomes = tries.join_all().await;
    let (won, lost): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!((won.len(), lost.len()), (1, 63));
    for error in lost.into_iter().filter_map(Result::err) {
        assert!(matches!(&error, EnrolError::Refused(why) if why.contains("used up")), "{error}");
        assert_eq!(error.exit(), Exit::Refused);
    }
}

#[tokio::test]
async fn a_lost_answer_tried_again_gives_the_same_identity() {
    let server = Server::start().await;
    let token = server.token(Role::Technician, &["site=a"], 1).await;
    let first = server.enrol(&token, "laptop").await.expect("enrols");
    // The state before the answer arrived: only the key is there.
    let dir = server.device_dir("laptop");
    fs::rename(dir.join("key.pem"), dir.join("pending-key.pem")).expect("renames");
    for file in ["cert.pem", "root.pem", "device.toml"] {
        fs::remove_file(dir.join(file)).expect("removes");
    }
    let again = server.enrol(&token, "laptop").await.expect("enrols");
    assert_eq!((again.device_id, again.public_key()), (first.device_id, first.public_key()));
    let error = server.enrol(&token, "laptop").await.expect_err("is enrolled");
    assert!(matches!(error, EnrolError::AlreadyEnrolled(_)) && error.exit() == Exit::Usage, "{error}");
}

#[tokio::test]
async fn replacing_an_identity_that_fails_keeps_the_old_one() {
    let server = Server::start().await;
    let identity = server.device(Role::Agent, "desk", &[]).await;
    let used = server.token(Role::Agent, &[], 1).await;
    server.enrol(&used, "other").await.expect("enrols");
    let mut wanted = wanted(server.device_dir("desk"), "desk");
    wanted.replace = true;
    enrol(&used, &wanted).await.expect_err("is used up");
    assert_eq!(store::load(&wanted.dir).expect("loads").device_id, identity.device_id);
    let fresh = server.token(Role::Agent, &[], 1).await;
    let new = enrol(&fresh, &wanted).await.expect("enrols");
    assert_ne!(new.device_id, identity.device_id);
    assert_eq!(store::load(&wanted.dir).expect("loads").device_id, new.device_id);
}

#[tokio::test]
async fn bad_tokens_are_told_apart() {
    let server = Server::start().await;
    let good = server.token(Role::Agent, &[], 1).await;

    let forged = EnrolmentToken { fingerprint: [0; 32], ..good.clone() };
    let error = server.enrol(&forged, "desk").await.expect_err("refused");
    assert!(matches!(error, EnrolError::WrongFingerprint) && error.exit() == Exit::Refused, "{error}");

    let unknown = EnrolmentToken { secret: [0; 16], ..good.clone() };
    let error = server.enrol(&unknown, "desk").await.expect_err("refused");
    assert!(matches!(error, EnrolError::Refused(_)) && error.exit() == Exit::Refused, "{error}");

    let closed = std::net::TcpListener::bind("127.0.0.1:0").expect("binds").local_addr().expect("bound");
    let elsewhere = EnrolmentToken { servers: vec![closed.to_string()], ..good.clone() };
    let error = server.enrol(&elsewhere, "desk").await.expect_err("unreachable");
    assert!(matches!(error, EnrolError::Unreachable { .. }) && error.exit() == Exit::Unreachable, "{error}");

    // None of these has cost the token, nor left anything in the way.
    let mut servers = vec![closed.to_string()];
    servers.extend(good.servers.clone());
    let second_server = EnrolmentToken { servers, ..good };
    server.enrol(&second_server, "desk").await.expect("enrols");
}

#[tokio::test]
async fn a_device_of_another_organisation_is_refused() {
    let (ours, theirs) = (Server::start().await, Server::start().await);
    let mut stranger = theirs.device(Role::Technician, "laptop", &[]).await;
    let native = ours.device(Role::Technician, "laptop", &[]).await;
    stranger.servers = native.servers.clone();
    // It does not accept our mediator.
    let error = ControlChannel::dial(&stranger, hello(vec![])).await.expect_err("refused");
    assert!(matches!(error, ControlError::Refused(_)) && error.exit() == Exit::Refused, "{error}");
    // It does, but our mediator does not accept it.
    stranger.root = native.root.clone();
    let error = ControlChannel::dial(&stranger, hello(vec![])).await.expect_err("refused");
    assert!(matches!(error, ControlError::TurnedAway(_)) && error.exit() == Exit::Refused, "{error}");
}
