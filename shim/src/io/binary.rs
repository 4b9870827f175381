//! `binary:///PROGRAM?KEY=VALUE`: output goes to a logging program, as
//! containerd's shims do it (containerd docs/runtime-v2.md, "Logging").
//!
//! The program finds the process's stdout on descriptor 3 and its stderr on 4,
//! and closes 5 when it is ready.

use std::{
    io::{self, PipeReader, PipeWriter},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, Stdio},
    time::Duration,
};

use tokio::{io::AsyncReadExt, net::unix::pipe, time::timeout};

use super::{IoError, Output};
use crate::background::off_thread;

/// How long a logging program may take to say it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// A running logging program. It ends by itself when its input does; dropping
/// this leaves it to that, and a thread to collect its exit.
#[derive(Debug)]
pub struct Logger(Option<Child>);

impl Logger {
    /// Starts the program `uri` names and waits until it is ready; returns where
    /// the process's stdout and stderr go.
    pub(super) async fn start(
        uri: &str,
        namespace: &str,
        id: &str,
    ) -> Result<(Self, Output, Output), IoError> {
        let failed = |source| IoError::Logger { uri: uri.to_owned(), source };
        let invalid = |problem| failed(io::Error::new(io::ErrorKind::InvalidInput, problem));
        let (program, query) = split(uri);
        let program = decode(program).filter(|program| program.starts_with('/'));
        let program = program.ok_or_else(|| invalid("must be binary:///PROGRAM, an absolute path"))?;
        let args = arguments(query).ok_or_else(|| invalid("has a query that is not KEY=VALUE&..."))?;

        let (out_reader, out_writer) = io::pipe().map_err(failed)?;
        let (err_reader, err_writer) = io::pipe().map_err(failed)?;
        let (ready_reader, ready_writer) = io::pipe().map_err(failed)?;
        let fds = [out_reader.into(), err_reader.into(), ready_writer.into()];
        let env = [("CONTAINER_ID", id), ("CONTAINER_NAMESPACE", namespace)]
            .map(|(name, value)| (name, value.to_owned()));
        // It may lie on a file system that does not answer.
        let child = off_thread(move || spawn(&program, &args, fds, env)).await;
        let logger = Self(Some(child.map_err(failed)?));
        match timeout(READY_TIMEOUT, wait_ready(ready_reader)).await {
            Ok(ready) => ready.map_err(failed)?,
            Err(_) => return Err(failed(io::Error::new(io::ErrorKind::TimedOut, "did not get ready"))),
        }
        Ok((logger, output(out_writer).map_err(failed)?, output(err_writer).map_err(failed)?))
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        let Some(mut child) = self.0.take() else { return };
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        std::thread::spawn(move || child.wait());
    }
}

fn output(writer: PipeWriter) -> io::Result<Output> {
    Ok(Output::writer(pipe::Sender::from_owned_fd(writer.into())?))
}

async fn wait_ready(reader: PipeReader) -> io::Result<()> {
    let mut reader = pipe::Receiver::from_owned_fd(reader.into())?;
    // Closed or written to: either way it is ready.
    reader.read(&mut [0; 1]).await.map(drop)
}

/// Starts `program` with `fds` as descriptors 3, 4 and 5, and with `env` in its environment.
fn spawn(program: &str, args: &[String], fds: [OwnedFd; 3], env: [(&str, String); 2]) -> io::Result<Child> {
    let mut command = Command::new(program);
    command.args(args).env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    command.envs(env);
    // Above 5, so that no copy overwrites one that is still to be copied.
    let fds = fds
        .iter()
        .map(|fd| nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(6)))
        .collect::<Result<Vec<_>, _>>()?;
    let numbers = fds.clone();
    // SAFETY: the closure makes system calls only and allocates nothing.
    unsafe { command.pre_exec(move || place_descriptors(&numbers)) };
    let child = command.spawn();
    for fd in fds {
        let _ = nix::unistd::close(fd.as_raw_fd());
    }
    child
}

/// In the child: `fds` become 3 and up. They are open until it has been started.
fn place_descriptors(fds: &[i32]) -> io::Result<()> {
    for (target, fd) in (3..).zip(fds) {
        // SAFETY: dup2 takes no pointer, and what `target` was is of no use to
        // the program about to be executed.
        if unsafe { libc::dup2(*fd, target) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn split(uri: &str) -> (&str, &str) {
    let rest = uri.strip_prefix("binary://").unwrap_or(uri);
    rest.split_once('?').unwrap_or((rest, ""))
}

/// The query's keys and values, each an argument of its own; empty values are
/// none.
fn arguments(query: &str) -> Option<Vec<String>> {
    let mut args = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        args.push(decode(&key.replace('+', " "))?);
        if !value.is_empty() {
            args.push(decode(&value.replace('+', " "))?);
        }
    }
    Some(args)
}

/// Percent-encoding (RFC 3986, 2.1).
fn decode(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let digits = [bytes.next()?, bytes.next()?];
        out.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_programs_and_arguments() {
        assert_eq!(split("binary:///usr/bin/log?a=b&c"), ("/usr/bin/log", "a=b&c"));
        assert_eq!(arguments("a=b%20c&d&e=+f").unwrap(), ["a", "b c", "d", "e", " f"]);
        assert_eq!(decode("%2"), None);
        assert_eq!(decode("%zz"), None);
    }
}
