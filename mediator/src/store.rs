//! State that must last: devices and enrolment tokens, in SQLite.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use adit_client::identity::store::hand_over;
use adit_protocol::{DeviceId, Role};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
};
use sqlx::{Row, SqlitePool};

use crate::error::Error;

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS tokens (
    hash BLOB PRIMARY KEY, role TEXT NOT NULL, tags TEXT NOT NULL, all_agents INTEGER NOT NULL,
    uses_left INTEGER NOT NULL, expires INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS devices (
    id BLOB PRIMARY KEY, role TEXT NOT NULL, name TEXT NOT NULL, tags TEXT NOT NULL, hosts TEXT NOT NULL,
    public_key BLOB NOT NULL, reach_tags TEXT NOT NULL, reach_all INTEGER NOT NULL, token BLOB NOT NULL,
    certificate BLOB NOT NULL, software TEXT NOT NULL DEFAULT '', last_seen INTEGER NOT NULL DEFAULT 0,
    UNIQUE (role, name), UNIQUE (token, public_key)
) STRICT;
";

/// How long another process may hold the database (`token` while `run` runs).
const BUSY: Duration = Duration::from_secs(10);

/// The database.
#[derive(Debug, Clone)]
pub struct Store {
    pool: SqlitePool,
}

/// A token as it is stored: never its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// SHA-256 of the secret.
    pub hash: [u8; 32],
    /// What it enrols.
    pub role: Role,
    /// Tags that the device gets; of a technician: which agents it reaches.
    pub tags: Vec<String>,
    /// Technicians only: reaches every agent.
    pub all_agents: bool,
    /// How many devices it enrols.
    pub uses: u32,
    /// Seconds since 1970-01-01 UTC.
    pub expires: u64,
}

/// An enrolled device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Device id.
    pub id: DeviceId,
    /// What it is enrolled as.
    pub role: Role,
    /// Unique among the devices of its role.
    pub name: String,
    /// `key=value` each.
    pub tags: Vec<String>,
    /// Relays only: names and addresses that clients use.
    pub hosts: Vec<String>,
    /// Ed25519.
    pub public_key: [u8; 32],
    /// Technicians only: which agents it reaches.
    pub reach: Reach,
    /// DER.
    pub certificate: Vec<u8>,
    /// As it said itself.
    pub software: String,
    /// Seconds since 1970-01-01 UTC; 0: never.
    pub last_seen: u64,
}

/// Which agents a technician reaches.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reach {
    /// Those that carry all of these. None: no agent.
    pub tags: Vec<String>,
    /// Every agent.
    pub all: bool,
}

impl Reach {
    /// Whether an agent with these tags is within reach.
    pub fn covers(&self, agent_tags: &[String]) -> bool {
        self.all || (!self.tags.is_empty() && self.tags.iter().all(|tag| agent_tags.contains(tag)))
    }
}

/// A device that wants to enrol, and how its certificate is made.
pub struct Candidate<'a> {
    /// SHA-256 of the secret it showed.
    pub token: [u8; 32],
    /// Its key, proven.
    pub public_key: [u8; 32],
    /// The name it wants.
    pub name: &'a str,
    /// The tags it wants; the token's own win.
    pub tags: &'a [String],
    /// Relays only: names and addresses that clients use.
    pub hosts: &'a [String],
    /// Makes the certificate.
    pub sign: &'a (dyn Fn(&Device) -> Option<Vec<u8>> + Sync),
}

