//! Generates the agent's messages and ttrpc service, with no protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    #[cfg(feature = "agent")]
    generate()?;
    Ok(())
}

#[cfg(feature = "agent")]
fn generate() -> Result<(), Box<dyn std::error::Error>> {
    use std::{env, fs, path::PathBuf};

    println!("cargo:rerun-if-changed=proto/agent.proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .input("proto/agent.proto")
        .include("proto")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize { async_all: true, ..Default::default() })
        .run()?;
    // `include!` takes no inner attributes, which the generators put first.
    for (from, to) in [("agent.rs", "agent_messages.rs"), ("agent_ttrpc.rs", "agent_service.rs")] {
        let code = fs::read_to_string(out.join(from))?;
        let code: String = code
            .lines()
            .filter(|l| !l.starts_with("#![") && !l.starts_with("//!"))
            .flat_map(|l| [l, "\n"])
            .collect();
        fs::write(out.join(to), code)?;
    }
    Ok(())
}
