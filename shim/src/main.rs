//! `containerd-shim-rvm-v2`, as containerd starts it.

use std::io::Write;

use anyhow::{Context, Result};
use protobuf::Message;
use rvm_shim::{
    bootstrap,
    delete::delete,
    features,
    flags::{Action, Flags},
    image::maker,
    server,
};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1).peekable();
    if args.next_if(|arg| arg == maker::ACTION).is_some() {
        return Ok(maker::Job::parse(&args.collect::<Vec<_>>())?.run()?);
    }
    let flags = Flags::parse(args)?;
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
