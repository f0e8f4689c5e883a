//! The redirector's pages: a browser with nothing installed, and a web server beside an agent.

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adit_tests::lab::{Host, NatKind, Topology};
use adit_tests::process::Finished;
use adit_tests::traffic::{HttpServer, WebServer, sha256};
use adit_tests::world::{AGENT, DOMAIN, PATIENCE, Setup, World, run, start};
use adit_tests::{lab_tests, poll, within};
use anyhow::{Context, ensure};
use futures_util::{SinkExt, StreamExt};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::tungstenite::Message;

lab_tests!(
    a_link_lets_one_browser_in,
    every_kind_of_request_passes,
    on_a_server_without_a_domain_each_session_has_a_port,
    row_15_no_request_hides_in_another,
    row_16_a_page_of_one_session_gets_nothing_of_another,
    row_17_no_path_leads_anywhere_without_a_cookie,
    a_self_signed_certificate_is_known_again,
    a_page_says_which_leg_failed,
    pages_end_with_their_time,
    the_operators_own_certificate,
);

/// What everybody gets who has no business there.
const NOTHING: &str = "HTTP/1.1 404 Not Found\r\ncontent-type: text/plain; charset=utf-8\r\nx-content-type-options: nosniff\r\n\
                       cache-control: no-store\r\nstrict-transport-security: max-age=31536000\r\nconnection: close\r\n\
                       content-length: 18\r\n\r\nNothing is here.\r\n";

async fn world() -> anyhow::Result<World> {
    World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone).stranger()).pages()).await
}

async fn a_link_lets_one_browser_in() -> anyhow::Result<()> {
    let world = world().await?;
    let web = WebServer::start(&world.lab.agent.host).await?;
    let opened = redirect(&world, &format!("http://127.0.0.1:{}/first?a=b", web.port), &[]).await?;
    println!("{opened}");
    let site = Site::of(&world, &opened)?;
    ensure!(site.host.ends_with(&format!(".{DOMAIN}")) && site.link.starts_with("/.adit/"), "{opened}");
    ensure!(opened["tier"] == "redirector" && opened["certificate"].is_null(), "{opened}");

    // Wrong ones, the same for all, before and after the link was used.
    let stranger = world.lab.stranger.as_ref().context("a stranger")?;
    let technician = &world.lab.technician.host;
    let unknown = Site { host: format!("{:032x}.{DOMAIN}", 7), ..site.clone() };
    let other = Site { host: "example.org".to_owned(), ..site.clone() };
    let mut times = Vec::new();
    for round in 0..20 {
        for (what, host, site, head) in [
            ("an unknown label", technician, &unknown, format!("GET {} HTTP/1.1\r\n", site.link)),
            ("another name", technician, &other, format!("GET {} HTTP/1.1\r\n", site.link)),
            ("a wrong source", stranger, &site, format!("GET {} HTTP/1.1\r\n", site.link)),
            ("a wrong link", technician, &site, format!("GET /.adit/{:032x} HTTP/1.1\r\n", 7)),
            ("no cookie", technician, &site, "GET / HTTP/1.1\r\n".to_owned()),
            ("HEAD", technician, &site, format!("HEAD {} HTTP/1.1\r\n", site.link)),
            ("POST", technician, &site, format!("POST {} HTTP/1.1\r\n", site.link)),
            ("an upgrade", technician, &site, "GET / HTTP/1.1\r\nUpgrade: websocket\r\n".to_owned()),
            (
                "an upgrade elsewhere",
                technician,
                &other,
                "GET / HTTP/1.1\r\nUpgrade: websocket\r\n".to_owned(),
            ),
            (
                "ahead of time",
                technician,
                &site,
                format!("GET {} HTTP/1.1\r\nSec-Purpose: prefetch\r\n", site.link),
            ),
        ] {
            // It would be closed at once before long, as everybody who only tries.
            if what == "a wrong source" && round > 5 {
                continue;
            }
            let request = format!("{head}Host: {}\r\n\r\n", site.host);
            let (answer, took) = site.ask(host, request.into_bytes()).await.context(what)?;
            let expected =
                NOTHING.strip_suffix("Nothing is here.\r\n").filter(|_| what == "HEAD").unwrap_or(NOTHING);
            ensure!(answer == expected, "{what}: {answer:?}");
            if round > 0 {
                times.push((what, took));
            }
        }
    }
    ensure!(web.heads().is_empty(), "something reached the target: {:?}", web.heads());

    let jar = Jar::new(&world, &site)?;
    let entered = jar.curl(technician, &["-i", &site.url(&site.link)]).await?.ok()?;
    ensure!(entered.starts_with("HTTP/1.1 303") && entered.contains("location: /first?a=b\r\n"), "{entered}");
    let cookie = entered.lines().find(|line| line.starts_with("set-cookie: ")).context("a cookie")?;
    ensure!(
        cookie.contains("__Host-adit=") && cookie.ends_with("; Path=/; Secure; HttpOnly; SameSite=Lax"),
        "{cookie}"
    );
    let page = jar.curl(technician, &[&site.url("/first?a=b")]).await?.ok()?;
    ensure!(page.starts_with("GET /first?a=b\nhost: 127.0.0.1:"), "{page}");

    let used = format!("GET {} HTTP/1.1\r\nHost: {}\r\n\r\n", site.link, site.host);
    for round in 0..20 {
        let (answer, took) = site.ask(technician, used.clone().into_bytes()).await?;
        ensure!(answer == NOTHING, "a used link: {answer:?}");
        if round > 0 {
            times.push(("a used link", took));
        }
    }
    let stolen = format!("GET / HTTP/1.1\r\nHost: {}\r\nCookie: {}\r\n\r\n", site.host, jar.cookie()?);
    let (answer, _) = site.ask(stranger, stolen.into_bytes()).await?;
    ensure!(answer == NOTHING, "a stolen cookie: {answer:?}");

    // All take the same time: as far as a median of a busy machine can show it.
    let mut medians: Vec<(&str, Duration)> = Vec::new();
    for what in [
        "an unknown label",
        "another name",
        "a wrong source",
        "a wrong link",
        "no cookie",
        "an upgrade",
        "a used link",
    ] {
        let mut all: Vec<Duration> =
            times.iter().filter(|(of, _)| *of == what).map(|(_, took)| *took).collect();
        all.sort();
        medians.push((what, all[all.len() / 2]));
    }
    println!("{medians:?}");
    let (fastest, slowest) = (medians.iter().map(|m| m.1).min(), medians.iter().map(|m| m.1).max());
    ensure!(slowest < fastest.map(|fastest| fastest * 2 + Duration::from_millis(5)), "{medians:?}");

    let audit = std::fs::read_to_string(format!("{}/audit.jsonl", world.data("server")))?;
    ensure!(audit.lines().any(|line| line.contains("\"grant\"") && line.contains("pages of ")), "{audit}");
    ensure!(!audit.contains(&site.link), "the link is in the audit log");
    Ok(())
}

