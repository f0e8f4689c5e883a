//! Real web applications beside an agent, in Chromium: through the redirector, with nothing of adit installed, and through
//! a local proxy.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use adit_tests::browser::Browser;
use adit_tests::desktop::{Desktop, Marker};
use adit_tests::lab::{Host, NatKind, Topology};
use adit_tests::process::Process;
use adit_tests::world::{AGENT, DOMAIN, PATIENCE, Setup, World};
use adit_tests::{lab_tests, poll};
use anyhow::{Context, ensure};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use serde_json::Value;
use tokio::net::TcpStream;

lab_tests!(
    novnc_through_the_redirector,
    novnc_through_a_local_proxy,
    syncthing_through_the_redirector,
    syncthing_through_a_local_proxy,
    a_page_of_another_session_gets_nothing,
);

/// How the browser gets there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Redirector,
    LocalProxy,
}

async fn novnc_through_the_redirector() -> anyhow::Result<()> {
    novnc(Way::Redirector).await
}

async fn novnc_through_a_local_proxy() -> anyhow::Result<()> {
    novnc(Way::LocalProxy).await
}

async fn syncthing_through_the_redirector() -> anyhow::Result<()> {
    syncthing(Way::Redirector).await
}

async fn syncthing_through_a_local_proxy() -> anyhow::Result<()> {
    syncthing(Way::LocalProxy).await
}

