//! Builds a kernel and prints where it is:
//! `cargo run -p guest-kernel --example build -- CACHE_DIR [rvm|trial] [refresh]`.

use guest_kernel::{BuildOptions, Flavour, build};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let cache_dir = args.next().ok_or("which cache directory?")?.into();
    let flavour = match args.next().as_deref() {
        None | Some("rvm") => Flavour::Rvm,
        Some("trial") => Flavour::Trial,
        Some(other) => return Err(format!("no flavour {other:?}").into()),
    };
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
