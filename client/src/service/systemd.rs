//! Services under systemd: the unit of `deploy/systemd`, a user of its own (systemd-sysusers) who owns the
//! state directory, and the one capability that the unit names.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::Status;
use super::plan::{self, Found, Step};
use crate::exit::{Exit, Failure};

/// How long a server that runs may take until it says that it is ready.
const READY: Duration = Duration::from_secs(15);
/// How often it is asked.
const ASK: Duration = Duration::from_millis(200);
/// Lines of the journal that an error shows.
const LINES: &str = "15";
/// What the sandbox hides (ProtectHome, PrivateTmp): neither program nor state can be there.
const HIDDEN: [&str; 5] = ["/home", "/root", "/run/user", "/tmp", "/var/tmp"];

/// One of adit's programs as a service.
#[derive(Debug)]
pub struct Service {
    /// Name of the unit, and of the user who runs it.
    pub name: &'static str,
    /// Name of the program in /usr/bin, which the unit starts.
    pub program: &'static str,
    /// The command that serves: `run`.
    pub command: &'static [&'static str],
    /// Text of the unit.
    pub unit: &'static str,
    /// Makes the user (sysusers.d(5)).
    pub users: &'static str,
}

impl Service {
    /// The state directory of the unit: `/var/lib/NAME`.
    pub fn default_dir(&self) -> PathBuf {
        Path::new("/var/lib").join(self.name)
    }

    /// The program that the unit starts.
    pub fn program(&self) -> PathBuf {
        Path::new("/usr/bin").join(self.program)
    }

    /// The whole command line of the service.
    pub(super) fn command(&self, setup: &Setup) -> Vec<String> {
        let mut words = vec![setup.program.display().to_string()];
        words.extend(self.command.iter().map(|&word| word.to_owned()));
        words.extend(["--data".to_owned(), setup.dir.display().to_string()]);
        words.extend(setup.arguments.iter().cloned());
        words
    }
}

/// What a service is to run with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setup {
    /// State directory.
    pub dir: PathBuf,
    /// The program.
    pub program: PathBuf,
    /// Arguments beside the state directory.
    pub arguments: Vec<String>,
}

impl Setup {
    /// The program that runs now, with the state in `dir`.
    ///
    /// # Errors
    /// [`ServiceError::Io`].
    pub fn of_this_program(dir: &Path, arguments: Vec<String>) -> Result<Self, ServiceError> {
        let program = std::env::current_exe().and_then(fs::canonicalize)?;
        Ok(Self { dir: std::path::absolute(dir)?, program, arguments })
    }

    /// Neither may be where the sandbox does not see it.
    fn check(&self) -> Result<(), ServiceError> {
        let hidden = |path: &Path| HIDDEN.iter().any(|place| path.starts_with(place));
        for (what, path) in [("program", &self.program), ("state directory", &self.dir)] {
            if hidden(path) {
                return Err(ServiceError::Hidden { what, path: path.clone() });
            }
        }
        Ok(())
    }
}

/// Whether [`install`] can work: to be asked before anything else is done.
///
/// # Errors
/// [`ServiceError::NotBooted`], [`ServiceError::Hidden`], [`ServiceError::NotRoot`].
pub fn check(service: &Service, setup: &Setup) -> Result<(), ServiceError> {
    booted(service, setup)?;
    setup.check()?;
    root()
}

/// Sets `service` up, starts it, and waits until it runs; where `ready` is a server's diagnostics address,
/// until it says that it is ready. Gives the lines for people. May be repeated: what is as it should be
/// stays, and a service that has nothing new is not restarted.
///
/// # Errors
/// [`ServiceError`], with the end of the journal when the program did not start.
pub fn install(service: &Service, setup: &Setup, ready: Option<SocketAddr>) -> Result<String, ServiceError> {
    check(service, setup)?;
    for step in plan::install(service, setup, &find(service)) {
        match take(&step) {
            Err(ServiceError::Step { .. }) if starts(&step) => {
                return Err(ServiceError::NotStarted { name: service.name, journal: journal(service) });
            }
            done => done?,
        }
    }
    if let Some(address) = ready.filter(|address| address.port() != 0) {
        wait_until_ready(service, address)?;
    }
    Ok(format!("{0} is running as user {0}, state in {1}", service.name, setup.dir.display()))
}