/// A desktop in a web page: its pixels come over a WebSocket.
async fn novnc(way: Way) -> anyhow::Result<()> {
    let world = world().await?;
    let host = &world.lab.agent.host;
    let desktop = Desktop::start(host).await?;
    let marker = Marker::random();
    desktop.draw(&marker, world.scratch()).await?;
    let (vnc, web) = (free_port(host)?, free_port(host)?);
    let vnc_port = vnc.to_string();
    let shares =
        ["-localhost", "-rfbport", &vnc_port, "-nopw", "-forever", "-shared", "-noxdamage", "-quiet"];
    let _x11vnc = desktop.spawn("x11vnc", &shares, world.scratch())?;
    accepts(host, vnc).await?;
    // As upstream ships it; Debian leaves out a file that the page asks for.
    let site = world.scratch().join("novnc");
    std::fs::create_dir(&site)?;
    for entry in std::fs::read_dir("/usr/share/novnc")? {
        let entry = entry?;
        std::os::unix::fs::symlink(entry.path(), site.join(entry.file_name()))?;
    }
    std::fs::write(site.join("package.json"), r#"{"version": "1.3.0"}"#)?;
    let site = site.to_string_lossy();
    let mut command = Command::new("websockify");
    command.args(["--web", &site, &format!("127.0.0.1:{web}"), &format!("127.0.0.1:{vnc}")]);
    let _websockify = host.spawn(command)?;
    accepts(host, web).await?;

    let page = "vnc.html?autoconnect=1&resize=off&reconnect=0";
    let (browser, _forward) = browse(&world, way, &format!("http://127.0.0.1:{web}/{page}"), &[]).await?;
    browser
        .until("noVNC to connect", "document.documentElement.classList.contains('noVNC_connected')")
        .await?;
    let picture = picture(&format!("novnc-{way:?}"));
    poll(PATIENCE, "the desktop's pixels in the page", async || {
        browser.screenshot(&picture).await.ok()?;
        marker.is_in_file(&world.lab.technician.host, &picture).await.ok()?.then_some(())
    })
    .await?;
    println!("the desktop shows in the page: {}", picture.display());
    fine(browser, None).await
}

/// An application with a certificate of its own, cookies that scripts read, and requests that stay open.
async fn syncthing(way: Way) -> anyhow::Result<()> {
    let world = world().await?;
    let host = &world.lab.agent.host;
    let home = world.scratch().join("syncthing");
    std::fs::create_dir(&home)?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let own = params.self_signed(&key)?;
    std::fs::write(home.join("https-cert.pem"), own.pem())?;
    std::fs::write(home.join("https-key.pem"), key.serialize_pem())?;
    let port = free_port(host)?;
    let mut command = Command::new("syncthing");
    command
        .args([
            "serve",
            "--no-browser",
            "--no-restart",
            "--no-upgrade",
            "--skip-port-probing",
            "--no-default-folder",
        ])
        .arg(format!("--home={}", home.display()))
        .arg(format!("--gui-address=https://127.0.0.1:{port}"))
        .env("HOME", &home)
        .env("STNODEFAULTFOLDER", "1");
    let _syncthing = host.spawn(command)?;
    accepts(host, port).await?;

    let certificate = home.join("https-cert.pem").to_string_lossy().into_owned();
    // Through the redirector the browser never sees it: the server knows it again.
    let trusts: &[&str] = if way == Way::LocalProxy { &[&certificate] } else { &[] };
    let (browser, _forward) = browse(&world, way, &format!("https://127.0.0.1:{port}/"), trusts).await?;
    // The page is filled with what its scripts asked for, with a token out of a cookie.
    browser.until("the device's name in the page", "document.body.innerText.includes('This Device')").await?;
    browser.until("figures in the page", "/Uptime\\s+\\S+/.test(document.body.innerText)").await?;
    let title = browser.script("return document.title").await?;
    let cookies = browser.script("return document.cookie").await?;
    println!("{title}: {cookies}");
    ensure!(cookies.as_str().is_some_and(|cookies| cookies.contains("CSRF-Token")), "{cookies}");
    // Something that changes it: a request with a body, checked for where it comes from.
    let posted = browser
        .script(
            "const token = document.cookie.split('; ').find(c => c.startsWith('CSRF-Token')).split('=');\
             const request = new XMLHttpRequest();\
             request.open('POST', 'rest/system/error', false);\
             request.setRequestHeader('X-' + token[0], token[1]);\
             request.send('adit was here'); return request.status",
        )
        .await?;
    ensure!(posted == 200, "{posted}");
    browser.until("the notice in the page", "document.body.innerText.includes('adit was here')").await?;
    let picture = picture(&format!("syncthing-{way:?}"));
    browser.screenshot(&picture).await?;
    println!("the application shows: {}", picture.display());
    // Nothing tells it of new versions here, which is what it answers itself.
    fine(browser, Some("/rest/system/upgrade")).await
}

/// Row 16, with a browser's own rules: one browser with two sessions, of one site.
async fn a_page_of_another_session_gets_nothing() -> anyhow::Result<()> {
    let world = world().await?;
    let web = adit_tests::traffic::WebServer::start(&world.lab.agent.host).await?;
    let target = format!("http://127.0.0.1:{}/", web.port);
    let a = redirect(&world, &target).await?;
    let b = redirect(&world, &target).await?;
    let browser = start(&world, &[], &[]).await?;
    browser.open(&a).await?;
    browser.open(&b).await?;
    let origin = |link: &str| link.split("/.adit").next().unwrap_or_default().to_owned();
    let of_b = origin(&b);
    let own = browser.script("return fetch('/own').then(r => r.text())").await?;
    ensure!(own.as_str().is_some_and(|own| own.starts_with("GET /own")), "{own}");
    browser.open(&format!("{}/page", origin(&a))).await?;
    let before = web.heads().len();
    for script in [
        format!(
            "return fetch('{of_b}/stolen', {{credentials: 'include'}}).then(r => r.text(), e => 'refused')"
        ),
        format!(
            "return fetch('{of_b}/stolen', {{credentials: 'include', mode: 'no-cors'}}).then(r => r.type, e => 'refused')"
        ),
        format!(
            "return fetch('{of_b}/stolen', {{method: 'POST', credentials: 'include', mode: 'no-cors', body: 'x'}}).then(r => r.type, e => 'refused')"
        ),
        format!(
            "return new Promise(done => {{ const i = new Image(); i.onload = i.onerror = e => done(e.type); i.src = '{of_b}/stolen'; document.body.append(i) }})"
        ),
        format!(
            "return new Promise(done => {{ const s = new WebSocket('{}/ws'); s.onopen = s.onerror = e => done(e.type) }})",
            of_b.replace("https", "wss")
        ),
        format!(
            "return new Promise(done => {{ const f = document.createElement('iframe'); f.onload = () => done('loaded'); f.src = '{of_b}/stolen'; document.body.append(f) }})"
        ),
    ] {
        let got = browser.script(&script).await?;
        println!("{script}: {got}");
        ensure!(!got.to_string().contains("GET /"), "{script}: {got}");
        ensure!(got != "open", "{script}: a WebSocket to another session");
    }
    // A's page asks for its own icon meanwhile.
    let to_b = format!("x-forwarded-host: {}\n", of_b.trim_start_matches("https://"));
    let mut arrived = web.heads()[before..].to_vec();
    arrived.retain(|head| head.contains(&to_b));
    ensure!(arrived.is_empty(), "a page of session A reached B's target: {arrived:?}");
    ensure!(!web.heads().iter().any(|head| head.contains("__Host-adit")), "the target saw our cookie");
    browser.close().await
}

async fn world() -> anyhow::Result<World> {
    World::up(Setup::new(Topology::new(NatKind::Cone, NatKind::Cone)).pages()).await
}

/// A browser that has opened `url` as the agent's side knows it.
async fn browse(
    world: &World,
    way: Way,
    url: &str,
    trusts: &[&str],
) -> anyhow::Result<(Browser, Option<Process>)> {
    match way {
        Way::Redirector => {
            let link = redirect(world, url).await?;
            let browser = start(world, trusts, &[]).await?;
            browser.open(&link).await?;
            Ok((browser, None))
        }
        Way::LocalProxy => {
            let data = world.data("technician");
            let forward = world.technician(&["forward", AGENT, "-D", "0", "--json", "--data", &data])?;
            let local: SocketAddr = forward
                .event(PATIENCE, "listening", 0, |event| event["local"].as_str()?.parse().ok())
                .await?;
            let proxy = format!("--proxy-server=socks5://{local}");
            let browser = start(world, trusts, &[&proxy, "--proxy-bypass-list=<-loopback>"]).await?;
            browser.open(url).await?;
            Ok((browser, Some(forward)))
        }
    }
}

/// One that trusts the server's root and finds its names.
async fn start(world: &World, trusts: &[&str], switches: &[&str]) -> anyhow::Result<Browser> {
    let root = format!("{}/web-root.pem", world.data("server"));
    let names = format!("--host-resolver-rules=MAP *.{DOMAIN} {}", world.lab.server.address);
    let (trusts, switches) = ([&[root.as_str()], trusts].concat(), [&[names.as_str()], switches].concat());
    Browser::start(&world.lab.technician.host, world.scratch(), &trusts, &switches).await
}

/// Nothing in the console but what the application itself has to say about this path.
async fn fine(browser: Browser, own: Option<&str>) -> anyhow::Result<()> {
    let mut errors = browser.console_errors().await?;
    errors.retain(|error| own.is_none_or(|own| !error.contains(own)));
    ensure!(errors.is_empty(), "errors in the console: {errors:#?}");
    browser.close().await
}

async fn redirect(world: &World, target: &str) -> anyhow::Result<String> {
    let data = world.data("technician");
    let said = world
        .technician(&["redirect", AGENT, target, "--json", "--data", &data])?
        .finish(PATIENCE)
        .await?
        .ok()?;
    let opened: Value = serde_json::from_str(&said)?;
    Ok(opened["link"].as_str().context("a link")?.to_owned())
}

/// Where a picture stays after the test.
fn picture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.png", name.to_lowercase()))
}

fn free_port(host: &Host) -> anyhow::Result<u16> {
    host.run(|| Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port()))
}

async fn accepts(host: &Host, port: u16) -> anyhow::Result<()> {
    let asking = host.task(async move {
        poll(PATIENCE, "the application to listen", async || {
            TcpStream::connect(("127.0.0.1", port)).await.ok()
        })
        .await
    })?;
    asking.await?.map(drop)
}
