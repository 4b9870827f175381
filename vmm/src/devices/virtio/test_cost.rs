//! What a device costs without a guest, for benchmarks: a monitor that is shut in beside one that is not.

use std::fmt::Write;
use std::mem::MaybeUninit;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::jail::tests::{apart, inside};

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

/// How often all is measured. What counts is the least: whatever else a machine does adds to it.
const ROUNDS: usize = 11;

/// A table of what `free` costs and what `shut_in` does, in processes of their own, in turn: the latter in one that is
/// shut in, with `share` as its root, whose device's threads are started after [`crate::jail::tests::filter`]. Who
/// measures is no thread of a monitor's.
pub fn beside(
    counted: &str,
    share: &Path,
    free: impl Fn() -> Vec<Cost> + Sync,
    shut_in: impl Fn() -> Vec<Cost> + Sync,
) -> String {
    let mut rows: Vec<(String, [Vec<f64>; 4])> = Vec::new();
    for _ in 0..ROUNDS {
        let free = apart(|| lines(&free));
        let jailed = inside(share, true, || lines(&shut_in));
        assert_eq!(free.lines().count(), jailed.lines().count(), "{free}\n{jailed}");
        for (row, (free, jailed)) in free.lines().zip(jailed.lines()).enumerate() {
            let ([took, used, what], [jailed_took, jailed_used, _]) = (words(free), words(jailed));
            if rows.len() == row {
                rows.push((what.to_owned(), Default::default()));
            }
            for (all, value) in rows[row].1.iter_mut().zip([took, used, jailed_took, jailed_used]) {
                all.push(value.parse().unwrap_or_else(|_| panic!("{free}\n{jailed}")));
            }
        }
    }
    let mut text = String::new();
    let (rate, each) = (format!("{counted}/s"), "us of a processor each");
    let _ = writeln!(text, "{rate:>12} {each:>26} {:>12} {each:>26}", "shut in");
    for (what, all) in rows {
        let [took, used, jailed_took, jailed_used] =
            all.map(|values| values.into_iter().fold(f64::INFINITY, f64::min));
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

fn lines(costs: &impl Fn() -> Vec<Cost>) -> String {
    costs().into_iter().map(|Cost { what, took, used }| format!("{took} {used} {what}\n")).collect()
}

fn words(line: &str) -> [&str; 3] {
    let words: Vec<&str> = line.splitn(3, ' ').collect();
    words.try_into().unwrap_or_else(|_| panic!("{line}"))
}
