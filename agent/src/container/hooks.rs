//! Hooks of the OCI runtime specification that run inside: `createContainer`
//! and `startContainer`.

use std::{
    ffi::CString,
    fmt::Write as _,
    fs::File,
    io::{Read, Seek, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::{Signal, kill},
        stat::{Mode, umask},
    },
    unistd::{chroot, dup2_stderr, dup2_stdin, dup2_stdout, fchdir, pipe2},
};
use rvm_protocol::agent::{self, Hook};

use crate::{
    error::{Error, Step, StepError, StepResult},
    sys::process::{Child, close_all_except, fork, wait_any, wait_for},
};

/// How much of a failed hook's output goes into the error.
const MAX_OUTPUT: usize = 4096;

/// Hooks of one kind, with what they are told.
#[derive(Clone, Copy, Debug)]
pub struct Hooks<'a> {
    /// Their name in the specification.
    pub kind: &'static str,
    /// In the order they run.
    pub hooks: &'a [Hook],
    /// What they get on standard input, but for `status` and `pid`.
    pub state: &'a agent::HookState,
    /// The container's status meanwhile.
    pub status: &'static str,
}

/// Checks hooks of a request.
pub fn check(field: &str, hooks: &[Hook]) -> Result<(), Error> {
    for (index, hook) in hooks.iter().enumerate() {
        if !hook.path.starts_with('/') {
            return Err(Error::invalid(
                format!("{field}[{index}].path"),
                format!("{:?} must be an absolute path in the container", hook.path),
            ));
        }
        let strings = [&hook.path].into_iter().chain(&hook.args).chain(&hook.env);
        if strings.into_iter().any(|string| string.contains('\0')) {
            return Err(Error::invalid(format!("{field}[{index}]"), "must not contain NUL"));
        }
    }
    Ok(())
}

impl Hooks<'_> {
    /// Runs them one after the other, in this process's namespaces, with `root`
    /// as their root directory where it is not this process's. The first that
    /// fails is the last.
    pub fn run(&self, root: Option<BorrowedFd<'_>>) -> StepResult<()> {
        for (index, hook) in self.hooks.iter().enumerate() {
            self.run_one(hook, root).map_err(|reason| {
                StepError::Refused(format!("{} hook {index} ({:?}): {reason}", self.kind, hook.path))
            })?;
        }
        Ok(())
    }

    fn run_one(&self, hook: &Hook, root: Option<BorrowedFd<'_>>) -> StepResult<()> {
        let stdin = self.standard_input().step(|| "write the state")?;
        let (output, write) = pipe2(OFlag::O_CLOEXEC).step(|| "create a pipe")?;
        let child = fork(0, || {
            // The output is where a hook's own complaints go as well.
            let error = match become_hook(hook, root, &stdin, &write) {
                Ok(never) => match never {},
                Err(error) => error,
            };
            let _ = std::io::stderr().write_all(error.to_string().as_bytes());
            127
        })
        .step(|| "create a process")?;
        drop(write);
        let limit = (hook.timeout_s > 0).then(|| Duration::from_secs(hook.timeout_s.into()));
        let (ended, said) = outcome(&child, output, limit)?;
        // What a hook leaves behind is ours to collect where we are PID 1.
        while let Ok(Some(_)) = wait_any() {}
        let said = if said.is_empty() { String::new() } else { format!(": {}", said.trim_end()) };
        match ended {
            Some(0) => Ok(()),
            Some(code) => Err(StepError::Refused(format!("exit status {code}{said}"))),
            None => Err(StepError::Refused(format!("timed out after {} s{said}", hook.timeout_s))),
        }
    }

    /// The state in a file of its own: a pipe could be too small for it.
    fn standard_input(&self) -> std::io::Result<File> {
        let mut file = File::from(memfd_create(c"state", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(self.state_json().as_bytes())?;
        file.rewind()?;
        Ok(file)
    }

    fn state_json(&self) -> String {
        let state = self.state;
        let mut annotations: Vec<_> = state.annotations.iter().collect();
        annotations.sort();
        let annotations: Vec<String> =
            annotations.iter().map(|(key, value)| format!("{}:{}", json(key), json(value))).collect();
        format!(
            "{{\"ociVersion\":{},\"id\":{},\"status\":{},\"pid\":{},\"bundle\":{},\"annotations\":{{{}}}}}",
            json(&state.oci_version),
            json(&state.id),
            json(self.status),
            std::process::id(),
            json(&state.bundle),
            annotations.join(",")
        )
    }
}

/// A string in JSON (RFC 8259, section 7).
fn json(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            // Writing to a string cannot fail.
            '\0'..'\x20' => drop(write!(out, "\\u{:04x}", u32::from(c))),
            _ => out.push(c),
        }
    }
    out.push('"');
    out
}

