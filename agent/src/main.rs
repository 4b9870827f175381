//! `rvm-agent`: the first process of an rvm guest.

use std::process::ExitCode;

use rvm_agent::init;

fn main() -> ExitCode {
    if nix::unistd::getpid().as_raw() != 1 {
        eprintln!("rvm-agent is the first process of an rvm guest and does nothing elsewhere");
        return ExitCode::from(2);
    }
    init::console::install();
    match init::boot().and_then(rvm_agent::serve) {
        Ok(never) => match never {},
        Err(error) => {
            log::error!("{}", rvm_agent::error::chain(&error));
            init::shutdown::reboot()
        }
    }
}
