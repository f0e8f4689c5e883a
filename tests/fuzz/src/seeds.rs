//! Valid messages of each kind. Keys are fixed, so that the same build makes the same bytes.

use std::time::Instant;

use adit_client::identity::certificate::{Subject, request};
use adit_protocol::api::ApiToken;
use adit_protocol::control::{
    AgentInfo, Agents, Answer, Answered, Candidates, Closed, Down, Examine, Examined, Grant, Hello,
    IceCredentials, List, LiveSession, Open, Probe, Probed, Reached, Redirect, Redirected, Refused,
    RelayTicket, RelayUp, Renew, Revocations, Serve, Served, Tickets, Tier, ToDevice, ToMediator, Up, Update,
    Web, Welcome,
};
use adit_protocol::enrol::{Granted, Outcome, Request, Response};
use adit_protocol::frame::{self, Frame, Position};
use adit_protocol::ticket::Ticket;
use adit_protocol::token::EnrolmentToken;
use adit_protocol::{DeviceId, Role, SessionId, leg as legs};
use adit_tunnel::path::{Event, IceRole, stun as stuns};
use bytes::{Bytes, BytesMut};
use prost::Message;
use stun_rs::attributes::stun::{Fingerprint, MessageIntegrity, Software, UserName};
use stun_rs::methods::BINDING;
use stun_rs::{HMACKey, MessageClass, MessageEncoderBuilder, StunMessageBuilder, TransactionId};

use super::path::{address, end};
use super::{NOW, PASSWORD, ROOT, key};

const ID: [u8; 12] = [7; 12];

pub(super) fn stun() -> Vec<Vec<u8>> {
    let session = SessionId([7; 16]);
    let handshake = |role: &str| {
        StunMessageBuilder::new(BINDING, MessageClass::Request)
            .with_transaction_id(TransactionId::from(ID))
            .with_attribute(UserName::new(format!("{session}:{role}")).expect("a name"))
            .with_attribute(MessageIntegrity::new(HMACKey::new_short_term(PASSWORD).expect("a key")))
            .build()
    };
    let named = StunMessageBuilder::new(BINDING, MessageClass::Request)
        .with_transaction_id(TransactionId::from(ID))
        .with_attribute(Software::new("a client").expect("text"))
        .with_attribute(Fingerprint::default())
        .build();
    let encode = |message| {
        let mut buffer = vec![0; 256];
        let length = MessageEncoderBuilder::default().build().encode(&mut buffer, &message).expect("fits");
        buffer.truncate(length);
        buffer
    };
    let mut old = stuns::binding_request(ID).to_vec();
    old[4..8].fill(9);
    vec![
        stuns::binding_request(ID).to_vec(),
        old,
        encode(handshake("agent")),
        encode(handshake("technician")),
        encode(named),
    ]
}

pub(super) fn path() -> Vec<Vec<u8>> {
    let now = Instant::now();
    let mut seeds = vec![];
    for (which, role, other) in
        [(0, IceRole::Controlled, IceRole::Controlling), (1, IceRole::Controlling, IceRole::Controlled)]
    {
        let mut twin = end(other, now);
        twin.add_peer_seen(now, address(role));
        twin.handle_timeout(now);
        let mut operation = |what: u8, bytes: &[u8]| {
            seeds.push([&[which, what, bytes.len() as u8], bytes].concat());
        };
        while let Some(event) = twin.poll_event() {
            if let Event::Message(message) = event {
                operation(2, &message);
            }
        }
        while let Some(sent) = twin.poll_transmit() {
            if sent.destination == address(role) {
                operation(0, &sent.payload);
            }
        }
        // A whole conversation with its real other end.
        let (hello, wait) = ([5, 0, 4, 0], [3, 10]);
        seeds.push([&[which][..], &hello, &wait, &hello, &wait, &hello, &wait, &hello].concat());
    }
    seeds
}

