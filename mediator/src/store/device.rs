//! Devices, and the grants of technicians.

use std::collections::HashMap;
use std::fmt;

use adit_client::identity::certificate::Subject;
use adit_protocol::{DeviceId, Role};
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};

use super::{Store, decode, join, split};

/// An enrolled device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Device id.
    pub id: DeviceId,
    /// What it is enrolled as.
    pub role: Role,
    /// Unique among the devices of its role that are not revoked.
    pub name: String,
    /// `key=value` each.
    pub tags: Vec<String>,
    /// Relays only: names and addresses that clients use.
    pub hosts: Vec<String>,
    /// Ed25519.
    pub public_key: [u8; 32],
    /// The newest one (DER).
    pub certificate: Vec<u8>,
    /// When it was enrolled, in seconds since 1970-01-01 UTC.
    pub enrolled: u64,
    /// When it was revoked; 0: it was not.
    pub revoked: u64,
    /// When it was last there, from where, and with which software.
    pub seen: Seen,
    /// When two machines were last seen with its key; 0: never.
    pub cloned: u64,
    /// Technicians only: which agents it reaches.
    pub grants: Vec<Grant>,
}

/// A device's last visit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// As it said itself.
    pub software: String,
    /// `IP:PORT` that its control channel came from.
    pub address: String,
    /// Seconds since 1970-01-01 UTC; 0: never.
    pub at: u64,
}

/// A rule: a technician reaches the agents that carry all of these tags, or every agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Names it in `adit-mediator deny`.
    pub id: i64,
    /// None: no agent.
    pub tags: Vec<String>,
    /// Every agent, whatever its tags.
    pub all: bool,
    /// Also through the redirector.
    pub redirector: bool,
}

/// What a new grant is for: see [`Grant`].
#[derive(Debug, Clone, Copy)]
pub struct Reach<'a> {
    /// All of these.
    pub tags: &'a [String],
    /// Or every agent.
    pub all: bool,
    /// Also through the redirector.
    pub redirector: bool,
}

impl Grant {
    /// Whether an agent with these tags is within reach.
    pub fn covers(&self, agent_tags: &[String]) -> bool {
        self.all || (!self.tags.is_empty() && self.tags.iter().all(|tag| agent_tags.contains(tag)))
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.all {
            true => write!(f, "grant {}: all agents", self.id),
            false => write!(f, "grant {}: {}", self.id, self.tags.join(" ")),
        }?;
        if self.redirector { f.write_str(", redirector too") } else { Ok(()) }
    }
}

impl Device {
    /// What its certificate says.
    pub fn subject(&self) -> Subject {
        let Self { id, role, name, tags, .. } = self;
        Subject { device_id: *id, role: *role, name: name.clone(), tags: tags.clone() }
    }

    /// The grant by which this technician reaches `agent`, if there is one.
    pub fn reaches(&self, agent: &Device) -> Option<&Grant> {
        let both = self.role == Role::Technician && agent.role == Role::Agent;
        self.grants.iter().find(|grant| both && grant.covers(&agent.tags))
    }

    /// The grant by which this technician reaches `agent` through the redirector.
    pub fn redirects(&self, agent: &Device) -> Option<&Grant> {
        let both = self.role == Role::Technician && agent.role == Role::Agent;
        self.grants.iter().find(|grant| both && grant.redirector && grant.covers(&agent.tags))
    }
}

