//! A Windows service. **Untried on real Windows**: CI compiles it and runs it under Wine, whose service
//! manager starts and stops it, but knows neither its account nor access lists.
//!
//! It runs as `NT SERVICE\adit-agent`, an account that Windows makes up for this service alone: no
//! password, no rights but those of every user, and the state directory is its own. It starts with the
//! system, and again when it failed.

use std::ffi::OsString;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use windows_service::define_windows_service;
use windows_service::service::{
    Service, ServiceAccess, ServiceAction, ServiceActionType, ServiceControl, ServiceControlAccept,
    ServiceErrorControl, ServiceExitCode, ServiceFailureActions, ServiceFailureResetPeriod, ServiceInfo,
    ServiceStartType, ServiceState, ServiceStatus, ServiceType,
};
use windows_service::service_control_handler::{self, ServiceControlHandlerResult, ServiceStatusHandle};
use windows_service::service_dispatcher;
use windows_service::service_manager::{ServiceManager, ServiceManagerAccess};

use super::Status;
use crate::exit::{Exit, Failure};
use crate::identity::store;
use crate::os;

/// Name of the service.
pub const NAME: &str = "adit-agent";
const DISPLAY_NAME: &str = "adit agent";
const DESCRIPTION: &str = "Lets technicians of your organisation reach what the agent's allow list has.";
const ACCOUNT: &str = r"NT SERVICE\adit-agent";
/// The account may read and change what is in the state directory.
const ACCOUNT_ACCESS: &str = r"NT SERVICE\adit-agent:(OI)(CI)M";

/// Pauses before it is started again; the last one is for all further failures.
const RESTARTS: [Duration; 3] = [Duration::from_secs(2), Duration::from_secs(15), Duration::from_secs(60)];
/// After this time without a failure the count starts again.
const FORGIVEN: Duration = Duration::from_secs(3600);
/// How long it may take to stop: the technicians are told.
const STOPPING: Duration = Duration::from_secs(20);
/// How long the service manager may be busy with the start of others: after a boot it starts all of them.
const BUSY: Duration = Duration::from_secs(120);
/// Nobody announces that a service has stopped, or that the service manager is free.
const POLL: Duration = Duration::from_millis(100);

/// How often a service is started that did not report in time: on a busy machine its program is slow to load,
/// and at the second try it is in memory.
const TRIES: usize = 3;

/// ERROR_SERVICE_REQUEST_TIMEOUT: its process did not report, by default within 30 s.
const NO_REPORT: i32 = 1053;
/// ERROR_SERVICE_DATABASE_LOCKED: one service is started at a time.
const DATABASE_LOCKED: i32 = 1055;
/// ERROR_SERVICE_DOES_NOT_EXIST.
const NO_SUCH_SERVICE: i32 = 1060;
/// ERROR_SERVICE_NOT_ACTIVE.
const NOT_ACTIVE: i32 = 1062;
/// ERROR_FAILED_SERVICE_CONTROLLER_CONNECT: a person called what is the service manager's to call.
const NOT_BY_HAND: i32 = 1063;

/// Completes when the service is to stop.
pub type Stop = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The state directory of the service: `%ProgramData%\adit\agent`.
pub fn default_data() -> PathBuf {
    program_data().join("agent")
}

fn program_data() -> PathBuf {
    let all = std::env::var_os("ProgramData").map_or_else(|| PathBuf::from(r"C:\ProgramData"), PathBuf::from);
    all.join("adit")
}

