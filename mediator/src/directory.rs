//! Who is enrolled and may do what, in memory: asked for each request, loaded anew when it has changed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use adit_protocol::{DeviceId, Role};

use crate::store::{Device, Seen, Store};

/// All devices that are not revoked.
pub struct Directory {
    store: Store,
    devices: RwLock<HashMap<DeviceId, Arc<Device>>>,
    /// Taken from reading the database until what was read is in `devices`: an older state never comes last.
    loading: tokio::sync::Mutex<()>,
    /// Visits that are not in the database yet.
    visits: Mutex<HashMap<DeviceId, Seen>>,
}

/// What a reload has found.
#[derive(Debug, Default)]
pub struct Changes {
    /// Are no more: revoked, or deleted.
    pub gone: Vec<Arc<Device>>,
    /// Have another name, other tags, or other grants.
    pub changed: Vec<Arc<Device>>,
}

impl Directory {
    /// Loads all devices.
    ///
    /// # Errors
    /// The database's.
    pub async fn load(store: Store) -> Result<Self, sqlx::Error> {
        let devices = RwLock::new(current(&store).await?);
        Ok(Self { store, devices, loading: tokio::sync::Mutex::default(), visits: Mutex::default() })
    }

    /// Loads all devices anew and says what has changed.
    ///
    /// # Errors
    /// The database's; everything is as before then.
    pub async fn reload(&self) -> Result<Changes, sqlx::Error> {
        let _loading = self.loading.lock().await;
        let mut new = current(&self.store).await?;
        let old = {
            let mut devices = self.write();
            // Visits get to the database later than here.
            for (id, device) in &mut new {
                if let Some(known) = devices.get(id) {
                    Arc::make_mut(device).seen = known.seen.clone();
                }
            }
            std::mem::replace(&mut *devices, new.clone())
        };
        let gone = old.iter().filter(|(id, _)| !new.contains_key(id)).map(|(_, device)| device.clone());
        let differs = |device: &Arc<Device>| {
            old.get(&device.id).is_none_or(|before| {
                (&before.name, &before.tags, &before.grants) != (&device.name, &device.tags, &device.grants)
            })
        };
        Ok(Changes {
            gone: gone.collect(),
            changed: new.values().filter(|device| differs(device)).cloned().collect(),
        })
    }

    /// A device that is not revoked.
    pub fn get(&self, id: DeviceId) -> Option<Arc<Device>> {
        self.devices.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// Adds a device that was just enrolled, as it is in the database now.
    ///
    /// # Errors
    /// The database's.
    pub async fn add(&self, id: DeviceId) -> Result<(), sqlx::Error> {
        let _loading = self.loading.lock().await;
        if let Some(device) = self.store.device(id).await?.filter(|device| device.revoked == 0) {
            self.write().insert(id, Arc::new(device));
        }
        Ok(())
    }

    /// The agents that a technician reaches, sorted by name.
    pub fn reachable(&self, technician: &Device) -> Vec<Arc<Device>> {
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        let mut agents: Vec<_> =
            devices.values().filter(|agent| technician.reaches(agent).is_some()).cloned().collect();
        agents.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        agents
    }

    /// The agent of this name or id.
    pub fn agent(&self, wanted: &str) -> Option<Arc<Device>> {
        let id = wanted.parse::<DeviceId>().ok();
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        let found = match id {
            Some(id) => devices.get(&id).filter(|device| device.role == Role::Agent),
            None => devices.values().find(|device| device.role == Role::Agent && device.name == wanted),
        };
        found.cloned()
    }

    /// Notes a visit; it is written with others, see [`Directory::flush`].
    pub fn note(&self, id: DeviceId, seen: Seen) {
        if let Some(device) = self.write().get_mut(&id) {
            Arc::make_mut(device).seen = seen.clone();
        }
        self.visits.lock().unwrap_or_else(PoisonError::into_inner).insert(id, seen);
    }

    /// Notes that two machines have this device's identity.
    pub fn note_clone(&self, id: DeviceId, now: u64) {
        if let Some(device) = self.write().get_mut(&id) {
            Arc::make_mut(device).cloned = now;
        }
    }

    /// Writes the visits since the last time to the database.
    ///
    /// # Errors
    /// The database's; the visits are kept for the next time.
    pub async fn flush(&self) -> Result<(), sqlx::Error> {
        let visits: Vec<(DeviceId, Seen)> = {
            let mut visits = self.visits.lock().unwrap_or_else(PoisonError::into_inner);
            visits.drain().collect()
        };
        if visits.is_empty() {
            return Ok(());
        }
        let written = self.store.note_seen(&visits).await;
        if written.is_err() {
            let mut newer = self.visits.lock().unwrap_or_else(PoisonError::into_inner);
            for (id, seen) in visits {
                newer.entry(id).or_insert(seen);
            }
        }
        written
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<DeviceId, Arc<Device>>> {
        self.devices.write().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn current(store: &Store) -> Result<HashMap<DeviceId, Arc<Device>>, sqlx::Error> {
    let devices = store.devices().await?;
    Ok(devices.into_iter().filter(|device| device.revoked == 0).map(|d| (d.id, Arc::new(d))).collect())
}
