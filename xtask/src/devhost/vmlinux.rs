//! The uncompressed kernel in a bzImage. QEMU starts an ELF kernel by its PVH
//! entry, and emulated decompression would take longer than the rest of the boot.

use std::io::{Read, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Compression formats by their first bytes, with the command that undoes them.
const FORMATS: &[(&[u8], &str)] =
    &[(b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\x1f\x8b", "gzip")];

/// Takes the kernel out of a bzImage (Linux `Documentation/arch/x86/boot.rst`).
pub fn extract(bzimage: &[u8]) -> Result<Vec<u8>> {
    let payload = payload(bzimage)?;
    let Some(&(_, program)) = FORMATS.iter().find(|(magic, _)| payload.starts_with(magic)) else {
        bail!("it is compressed in a way that is not known here");
    };
    let vmlinux = decompress(program, payload)?;
    ensure!(vmlinux.starts_with(b"\x7fELF"), "what {program} unpacks from it is no ELF file");
    Ok(vmlinux)
}

/// The compressed kernel.
fn payload(bzimage: &[u8]) -> Result<&[u8]> {
    ensure!(bzimage.get(0x202..0x206) == Some(b"HdrS"), "it has no boot header");
    let field = |offset: usize| {
        let bytes = bzimage.get(offset..offset + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(|bytes| u32::from_le_bytes(bytes) as usize).context("its boot header is cut short")
    };
    let version = field(0x206)? & 0xffff;
    ensure!(version >= 0x208, "its boot protocol {version:#x} names no payload");
    let setup_sectors = match bzimage[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup_sectors + 1) * 512 + field(0x248)?;
    bzimage.get(start..start + field(0x24c)?).context("its payload lies outside the file")
}

/// Unpacks with Debian's tools. They complain about the unpacked size the
/// kernel's build appends to the payload, after everything has been written.
fn decompress(program: &str, payload: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new(program)
        .args(["--decompress", "--stdout", "--quiet"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("run {program}"))?;
    let mut stdin = child.stdin.take().context("its standard input")?;
    let mut stdout = child.stdout.take().context("its standard output")?;
    let mut unpacked = Vec::new();
    std::thread::scope(|scope| {
        // An early end of the reader shows in what it wrote.
        scope.spawn(move || stdin.write_all(payload));
        stdout.read_to_end(&mut unpacked)
    })?;
    child.wait()?;
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage with this payload after one setup sector.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(&[0xee; 16]);
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn kernel_comes_out_despite_the_appended_size() {
        let mut gzip =
            Command::new("gzip").arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        gzip.stdin.take().unwrap().write_all(b"\x7fELF kernel").unwrap();
        let mut payload = gzip.wait_with_output().unwrap().stdout;
        payload.extend_from_slice(&11_u32.to_le_bytes());
        assert_eq!(extract(&bzimage(&payload)).unwrap(), b"\x7fELF kernel");
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let refused = |image: &[u8]| extract(image).unwrap_err().to_string();
        assert!(refused(b"short").contains("no boot header"));
        assert!(refused(&bzimage(b"unknown")).contains("compressed"));
        let mut image = bzimage(b"\x1f\x8b");
        image.truncate(1030);
        assert!(refused(&image).contains("outside"));
    }
}