/// In the hook's process: becomes the hook's program.
fn become_hook(
    hook: &Hook,
    root: Option<BorrowedFd<'_>>,
    stdin: &File,
    output: &OwnedFd,
) -> StepResult<std::convert::Infallible> {
    let connect = || "connect its standard streams";
    dup2_stdin(stdin).step(connect)?;
    dup2_stdout(output).step(connect)?;
    dup2_stderr(output).step(connect)?;
    umask(Mode::from_bits_truncate(0o022));
    if let Some(root) = root {
        fchdir(root).and_then(|()| chroot(".")).step(|| "enter the container's root file system")?;
    }
    close_all_except(&[]).step(|| "close descriptors")?;
    let string = |text: &String| {
        CString::new(text.as_bytes()).map_err(|_| StepError::Refused("a string contains NUL".into()))
    };
    let path = string(&hook.path)?;
    let mut args = hook.args.iter().map(string).collect::<StepResult<Vec<_>>>()?;
    if args.is_empty() {
        args.push(path.clone());
    }
    let env = hook.env.iter().map(string).collect::<StepResult<Vec<_>>>()?;
    nix::unistd::execve(&path, &args, &env).step(|| format!("exec {}", hook.path))
}

/// Waits for a hook's end: its exit code, none where it took too long, and the
/// beginning of what it said.
fn outcome(child: &Child, output: OwnedFd, limit: Option<Duration>) -> StepResult<(Option<u32>, String)> {
    let step = || "wait for it";
    fcntl(&output, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).step(step)?;
    let mut output = Some(File::from(output));
    let mut said = Vec::new();
    let deadline = limit.map(|limit| Instant::now() + limit);
    let ended = loop {
        let left = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
            Some(Duration::ZERO) => break false,
            // Rounded up: waking too early would mean to spin.
            Some(left) => PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX),
            None => PollTimeout::NONE,
        };
        let mut fds = vec![PollFd::new(child.pidfd.as_fd(), PollFlags::POLLIN)];
        fds.extend(output.iter().map(|output| PollFd::new(output.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, left) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).step(step),
        }
        let has_ended = fds[0].any() == Some(true);
        if output.as_mut().is_some_and(|output| !take_output(output, &mut said)) {
            // Closed; the hook may live on without.
            output = None;
        }
        if has_ended {
            break true;
        }
    };
    if !ended {
        // By its number, which is its own until it is collected: a filter may
        // know no pidfd_send_signal(2).
        kill(child.pid, Signal::SIGKILL).step(|| "kill it")?;
    }
    let code = wait_for(child.pid).step(step)?;
    Ok((ended.then_some(code), String::from_utf8_lossy(&said).into_owned()))
}

