//! Windows: a named pipe with a random name, which stands in a file in `DIR/run` together with a secret.
//!
//! Windows lets everybody list and read pipes, but only the owner, SYSTEM and the administrators write to this one. Who
//! does not say what it is hears nothing. And when the process that served it is gone, anybody may make a pipe of that
//! name: so the server shows that it has the secret, which only those who may read the file know.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aws_lc_rs::hmac::{self, HMAC_SHA256, Key};
use data_encoding::HEXLOWER;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::windows::named_pipe::{ClientOptions, NamedPipeClient, NamedPipeServer, ServerOptions};
use tokio::time::sleep;

use crate::identity::store::{self, Access};

/// How our pipes' names begin.
const PREFIX: &str = r"\\.\pipe\adit-";
/// Pause after an error that the next accept may meet again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);
/// What a command asks the server to seal, in bytes.
const NONCE: usize = 16;

/// A command's connection.
pub(super) struct Arrived {
    pipe: NamedPipeServer,
    secret: Key,
}

impl Arrived {
    /// The connection, when the command has seen who serves it.
    pub(super) async fn stream(mut self) -> Option<NamedPipeServer> {
        let mut nonce = [0; NONCE];
        self.pipe.read_exact(&mut nonce).await.ok()?;
        self.pipe.write_all(hmac::sign(&self.secret, &nonce).as_ref()).await.ok()?;
        Some(self.pipe)
    }
}

/// Takes connections of commands. The file is removed with it.
#[derive(Debug)]
pub struct Listener {
    pipe: NamedPipeServer,
    name: String,
    secret: Key,
    path: PathBuf,
}

impl Listener {
    pub(super) async fn bind(run: &Path, file: &str) -> io::Result<Self> {
        // Who may enter, it inherits from the state directory.
        fs::create_dir_all(run)?;
        if connect(run, file).await.is_some() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let name = format!("{PREFIX}{:032x}", rand::random::<u128>());
        let secret: [u8; 32] = rand::random();
        let pipe = ServerOptions::new().first_pipe_instance(true).create(&name)?;
        let text = format!("{name}\n{}", HEXLOWER.encode(&secret));
        store::write(run, file, text.as_bytes(), Access::Secret).map_err(io::Error::other)?;
        Ok(Self { pipe, name, secret: Key::new(HMAC_SHA256, &secret), path: run.join(file) })
    }

    pub(super) async fn accept(&mut self) -> Arrived {
        loop {
            let connected = self.pipe.connect().await;
            match (connected, ServerOptions::new().create(&self.name)) {
                (Ok(()), Ok(next)) => {
                    let pipe = std::mem::replace(&mut self.pipe, next);
                    return Arrived { pipe, secret: self.secret.clone() };
                }
                _ => sleep(ACCEPT_PAUSE).await,
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

pub(super) async fn connect(run: &Path, file: &str) -> Option<NamedPipeClient> {
    let text = fs::read_to_string(run.join(file)).ok()?;
    let (name, secret) = text.split_once('\n').filter(|(name, _)| name.starts_with(PREFIX))?;
    let secret = Key::new(HMAC_SHA256, &HEXLOWER.decode(secret.as_bytes()).ok()?);
    let mut pipe = ClientOptions::new().open(name).ok()?;
    let nonce: [u8; NONCE] = rand::random();
    pipe.write_all(&nonce).await.ok()?;
    let mut seal = [0; 32];
    pipe.read_exact(&mut seal).await.ok()?;
    hmac::verify(&secret, &nonce, &seal).ok()?;
    Some(pipe)
}
