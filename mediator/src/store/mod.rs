//! What must last: devices, tokens, grants and lists of revoked certificates, in SQLite.
//!
//! | module | what |
//! | --- | --- |
//! | [`device`] | devices and the grants of technicians |
//! | [`enrol`] | tokens, and how they become devices |
//! | [`revoke`] | revoked devices and the signed lists of them |

pub mod device;
pub mod enrol;
pub mod revoke;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use adit_client::identity::store::hand_over;
use sqlx::SqlitePool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};

use crate::error::Error;

pub use device::{Device, Grant, Reach, Seen};
pub use enrol::{Candidate, EnrolError, Enrolled, Pending, Token};

/// How long another process may hold the database (`token` while `run` runs).
const BUSY: Duration = Duration::from_secs(10);

/// The database. Several processes may use it at once: the server, and the operator's commands.
#[derive(Debug, Clone)]
pub struct Store {
    pool: SqlitePool,
}

impl Store {
    /// Opens the database, makes it when it is not there, and brings it up to this version.
    ///
    /// # Errors
    /// [`Error::Database`].
    pub async fn open(path: &Path) -> Result<Self, Error> {
        let failed = |error| Error::Database { path: PathBuf::from(path), error };
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY);
        // Several programs may find an empty or an older database at the same moment. For the change to the
        // write-ahead log SQLite does not wait, as it does for everything else.
        let lock = lock(path)?;
        let pool = SqlitePoolOptions::new()
            .max_connections(4)
            .acquire_timeout(BUSY)
            .connect_with(options)
            .await
            .map_err(failed)?;
        sqlx::migrate!().run(&pool).await.map_err(|error| failed(error.into()))?;
        hand_over(path).map_err(|error| failed(error.into()))?;
        drop(lock);
        Ok(Self { pool })
    }

    /// Writes a consistent copy of the whole database to `path`, which must be empty or not there, while others use it.
    ///
    /// # Errors
    /// The database's.
    pub async fn copy_to(&self, path: &Path) -> Result<(), sqlx::Error> {
        let path = path.to_string_lossy().into_owned();
        sqlx::query("VACUUM INTO ?").bind(path).execute(&self.pool).await.map(drop)
    }

    /// What SQLite finds wrong with the database; `None` when it is sound.
    ///
    /// # Errors
    /// The database's.
    pub async fn check(&self) -> Result<Option<String>, sqlx::Error> {
        let found: String = sqlx::query_scalar("PRAGMA integrity_check(1)").fetch_one(&self.pool).await?;
        Ok((found != "ok").then_some(found))
    }

    /// Waits for what is under way and closes the database.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

/// One program at a time brings the database up to date; the lock ends with the file. Held for moments.
fn lock(database: &Path) -> Result<File, Error> {
    let path = database.with_extension("lock");
    let locked = File::options().create(true).truncate(false).write(true).open(&path).and_then(|file| {
        hand_over(&path)?;
        file.lock()?;
        Ok(file)
    });
    locked.map_err(|error| Error::Database { path, error: error.into() })
}

// Tags and hosts hold no comma.
fn join(list: &[String]) -> String {
    list.join(",")
}

fn split(text: &str) -> Vec<String> {
    text.split(',').filter(|item| !item.is_empty()).map(str::to_owned).collect()
}

/// What a column holds is not what was put there.
fn decode(error: impl std::error::Error + Send + Sync + 'static) -> sqlx::Error {
    sqlx::Error::Decode(Box::new(error))
}
