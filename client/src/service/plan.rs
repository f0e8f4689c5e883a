//! What `install` and `uninstall` do, as values: `--dry-run` prints them, else they are carried out one after
//! the other. Each step may be repeated.

use std::fmt;
use std::path::{Path, PathBuf};

use super::systemd::{Service, Setup};

/// Units that the administrator, or `install`, put there.
const UNITS: &str = "/etc/systemd/system";

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Runs a program to its end, with this on its standard input.
    Run(Vec<String>, Option<&'static str>),
    /// Writes a file, and its directory if need be.
    Write(PathBuf, String),
    /// Removes a file, or a directory with everything in it, if it is there. Of a unit's drop-ins the
    /// directory goes with the last one.
    Remove(PathBuf),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Run(command, None) => write!(f, "{}", command.join(" ")),
            Self::Run(command, Some(input)) => write!(f, "{} <<< '{}'", command.join(" "), input.trim_end()),
            Self::Write(path, text) => {
                write!(f, "write {}:", path.display())?;
                text.lines().try_for_each(|line| write!(f, "\n    {line}"))
            }
            Self::Remove(path) => write!(f, "rm -rf {}", path.display()),
        }
    }
}

/// What is there before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// A package brought the unit.
    pub(super) packaged: bool,
    /// Text of the unit in [`UNITS`].
    pub(super) unit: Option<String>,
    /// Text of the drop-in.
    pub(super) drop_in: Option<String>,
    /// The program of the service's process, while it runs.
    pub(super) running: Option<PathBuf>,
}

pub(super) fn unit_file(service: &Service) -> PathBuf {
    Path::new(UNITS).join(format!("{}.service", service.name))
}

/// What differs from the unit stands in a drop-in, so that the unit is the same everywhere.
pub(super) fn drop_in_file(service: &Service) -> PathBuf {
    Path::new(UNITS).join(format!("{}.service.d/50-install.conf", service.name))
}

/// Sets the service up and starts it.
pub(super) fn install(service: &Service, setup: &Setup, found: &Found) -> Vec<Step> {
    let name = service.name;
    let dir = setup.dir.display().to_string();
    let mut steps = vec![
        Step::Run(words(&["systemd-sysusers", "-"]), Some(service.users)),
        Step::Run(words(&["install", "-d", "-m", "0700", "-o", name, "-g", name, &dir]), None),
        // Also when `init` or `enroll` ran as root. Symbolic links are not followed.
        Step::Run(words(&["chown", "-Rh", &format!("{name}:{name}"), &dir]), None),
    ];
    let before = steps.len();
    if !found.packaged && found.unit.as_deref() != Some(service.unit) {
        steps.push(Step::Write(unit_file(service), service.unit.to_owned()));
    }
    if found.packaged && found.unit.is_some() {
        // It would hide the package's.
        steps.push(Step::Remove(unit_file(service)));
    }
    let drop_in = drop_in(service, setup);
    if drop_in != found.drop_in {
        steps.push(match drop_in {
            Some(text) => Step::Write(drop_in_file(service), text),
            None => Step::Remove(drop_in_file(service)),
        });
    }
    let changed = steps.len() > before;
    let restart = found.running.as_ref().is_some_and(|program| changed || *program != setup.program);
    steps.push(Step::Run(words(&["systemctl", "daemon-reload"]), None));
    steps.push(Step::Run(words(&["systemctl", "--quiet", "enable", name]), None));
    steps.push(Step::Run(words(&["systemctl", if restart { "restart" } else { "start" }, name]), None));
    steps
}

/// Stops and removes it; with `purge` its state in that directory and its user, too.
pub(super) fn uninstall(service: &Service, purge: Option<&Path>, user: bool, found: &Found) -> Vec<Step> {
    let name = service.name;
    let mut steps = Vec::new();
    if found.packaged || found.unit.is_some() {
        steps.push(Step::Run(words(&["systemctl", "--quiet", "disable", "--now", name]), None));
    }
    if found.drop_in.is_some() {
        steps.push(Step::Remove(drop_in_file(service)));
    }
    if found.unit.is_some() {
        steps.push(Step::Remove(unit_file(service)));
    }
    if !steps.is_empty() {
        steps.push(Step::Run(words(&["systemctl", "daemon-reload"]), None));
    }
    if let Some(dir) = purge {
        steps.push(Step::Remove(dir.to_owned()));
        if user {
            steps.push(Step::Run(words(&["userdel", name]), None));
        }
    }
    steps
}

fn drop_in(service: &Service, setup: &Setup) -> Option<String> {
    let own = service.default_dir() == setup.dir;
    if own && setup.program == service.program() && setup.arguments.is_empty() {
        return None;
    }
    let command: Vec<String> = service.command(setup).iter().map(|word| quoted(word)).collect();
    let mut text = format!(
        "# What `install` was told otherwise than the unit has it.\n[Service]\nExecStart=\nExecStart={}\n",
        command.join(" ")
    );
    if !own {
        text += &format!("StateDirectory=\nReadWritePaths={}\n", quoted(&setup.dir.display().to_string()));
    }
    Some(text)
}

