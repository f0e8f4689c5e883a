//! Chromium without a screen, driven by its own chromedriver (W3C WebDriver) with curl.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::lab::Host;
use crate::poll;
use crate::process::Process;

/// How long it may take to start, and a page to load, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A browser on a host. Dropped, it ends.
pub struct Browser {
    host: Host,
    session: String,
    home: PathBuf,
    _driver: Process,
}

impl Browser {
    /// Starts one. It has a new home in `scratch`, trusts these certificates (PEM) beside those that every browser
    /// trusts, and gets these switches of Chromium's.
    pub async fn start(
        host: &Host,
        scratch: &Path,
        trusts: &[&str],
        switches: &[&str],
    ) -> anyhow::Result<Self> {
        let home = scratch.join(format!("browser-{:08x}", rand::random::<u32>()));
        let store = home.join(".pki/nssdb");
        std::fs::create_dir_all(&store)?;
        let store = format!("sql:{}", store.display());
        let run = async |program: &str, arguments: &[&str]| {
            let mut command = Command::new(program);
            command.args(arguments).env("HOME", &home);
            host.spawn(command)?.finish(PATIENCE).await?.ok()
        };
        run("certutil", &["-N", "-d", &store, "--empty-password"]).await?;
        for (number, file) in trusts.iter().enumerate() {
            let name = number.to_string();
            run("certutil", &["-A", "-d", &store, "-n", &name, "-t", "CP,,", "-i", file]).await?;
        }
        let mut command = Command::new("chromedriver");
        // What it starts is found by its parent: one of its own for each port.
        command.args(["--port=0", "--log-level=WARNING"]).env("HOME", &home).env_remove("XDG_CONFIG_HOME");
        let driver = host.spawn(command)?;
        let port = driver
            .output(PATIENCE, "chromedriver's port", |lines| {
                let line = lines.iter().find(|line| line.contains("started successfully on port"))?;
                line.trim_end_matches('.').rsplit(' ').next()?.parse::<u16>().ok()
            })
            .await?;
        let profile = format!("--user-data-dir={}", home.join("profile").display());
        let mut arguments = vec![
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--window-size=1000,800",
            &profile,
        ];
        arguments.extend(switches);
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }}});
        let mut browser = Self {
            host: host.clone(),
            session: format!("http://127.0.0.1:{port}/session"),
            home,
            _driver: driver,
        };
        let made = browser.command("POST", "", Some(wanted)).await?;
        let id = made["sessionId"].as_str().with_context(|| made.to_string())?;
        browser.session = format!("{}/{id}", browser.session);
        Ok(browser)
    }

    /// Goes there, and waits until the page is loaded.
    pub async fn open(&self, url: &str) -> anyhow::Result<()> {
        self.command("POST", "/url", Some(json!({"url": url}))).await.map(drop)
    }

    /// What this script, the body of a function, returns in the page.
    pub async fn script(&self, script: &str) -> anyhow::Result<Value> {
        self.command("POST", "/execute/sync", Some(json!({"script": script, "args": []}))).await
    }

    /// Waits until this expression of JavaScript is true in the page.
    pub async fn until(&self, what: &str, expression: &str) -> anyhow::Result<()> {
        let script = format!("return !!({expression})");
        poll(PATIENCE, what, async || (self.script(&script).await.ok()? == true).then_some(())).await
    }

    /// A picture of the page, into `file` (PNG).
    pub async fn screenshot(&self, file: &Path) -> anyhow::Result<()> {
        let picture = self.command("GET", "/screenshot", None).await?;
        let encoded = file.with_extension("base64");
        std::fs::write(&encoded, picture.as_str().context("a picture")?)?;
        let mut command = Command::new("base64");
        command.arg("-d").arg(&encoded).stdout(std::fs::File::create(file)?);
        // It writes to the file: a program of this host would have its output read.
        ensure!(command.status()?.success(), "no picture");
        Ok(std::fs::remove_file(&encoded)?)
    }

    /// What the console has shown as errors since the last time.
    pub async fn console_errors(&self) -> anyhow::Result<Vec<String>> {
        let log = self.command("POST", "/se/log", Some(json!({"type": "browser"}))).await?;
        let entries = log.as_array().context("a log")?;
        let errors = entries.iter().filter(|entry| entry["level"] == "SEVERE");
        Ok(errors.map(|entry| entry["message"].to_string()).collect())
    }

    /// Closes it, with all of its processes.
    pub async fn close(self) -> anyhow::Result<()> {
        self.command("DELETE", "", None).await.map(drop)
    }

    async fn command(&self, method: &str, path: &str, body: Option<Value>) -> anyhow::Result<Value> {
        let mut command = Command::new("curl");
        command.args(["-sS", "--max-time", "60", "-X", method, "-H", "Content-Type: application/json"]);
        command.arg(format!("{}{path}", self.session)).env("HOME", &self.home);
        if let Some(body) = &body {
            command.args(["-d", &body.to_string()]);
        }
        // Answers are long: no line of them is printed.
        let said = self.host.spawn(command)?.finish(PATIENCE).await?.ok()?;
        let answer: Value =
            serde_json::from_str(&said).with_context(|| said.chars().take(300).collect::<String>())?;
        let value = answer["value"].clone();
        ensure!(
            value["error"].is_null(),
            "{path}: {}",
            value.to_string().chars().take(500).collect::<String>()
        );
        Ok(value)
    }
}
