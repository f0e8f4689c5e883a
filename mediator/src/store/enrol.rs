//! Tokens, and how they become devices.

use adit_client::identity::certificate::tag_key;
use adit_protocol::Role;
use sqlx::{Row, Sqlite, SqliteConnection};

use super::device::{Reach, insert_grant, read_device};
use super::{Device, Store, decode, join, split};
use crate::store::Seen;

/// A token as it is stored: never its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// SHA-256 of the secret.
    pub hash: [u8; 32],
    /// What it enrols.
    pub role: Role,
    /// Tags that the device gets; of a technician: its first grant.
    pub tags: Vec<String>,
    /// Technicians only: the first grant is for every agent.
    pub all_agents: bool,
    /// Whether a device enrolled with it may take the name of another that carries the token's tags.
    pub may_replace: bool,
    /// How many devices it enrols.
    pub uses: u32,
    /// Seconds since 1970-01-01 UTC.
    pub expires: u64,
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
    /// It was installed anew: a device that has the name is revoked.
    pub replace: bool,
    /// Makes the certificate.
    pub sign: &'a (dyn Fn(&Device) -> Option<Vec<u8>> + Sync),
}

/// What an enrolment did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enrolled {
    /// The device.
    pub device: Device,
    /// It is in this state already: the answer to an earlier try was lost.
    pub again: bool,
    /// Was revoked for it.
    pub replaced: Option<Device>,
}

/// An enrolment that waits to be done. Dropped, nothing has happened.
pub struct Pending {
    tx: sqlx::Transaction<'static, Sqlite>,
    /// What it will have done.
    pub enrolled: Enrolled,
}

impl Pending {
    /// Does it.
    ///
    /// # Errors
    /// The database's.
    pub async fn commit(self) -> Result<Enrolled, sqlx::Error> {
        self.tx.commit().await?;
        Ok(self.enrolled)
    }
}

impl Store {
    /// Keeps a new token.
    ///
    /// # Errors
    /// The database's.
    pub async fn add_token(&self, token: &Token) -> Result<(), sqlx::Error> {
        sqlx::query("INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?)")
            .bind(token.hash.as_slice())
            .bind(token.role.as_str())
            .bind(join(&token.tags))
            .bind(token.all_agents)
            .bind(token.may_replace)
            .bind(token.uses)
            .bind(token.expires as i64)
            .execute(&self.pool)
            .await
            .map(drop)
    }

    /// Makes every token useless; says how many there were.
    ///
    /// # Errors
    /// The database's.
    pub async fn void_tokens(&self) -> Result<u64, sqlx::Error> {
        sqlx::query("DELETE FROM tokens").execute(&self.pool).await.map(|done| done.rows_affected())
    }

