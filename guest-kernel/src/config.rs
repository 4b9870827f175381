//! Configuration: commented fragments on top of a base with everything off,
//! and the check that all of them took effect.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use crate::{BuildOptions, Error, Flavour, command, io_error};

const MACHINE: &str = include_str!("../config/machine.config");
const CORE: &str = include_str!("../config/core.config");
const CONTAINER: &str = include_str!("../config/container.config");
const FILESYSTEM: &str = include_str!("../config/filesystem.config");
const NETWORK: &str = include_str!("../config/network.config");
const HARDENING: &str = include_str!("../config/hardening.config");
const DEFAULT: &str = include_str!("../config/default.config");
const FULL: &str = include_str!("../config/full.config");
const PEER: &str = include_str!("../config/peer.config");
const TRIAL: &str = include_str!("../config/trial.config");

/// The fragments of a flavour.
pub fn fragments(flavour: Flavour) -> &'static [&'static str] {
    match flavour {
        Flavour::Rvm => &[MACHINE, CORE, CONTAINER, FILESYSTEM, NETWORK, HARDENING, DEFAULT],
        Flavour::Full => &[MACHINE, CORE, CONTAINER, FILESYSTEM, NETWORK, HARDENING, FULL],
        Flavour::Peer => &[MACHINE, CORE, CONTAINER, FILESYSTEM, NETWORK, HARDENING, DEFAULT, PEER],
        Flavour::Trial => &[TRIAL],
    }
}

/// The make target whose result the fragments are laid on.
fn base(flavour: Flavour) -> &'static str {
    match flavour {
        Flavour::Rvm | Flavour::Full | Flavour::Peer => "allnoconfig",
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
        Flavour::Rvm | Flavour::Full | Flavour::Peer => {
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
    if flavour == Flavour::Trial {
        return Ok(());
    }
    let read = |path: &Path| std::fs::read_to_string(path).map_err(io_error("read", path));
    let lines = unmet(&wanted, &read(&path)?);
    if !lines.is_empty() {
        return Err(Error::Config { lines });
    }
    let known = mitigations(&read(&tree.join(KCONFIG))?);
    if known.is_empty() {
        return Err(Error::NoMitigations { kconfig: KCONFIG });
    }
    let options = unnamed(&known, &wanted);
    if options.is_empty() { Ok(()) } else { Err(Error::Mitigations { options }) }
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

/// Where Linux describes its mitigations, in its source.
const KCONFIG: &str = "arch/x86/Kconfig";

/// The mitigations of faults of CPUs that `kconfig` knows: whatever stands in its block of them, and what is called one
/// elsewhere.
fn mitigations(kconfig: &str) -> BTreeSet<String> {
    let mut block = false;
    let mut found = BTreeSet::new();
    for line in kconfig.lines() {
        match line.trim_end() {
            "if CPU_MITIGATIONS" => block = true,
            "endif" => block = false,
            line => {
                if let Some(option) =
                    line.strip_prefix("config ").filter(|o| block || o.starts_with("MITIGATION_"))
                {
                    found.insert(format!("CONFIG_{option}"));
                }
            }
        }
    }
    found
}

/// The options of `known` that `wanted` says nothing of, neither yes nor no.
fn unnamed(known: &BTreeSet<String>, wanted: &str) -> Vec<String> {
    let named = parse(wanted);
    known.iter().filter(|option| !named.contains_key(option.as_str())).cloned().collect()
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
        for flavour in Flavour::ALL {
            let mut seen = BTreeSet::new();
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

    #[test]
    fn a_mitigation_that_no_fragment_names_is_found() {
        let kconfig = "config OTHER\n\tbool\nmenuconfig CPU_MITIGATIONS\n\tbool \"x\"\n\nif CPU_MITIGATIONS\n\n\
            config MITIGATION_OLD\n\tbool \"old\"\n\tdefault y\n\nconfig SPELT_OTHERWISE\n\tbool \"new\"\n\nendif\n\
            config AFTER\n\tbool\n\nconfig MITIGATION_ELSEWHERE\n\tbool \"new\"\n";
        let known = mitigations(kconfig);
        assert_eq!(known.len(), 3);
        let wanted = "CONFIG_CPU_MITIGATIONS=y\nCONFIG_MITIGATION_OLD=y\n";
        assert_eq!(unnamed(&known, wanted), ["CONFIG_MITIGATION_ELSEWHERE", "CONFIG_SPELT_OTHERWISE"]);
        let wanted = format!("{wanted}# CONFIG_SPELT_OTHERWISE is not set\nCONFIG_MITIGATION_ELSEWHERE=y\n");
        assert_eq!(unnamed(&known, &wanted), Vec::<String>::new());
    }

    #[test]
    fn the_kernel_has_as_many_processors_as_the_monitor_gives() {
        let machine = parse(MACHINE);
        assert_eq!(machine["CONFIG_NR_CPUS"], rvm_protocol::vmm::MAX_VCPUS.to_string());
    }
}