impl Store {
    /// Opens the database, makes it when it is not there.
    ///
    /// # Errors
    /// [`Error::Database`].
    pub async fn open(path: &Path) -> Result<Self, Error> {
        let failed = |error| Error::Database { path: PathBuf::from(path), error };
        // Made here, because SQLite gives its other files to the owner of this one.
        if !path.exists() {
            File::create_new(path)
                .and_then(|_| hand_over(path))
                .map_err(|error| failed(sqlx::Error::Io(error)))?;
        }
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY);
        let pool = SqlitePoolOptions::new()
            .max_connections(4)
            .acquire_timeout(BUSY)
            .connect_with(options)
            .await
            .map_err(failed)?;
        sqlx::raw_sql(SCHEMA).execute(&pool).await.map_err(failed)?;
        Ok(Self { pool })
    }

    /// Waits for what is under way and closes the database.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// Keeps a new token.
    ///
    /// # Errors
    /// The database's.
    pub async fn add_token(&self, token: &Token) -> Result<(), sqlx::Error> {
        sqlx::query("INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?)")
            .bind(token.hash.as_slice())
            .bind(token.role.as_str())
            .bind(join(&token.tags))
            .bind(token.all_agents)
            .bind(token.uses)
            .bind(token.expires as i64)
            .execute(&self.pool)
            .await
            .map(drop)
    }

    /// Spends one use of a token and enrols the device; all of it or nothing. The same token with the
    /// same key gives the same device again and spends nothing.
    ///
    /// # Errors
    /// [`EnrolError`].
    pub async fn enrol(&self, candidate: &Candidate<'_>, now: u64) -> Result<Device, EnrolError> {
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let known = sqlx::query("SELECT * FROM devices WHERE token = ? AND public_key = ?")
            .bind(candidate.token.as_slice())
            .bind(candidate.public_key.as_slice())
            .fetch_optional(&mut *tx)
            .await?;
        if let Some(row) = known {
            return Ok(read_device(&row)?);
        }
        let spent = sqlx::query(
            "UPDATE tokens SET uses_left = uses_left - 1 WHERE hash = ? AND uses_left > 0 AND expires > ?
             RETURNING role, tags, all_agents",
        )
        .bind(candidate.token.as_slice())
        .bind(now as i64)
        .fetch_optional(&mut *tx)
        .await?;
        let Some(token) = spent else {
            let left: Option<i64> = sqlx::query_scalar("SELECT uses_left FROM tokens WHERE hash = ?")
                .bind(candidate.token.as_slice())
                .fetch_optional(&mut *tx)
                .await?;
            return Err(match left {
                None => EnrolError::UnknownToken,
                Some(0) => EnrolError::TokenUsed,
                Some(_) => EnrolError::TokenExpired,
            });
        };
        let role: Role = parse(token.try_get("role")?)?;
        let token_tags = split(token.try_get("tags")?);
        let tags = merge(&token_tags, candidate.tags);
        let mut name = candidate.name.to_owned();
        for number in 2.. {
            let taken = sqlx::query("SELECT 1 FROM devices WHERE role = ? AND name = ?")
                .bind(role.as_str())
                .bind(&name)
                .fetch_optional(&mut *tx)
                .await?;
            if taken.is_none() {
                break;
            }
            let suffix = format!("-{number}");
            let stem = &candidate.name[..candidate.name.len().min(63 - suffix.len())];
            name = format!("{stem}{suffix}");
        }
        let mut device = Device {
            id: crate::organisation::random_id(),
            role,
            name,
            tags,
            hosts: if role == Role::Relay { candidate.hosts.to_vec() } else { vec![] },
            public_key: candidate.public_key,
            reach: match role {
                Role::Technician => Reach { tags: token_tags, all: token.try_get("all_agents")? },
                _ => Reach::default(),
            },
            certificate: vec![],
            software: String::new(),
            last_seen: 0,
        };
        device.certificate = (candidate.sign)(&device).ok_or(EnrolError::NotSigned)?;
        sqlx::query(
            "INSERT INTO devices
                 (id, role, name, tags, hosts, public_key, reach_tags, reach_all, token, certificate)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(device.id.as_bytes().as_slice())
        .bind(role.as_str())
        .bind(&device.name)
        .bind(join(&device.tags))
        .bind(join(&device.hosts))
        .bind(device.public_key.as_slice())
        .bind(join(&device.reach.tags))
        .bind(device.reach.all)
        .bind(candidate.token.as_slice())
        .bind(device.certificate.as_slice())
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(device)
    }

    /// One device.
    ///
    /// # Errors
    /// The database's.
    pub async fn device(&self, id: DeviceId) -> Result<Option<Device>, sqlx::Error> {
        let row = sqlx::query("SELECT * FROM devices WHERE id = ?")
            .bind(id.as_bytes().as_slice())
            .fetch_optional(&self.pool)
            .await?;
        row.as_ref().map(read_device).transpose()
    }

    /// All devices of a role, sorted by name.
    ///
    /// # Errors
    /// The database's.
    pub async fn devices(&self, role: Role) -> Result<Vec<Device>, sqlx::Error> {
        let rows = sqlx::query("SELECT * FROM devices WHERE role = ? ORDER BY name")
            .bind(role.as_str())
            .fetch_all(&self.pool)
            .await?;
        rows.iter().map(read_device).collect()
    }

    /// Notes that a device was there, and what software it runs.
    ///
    /// # Errors
    /// The database's.
    pub async fn seen(&self, id: DeviceId, software: &str, now: u64) -> Result<(), sqlx::Error> {
        sqlx::query("UPDATE devices SET last_seen = ?, software = ? WHERE id = ?")
            .bind(now as i64)
            .bind(software)
            .bind(id.as_bytes().as_slice())
            .execute(&self.pool)
            .await
            .map(drop)
    }
}

/// Why a device was not enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// No such token.
    #[error("this mediator does not know that token")]
    UnknownToken,
    /// All its uses are spent.
    #[error("the token has been used up")]
    TokenUsed,
    /// Its time is over.
    #[error("the token has expired")]
    TokenExpired,
    /// The certificate was not made.
    #[error("the certificate could not be made")]
    NotSigned,
    /// The database.
    #[error("the mediator's database failed")]
    Database(#[from] sqlx::Error),
}