    /// Spends one use of a token and enrols the device, once it is committed; all of it or nothing. The same
    /// token with the same key gives the same device again and spends nothing. Nobody else writes meanwhile.
    ///
    /// # Errors
    /// [`EnrolError`].
    pub async fn prepare_enrolment(
        &self,
        candidate: &Candidate<'_>,
        now: u64,
    ) -> Result<Pending, EnrolError> {
        // Only one at a time may write: guesses must not make genuine devices wait for it.
        if !self.has_token(&candidate.token).await? {
            return Err(EnrolError::UnknownToken);
        }
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let known = sqlx::query("SELECT * FROM devices WHERE public_key = ?")
            .bind(candidate.public_key.as_slice())
            .fetch_optional(&mut *tx)
            .await?;
        if let Some(row) = known {
            let (device, token) = (read_device(&row)?, row.try_get::<&[u8], _>("token")?);
            if device.revoked > 0 {
                return Err(EnrolError::Revoked);
            }
            if token == candidate.token {
                return Ok(Pending { tx, enrolled: Enrolled { device, again: true, replaced: None } });
            }
            if device.seen.at > 0 {
                return Err(EnrolError::KeyInUse(device.name));
            }
            // The answer to the first token was lost, and the operator has made a second one.
            forget(&mut tx, &device).await?;
        }
        let token = spend(&mut tx, candidate, now).await?;
        let owner = sqlx::query("SELECT * FROM devices WHERE role = ? AND name = ? AND revoked = 0")
            .bind(token.role.as_str())
            .bind(candidate.name)
            .fetch_optional(&mut *tx)
            .await?;
        let replaced = match owner.as_ref().map(read_device).transpose()? {
            Some(owner) if !candidate.replace => return Err(EnrolError::NameTaken(Box::new(owner))),
            // A token without tags is of nobody's in particular: it replaces no device that is somebody's.
            Some(owner)
                if !token.may_replace
                    || !token.tags.iter().all(|tag| owner.tags.contains(tag))
                    || (token.tags.is_empty() && !owner.tags.is_empty()) =>
            {
                return Err(EnrolError::MayNotReplace(owner.name));
            }
            owner => owner,
        };
        if let Some(old) = &replaced {
            super::revoke::mark(&mut tx, old.id, now).await?;
        }
        let mut device = Device {
            id: crate::organisation::random_id(),
            role: token.role,
            name: candidate.name.to_owned(),
            tags: merge(&token.tags, candidate.tags),
            hosts: if token.role == Role::Relay { candidate.hosts.to_vec() } else { vec![] },
            public_key: candidate.public_key,
            certificate: vec![],
            enrolled: now,
            revoked: 0,
            seen: Seen::default(),
            cloned: 0,
            grants: vec![],
        };
        device.certificate = (candidate.sign)(&device).ok_or(EnrolError::NotSigned)?;
        insert(&mut tx, &device, candidate.token).await?;
        if token.role == Role::Technician && (token.all_agents || !token.tags.is_empty()) {
            let what = Reach { tags: &token.tags, all: token.all_agents, redirector: false };
            let id = insert_grant(&mut tx, device.id, &what, now).await?;
            device.grants.push(super::Grant {
                id,
                tags: token.tags,
                all: token.all_agents,
                redirector: false,
            });
        }
        Ok(Pending { tx, enrolled: Enrolled { device, again: false, replaced } })
    }

    #[cfg(test)]
    pub(super) async fn enrol(&self, candidate: &Candidate<'_>, now: u64) -> Result<Enrolled, EnrolError> {
        Ok(self.prepare_enrolment(candidate, now).await?.commit().await?)
    }

    async fn has_token(&self, hash: &[u8; 32]) -> Result<bool, sqlx::Error> {
        let found = sqlx::query_scalar::<_, i64>("SELECT 1 FROM tokens WHERE hash = ?");
        Ok(found.bind(hash.as_slice()).fetch_optional(&self.pool).await?.is_some())
    }
}

/// Takes one use off the candidate's token.
async fn spend(tx: &mut SqliteConnection, candidate: &Candidate<'_>, now: u64) -> Result<Token, EnrolError> {
    let spent = sqlx::query(
        "UPDATE tokens SET uses_left = uses_left - 1 WHERE hash = ? AND uses_left > 0 AND expires > ?
         RETURNING *",
    )
    .bind(candidate.token.as_slice())
    .bind(now as i64)
    .fetch_optional(&mut *tx)
    .await?;
    if let Some(row) = spent {
        let role: &str = row.try_get("role")?;
        return Ok(Token {
            hash: candidate.token,
            role: role.parse().map_err(decode)?,
            tags: split(row.try_get("tags")?),
            all_agents: row.try_get("all_agents")?,
            may_replace: row.try_get("may_replace")?,
            uses: row.try_get("uses_left")?,
            expires: row.try_get::<i64, _>("expires")?.max(0) as u64,
        });
    }
    let left: Option<i64> = sqlx::query_scalar("SELECT uses_left FROM tokens WHERE hash = ?")
        .bind(candidate.token.as_slice())
        .fetch_optional(&mut *tx)
        .await?;
    Err(match left {
        None => EnrolError::UnknownToken,
        Some(0) => EnrolError::TokenUsed,
        Some(_) => EnrolError::TokenExpired,
    })
}

/// Takes out a device that never was there.
async fn forget(tx: &mut SqliteConnection, device: &Device) -> Result<(), sqlx::Error> {
    for delete in ["DELETE FROM grants WHERE technician = ?", "DELETE FROM devices WHERE id = ?"] {
        sqlx::query(delete).bind(device.id.as_bytes().as_slice()).execute(&mut *tx).await?;
    }
    Ok(())
}

