//! Windows: a named pipe with a random name, which stands in `DIR/run/PID.pipe`. A file whose pipe nobody
//! serves is removed by the next one who asks.
//!
//! Windows lets everybody read a new pipe, but only its owner, SYSTEM and the administrators write to it,
//! and the standard ways without `unsafe` cannot change that. So who asks has to write a byte first: the
//! others get nothing. They can occupy the pipe for [`PATIENCE`] at a time, no more.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::windows::named_pipe::{ClientOptions, NamedPipeClient, NamedPipeServer, ServerOptions};
use tokio::time::{sleep, timeout};

use super::{ACCEPT_PAUSE, Document, MAX_DOCUMENT, PATIENCE, Server};
use crate::identity::store::{self, Access};

/// Of the file with the pipe's name.
pub(super) const EXTENSION: &str = "pipe";

/// How our pipes' names begin.
const PREFIX: &str = r"\\.\pipe\adit-";
/// What the asker writes.
const QUESTION: u8 = b'?';
/// Ends the document, which has no line breaks.
const END: u8 = b'\n';
/// ERROR_PIPE_BUSY: no instance is free at the moment.
const BUSY: i32 = 231;
/// How often a busy pipe is tried.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// Serves the document on a pipe whose name stands in `run`.
pub(super) fn serve(run: &Path, document: impl Fn() -> Document + Send + 'static) -> io::Result<Server> {
    // Who may enter, it inherits from the state directory.
    fs::create_dir_all(run)?;
    let name = format!("{PREFIX}{:032x}", rand::random::<u128>());
    let mut options = ServerOptions::new();
    // The one that is being served, and the next. Other machines are refused unless one asks for them.
    options.max_instances(2);
    // Nobody else serves it.
    let mut pipe = options.clone().first_pipe_instance(true).create(&name)?;
    let file = format!("{}.{EXTENSION}", std::process::id());
    store::write(run, &file, name.as_bytes(), Access::Secret).map_err(io::Error::other)?;
    let task = tokio::spawn(async move {
        loop {
            let connected = pipe.connect().await;
            // Who comes next finds a new instance: one that has served is of no more use.
            let (Ok(()), Ok(next)) = (connected, options.create(&name)) else {
                sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let mut asker = std::mem::replace(&mut pipe, next);
            // One after the other: each has its deadlines.
            if let Ok(Ok(QUESTION)) = timeout(PATIENCE, asker.read_u8()).await {
                let mut text = serde_json::to_vec(&document()).unwrap_or_default();
                text.push(END);
                let _ = timeout(PATIENCE, answer(&mut asker, &text)).await;
            }
        }
    });
    Ok(Server { path: run.join(file), task: task.abort_handle() })
}

async fn answer(pipe: &mut NamedPipeServer, text: &[u8]) -> io::Result<()> {
    pipe.write_all(text).await?;
    // Closing may throw away what was not read: the asker goes first.
    pipe.read_u8().await.map(drop)
}

/// The document of the pipe whose name is in the file `path`.
pub(super) async fn ask(path: &Path) -> Option<Vec<u8>> {
    let name = fs::read_to_string(path).ok().filter(|name| name.starts_with(PREFIX))?;
    let mut pipe = match open(&name).await {
        Ok(pipe) => pipe,
        Err(error) => {
            if error.kind() == io::ErrorKind::NotFound {
                let _ = fs::remove_file(path);
            }
            return None;
        }
    };
    pipe.write_u8(QUESTION).await.ok()?;
    let mut text = Vec::new();
    BufReader::new(pipe.take(MAX_DOCUMENT)).read_until(END, &mut text).await.ok()?;
    Some(text)
}

async fn open(name: &str) -> io::Result<NamedPipeClient> {
    loop {
        match ClientOptions::new().open(name) {
            Err(error) if error.raw_os_error() == Some(BUSY) => sleep(BUSY_PAUSE).await,
            opened => return opened,
        }
    }
}
