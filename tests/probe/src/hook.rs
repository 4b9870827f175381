//! What an OCI hook sees.

use std::{
    fs::{File, read_link, read_to_string},
    io::{Read, Write},
};

use crate::out::Out;

/// Appends it to `file`; a hook's input, which ends, as well. Returns the exit code.
pub fn record(name: &str, file: &str, input: bool) -> i32 {
    let mut state = String::new();
    let read = if input { std::io::stdin().read_to_string(&mut state) } else { Ok(0) };
    let mut out = Out::default();
    out.section(name);
    out.put("args", std::env::args().collect::<Vec<_>>().join(" "));
    let mut variables: Vec<String> =
        std::env::vars().map(|(name, value)| format!("{name}={value}")).collect();
    variables.sort();
    out.put("environment", variables.join(" "));
    out.put("stdin", if read.is_ok() { "ok" } else { "failed" });
    out.put("state", state.trim());
    out.put("cwd", std::env::current_dir().map_or_else(|e| e.to_string(), |dir| dir.display().to_string()));
    let status = read_to_string("/proc/self/status").unwrap_or_default();
    for line in status.lines() {
        if let Some((key @ ("Uid" | "Gid" | "CapEff"), value)) = line.split_once(':') {
            out.put(key, value.split_whitespace().collect::<Vec<_>>().join(" "));
        }
    }
    out.put("probe_at_root", std::path::Path::new("/bin/rvm-probe").exists());
    out.put("pid_is_1", read_link("/proc/self").is_ok_and(|pid| pid.as_os_str() == "1"));
    let written = File::options()
        .create(true)
        .append(true)
        .open(file)
        .and_then(|mut file| file.write_all(out.text().as_bytes()));
    i32::from(written.is_err())
}
