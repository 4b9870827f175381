//! Which system calls the monitor's threads made while cases ran: each that a duty has of its own
//! is needed by something, or is no duty's to have.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// A thread's name without its number, and a call's number.
pub type Seen = BTreeSet<(String, i64)>;

/// Runs the program that follows, and prints what was called meanwhile, each line after [`MARK`].
const RECORD: &str = r#"
tracing=/sys/kernel/tracing
mountpoint -q $tracing || mount -t tracefs tracefs $tracing
event=$tracing/events/raw_syscalls/sys_enter
names='comm == "rvm-vmm" || comm ~ "vcpu*" || comm == "fs" || comm == "blk" || comm ~ "net*" || comm == "vsock" || comm == "mem" || comm == "balloon" || comm == "pmem"'
echo "hist:keys=common_pid.execname,id:size=131072 if $names" > $event/trigger || exit 99
"$@"
code=$?
sed 's/^/monitor called: /' $event/hist
exit $code
"#;
/// What lines of the record begin with.
const MARK: &str = "monitor called: ";

/// Calls that are not seen though they are made, or that no case brings about, and why.
const UNSEEN: [(&str, i64, &str); 5] = [
    ("vcpu", 7, "poll: a guest that asks which interrupts are pending, as none of the cases' does"),
    ("vcpu", 17, "pread64: the console's log is turned over after a mebibyte"),
    ("vcpu", 77, "ftruncate: the same"),
    ("fs", 157, "prctl: counted as the first thread's, as the thread's name is set by it before"),
    ("blk", 230, "clock_nanosleep: where the host's disk is full"),
];

/// Makes a record of what `program` with `arguments` has the monitor call.
pub fn recorded(program: &Path, arguments: Vec<String>) -> (&'static Path, Vec<String>) {
    let mut all =
        vec!["-c".to_owned(), RECORD.to_owned(), "sh".to_owned(), program.to_string_lossy().into_owned()];
    all.extend(arguments);
    (Path::new("/bin/sh"), all)
}

/// Takes a line of the record; false where it is none.
pub fn line(text: &str, seen: &mut Seen) -> bool {
    let Some(text) = text.strip_prefix(MARK) else { return false };
    // { common_pid: vcpu0           [       123], id:         16 } hitcount:          5
    let call = || {
        let (name, rest) = text.strip_prefix("{ common_pid: ")?.split_once('[')?;
        let (_, number) = rest.split_once("id:")?;
        let number = number.split_whitespace().next()?.parse().ok()?;
        Some((name.trim().trim_end_matches(|c: char| c.is_ascii_digit()).to_owned(), number))
    };
    seen.extend(call());
    true
}

/// Compares with what `monitor` says that its threads need.
pub fn compare(monitor: &Path, seen: &Seen) -> Result<String> {
    let output = Command::new(monitor).arg("--calls").output().context("rvm-vmm --calls")?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(!seen.is_empty(), "the monitor called nothing");
    let mut unseen = Vec::new();
    let mut count = 0;
    for line in text.lines() {
        let (threads, number) = line.split_once(' ').with_context(|| format!("rvm-vmm --calls: {line}"))?;
        let call = (threads.to_owned(), number.parse()?);
        count += 1;
        let known = UNSEEN.iter().any(|(threads, number, _)| *threads == call.0 && *number == call.1);
        if seen.contains(&call) == known {
            unseen.push(format!("{line}{}", if known { " (which is made after all)" } else { "" }));
        }
    }
    if !unseen.is_empty() {
        bail!("{} of {count} calls that no case has made:\n{}", unseen.len(), unseen.join("\n"));
    }
    Ok(format!("{count} calls, each made"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_record_are_read() {
        let mut seen = Seen::new();
        let text = "monitor called: { common_pid: vcpu12          [       123], id:         16 } hitcount:          5";
        assert!(
            line(text, &mut seen)
                && line("monitor called: Totals:", &mut seen)
                && !line("test a ... ok", &mut seen)
        );
        assert_eq!(seen, Seen::from([("vcpu".to_owned(), 16)]));
    }
}
