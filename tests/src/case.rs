//! One test case: alone in the world, the host compared before and after.

use std::{
    fmt::Write,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use anyhow::{Result, anyhow};

use crate::{host, scale, stage::Stage, world::World};

/// Not yet tried, or the one world of this process, or why there is none.
static WORLD: Mutex<Option<Result<World, String>>> = Mutex::new(None);

/// Runs one case. Cases run one at a time: each may break what it likes, and
/// what it leaves behind is its own.
///
/// # Panics
/// When the case fails, or leaves something on the host.
pub fn case(test: impl FnOnce(&World) -> Result<()>) {
    case_with(|_| Ok(()), test);
}

/// Runs one case after `prepare`, which makes what several cases share and may
/// leave it behind.
///
/// # Panics
/// When the preparation or the case fails, or the case leaves something on the host.
pub fn case_with(prepare: impl FnOnce(&World) -> Result<()>, test: impl FnOnce(&World) -> Result<()>) {
    let mut slot = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    let world = slot.get_or_insert_with(|| {
        Stage::from_env().and_then(World::new).map_err(|error| format!("no world to test in: {error:#}"))
    });
    let world = match world {
        Ok(world) => world,
        Err(error) => panic!("{error}"),
    };
    if let Err(error) = run(world, prepare, test) {
        // The lock is released first: a poisoned world would fail every later case.
        drop(slot);
        panic!("{error}");
    }
}

fn run(
    world: &World,
    prepare: impl FnOnce(&World) -> Result<()>,
    test: impl FnOnce(&World) -> Result<()>,
) -> Result<(), String> {
    let fail = |error: anyhow::Error| format!("{error:#}");
    world.enter().map_err(fail)?;
    world.set_config(&world.config()).map_err(fail)?;
    world.want_containerd_config(None);
    prepare(world).and_then(|()| world.settle()).map_err(fail)?;
    let before = world.host();
    let log = world.log_length();
    let started = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| test(world))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        Err(anyhow!("{}", text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("panicked")))
    });
    let took = started.elapsed();
    if !world.stage().is_rvm() {
        host::remove_runcs_parent();
    }
    let outcome = result.map_err(fail).and_then(|()| {
        before
            .wait_until_same(scale::seconds(5.0), || world.host())
            .map_err(|difference| format!("not the host it was before:\n{difference}"))
    });
    println!(
        "{} ms, and {} ms until nothing was left",
        took.as_millis(),
        (started.elapsed() - took).as_millis()
    );
    let Err(error) = outcome else { return Ok(()) };
    let mut report = format!("{error}\n--- containerd and shims ---\n{}\n", world.log_tail(log, 120));
    logs(&mut report, Path::new("/run/rvm"));
    for process in host::sandbox_processes(world.stage()) {
        let _ = writeln!(report, "{process}\n{}", host::threads(process.pid));
    }
    if std::env::var_os(host::DEVHOST_ENV).is_some()
        && let Ok(kernel) = crate::world::shell("dmesg | tail -n 60")
    {
        let _ = writeln!(report, "--- the host's kernel ---\n{kernel}");
    }
    for killed in world.sweep() {
        let _ = writeln!(report, "swept {killed}");
    }
    Err(report)
}

/// Appends the last lines of every log below `dir`.
fn logs(report: &mut String, dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let kind = entry.file_type();
        if kind.as_ref().is_ok_and(|kind| kind.is_dir())
            && path.file_name().is_some_and(|name| name != "share")
        {
            logs(report, &path);
        } else if path.extension().is_some_and(|extension| extension == "log" || extension == "json") {
            let text = std::fs::read(&path).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().collect();
            let tail = lines[lines.len().saturating_sub(20)..].join("\n");
            let _ = writeln!(report, "--- {} ---\n{tail}", path.display());
        }
    }
}
