//! What a device costs without a guest, for benchmarks: a monitor that is shut in beside one that is not.

use std::fmt::Write;
use std::mem::MaybeUninit;
use std::path::Path;
use std::time::{Duration, Instant};

/// What one of something took, and what it cost the device's threads, in seconds.
pub struct Cost {
    what: &'static str,
    took: f64,
    used: f64,
}

/// Processor time: of the whole process, or of the calling thread.
fn used(who: libc::c_int) -> Duration {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: there is room for a rusage.
    assert_eq!(unsafe { libc::getrusage(who, usage.as_mut_ptr()) }, 0);
    // SAFETY: it was zeroed and then filled.
    let usage = unsafe { usage.assume_init() };
    let time = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// Does something `times` times, `each` of what is counted at a time.
pub fn measure(what: &'static str, times: usize, each: usize, mut act: impl FnMut(usize)) -> Cost {
    let device = || used(libc::RUSAGE_SELF) - used(libc::RUSAGE_THREAD);
    let (began, before) = (Instant::now(), device());
    for index in 0..times {
        act(index);
    }
    let all = (each * times) as f64;
    let (took, used) = (began.elapsed().as_secs_f64(), (device() - before).as_secs_f64());
    Cost { what, took: took / all, used: used / all }
}

/// Measures in a process that is shut in, with `share` as its root; `costs` starts the device's threads after
/// [`crate::jail::tests::filter`]: who measures is no thread of a monitor's.
pub fn shut_in(share: &Path, costs: impl FnOnce() -> Vec<Cost> + Send) -> Vec<[f64; 2]> {
    let line = |Cost { took, used, .. }| format!("{took} {used}\n");
    let said = crate::jail::tests::inside(share, true, || costs().into_iter().map(line).collect());
    let numbers = |line: &str| -> Option<[f64; 2]> {
        let (took, used) = line.split_once(' ')?;
        Some([took.parse().ok()?, used.parse().ok()?])
    };
    let found: Option<Vec<_>> = said.lines().map(numbers).collect();
    found.unwrap_or_else(|| panic!("{said}"))
}

/// A table of both, of what is counted a second.
pub fn table(counted: &str, free: &[Cost], shut_in: &[[f64; 2]]) -> String {
    assert_eq!(free.len(), shut_in.len());
    let mut text = String::new();
    let (rate, each) = (format!("{counted}/s"), "us of a processor each");
    let _ = writeln!(text, "{rate:>12} {each:>26} {:>12} {each:>26}", "shut in");
    for (&Cost { what, took, used }, &[jailed_took, jailed_used]) in free.iter().zip(shut_in) {
        let _ = writeln!(
            text,
            "{:>12.0} {:>26.2} {:>12.0} {:>26.2}   {what}: {:.2} of the time, {:.2} of the processor shut in",
            1.0 / took,
            used * 1e6,
            1.0 / jailed_took,
            jailed_used * 1e6,
            jailed_took / took,
            jailed_used / used
        );
    }
    text
}
