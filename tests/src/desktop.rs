//! Screens without hardware: an X server in memory, a marker drawn on it, and looking for the marker
//! in a picture of another screen.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use rand::RngExt;

use crate::lab::Host;
use crate::process::Process;

const WIDTH: usize = 800;
const HEIGHT: usize = 600;
/// How long a program of X11 may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running X server on a host.
pub struct Desktop {
    /// What `DISPLAY` is for its clients.
    pub display: String,
    host: Host,
    _server: Process,
}

/// Four colours that fill a screen, a quarter each: drawn for one run, found by their colours alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marker([[u8; 3]; 4]);

impl Desktop {
    /// Starts an X server on `host`; it chooses its display's number.
    pub async fn start(host: &Host) -> anyhow::Result<Self> {
        let mut command = Command::new("Xvfb");
        command.args([
            "-displayfd",
            "1",
            "-nolisten",
            "tcp",
            // Else it starts anew when its last client has gone, and refuses the next one meanwhile.
            "-noreset",
            "-screen",
            "0",
            &format!("{WIDTH}x{HEIGHT}x24"),
        ]);
        let server = host.spawn(command)?;
        let number = server
            .output(PATIENCE, "the display's number", |lines| lines.first()?.trim().parse::<u32>().ok())
            .await?;
        Ok(Self { display: format!(":{number}"), host: host.clone(), _server: server })
    }

    /// Starts a client of this desktop. Its home is `home`.
    pub fn spawn(&self, program: &str, arguments: &[&str], home: &Path) -> anyhow::Result<Process> {
        let mut command = Command::new(program);
        command.args(arguments).env("DISPLAY", &self.display).env("HOME", home).env_remove("XDG_CONFIG_HOME");
        self.host.spawn(command)
    }

    /// Fills the screen with `marker`.
    pub async fn draw(&self, marker: &Marker, scratch: &Path) -> anyhow::Result<()> {
        let picture = scratch.join("marker.ppm");
        std::fs::write(&picture, marker.picture())?;
        let picture = picture.to_string_lossy();
        // It draws and exits with 1: whether it drew shows the screen.
        self.spawn("display", &["-window", "root", &picture], scratch)?.finish(PATIENCE).await?;
        ensure!(self.shows(marker, scratch).await?, "the marker was not drawn");
        Ok(())
    }

    /// Whether `marker` fills a good part of the screen now.
    pub async fn shows(&self, marker: &Marker, scratch: &Path) -> anyhow::Result<bool> {
        let picture = scratch.join("screen.rgb");
        let to = format!("rgb:{}", picture.to_string_lossy());
        let arguments = ["-silent", "-window", "root", "-depth", "8", &to];
        self.spawn("import", &arguments, scratch)?
            .finish(PATIENCE)
            .await?
            .ok()
            .context("no picture of the screen")?;
        let pixels = std::fs::read(&picture)?;
        ensure!(pixels.len() == WIDTH * HEIGHT * 3, "the picture has {} bytes", pixels.len());
        Ok(marker.is_in(&pixels))
    }
}

impl Marker {
    /// A marker that was never drawn before.
    pub fn random() -> Self {
        let mut random = rand::rng();
        loop {
            // Neither black nor white, which any screen may show.
            let colours: [[u8; 3]; 4] =
                std::array::from_fn(|_| std::array::from_fn(|_| random.random_range(48..=208)));
            let differ = |a: usize, b: usize| !alike(colours[a], colours[b], 64);
            if (0..4).all(|a| (0..a).all(|b| differ(a, b))) {
                return Self(colours);
            }
        }
    }

    fn picture(&self) -> Vec<u8> {
        let mut picture = format!("P6 {WIDTH} {HEIGHT} 255\n").into_bytes();
        for at in 0..WIDTH * HEIGHT {
            let (right, low) = (at % WIDTH >= WIDTH / 2, at / WIDTH >= HEIGHT / 2);
            picture.extend_from_slice(&self.0[usize::from(right) + 2 * usize::from(low)]);
        }
        picture
    }

    /// Whether it fills a good part of this picture (PNG).
    pub async fn is_in_file(&self, host: &Host, picture: &Path) -> anyhow::Result<bool> {
        let pixels = picture.with_extension("rgb");
        let mut command = Command::new("convert");
        command.arg(picture).args(["-depth", "8"]).arg(format!("rgb:{}", pixels.display()));
        host.spawn(command)?.finish(PATIENCE).await?.ok()?;
        let read = std::fs::read(&pixels)?;
        std::fs::remove_file(&pixels)?;
        Ok(self.is_in(&read))
    }

    /// Each colour on a tenth of the pixels at least, as near as a lossy picture keeps it.
    fn is_in(&self, pixels: &[u8]) -> bool {
        self.0.iter().all(|colour| {
            let near =
                pixels.chunks_exact(3).filter(|pixel| alike([pixel[0], pixel[1], pixel[2]], *colour, 12));
            near.count() * 10 >= pixels.len() / 3
        })
    }
}

fn alike(a: [u8; 3], b: [u8; 3], distance: u8) -> bool {
    a.iter().zip(b).all(|(a, b)| a.abs_diff(b) <= distance)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_is_found_in_its_own_picture_only() {
        let (marker, other) =
            (Marker([[50, 60, 70], [200, 60, 70], [50, 200, 70], [50, 60, 200]]), Marker::random());
        let picture = marker.picture();
        let pixels = &picture[picture.len() - WIDTH * HEIGHT * 3..];
        assert!(marker.is_in(pixels));
        assert!(!Marker([[100; 3], [200, 60, 70], [50, 200, 70], [50, 60, 200]]).is_in(pixels));
        assert!(!marker.is_in(&vec![0; WIDTH * HEIGHT * 3]));
        assert_ne!(marker, other);
    }
}
