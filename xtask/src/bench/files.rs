//! `cargo xtask bench files`.

use anyhow::Result;
use serde_json::Value;

use super::{Bench, Common, Containerd, aims, medians};
use crate::build;

/// Arguments of `cargo xtask bench files`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Rounds of each kind; medians are reported.
    #[arg(long, default_value_t = 3)]
    runs: u32,
    #[command(flatten)]
    containerd: Containerd,
    /// Without the image of five layers: half of the time.
    #[arg(long)]
    one_layer: bool,
}

/// Of the devhost, in MiB: it holds both images, packed and unpacked.
const MEMORY_MIB: u32 = 8192;
/// At most this much of runc's time, where everything is in the guest's cache.
const AGAIN: f64 = 2.0;

/// Runs `cargo xtask bench files`.
pub fn run(args: Args) -> Result<()> {
    let mut bench = Bench::new("files", args.common.fast, args.runs)?;
    let one = build::debian_image()?;
    if !args.one_layer {
        bench.prepared.set("RVM_BENCH_IMAGE_FIVE", build::debian_image_of_layers(&one, 5)?);
    }
    bench.prepared.set("RVM_BENCH_IMAGE_ONE", one);
    args.containerd.set(&mut bench.prepared)?;
    bench.prepared.memory_mib = MEMORY_MIB;
    bench.report(args.common.json, text)
}

/// The result for people.
fn text(result: &Value) -> String {
    let ratios = result["ratios"].as_object();
    let again = ratios.into_iter().flatten().map(|(name, _)| name.as_str());
    let again: Vec<(&str, f64)> =
        again.filter(|name| name.contains(" again")).map(|name| (name, AGAIN)).collect();
    let mut text = aims(result, &again);
    text += &medians(result, 56);
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_done_again_has_an_aim() {
        let text = text(&json!({
            "ratios": { "rvm/runc, find": 30.0, "rvm/runc, find again, with a volume": 2.5 },
            "medians_ms, rvm and runc": [["find", 300.0, 10.0]],
        }));
        assert!(
            text.lines().any(|line| line.starts_with("MISSED rvm/runc, find again, with a volume")),
            "{text}"
        );
        assert_eq!(text.matches("MISSED").count() + text.matches("ok  ").count(), 1, "{text}");
        assert!(text.contains("30.00"), "{text}");
    }
}
