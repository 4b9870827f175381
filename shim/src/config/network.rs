//! `[network]`.

use rvm_protocol::vmm::{RateLimit, TokenBucket};

use super::{ConfigError, table::Table};

/// A limit that nothing reaches is none: what integers of TOML can say.
const MOST_PER_SECOND: u64 = i64::MAX as u64;
/// What may come at once: what flows in in a tenth of a second, but no less than the
/// largest frame that is still to be cut into segments.
const BURSTS_PER_SECOND: u64 = 10;
const LEAST_BURST_BYTES: u64 = 128 << 10;
const LEAST_BURST_PACKETS: u64 = 16;

/// How interfaces are carried into the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// Who moves the frames.
    pub vhost: Vhost,
    /// How fast each interface may receive.
    pub receive: Option<RateLimit>,
    /// How fast each may transmit.
    pub transmit: Option<RateLimit>,
}

/// Whether the host's kernel moves frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vhost {
    /// Where `/dev/vhost-net` opens.
    Auto,
    /// Or there is no network.
    On,
    /// The monitor does.
    Off,
}

impl Network {
    pub(super) fn of(table: &Table) -> Result<Self, ConfigError> {
        let vhost = match table.one_of("network", "vhost", &["auto", "on", "off"])? {
            "on" => Vhost::On,
            "off" => Vhost::Off,
            _ => Vhost::Auto,
        };
        let limit = |bytes: &str, packets: &str| {
            let rate = |key| table.integer("network", key, 0, MOST_PER_SECOND);
            let limit = RateLimit {
                bytes: bucket(rate(bytes)?, LEAST_BURST_BYTES),
                packets: bucket(rate(packets)?, LEAST_BURST_PACKETS),
            };
            Ok((limit.bytes.is_some() || limit.packets.is_some()).then_some(limit))
        };
        Ok(Self {
            vhost,
            receive: limit("receive_bytes_per_s", "receive_packets_per_s")?,
            transmit: limit("transmit_bytes_per_s", "transmit_packets_per_s")?,
        })
    }
}

fn bucket(per_second: u64, least_burst: u64) -> Option<TokenBucket> {
    let burst = (per_second / BURSTS_PER_SECOND).max(least_burst);
    (per_second > 0).then_some(TokenBucket { per_second, burst })
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, Vhost};

    #[test]
    fn limits_are_buckets_and_none_is_none() {
        let usual = Config::defaults().unwrap().network;
        assert_eq!((usual.vhost, usual.receive, usual.transmit), (Vhost::Auto, None, None));
        let text =
            "[network]\nvhost = \"off\"\nreceive_bytes_per_s = 12500000\ntransmit_packets_per_s = 100\n";
        let limited = Config::parse(text, "config.toml").unwrap().network;
        let receive = limited.receive.unwrap();
        assert_eq!(limited.vhost, Vhost::Off);
        assert_eq!(receive.bytes.map(|bytes| (bytes.per_second, bytes.burst)), Some((12_500_000, 1_250_000)));
        assert_eq!(receive.packets, None);
        let packets = limited.transmit.unwrap().packets.unwrap();
        assert_eq!((packets.per_second, packets.burst), (100, 16));
    }
}
