//! What runs the tests that use the lab.
//!
//! A user namespace can only be entered by a process with one thread, so the standard harness, which
//! runs tests on threads, cannot be used. Here each test is this executable once more, with
//! [`CHILD`] naming the test: the child enters the namespace first, then starts a runtime and runs
//! the test. The parent speaks the standard harness's language (`libtest-mimic`), so that
//! `cargo test` and `cargo nextest run` list, filter, time and sum up as ever.

use std::future::Future;
use std::os::unix::process::CommandExt;
use std::pin::Pin;
use std::process::{Command, ExitCode};

use libtest_mimic::{Arguments, Failed, Trial};

/// Environment variable that tells the executable to be one test.
const CHILD: &str = "ADIT_LAB_TEST";
/// The ordinary user of [`Test::as_ordinary_user`]: `nobody`, who exists everywhere and owns nothing.
const NOBODY: &str = "65534";

/// A test's body, to be run on the runtime of its own process.
pub type Body = fn() -> Pin<Box<dyn Future<Output = anyhow::Result<()>>>>;

/// One test: its name and its body.
pub struct Test {
    name: &'static str,
    body: Body,
    ordinary_user: bool,
}

impl Test {
    /// A test that runs as whoever started it; `path` begins with the name of the test program.
    /// [`lab_tests!`](crate::lab_tests) calls this.
    pub fn new(path: &'static str, body: Body) -> Self {
        let name = path.split_once("::").map_or(path, |(_, name)| name);
        Self { name, body, ordinary_user: false }
    }

    /// Where root runs the tests, runs this one as `nobody`.
    pub fn as_ordinary_user(mut self) -> Self {
        self.ordinary_user = true;
        self
    }
}

/// Defines `tests` of a test file: `lab_tests!(one, two; as ordinary user: three)`. Each name is an
/// `async fn() -> anyhow::Result<()>`.
#[macro_export]
macro_rules! lab_tests {
    ($($name:ident),* $(,)? $(; as ordinary user: $($ordinary:ident),* $(,)?)?) => {
        pub(crate) fn tests() -> Vec<$crate::harness::Test> {
            use $crate::harness::Test;
            vec![
                $(Test::new(concat!(module_path!(), "::", stringify!($name)), || Box::pin($name())),)*
                $($(Test::new(concat!(module_path!(), "::", stringify!($ordinary)), || Box::pin($ordinary()))
                    .as_ordinary_user(),)*)?
            ]
        }
    };
}

/// Runs the tests that the command line asks for.
pub fn run(tests: Vec<Test>) -> ExitCode {
    if let Ok(name) = std::env::var(CHILD) {
        return match tests.iter().find(|test| test.name == name) {
            Some(test) => be(test),
            None => ExitCode::from(2),
        };
    }
    let mut arguments = Arguments::from_args();
    // Each lab measures time: labs of one process never run beside each other.
    arguments.test_threads = Some(1);
    let trials = tests.into_iter().map(|test| Trial::test(test.name, move || start(&test))).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Starts the child that is `test`, and waits for it.
fn start(test: &Test) -> Result<(), Failed> {
    let me = std::env::current_exe()?;
    let mut command = Command::new(&me);
    if test.ordinary_user && rustix::process::getuid().is_root() {
        command = Command::new("setpriv");
        command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--"]).arg(&me);
        // Who cannot enter a directory cannot start there either.
        command.current_dir("/").env("HOME", "/nonexistent");
    }
    let status = command.env(CHILD, test.name).status()?;
    if status.success() { Ok(()) } else { Err(Failed::without_message()) }
}

/// Is `test`: enters the namespace while there is one thread, then runs the body.
fn be(test: &Test) -> ExitCode {
    if let Err(error) = enter() {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    let result = runtime().and_then(|runtime| {
        let result = runtime.block_on((test.body)());
        // Tasks in other namespaces may hold a blocking read: do not wait for them.
        runtime.shutdown_background();
        result
    });
    let result = result.and_then(|()| crate::process::fail_on_logged_errors());
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::process::print_outputs();
            eprintln!("{}: {error:#}", test.name);
            ExitCode::FAILURE
        }
    }
}

/// Enters a user namespace of this user's own, where it may make network namespaces. To be called
/// before any thread is started.
pub fn enter() -> anyhow::Result<()> {
    patchbay::init_userns().map_err(|error| {
        error.context(
            "cannot make a user namespace: allow it (sysctl kernel.unprivileged_userns_clone=1, \
             kernel.apparmor_restrict_unprivileged_userns=0) or run in a container that does",
        )
    })
}

/// The runtime that tests and the `lab` command run on: the namespaces have threads of their own.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Replaces this process by `command`; only returns on failure.
pub fn become_command(mut command: Command) -> std::io::Error {
    command.exec()
}
