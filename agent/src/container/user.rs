//! The user a process runs as, and its privileges.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    os::fd::AsFd,
};

use nix::{
    errno::Errno,
    sys::stat::{Mode, fstat, umask},
    unistd::{Gid, Uid, fchown, setgid, setgroups, setuid},
};
use rvm_protocol::agent;

use super::{attributes, capabilities};
use crate::error::{Error, Step, StepResult};

/// The file creation mask where the spec gives none.
const DEFAULT_UMASK: u32 = 0o022;
/// How much of `/etc/passwd` is looked at.
const MAX_PASSWD: u64 = 16 << 20;

/// Checks user and privileges of a process.
pub fn check(field: &str, process: &agent::Process) -> Result<(), Error> {
    if process.user.umask.is_some_and(|umask| umask > 0o777) {
        return Err(Error::invalid(format!("{field}.user.umask"), "must be at most 0777"));
    }
    if process.oom_score_adj.is_some_and(|score| !(-1000..=1000).contains(&score)) {
        return Err(Error::invalid(format!("{field}.oom_score_adj"), "must be between -1000 and 1000"));
    }
    capabilities::check(&format!("{field}.capabilities"), &process.capabilities)
}

/// Sets how likely the kernel is to choose this process when memory is short.
/// To be called while the agent's `/proc` is in sight.
pub fn apply_oom_score(process: &agent::Process) -> StepResult<()> {
    let Some(score) = process.oom_score_adj else { return Ok(()) };
    std::fs::write("/proc/self/oom_score_adj", score.to_string())
        .step(|| format!("set oom_score_adj {score}"))
}

/// Gives the standard streams to the user, so that `/dev/stdout` can be opened
/// again by name.
pub fn own_standard_streams(user: Uid) -> StepResult<()> {
    let null = nix::sys::stat::stat("/dev/null").map(|null| null.st_rdev).ok();
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    for stream in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
        let stat = fstat(stream).step(|| "inspect a standard stream")?;
        if stat.st_uid == user.as_raw() || (stat.st_rdev != 0 && Some(stat.st_rdev) == null) {
            continue;
        }
        match fchown(stream, Some(user), None) {
            // A read-only or foreign file system keeps its owners.
            Ok(()) | Err(Errno::EINVAL | Errno::EPERM | Errno::EROFS) => {}
            Err(errno) => return Err(errno).step(|| "give the standard streams to the user"),
        }
    }
    Ok(())
}

/// From root with all privileges to the user with those the spec gives.
pub fn become_user(process: &agent::Process, enter_cwd: impl Fn() -> StepResult<bool>) -> StepResult<()> {
    attributes::apply_limits(process)?;
    capabilities::apply_bounding(&process.capabilities)?;
    capabilities::keep_over_user_change(true)?;
    // As root where that works, as the user where only the user may.
    let entered = enter_cwd()?;
    switch(&process.user)?;
    if !entered && !enter_cwd()? {
        return Err(Errno::EACCES).step(|| cwd_step(&process.cwd));
    }
    capabilities::keep_over_user_change(false)?;
    capabilities::apply(&process.capabilities)?;
    umask(Mode::from_bits_truncate(process.user.umask.unwrap_or(DEFAULT_UMASK)));
    if process.no_new_privileges {
        capabilities::set_no_new_privileges()?;
    }
    Ok(())
}

/// In runc's words, which people search for.
pub fn cwd_step(cwd: &str) -> String {
    format!("chdir to cwd ({cwd:?}) set in config.json failed")
}

fn switch(user: &agent::User) -> StepResult<()> {
    let groups: Vec<Gid> = user.additional_gids.iter().copied().map(Gid::from_raw).collect();
    setgroups(&groups).step(|| "set additional groups")?;
    setgid(Gid::from_raw(user.gid)).step(|| format!("set group {}", user.gid))?;
    setuid(Uid::from_raw(user.uid)).step(|| format!("set user {}", user.uid))
}

/// The user's home directory by the container's `/etc/passwd`, `/` where that
/// does not know the user. glibc's lookup needs shared libraries, which a
/// static program in a foreign root file system must not load.
pub fn home_directory(uid: u32) -> String {
    let Ok(passwd) = File::open("/etc/passwd") else { return "/".into() };
    home_in(BufReader::new(passwd.take(MAX_PASSWD)), uid).unwrap_or_else(|| "/".into())
}

fn home_in(passwd: impl BufRead, uid: u32) -> Option<String> {
    passwd.split(b'\n').map_while(Result::ok).find_map(|line| {
        // name:password:uid:gid:comment:home:shell
        let line = String::from_utf8_lossy(&line);
        let mut fields = line.split(':');
        let found = fields.nth(2)?.trim().parse() == Ok(uid);
        let home = fields.nth(2)?.trim();
        (found && !home.is_empty()).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_comes_from_passwd() {
        let passwd = "# comment\nroot:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:/bin/sh\nnohome:x:5:5:::\n";
        assert_eq!(home_in(passwd.as_bytes(), 0).as_deref(), Some("/root"));
        assert_eq!(home_in(passwd.as_bytes(), 33).as_deref(), Some("/var/www"));
        assert_eq!(home_in(passwd.as_bytes(), 5), None);
        assert_eq!(home_in(passwd.as_bytes(), 1000), None);
        assert_eq!(home_in(&b"\xff\xfe:x:7:7::/seven:\n"[..], 7).as_deref(), Some("/seven"));
    }

    #[test]
    fn numbers_are_checked_by_field() {
        let process = agent::Process { oom_score_adj: Some(-1001), ..Default::default() };
        let error = check("process", &process).unwrap_err().to_string();
        assert_eq!(error, "process.oom_score_adj: must be between -1000 and 1000");
        let user = agent::User { umask: Some(0o1000), ..Default::default() };
        let process = agent::Process { user: Some(user).into(), ..Default::default() };
        let error = check("process", &process).unwrap_err().to_string();
        assert_eq!(error, "process.user.umask: must be at most 0777");
    }
}