/// The token's tags, and those wanted whose keys are not among the token's.
fn merge(token: &[String], wanted: &[String]) -> Vec<String> {
    let key = |tag: &str| tag.split('=').next().unwrap_or_default().to_owned();
    let mut tags: Vec<String> = token.to_vec();
    for tag in wanted {
        if !tags.contains(tag) && !token.iter().any(|own| key(own) == key(tag)) {
            tags.push(tag.clone());
        }
    }
    tags.truncate(adit_client::identity::certificate::MAX_TAGS);
    tags
}

// Tags and hosts hold no comma.
fn join(list: &[String]) -> String {
    list.join(",")
}

fn split(text: &str) -> Vec<String> {
    text.split(',').filter(|item| !item.is_empty()).map(str::to_owned).collect()
}

fn parse<T: std::str::FromStr>(text: &str) -> Result<T, sqlx::Error>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    text.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))
}

fn read_device(row: &SqliteRow) -> Result<Device, sqlx::Error> {
    let bytes = |error| sqlx::Error::Decode(Box::new(error));
    let id: &[u8] = row.try_get("id")?;
    let public_key: &[u8] = row.try_get("public_key")?;
    Ok(Device {
        id: DeviceId::try_from(id).map_err(|error| sqlx::Error::Decode(Box::new(error)))?,
        role: parse(row.try_get("role")?)?,
        name: row.try_get("name")?,
        tags: split(row.try_get("tags")?),
        hosts: split(row.try_get("hosts")?),
        public_key: public_key.try_into().map_err(bytes)?,
        reach: Reach { tags: split(row.try_get("reach_tags")?), all: row.try_get("reach_all")? },
        certificate: row.try_get("certificate")?,
        software: row.try_get("software")?,
        last_seen: row.try_get::<i64, _>("last_seen")?.max(0) as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().expect("tempdir");
        let store = Store::open(&dir.path().join("state.db")).await.expect("opens");
        (dir, store)
    }

    fn token(uses: u32) -> Token {
        let tags = vec!["site=a".to_owned()];
        Token { hash: [1; 32], role: Role::Agent, tags, all_agents: false, uses, expires: 1000 }
    }

    fn candidate(key: u8) -> Candidate<'static> {
        Candidate {
            token: [1; 32],
            public_key: [key; 32],
            name: "desk",
            tags: &[],
            hosts: &[],
            sign: &|_| Some(vec![1, 2, 3]),
        }
    }

    #[tokio::test]
    async fn a_token_is_spent_once_and_the_same_key_gets_the_same_device() {
        let (_dir, store) = store().await;
        assert!(matches!(store.enrol(&candidate(1), 0).await, Err(EnrolError::UnknownToken)));
        store.add_token(&token(1)).await.expect("adds");
        let device = store.enrol(&candidate(1), 999).await.expect("enrols");
        assert_eq!(store.enrol(&candidate(1), 5000).await.expect("the same"), device);
        assert!(matches!(store.enrol(&candidate(2), 0).await, Err(EnrolError::TokenUsed)));
        assert_eq!(store.device(device.id).await.expect("reads"), Some(device));
    }

    #[tokio::test]
    async fn an_expired_token_enrols_nobody() {
        let (_dir, store) = store().await;
        store.add_token(&token(5)).await.expect("adds");
        assert!(matches!(store.enrol(&candidate(1), 1000).await, Err(EnrolError::TokenExpired)));
        assert!(store.enrol(&candidate(1), 999).await.is_ok());
    }

    #[tokio::test]
    async fn a_failed_signature_spends_nothing() {
        let (_dir, store) = store().await;
        store.add_token(&token(1)).await.expect("adds");
        let failing = Candidate { sign: &|_| None, ..candidate(1) };
        assert!(matches!(store.enrol(&failing, 0).await, Err(EnrolError::NotSigned)));
        assert!(store.enrol(&candidate(1), 0).await.is_ok());
    }

    #[tokio::test]
    async fn names_stay_unique_and_the_tokens_tags_win() {
        let (_dir, store) = store().await;
        store.add_token(&token(3)).await.expect("adds");
        let wanted = ["site=b".to_owned(), "os=linux".to_owned()];
        let first = store.enrol(&Candidate { tags: &wanted, ..candidate(1) }, 0).await.expect("enrols");
        let second = store.enrol(&candidate(2), 0).await.expect("enrols");
        assert_eq!((first.name.as_str(), second.name.as_str()), ("desk", "desk-2"));
        assert_eq!(first.tags, ["site=a", "os=linux"]);
    }

    #[test]
    fn reach_needs_all_tags_and_none_reach_nothing() {
        let tags = |list: &[&str]| list.iter().map(|tag| (*tag).to_owned()).collect::<Vec<_>>();
        let reach = Reach { tags: tags(&["a=1", "b=2"]), all: false };
        assert!(reach.covers(&tags(&["b=2", "c=3", "a=1"])));
        assert!(!reach.covers(&tags(&["a=1"])));
        assert!(!Reach::default().covers(&tags(&["a=1"])) && !Reach::default().covers(&[]));
        assert!(Reach { tags: vec![], all: true }.covers(&[]));
    }
}