pub(super) fn demux() -> Vec<Vec<u8>> {
    let request = stuns::binding_request(ID);
    let mut mixed = vec![20];
    for first in [0x40, 0xc0, 0x80, 0x7f] {
        mixed.extend([first; 20]);
    }
    mixed.extend(request);
    mixed.extend([0x41; 7]);
    vec![mixed, vec![255, 0x40], [&[1][..], &[0x40; 3]].concat()]
}

fn a_ticket(leg: Role) -> Ticket {
    Ticket {
        session: SessionId([1; 16]),
        serial: 7,
        relay: DeviceId([2; 16]),
        epoch: 99,
        leg,
        holder: key(2).public_key(),
        peer: [4; 32],
        expires: NOW + 60,
        max_bytes: 1 << 40,
        max_seconds: 3600,
    }
}

fn sign(ticket: &Ticket) -> String {
    ticket.sign(&key(1).to_seed_and_public().expect("a key")).expect("signs")
}

pub(super) fn leg() -> Vec<Vec<u8>> {
    let encode = |role| {
        let ticket = a_ticket(role);
        legs::encode(&sign(&ticket), &ticket, |message| key(2).sign(message))
    };
    vec![encode(Role::Agent), encode(Role::Technician)]
}

pub(super) fn ticket() -> Vec<Vec<u8>> {
    [Role::Agent, Role::Technician].map(|role| sign(&a_ticket(role)).into_bytes()).into()
}

pub(super) fn enrolment() -> Vec<Vec<u8>> {
    let request = Request {
        protocol_version: 1,
        secret: vec![3; 16],
        csr: request(&key(3)).expect("a request"),
        name: "desk-1".into(),
        tags: vec!["site=berlin".into()],
        hosts: vec!["relay.example.org".into()],
        replace: true,
    };
    let granted = Granted {
        device_id: vec![7; 16],
        certificate: device(Role::Agent),
        root: ROOT.certificate().to_vec(),
        role: "agent".into(),
        name: "desk-1".into(),
        servers: vec!["adit.example.org:443".into()],
        tags: vec!["site=berlin".into()],
        ticket_key: vec![1; 32],
    };
    let refused = adit_protocol::enrol::Refused { message: "no".into(), unavailable: true };
    let response = |outcome| Response { outcome: Some(outcome) }.encode_to_vec();
    let framed = |body: Vec<u8>| [&(body.len() as u32).to_be_bytes()[..], &body].concat();
    vec![
        framed(request.encode_to_vec()),
        framed(response(Outcome::Granted(granted))),
        framed(response(Outcome::Refused(refused))),
    ]
}

fn device(role: Role) -> Vec<u8> {
    let tags = vec!["site=berlin".into(), "net=10.0.0.0/8".into()];
    let subject = Subject { device_id: DeviceId([7; 16]), role, name: "desk-1".into(), tags };
    ROOT.sign_key(&key(3).public_key(), &subject, NOW).expect("signs").to_vec()
}

pub(super) fn certificate() -> Vec<Vec<u8>> {
    let list = |keys: &[([u8; 32], u64)]| ROOT.revocation_list(NOW, NOW, keys).expect("signs");
    vec![
        device(Role::Agent),
        device(Role::Relay),
        list(&[]),
        list(&[([1; 32], NOW), ([2; 32], NOW - 9)]),
        request(&key(3)).expect("a request"),
    ]
}