async fn every_kind_of_request_passes() -> anyhow::Result<()> {
    // Nothing but 443 is open at either end: names of their own, the redirector and the agent's relay leg are all there.
    let topology = Topology::new(NatKind::HttpsOnly, NatKind::HttpsOnly);
    let world = World::up(Setup::new(topology).pages()).await?;
    let technician = &world.lab.technician.host;
    let web = WebServer::start(&world.lab.agent.host).await?;
    let opened = redirect(&world, &format!("http://127.0.0.1:{}/", web.port), &[]).await?;
    let site = Site::of(&world, &opened)?;
    let jar = Jar::enter(&world, &site).await?;

    // What the target is told.
    let source = world.lab.technician.public_address()?;
    let headers = [
        "-H",
        "X-Forwarded-For: 1.2.3.4",
        "-H",
        "X_Real_IP: 1.2.3.4",
        "-H",
        "Connection: close, X-Once",
        "-H",
        "X-Once: 1",
    ];
    let origin = format!("Origin: https://{}", site.host);
    let page =
        jar.curl(technician, &[&headers[..], &["-H", &origin, &site.url("/a")]].concat()).await?.ok()?;
    println!("{page}");
    let told = [
        format!("host: 127.0.0.1:{}\n", web.port),
        format!("origin: http://127.0.0.1:{}\n", web.port),
        format!("x-forwarded-for: {source}\n"),
        format!("x-forwarded-host: {}\n", site.host),
        "x-forwarded-proto: https\n".to_owned(),
    ];
    ensure!(told.iter().all(|line| page.contains(line.trim_end())), "{page}");
    ensure!(!["1.2.3.4", "x-once", "adit"].iter().any(|not| page.contains(not)), "{page}");

    // Cookies of the target.
    let set = jar.curl(technician, &["-i", &site.url("/cookies")]).await?.ok()?;
    ensure!(
        set.contains("set-cookie: a=1; Path=/; Secure\r\n")
            && set.contains("set-cookie: b=2; HttpOnly; Secure\r\n"),
        "{set}"
    );
    ensure!(!set.contains("evil"), "{set}");
    let page = jar.curl(technician, &[&site.url("/a")]).await?.ok()?;
    ensure!(page.contains("cookie: a=1; b=2\n") || page.contains("cookie: b=2; a=1\n"), "{page}");
    ensure!(!page.contains("__Host"), "the target saw our cookie: {page}");

    // Where it sends a browser.
    let port = web.port;
    for (place, location) in [
        (format!("http://127.0.0.1:{port}/x?y"), "/x?y\r\n"),
        ("/x".to_owned(), "location: /x\r\n"),
        ("https://id.example.org/".to_owned(), "location: https://id.example.org/\r\n"),
    ] {
        let went = jar.curl(technician, &["-i", &site.url(&format!("/go/{place}"))]).await?.ok()?;
        ensure!(went.starts_with("HTTP/1.1 302") && went.contains(location), "{place}: {went}");
    }
    let elsewhere = jar.curl(technician, &["-i", &site.url("/go/https://127.0.0.1/")]).await?.ok()?;
    ensure!(elsewhere.contains("adit redirect agent https://127.0.0.1/"), "{elsewhere}");

    // Server-sent events come one by one.
    let script = format!(
        "curl -sSN {} | while read -r line; do [ -z \"$line\" ] || echo \"$(date +%s%N) $line\"; done",
        jar.options(&site.url("/events"))
    );
    let events = bash(technician, &script).await?.ok()?;
    let times: Vec<u64> = events.lines().filter_map(|line| line.split(' ').next()?.parse().ok()).collect();
    ensure!(times.len() == 5 && times[4] - times[0] > 300_000_000, "{events}");

    // Uploads and downloads, with a length and without.
    let bytes = 256 << 20;
    let noise = format!("head -c {bytes} /dev/zero | openssl enc -aes-128-ctr -K 00 -iv 00");
    let expected = bash(technician, &format!("{noise} | sha256sum")).await?.ok()?;
    let expected = expected.split(' ').next().unwrap_or_default();
    for how in
        ["-T -", &format!("-X POST -H 'Content-Length: {bytes}' -H 'Transfer-Encoding:' --data-binary @-")]
    {
        let started = Instant::now();
        let script = format!("{noise} | curl -sS {how} {}", jar.options(&site.url("/upload")));
        let said = bash(technician, &script).await?.ok()?;
        println!("{how}: {said}, {:.0} Mbit/s", f64::from(bytes) * 8e-6 / started.elapsed().as_secs_f64());
        ensure!(said == format!("{bytes} {expected}"), "{how}: {said}");
    }
    let files = HttpServer::start(&world.lab.agent.host).await?;
    let opened = redirect(&world, &format!("http://127.0.0.1:{}/", files.port), &[]).await?;
    let of_files = Site::of(&world, &opened)?;
    let jar_of_files = Jar::enter(&world, &of_files).await?;
    let length = 1u64 << 30;
    let started = Instant::now();
    let script =
        format!("curl -sS {} | sha256sum", jar_of_files.options(&of_files.url(&format!("/9/{length}"))));
    let sum = bash(technician, &script).await?.ok()?;
    println!("a GiB: {:.0} Mbit/s", length as f64 * 8e-6 / started.elapsed().as_secs_f64());
    ensure!(sum.starts_with(&sha256(9, length)), "SHA-256 differs");

    // A target that speaks HTTP/1.0 only: a browser can tell a whole answer from one that was cut all the same.
    let dir = world.scratch().join("old");
    std::fs::create_dir(&dir)?;
    std::fs::write(dir.join("page"), "an old page")?;
    let port =
        world.lab.agent.host.run(|| Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port()))?;
    let mut command = Command::new("python3");
    command.args(["-m", "http.server", "--bind", "127.0.0.1", "--directory"]).arg(&dir).arg(port.to_string());
    let _old = world.lab.agent.host.spawn(command)?;
    let opened = poll(PATIENCE, "an old web server", async || {
        redirect(&world, &format!("http://127.0.0.1:{port}/"), &[]).await.ok()
    })
    .await?;
    let old = Site::of(&world, &opened)?;
    let page = Jar::enter(&world, &old).await?.curl(technician, &["-i", &old.url("/page")]).await?.ok()?;
    ensure!(page.starts_with("HTTP/1.1 200") && page.ends_with("an old page"), "{page}");

    // A WebSocket, and one that a page of another origin asks for.
    for (origin, works) in
        [(format!("https://{}", site.host), true), ("https://evil.example".to_owned(), false)]
    {
        let request = jar.upgrade(&site, &origin)?;
        let (address, name, roots) = (site.address, site.host.clone(), site.roots.clone());
        let echoed = technician.task(async move {
            let stream = connect(address, &name, roots).await?;
            let uri = format!("wss://{name}/ws").parse::<hyper::Uri>()?;
            let builder = tokio_tungstenite::tungstenite::ClientRequestBuilder::new(uri);
            let builder =
                request.into_iter().fold(builder, |builder, (name, value)| builder.with_header(name, value));
            let (mut socket, _) = tokio_tungstenite::client_async(builder, stream).await?;
            let mut echoed = Vec::new();
            for message in [Message::text("hello"), Message::binary(vec![7; 1 << 20])] {
                socket.send(message).await?;
                echoed.push(socket.next().await.context("an echo")??.into_data().len());
            }
            socket.close(None).await?;
            anyhow::Ok(echoed)
        })?;
        let echoed = within(PATIENCE, "a WebSocket", async { Ok(echoed.await?) }).await?;
        println!("a WebSocket from {origin}: {echoed:?}");
        match works {
            true => ensure!(echoed? == [5, 1 << 20]),
            false => ensure!(echoed.is_err()),
        }
    }
    ensure!(
        web.heads().iter().filter(|head| head.contains("/ws\n")).count() == 1,
        "a strange page got through"
    );
    Ok(())
}