async fn insert(tx: &mut SqliteConnection, device: &Device, token: [u8; 32]) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO devices (id, role, name, tags, hosts, public_key, token, certificate, enrolled)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(device.id.as_bytes().as_slice())
    .bind(device.role.as_str())
    .bind(&device.name)
    .bind(join(&device.tags))
    .bind(join(&device.hosts))
    .bind(device.public_key.as_slice())
    .bind(token.as_slice())
    .bind(device.certificate.as_slice())
    .bind(device.enrolled as i64)
    .execute(tx)
    .await
    .map(drop)
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
    /// A device of that name is there.
    #[error(
        "there is {} {:?} already (id {}): choose another --name, or add --replace if this machine was installed anew",
        with_article(&.0.role), .0.name, .0.id
    )]
    NameTaken(Box<Device>),
    /// The token does not let a device take another's name.
    #[error(
        "this token may not replace {0:?}: that takes one for one device (or made with --may-replace) whose tags it carries"
    )]
    MayNotReplace(String),
    /// The key was revoked.
    #[error("this device's key was revoked: remove its state directory, and enrol with a new token")]
    Revoked,
    /// The key is enrolled, with another token.
    #[error(
        "this device's key is enrolled already, as {0:?}, and was online: is this a copy of its state directory?"
    )]
    KeyInUse(String),
    /// The certificate was not made.
    #[error("the certificate could not be made")]
    NotSigned,
    /// The database.
    #[error("the mediator's database failed")]
    Database(#[from] sqlx::Error),
}

fn with_article(role: &Role) -> &'static str {
    match role {
        Role::Agent => "an agent",
        Role::Technician => "a technician's device",
        Role::Relay => "a relay",
        Role::Mediator => "a mediator",
    }
}

