//! More processes in a running container, and signals to them.

use anyhow::{Result, ensure};
use rvm_tests::{case, ctr::Run, job::Input, scale, world::World};

/// A container that runs until it is killed.
fn sleeper(world: &World) -> Result<Run> {
    let run = world.ctr().container("exec").detached();
    run.run(&["sleep", "100000"])?.success()?;
    Ok(run)
}

#[test]
fn exec_streams_codes_terminal_and_cwd() {
    case(|world| {
        let ctr = world.ctr();
        let run = sleeper(world)?;
        let exec = |options: &[&str], args: &[&str], input| {
            ctr.exec(&run.id, options, args, input)?.finish(scale::container())
        };

        let cat = exec(&[], &["cat"], Input::Bytes(b"through exec".to_vec()))?.success()?;
        ensure!(cat.text() == "through exec", "{cat}");

        let streams =
            exec(&[], &["sh", "-c", "echo out; echo err >&2; exit 33"], Input::Nothing)?.exited(33)?;
        ensure!(streams.text() == "out\n" && streams.errors() == "err\n", "{streams}");

        // In the container's namespaces, beside its first process.
        let inside =
            exec(&["--cwd", "/etc"], &["sh", "-c", "pwd; cat /proc/1/comm"], Input::Nothing)?.success()?;
        ensure!(inside.text() == "/etc\nsleep\n", "{inside}");

        let signalled = exec(&[], &["sh", "-c", "kill -TERM $$"], Input::Nothing)?;
        ensure!(signalled.code() == 143, "{signalled}");

        let missing = exec(&[], &["/no/such/program"], Input::Nothing)?;
        ensure!(missing.code() != 0 && missing.errors().contains("/no/such/program"), "{missing}");

        let mut terminal = ctr.exec(&run.id, &["--tty"], &["sh"], Input::Terminal(77, 22))?;
        terminal.write(b"until stty size 2>/dev/null | grep -q '^22 77$'; do :; done; echo size=$(stty size) on $(tty)\n")?;
        terminal.wait_for("size=22 77 on /dev/", scale::container())?;
        terminal.write(b"exit 5\n")?;
        terminal.finish(scale::container())?.exited(5)?;

        world.end(&run.id)
    });
}

#[test]
fn twenty_execs_at_once() {
    case(|world| {
        let ctr = world.ctr();
        let run = sleeper(world)?;
        let jobs = (0..20)
            .map(|n| {
                ctr.exec(
                    &run.id,
                    &[],
                    &["sh", "-c", &format!("cat; exit {n}")],
                    Input::Bytes(vec![b'a'; 5000]),
                )
            })
            .collect::<Result<Vec<_>>>()?;
        for (n, job) in jobs.into_iter().enumerate() {
            let finished = job.finish(scale::container() * 4)?.exited(n as i32)?;
            ensure!(finished.stdout == vec![b'a'; 5000], "{finished}");
        }
        world.end(&run.id)
    });
}

#[test]
fn signals() {
    case(|world| {
        let ctr = world.ctr();
        let run = ctr.container("signal");
        let script = "trap 'echo usr1' USR1; trap 'echo term; exit 9' TERM; echo ready; while :; do sleep 1000 & wait $!; done";
        let job = run.start(&["sh", "-c", script], Input::Nothing)?;
        job.wait_for("ready", scale::container())?;
        ctr.run(&["task", "kill", "-s", "SIGUSR1", &run.id], scale::command())?.success()?;
        job.wait_for("usr1", scale::container())?;
        ctr.run(&["task", "kill", "-s", "SIGTERM", &run.id], scale::command())?.success()?;
        let finished = job.finish(scale::container())?.exited(9)?;
        ensure!(finished.text() == "ready\nusr1\nterm\n", "{finished}");
        Ok(())
    });
}

#[test]
fn pids_and_states() {
    case(|world| {
        let ctr = world.ctr();
        let run = ctr.container("pids").detached();
        run.run(&["sh", "-c", "sleep 100000 & wait"])?.success()?;
        ensure!(ctr.task_state(&run.id).as_deref() == Some("RUNNING"), "{:?}", ctr.list(&["task", "ls"]));
        let listed = ctr.run(&["task", "ps", &run.id], scale::command())?.success()?;
        println!("{}", listed.text());
        ensure!(listed.text().lines().count() == 3, "the shell and its sleep: {listed}");

        // A running task is not deleted.
        let refused = ctr.run(&["task", "rm", &run.id], scale::command())?;
        ensure!(refused.code() != 0, "{refused}");
        ctr.run(&["task", "kill", "-s", "SIGKILL", &run.id], scale::command())?.success()?;
        world.events(|events| events.wait_for("/tasks/exit", &run.id, scale::container()))?;
        ensure!(ctr.task_state(&run.id).as_deref() == Some("STOPPED"), "{:?}", ctr.list(&["task", "ls"]));
        ctr.remove(&run.id)?;
        ensure!(world.events(|events| events.exit_once(&run.id))? == 137, "exit code");
        Ok(())
    });
}