/// Without a wildcard name: the same, on a port; and cookies that sessions of one host cannot share.
async fn on_a_server_without_a_domain_each_session_has_a_port() -> anyhow::Result<()> {
    let topology = Topology::new(NatKind::Cone, NatKind::Cone).stranger();
    let world = World::up(Setup::new(topology).redirector()).await?;
    let technician = &world.lab.technician.host;
    let web = WebServer::start(&world.lab.agent.host).await?;
    let target = format!("http://127.0.0.1:{}/", web.port);
    let (a, b) = (redirect(&world, &target, &[]).await?, redirect(&world, &target, &[]).await?);
    println!("{a}");
    let (a, b) = (Site::of(&world, &a)?, Site::of(&world, &b)?);
    ensure!(a.address.port() >= 49_152 && a.address.port() != b.address.port());
    // One browser, and so one jar.
    let jar = Jar::new(&world, &a)?;
    for site in [&a, &b] {
        let entered = jar.curl(technician, &["-i", &site.url(&site.link)]).await?.ok()?;
        ensure!(entered.starts_with("HTTP/1.1 303"), "{entered}");
        // Another session may have had this port; what this one keeps stays when the browser comes back to the link.
        ensure!(entered.contains("clear-site-data: \"cache\", \"storage\"\r\n"), "{entered}");
        let again = jar.curl(technician, &["-i", &site.url(&site.link)]).await?.ok()?;
        ensure!(again.starts_with("HTTP/1.1 303") && !again.contains("clear-site-data"), "{again}");
    }
    // A worker would outlive its session.
    let before = web.heads().len();
    let worker =
        jar.curl(technician, &["-i", "-H", "Service-Worker: script", &a.url("/worker.js")]).await?.ok()?;
    ensure!(worker.starts_with("HTTP/1.1 404") && web.heads().len() == before, "{worker}");
    let set = jar.curl(technician, &["-i", &a.url("/cookies")]).await?.ok()?;
    ensure!(set.contains("-a=1; Path=/; Secure; HttpOnly\r\n") && !set.contains("evil"), "{set}");
    let page = jar.curl(technician, &[&a.url("/a")]).await?.ok()?;
    ensure!(
        page.contains("cookie: a=1; b=2\n")
            && page.contains(&format!("x-forwarded-host: {}\n", a.authority())),
        "{page}"
    );
    let page = jar.curl(technician, &[&b.url("/b")]).await?.ok()?;
    ensure!(page.starts_with("GET /b") && !page.contains("cookie:"), "session B got cookies of A: {page}");
    // From elsewhere the port is closed at once.
    let stranger = world.lab.stranger.as_ref().context("a stranger")?;
    let request = format!("GET / HTTP/1.1\r\nHost: {}\r\nCookie: {}\r\n\r\n", a.authority(), jar.cookie()?);
    ensure!(a.ask(stranger, request.into_bytes()).await.is_err(), "a stranger got an answer");
    Ok(())
}

