//! Running the programs of a build: their output is kept for the error
//! message, or watched line by line for progress.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use crate::Error;

/// Lines of a failed program's output that go into the error.
const KEPT_LINES: usize = 30;

/// Runs `command` and returns what it wrote to standard output.
pub fn output(command: &mut Command) -> Result<String, Error> {
    let output = command.stdin(Stdio::null()).output().map_err(|source| spawn_error(command, source))?;
    if !output.status.success() {
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        let kept = &lines[lines.len().saturating_sub(KEPT_LINES)..];
        return Err(Error::Failed {
            program: describe(command),
            status: output.status,
            output: kept.join("\n"),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `command`, both its outputs in one stream, and hands every line to `line`.
pub fn watch(command: &mut Command, mut line: impl FnMut(&str)) -> Result<(), Error> {
    let pipe = || std::io::pipe().map_err(|source| spawn_error(command, source));
    let (reader, writer) = pipe()?;
    let second = writer.try_clone().map_err(|source| spawn_error(command, source))?;
    command.stdin(Stdio::null()).stdout(writer).stderr(second);
    let mut child = command.spawn().map_err(|source| spawn_error(command, source))?;
    // The command holds the pipe's write end; the reader sees its end only once that is closed.
    command.stdout(Stdio::null()).stderr(Stdio::null());

    let mut kept = VecDeque::with_capacity(KEPT_LINES);
    for text in BufReader::new(reader).split(b'\n') {
        let Ok(text) = text else { break };
        let text = String::from_utf8_lossy(&text).into_owned();
        line(&text);
        if kept.len() == KEPT_LINES {
            kept.pop_front();
        }
        kept.push_back(text);
    }
    let status = child.wait().map_err(|source| spawn_error(command, source))?;
    if !status.success() {
        let output = Vec::from(kept).join("\n");
        return Err(Error::Failed { program: describe(command), status, output });
    }
    Ok(())
}

/// The error for a program that could not be run.
pub fn spawn_error(command: &Command, source: std::io::Error) -> Error {
    Error::Spawn { program: command.get_program().to_string_lossy().into_owned(), source }
}

fn describe(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg(script);
        command
    }

    #[test]
    fn output_is_returned_and_a_failure_carries_both_streams() {
        assert_eq!(output(&mut shell("echo a; echo b >&2")).unwrap(), "a\n");
        let error = output(&mut shell("echo a; echo b >&2; exit 3")).unwrap_err().to_string();
        assert!(error.contains("a\nb") && error.contains('3'), "{error}");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = output(&mut Command::new("no-such-program-here")).unwrap_err().to_string();
        assert!(error.contains("no-such-program-here"), "{error}");
    }

    #[test]
    fn watch_sees_every_line_and_keeps_the_last_for_the_error() {
        let mut seen = Vec::new();
        watch(&mut shell("echo a; echo b >&2; printf c"), |line| seen.push(line.to_owned())).unwrap();
        assert_eq!(seen, ["a", "b", "c"]);

        let error = watch(&mut shell("seq 100; exit 1"), |_| ()).unwrap_err();
        let Error::Failed { output, .. } = error else { panic!("{error}") };
        assert_eq!(output.lines().count(), KEPT_LINES);
        assert!(output.ends_with("99\n100"), "{output}");
    }
}
