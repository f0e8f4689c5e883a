//! Revoked devices, and the signed lists of them.

use adit_client::identity::certificate::Authority;
use adit_protocol::DeviceId;
use sqlx::{Row, SqliteConnection};

use super::device::read_device;
use super::{Device, Store};
use crate::organisation::unix_millis;

/// A signed list as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct List {
    /// Its number.
    pub number: u64,
    /// DER.
    pub der: Vec<u8>,
}

impl Store {
    /// Revokes a device. Says whether it was not revoked before. [`Store::extend_list`] makes it known.
    ///
    /// # Errors
    /// The database's.
    pub async fn revoke(&self, id: DeviceId, now: u64) -> Result<bool, sqlx::Error> {
        let mut connection = self.pool.acquire().await?;
        mark(&mut connection, id, now).await
    }

    /// The newest list; `None` while nobody was ever revoked.
    ///
    /// # Errors
    /// The database's.
    pub async fn newest_list(&self) -> Result<Option<List>, sqlx::Error> {
        let mut connection = self.pool.acquire().await?;
        newest(&mut connection).await
    }

    /// Makes a new list when devices were revoked since the newest one, numbered with the time (milliseconds since
    /// 1970-01-01 UTC) or, if that is taken, with the number after the newest. Says whether there is a new one;
    /// `Unsigned` when that would take the enrolment key and it is not there.
    ///
    /// # Errors
    /// The database's.
    pub async fn extend_list(
        &self,
        authority: Option<&Authority>,
        now: u64,
    ) -> Result<Extended, sqlx::Error> {
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let revoked = revoked(&mut tx).await?;
        let listed: i64 = sqlx::query_scalar("SELECT count(*) FROM listed").fetch_one(&mut *tx).await?;
        if listed as usize == revoked.len() {
            return Ok(Extended::Nothing);
        }
        let Some(authority) = authority else { return Ok(Extended::Unsigned) };
        // Numbers follow the clock, so that a database restored from a backup goes on with numbers that no device
        // has seen: it would pass over a list numbered like one that it has.
        let number = newest(&mut tx).await?.map_or(0, |list| list.number + 1).max(unix_millis());
        let keys: Vec<_> = revoked.iter().map(|device| (device.public_key, device.revoked)).collect();
        let der = authority.revocation_list(number, now, &keys).map_err(super::decode)?;
        sqlx::query("INSERT INTO revocations VALUES (?, ?)")
            .bind(number as i64)
            .bind(&der)
            .execute(&mut *tx)
            .await?;
        for device in &revoked {
            sqlx::query("INSERT OR IGNORE INTO listed VALUES (?)")
                .bind(device.id.as_bytes().as_slice())
                .execute(&mut *tx)
                .await?;
        }
        tx.commit().await?;
        Ok(Extended::To(number))
    }
}

/// What became of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extended {
    /// It says all there is to say.
    Nothing,
    /// There is a new one.
    To(u64),
    /// The enrolment key is offline: the mediator refuses revoked devices, others do not know it yet.
    Unsigned,
}

pub(super) async fn mark(
    connection: &mut SqliteConnection,
    id: DeviceId,
    now: u64,
) -> Result<bool, sqlx::Error> {
    sqlx::query("UPDATE devices SET revoked = ? WHERE id = ? AND revoked = 0")
        .bind(now.max(1) as i64)
        .bind(id.as_bytes().as_slice())
        .execute(connection)
        .await
        .map(|done| done.rows_affected() > 0)
}

async fn newest(connection: &mut SqliteConnection) -> Result<Option<List>, sqlx::Error> {
    let row = sqlx::query("SELECT number, list FROM revocations ORDER BY number DESC LIMIT 1")
        .fetch_optional(connection)
        .await?;
    row.map(|row| {
        Ok(List { number: row.try_get::<i64, _>("number")?.max(0) as u64, der: row.try_get("list")? })
    })
    .transpose()
}

async fn revoked(connection: &mut SqliteConnection) -> Result<Vec<Device>, sqlx::Error> {
    let rows =
        sqlx::query("SELECT * FROM devices WHERE revoked > 0 ORDER BY revoked").fetch_all(connection).await?;
    rows.iter().map(read_device).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Candidate, Token};
    use super::*;
    use adit_client::identity::DeviceKey;
    use adit_client::identity::revocation::Revocations;
    use adit_protocol::Role;

    #[tokio::test]
    async fn every_revoked_device_gets_on_a_list_as_soon_as_there_is_a_key() {
        let dir = tempfile::tempdir().expect("tempdir");
        let store = Store::open(&dir.path().join("state.db")).await.expect("opens");
        let authority = Authority::new(&DeviceKey::generate().expect("key"), 5).expect("root");
        let token = Token {
            hash: [1; 32],
            role: Role::Agent,
            tags: vec![],
            all_agents: false,
            may_replace: true,
            uses: 9,
            expires: 1000,
        };
        store.add_token(&token).await.expect("adds");
        let mut ids = vec![];
        for key in 1..=3 {
            let name = format!("a{key}");
            let candidate = Candidate {
                token: [1; 32],
                public_key: [key; 32],
                name: &name,
                tags: &[],
                hosts: &[],
                replace: false,
                sign: &|_| Some(vec![]),
            };
            ids.push(store.enrol(&candidate, 1).await.expect("enrols").device.id);
        }
        assert_eq!(store.extend_list(Some(&authority), 9).await.expect("works"), Extended::Nothing);
        assert!(store.revoke(ids[0], 8).await.expect("revokes"));
        assert!(!store.revoke(ids[0], 9).await.expect("is revoked"));
        assert_eq!(store.extend_list(None, 9).await.expect("works"), Extended::Unsigned);
        assert_eq!(store.newest_list().await.expect("reads"), None);
        let mut last = 0;
        for revoked in [1, 2] {
            let extended = store.extend_list(Some(&authority), 9).await.expect("works");
            let Extended::To(number) = extended else { panic!("{extended:?}") };
            assert!(number > std::mem::replace(&mut last, number));
            assert_eq!(store.extend_list(Some(&authority), 9).await.expect("works"), Extended::Nothing);
            let list = store.newest_list().await.expect("reads").expect("is there");
            let list = Revocations::read(&list.der, authority.certificate()).expect("reads");
            assert_eq!((list.number, list.len()), (number, revoked));
            assert!(list.has(&[1; 32]) && list.has(&[2; 32]) == (revoked == 2) && !list.has(&[3; 32]));
            store.revoke(ids[1], 10).await.expect("revokes");
        }
        store.revoke(ids[2], 500).await.expect("revokes");
        let now = unix_millis();
        let extended = store.extend_list(Some(&authority), 500).await.expect("works");
        assert!(matches!(extended, Extended::To(number) if number >= now && number > last), "{extended:?}");
    }
}
