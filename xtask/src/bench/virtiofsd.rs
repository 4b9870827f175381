//! `cargo xtask bench virtiofsd`.

use std::fmt::Write;

use anyhow::Result;
use guest_kernel::Flavour;
use rootfs_builder::debian;
use serde_json::Value;

use super::{Bench, Common, aims, columns};
use crate::build;
use crate::packages::{self, Purpose};
use crate::progress::Step;

/// Arguments of `cargo xtask bench virtiofsd`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Rounds of each kind; medians are reported.
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Also the root file system, an image that rvm's monitor or virtiofsd shares: takes more than twice as long.
    #[arg(long)]
    root: bool,
    /// Also with Linux as it is in virtiofsd's guest, instead of rvm's kernel.
    #[arg(long)]
    unpatched: bool,
}

/// The release whose virtiofsd is compared. Debian 12 has the one in C that was given up; this one, in Rust, needs a newer
/// C library than Debian 12's.
const RELEASE: &str = "trixie";

/// At most this much of virtiofsd's time with the same kernel, and where files are small.
const AIM: f64 = 1.0;
const SMALL: f64 = 0.5;

/// Where a result has how often something was done, by kind.
const COUNTED: &str = "counted on a volume, a start included";

/// Runs `cargo xtask bench virtiofsd`.
pub fn run(args: Args) -> Result<()> {
    packages::ensure(&[Purpose::Bench])?;
    let mut bench = Bench::new("virtiofsd", args.common.fast, args.runs)?;
    let cache = build::debian_cache_dir()?;
    let step = Step::start("virtiofsd");
    let server = debian::fetch_from(RELEASE, "virtiofsd", &cache)?;
    let library = debian::fetch_from(RELEASE, "libc6", &cache)?;
    step.done(RELEASE);
    bench.prepared.set("RVM_BENCH_VIRTIOFSD", server.join("usr/libexec/virtiofsd"));
    bench.prepared.set("RVM_BENCH_VIRTIOFSD_LIBRARIES", library.join("usr/lib/x86_64-linux-gnu"));
    bench.prepared.set("RVM_BENCH_IMAGE_ONE", build::debian_image()?);
    bench.prepared.set("RVM_BENCH_KERNEL_PEER", build::kernel(Flavour::Peer)?.vmlinux);
    if args.root {
        bench.prepared.set("RVM_BENCH_ROOT", "1");
    }
    if args.unpatched {
        bench.prepared.set("RVM_BENCH_KERNEL_TRIAL", build::kernel(Flavour::Trial)?.vmlinux);
    }
    bench.report(args.common.json, text)
}

/// The result for people.
fn text(result: &Value) -> String {
    let ratios = result["ratios"].as_object();
    let names = ratios.into_iter().flatten().map(|(name, _)| name.as_str());
    let aim = |name: &str| if name.contains("small files") { SMALL } else { AIM };
    let wanted: Vec<(&str, f64)> =
        names.filter(|name| name.starts_with("rvm/virtiofsd, ")).map(|name| (name, aim(name))).collect();
    let mut text = aims(result, &wanted);
    text += &format!("{}\n", result["conditions"]["virtiofsd"].as_str().unwrap_or_default());
    text += &columns(result);
    let _ = writeln!(text, "\nCounted in one more run of what is done on the volume, a start included:");
    for (kind, counts) in result[COUNTED].as_object().into_iter().flatten() {
        for (what, count) in counts.as_object().into_iter().flatten() {
            let _ = writeln!(text, "   {kind}, {what}: {count}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn small_files_have_an_aim_of_their_own() {
        let text = text(&json!({
            "ratios": {
                "rvm/virtiofsd, find": 0.7,
                "rvm/virtiofsd, 1,000 small files read on a volume": 0.7,
                "rvm/virtiofsd cache=always, find": 1.5,
                "rvm/runc, find": 9.0,
            },
            "kinds": ["rvm", "virtiofsd"],
            "medians": [["find", [70.25, 100.0]]],
            COUNTED: { "rvm": { "exits": 12345 } },
            "conditions": { "virtiofsd": "virtiofsd 1.13.2", "units": "ms" },
        }));
        assert!(text.contains("ok     rvm/virtiofsd, find"), "{text}");
        assert!(text.contains("MISSED rvm/virtiofsd, 1,000 small files read on a volume"), "{text}");
        assert_eq!(text.matches("MISSED").count() + text.matches("ok    ").count(), 2, "{text}");
        assert!(text.contains("70.250") && text.contains("virtiofsd 1.13.2"), "{text}");
        assert!(text.contains("rvm, exits: 12345"), "{text}");
    }
}