impl Store {
    /// All devices, revoked ones too, sorted by role and name.
    ///
    /// # Errors
    /// The database's.
    pub async fn devices(&self) -> Result<Vec<Device>, sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        let rows =
            sqlx::query("SELECT * FROM devices ORDER BY role, name, revoked").fetch_all(&mut *tx).await?;
        let grant_rows = sqlx::query("SELECT * FROM grants ORDER BY id").fetch_all(&mut *tx).await?;
        let mut grants: HashMap<DeviceId, Vec<Grant>> = HashMap::new();
        for row in &grant_rows {
            grants.entry(read_id(row, "technician")?).or_default().push(read_grant(row)?);
        }
        let mut devices = rows.iter().map(read_device).collect::<Result<Vec<_>, _>>()?;
        for device in &mut devices {
            device.grants = grants.remove(&device.id).unwrap_or_default();
        }
        Ok(devices)
    }

    /// One device, also when it is revoked.
    ///
    /// # Errors
    /// The database's.
    pub async fn device(&self, id: DeviceId) -> Result<Option<Device>, sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        let id = id.as_bytes().as_slice();
        let found =
            sqlx::query("SELECT * FROM devices WHERE id = ?").bind(id).fetch_optional(&mut *tx).await?;
        let Some(mut device) = found.as_ref().map(read_device).transpose()? else { return Ok(None) };
        let grants = sqlx::query("SELECT * FROM grants WHERE technician = ? ORDER BY id").bind(id);
        device.grants = grants.fetch_all(&mut *tx).await?.iter().map(read_grant).collect::<Result<_, _>>()?;
        Ok(Some(device))
    }

    /// Gives a device another name.
    ///
    /// # Errors
    /// The database's; a unique violation when the name is taken.
    pub async fn rename(&self, id: DeviceId, name: &str) -> Result<(), sqlx::Error> {
        self.set(id, "name", name).await
    }

    /// Gives a device these tags in the place of those that it has.
    ///
    /// # Errors
    /// The database's.
    pub async fn set_tags(&self, id: DeviceId, tags: &[String]) -> Result<(), sqlx::Error> {
        self.set(id, "tags", &join(tags)).await
    }

    /// Keeps a device's renewed certificate.
    ///
    /// # Errors
    /// The database's.
    pub async fn set_certificate(&self, id: DeviceId, der: &[u8]) -> Result<(), sqlx::Error> {
        sqlx::query("UPDATE devices SET certificate = ? WHERE id = ?")
            .bind(der)
            .bind(id.as_bytes().as_slice())
            .execute(&self.pool)
            .await
            .map(drop)
    }

    /// Notes that two machines are there with this device's key.
    ///
    /// # Errors
    /// The database's.
    pub async fn note_clone(&self, id: DeviceId, now: u64) -> Result<(), sqlx::Error> {
        sqlx::query("UPDATE devices SET cloned = ? WHERE id = ?")
            .bind(now as i64)
            .bind(id.as_bytes().as_slice())
            .execute(&self.pool)
            .await
            .map(drop)
    }

    /// Notes visits of devices, all at once.
    ///
    /// # Errors
    /// The database's.
    pub async fn note_seen(&self, visits: &[(DeviceId, Seen)]) -> Result<(), sqlx::Error> {
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        for (id, seen) in visits {
            sqlx::query("UPDATE devices SET software = ?, address = ?, last_seen = ? WHERE id = ?")
                .bind(&seen.software)
                .bind(&seen.address)
                .bind(seen.at as i64)
                .bind(id.as_bytes().as_slice())
                .execute(&mut *tx)
                .await?;
        }
        tx.commit().await
    }

    /// A new grant; gives its number.
    ///
    /// # Errors
    /// The database's.
    pub async fn allow(&self, technician: DeviceId, what: &Reach<'_>, now: u64) -> Result<i64, sqlx::Error> {
        let mut connection = self.pool.acquire().await?;
        insert_grant(&mut connection, technician, what, now).await
    }

    /// Takes grants away from a technician: this one, or all. Says how many there were.
    ///
    /// # Errors
    /// The database's.
    pub async fn deny(&self, technician: DeviceId, grant: Option<i64>) -> Result<u64, sqlx::Error> {
        sqlx::query("DELETE FROM grants WHERE technician = ?1 AND (?2 IS NULL OR id = ?2)")
            .bind(technician.as_bytes().as_slice())
            .bind(grant)
            .execute(&self.pool)
            .await
            .map(|done| done.rows_affected())
    }

    async fn set(&self, id: DeviceId, column: &'static str, value: &str) -> Result<(), sqlx::Error> {
        let update = format!("UPDATE devices SET {column} = ? WHERE id = ?");
        // The column is a constant of ours.
        sqlx::query(sqlx::AssertSqlSafe(update))
            .bind(value)
            .bind(id.as_bytes().as_slice())
            .execute(&self.pool)
            .await
            .map(drop)
    }
}