/// Makes the service, or brings it up to date, and starts it if `data` holds an identity; returns whether
/// it does. The directory is made, and from now on only the administrators and the service may enter it:
/// so install first and enrol afterwards, then install again.
///
/// # Errors
/// [`ServiceError`].
pub fn install(data: &Path) -> Result<bool, ServiceError> {
    let program = std::env::current_exe().map_err(ServiceError::Program)?;
    if os::in_profile(&program) {
        return Err(ServiceError::InProfile(program));
    }
    let data = std::path::absolute(data).map_err(ServiceError::Program)?;
    let info = ServiceInfo {
        name: NAME.into(),
        display_name: DISPLAY_NAME.into(),
        service_type: ServiceType::OWN_PROCESS,
        start_type: ServiceStartType::AutoStart,
        error_control: ServiceErrorControl::Normal,
        executable_path: program,
        launch_arguments: ["service", "run", "--data"]
            .map(OsString::from)
            .into_iter()
            .chain([data.clone().into_os_string()])
            .collect(),
        dependencies: vec![],
        account_name: Some(ACCOUNT.into()),
        account_password: None,
    };
    let access = ServiceManagerAccess::CONNECT | ServiceManagerAccess::CREATE_SERVICE;
    let manager = manager(access)?;
    let service = match manager.open_service(NAME, ServiceAccess::ALL_ACCESS) {
        Ok(service) => {
            stop(&service)?;
            service.change_config(&info).map_err(refused("change the service"))?;
            service
        }
        Err(error) if is(&error, NO_SUCH_SERVICE) => {
            manager.create_service(&info, ServiceAccess::ALL_ACCESS).map_err(refused("make the service"))?
        }
        Err(error) => return Err(refused("open the service")(error)),
    };
    configure(&service).map_err(refused("change the service"))?;
    // Whoever made a directory in ProgramData before us, everybody may, shall not own it.
    let below = program_data();
    let outermost = if data.starts_with(&below) { &below } else { &data };
    std::fs::create_dir_all(&data)
        .and_then(|()| os::take_over(outermost, &[ACCOUNT_ACCESS]))
        .map_err(|error| ServiceError::Directory { dir: outermost.clone(), error })?;
    if store::load(&data).is_err() {
        return Ok(false);
    }
    start(&service)?;
    Ok(true)
}

/// Stops the service and removes it. The state directory is left as it is.
///
/// # Errors
/// [`ServiceError`].
pub fn uninstall() -> Result<(), ServiceError> {
    let service = open(ServiceAccess::QUERY_STATUS | ServiceAccess::STOP | ServiceAccess::DELETE)?;
    stop(&service)?;
    service.delete().map_err(refused("remove the service"))
}

/// Asks the service manager. Needs no rights.
///
/// # Errors
/// [`ServiceError`].
pub fn status() -> Result<Status, ServiceError> {
    let mut status = Status { service: NAME, installed: false, enabled: false, running: false, pid: None };
    let service = match open(ServiceAccess::QUERY_STATUS | ServiceAccess::QUERY_CONFIG) {
        Err(ServiceError::NotInstalled) => return Ok(status),
        service => service?,
    };
    let config = service.query_config().map_err(refused("tell about the service"))?;
    let now = service.query_status().map_err(refused("tell about the service"))?;
    status.installed = true;
    status.enabled = config.start_type == ServiceStartType::AutoStart;
    status.running = now.current_state == ServiceState::Running;
    status.pid = now.process_id.filter(|process| *process != 0);
    Ok(status)
}

/// Is the service: tells the service manager so and runs `agent`, which ends when [`Stop`] completes, on a
/// thread of its own. Blocks until it has ended. To be called once, by a process that the service manager
/// started.
///
/// # Errors
/// [`ServiceError::ByHand`] where somebody else started it; what `agent` returns is told to the service
/// manager, which starts it again when that is no success.
pub fn run(agent: impl FnOnce(Stop) -> Exit + Send + 'static) -> Result<(), ServiceError> {
    *AGENT.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(agent));
    service_dispatcher::start(NAME, service_entry).map_err(|error| {
        if is(&error, NOT_BY_HAND) { ServiceError::ByHand } else { refused("run the service")(error) }
    })
}

type Agent = Box<dyn FnOnce(Stop) -> Exit + Send>;

/// The entry is a bare function: what it runs has to wait for it here.
static AGENT: Mutex<Option<Agent>> = Mutex::new(None);

