//! The program: finding it as runc does, and `execve`.

use std::{
    collections::HashSet,
    ffi::CString,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::stat::{SFlag, stat},
    unistd::{AccessFlags, access},
};
use rvm_protocol::agent;

use super::user;
use crate::error::{Error, StepError, StepResult, describe};

/// A program ready to be run.
#[derive(Debug)]
pub struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

/// Checks what of a process becomes arguments of `execve`.
pub fn check(field: &str, process: &agent::Process) -> Result<(), Error> {
    if process.args.first().is_none_or(String::is_empty) {
        return Err(Error::invalid(format!("{field}.args"), "must hold at least the program"));
    }
    for (name, strings) in [("args", &process.args), ("env", &process.env)] {
        if let Some(index) = strings.iter().position(|string| string.contains('\0')) {
            return Err(Error::invalid(format!("{field}.{name}[{index}]"), "must not contain NUL"));
        }
    }
    if !process.cwd.starts_with('/') || process.cwd.contains('\0') {
        return Err(Error::invalid(
            format!("{field}.cwd"),
            format!("{:?} must be an absolute path", process.cwd),
        ));
    }
    Ok(())
}

impl Program {
    /// Finds the program as the user, in the working directory, with the
    /// container's files in sight.
    pub fn find(process: &agent::Process) -> StepResult<Self> {
        let env = environment(process);
        let path = look_up(process.args.first().map_or("", String::as_str), &env)?;
        Ok(Self {
            path: c_string(path.as_os_str().as_bytes())?,
            args: process.args.iter().map(|arg| c_string(arg.as_bytes())).collect::<StepResult<_>>()?,
            env: env.iter().map(|variable| c_string(variable.as_bytes())).collect::<StepResult<_>>()?,
        })
    }

    /// Becomes the program. Returns only why that failed.
    pub fn run(&self) -> StepError {
        let errno = match nix::unistd::execve(&self.path, &self.args, &self.env) {
            Ok(never) => match never {},
            Err(errno) => errno,
        };
        StepError::Kernel { step: format!("exec {}", self.path.to_string_lossy()), errno }
    }
}

fn c_string(bytes: &[u8]) -> StepResult<CString> {
    CString::new(bytes).map_err(|_| StepError::Refused("exec: a string contains NUL".into()))
}

/// The environment of the spec, each variable once and with its last value, as
/// runc passes it on, and `HOME` where it has none.
fn environment(process: &agent::Process) -> Vec<String> {
    let name = |entry: &str| entry.split_once('=').map_or(entry, |(name, _)| name).to_owned();
    let mut seen = HashSet::new();
    let mut env: Vec<String> =
        process.env.iter().rev().filter(|entry| seen.insert(name(entry))).cloned().collect();
    env.reverse();
    if variable(&env, "HOME").is_none_or(str::is_empty) {
        env.retain(|entry| !entry.starts_with("HOME="));
        env.push(format!("HOME={}", user::home_directory(process.user.uid)));
    }
    env
}

/// The last value of a variable, which is the one that counts.
fn variable<'a>(env: &'a [String], name: &str) -> Option<&'a str> {
    env.iter().rev().find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))
}

fn look_up(name: &str, env: &[String]) -> StepResult<PathBuf> {
    let failed = |reason: String| StepError::Refused(format!("exec: {name:?}: {reason}"));
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(errno @ Errno::ENOENT) => Err(failed(format!("stat {name}: {}", describe(errno)))),
            Err(errno) => Err(failed(describe(errno))),
        };
    }
    let path = variable(env, "PATH").unwrap_or_default();
    // An empty entry is the working directory, as in every shell.
    let dirs = path.split(':').map(|dir| if dir.is_empty() { "." } else { dir });
    dirs.map(|dir| Path::new(dir).join(name))
        .find(|candidate| executable(candidate).is_ok())
        .ok_or_else(|| failed("executable file not found in $PATH".into()))
}

fn executable(path: &Path) -> nix::Result<()> {
    if stat(path)?.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits() {
        return Err(Errno::EISDIR);
    }
    // With the real user, which is the effective one here.
    access(path, AccessFlags::X_OK)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    fn process(args: &[&str], env: &[&str]) -> agent::Process {
        agent::Process {
            args: args.iter().map(|s| (*s).to_owned()).collect(),
            env: env.iter().map(|s| (*s).to_owned()).collect(),
            cwd: "/".into(),
            ..Default::default()
        }
    }

    fn look(name: &str, env: &[&str]) -> Result<PathBuf, String> {
        look_up(name, &process(&[], env).env).map_err(|error| error.to_string())
    }

    #[test]
    fn looks_where_path_says() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        fs::create_dir_all(first.join("tool")).unwrap();
        fs::create_dir(&second).unwrap();
        fs::write(second.join("tool"), "").unwrap();
        fs::set_permissions(second.join("tool"), PermissionsExt::from_mode(0o755)).unwrap();
        let path = format!("PATH={}:{}", first.display(), second.display());
        // A directory of that name is not it; the last PATH counts.
        assert_eq!(look("tool", &["PATH=/nonexistent", &path]), Ok(second.join("tool")));
        assert_eq!(look(second.join("tool").to_str().unwrap(), &[]), Ok(second.join("tool")));
    }

    #[test]
    fn failures_read_as_in_runc() {
        let not_found = "exec: \"nope\": executable file not found in $PATH";
        assert_eq!(look("nope", &["PATH=/bin:/usr/bin"]), Err(not_found.into()));
        assert_eq!(look("nope", &[]), Err(not_found.into()));
        assert_eq!(
            look("/nope", &["PATH=/bin"]),
            Err("exec: \"/nope\": stat /nope: no such file or directory".into())
        );
        assert_eq!(look("/etc", &[]), Err("exec: \"/etc\": is a directory".into()));
        assert_eq!(look("/etc/passwd", &[]), Err("exec: \"/etc/passwd\": permission denied".into()));
    }

    #[test]
    fn home_is_added_only_where_missing() {
        assert_eq!(environment(&process(&[], &["A=1", "HOME=/h"])), ["A=1", "HOME=/h"]);
        let env = environment(&process(&[], &["HOME=", "A=1"]));
        assert_eq!(env.len(), 2);
        assert!(variable(&env, "HOME").unwrap().starts_with('/'));
    }

    #[test]
    fn a_variable_given_twice_is_there_once() {
        let env = environment(&process(&[], &["A=1", "HOME=/h", "B=", "A=2", "AB=3"]));
        assert_eq!(env, ["HOME=/h", "B=", "A=2", "AB=3"]);
    }

    #[test]
    fn arguments_are_checked_by_field() {
        assert!(check("process", &process(&["sh"], &["A=b"])).is_ok());
        for (process, expected) in [
            (process(&[], &[]), "process.args: must hold at least the program"),
            (process(&[""], &[]), "process.args: must hold at least the program"),
            (process(&["a", "b\0"], &[]), "process.args[1]: must not contain NUL"),
            (process(&["a"], &["\0"]), "process.env[0]: must not contain NUL"),
        ] {
            assert_eq!(check("process", &process).unwrap_err().to_string(), expected);
        }
        let relative = agent::Process { cwd: "tmp".into(), ..process(&["a"], &[]) };
        assert_eq!(
            check("process", &relative).unwrap_err().to_string(),
            "process.cwd: \"tmp\" must be an absolute path"
        );
    }
}