async fn row_15_no_request_hides_in_another() -> anyhow::Result<()> {
    let world = world().await?;
    let technician = &world.lab.technician.host;
    let web = WebServer::start(&world.lab.agent.host).await?;
    let opened = redirect(&world, &format!("http://127.0.0.1:{}/", web.port), &[]).await?;
    let site = Site::of(&world, &opened)?;
    let jar = Jar::enter(&world, &site).await?;
    let head = format!("Host: {}\r\nCookie: {}\r\n", site.host, jar.cookie()?);
    let hidden = format!("GET /hidden HTTP/1.1\r\n{head}\r\n");
    let post = format!("POST /outer HTTP/1.1\r\n{head}");
    let upgrade = format!(
        "GET /ws HTTP/1.1\r\n{head}Origin: https://{}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
        site.host
    );
    let long = "x".repeat(40_000);
    let corpus = [
        (
            "CL and TE",
            format!("{post}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{hidden}"),
        ),
        (
            "TE and CL",
            format!(
                "{post}Transfer-Encoding: chunked\r\nContent-Length: {}\r\n\r\n0\r\n\r\n{hidden}",
                hidden.len() + 5
            ),
        ),
        ("two CL", format!("{post}Content-Length: 0\r\nContent-Length: {}\r\n\r\n{hidden}", hidden.len())),
        ("two equal CL", format!("{post}Content-Length: 0\r\nContent-Length: 0\r\n\r\n{hidden}")),
        ("CL list", format!("{post}Content-Length: 0, 0\r\n\r\n{hidden}")),
        ("CL with a sign", format!("{post}Content-Length: +0\r\n\r\n{hidden}")),
        ("CL in hex", format!("{post}Content-Length: 0x0\r\n\r\n{hidden}")),
        ("space before the colon", format!("{post}Content-Length : {}\r\n\r\n{hidden}", hidden.len())),
        ("folded", format!("{post}X: y\r\n Content-Length: 9\r\n\r\n{hidden}")),
        ("TE in disguise", format!("{post}Transfer-Encoding: xchunked\r\n\r\n{hidden}")),
        (
            "TE twice",
            format!(
                "{post}Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{hidden}"
            ),
        ),
        ("TE with a tab", format!("{post}Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n{hidden}")),
        ("bare LF", format!("{post}X: y\nContent-Length: 0\r\n\r\n{hidden}")),
        ("bare LF at the end", format!("POST /outer HTTP/1.1\nHost: {}\n\n{hidden}", site.host)),
        ("bare CR", format!("{post}X: y\rContent-Length: 9\r\n\r\n{hidden}")),
        ("NUL", format!("{post}X: \0\r\n\r\n{hidden}")),
        ("two hosts", format!("{post}Host: other\r\n\r\n{hidden}")),
        ("no host", "GET /outer HTTP/1.1\r\n\r\n".to_owned()),
        ("HTTP/1.0", format!("GET /outer HTTP/1.0\r\n{head}\r\n{hidden}")),
        ("HTTP/0.9", "GET /outer\r\n".to_owned()),
        ("absolute", format!("GET http://127.0.0.1/outer HTTP/1.1\r\n{head}\r\n")),
        ("CONNECT", format!("CONNECT 127.0.0.1:22 HTTP/1.1\r\n{head}\r\n")),
        ("TRACE", format!("TRACE / HTTP/1.1\r\n{head}\r\n")),
        ("HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned()),
        ("early upgrade", format!("{upgrade}\r\n{hidden}")),
        ("upgrade with a body", format!("{upgrade}Content-Length: {}\r\n\r\n{hidden}", hidden.len())),
        ("long line", format!("GET /{long} HTTP/1.1\r\n{head}\r\n")),
        ("long field", format!("GET /outer HTTP/1.1\r\n{head}X: {long}\r\n\r\n")),
        ("many fields", format!("GET /outer HTTP/1.1\r\n{head}{}\r\n", "X: y\r\n".repeat(200))),
        ("garbage", "\x16\x03\x01\x02\r\n\r\n".to_owned()),
    ];
    let before = web.heads().len();
    for (what, request) in &corpus {
        let (answer, _) = site.ask(technician, request.clone().into_bytes()).await.context(*what)?;
        ensure!(
            answer.starts_with("HTTP/1.1 400 ") && answer.matches("HTTP/1.1").count() == 1,
            "{what}: {answer:?}"
        );
    }
    ensure!(web.heads().len() == before, "reached the target: {:?}", &web.heads()[before..]);

    // Bodies: the head is fine and may arrive, even after the answer; what is hidden behind does not.
    for (what, body) in [
        ("chunk with a bare LF", format!("5\nhello\r\n0\r\n\r\n{hidden}")),
        ("chunk with an extension", format!("5;x=y\r\nhello\r\n0\r\n\r\n{hidden}")),
        ("chunk with a sign", format!("+5\r\nhello\r\n0\r\n\r\n{hidden}")),
        ("chunk that is too long", format!("5\r\nhello!\r\n0\r\n\r\n{hidden}")),
        ("chunk of 2^64", format!("10000000000000005\r\nhello\r\n0\r\n\r\n{hidden}")),
        ("length behind the body", format!("5\r\nhello\r\n0\r\nContent-Length: 5\r\n\r\n{hidden}")),
    ] {
        let request = format!("POST /body HTTP/1.1\r\n{head}Transfer-Encoding: chunked\r\n\r\n{body}");
        let (answer, _) = site.ask(technician, request.into_bytes()).await.context(what)?;
        println!("{what}: {:?}", answer.lines().next());
        ensure!(
            answer.starts_with("HTTP/1.1 400 ") && answer.matches("HTTP/1.1").count() == 1,
            "{what}: {answer:?}"
        );
    }
    // And what is fine passes, one behind the other, too.
    let both = format!(
        "POST /fine HTTP/1.1\r\n{head}Content-Length: 2\r\n\r\nhi\
         GET /behind HTTP/1.1\r\n{head}Connection: close\r\n\r\n"
    );
    let (answer, _) = site.ask(technician, both.into_bytes()).await?;
    ensure!(answer.matches("HTTP/1.1 200").count() == 2, "{answer}");
    let heads = web.heads().split_off(before);
    let at = |path: &str| heads.iter().filter(|head| head.contains(path)).count();
    ensure!(at("/fine") == 1 && at("/behind") == 1 && at("/body") <= 6, "{heads:?}");
    ensure!(at("/body") + 2 == heads.len(), "something else reached the target: {heads:?}");
    println!(
        "{} requests and 6 bodies: 400 each, none at the target but the heads of {} of these bodies",
        corpus.len(),
        at("/body")
    );
    Ok(())
}

async fn row_16_a_page_of_one_session_gets_nothing_of_another() -> anyhow::Result<()> {
    let world = world().await?;
    let technician = &world.lab.technician.host;
    let web = WebServer::start(&world.lab.agent.host).await?;
    let target = format!("http://127.0.0.1:{}/", web.port);
    let (a, b) = (redirect(&world, &target, &[]).await?, redirect(&world, &target, &[]).await?);
    let (a, b) = (Site::of(&world, &a)?, Site::of(&world, &b)?);
    let (of_a, of_b) = (Jar::enter(&world, &a).await?, Jar::enter(&world, &b).await?);
    // The cookie of A at B, and B's name over a connection to A.
    for (site, host, cookie) in [(&b, &b.host, of_a.cookie()?), (&a, &b.host, of_b.cookie()?)] {
        let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nCookie: {cookie}\r\n\r\n");
        let (answer, _) = site.ask(technician, request.into_bytes()).await?;
        ensure!(answer == NOTHING, "{answer:?}");
    }
    // What a browser sends along when a page of A asks for something of B: both are of one site.
    let before = web.heads().len();
    for (method, fields) in [
        ("GET", "Sec-Fetch-Site: same-site\r\nSec-Fetch-Mode: cors\r\nSec-Fetch-Dest: empty\r\n"),
        ("GET", "Sec-Fetch-Site: same-site\r\nSec-Fetch-Mode: no-cors\r\nSec-Fetch-Dest: image\r\n"),
        ("GET", "Sec-Fetch-Site: same-site\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: iframe\r\n"),
        ("POST", "Sec-Fetch-Site: same-site\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: document\r\n"),
        ("POST", "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: document\r\n"),
        ("POST", ""),
        ("GET", "Connection: Upgrade\r\nUpgrade: websocket\r\n"),
    ] {
        let origin = &a.host;
        let request = format!(
            "{method} / HTTP/1.1\r\nHost: {}\r\nCookie: {}\r\nOrigin: https://{origin}\r\n{fields}\r\n",
            b.host,
            of_b.cookie()?
        );
        let (answer, _) = b.ask(technician, request.clone().into_bytes()).await.context(request)?;
        ensure!(answer == NOTHING, "{method} {fields}: {answer:?}");
    }
    ensure!(web.heads().len() == before, "a page of A reached B's target");
    Ok(())
}

async fn row_17_no_path_leads_anywhere_without_a_cookie() -> anyhow::Result<()> {
    let world = world().await?;
    let technician = &world.lab.technician.host;
    let web = WebServer::start(&world.lab.agent.host).await?;
    let opened = redirect(&world, &format!("http://127.0.0.1:{}/", web.port), &[]).await?;
    let site = Site::of(&world, &opened)?;
    let bare = Site { host: world.lab.server.address.to_string(), ..site.clone() };
    let mut tried = 0;
    for route in [
        "/",
        "/control",
        "/relay",
        "/metrics",
        "/healthz",
        "/readyz",
        "/.adit/",
        "/setup",
        "/admin",
        "/api/v1/agents",
        "/api/v1/redirect",
        &site.link[..30],
    ] {
        for path in [
            route.to_owned(),
            format!("{route}/x"),
            format!("{route}%2f"),
            format!("{route}/%2e%2e/"),
            format!("/{route}"),
            format!("{route}//"),
            format!("/x/..;{route}"),
            format!("/..{route}"),
            format!("{route};x"),
            format!("{route}?x"),
            format!("{route}%00"),
            route.to_uppercase(),
            route.replace("/.adit", "/%2eadit"),
            format!("{route}\\"),
        ] {
            for (site, method) in [(&site, "GET"), (&bare, "GET"), (&bare, "POST")] {
                let request = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n\r\n", site.host);
                let (answer, _) =
                    site.ask(technician, request.into_bytes()).await.with_context(|| path.clone())?;
                ensure!(answer == NOTHING, "{method} {path}: {answer:?}");
                tried += 1;
            }
        }
    }
    println!("{tried} requests without a cookie: 404 each, in the same bytes");
    ensure!(web.heads().is_empty(), "{:?}", web.heads());
    Ok(())
}

async fn a_self_signed_certificate_is_known_again() -> anyhow::Result<()> {
    let world = world().await?;
    let technician = &world.lab.technician.host;
    let web = WebServer::start_tls(&world.lab.agent.host, 0).await?;
    let port = web.port;
    let target = format!("https://127.0.0.1:{port}/");
    let first = try_redirect(&world, &target, &[]).await?;
    let opened: Value = serde_json::from_str(&first.stdout)?;
    println!("{}", first.stderr);
    let shown = web.certificate.clone().context("a certificate")?;
    ensure!(opened["certificate"] == shown.as_str() && first.stderr.contains(&shown), "{first:?}");
    ensure!(first.stderr.contains("for the first time"), "{first:?}");
    let site = Site::of(&world, &opened)?;
    let jar = Jar::enter(&world, &site).await?;
    let page = jar.curl(technician, &[&site.url("/a")]).await?.ok()?;
    ensure!(page.starts_with("GET /a\n"), "{page}");
    // Known: nothing more to say.
    let second = try_redirect(&world, &target, &[]).await?;
    ensure!(second.code == 0 && !second.stderr.contains("certificate"), "{second:?}");

    // Somebody else is in its place.
    web.stop().await;
    let web = WebServer::start_tls(&world.lab.agent.host, port).await?;
    let other = web.certificate.clone().context("a certificate")?;
    let page = poll(PATIENCE, "the kept connections to end", async || {
        let page = jar.curl(technician, &["-i", &site.url("/b")]).await.ok()?.stdout;
        page.contains("is known").then_some(page)
    })
    .await?;
    println!("{page}");
    ensure!(page.starts_with("HTTP/1.1 502") && page.contains(&other), "{page}");
    ensure!(web.heads().is_empty(), "asked all the same: {:?}", web.heads());
    let refused = try_redirect(&world, &target, &[]).await?;
    println!("{}", refused.stderr);
    ensure!(refused.code == 3 && refused.stderr.contains(&format!("--certificate {other}")), "{refused:?}");
    let accepted = try_redirect(&world, &target, &["--certificate", &other]).await?;
    ensure!(accepted.code == 0 && accepted.stderr.contains("is known from now on"), "{accepted:?}");
    ensure!(try_redirect(&world, &target, &[]).await?.code == 0, "not known");
    Ok(())
}

async fn a_page_says_which_leg_failed() -> anyhow::Result<()> {
    let mut world = world().await?;
    let technician = &world.lab.technician.host.clone();
    for (target, code, said) in [
        ("http://127.0.0.1:9/", 4, "127.0.0.1:9: the target refused the connection"),
        ("http://198.51.100.1/", 3, "198.51.100.1:80: the agent's allow list"),
    ] {
        let failed = try_redirect(&world, target, &[]).await?;
        println!("{}", failed.stderr);
        ensure!(
            failed.code == code && failed.stderr.contains(said) && failed.stderr.lines().count() <= 2,
            "{failed:?}"
        );
    }
    let (web, other) =
        (WebServer::start(&world.lab.agent.host).await?, WebServer::start(&world.lab.agent.host).await?);
    let opened = redirect(&world, &format!("http://127.0.0.1:{}/", web.port), &[]).await?;
    let site = Site::of(&world, &opened)?;
    let jar = Jar::enter(&world, &site).await?;
    jar.curl(technician, &[&site.url("/")]).await?.ok()?;
    // One that waits for an answer when the agent dies.
    let opened = redirect(&world, &format!("http://127.0.0.1:{}/", other.port), &[]).await?;
    let of_other = Site::of(&world, &opened)?;
    let jar_of_other = Jar::enter(&world, &of_other).await?;
    let mut command = Command::new("curl");
    command.args(["-sSi", "--max-time", "60"]).args(&jar_of_other.options).arg(of_other.url("/silent"));
    let waits = technician.spawn(command)?;
    poll(PATIENCE, "a request that waits", async || (!other.heads().is_empty()).then_some(())).await?;
    web.stop().await;
    let page = jar.curl(technician, &["-i", "-H", "Accept: text/html", &site.url("/")]).await?.ok()?;
    println!("{page}");
    ensure!(
        page.starts_with("HTTP/1.1 502") && page.contains("the server to the agent agent: <b>works"),
        "{page}"
    );
    ensure!(page.contains(": <b>failed") && page.contains("the target refused the connection"), "{page}");
    // The page is read also by who has something large to say.
    let upload = format!(
        "head -c 33554432 /dev/zero | curl -sSi -H 'Expect:' -T - {}",
        jar.options(&site.url("/upload"))
    );
    // The shell minds that curl does not take all of it.
    let page = bash(technician, &upload).await?.stdout;
    ensure!(page.contains("HTTP/1.1 502") && page.contains("the target refused the connection"), "{page}");
    // The browser that used the link may come back to it.
    let again = jar.curl(technician, &["-i", &site.url(&site.link)]).await?.ok()?;
    ensure!(again.starts_with("HTTP/1.1 303"), "{again}");
    world.agent.kill().await?;
    let page = jar.curl(technician, &["-i", "-H", "Accept: text/html", &site.url("/")]).await?.ok()?;
    println!("{page}");
    ensure!(
        page.starts_with("HTTP/1.1 502") && page.contains("the server to the agent agent: <b>failed"),
        "{page}"
    );
    let waited = waits.finish(Duration::from_secs(40)).await?.ok()?;
    println!("{waited}");
    ensure!(waited.starts_with("HTTP/1.1 502") && waited.contains("the agent cannot be reached"), "{waited}");
    Ok(())
}

async fn pages_end_with_their_time() -> anyhow::Result<()> {
    let world = world().await?;
    let technician = &world.lab.technician.host;
    let web = WebServer::start(&world.lab.agent.host).await?;
    let target = format!("http://127.0.0.1:{}/", web.port);
    let opened = redirect(&world, &target, &["--ttl", "8s"]).await?;
    let site = Site::of(&world, &opened)?;
    let jar = Jar::enter(&world, &site).await?;
    let started = Instant::now();
    // A download that would go on for ever is cut, and not as if it were whole.
    let cut = jar.curl(technician, &[&site.url("/slow")]).await?;
    println!("after {:?}: {cut:?}", started.elapsed());
    ensure!(cut.code != 0 && cut.stdout == "x" && started.elapsed() < Duration::from_secs(12), "{cut:?}");
    let request = format!("GET / HTTP/1.1\r\nHost: {}\r\nCookie: {}\r\n\r\n", site.host, jar.cookie()?);
    let (answer, _) = site.ask(technician, request.into_bytes()).await?;
    ensure!(answer == NOTHING, "{answer:?}");
    // A grant that is taken away ends them, too.
    let site = Site::of(&world, &redirect(&world, &target, &[]).await?)?;
    let jar = Jar::enter(&world, &site).await?;
    run(
        &world.lab.server,
        "adit-mediator",
        &["deny", "--data", &world.data("server"), "technician", "--all"],
    )
    .await?;
    let request = format!("GET / HTTP/1.1\r\nHost: {}\r\nCookie: {}\r\n\r\n", site.host, jar.cookie()?);
    poll(Duration::from_secs(5), "the pages to be gone", async || {
        let (answer, _) = site.ask(technician, request.clone().into_bytes()).await.ok()?;
        (answer == NOTHING).then_some(())
    })
    .await
}

/// From an authority of the operator's, for the wildcard name.
async fn the_operators_own_certificate() -> anyhow::Result<()> {
    let mut world = world().await?;
    let (authority, key) = (KeyPair::generate()?, KeyPair::generate()?);
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "the operator's authority");
    let root = params.self_signed(&authority)?;
    let names = vec![format!("*.{DOMAIN}"), world.lab.server.address.to_string()];
    let own = CertificateParams::new(names)?.signed_by(&key, &Issuer::from_params(&params, &authority))?;
    let file = |name: &str| world.scratch().join(name).to_string_lossy().into_owned();
    let (root_file, cert, key_file) = (file("root.pem"), file("cert.pem"), file("key.pem"));
    std::fs::write(&root_file, root.pem())?;
    std::fs::write(&cert, own.pem())?;
    std::fs::write(&key_file, key.serialize_pem())?;
    let config = format!("{}/config.toml", world.data("server"));
    let text = std::fs::read_to_string(&config)?
        .replace("# cert = \"/etc/ssl/adit/fullchain.pem\"", &format!("cert = {cert:?}"))
        .replace("# key = \"/etc/ssl/adit/privkey.pem\"", &format!("key = {key_file:?}"));
    ensure!(text.contains(&cert), "no such setting: {text}");
    std::fs::write(&config, text)?;
    world.mediator.kill().await?;
    world.mediator = start(&world.lab.server, "adit-mediator", &["run", "--data", &world.data("server")])?;
    world.agent_online().await?;
    let web = WebServer::start(&world.lab.agent.host).await?;
    let opened = redirect(&world, &format!("http://127.0.0.1:{}/", web.port), &[]).await?;
    let site = Site { root: root_file, ..Site::of(&world, &opened)? };
    let page =
        Jar::enter(&world, &site).await?.curl(&world.lab.technician.host, &[&site.url("/a")]).await?.ok()?;
    ensure!(page.starts_with("GET /a\n"), "{page}");
    Ok(())
}