/// A word of a command line in a unit (systemd.service(5), "Command lines").
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-,:=@+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    let mut text = String::from('"');
    for c in word.chars() {
        match c {
            '"' | '\\' => text.extend(['\\', c]),
            '%' | '$' => text.extend([c, c]),
            c => text.push(c),
        }
    }
    text + "\""
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: Service = Service {
        name: "adit-relay",
        program: "adit-relay",
        command: &["run"],
        unit: "[Service]\n",
        users: "u adit-relay - \"adit relay\" /var/lib/adit-relay\n",
    };

    fn setup() -> Setup {
        Setup { dir: SERVICE.default_dir(), program: SERVICE.program(), arguments: vec![] }
    }

    fn texts(steps: &[Step]) -> Vec<String> {
        steps.iter().map(Step::to_string).collect()
    }

    #[test]
    fn a_new_machine_gets_user_state_and_unit_in_this_order() {
        let steps = texts(&install(&SERVICE, &setup(), &Found::default()));
        assert_eq!(
            steps,
            [
                "systemd-sysusers - <<< 'u adit-relay - \"adit relay\" /var/lib/adit-relay'",
                "install -d -m 0700 -o adit-relay -g adit-relay /var/lib/adit-relay",
                "chown -Rh adit-relay:adit-relay /var/lib/adit-relay",
                "write /etc/systemd/system/adit-relay.service:\n    [Service]",
                "systemctl daemon-reload",
                "systemctl --quiet enable adit-relay",
                "systemctl start adit-relay",
            ]
        );
    }

    #[test]
    fn the_second_time_nothing_is_written_and_nothing_restarted() {
        let found =
            Found { unit: Some(SERVICE.unit.into()), running: Some(SERVICE.program()), ..Found::default() };
        let steps = texts(&install(&SERVICE, &setup(), &found));
        assert!(!steps.iter().any(|step| step.starts_with("write") || step.contains("restart")), "{steps:?}");
        // A new program in the old one's place: what runs is called "... (deleted)" by the kernel.
        let old = Found { running: Some("/usr/bin/adit-relay (deleted)".into()), ..found };
        assert_eq!(
            texts(&install(&SERVICE, &setup(), &old)).last().expect("a step"),
            "systemctl restart adit-relay"
        );
    }

    #[test]
    fn the_packages_unit_is_used_and_not_hidden() {
        let packaged = Found { packaged: true, ..Found::default() };
        assert!(!texts(&install(&SERVICE, &setup(), &packaged)).iter().any(|step| step.starts_with("write")));
        let hidden = Found { unit: Some("old".into()), running: Some(SERVICE.program()), ..packaged };
        let steps = texts(&install(&SERVICE, &setup(), &hidden));
        assert!(steps.contains(&"rm -rf /etc/systemd/system/adit-relay.service".to_owned()), "{steps:?}");
        assert_eq!(steps.last().expect("a step"), "systemctl restart adit-relay");
    }

    #[test]
    fn what_differs_stands_in_a_drop_in() {
        let other = Setup {
            dir: "/srv/my relay".into(),
            program: "/opt/adit/100%/adit-relay".into(),
            arguments: vec!["--listen-udp".into(), "[::]:8003".into()],
        };
        let steps = texts(&install(&SERVICE, &other, &Found::default()));
        let drop_in = steps.iter().find(|step| step.contains("50-install.conf")).expect("a drop-in");
        let wanted = "ExecStart=\"/opt/adit/100%%/adit-relay\" run --data \"/srv/my relay\" --listen-udp \"[::]:8003\"";
        assert!(drop_in.contains(wanted) && drop_in.contains("ExecStart=\n"), "{drop_in}");
        assert!(drop_in.contains("StateDirectory=\n    ReadWritePaths=\"/srv/my relay\""), "{drop_in}");
        let found = Found { drop_in: Some("x".into()), ..Found::default() };
        let steps = texts(&install(&SERVICE, &setup(), &found));
        assert!(
            steps.contains(&"rm -rf /etc/systemd/system/adit-relay.service.d/50-install.conf".to_owned()),
            "{steps:?}"
        );
    }

    #[test]
    fn removal_leaves_state_and_user_unless_it_purges() {
        let found = Found { unit: Some("x".into()), drop_in: Some("y".into()), ..Found::default() };
        let removed = [
            "systemctl --quiet disable --now adit-relay",
            "rm -rf /etc/systemd/system/adit-relay.service.d/50-install.conf",
            "rm -rf /etc/systemd/system/adit-relay.service",
            "systemctl daemon-reload",
        ];
        assert_eq!(texts(&uninstall(&SERVICE, None, true, &found)), removed);
        let dir = SERVICE.default_dir();
        let purged = texts(&uninstall(&SERVICE, Some(&dir), true, &found));
        assert_eq!(purged[..4], removed);
        assert_eq!(purged[4..], ["rm -rf /var/lib/adit-relay", "userdel adit-relay"]);
        assert!(uninstall(&SERVICE, None, false, &Found::default()).is_empty());
    }
}