/// What [`install`] would do, one step a line or more.
pub fn planned_install(service: &Service, setup: &Setup) -> String {
    text(&plan::install(service, setup, &find(service)))
}

/// Stops and removes `service`; with `purge` its state in that directory and its user, too. Gives the lines for
/// people; with `dry_run` these are the steps, and none is taken.
///
/// # Errors
/// [`ServiceError`]; none with `dry_run`.
pub fn uninstall(
    service: &Service,
    setup: &Setup,
    purge: bool,
    dry_run: bool,
) -> Result<String, ServiceError> {
    let found = find(service);
    let steps = planned(service, setup, purge, &found);
    if dry_run {
        return Ok(text(&steps));
    }
    booted(service, setup)?;
    root()?;
    for step in steps {
        take(&step)?;
    }
    let package = if found.packaged { "; its unit stays with the package" } else { "" };
    let state = if purge { ", and so are its state and user" } else { "" };
    Ok(format!("{} is removed{state}{package}", service.name))
}

/// Asks systemd. Needs no rights.
///
/// # Errors
/// [`ServiceError::NotBooted`], [`ServiceError::Step`].
pub fn status(service: &Service, setup: &Setup) -> Result<Status, ServiceError> {
    booted(service, setup)?;
    let shown = show(service)?;
    let is = |key: &str, value: &str| property(&shown, key) == Some(value);
    Ok(Status {
        service: service.name,
        installed: is("LoadState", "loaded"),
        enabled: is("UnitFileState", "enabled"),
        running: is("ActiveState", "active"),
        pid: property(&shown, "MainPID").and_then(|pid| pid.parse().ok()).filter(|&pid| pid != 0),
    })
}

fn booted(service: &Service, setup: &Setup) -> Result<(), ServiceError> {
    if sd_notify::booted().unwrap_or(false) {
        return Ok(());
    }
    Err(ServiceError::NotBooted { name: service.name, command: service.command(setup).join(" ") })
}

fn root() -> Result<(), ServiceError> {
    if rustix::process::geteuid().is_root() { Ok(()) } else { Err(ServiceError::NotRoot) }
}

/// Whether the service runs now.
pub fn is_running(service: &Service) -> bool {
    show(service).is_ok_and(|shown| property(&shown, "ActiveState") == Some("active"))
}

fn find(service: &Service) -> Found {
    let file = format!("{}.service", service.name);
    let packages = ["/usr/lib/systemd/system", "/lib/systemd/system"];
    let pid = show(service).ok().and_then(|shown| property(&shown, "MainPID").map(str::to_owned));
    Found {
        packaged: packages.iter().any(|dir| Path::new(dir).join(&file).exists()),
        unit: fs::read_to_string(plan::unit_file(service)).ok(),
        drop_in: fs::read_to_string(plan::drop_in_file(service)).ok(),
        running: pid
            .filter(|pid| pid != "0")
            .and_then(|pid| fs::read_link(Path::new("/proc").join(pid).join("exe")).ok()),
    }
}

fn planned(service: &Service, setup: &Setup, purge: bool, found: &Found) -> Vec<Step> {
    let has_user = Command::new("id").arg(service.name).output().is_ok_and(|asked| asked.status.success());
    plan::uninstall(service, purge.then_some(setup.dir.as_path()), has_user, found)
}

fn text(steps: &[Step]) -> String {
    let steps: Vec<String> = steps.iter().map(Step::to_string).collect();
    if steps.is_empty() { "nothing to do".to_owned() } else { steps.join("\n") }
}

fn starts(step: &Step) -> bool {
    matches!(step, Step::Run(command, _) if command.iter().any(|word| word == "start" || word == "restart"))
}

