//! Builds a kernel and prints where it is:
//! `cargo run -p guest-kernel --example build -- CACHE_DIR [rvm|full|peer|trial] [refresh]`.

use guest_kernel::{BuildOptions, Flavour, build};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let cache_dir = args.next().ok_or("which cache directory?")?.into();
    let name = args.next().unwrap_or_else(|| "rvm".to_owned());
    let flavour = Flavour::ALL.into_iter().find(|flavour| flavour.as_str() == name);
    let flavour = flavour.ok_or_else(|| format!("no flavour {name:?}"))?;
    let refresh = args.next().is_some_and(|arg| arg == "refresh");
    let jobs = std::thread::available_parallelism()?.get();
    let last = std::cell::Cell::new(None);
    let progress = |step: guest_kernel::Step, fraction: f64| {
        let percent = (step.as_str(), (fraction * 20.0) as u32 * 5);
        if last.replace(Some(percent)) != Some(percent) {
            eprintln!("{} {}%", percent.0, percent.1);
        }
    };
    let kernel = build(&BuildOptions { cache_dir, jobs, flavour, refresh, progress: &progress })?;
    println!("{} {} ({})", kernel.vmlinux.display(), kernel.version, kernel.package_version);
    Ok(())
}
