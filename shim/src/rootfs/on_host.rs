//! File systems in files, mounted by the host's kernel: where what a container writes is to be in
//! directories of the host, above them.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use nix::{errno::Errno, mount::MsFlags};
use rvm_protocol::loop_device;

use super::{
    mount_overlay, overlay_data,
    stack::{ErofsFile, Stack, Upper},
};
use crate::mount::{self, Tree, mount_fs};

/// The root file system of a stack, with its upper directory: below what is written where it is not
/// `readonly`, else as one more layer where something `written` is in it.
pub(super) fn mount(stack: &Stack, written: bool, readonly: bool, stage: &Path) -> io::Result<Tree> {
    if matches!(stack.upper, Upper::Disk(_)) || stack.lower.is_empty() {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "a disk is the guest's to mount"));
    }
    if stack.lower.iter().any(|file| file.verity.is_some()) {
        let problem =
            "dm-verity is the guest's, and what is written to the host is above what the host mounts";
        return Err(io::Error::new(io::ErrorKind::Unsupported, problem));
    }
    mount::staged_at(stage, |stage| {
        // Directories take inodes only. All of it is seen on this thread alone, and stays as long as what is on it does.
        mount_fs("tmpfs", "rvm", stage, MsFlags::empty(), Some("mode=0700,size=64k"))?;
        std::env::set_current_dir(stage)?;
        let mut lower = Vec::new();
        for (number, file) in stack.lower.iter().enumerate() {
            let place = number.to_string();
            fs::create_dir(&place)?;
            layer(file, Path::new(&place))?;
            lower.push(place);
        }
        let mut options = Vec::new();
        if let Upper::Dirs { upper, work } = &stack.upper {
            if !readonly {
                options =
                    vec![format!("upperdir={}", upper.display()), format!("workdir={}", work.display())];
            } else if written {
                lower.insert(0, super::escape(&upper.to_string_lossy()));
            }
        }
        match lower.as_slice() {
            // Overlayfs without an upper layer wants two.
            [only] if options.is_empty() => Ok(only.into()),
            lower => {
                fs::create_dir("root")?;
                mount_overlay(&overlay_data(lower, &options), Path::new("root"), readonly)?;
                Ok("root".into())
            }
        }
    })
}

/// Mounts one at `place`.
fn layer(file: &ErofsFile, place: &Path) -> io::Result<()> {
    let named = |path: &Path| {
        let path = path.to_owned();
        move |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
    };
    let devices = file.devices.iter().map(|path| format!("device={}", path.display())).collect::<Vec<_>>();
    let source = file.source.to_string_lossy();
    match mount_fs("erofs", &source, place, MsFlags::MS_RDONLY, Some(&devices.join(","))) {
        // Kernels before 6.12 mount block devices alone.
        Err(error) if error.raw_os_error() == Some(Errno::ENOTBLK as i32) => {}
        mounted => return mounted.map_err(named(&file.source)),
    }
    // Open until they are mounted.
    let mut open = Vec::new();
    let mut device = |path: &Path| {
        let opened = File::open(path).and_then(|file| loop_device::readonly(&file)).map_err(named(path))?;
        let name = opened.1.clone();
        open.push(opened);
        Ok::<_, io::Error>(name)
    };
    let source = device(&file.source)?;
    let devices = file.devices.iter().map(|path| Ok(format!("device={}", device(path)?)));
    let devices = devices.collect::<io::Result<Vec<_>>>()?.join(",");
    mount_fs("erofs", &source, place, MsFlags::MS_RDONLY, Some(&devices)).map_err(named(&file.source))
}
