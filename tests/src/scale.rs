//! Time limits. Every limit is what hardware needs with a wide margin, times one
//! factor for slower machines: the devhost emulates its processor.

use std::{sync::OnceLock, time::Duration};

/// Names the factor; unset means 1.
pub const SCALE_ENV: &str = "RVM_TIME_SCALE";

/// `seconds` on hardware, scaled to this machine.
///
/// # Panics
/// Where [`SCALE_ENV`] is not a positive number.
pub fn seconds(seconds: f64) -> Duration {
    static FACTOR: OnceLock<f64> = OnceLock::new();
    let factor = *FACTOR.get_or_init(|| match std::env::var(SCALE_ENV) {
        Err(_) => 1.0,
        Ok(text) => match text.parse::<f64>() {
            Ok(factor) if factor.is_finite() && factor > 0.0 => factor,
            _ => panic!("{SCALE_ENV}={text:?}: not a positive number"),
        },
    });
    Duration::from_secs_f64(seconds * factor)
}

/// For what needs no guest: `ctr` asking containerd.
pub fn command() -> Duration {
    seconds(3.0)
}

/// For one container from start to end, and for one clear error instead.
pub fn container() -> Duration {
    seconds(5.0)
}
