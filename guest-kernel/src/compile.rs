//! `make vmlinux` with real progress, then everything a boot does not need cut off.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{BuildOptions, Error, Flavour, Step, command, io_error, order};

/// A build's result, still in the scratch directory.
pub struct Built {
    /// The stripped image.
    pub vmlinux: PathBuf,
    /// Its configuration.
    pub config: PathBuf,
    /// What `uname -r` says.
    pub version: String,
}

/// Steps make announces, one a line, for a whole build: what the progress is measured against.
/// A point release changes it by a few.
fn expected_steps(flavour: Flavour) -> f64 {
    match flavour {
        Flavour::Rvm | Flavour::Peer => 2230.0,
        Flavour::Full => 2700.0,
        Flavour::Trial => 1500.0,
    }
}

/// What would otherwise enter the image from this machine and this moment.
pub fn environment(make: &mut Command) {
    make.env("KBUILD_BUILD_TIMESTAMP", "1970-01-01 00:00:00 UTC")
        .env("KBUILD_BUILD_USER", "rvm")
        .env("KBUILD_BUILD_HOST", "rvm")
        .env("KBUILD_BUILD_VERSION", "1")
        .env("LC_ALL", "C")
        // An outer make (or cargo's job server) would be taken for ours.
        .env_remove("MAKEFLAGS")
        .env_remove("MFLAGS")
        .env_remove("ARCH")
        .env_remove("CROSS_COMPILE")
        .env_remove("LOCALVERSION");
}

/// Included before each source. The 32-bit vDSO is compiled as if for another kernel, which it says before its first
/// header.
///
/// Takes the check of the access's size out of `READ_ONCE()` and its relatives, which headers use some thousand times
/// in each file; every other assertion (`BUILD_BUG_ON()`) stays. And takes three attributes off each of 7000 inline
/// functions, of which one is `-fgnu89-inline`'s meaning, one is for warnings and one for `-pg`.
const LIGHTER_HEADERS: &str = "\
#undef inline
#ifdef __x86_64__
#include <asm/rwonce.h>
#undef compiletime_assert_rwonce_type
#define compiletime_assert_rwonce_type(t) ((void)0)
#undef compiletime_assert_atomic_type
#define compiletime_assert_atomic_type(t) ((void)0)
#endif
";

/// What the compiler need not do, a sixth of its time: tell where in a macro an error is, look for what may be meant
/// otherwise (for one of these warnings it reads every source twice), and [`LIGHTER_HEADERS`].
fn compiler_flags(build_dir: &Path) -> Result<String, Error> {
    let header = build_dir.join("lighter-headers.h");
    std::fs::write(&header, LIGHTER_HEADERS).map_err(io_error("write", &header))?;
    let include = format!("-include {}", header.display());
    Ok(format!("-ftrack-macro-expansion=0 -Wno-all -Wno-extra -fgnu89-inline {include}"))
}

/// Puts in place what [`order`] needs, where the flavour's linker script asks for it; returns the compiler's flag.
fn ordered(build_dir: &Path, flavour: Flavour) -> Result<&'static str, Error> {
    let Some(functions) = order::of(flavour) else { return Ok("") };
    let script = build_dir.join(order::SCRIPT_NAME);
    std::fs::write(&script, order::script(functions)).map_err(io_error("write", &script))?;
    Ok(order::COMPILER_FLAG)
}

/// Compiles the configured kernel.
pub fn compile(tree: &Path, build_dir: &Path, options: &BuildOptions<'_>) -> Result<Built, Error> {
    let expected = expected_steps(options.flavour);
    let mut steps = 0.0_f64;
    let mut make = Command::new("make");
    make.arg("-C").arg(tree).arg(format!("O={}", build_dir.display()));
    make.arg(format!("-j{}", options.jobs.max(1))).arg("vmlinux");
    // Which headers each file includes is for a second make to know, and there is none.
    make.arg("cmd_and_fixdep=$(cmd)");
    environment(&mut make);
    let ordered = ordered(build_dir, options.flavour)?;
    make.env("KCFLAGS", format!("{} {ordered}", compiler_flags(build_dir)?));
    (options.progress)(Step::Compile, 0.0);
    command::watch(&mut make, |line| {
        if is_step(line) {
            steps += 1.0;
            (options.progress)(Step::Compile, (steps / expected).min(1.0));
        }
    })?;
    (options.progress)(Step::Compile, 1.0);

    let full = build_dir.join("vmlinux");
    let vmlinux = build_dir.join("vmlinux.stripped");
    // Symbols and notes about the compiler; the segments a monitor loads stay as they are.
    let mut strip = Command::new("objcopy");
    strip.args(["--strip-all", "--remove-section=.comment"]).arg(&full).arg(&vmlinux);
    command::output(&mut strip)?;

    let release = build_dir.join("include/config/kernel.release");
    let version = std::fs::read_to_string(&release).map_err(io_error("read", &release))?.trim().to_owned();
    Ok(Built { vmlinux, config: build_dir.join(".config"), version })
}

/// Whether a line of make's output announces a step: two spaces, a verb in capitals, a file.
fn is_step(line: &str) -> bool {
    let Some(rest) = line.strip_prefix("  ") else { return false };
    rest.split_once(' ').is_some_and(|(verb, _)| {
        !verb.is_empty() && verb.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_told_from_other_output() {
        for line in [
            "  CC      init/main.o",
            "  AR      built-in.a",
            "  LD      vmlinux.o",
            "  HOSTCC  x",
            "  GEN     y",
        ] {
            assert!(is_step(line), "{line:?}");
        }
        for line in
            ["make[1]: Entering directory '/x'", "", "  ", "kernel/fork.c:12: warning", "   note", "  a b"]
        {
            assert!(!is_step(line), "{line:?}");
        }
    }
}