/// Where a session's pages are.
#[derive(Clone)]
struct Site {
    /// Its host name, or the server's address.
    host: String,
    address: std::net::SocketAddr,
    /// Path of the link.
    link: String,
    /// What browsers trust.
    root: String,
    roots: Arc<rustls::RootCertStore>,
}

impl Site {
    fn of(world: &World, opened: &Value) -> anyhow::Result<Self> {
        let link = opened["link"].as_str().context("a link")?;
        let (authority, path) =
            link.strip_prefix("https://").and_then(|rest| rest.split_once('/')).context("https")?;
        let (host, port) = authority.split_once(':').unwrap_or((authority, "443"));
        let root = format!("{}/web-root.pem", world.data("server"));
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&root)?)?;
        Ok(Self {
            host: host.to_owned(),
            address: (world.lab.server.address, port.parse()?).into(),
            link: format!("/{path}"),
            root,
            roots: Arc::new(roots),
        })
    }

    fn authority(&self) -> String {
        match self.address.port() {
            443 => self.host.clone(),
            port => format!("{}:{port}", self.host),
        }
    }

    fn url(&self, path: &str) -> String {
        format!("https://{}{path}", self.authority())
    }

    /// Sends these bytes on a connection of their own and returns all that comes back, and how long that took.
    async fn ask(&self, host: &Host, request: Vec<u8>) -> anyhow::Result<(String, Duration)> {
        let (address, roots) = (self.address, self.roots.clone());
        // Names that no certificate is for: the server shows the one that it has.
        let name = if self.host.ends_with(DOMAIN) || self.host.parse::<std::net::IpAddr>().is_ok() {
            self.host.clone()
        } else {
            format!("x.{DOMAIN}")
        };
        let asked = host.task(async move {
            let mut stream = connect(address, &name, roots).await?;
            let started = Instant::now();
            stream.write_all(&request).await?;
            let mut answer = Vec::new();
            let read = stream.read_to_end(&mut answer).await;
            read.with_context(|| format!("after {:?}", String::from_utf8_lossy(&answer)))?;
            anyhow::Ok((String::from_utf8_lossy(&answer).into_owned(), started.elapsed()))
        })?;
        within(PATIENCE, "an answer", async { asked.await? }).await
    }
}