/// The token's tags, and those wanted whose keys are not among the token's.
fn merge(token: &[String], wanted: &[String]) -> Vec<String> {
    let mut tags: Vec<String> = token.to_vec();
    for tag in wanted {
        if !tags.contains(tag) && !token.iter().any(|own| tag_key(own) == tag_key(tag)) {
            tags.push(tag.clone());
        }
    }
    tags.truncate(adit_client::identity::certificate::MAX_TAGS);
    tags
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
        Token {
            hash: [1; 32],
            role: Role::Agent,
            tags,
            all_agents: false,
            may_replace: true,
            uses,
            expires: 1000,
        }
    }

    fn token_with(hash: [u8; 32]) -> Token {
        Token { hash, ..token(1) }
    }

    fn candidate(key: u8, name: &str) -> Candidate<'_> {
        Candidate {
            token: [1; 32],
            public_key: [key; 32],
            name,
            tags: &[],
            hosts: &[],
            replace: false,
            sign: &|_| Some(vec![1, 2, 3]),
        }
    }

    #[tokio::test]
    async fn a_token_is_spent_once_and_the_same_key_gets_the_same_device() {
        let (_dir, store) = store().await;
        assert!(matches!(store.enrol(&candidate(1, "a"), 0).await, Err(EnrolError::UnknownToken)));
        store.add_token(&token(1)).await.expect("adds");
        let enrolled = store.enrol(&candidate(1, "a"), 999).await.expect("enrols");
        assert!(!enrolled.again);
        let again = store.enrol(&candidate(1, "a"), 5000).await.expect("the same");
        assert!(again.again && again.device == enrolled.device);
        assert!(matches!(store.enrol(&candidate(2, "b"), 0).await, Err(EnrolError::TokenUsed)));
        assert_eq!(store.devices().await.expect("reads"), [enrolled.device]);
    }

    #[tokio::test]
    async fn a_second_token_works_for_a_key_that_was_never_online() {
        let (_dir, store) = store().await;
        store.add_token(&token(1)).await.expect("adds");
        store.add_token(&Token { hash: [2; 32], role: Role::Technician, ..token(2) }).await.expect("adds");
        let lost = store.enrol(&candidate(1, "a"), 0).await.expect("enrols").device;
        let second = Candidate { token: [2; 32], ..candidate(1, "t") };
        let device = store.enrol(&second, 0).await.expect("enrols").device;
        assert_eq!((device.role, device.grants.len()), (Role::Technician, 1));
        assert!(device.id != lost.id && store.devices().await.expect("reads") == [device.clone()]);
        let seen = Seen { at: 5, ..Seen::default() };
        store.note_seen(&[(device.id, seen)]).await.expect("notes");
        store.add_token(&token_with([3; 32])).await.expect("adds");
        let third = Candidate { token: [3; 32], ..candidate(1, "b") };
        assert!(matches!(store.enrol(&third, 0).await, Err(EnrolError::KeyInUse(name)) if name == "t"));
    }

    #[tokio::test]
    async fn an_expired_token_enrols_nobody() {
        let (_dir, store) = store().await;
        store.add_token(&token(5)).await.expect("adds");
        assert!(matches!(store.enrol(&candidate(1, "a"), 1000).await, Err(EnrolError::TokenExpired)));
        assert!(store.enrol(&candidate(1, "a"), 999).await.is_ok());
    }

    #[tokio::test]
    async fn a_failed_signature_or_a_taken_name_spends_nothing() {
        let (_dir, store) = store().await;
        store.add_token(&token(2)).await.expect("adds");
        let failing = Candidate { sign: &|_| None, ..candidate(1, "a") };
        assert!(matches!(store.enrol(&failing, 0).await, Err(EnrolError::NotSigned)));
        store.enrol(&candidate(1, "a"), 0).await.expect("enrols");
        for _ in 0..3 {
            let taken = store.enrol(&candidate(2, "a"), 0).await.expect_err("taken");
            assert!(taken.to_string().contains("an agent \"a\" already"), "{taken}");
        }
        store.enrol(&candidate(2, "b"), 0).await.expect("the second use is still there");
    }

    #[tokio::test]
    async fn a_machine_installed_anew_takes_its_own_name_and_nobody_elses() {
        let (_dir, store) = store().await;
        store.add_token(&token(9)).await.expect("adds");
        let rollout = Token { hash: [2; 32], may_replace: false, ..token(9) };
        let elsewhere = Token { hash: [3; 32], tags: vec!["site=b".into()], ..token(9) };
        let of_nobody = Token { hash: [4; 32], tags: vec![], ..token(9) };
        for token in [&rollout, &elsewhere, &of_nobody] {
            store.add_token(token).await.expect("adds");
        }
        let old = store.enrol(&candidate(1, "a"), 0).await.expect("enrols").device;
        for hash in [rollout.hash, elsewhere.hash, of_nobody.hash] {
            let thief = Candidate { token: hash, replace: true, ..candidate(2, "a") };
            assert!(matches!(store.enrol(&thief, 0).await, Err(EnrolError::MayNotReplace(_))));
        }
        let anew = Candidate { replace: true, ..candidate(2, "a") };
        let new = store.enrol(&anew, 7).await.expect("enrols");
        assert_eq!(new.replaced.map(|device| device.id), Some(old.id));
        let all = store.devices().await.expect("reads");
        let revoked: Vec<_> = all.iter().map(|device| (device.id, device.revoked)).collect();
        assert_eq!(revoked, [(new.device.id, 0), (old.id, 7)]);
        assert!(matches!(store.enrol(&candidate(1, "c"), 0).await, Err(EnrolError::Revoked)));
    }

    #[tokio::test]
    async fn the_tokens_tags_win_and_are_a_technicians_first_grant() {
        let (_dir, store) = store().await;
        store.add_token(&token(3)).await.expect("adds");
        let wanted = ["site=b".to_owned(), "os=linux".to_owned()];
        let agent = store.enrol(&Candidate { tags: &wanted, ..candidate(1, "a") }, 0).await.expect("enrols");
        assert_eq!(agent.device.tags, ["site=a", "os=linux"]);
        assert_eq!(agent.device.grants, []);
        let technicians = Token { hash: [4; 32], role: Role::Technician, ..token(1) };
        store.add_token(&technicians).await.expect("adds");
        let wanted = Candidate { token: [4; 32], tags: &wanted, ..candidate(2, "t") };
        let technician = store.enrol(&wanted, 0).await.expect("enrols").device;
        assert_eq!(
            technician.grants.iter().map(|grant| grant.tags.as_slice()).collect::<Vec<_>>(),
            [["site=a"]]
        );
        assert!(technician.reaches(&agent.device).is_some());

        let more = store
            .allow(technician.id, &Reach { tags: &["site=c".into()], all: false, redirector: true }, 1)
            .await
            .expect("allows");
        assert_eq!(store.deny(technician.id, Some(more)).await.expect("denies"), 1);
        assert_eq!(store.deny(technician.id, Some(more)).await.expect("denies"), 0);
        assert_eq!(store.deny(technician.id, None).await.expect("denies"), 1);
    }
}
