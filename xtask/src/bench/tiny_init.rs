//! The peer's `/init`: the least a guest's first process can do. It writes one
//! line to the console and waits for ever, without libraries, so that none of
//! the peer's time is its.

/// What it prints; the benchmark's program waits for it.
pub const LINE: &[u8] = b"init-is-running\n";

/// Where the file is loaded.
const LOAD: u64 = 0x40_0000;
const HEADERS: u64 = 64 + 56;

/// A static ELF executable for x86-64 Linux.
pub fn program() -> Vec<u8> {
    let mut code = Vec::new();
    code.extend([0xb8, 1, 0, 0, 0]); // mov eax, 1 (write)
    code.extend([0xbf, 1, 0, 0, 0]); // mov edi, 1 (standard output, the console)
    code.extend([0x48, 0x8d, 0x35]); // lea rsi, [rip + line]
    let line_at = code.len();
    code.extend([0; 4]);
    code.push(0xba); // mov edx, length
    code.extend((LINE.len() as u32).to_le_bytes());
    code.extend([0x0f, 0x05]); // syscall
    code.extend([0xb8, 34, 0, 0, 0, 0x0f, 0x05]); // pause()
    code.extend([0xeb, 0xf7]); // again
    let distance = (code.len() - (line_at + 4)) as u32;
    code[line_at..line_at + 4].copy_from_slice(&distance.to_le_bytes());
    code.extend(LINE);

    let size = HEADERS + code.len() as u64;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend([2u16, 62].iter().flat_map(|half| half.to_le_bytes())); // ET_EXEC, EM_X86_64
    elf.extend(1u32.to_le_bytes());
    elf.extend([LOAD + HEADERS, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    elf.extend(0u32.to_le_bytes());
    elf.extend([64u16, 56, 1, 64, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    elf.extend([1u32, 5].iter().flat_map(|word| word.to_le_bytes())); // PT_LOAD, readable and executable
    elf.extend([0, LOAD, LOAD, size, size, 0x1000].iter().flat_map(|word| word.to_le_bytes()));
    elf.extend(code);
    elf
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;
    use std::process::{Command, Stdio};

    #[test]
    fn prints_its_line_and_stays() {
        let path = std::env::temp_dir().join(format!("rvm-tiny-init-{}", std::process::id()));
        std::fs::write(&path, program()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = Command::new(&path).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = vec![0; LINE.len()];
        child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
        assert_eq!(line, LINE);
        assert!(child.try_wait().unwrap().is_none(), "it must not end: the kernel would panic");
        child.kill().unwrap();
        child.wait().unwrap();
        std::fs::remove_file(path).unwrap();
    }
}
