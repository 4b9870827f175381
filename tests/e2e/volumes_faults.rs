//! Volumes whose host side fails under a running container: it hangs, or what is mapped goes.

use std::{
    fs::File,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    case,
    ctr::{Ctr, remove_clients_fifos, unique_id},
    hanging::Hanging,
    host::remove_runcs_parent,
    job::{Finished, Input, Job},
    parity::PROBE_ENV,
    sandbox::Sandbox,
    scale,
    world::World,
};

use crate::volumes::{Volume, bind};

/// A file of a volume that the host unlinks and then cuts under a mapping: as under runc, what is still there can be
/// read, and beyond its end is SIGBUS; the machine goes on.
#[test]
fn a_file_that_goes_under_a_mapping() {
    case(|world| {
        for ctr in [world.ctr(), world.ctr().under("io.containerd.runc.v2")] {
            cut_under_a_mapping(world, &ctr)?;
        }
        remove_runcs_parent();
        Ok(())
    });
}

fn cut_under_a_mapping(world: &World, ctr: &Ctr) -> Result<()> {
    const BYTES: u64 = 8 << 20;
    let probe = std::env::var(PROBE_ENV).with_context(|| format!("{PROBE_ENV} is not set"))?;
    let volume = Volume::new(world, "mapped")?;
    std::fs::copy(probe, volume.path("probe"))?;
    std::fs::write(volume.path("file"), vec![b'm'; usize::try_from(BYTES)?])?;
    let run = ctr.container("mapped").with(&["--mount", &bind(&volume.0, "/v", "rbind:rw")]).detached();
    run.run(&["sleep", "100000"])?.success()?;
    let mut mapped = ctr.exec(&run.id, &[], &["/v/probe", "mapped", "/v/file"], Input::Open)?;
    mapped.wait_for("mapped", scale::container())?;
    mapped.write(b"0\n")?;
    mapped.wait_for("0 = m", scale::command())?;
    let file = File::options().write(true).open(volume.path("file"))?;
    std::fs::remove_file(volume.path("file"))?;
    mapped.write(b"4194304\n")?;
    mapped.wait_for("4194304 = m", scale::command())?;
    file.set_len(4096)?;
    mapped.write(b"7340032\n")?;
    let finished = mapped.finish(scale::container())?;
    println!("{finished}");
    finished.exited(128 + libc::SIGBUS)?;
    ctr.exec(&run.id, &[], &["true"], Input::Nothing)?.finish(scale::command())?.success()?;
    world.end(&run.id)?;
    remove_clients_fifos(&run.id)
}

fn shown(finished: &Result<Finished>) -> String {
    finished.as_ref().map_or_else(|error| format!("{error:#}"), ToString::to_string)
}

/// A volume's file system stops answering under a container that reads it, like one of a network whose server has gone:
/// others of its processes go on, also those that read another volume while what was open of this one is being closed;
/// kill and delete come to their ends, and nothing stays once it answers.
#[test]
fn a_volume_that_hangs() {
    case(|world| {
        // What a killed process, and then a killed monitor, are waited for.
        let limit = Duration::from_secs(30 + 10) + scale::container();
        let ctr = world.ctr();
        let hanging = Hanging::mount(world)?;
        let other = Volume::new(world, "answers")?;
        std::fs::write(other.path("file"), "another")?;
        let mounts = [bind(hanging.dir(), "/v", "rbind:rw"), bind(&other.0, "/other", "rbind:rw")];
        let run = ctr.container("hangs").with(&["--mount", &mounts[0], "--mount", &mounts[1]]).detached();
        run.run(&["sleep", "100000"])?.success()?;
        let sandbox = Sandbox::find(world.stage(), &run.id)?;
        let [exec_id, holder_id] = ["reader", "holder"].map(unique_id);
        let read = ["task", "exec", "--exec-id", &exec_id, &run.id, "cat", "/v/file"];
        let read = || Job::start(ctr.command(&read), Input::Nothing);
        ensure!(read()?.finish(scale::command())?.success()?.text() == hanging.content());
        let holds = "sleep 1000 < /v/file & a=$!; sleep 1000 < /v/file & echo held; read x; kill -9 $a $!; echo killed; wait";
        let hold = ["task", "exec", "--exec-id", &holder_id, &run.id, "sh", "-c", holds];
        let mut holder = Job::start(ctr.command(&hold), Input::Open)?;
        holder.wait_for("held", scale::container())?;
        hanging.hang();
        // What they have open is closed, for which the file system is asked.
        holder.write(b"go\n")?;
        holder.wait_for("killed", scale::command())?;
        hanging.wait_until_asked(scale::command())?;
        let beside = ctr.exec(&run.id, &[], &["cat", "/other/file"], Input::Nothing)?;
        ensure!(beside.finish(scale::command())?.success()?.text() == "another", "of another volume");
        let reader = read()?;
        ctr.exec(&run.id, &[], &["true"], Input::Nothing)?.finish(scale::command())?.success()?;

        let began = Instant::now();
        ctr.run(&["task", "kill", "-s", "SIGKILL", &run.id], scale::command())?.success()?;
        let told = world.events(|events| events.wait_for("/tasks/exit", &run.id, limit));
        println!("exit: {told:?} after {} ms", began.elapsed().as_millis());
        let deleted = ctr.run(&["task", "delete", "-f", &run.id], limit);
        println!("delete: {} after {} ms", shown(&deleted), began.elapsed().as_millis());
        hanging.answer();
        let reader = reader.finish(scale::container());
        println!("reader: {}", shown(&reader));
        println!("holder: {}", shown(&holder.finish(scale::container())));
        told?;
        deleted?;
        ctr.run(&["containers", "rm", &run.id], scale::command())?.success()?;
        sandbox.wait_until_gone(scale::container())?;
        ensure!(world.events(|events| events.exit_once(&run.id))? == 137, "exit code");
        // Their clients were told of an end that they could not delete any more.
        remove_clients_fifos(&exec_id)?;
        remove_clients_fifos(&holder_id)?;
        remove_clients_fifos(&run.id)
    });
}