pub(super) fn http() -> Vec<Vec<u8>> {
    [
        "\x03GET /a?b HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n",
        "\x01POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhiGET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "\x40PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX: y\r\n\r\n",
        "\x07GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

pub(super) fn text() -> Vec<Vec<u8>> {
    let token = EnrolmentToken {
        role: Role::Agent,
        fingerprint: [0x11; 32],
        secret: [0x22; 16],
        servers: vec!["adit.example.org:443".into(), "[2001:db8::1]:443".into()],
    };
    let bearer = ApiToken { device: DeviceId([7; 16]), issued: NOW - 10, expires: NOW + 10 };
    let bearer = bearer.sign(&key(1).to_seed_and_public().expect("a key")).expect("signs");
    let mut texts = vec![token.to_string(), bearer];
    texts.extend(
        [
            "127.0.0.1:3389",
            "db.internal:5432",
            "[::1]:22",
            "10.0.0.53:53/udp",
            "192.168.1.0/24:80,443,3389",
            "10.0.0.0/8:1-1024/udp",
            "[2001:db8::]/32:22",
            "13389:127.0.0.1:3389",
            "[::1]:2222:[fe80::1]:22",
            "0.0.0.0:53:10.0.0.53:53/udp",
            "https://[fd00::1]:8443/a?b=c#d",
        ]
        .map(str::to_owned),
    );
    texts.into_iter().map(String::into_bytes).collect()
}

pub(super) fn frames() -> Vec<Vec<u8>> {
    let position = Position { stream: 3, acked: 70_000, credit: 1 << 40 };
    let hello = frame::Hello {
        version: 1,
        session: SessionId([9; 16]),
        instance: 77,
        peer_instance: 0,
        positions: vec![position; 3],
    };
    let all = [
        Frame::Hello(hello),
        Frame::Open { stream: 1, target: "db.internal:5432".parse().expect("a target") },
        Frame::Window(position),
        Frame::Reset { stream: 3, code: 2 },
        Frame::Gone { stream: 3 },
        Frame::Ping(1 << 33),
        Frame::Pong(5),
        Frame::Ack(70_000),
        Frame::Nominate(1),
        Frame::Datagram { flow: 4, payload: Bytes::from_static(b"a datagram") },
        Frame::Message(Bytes::from_static(&[1, 0, 0, 0, 0, 0])),
        Frame::Goodbye { reason: "bye, ü".into() },
    ];
    let encoded = |frames: &[Frame]| {
        let mut bytes = BytesMut::from(&[3][..]);
        frames.iter().for_each(|frame| frame.encode(&mut bytes));
        bytes.to_vec()
    };
    let mut seeds: Vec<_> = all.iter().map(|frame| encoded(std::slice::from_ref(frame))).collect();
    seeds.push(encoded(&all));
    let data = |fin, held| [&frame::data_header(2, 1 << 20, 5, fin, held)[..], b"hello"].concat();
    seeds.push([&[2][..], &data(false, false), &data(false, true), &data(true, false)].concat());
    seeds.push([&[1][..], &frame::data_header(2, 9, 0, true, false)].concat());
    // A frame of a later version is skipped.
    seeds.push([&[1, 0x3f, 2, 0, 0][..], &encoded(&all[5..6])[1..]].concat());
    seeds
}

pub(super) fn control() -> Vec<Vec<u8>> {
    let id = || vec![7; 16];
    let relays = || {
        vec![RelayTicket {
            relay: id(),
            addresses: vec!["192.0.2.1:8002".into()],
            ticket: sign(&a_ticket(Role::Agent)),
            https: vec!["192.0.2.1:443".into()],
        }]
    };
    let ice = |ufrag: &str| Some(IceCredentials { ufrag: ufrag.into(), password: PASSWORD.into() });
    let grant = Grant {
        request: 7,
        session: id(),
        peer: id(),
        peer_name: "desk".into(),
        peer_key: vec![2; 32],
        local_ice: ice("abcd"),
        remote_ice: ice("efgh"),
        relays: relays(),
        expires: NOW + 60,
        targets: vec!["[::1]:22".into()],
        via: "auto".into(),
        flight: vec![22; 3],
        flight_passed: true,
        peer_comes_from: "198.51.100.7".into(),
    };
    let desk = AgentInfo {
        device: id(),
        name: "desk".into(),
        tags: vec!["site=berlin".into()],
        online: true,
        last_seen: NOW,
        software: "adit".into(),
    };
    let reached = Reached {
        what: "stun".into(),
        address: "192.0.2.1:8002".into(),
        ok: true,
        micros: 900,
        detail: "mapped".into(),
    };
    let address = || vec!["192.0.2.1:443".to_owned()];
    let web = || Some(Web { tls: true, certificate: vec![7; 32], path: "/a?b".into(), exact: true });
    let up = [
        Up::Hello(Hello {
            protocol_version: 1,
            software: "adit".into(),
            sessions: vec![LiveSession { session: id(), peer: id() }],
            instance: 9,
            revocations: NOW,
            visits: true,
        }),
        Up::List(List { request: 1 }),
        Up::Examine(Examine { request: 2, agent: "desk".into() }),
        Up::Open(Open {
            request: 7,
            agent: "desk".into(),
            targets: vec!["[::1]:22".into()],
            via: "auto".into(),
            flight: vec![22; 3],
        }),
        Up::Answer(Answer { session: id(), accepted: false, reason: "no".into(), flight: vec![] }),
        Up::Answer(Answer { session: id(), accepted: true, flight: vec![22; 3], ..Default::default() }),
        Up::Candidates(Candidates { session: id(), candidates: vec![1, 2], seen: String::new() }),
        Up::Closed(Closed { session: id(), reason: "done".into(), ..Default::default() }),
        Up::Renew(Renew { session: id() }),
        Up::RelayUp(RelayUp { epoch: 3, addresses: vec!["192.0.2.1:8002".into()], ..Default::default() }),
        Up::Tier(Tier { session: id(), tier: "direct".into(), ..Default::default() }),
        Up::Probed(Probed { request: 3, results: vec![reached.clone()] }),
        Up::Redirect(Redirect {
            request: 4,
            agent: "desk".into(),
            target: "127.0.0.1:3389".into(),
            source: "2001:db8::1".into(),
            seconds: 600,
            web: web(),
            proves: true,
        }),
        Up::Served(Served {
            request: 4,
            port: 50_000,
            host: "label.r.example".into(),
            path: "/.adit/1".into(),
            certificate: vec![7; 32],
            proof: vec![8; 16],
            ..Default::default()
        }),
    ];
    let down = [
        Down::Welcome(Welcome {
            protocol_version: 1,
            name: "desk".into(),
            no_port_mapping: true,
            ..Default::default()
        }),
        Down::Examined(Examined { request: 2, results: vec![reached.clone()] }),
        Down::Refused(Refused { request: 7, code: 1, message: "no".into() }),
        Down::Update(Update { certificate: device(Role::Agent), servers: vec!["a.example:443".into()] }),
        Down::Revocations(Revocations { list: vec![1; 40] }),
        Down::Agents(Agents { request: 1, agents: vec![desk] }),
        Down::Granted(grant.clone()),
        Down::Answered(Answered { request: 7, flight: vec![22; 3] }),
        Down::Offer(grant.clone()),
        Down::Serve(Serve {
            request: 4,
            grant: Some(grant),
            target: "127.0.0.1:3389".into(),
            source: "192.0.2.9".into(),
            seconds: 600,
            web: web(),
            proves: true,
        }),
        Down::Redirected(Redirected {
            request: 4,
            session: id(),
            address: "192.0.2.1:50000".into(),
            source: "192.0.2.9".into(),
            expires: NOW,
            link: "https://label.r.example/.adit/1".into(),
            certificate: vec![7; 32],
            proof: vec![8; 16],
        }),
        Down::Candidates(Candidates { session: id(), candidates: vec![], seen: "192.0.2.9:40000".into() }),
        Down::Closed(Closed { session: id(), reason: "revoked".into(), ..Default::default() }),
        Down::Tickets(Tickets { session: id(), relays: relays() }),
        Down::Probe(Probe {
            request: 3,
            https: address(),
            relay: address(),
            stun: address(),
            vantage: address(),
            port_mapping: true,
        }),
    ];
    let up = up.into_iter().map(|message| ToMediator { message: Some(message) }.encode_to_vec());
    let down = down.into_iter().map(|message| ToDevice { message: Some(message) }.encode_to_vec());
    up.chain(down).collect()
}
