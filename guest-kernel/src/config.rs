//! Configuration: commented fragments on top of a base with everything off,
//! and the check that all of them took effect.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use crate::{BuildOptions, Error, Flavour, command, io_error};

/// The fragments of [`Flavour::Rvm`], by what they are for.
const RVM: &[&str] = &[
    include_str!("../config/machine.config"),
    include_str!("../config/core.config"),
    include_str!("../config/container.config"),
    include_str!("../config/filesystem.config"),
    include_str!("../config/network.config"),
    include_str!("../config/hardening.config"),
];

/// The one fragment of [`Flavour::Trial`].
const TRIAL: &[&str] = &[include_str!("../config/trial.config")];

/// The fragments of a flavour.
pub fn fragments(flavour: Flavour) -> &'static [&'static str] {
    match flavour {
        Flavour::Rvm => RVM,
        Flavour::Trial => TRIAL,
    }
}

/// The make target whose result the fragments are laid on.
fn base(flavour: Flavour) -> &'static str {
    match flavour {
        Flavour::Rvm => "allnoconfig",
        Flavour::Trial => "tinyconfig",
    }
}

/// Writes `.config` into `build_dir` for the kernel source in `tree`.
pub fn configure(tree: &Path, build_dir: &Path, options: &BuildOptions<'_>) -> Result<(), Error> {
    let flavour = options.flavour;
    let make = |target| make(tree, build_dir, options.jobs, target);
    std::fs::create_dir_all(build_dir).map_err(io_error("create", build_dir))?;
    let wanted = fragments(flavour).concat();
    let path = build_dir.join(".config");
    match flavour {
        Flavour::Rvm => {
            let fragment = build_dir.join("fragment.config");
            std::fs::write(&fragment, &wanted).map_err(io_error("write", &fragment))?;
            let mut all_no = make(base(flavour));
            all_no.env("KCONFIG_ALLCONFIG", &fragment);
            command::output(&mut all_no)?;
        }
        // As its measurements were made: appended, and defaults for what the options bring along.
        Flavour::Trial => {
            command::output(&mut make(base(flavour)))?;
            let tiny = std::fs::read_to_string(&path).map_err(io_error("read", &path))?;
            std::fs::write(&path, tiny + &wanted).map_err(io_error("write", &path))?;
            command::output(&mut make("olddefconfig"))?;
        }
    }
    let config = std::fs::read_to_string(&path).map_err(io_error("read", &path))?;
    let lines = unmet(&wanted, &config);
    if lines.is_empty() || flavour == Flavour::Trial { Ok(()) } else { Err(Error::Config { lines }) }
}

fn make(tree: &Path, build_dir: &Path, jobs: usize, target: &str) -> Command {
    let mut make = Command::new("make");
    make.arg("-s").arg("-C").arg(tree).arg(format!("O={}", build_dir.display()));
    make.arg(format!("-j{}", jobs.max(1))).arg(target);
    crate::compile::environment(&mut make);
    make
}

/// The lines of `wanted` that `config` does not fulfil.
fn unmet(wanted: &str, config: &str) -> Vec<String> {
    let config = parse(config);
    parse(wanted)
        .into_iter()
        .filter(|(option, value)| config.get(option).copied().unwrap_or("n") != *value)
        .map(|(option, value)| format!("{option}={value}"))
        .collect()
}

/// Options and their values; an option that "is not set" has the value `n`.
fn parse(config: &str) -> BTreeMap<&str, &str> {
    config
        .lines()
        .filter_map(|line| {
            if let Some(option) = line.strip_prefix("# ").and_then(|l| l.strip_suffix(" is not set")) {
                return option.starts_with("CONFIG_").then_some((option, "n"));
            }
            line.split_once('=').filter(|(option, _)| option.starts_with("CONFIG_"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unmet_lines_are_found() {
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=64\n";
        let wanted =
            "# a comment\n# CONFIG_B is not set\n# CONFIG_GONE is not set\nCONFIG_A=y\nCONFIG_C=64\n";
        assert_eq!(unmet(wanted, config), Vec::<String>::new());
        let wanted = "CONFIG_B=y\nCONFIG_C=65\n# CONFIG_A is not set\nCONFIG_GONE=y\n";
        let unmet = unmet(wanted, config);
        assert_eq!(unmet, ["CONFIG_A=n", "CONFIG_B=y", "CONFIG_C=65", "CONFIG_GONE=y"]);
    }

    #[test]
    fn fragments_name_every_option_once_and_every_line_is_understood() {
        for flavour in [Flavour::Rvm, Flavour::Trial] {
            let mut seen = std::collections::BTreeSet::new();
            for line in fragments(flavour).iter().flat_map(|fragment| fragment.lines()) {
                let options = parse(line);
                let comment_or_empty = line.is_empty() || line.starts_with('#');
                assert!(comment_or_empty || options.len() == 1, "{line:?}");
                for option in options.keys() {
                    assert!(seen.insert(option.to_string()), "{option} is named twice");
                }
            }
            assert!(!seen.is_empty());
        }
    }
}
