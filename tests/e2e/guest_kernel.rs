//! What programs find in the guest's kernel, by what it does for them. What takes a whole Debian's tools is in
//! [`super::debian`].

use anyhow::ensure;
use rvm_tests::{
    bundle::{self, Bundle},
    case,
};

/// Where a 32-bit program is loaded.
const BASE: u32 = 0x0804_8000;
/// ELF header and one program header.
const HEADERS: u32 = 52 + 32;

/// What a system call has to return; else the program ends with the call's place in the list.
#[derive(Clone, Copy)]
enum Returns {
    /// 0.
    Nothing,
    /// More than 0.
    Something,
}

/// The instructions of a 32-bit program that makes these system calls by `int 0x80`, and exits with 0.
fn program(calls: &[(u32, [u32; 4], Returns)]) -> Vec<u8> {
    const EXIT: u32 = 1;
    fn call(code: &mut Vec<u8>, number: u32, arguments: &[u32]) {
        // mov eax, ebx, ecx, edx, esi
        for (opcode, value) in [0xb8, 0xbb, 0xb9, 0xba, 0xbe].iter().zip([&[number], arguments].concat()) {
            code.push(*opcode);
            code.extend(value.to_le_bytes());
        }
        code.extend([0xcd, 0x80]);
    }
    let mut code = Vec::new();
    for (place, (number, arguments, returns)) in (1..).zip(calls) {
        call(&mut code, *number, arguments);
        let mut failed = Vec::new();
        call(&mut failed, EXIT, &[place]);
        // test eax, eax; je or jg over the exit
        let jump = match returns {
            Returns::Nothing => 0x74,
            Returns::Something => 0x7f,
        };
        code.extend([0x85, 0xc0, jump, failed.len() as u8]);
        code.extend(failed);
    }
    call(&mut code, EXIT, &[0]);
    code
}

/// An i386 executable of this code with a zeroed page behind it that can be written to.
fn elf32(code: &[u8]) -> Vec<u8> {
    let size = HEADERS + code.len() as u32;
    let mut file = b"\x7fELF\x01\x01\x01".to_vec();
    file.resize(16, 0);
    // An executable for the i386: entry, program headers behind this one, no sections, and the sizes of the headers.
    for half in [2_u16, 3] {
        file.extend(half.to_le_bytes());
    }
    for word in [1, BASE + HEADERS, 52, 0, 0] {
        file.extend(u32::to_le_bytes(word));
    }
    for half in [52_u16, 32, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    // One segment to load, that can be read, written and run.
    for word in [1, 0, BASE, BASE, size, size + 0x1000, 7, 0x1000] {
        file.extend(u32::to_le_bytes(word));
    }
    file.extend(code);
    file
}

/// The calls of a libc of before 2020: 32-bit times in `time`, `clock_gettime` and `futex`, 16-bit ids.
#[test]
fn a_32_bit_program() {
    case(|world| {
        const FUTEX_WAKE: u32 = 1;
        const PROT_READ_WRITE: u32 = 3;
        let scratch = BASE + 0x1800;
        let code = program(&[
            (13, [0; 4], Returns::Something),                                // time
            (265, [0, scratch, 0, 0], Returns::Nothing),                     // clock_gettime(CLOCK_REALTIME)
            (240, [scratch + 32, FUTEX_WAKE, 1, 0], Returns::Nothing),       // futex
            (24, [0; 4], Returns::Nothing),                                  // getuid, 16 bits
            (23, [0; 4], Returns::Nothing),                                  // setuid, 16 bits
            (125, [BASE, 0x1000, PROT_READ_WRITE | 4, 0], Returns::Nothing), // mprotect
        ]);
        // The page that is written to lies behind the code, whatever its length.
        ensure!(code.len() < 0x800, "{} bytes of code", code.len());
        let bundle = Bundle::new(world)?;
        let path = bundle.rootfs().join("program");
        std::fs::write(&path, elf32(&code))?;
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let config = bundle::spec(bundle.rootfs(), &["/program"]).to_string();
        bundle.run(world, config.as_bytes())?.exited(0)?;
        Ok(())
    });
}

#[test]
fn file_systems_for_images_and_volumes() {
    case(|world| {
        if !world.stage().is_rvm() {
            return Ok(());
        }
        let finished = world.ctr().container("filesystems").run(&["cat", "/proc/filesystems"])?.success()?;
        let text = finished.text();
        let known: Vec<&str> = text.lines().filter_map(|line| line.split_whitespace().last()).collect();
        for name in ["ext4", "xfs", "erofs", "squashfs", "overlay", "fuse", "autofs", "tmpfs"] {
            ensure!(known.contains(&name), "no {name}: {finished}");
        }
        Ok(())
    });
}