fn take(step: &Step) -> Result<(), ServiceError> {
    tracing::debug!(%step, "service");
    match step {
        Step::Run(command, input) => run(command, *input).map(drop),
        Step::Write(path, text) => {
            fs::create_dir_all(path.parent().unwrap_or(path))?;
            // A package that was removed leaves its unit masked, as a link to /dev/null.
            if path.is_symlink() {
                fs::remove_file(path)?;
            }
            Ok(fs::write(path, text)?)
        }
        Step::Remove(path) => {
            let removed = match fs::symlink_metadata(path) {
                Ok(found) if found.is_dir() => fs::remove_dir_all(path),
                Ok(_) => fs::remove_file(path),
                Err(error) => Err(error),
            };
            if let Some(dir) = path.parent().filter(|dir| dir.extension().is_some_and(|is| is == "d")) {
                // The administrator may have drop-ins of his own there.
                let _ = fs::remove_dir(dir);
            }
            match removed {
                Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
                _ => Ok(()),
            }
        }
    }
}

/// Runs a command to its end; its standard output.
fn run(command: &[String], input: Option<&str>) -> Result<String, ServiceError> {
    let failed = |why: String| ServiceError::Step { command: command.join(" "), why };
    let mut child = Command::new(&command[0])
        .args(&command[1..])
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        // One short line: it fits the pipe. Who does not read it says why in his own words.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(failed(if said.is_empty() { output.status.to_string() } else { said }));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn show(service: &Service) -> Result<String, ServiceError> {
    let properties = "--property=LoadState,ActiveState,UnitFileState,MainPID";
    run(&["systemctl", "show", properties, service.name].map(str::to_owned), None)
}

fn property<'a>(shown: &'a str, key: &str) -> Option<&'a str> {
    shown.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
}

fn journal(service: &Service) -> String {
    let command = ["journalctl", "--no-pager", "--output", "cat", "--lines", LINES, "--unit", service.name]
        .map(str::to_owned);
    run(&command, None).unwrap_or_else(|error| error.to_string())
}

fn wait_until_ready(service: &Service, address: SocketAddr) -> Result<(), ServiceError> {
    let start = Instant::now();
    while !is_ready(address) {
        if start.elapsed() > READY {
            return Err(ServiceError::NotReady { name: service.name, address, journal: journal(service) });
        }
        std::thread::sleep(ASK);
    }
    Ok(())
}

/// Whether the server whose diagnostics are at `address` says that it is ready (`GET /readyz`).
fn is_ready(address: SocketAddr) -> bool {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let ask = || {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::new(ip, address.port()), ASK)?;
        stream.set_read_timeout(Some(ASK))?;
        stream.write_all(b"GET /readyz HTTP/1.0\r\n\r\n")?;
        let mut status = [0; 12];
        stream.read_exact(&mut status)?;
        Ok::<_, std::io::Error>(status.ends_with(b" 200"))
    };
    ask().unwrap_or(false)
}

