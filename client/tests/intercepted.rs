//! Something in between that opens TLS is recognised and named, by enrolment and by the control channel.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use adit_client::control::{ControlChannel, ControlError, State, hello, maintain};
use adit_client::enrol::{Enrolment, enrol};
use adit_client::exit::{Exit, Failure};
use adit_client::identity::certificate::{Authority, Subject};
use adit_client::identity::{DeviceKey, Identity, Live};
use adit_protocol::token::EnrolmentToken;
use adit_protocol::{DeviceId, Role};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, version};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// What stands in between.
#[derive(Clone, Copy)]
enum Proxy {
    /// With a certificate of its own, whatever protocol is asked for.
    Terminates,
    /// The same, and it knows HTTP only.
    TerminatesHttp,
    /// TLS 1.2 only, as old ones do.
    Old,
    /// No TLS at all.
    Plain,
}

async fn proxy(kind: Proxy) -> SocketAddr {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).expect("key");
    let mut params = rcgen::CertificateParams::new(vec!["adit.example.org".to_owned()]).expect("params");
    params.distinguished_name.push(rcgen::DnType::CommonName, "Example Inspection CA");
    let certificate = params.self_signed(&key).expect("signs").der().clone();
    let versions: &[_] = if matches!(kind, Proxy::Old) { &[&version::TLS12] } else { &[&version::TLS13] };
    let mut config =
        ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(versions)
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            )
            .expect("a certificate");
    if matches!(kind, Proxy::TerminatesHttp) {
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    }
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            if matches!(kind, Proxy::Plain) {
                let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
            } else {
                let _ = acceptor.accept(stream).await;
            }
        }
    });
    address
}

fn identity(server: SocketAddr) -> Identity {
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
    let authority = Authority::new(&DeviceKey::generate().expect("key"), now).expect("root");
    let key = DeviceKey::generate().expect("key");
    let subject = Subject { device_id: DeviceId([1; 16]), role: Role::Agent, name: "a".into(), tags: vec![] };
    Identity {
        device_id: subject.device_id,
        role: subject.role,
        certificate: authority.sign_key(&key.public_key(), &subject, now).expect("signs"),
        name: subject.name,
        tags: vec![],
        servers: vec![server.to_string()],
        hosts: vec![],
        ticket_key: None,
        root: authority.certificate().clone(),
        key: Arc::new(key),
        revoked: Arc::default(),
        proxies: Default::default(),
        p2p: Default::default(),
    }
}

#[tokio::test]
async fn whatever_stands_in_between_is_named_with_its_remedy() {
    let dir = tempfile::tempdir().expect("tempdir");
    for (kind, named) in [
        (Proxy::Terminates, "Example Inspection CA"),
        (Proxy::TerminatesHttp, "NoApplicationProtocol"),
        (Proxy::Old, "ProtocolVersion"),
        (Proxy::Plain, "does not speak TLS"),
    ] {
        let server = proxy(kind).await;
        let token = EnrolmentToken {
            role: Role::Agent,
            fingerprint: [0; 32],
            secret: [0; 16],
            servers: vec![server.to_string()],
        };
        let wanted = Enrolment {
            dir: dir.path().join("a"),
            name: "a".into(),
            tags: vec![],
            hosts: vec![],
            replace: false,
            proxies: Default::default(),
        };
        let patience = Duration::from_secs(20);
        let enrolling = tokio::time::timeout(patience, enrol(&token, &wanted)).await.expect("in time");
        let identity = identity(server);
        let dialling = ControlChannel::dial(&identity, hello(vec![]));
        let dialled = tokio::time::timeout(patience, dialling).await.expect("in time");
        let errors: [Box<dyn Failure>; 2] =
            [Box::new(enrolling.expect_err("refused")), Box::new(dialled.expect_err("refused"))];
        for error in errors {
            println!("{error}");
            assert!(error.to_string().contains(named), "{error}");
            assert_eq!(error.exit(), Exit::Unreachable, "{error}");
            assert!(error.remedy().is_some_and(|remedy| remedy.contains("SNI passthrough")), "{error}");
        }
    }
}

#[tokio::test]
async fn an_alert_that_nobody_has_signed_is_no_word_of_the_mediators() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let server = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 4096]).await;
            // access_denied, as a firewall or a captive portal says it: in the clear.
            let _ = stream.write_all(&[21, 3, 3, 0, 2, 2, 49]).await;
        }
    });
    let dialled = ControlChannel::dial(&identity(server), hello(vec![])).await;
    assert!(matches!(dialled, Err(ControlError::Refused(_))), "{dialled:?}");
    let (control, _downs) = maintain(Live::new(identity(server)), || hello(vec![]), None);
    let mut state = control.state();
    let down = state.wait_for(|state| matches!(state, State::Disconnected { .. })).await.expect("runs");
    assert!(matches!(*down, State::Disconnected { exit: Exit::Refused, turned_away: false, .. }), "{down:?}");
}