/// Takes what there is, of which `said` keeps the beginning. `false`: there will
/// be no more.
fn take_output(output: &mut File, said: &mut Vec<u8>) -> bool {
    let mut buffer = [0; MAX_OUTPUT];
    // As much as a pipe holds: a hook that never stops writing must not keep us here.
    for _ in 0..16 {
        match output.read(&mut buffer) {
            Ok(0) => return false,
            Ok(length) => {
                let room = MAX_OUTPUT - said.len();
                said.extend_from_slice(&buffer[..length.min(room)]);
            }
            Err(error) => return error.kind() == std::io::ErrorKind::WouldBlock,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str, timeout_s: u32) -> Result<(), String> {
        let hook = Hook {
            path: "/bin/sh".into(),
            args: vec!["sh".into(), "-c".into(), script.into()],
            env: vec!["WHO=me".into()],
            timeout_s,
            ..Default::default()
        };
        let state = agent::HookState { id: "c1".into(), ..Default::default() };
        run_hooks(&[hook], &state)
    }

    fn run_hooks(hooks: &[Hook], state: &agent::HookState) -> Result<(), String> {
        let hooks = Hooks { kind: "createContainer", hooks, state, status: "creating" };
        // The test harness has threads: in a process of its own, which is a
        // child as those that run hooks are.
        let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        // SAFETY: the child uses only its own copy of memory and exits at once.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                crate::sys::process::become_child();
                let result = hooks.run(None).map_err(|error| error.to_string());
                let _ = File::from(write).write_all(result.err().unwrap_or_default().as_bytes());
                crate::sys::process::exit_child(0)
            }
            nix::unistd::ForkResult::Parent { child } => {
                drop(write);
                let mut text = String::new();
                File::from(read).read_to_string(&mut text).unwrap();
                nix::sys::wait::waitpid(child, None).unwrap();
                if text.is_empty() { Ok(()) } else { Err(text) }
            }
        }
    }

    #[test]
    fn a_hook_gets_state_environment_and_a_verdict() {
        assert_eq!(run("test $WHO = me && grep -q '\"id\":\"c1\"'", 0), Ok(()));
        let name = "createContainer hook 0 (\"/bin/sh\")";
        assert_eq!(run("echo broken >&2; exit 3", 5), Err(format!("{name}: exit status 3: broken")));
        assert_eq!(run("kill -9 $$", 5), Err(format!("{name}: exit status 137")));
        let start = Instant::now();
        assert_eq!(run("echo so far; sleep 1000", 1), Err(format!("{name}: timed out after 1 s: so far")));
        assert!(start.elapsed() < Duration::from_secs(30));
        // More than fits into the pipe or the error.
        assert_eq!(run("head -c 1000000 /dev/zero", 0), Ok(()));
        // Its output may stay open longer than it lives.
        assert_eq!(run("sleep 1000 & exit 0", 0), Ok(()));
        let missing = [Hook { path: "/nope".into(), ..Default::default() }];
        assert_eq!(
            run_hooks(&missing, &agent::HookState::default()),
            Err("createContainer hook 0 (\"/nope\"): exit status 127: exec /nope: no such file or directory"
                .into())
        );
    }

    #[test]
    fn the_state_is_json() {
        let state = agent::HookState {
            oci_version: "1.0.2".into(),
            id: "c1".into(),
            bundle: "/run/\"x\"".into(),
            annotations: [("b".into(), "1\n".into()), ("a".into(), "ü\\".into())].into(),
            ..Default::default()
        };
        let hooks = Hooks { kind: "startContainer", hooks: &[], state: &state, status: "created" };
        assert_eq!(
            hooks.state_json(),
            format!(
                r#"{{"ociVersion":"1.0.2","id":"c1","status":"created","pid":{},"bundle":"/run/\"x\"","annotations":{{"a":"ü\\","b":"1\u000a"}}}}"#,
                std::process::id()
            )
        );
    }

    #[test]
    fn hooks_are_checked_by_field() {
        let hook =
            |path: &str, arg: &str| Hook { path: path.into(), args: vec![arg.into()], ..Default::default() };
        assert!(check("h", &[hook("/bin/a", "x")]).is_ok());
        let error = check("h", &[hook("/a", ""), hook("bin/a", "x")]).unwrap_err().to_string();
        assert_eq!(error, "h[1].path: \"bin/a\" must be an absolute path in the container");
        assert_eq!(check("h", &[hook("/a", "\0")]).unwrap_err().to_string(), "h[0]: must not contain NUL");
    }
}
