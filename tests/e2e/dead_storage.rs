//! A file system of the host's that does not answer holds up who asked for it, and nobody else.

use std::{ffi::CString, fs::File, os::fd::AsRawFd, path::PathBuf, time::Instant};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rvm_tests::{
    case,
    ctr::{Ctr, Run, remove_clients_fifos},
    job::{Input, Job},
    sandbox::Sandbox,
    scale,
    world::World,
};

/// A file system whose server is there and never says a word, as of a network that has gone.
struct Dead {
    dir: PathBuf,
    server: Option<File>,
}

impl Dead {
    fn mount(world: &World) -> Result<Self> {
        let dir = world.dir().join("dead");
        std::fs::create_dir_all(&dir)?;
        let server = File::options().read(true).write(true).open("/dev/fuse").context("/dev/fuse")?;
        let options = CString::new(format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd()))?;
        mount(Some("dead"), &dir, Some("fuse"), MsFlags::empty(), Some(options.as_c_str()))
            .context("mounting it")?;
        Ok(Self { dir, server: Some(server) })
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }
}

impl Drop for Dead {
    fn drop(&mut self) {
        // Whoever waits for it is told that there is no server.
        self.server = None;
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir(&self.dir);
    }
}

fn annotated(run: Run, kind: &str, pod: &str) -> Run {
    let kind = format!("io.kubernetes.cri.container-type={kind}");
    let pod = format!("io.kubernetes.cri.sandbox-id={pod}");
    run.with(&["--annotation", &kind, "--annotation", &pod])
}

/// `ctr task exec` of `true`, to its end.
fn answers(ctr: &Ctr, id: &str) -> Result<()> {
    ctr.exec(id, &[], &["true"], Input::Nothing)?.finish(scale::command())?.success().map(drop)
}

#[test]
fn others_go_on_and_nothing_is_left() {
    case(|world| {
        let ctr = world.ctr();
        let pod = ctr.container("pod").detached();
        annotated(pod.clone(), "sandbox", &pod.id).run(&["sleep", "100000"])?.success()?;
        let sandbox = Sandbox::find(world.stage(), &pod.id)?;
        let member = annotated(ctr.container("member").detached(), "container", &pod.id);
        member.run(&["sleep", "100000"])?.success()?;

        let dead = Dead::mount(world)?;
        let volume = format!("type=bind,src={},dst=/v,options=rbind:rw", dead.path("volume"));
        let log = format!("file://{}", dead.path("log"));
        let config = dead.path("config.toml");
        let mut waiting: Vec<(Run, Job)> = Vec::new();
        for options in [["--mount", &volume], ["--log-uri", &log], ["--runtime-config-path", &config]] {
            let run = annotated(ctr.container("waiting").detached(), "container", &pod.id).with(&options);
            let job = run.start(&["sleep", "100000"], Input::Nothing)?;
            waiting.push((run, job));
        }
        // Until they have come to where they wait.
        let until = Instant::now() + scale::container();
        let stuck = || -> Result<usize> {
            let waits = |task: std::io::Result<std::fs::DirEntry>| {
                let stack = std::fs::read_to_string(task.ok()?.path().join("stack")).ok()?;
                Some(stack.contains("fuse_"))
            };
            let tasks = std::fs::read_dir(format!("/proc/{}/task", sandbox.shim.pid))?;
            Ok(tasks.filter_map(waits).filter(|waits| *waits).count())
        };
        while stuck()? < waiting.len() {
            ensure!(Instant::now() < until, "{} of {} wait", stuck()?, waiting.len());
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        answers(&ctr, &pod.id)?;
        answers(&ctr, &member.id)?;
        world.end(&member.id)?;
        answers(&ctr, &pod.id)?;

        drop(dead);
        for (run, job) in waiting {
            let finished = job.finish(scale::container())?;
            println!("{finished}");
            ensure!(finished.code() != 0 && finished.errors().contains("/dead/"), "{finished}");
            let _ = ctr.run(&["containers", "rm", &run.id], scale::command())?;
            remove_clients_fifos(&run.id)?;
        }
        answers(&ctr, &pod.id)?;
        world.end(&pod.id)?;
        sandbox.wait_until_gone(scale::container())
    });
}
