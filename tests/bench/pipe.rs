//! The bare carriers that a tunnel is measured against: accept, TLS or QUIC, copy, and nothing else. With
//! adit's TLS provider, buffers, windows and congestion control. `hop` is the bare relay: accept, splice.

mod hop;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use adit_client::tls::provider;
use anyhow::Result;
use clap::{Parser, ValueEnum};
use quinn::congestion::BbrConfig;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Endpoint, TransportConfig, VarInt};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes, join};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Bytes of each copy buffer (`client/src/copy.rs`).
const BUFFER: usize = 64 * 1024;
/// Bytes of QUIC's windows (`client/src/direct/quic.rs`).
const WINDOW: u32 = 40 * 1024 * 1024;
const NAME: &str = "pipe.invalid";

/// Carries the TCP connections to LISTEN on to TARGET. Prints a line once it listens.
#[derive(Parser)]
struct Pipe {
    mode: Mode,
    listen: SocketAddr,
    target: SocketAddr,
    #[arg(long, default_value = "pipe.der", help = "DER: the server writes it, the client trusts it")]
    certificate: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    TlsServer,
    TlsClient,
    QuicServer,
    QuicClient,
    Hop,
}

#[tokio::main]
async fn main() -> Result<()> {
    let pipe = Pipe::parse();
    let target = pipe.target;
    match pipe.mode {
        Mode::TlsServer => {
            let tls = TlsAcceptor::from(Arc::new(pipe.server()?));
            serve(pipe.listen, |tcp| {
                let tls = tls.clone();
                async move { copy(tls.accept(tcp).await?, connect(target).await?).await }
            })
            .await
        }
        Mode::TlsClient => {
            let tls = TlsConnector::from(Arc::new(pipe.client()?));
            serve(pipe.listen, |tcp| {
                let (tls, name) = (tls.clone(), ServerName::try_from(NAME));
                async move { copy(tls.connect(name?, connect(target).await?).await?, tcp).await }
            })
            .await
        }
        Mode::QuicServer => {
            let tls = Arc::new(QuicServerConfig::try_from(pipe.server()?)?);
            let mut config = quinn::ServerConfig::with_crypto(tls);
            let endpoint = Endpoint::server(config.transport_config(transport()).clone(), pipe.listen)?;
            println!("listening");
            while let Some(incoming) = endpoint.accept().await {
                tokio::spawn(async move {
                    let (send, recv) = incoming.await?.accept_bi().await?;
                    copy(join(recv, send), connect(target).await?).await
                });
            }
            Ok(())
        }
        Mode::QuicClient => {
            let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(pipe.client()?)?));
            config.transport_config(transport());
            let endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into())?;
            serve(pipe.listen, |tcp| {
                let connecting = endpoint.connect_with(config.clone(), target, NAME);
                async move {
                    let connection = connecting?.await?;
                    let (send, recv) = connection.open_bi().await?;
                    let copied = copy(join(recv, send), tcp).await;
                    connection.close(VarInt::from_u32(0), b"");
                    copied
                }
            })
            .await
        }
        Mode::Hop => {
            serve(pipe.listen, |tcp| async move { hop::forward(tcp, connect(target).await?).await }).await
        }
    }
}

impl Pipe {
    fn server(&self) -> Result<ServerConfig> {
        let made = rcgen::generate_simple_self_signed([NAME.to_owned()])?;
        std::fs::write(&self.certificate, made.cert.der())?;
        let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
        let config = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
        Ok(config.with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key)?)
    }

    fn client(&self) -> Result<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from(std::fs::read(&self.certificate)?))?;
        let config = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
        Ok(config.with_root_certificates(roots).with_no_client_auth())
    }
}

fn transport() -> Arc<TransportConfig> {
    let (mut config, window) = (TransportConfig::default(), VarInt::from_u32(WINDOW));
    config.congestion_controller_factory(Arc::new(BbrConfig::default())).send_window(WINDOW.into());
    config.stream_receive_window(window).receive_window(window).max_idle_timeout(None);
    Arc::new(config)
}

async fn serve<F>(listen: SocketAddr, work: impl Fn(TcpStream) -> F) -> Result<()>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let listener = TcpListener::bind(listen).await?;
    println!("listening");
    loop {
        let (tcp, _) = listener.accept().await?;
        tcp.set_nodelay(true)?;
        tokio::spawn(work(tcp)); // How it ends is its own business: the benchmark ends it in the middle.
    }
}

async fn connect(target: SocketAddr) -> Result<TcpStream> {
    let tcp = TcpStream::connect(target).await?;
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

async fn copy<O: AsyncRead + AsyncWrite + Unpin>(mut one: O, mut other: TcpStream) -> Result<()> {
    copy_bidirectional_with_sizes(&mut one, &mut other, BUFFER, BUFFER).await?;
    Ok(())
}
