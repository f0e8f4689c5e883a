//! Real HTTP proxies, as companies have them: squid and tinyproxy.

use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair};
use tempfile::TempDir;
use tokio::net::TcpStream;

use crate::lab::Host;
use crate::poll;
use crate::process::Process;

/// Where they listen.
pub const PORT: u16 = 3128;
/// Name and password that they take.
const LOGIN: (&str, &str) = ("anna", "Geheim-42");
const REALM: &str = "staff";
/// Whose certificates a proxy shows that breaks TLS open.
pub const AUTHORITY: &str = "Example Corp Web Filter";

/// A kind of proxy. All let CONNECT through to port 443 only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyKind {
    /// squid, for everybody.
    Squid,
    /// squid, with a password in the clear (RFC 7617).
    SquidBasic,
    /// squid, with a digest of the password (RFC 7616).
    SquidDigest,
    /// squid, which opens TLS and closes it again with certificates of its own.
    SquidOpensTls,
    /// tinyproxy, for everybody.
    Tinyproxy,
    /// tinyproxy, with a password in the clear.
    TinyproxyBasic,
}

/// A running proxy.
pub struct ProxyServer {
    /// For `HTTPS_PROXY`, with name and password.
    pub url: String,
    /// The same without them.
    pub bare_url: String,
    process: Process,
    dir: TempDir,
}

impl ProxyServer {
    /// Starts it on `host`, and waits until it accepts connections.
    pub async fn start(host: &Host, kind: ProxyKind) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("adit-proxy-").tempdir()?;
        let process = match kind {
            ProxyKind::Tinyproxy | ProxyKind::TinyproxyBasic => tinyproxy(host, kind, &dir)?,
            _ => squid(host, kind, &dir).await?,
        };
        let address = (host.address, PORT);
        let asking = host.task(async move {
            poll(Duration::from_secs(20), "the proxy to listen", async || {
                TcpStream::connect(address).await.ok()
            })
            .await
        })?;
        let log = || std::fs::read_to_string(dir.path().join("cache.log")).unwrap_or_default();
        asking.await?.with_context(log)?;
        let (user, password) = LOGIN;
        let bare_url = format!("http://{}:{PORT}", host.address);
        let url = match kind {
            ProxyKind::SquidBasic | ProxyKind::SquidDigest | ProxyKind::TinyproxyBasic => {
                format!("http://{user}:{password}@{}:{PORT}", host.address)
            }
            _ => bare_url.clone(),
        };
        Ok(Self { url, bare_url, process, dir })
    }

    /// What it has written down about requests.
    pub fn log(&self) -> String {
        ["access.log", "tinyproxy.log"]
            .map(|name| std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default())
            .concat()
    }

    /// Kills it.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        self.process.kill().await
    }
}

fn tinyproxy(host: &Host, kind: ProxyKind, dir: &TempDir) -> anyhow::Result<Process> {
    let at = dir.path().display();
    let (user, password) = LOGIN;
    let login = match kind {
        ProxyKind::TinyproxyBasic => format!("BasicAuth {user} {password}\n"),
        _ => String::new(),
    };
    let config = dir.path().join("tinyproxy.conf");
    std::fs::write(
        &config,
        format!(
            "Port {PORT}\nTimeout 600\nMaxClients 500\nConnectPort 443\nLogFile \"{at}/tinyproxy.log\"\n{login}"
        ),
    )?;
    let mut command = Command::new("tinyproxy");
    command.arg("-d").arg("-c").arg(config);
    host.spawn(command)
}

async fn squid(host: &Host, kind: ProxyKind, dir: &TempDir) -> anyhow::Result<Process> {
    let at = dir.path().display();
    let (user, password) = LOGIN;
    let scheme = match kind {
        ProxyKind::SquidBasic => {
            let hash = said(host, "openssl", &["passwd", "-apr1", password]).await?;
            std::fs::write(dir.path().join("passwords"), format!("{user}:{hash}\n"))?;
            format!(
                "auth_param basic program /usr/lib/squid/basic_ncsa_auth {at}/passwords\n\
                 auth_param basic realm {REALM}\n"
            )
        }
        ProxyKind::SquidDigest => {
            let text = dir.path().join("text");
            std::fs::write(&text, format!("{user}:{REALM}:{password}"))?;
            let sum = said(host, "md5sum", &[&text.to_string_lossy()]).await?;
            let sum = sum.split_whitespace().next().context("a sum")?.to_owned();
            std::fs::write(dir.path().join("passwords"), format!("{user}:{REALM}:{sum}\n"))?;
            format!(
                "auth_param digest program /usr/lib/squid/digest_file_auth -c {at}/passwords\n\
                 auth_param digest realm {REALM}\n"
            )
        }
        _ => String::new(),
    };
    let permitted =
        if scheme.is_empty() { "" } else { "acl known proxy_auth REQUIRED\nhttp_access deny !known\n" };
    let listen = match kind {
        ProxyKind::SquidOpensTls => {
            authority(dir)?;
            let made = format!("{at}/made");
            said(host, "/usr/lib/squid/security_file_certgen", &["-c", "-s", &made, "-M", "4MB"]).await?;
            format!(
                "http_port {PORT} ssl-bump tls-cert={at}/authority.pem generate-host-certificates=on\n\
                 sslcrtd_program /usr/lib/squid/security_file_certgen -s {made} -M 4MB\n\
                 ssl_bump bump all\ntls_outgoing_options flags=DONT_VERIFY_PEER\nsslproxy_cert_error allow all\n"
            )
        }
        _ => format!("http_port {PORT}\n"),
    };
    let config = dir.path().join("squid.conf");
    std::fs::write(
        &config,
        format!(
            "{listen}{scheme}visible_hostname proxy.example\nacl https port 443\nhttp_access deny !https\n{permitted}\
             http_access allow all\ncache deny all\npid_filename none\nnetdb_filename none\ncoredump_dir {at}\n\
             access_log stdio:{at}/access.log\ncache_log {at}/cache.log\nshutdown_lifetime 1 second\n\
             pinger_enable off\nmax_filedescriptors 1024\nconnect_timeout 2 seconds\nforward_timeout 4 seconds\n"
        ),
    )?;
    // In the lab's user namespace everyone is root, and squid refuses to be that.
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-user=1000", "--map-group=1000", "squid", "-N", "-f"]).arg(config);
    host.spawn(command)
}

/// A certificate authority of the proxy's own: key and certificate in one file.
fn authority(dir: &TempDir) -> anyhow::Result<()> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, AUTHORITY);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&key)?;
    Ok(std::fs::write(dir.path().join("authority.pem"), certificate.pem() + &key.serialize_pem())?)
}

async fn said(host: &Host, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = Command::new(program);
    command.args(arguments);
    Ok(host.spawn(command)?.finish(Duration::from_secs(20)).await?.ok()?.trim().to_owned())
}
