//! `adit port-mapper`, which other commands of ours start.

use clap::Args;

use crate::direct::port_mapping::{Port, child};

/// Has the router in front map these ports until the standard input ends. Started by other commands.
#[derive(Debug, Args)]
pub(super) struct PortMapper {
    /// udp:NUMBER or tcp:NUMBER.
    #[arg(required = true)]
    ports: Vec<Port>,
}

impl PortMapper {
    pub(super) async fn run(self) {
        child::run(self.ports).await;
    }
}
