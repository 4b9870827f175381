//! `containerd-shim-rvm-v2`, as containerd starts it.

use std::io::Write;

use anyhow::{Context, Result};
use protobuf::Message;
use rvm_shim::{
    bootstrap, capabilities,
    delete::delete,
    features,
    flags::{Action, Flags},
    image::maker,
    server,
};

/// Of who does not go on with more than it needs.
const DROPPING: &str = "giving up capabilities";

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1).peekable();
    if args.next_if(|arg| arg == maker::ACTION).is_some() {
        capabilities::IMAGE_MAKER.keep().context(DROPPING)?;
        return Ok(maker::Job::parse(&args.collect::<Vec<_>>())?.run()?);
    }
    let flags = Flags::parse(args)?;
    let kept = match flags.action {
        Action::Start => capabilities::SHIM,
        Action::Delete => capabilities::DELETE,
        Action::Info | Action::Version => capabilities::NONE,
    };
    kept.keep().context(DROPPING)?;
    match flags.action {
        Action::Start => {
            if let Some(serve) = bootstrap::start(&flags)? {
                server::run(serve)?;
            }
            Ok(())
        }
        Action::Delete => answer(&delete(&flags)),
        Action::Info => answer(&features::info()),
        Action::Version => {
            println!("containerd-shim-rvm-v2 {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
    }
}

/// Answers containerd on the standard output.
fn answer(message: &impl Message) -> Result<()> {
    let bytes = message.write_to_bytes()?;
    std::io::stdout().write_all(&bytes).context("answering containerd")
}
