//! `rvm-vmm --config FILE`: runs one microVM; see [`USAGE`].

use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use log::LevelFilter;
use rvm_protocol::vmm::exit_code;
use rvm_vmm::config::CheckedConfig;
use rvm_vmm::control::channel::OwnerChannel;
use rvm_vmm::machine::{Machine, StopSignals};
use rvm_vmm::timeline::Timeline;
use rvm_vmm::vcpu::exits::End;
use rvm_vmm::{builder, config, jail, logging, process};

const USAGE: &str = "\
usage: rvm-vmm --config FILE [OPTION]...

Runs the microVM described by FILE (JSON, see rvm_protocol::vmm::VmConfig).

  --config FILE      the configuration; relative paths in it are relative to
                     the working directory
  --control-fd N     take requests on descriptor N, a SOCK_SEQPACKET socket, and
                     end, in order, when its other end is closed
  --restore FILE     go on with the machine saved in FILE, which is the one that the
                     configuration describes, instead of booting a kernel
  --log-level LEVEL  off, error, warn (default), info, debug or trace
  --any-kvm          run even where /dev/kvm only emulates kernels, which is
                     far too slow for a guest but enough to measure a start
  --calls            print the system calls that each kind of thread has for itself,
                     by number, beside those of any thread
  --version          print the version
  --help             print this

Exit codes: 0 the guest powered off or was stopped; 2 the configuration is
wrong; 3 the machine could not be built; 4 the guest crashed.
";

struct Arguments {
    config: PathBuf,
    channel: Option<OwnerChannel>,
    snapshot: Option<File>,
    log_level: LevelFilter,
    any_kvm: bool,
}

fn main() -> ExitCode {
    let timeline = Arc::new(Timeline::from_exec());
    // What the monitor creates, sockets and logs, is for its owner only.
    // SAFETY: umask has no preconditions.
    unsafe { libc::umask(0o077) };
    process::prepare();
    let (code, error) = match parse_arguments() {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(arguments)) => run(arguments, timeline),
        Err(e) => (exit_code::BAD_CONFIG, Some(e)),
    };
    if let Some(error) = error {
        // One line, whatever the causes contain.
        logging::say(&format!("{error:#}"));
    }
    ExitCode::from(code as u8)
}

fn run(arguments: Arguments, timeline: Arc<Timeline>) -> (i32, Option<anyhow::Error>) {
    let signals = match StopSignals::block() {
        Ok(signals) => signals,
        Err(e) => return (exit_code::BUILD_FAILED, Some(e.into())),
    };
    let config = match config::load(&arguments.config) {
        Ok(config) => config,
        Err(e) => return (exit_code::BAD_CONFIG, Some(anyhow!(e).context("configuration"))),
    };
    logging::init(&config.vm.id, arguments.log_level);
    timeline.reached("config_checked");
    let Arguments { snapshot, any_kvm, channel, .. } = arguments;
    let machine = match build(config, snapshot, any_kvm, timeline) {
        Ok(machine) => machine,
        Err(e) => return (exit_code::BUILD_FAILED, Some(e)),
    };
    match machine.run(signals, channel) {
        Ok(End::PoweredOff) => (exit_code::OK, None),
        Ok(End::Crashed(cause)) => (exit_code::GUEST_CRASHED, Some(anyhow!("the guest crashed: {cause}"))),
        Err(e) => (exit_code::BUILD_FAILED, Some(e.into())),
    }
}

/// Opens everything, shuts the process in, and builds the machine there.
fn build(
    mut config: CheckedConfig,
    snapshot: Option<File>,
    any_kvm: bool,
    timeline: Arc<Timeline>,
) -> anyhow::Result<Machine> {
    let jail = config.jail.take();
    let opened = builder::open(config, jail.as_ref(), snapshot, any_kvm)?;
    if let Some(jail) = jail {
        jail.enter()?;
        timeline.reached("jail_entered");
    }
    let machine = builder::build(opened, timeline)?;
    jail::take_up(jail::Duty::Control);
    Ok(machine)
}

/// `None` where the question has been answered already.
fn parse_arguments() -> anyhow::Result<Option<Arguments>> {
    let mut config = None;
    let mut channel = None;
    let mut snapshot = None;
    let mut log_level = LevelFilter::Warn;
    let mut any_kvm = false;
    let mut arguments = std::env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        let name = argument.to_string_lossy().into_owned();
        let mut value = || arguments.next().with_context(|| format!("{name} needs a value"));
        match name.as_str() {
            "--config" => config = Some(PathBuf::from(value()?)),
            "--control-fd" => {
                let text = value()?.to_string_lossy().into_owned();
                let wrong = || format!("--control-fd: {text:?} must be an inherited SOCK_SEQPACKET socket");
                let fd = text.parse().with_context(wrong)?;
                channel = Some(OwnerChannel::inherited(fd).with_context(wrong)?);
            }
            "--restore" => {
                let path = PathBuf::from(value()?);
                let opened = File::open(&path);
                snapshot = Some(opened.with_context(|| format!("--restore: {}", path.display()))?);
            }
            "--log-level" => {
                let text = value()?.to_string_lossy().into_owned();
                log_level = text.parse().map_err(|_| {
                    anyhow!("--log-level: {text:?}; must be off, error, warn, info, debug or trace")
                })?;
            }
            "--any-kvm" => any_kvm = true,
            "--calls" => {
                for (threads, number) in jail::own_calls() {
                    println!("{threads} {number}");
                }
                return Ok(None);
            }
            "--version" => {
                println!("rvm-vmm {}", env!("CARGO_PKG_VERSION"));
                return Ok(None);
            }
            "--help" => {
                print!("{USAGE}");
                return Ok(None);
            }
            _ => bail!("unknown argument {name:?}; try --help"),
        }
    }
    let config = config.context("--config FILE is missing; try --help")?;
    Ok(Some(Arguments { config, channel, snapshot, log_level, any_kvm }))
}
