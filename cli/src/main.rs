//! `rvmctl`: checks a host, runs a container without containerd, looks into
//! sandboxes.

mod check;
mod images;
mod logs;
mod port_forward;
mod ps;
mod run;
mod sandbox;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Result, anyhow};
use clap::{Parser, Subcommand};
use rvm_shim::config::Config;
use serde::Serialize;

#[derive(Parser)]
#[command(name = "rvmctl", version, about = "Check a host for rvm, run and inspect sandboxes")]
struct Cli {
    /// Configuration file [default: RVM_CONFIG, else /etc/rvm/config.toml].
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say whether this host can run rvm and what is missing; exits with 1 if something is.
    Check {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Run one container without containerd; exits with the command's exit code, 125 if rvm fails.
    Run(Box<run::Args>),
    /// List sandboxes with status, age and memory.
    Ps {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// List the image files that containers have in place of layers.
    Images {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show what a sandbox's guest kernel and agent said.
    Logs {
        /// NAMESPACE/ID, or an id or its beginning where that is unique.
        id: String,
        /// Go on until the sandbox is gone.
        #[arg(short, long)]
        follow: bool,
    },
    /// Print the counters of a sandbox's monitor as JSON.
    Metrics {
        /// NAMESPACE/ID, or an id or its beginning where that is unique.
        id: String,
    },
    /// Forward ports of this host to sockets that listen in a sandbox, on its loopback too.
    PortForward {
        /// NAMESPACE/ID, or an id or its beginning where that is unique.
        id: String,
        /// [LOCAL:]PORT; with an empty LOCAL, or 0, any port that is free.
        #[arg(required = true, value_name = "[LOCAL:]PORT")]
        ports: Vec<port_forward::Forward>,
        /// Address of this host to listen on.
        #[arg(long, default_value = "127.0.0.1")]
        address: std::net::IpAddr,
    },
    /// Print versions.
    Version,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let failed = match &cli.command {
        Command::Run(args) => {
            log_to_stderr(args.verbose);
            ExitCode::from(run::FAILED)
        }
        _ => {
            // As every tool in a pipeline: end silently when the reader does.
            // SAFETY: no other thread runs yet, and the default action needs no handler.
            unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
            log_to_stderr(false);
            ExitCode::FAILURE
        }
    };
    execute(cli.command, cli.config.as_deref()).unwrap_or_else(|error| {
        // Every error of ours names its cause itself.
        eprintln!("rvmctl: {error}");
        failed
    })
}

/// The shim's modules log; here whoever runs the command reads it.
fn log_to_stderr(verbose: bool) {
    struct Stderr;

    impl log::Log for Stderr {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }

        fn log(&self, record: &log::Record<'_>) {
            eprintln!("rvmctl: {}", record.args());
        }

        fn flush(&self) {}
    }

    // What the monitor says before it fails is in the error as well.
    log::set_max_level(if verbose { log::LevelFilter::Debug } else { log::LevelFilter::Error });
    // Fails where one is set already, which none is.
    let _ = log::set_logger(&Stderr);
}

fn execute(command: Command, config_file: Option<&Path>) -> Result<ExitCode> {
    match command {
        Command::Check { json } => {
            let report = check::Report::of_this_host(config_file);
            if json {
                print_json(&report)?
            } else {
                print!("{report}")
            }
            return Ok(ExitCode::from(u8::from(!report.ok)));
        }
        Command::Run(args) => return Ok(run::run(*args, Config::load(config_file)?)?),
        Command::Ps { json } => {
            let rows = ps::rows(&Config::load(config_file)?.host.state_dir)?;
            if json { print_json(&rows)? } else { print!("{}", ps::table(&rows)) }
        }
        Command::Images { json } => {
            let images = images::rows(&Config::load(config_file)?);
            if json { print_json(&images)? } else { print!("{}", images::table(&images)) }
        }
        Command::Logs { id, follow } => {
            let log = sandbox(config_file, &id)?.dir.join(rvm_shim::sandbox::CONSOLE_LOG);
            logs::show(&log, follow).map_err(|error| anyhow!("{}: {error}", log.display()))?;
        }
        Command::Metrics { id } => print_json(&sandbox(config_file, &id)?.metrics()?)?,
        Command::PortForward { id, ports, address } => {
            let sandbox = sandbox(config_file, &id)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(port_forward::run(&sandbox.dir, sandbox.monitor()?, address, &ports))?;
        }
        Command::Version => {
            println!(
                "rvm {} (protocol {})",
                env!("CARGO_PKG_VERSION"),
                rvm_protocol::guest::PROTOCOL_VERSION
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn sandbox(config_file: Option<&Path>, id: &str) -> Result<sandbox::Sandbox> {
    Ok(sandbox::find(&Config::load(config_file)?.host.state_dir, id)?)
}

fn print_json(value: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}