async fn connect(
    address: std::net::SocketAddr,
    name: &str,
    roots: Arc<rustls::RootCertStore>,
) -> anyhow::Result<TlsStream<TcpStream>> {
    let config =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
    let stream = TcpStream::connect(address).await?;
    Ok(TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(name.to_owned())?, stream).await?)
}

/// A browser's cookies, kept by curl.
struct Jar {
    file: String,
    /// curl's options.
    options: Vec<String>,
}

impl Jar {
    fn new(world: &World, site: &Site) -> anyhow::Result<Self> {
        let file =
            world.scratch().join(format!("jar-{:08x}", rand::random::<u32>())).to_string_lossy().into_owned();
        let to = format!("::{}:", site.address.ip());
        let options = ["--cacert", &site.root, "--connect-to", &to, "-c", &file, "-b", &file];
        Ok(Self { options: options.map(str::to_owned).to_vec(), file })
    }

    /// Uses the link.
    async fn enter(world: &World, site: &Site) -> anyhow::Result<Self> {
        let jar = Self::new(world, site)?;
        let entered = jar.curl(&world.lab.technician.host, &["-i", &site.url(&site.link)]).await?.ok()?;
        ensure!(entered.starts_with("HTTP/1.1 303"), "{entered}");
        Ok(jar)
    }