define_windows_service!(service_entry, serve);

fn serve(_: Vec<OsString>) {
    let agent = AGENT.lock().unwrap_or_else(PoisonError::into_inner).take();
    let (Some(agent), Ok((handle, stop))) = (agent, register()) else { return };
    tell(handle, ServiceState::Running, Exit::Done);
    let exit = agent(stop);
    tell(handle, ServiceState::Stopped, exit);
}

/// From now on the service manager's wishes are heard.
fn register() -> windows_service::Result<(ServiceStatusHandle, Stop)> {
    let (sender, stopped) = oneshot::channel();
    let mut sender = Some(sender);
    let shared = Arc::new(OnceLock::new());
    let handle = shared.clone();
    let handler = move |control| match control {
        ServiceControl::Interrogate => ServiceControlHandlerResult::NoError,
        ServiceControl::Stop | ServiceControl::Shutdown => {
            // Said here, so that nothing is asked of this handler any more: after these two the crate lets
            // go of it.
            if let Some(handle) = handle.get() {
                tell(*handle, ServiceState::StopPending, Exit::Done);
            }
            // The agent may have ended by itself.
            let _ = sender.take().map(|sender| sender.send(()));
            ServiceControlHandlerResult::NoError
        }
        _ => ServiceControlHandlerResult::NotImplemented,
    };
    let handle = service_control_handler::register(NAME, handler)?;
    let _ = shared.set(handle);
    let stop = async move {
        if stopped.await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    Ok((handle, Box::pin(stop)))
}

fn tell(handle: ServiceStatusHandle, current_state: ServiceState, exit: Exit) {
    let (controls_accepted, wait_hint) = match current_state {
        ServiceState::Running => {
            (ServiceControlAccept::STOP | ServiceControlAccept::SHUTDOWN, Duration::ZERO)
        }
        ServiceState::StopPending => (ServiceControlAccept::empty(), STOPPING),
        _ => (ServiceControlAccept::empty(), Duration::ZERO),
    };
    let exit_code = match exit {
        Exit::Done => ServiceExitCode::NO_ERROR,
        failed => ServiceExitCode::ServiceSpecific(failed as u32),
    };
    let status = ServiceStatus {
        service_type: ServiceType::OWN_PROCESS,
        current_state,
        controls_accepted,
        exit_code,
        checkpoint: 0,
        wait_hint,
        process_id: None,
    };
    if let Err(error) = handle.set_service_status(status) {
        tracing::warn!(error = %system(error), "the service manager does not hear of the service's state");
    }
}

fn configure(service: &Service) -> windows_service::Result<()> {
    let restart = |delay| ServiceAction { action_type: ServiceActionType::Restart, delay };
    service.set_description(DESCRIPTION)?;
    service.update_failure_actions(ServiceFailureActions {
        reset_period: ServiceFailureResetPeriod::After(FORGIVEN),
        reboot_msg: None,
        command: None,
        actions: Some(RESTARTS.map(restart).to_vec()),
    })?;
    // An agent that ends with an error has failed, too. Wine does not know this setting.
    if let Err(error) = service.set_failure_actions_on_non_crash_failures(true) {
        tracing::warn!(error = %system(error), "the service is started again after a crash only");
    }
    Ok(())
}

/// Starts the service, when no other one is being started any more.
fn start(service: &Service) -> Result<(), ServiceError> {
    let deadline = Instant::now() + BUSY;
    let mut said = false;
    let mut tries = 1;
    loop {
        match service.start::<OsString>(&[]) {
            Err(error) if is(&error, NO_REPORT) && tries < TRIES => {
                tracing::info!("the service has not reported in time; starting it again");
                tries += 1;
            }
            Err(error) if is(&error, DATABASE_LOCKED) && Instant::now() < deadline => {
                if !std::mem::replace(&mut said, true) {
                    tracing::info!("the service manager is starting other services; waiting for it");
                }
                std::thread::sleep(POLL);
            }
            started => return started.map_err(refused("start the service")),
        }
    }
}

/// Stops the service if it runs, and waits until it has stopped.
fn stop(service: &Service) -> Result<(), ServiceError> {
    match service.stop() {
        Err(error) if is(&error, NOT_ACTIVE) => return Ok(()),
        stopping => stopping.map_err(refused("stop the service"))?,
    };
    let deadline = Instant::now() + STOPPING;
    while service.query_status().map_err(refused("stop the service"))?.current_state != ServiceState::Stopped
    {
        if Instant::now() > deadline {
            return Err(ServiceError::NotStopped);
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

fn open(access: ServiceAccess) -> Result<Service, ServiceError> {
    manager(ServiceManagerAccess::CONNECT)?.open_service(NAME, access).map_err(|error| {
        if is(&error, NO_SUCH_SERVICE) {
            ServiceError::NotInstalled
        } else {
            refused("open the service")(error)
        }
    })
}

fn manager(access: ServiceManagerAccess) -> Result<ServiceManager, ServiceError> {
    ServiceManager::local_computer(None::<&str>, access).map_err(refused("let us in"))
}

fn refused(what: &'static str) -> impl Fn(windows_service::Error) -> ServiceError {
    move |error| ServiceError::Manager { what, error: system(error) }
}

fn is(error: &windows_service::Error, code: i32) -> bool {
    matches!(error, windows_service::Error::Winapi(error) if error.raw_os_error() == Some(code))
}

/// The system's own words, which the crate's error does not show.
fn system(error: windows_service::Error) -> io::Error {
    match error {
        windows_service::Error::Winapi(error) => error,
        other => io::Error::other(other),
    }
}

/// Why something about the service was not done.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The service manager said no.
    #[error("the service manager does not {what}: {error}")]
    Manager {
        /// What was asked.
        what: &'static str,
        /// Its answer.
        error: io::Error,
    },
    /// There is no such service.
    #[error("the service {NAME} is not installed")]
    NotInstalled,
    /// It does not run.
    #[error("the service {NAME} does not run")]
    NotRunning,
    /// It goes on.
    #[error("the service {NAME} has not stopped within {} s", STOPPING.as_secs())]
    NotStopped,
    /// This program or its paths are not known.
    #[error("the path of this program is not known: {0}")]
    Program(io::Error),
    /// The service's account has no access.
    #[error("{} is below a user's profile, where the service may not read it", .0.display())]
    InProfile(PathBuf),
    /// The state directory.
    #[error("{}: {error}", dir.display())]
    Directory {
        /// Which one.
        dir: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// `adit service run` is not for people.
    #[error("only the service manager can run the service")]
    ByHand,
}

impl Failure for ServiceError {
    fn exit(&self) -> Exit {
        match self {
            Self::Manager { .. } | Self::Program(_) | Self::Directory { .. } | Self::NotRunning => {
                Exit::Failed
            }
            Self::NotInstalled | Self::InProfile(_) | Self::ByHand => Exit::Usage,
            Self::NotStopped => Exit::TimedOut,
        }
    }

    fn remedy(&self) -> Option<String> {
        Some(match self {
            Self::Manager { error, .. } | Self::Directory { error, .. }
                if error.kind() == io::ErrorKind::PermissionDenied =>
            {
                "run it as an administrator".to_owned()
            }
            Self::Manager { .. } | Self::Program(_) | Self::Directory { .. } => return None,
            Self::NotRunning => "see why: service.log in its state directory".to_owned(),
            Self::NotInstalled => "install it: adit service install".to_owned(),
            Self::NotStopped => "try again, or end its process".to_owned(),
            Self::InProfile(_) => {
                r"copy adit.exe to where every user may run it, such as C:\Program Files\adit".to_owned()
            }
            Self::ByHand => "to run the agent without the service: adit agent".to_owned(),
        })
    }
}
