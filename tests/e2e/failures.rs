//! What goes wrong at the start: one clear error within a bounded time.

use std::os::unix::fs::PermissionsExt;

use anyhow::{Result, ensure};
use rvm_tests::{case, config::ConfigFile, ctr::Run, job::Finished, scale, world::World};

/// The error is one line of `ctr`'s and holds every word of `words`.
pub fn refused(finished: &Finished, words: &[&str]) -> Result<()> {
    println!("{finished}");
    ensure!(finished.code() != 0, "not refused: {finished}");
    let errors = finished.errors();
    ensure!(errors.lines().filter(|line| line.starts_with("ctr: ")).count() == 1, "one error: {finished}");
    for word in words {
        ensure!(errors.contains(word), "the error does not say {word:?}: {finished}");
    }
    ensure!(finished.stdout.is_empty(), "{finished}");
    Ok(())
}

/// A container that gets a configuration of its own.
fn configured(world: &World, config: &ConfigFile) -> Result<(Run, String)> {
    let path = world.write_file("case.toml", config.to_string())?;
    Ok((world.ctr().container("fail").with(&["--runtime-config-path", &path]), path))
}

/// Runs `true` under a configuration, which must be refused.
pub fn refused_config(world: &World, config: &ConfigFile, words: &[&str]) -> Result<Finished> {
    let (run, path) = configured(world, config)?;
    let finished = run.run(&["true"]);
    std::fs::remove_file(path)?;
    let finished = finished?;
    refused(&finished, words)?;
    Ok(finished)
}

