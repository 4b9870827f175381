//! `ctr` commands, each with a time limit.

use std::{
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::Result;

use crate::{
    job::{self, Finished, Input, Job},
    scale,
    stage::Stage,
    world::IMAGE,
};

/// `ctr` against one containerd.
#[derive(Clone)]
pub struct Ctr {
    /// What is executed to get where containerd is; empty where it is here.
    enter: Vec<String>,
    program: std::path::PathBuf,
    address: String,
    runtime: String,
}

/// One `ctr run`: options first, then the command in the container.
#[derive(Clone)]
pub struct Run {
    /// The container's id.
    pub id: String,
    ctr: Ctr,
    options: Vec<String>,
    image: String,
    remove: bool,
}

/// A client's FIFOs are its own to remove, which `ctr` does with the task: not
/// when it was killed, nor when containerd has dropped the task with its shim.
/// Removes those of the process `id` (a container's first, or an added one) and no others.
///
/// # Errors
/// When they cannot be removed.
pub fn remove_clients_fifos(id: &str) -> Result<()> {
    let is_its_own = |name: &str| name.strip_prefix(id).is_some_and(|rest| rest.starts_with("-std"));
    for dir in std::fs::read_dir("/run/containerd/fifo")? {
        let dir = dir?.path();
        for fifo in std::fs::read_dir(&dir)? {
            let fifo = fifo?;
            if is_its_own(&fifo.file_name().to_string_lossy()) {
                std::fs::remove_file(fifo.path())?;
            }
        }
        // Another process's are still in it, or it is somebody's who is about to make them.
        let _ = std::fs::remove_dir(&dir);
    }
    Ok(())
}

/// An id no other container of this process has.
pub fn unique_id(prefix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    format!("{prefix}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

impl Ctr {
    pub(crate) fn new(stage: &Stage, address: &str) -> Self {
        Self {
            enter: Vec::new(),
            program: stage.containerd_program("ctr"),
            address: address.to_owned(),
            runtime: stage.runtime.clone(),
        }
    }

    /// The same with another runtime.
    #[must_use]
    pub fn under(&self, runtime: &str) -> Self {
        Self { runtime: runtime.to_owned(), ..self.clone() }
    }

    /// The same by way of a program that enters other namespaces.
    #[must_use]
    pub fn inside(&self, enter: &[String]) -> Self {
        Self { enter: enter.to_vec(), ..self.clone() }
    }

    /// Where containerd listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The command line up to `args`.
    pub fn command<S: AsRef<str>>(&self, args: &[S]) -> Command {
        let mut command = match self.enter.split_first() {
            None => Command::new(&self.program),
            Some((program, args)) => {
                let mut command = Command::new(program);
                command.args(args).arg(&self.program);
                command
            }
        };
        command.args(["--address", &self.address]).args(args.iter().map(AsRef::as_ref));
        command
    }

    /// Runs one `ctr` command to its end.
    ///
    /// # Errors
    /// When it cannot be started or the limit passes.
    pub fn run<S: AsRef<str>>(&self, args: &[S], limit: Duration) -> Result<Finished> {
        job::run(self.command(args), Input::Nothing, limit)
    }

    /// The lines of a listing; empty where the command fails.
    pub fn list(&self, args: &[&str]) -> Vec<String> {
        let Ok(finished) = self.run(args, scale::command()) else { return Vec::new() };
        finished.text().lines().map(str::to_owned).collect()
    }

    /// Whether this containerd has the snapshotter of that name, and it works here.
    pub fn has_snapshotter(&self, name: &str) -> bool {
        let is_it = |line: &String| {
            line.contains("snapshotter") && line.contains(&format!(" {name} ")) && line.contains(" ok")
        };
        self.list(&["plugins", "ls"]).iter().any(is_it)
    }

    /// A container of the busybox image, not yet started, removed at its end.
    pub fn container(&self, prefix: &str) -> Run {
        Run {
            id: unique_id(prefix),
            ctr: self.clone(),
            options: Vec::new(),
            image: IMAGE.to_owned(),
            remove: true,
        }
    }

    /// `ctr task exec` of `args` in a running container.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn exec(&self, id: &str, options: &[&str], args: &[&str], input: Input) -> Result<Job> {
        let exec_id = unique_id("exec");
        let mut all = vec!["task", "exec", "--exec-id", &exec_id];
        all.extend_from_slice(options);
        all.push(id);
        all.extend_from_slice(args);
        Job::start(self.command(&all), input)
    }

    /// State of a task as `ctr task ls` says it: `RUNNING`, `STOPPED`, ...; none without a task.
    pub fn task_state(&self, id: &str) -> Option<String> {
        self.list(&["task", "ls"]).iter().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(id)).then(|| words.last().map(str::to_owned)).flatten()
        })
    }

    /// Ends and removes a container that was started without [`Run::start`]'s removal.
    ///
    /// # Errors
    /// When a step fails.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.run(&["task", "rm", "-f", id], scale::container())?.success()?;
        self.run(&["containers", "rm", id], scale::command())?.success()?;
        Ok(())
    }
}

impl Run {
    /// Adds options of `ctr run`.
    #[must_use]
    pub fn with(mut self, options: &[&str]) -> Self {
        self.options.extend(options.iter().map(|&option| option.to_owned()));
        self
    }

    /// Runs another image than busybox.
    #[must_use]
    pub fn with_image(mut self, image: &str) -> Self {
        image.clone_into(&mut self.image);
        self
    }

    /// Gives it an id of the caller's choice.
    #[must_use]
    pub fn named(mut self, id: &str) -> Self {
        self.id = id.to_owned();
        self
    }

    /// Runs it detached: `ctr run` returns once it is started and nothing removes it.
    #[must_use]
    pub fn detached(mut self) -> Self {
        self.remove = false;
        self.with(&["--detach"])
    }

    /// Leaves container and snapshot to the caller.
    #[must_use]
    pub fn kept(mut self) -> Self {
        self.remove = false;
        self
    }

    /// The command that runs `args` in it.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut all = vec!["run".to_owned()];
        if self.remove {
            all.push("--rm".to_owned());
        }
        all.extend(["--runtime".to_owned(), self.ctr.runtime.clone()]);
        all.extend(self.options.iter().cloned());
        if !self.options.iter().any(|option| option == "--config" || option == "--rootfs") {
            all.push(self.image.clone());
        }
        all.push(self.id.clone());
        all.extend(args.iter().map(|&arg| arg.to_owned()));
        self.ctr.command(&all)
    }

    /// Starts it with the given input.
    ///
    /// # Errors
    /// When `ctr` cannot be started.
    pub fn start(&self, args: &[&str], input: Input) -> Result<Job> {
        Job::start(self.command(args), input)
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// When it cannot be started or the limit passes.
    pub fn run(&self, args: &[&str]) -> Result<Finished> {
        self.run_with(args, Input::Nothing)
    }

    /// Runs it to its end with the given input.
    ///
    /// # Errors
    /// When it cannot be started or the limit passes.
    pub fn run_with(&self, args: &[&str], input: Input) -> Result<Finished> {
        self.start(args, input)?.finish(scale::container())
    }

    /// Runs a shell script in it to its end.
    ///
    /// # Errors
    /// When it cannot be started or the limit passes.
    pub fn shell(&self, script: &str) -> Result<Finished> {
        self.run(&["sh", "-c", script])
    }
}