/// Why a service was not set up or removed.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Only root sets services up.
    #[error("setting up a service needs root")]
    NotRoot,
    /// Another service manager, or none.
    #[error("this system does not run systemd, so there is no service {name} here")]
    NotBooted {
        /// The unit.
        name: &'static str,
        /// What the unit would run.
        command: String,
    },
    /// The sandbox of the service hides that place.
    #[error("the {what} {} is in a place that the service cannot see", path.display())]
    Hidden {
        /// Program or state directory.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
    },
    /// A command failed.
    #[error("`{command}` failed: {why}")]
    Step {
        /// The command line.
        command: String,
        /// What it said.
        why: String,
    },
    /// systemd could not start it.
    #[error("{name} does not start; the end of its journal:\n{}", indented(journal))]
    NotStarted {
        /// The unit.
        name: &'static str,
        /// Lines.
        journal: String,
    },
    /// It runs, but does not say that it is ready.
    #[error(
        "{name} runs, but http://{address}/readyz does not say so within {} s; the end of its journal:\n{}",
        READY.as_secs(),
        indented(journal)
    )]
    NotReady {
        /// The unit.
        name: &'static str,
        /// Its diagnostics.
        address: SocketAddr,
        /// Lines.
        journal: String,
    },
    /// `status` of a service that does not run.
    #[error("{0} is not running")]
    NotRunning(&'static str),
    /// The system failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

fn indented(lines: &str) -> String {
    lines.lines().map(|line| format!("  | {line}")).collect::<Vec<_>>().join("\n")
}

impl Failure for ServiceError {
    fn exit(&self) -> Exit {
        match self {
            Self::NotRoot | Self::NotBooted { .. } | Self::Hidden { .. } => Exit::Usage,
            Self::NotReady { .. } => Exit::TimedOut,
            Self::Step { .. } | Self::NotStarted { .. } | Self::NotRunning(_) | Self::Io(_) => Exit::Failed,
        }
    }

    fn remedy(&self) -> Option<String> {
        Some(match self {
            Self::NotRoot => format!("sudo {}, or see with --dry-run what it would do", this_command()),
            Self::NotBooted { command, .. } => {
                format!("let what starts programs here run this, as a user of its own: {command}")
            }
            Self::Hidden { what: "program", path } => {
                let name = path.file_name().unwrap_or_default().display();
                format!(
                    "sudo install {} /usr/local/bin/, and start /usr/local/bin/{name} instead",
                    path.display()
                )
            }
            Self::Hidden { .. } => "move it to /var/lib, for example, and name it with --data".to_owned(),
            Self::NotStarted { name, .. } => format!(
                "mend that; the service is installed and tries again by itself: systemctl status {name}"
            ),
            Self::NotReady { name, .. } => {
                format!("it goes on trying; see what it says: journalctl --follow --unit {name}")
            }
            Self::NotRunning(name) => format!("see why: systemctl status {name}"),
            Self::Step { .. } | Self::Io(_) => return None,
        })
    }
}

/// The command line of this process, as it was typed.
fn this_command() -> String {
    let mut words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    let program = words.next().unwrap_or_default();
    // sudo has a PATH of its own: what is not in /usr is named in full.
    let full = std::env::current_exe().ok().filter(|path| !path.starts_with("/usr"));
    let program = full.map_or(program, |path| path.display().to_string());
    [program].into_iter().chain(words).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn what_systemctl_shows_is_read() {
        let shown = "MainPID=812\nLoadState=loaded\nActiveState=active\n";
        assert_eq!(property(shown, "MainPID"), Some("812"));
        assert_eq!(property(shown, "ActiveState"), Some("active"));
        assert_eq!(property(shown, "Active"), None);
    }

    #[test]
    fn ready_is_what_says_200() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
        let address = listener.local_addr().expect("bound");
        let answers = std::thread::spawn(move || {
            for answer in ["HTTP/1.1 503 Service Unavailable\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"] {
                let (mut stream, _) = listener.accept().expect("is asked");
                stream.write_all(answer.as_bytes()).expect("answers");
            }
        });
        assert!(!is_ready(address));
        assert!(is_ready(SocketAddr::from(([0, 0, 0, 0], address.port()))));
        answers.join().expect("no panic");
        assert!(!is_ready(address), "nobody is there");
    }

    #[test]
    fn errors_say_what_to_do() {
        let error =
            ServiceError::NotBooted { name: "adit-agent", command: "/usr/bin/adit agent --data /d".into() };
        assert_eq!(error.exit(), Exit::Usage);
        assert!(error.remedy().expect("has one").ends_with("/usr/bin/adit agent --data /d"));
        let error = ServiceError::NotStarted { name: "adit-agent", journal: "one\ntwo\n".into() };
        assert!(error.to_string().ends_with("\n  | one\n  | two"));
        assert!(ServiceError::NotRoot.remedy().expect("has one").starts_with("sudo "));
    }
}
