//! Which devices a container may use: rules, made into a BPF program that the
//! kernel asks about every `open` and `mknod`.

mod program;
mod rules;

use std::os::fd::{BorrowedFd, OwnedFd};

use rvm_protocol::agent::DeviceRule;

use self::rules::Rules;
use crate::{
    error::{Error, Step, StepResult},
    sys::bpf,
};

/// A checked set of rules.
#[derive(Debug)]
pub struct Filter(Rules);

impl Filter {
    /// Checks the rules of a request; `field` names them in errors.
    pub fn plan(field: &str, rules: &[DeviceRule]) -> Result<Self, Error> {
        Rules::parse(field, rules).map(Self)
    }

    /// Puts the filter in force for a cgroup, in the place of `before` where it
    /// has one. Filters of cgroups made below come on top.
    pub fn attach(&self, cgroup: BorrowedFd<'_>, before: Option<&OwnedFd>) -> StepResult<OwnedFd> {
        let program =
            bpf::load_device_program(&program::compile(&self.0)).step(|| "load the device filter")?;
        bpf::attach_device_program(cgroup, &program, before).step(|| "attach the device filter")?;
        Ok(program)
    }
}