pub(super) async fn insert_grant(
    connection: &mut SqliteConnection,
    technician: DeviceId,
    what: &Reach<'_>,
    now: u64,
) -> Result<i64, sqlx::Error> {
    sqlx::query("INSERT INTO grants (technician, tags, all_agents, redirector, made) VALUES (?, ?, ?, ?, ?)")
        .bind(technician.as_bytes().as_slice())
        .bind(join(what.tags))
        .bind(what.all)
        .bind(what.redirector)
        .bind(now as i64)
        .execute(connection)
        .await
        .map(|done| done.last_insert_rowid())
}

/// A device without its grants.
pub(super) fn read_device(row: &SqliteRow) -> Result<Device, sqlx::Error> {
    let public_key: &[u8] = row.try_get("public_key")?;
    let role: &str = row.try_get("role")?;
    Ok(Device {
        id: read_id(row, "id")?,
        role: role.parse().map_err(decode)?,
        name: row.try_get("name")?,
        tags: split(row.try_get("tags")?),
        hosts: split(row.try_get("hosts")?),
        public_key: public_key.try_into().map_err(decode)?,
        certificate: row.try_get("certificate")?,
        enrolled: time(row, "enrolled")?,
        revoked: time(row, "revoked")?,
        seen: Seen {
            software: row.try_get("software")?,
            address: row.try_get("address")?,
            at: time(row, "last_seen")?,
        },
        cloned: time(row, "cloned")?,
        grants: vec![],
    })
}

fn read_grant(row: &SqliteRow) -> Result<Grant, sqlx::Error> {
    Ok(Grant {
        id: row.try_get("id")?,
        tags: split(row.try_get("tags")?),
        all: row.try_get("all_agents")?,
        redirector: row.try_get("redirector")?,
    })
}

fn read_id(row: &SqliteRow, column: &str) -> Result<DeviceId, sqlx::Error> {
    let id: &[u8] = row.try_get(column)?;
    DeviceId::try_from(id).map_err(decode)
}

fn time(row: &SqliteRow, column: &str) -> Result<u64, sqlx::Error> {
    Ok(row.try_get::<i64, _>(column)?.max(0) as u64)
}

#[cfg(test)]
pub(crate) fn sample(role: Role, id: u8) -> Device {
    Device {
        id: DeviceId([id; 16]),
        role,
        name: format!("device-{id}"),
        tags: vec![],
        hosts: vec![],
        public_key: [id; 32],
        certificate: vec![],
        enrolled: 0,
        revoked: 0,
        seen: Seen::default(),
        cloned: 0,
        grants: vec![Grant { id: 1, tags: vec![], all: true, redirector: false }],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tags(list: &[&str]) -> Vec<String> {
        list.iter().map(|tag| (*tag).to_owned()).collect()
    }

    #[test]
    fn a_grant_needs_all_its_tags_and_one_grant_is_enough() {
        let grant = |list: &[&str]| Grant { id: 3, tags: tags(list), all: false, redirector: false };
        assert!(grant(&["a=1", "b=2"]).covers(&tags(&["b=2", "c=3", "a=1"])));
        assert!(!grant(&["a=1", "b=2"]).covers(&tags(&["a=1"])));
        assert!(!grant(&[]).covers(&tags(&["a=1"])) && !grant(&[]).covers(&[]));
        assert!(Grant { id: 1, tags: vec![], all: true, redirector: false }.covers(&[]));
        assert_eq!(grant(&["a=1", "b=2"]).to_string(), "grant 3: a=1 b=2");

        let agent = Device { tags: tags(&["a=1"]), ..sample(Role::Agent, 1) };
        let technician = |grants| Device { grants, ..sample(Role::Technician, 2) };
        assert!(technician(vec![grant(&["b=2"]), grant(&["a=1"])]).reaches(&agent).is_some());
        assert!(technician(vec![grant(&["a=1", "b=2"])]).reaches(&agent).is_none());
        assert!(technician(vec![]).reaches(&agent).is_none());
        let another = technician(vec![grant(&["a=1"])]);
        assert!(sample(Role::Agent, 3).reaches(&agent).is_none(), "an agent reaches nobody");
        assert!(another.reaches(&another).is_none(), "a technician is not reached");
    }
}