/// An ELF64 executable for x86-64 that holds `code` at 1 MiB, enters there
/// (PVH: 32-bit protected mode; the note is XEN_ELFNOTE_PHYS32_ENTRY, 18), and does nothing else.
fn tiny_kernel(code: &[u8]) -> Vec<u8> {
    const LOAD: u64 = 0x10_0000;
    const NOTE_OFFSET: u64 = 64 + 2 * 56;
    const CODE_OFFSET: u64 = 0x1000;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend([2u16, 62].iter().flat_map(|half| half.to_le_bytes())); // ET_EXEC, EM_X86_64
    elf.extend(1u32.to_le_bytes());
    elf.extend([LOAD, 64, 0].iter().flat_map(|word| word.to_le_bytes())); // entry, program headers, sections
    elf.extend(0u32.to_le_bytes());
    elf.extend([64u16, 56, 2, 64, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    let mut header = |kind: u32, flags: u32, offset: u64, address: u64, size: u64, align: u64| {
        elf.extend(kind.to_le_bytes());
        elf.extend(flags.to_le_bytes());
        elf.extend([offset, address, address, size, size, align].iter().flat_map(|word| word.to_le_bytes()));
    };
    header(1, 5, CODE_OFFSET, LOAD, code.len() as u64, 0x1000); // PT_LOAD, readable and executable
    header(4, 4, NOTE_OFFSET, 0, 20, 4); // PT_NOTE
    for word in [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), LOAD as u32] {
        elf.extend(word.to_le_bytes());
    }
    elf.resize(CODE_OFFSET as usize, 0);
    elf.extend(code);
    elf
}

#[test]
fn guest_that_never_boots() {
    case(|world| {
        // cli; hlt; jmp back to hlt
        let kernel = world.write_file("never", tiny_kernel(&[0xfa, 0xf4, 0xeb, 0xfd]))?;
        let config = world.config().text("guest", "kernel", &kernel).set("guest", "boot_timeout_s", "3");
        let finished = refused_config(world, &config, &["did not answer"]);
        std::fs::remove_file(kernel)?;
        let finished = finished?;
        ensure!(finished.took.as_secs_f64() >= 3.0, "before the configured 3 s: {finished}");
        ensure!(finished.took < std::time::Duration::from_secs(3) + scale::seconds(2.0), "{finished}");
        Ok(())
    });
}

#[test]
fn guest_that_crashes_at_once() {
    case(|world| {
        // ud2 without an interrupt table: a triple fault
        let kernel = world.write_file("crash", tiny_kernel(&[0x0f, 0x0b]))?;
        let config = world.config().text("guest", "kernel", &kernel);
        let finished = refused_config(world, &config, &["the guest crashed", "triple fault"]);
        std::fs::remove_file(kernel)?;
        ensure!(finished?.took < scale::seconds(2.0), "waited for a guest that was dead");
        Ok(())
    });
}

#[test]
fn guest_kernel_that_panics() {
    case(|world| {
        let config = world.config().text("guest", "kernel_params", "rdinit=/no/such/init");
        let words = ["the guest did not start", "Kernel panic", "No working init found"];
        let finished = refused_config(world, &config, &words)?;
        ensure!(finished.took < scale::container(), "{finished}");
        Ok(())
    });
}

#[test]
fn kernel_that_is_not_there_or_none() {
    case(|world| {
        let missing = world.config().text("guest", "kernel", "/no/such/vmlinux");
        refused_config(world, &missing, &["/no/such/vmlinux", "No such file"])?;
        let text = world.write_file("text", "not a kernel")?;
        let none = world.config().text("guest", "kernel", &text);
        let result = refused_config(world, &none, &["kernel: ", &text, "not an ELF file"]);
        std::fs::remove_file(text)?;
        result?;
        let directory = world.config().text("guest", "kernel", "/run");
        refused_config(world, &directory, &["guest.kernel: /run", "is not a file"])?;
        Ok(())
    });
}

#[test]
fn initramfs_that_is_not_there_or_corrupt() {
    case(|world| {
        let missing = world.config().text("guest", "initramfs", "/no/such/initramfs");
        refused_config(world, &missing, &["/no/such/initramfs", "No such file"])?;
        let garbage: Vec<u8> = (0..100_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let corrupt = world.write_file("corrupt", garbage)?;
        let config = world.config().text("guest", "initramfs", &corrupt);
        let result =
            refused_config(world, &config, &["initramfs: ", &corrupt, "neither a newc cpio archive"]);
        std::fs::remove_file(&corrupt)?;
        result?;
        // Cut in the middle of the agent.
        let whole = std::fs::read(world.stage().initramfs())?;
        let half = world.write_file("half", &whole[..whole.len() / 2])?;
        let config = world.config().text("guest", "initramfs", &half);
        let result = refused_config(world, &config, &["initramfs: ", &half, "archive is damaged"]);
        std::fs::remove_file(half)?;
        result?;
        Ok(())
    });
}

#[test]
fn monitor_that_is_not_there() {
    case(|world| {
        let config = world.config().text("host", "monitor", "/no/such/rvm-vmm");
        refused_config(world, &config, &["host.monitor: /no/such/rvm-vmm", "No such file"])?;
        Ok(())
    });
}

#[test]
fn configuration_that_is_wrong() {
    case(|world| {
        refused_config(world, &world.config().set("guest", "colour", "1"), &["guest.colour"])?;
        refused_config(world, &world.config().set("guest", "vcpus", "0"), &["guest.vcpus", "1 to 255"])?;
        refused_config(world, &world.config().set("guest", "memory_mib", "\"much\""), &["guest.memory_mib"])?;
        let run = world.ctr().container("fail").with(&["--runtime-config-path", "/no/such/config"]);
        refused(&run.run(&["true"])?, &["/no/such/config"])?;
        world.set_config(&world.config().set("guest", "vcpu", "2"))?;
        refused(&world.ctr().container("fail").run(&["true"])?, &["guest.vcpu"])
    });
}

#[test]
fn program_that_does_not_exist() {
    case(|world| {
        let run = world.ctr().container("fail");
        refused(&run.run(&["/no/such/program"])?, &["/no/such/program"])?;
        let run = world.ctr().container("fail");
        refused(&run.run(&["no-such-program"])?, &["no-such-program"])?;
        let run = world.ctr().container("fail");
        refused(&run.run(&["/etc/passwd"])?, &["/etc/passwd", "ermission denied"])
    });
}

#[test]
fn working_directory_that_cannot_be() {
    case(|world| {
        let run = world.ctr().container("fail").with(&["--cwd", "/etc/passwd/dir"]);
        refused(&run.run(&["true"])?, &["/etc/passwd/dir", "not a directory"])
    });
}

/// containerd writes config.json itself, so a shim of our own name spoils it on the way.
#[test]
fn config_json_that_is_not_json() {
    case(|world| {
        let wrapper = world.wrapper_dir().join("containerd-shim-rvmspoiled-v2");
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in *start*) printf 'not json' > config.json;; esac\nexec {} \"$@\"\n",
            world.stage().shim().display()
        );
        std::fs::write(&wrapper, script)?;
        std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755))?;
        let run = world.ctr().container("fail").with(&["--runtime", "io.rvmspoiled.v2"]);
        let finished = run.run(&["true"]);
        std::fs::remove_file(wrapper)?;
        refused(&finished?, &["config.json"])
    });
}