    async fn curl(&self, host: &Host, arguments: &[&str]) -> anyhow::Result<Finished> {
        let mut command = Command::new("curl");
        command.args(["-sS", "--max-time", "60"]).args(&self.options).args(arguments);
        host.spawn(command)?.finish(Duration::from_secs(70)).await
    }

    /// Options and URL for a shell.
    fn options(&self, url: &str) -> String {
        format!("{} '{url}'", self.options.join(" "))
    }

    /// `NAME=VALUE` of the cookie that lets in.
    fn cookie(&self) -> anyhow::Result<String> {
        let text = std::fs::read_to_string(&self.file)?;
        let line = text.lines().find(|line| line.contains("__Host-adit")).context("a cookie")?;
        let mut fields = line.split('\t').skip(5);
        Ok(format!("{}={}", fields.next().unwrap_or_default(), fields.next().unwrap_or_default()))
    }

    /// The headers of a WebSocket.
    fn upgrade(&self, site: &Site, origin: &str) -> anyhow::Result<Vec<(String, String)>> {
        let _ = site;
        Ok(vec![("Cookie".to_owned(), self.cookie()?), ("Origin".to_owned(), origin.to_owned())])
    }
}

async fn bash(host: &Host, script: &str) -> anyhow::Result<Finished> {
    let mut command = Command::new("bash");
    command.args(["-c", &format!("set -o pipefail; {script}")]);
    host.spawn(command)?.finish(Duration::from_secs(150)).await
}

async fn try_redirect(world: &World, target: &str, options: &[&str]) -> anyhow::Result<Finished> {
    let data = world.data("technician");
    let arguments = [&["redirect", AGENT, target, "--json", "--data", &data], options].concat();
    world.technician(&arguments)?.finish(PATIENCE).await
}

async fn redirect(world: &World, target: &str, options: &[&str]) -> anyhow::Result<Value> {
    Ok(serde_json::from_str(&try_redirect(world, target, options).await?.ok()?)?)
}
