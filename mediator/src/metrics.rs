//! What the mediator shows under `/metrics`, read at the moment somebody looks.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::broker::Broker;

/// Shows the broker's numbers in `registry`.
pub fn register(registry: &mut Registry, broker: Arc<Broker>) {
    registry.sub_registry_with_prefix("adit_mediator").register_collector(Box::new(Numbers(broker)));
}

struct Numbers(Arc<Broker>);

impl fmt::Debug for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Numbers")
    }
}

impl Collector for Numbers {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let numbers = [
            ("devices_online", "Devices that hold a control channel", self.0.presence.len()),
            ("sessions", "Sessions that live", self.0.session_count()),
        ];
        for (name, help, value) in numbers {
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            let metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(metric)?;
        }
        Ok(())
    }
}
