//! One program for all targets: `RVM_FUZZ_TARGET` names the one that is run, and `RVM_FUZZ_LIST` has it
//! print which there are.

#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use rvm_fuzz::{Run, TARGETS};

fn target() -> Run {
    static TARGET: OnceLock<Run> = OnceLock::new();
    *TARGET.get_or_init(|| {
        let name = std::env::var("RVM_FUZZ_TARGET").unwrap_or_default();
        let found = TARGETS.iter().find(|(known, _)| *known == name);
        found.unwrap_or_else(|| panic!("RVM_FUZZ_TARGET: {name:?} is no target")).1
    })
}

fuzz_target!(
    init: {
        if std::env::var_os("RVM_FUZZ_LIST").is_some() {
            TARGETS.iter().for_each(|(name, _)| println!("{name}"));
            std::process::exit(0);
        }
    },
    |data: &[u8]| target()(data)
);
