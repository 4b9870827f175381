//! What a guest, a client or an image may send, sent at random: a function for each, which takes any
//! bytes and fails by panicking.
//!
//! `cargo xtask fuzz` runs them under libFuzzer (`libfuzzer/`, a workspace of its own); the tests here run
//! each on its corpus and on some changes of that, within the gate.

mod devices;
mod driver;
mod hosts;
mod input;

/// Takes any bytes.
pub type Run = fn(&[u8]);

/// All there are, by name.
pub const TARGETS: [(&str, Run); 21] = [
    ("fs", devices::fs),
    ("blk", devices::blk),
    ("net", devices::net),
    ("vsock", devices::vsock),
    ("mem", devices::mem),
    ("balloon", devices::balloon),
    ("pmem", devices::pmem),
    ("buses", devices::buses),
    ("image", hosts::image),
    ("saved", hosts::saved),
    ("control", hosts::control),
    ("oci-spec", hosts::oci_spec),
    ("mounts", hosts::mounts),
    ("exec", hosts::exec),
    ("profile", hosts::profile),
    ("options", hosts::options),
    ("texts", hosts::texts),
    ("container-request", hosts::container_request),
    ("network-request", hosts::network_request),
    ("statistics", hosts::statistics),
    ("headers", hosts::headers),
];

#[cfg(test)]
mod tests;
