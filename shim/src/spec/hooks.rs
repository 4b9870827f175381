//! `hooks`: those of the host, which the shim runs, and those of the guest,
//! which the agent runs.

use std::path::PathBuf;

use oci_spec::runtime as oci;
use rvm_protocol::agent::{self, CreateContainerRequest, HookState};

use super::{SpecError, absolute_path, text};

/// Hooks that run on the host, each list in the spec's order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostHooks {
    /// Before the container is created in its sandbox.
    pub prestart: Vec<Hook>,
    /// After those.
    pub create_runtime: Vec<Hook>,
    /// After the container's process has been started.
    pub poststart: Vec<Hook>,
    /// After the container has been deleted.
    pub poststop: Vec<Hook>,
}

/// One program to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// The field that names it, for errors.
    pub field: String,
    /// The program.
    pub path: PathBuf,
    /// Its arguments, the program's name first; empty: the path alone.
    pub args: Vec<String>,
    /// Its environment; that of the shim where there is none.
    pub env: Option<Vec<String>>,
    /// Seconds it may take.
    pub timeout_s: Option<u32>,
}

/// Adds the guest's hooks to `container` and returns the host's.
pub(super) fn translate(
    spec: &oci::Spec,
    bundle: &str,
    container: &mut CreateContainerRequest,
) -> Result<HostHooks, SpecError> {
    let Some(hooks) = spec.hooks() else { return Ok(HostHooks::default()) };
    container.create_container_hooks = messages(list("createContainer", hooks.create_container())?);
    container.start_container_hooks = messages(list("startContainer", hooks.start_container())?);
    if !container.create_container_hooks.is_empty() || !container.start_container_hooks.is_empty() {
        container.hook_state = Some(HookState {
            oci_version: spec.version().clone(),
            id: container.container_id.clone(),
            bundle: bundle.to_owned(),
            annotations: spec.annotations().clone().unwrap_or_default(),
            ..Default::default()
        })
        .into();
    }
    // Deprecated, and what Docker uses.
    #[allow(deprecated)]
    let prestart = hooks.prestart();
    Ok(HostHooks {
        prestart: list("prestart", prestart)?,
        create_runtime: list("createRuntime", hooks.create_runtime())?,
        poststart: list("poststart", hooks.poststart())?,
        poststop: list("poststop", hooks.poststop())?,
    })
}

fn list(kind: &str, hooks: &Option<Vec<oci::Hook>>) -> Result<Vec<Hook>, SpecError> {
    hooks
        .iter()
        .flatten()
        .enumerate()
        .map(|(n, hook)| self::hook(format!("hooks.{kind}[{n}]"), hook))
        .collect()
}

fn hook(field: String, hook: &oci::Hook) -> Result<Hook, SpecError> {
    let strings = |name: &str, values: &[String]| {
        let checked =
            values.iter().enumerate().map(|(n, value)| text(format!("{field}.{name}[{n}]"), Some(value)));
        checked.collect::<Result<Vec<_>, _>>()
    };
    let timeout_s = match hook.timeout() {
        None => None,
        Some(seconds) => match u32::try_from(seconds) {
            Ok(seconds @ 1..) => Some(seconds),
            _ => {
                return Err(SpecError::field(
                    format!("{field}.timeout"),
                    format!("must be a number of seconds above 0, is {seconds}"),
                ));
            }
        },
    };
    Ok(Hook {
        path: absolute_path(&format!("{field}.path"), hook.path())?.into(),
        args: strings("args", hook.args().as_deref().unwrap_or_default())?,
        env: hook.env().as_deref().map(|env| strings("env", env)).transpose()?,
        timeout_s,
        field,
    })
}

fn messages(hooks: Vec<Hook>) -> Vec<agent::Hook> {
    hooks
        .into_iter()
        .map(|hook| agent::Hook {
            path: hook.path.to_string_lossy().into_owned(),
            args: hook.args,
            env: hook.env.unwrap_or_default(),
            timeout_s: hook.timeout_s.unwrap_or(0),
            ..Default::default()
        })
        .collect()
}
