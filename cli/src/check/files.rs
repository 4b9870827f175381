//! The files a sandbox is started from.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use super::Check;

const INSTALL: &str =
    "cargo xtask install puts one in place; host.monitor and guest.* in the configuration name others";

/// The monitor is there and can be executed.
pub(super) fn monitor(path: &Path) -> Check {
    let name = "monitor";
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 => {
            Check::ok(name, path.display().to_string())
        }
        Ok(_) => Check::missing(name, format!("{}: not an executable file", path.display()), INSTALL),
        Err(error) => Check::missing(name, format!("{}: {error}", path.display()), INSTALL),
    }
}

/// The kernel is what the monitor can load.
pub(super) fn kernel(path: &Path) -> Check {
    let name = "kernel";
    match File::open(path).and_then(|mut file| Kernel::read(&mut file)) {
        Ok(Kernel::Elf(Some(version))) => Check::ok(name, format!("{} ({version})", path.display())),
        Ok(Kernel::Elf(None)) => Check::ok(name, path.display().to_string()),
        Ok(Kernel::BzImage) => Check::missing(
            name,
            format!("{}: a compressed kernel (bzImage)", path.display()),
            "use the uncompressed vmlinux of the same build (extract-vmlinux in Linux's scripts/ makes one)",
        ),
        Ok(Kernel::Other) => {
            Check::missing(name, format!("{}: not a 64-bit x86 ELF kernel", path.display()), INSTALL)
        }
        Err(error) => Check::missing(name, format!("{}: {error}", path.display()), INSTALL),
    }
}

/// What a kernel file is.
#[derive(Debug, PartialEq, Eq)]
enum Kernel {
    /// An x86-64 ELF executable, with the version it says it has.
    Elf(Option<String>),
    /// Linux's compressed boot format.
    BzImage,
    /// Anything else.
    Other,
}

impl Kernel {
    fn read(file: &mut impl Read) -> io::Result<Self> {
        let mut content = Vec::new();
        // Kernels have some ten to a hundred MB; what is larger is none.
        file.take(512 << 20).read_to_end(&mut content)?;
        Ok(Self::parse(&content))
    }

    fn parse(content: &[u8]) -> Self {
        // ELF: class 64, little-endian; e_type executable or shared object, e_machine x86-64.
        let executable = matches!(content.get(16..18), Some([2 | 3, 0]));
        if content.starts_with(b"\x7fELF\x02\x01") && executable && content.get(18..20) == Some(&[62, 0]) {
            return Self::Elf(version(content));
        }
        // Linux's x86 boot protocol: "HdrS" at 0x202.
        if content.get(0x202..0x206) == Some(b"HdrS") { Self::BzImage } else { Self::Other }
    }
}

/// `linux_banner`, up to the builder's name.
fn version(kernel: &[u8]) -> Option<String> {
    let banner = b"Linux version ";
    let start = find(kernel, banner)?;
    let rest = kernel.get(start..start + 80)?;
    let end = rest.iter().skip(banner.len()).position(|byte| !byte.is_ascii_graphic())?;
    String::from_utf8(rest.get(..banner.len() + end)?.to_vec()).ok().map(|text| text.replace(" version", ""))
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    let first = *needle.first()?;
    let mut from = 0;
    while let Some(at) = haystack.get(from..)?.iter().position(|byte| *byte == first) {
        if haystack.get(from + at..)?.starts_with(needle) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

/// The initramfs is one.
pub(super) fn initramfs(path: &Path) -> Check {
    let name = "initramfs";
    let mut head = [0; 6];
    match File::open(path).and_then(|mut file| file.read_exact(&mut head)) {
        // cpio "newc", or what Linux can unpack into one.
        Ok(()) if &head == b"070701" => Check::ok(name, path.display().to_string()),
        Ok(()) if compressed(&head) => Check::optional(
            name,
            format!("{}: compressed", path.display()),
            "rvm's kernel unpacks none; needs a kernel of your own that does",
        ),
        Ok(()) => Check::missing(name, format!("{}: not a cpio archive", path.display()), INSTALL),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Check::missing(name, format!("{}: empty", path.display()), INSTALL)
        }
        Err(error) => Check::missing(name, format!("{}: {error}", path.display()), INSTALL),
    }
}

fn compressed(head: &[u8]) -> bool {
    // gzip, xz, zstd, lz4 (legacy), bzip2.
    let magics: [&[u8]; 5] = [b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18", b"BZh"];
    magics.iter().any(|magic| head.starts_with(magic))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::{super::Status, *};

    fn elf(machine: u8) -> Vec<u8> {
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(64, 0);
        elf[16] = 2;
        elf[18] = machine;
        elf.extend_from_slice(b"LLinux\0Linux version 6.12.48 (root@build) ");
        elf.resize(4096, 0);
        elf
    }

    #[test]
    fn kernels_are_told_apart() {
        assert_eq!(Kernel::parse(&elf(62)), Kernel::Elf(Some("Linux 6.12.48".into())));
        assert_eq!(Kernel::parse(&elf(62)[..64]), Kernel::Elf(None));
        assert_eq!(Kernel::parse(&elf(183)), Kernel::Other);
        assert_eq!(Kernel::parse(b""), Kernel::Other);
        let mut bz_image = vec![0; 0x206];
        bz_image[0x202..].copy_from_slice(b"HdrS");
        assert_eq!(Kernel::parse(&bz_image), Kernel::BzImage);
        // A banner cut off by the end of the file.
        let mut cut = elf(62)[..64].to_vec();
        cut.extend_from_slice(b"Linux version 6.12");
        assert_eq!(Kernel::parse(&cut), Kernel::Elf(None));
    }

    #[test]
    fn files_that_are_not_there_are_missing_by_name() {
        let path = Path::new("/nonexistent/file");
        for check in [monitor(path), kernel(path), initramfs(path)] {
            assert_eq!(check.status, Status::Missing);
            assert_eq!(check.detail, "/nonexistent/file: No such file or directory (os error 2)");
        }
        assert_eq!(kernel(Path::new("/")).status, Status::Missing);
        assert_eq!(monitor(Path::new("/")).detail, "/: not an executable file");
    }

    #[test]
    fn an_initramfs_is_known_by_its_magic() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("initramfs");
        for (content, status) in [
            (&b"070701000000"[..], Status::Ok),
            (b"\x1f\x8b\x08\0\0\0", Status::Optional),
            (b"rubbish!", Status::Missing),
            (b"", Status::Missing),
        ] {
            File::create(&path).unwrap().write_all(content).unwrap();
            assert_eq!(initramfs(&path).status, status, "{content:?}");
        }
    }
}
