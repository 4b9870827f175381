//! File systems within a volume. What is below a mount of the host's is known by its place.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use rvm_protocol::vmm::CachePolicy;
use tempfile::TempDir;

use super::Fs;
use super::client::*;

/// Has `run` mount things below a directory of its own, for the calling thread alone.
fn apart(run: impl FnOnce(TempDir) -> Client + Send) {
    let run = || {
        // SAFETY: takes flags.
        if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
            return eprintln!("not root: nothing is tried");
        }
        mount(c"none", Path::new("/"), libc::MS_REC | libc::MS_PRIVATE);
        let client = run(tempfile::tempdir().unwrap());
        client.queue.stop();
        let volume = CString::new(client.path("volume").as_os_str().as_bytes()).unwrap();
        // SAFETY: a C string.
        unsafe { libc::umount2(volume.as_ptr(), libc::MNT_DETACH) };
    };
    std::thread::scope(|scope| scope.spawn(run).join().unwrap());
}

fn mount(kind: &CStr, at: &Path, flags: libc::c_ulong) {
    let at = CString::new(at.as_os_str().as_bytes()).unwrap();
    // SAFETY: C strings, and no data.
    let done = unsafe { libc::mount(kind.as_ptr(), at.as_ptr(), kind.as_ptr(), flags, std::ptr::null()) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

/// A client of a share of `root`, and the node of `volume` there.
fn client(root: TempDir) -> (Client, u64) {
    let device = Fs::new(&share(root.path(), false, CachePolicy::Auto)).unwrap();
    let mut client = Client::with(device, root);
    let node = client.lookup(ROOT, "volume").unwrap();
    (client, node)
}

/// Has `run` talk to a share in which a file system is mounted below another one, as the host may do below a volume;
/// it is given the node of that mount and the host's path of it.
fn below_a_mount(run: impl FnOnce(&mut Client, u64, &Path) + Send) {
    apart(|root| {
        let (volume, below) = (root.path().join("volume"), root.path().join("volume/below"));
        fs::create_dir(&volume).unwrap();
        mount(c"tmpfs", &volume, 0);
        fs::create_dir(&below).unwrap();
        mount(c"tmpfs", &below, 0);
        let (mut client, volume) = client(root);
        let node = client.lookup(volume, "below").unwrap();
        run(&mut client, node, &below);
        client
    });
}

/// `FATTR_MODE`, `_SIZE`, `_MTIME`, of a handle.
fn setattr_body(handle: u64, mode: u32, size: u64, mtime: u64) -> Vec<u8> {
    let mut body = vec![0; 88];
    body[..4].copy_from_slice(&(1_u32 | 1 << 3 | 1 << 5 | 1 << 6).to_le_bytes());
    body[8..16].copy_from_slice(&handle.to_le_bytes());
    body[16..24].copy_from_slice(&size.to_le_bytes());
    body[40..48].copy_from_slice(&mtime.to_le_bytes());
    body[68..72].copy_from_slice(&mode.to_le_bytes());
    body
}

#[test]
fn what_is_open_is_changed_and_looked_at_wherever_it_has_gone() {
    let gone = |go: fn(&mut Client, u64, &Path)| {
        below_a_mount(|client, dir, path| {
            let make = [words(&[libc::O_RDWR as u32, 0o644, 0, 0]), name("file")].concat();
            let (error, made) = client.call(CREATE, dir, &make);
            assert_eq!(error, 0);
            let (file, handle) = (u64_at(&made, 0), u64_at(&made, ENTRY_BYTES));
            assert_eq!(client.call(WRITE_OP, file, &write_body(handle, 0, 0, b"content")).0, 0);
            let set = [words(&[1, 0]), name("user.a"), b"x".to_vec()].concat();
            // Older kernels' tmpfs has no user attributes.
            let has_attributes = client.call(SETXATTR, file, &set).0 == 0;
            go(client, dir, path);
            // ftruncate(), fchmod(), futimens(), and without a handle: fstat().
            let (error, attr) = client.call(SETATTR, file, &setattr_body(handle, 0o600, 3, 1_000_000_000));
            assert_eq!((error, u64_at(&attr, 24), u32_at(&attr, 76)), (0, 3, 0o100_600));
            let (error, attr) = client.call(GETATTR, file, &[0; 16]);
            assert_eq!((error, u64_at(&attr, 24), u64_at(&attr, 48)), (0, 3, 1_000_000_000));
            let get = [words(&[100, 0]), name("user.a")].concat();
            if has_attributes {
                assert_eq!(client.call(GETXATTR, file, &get), (0, b"x".to_vec()));
                assert!(client.call(LISTXATTR, file, &words(&[100, 0])).1.starts_with(b"user.a\0"));
                assert_eq!(client.call(REMOVEXATTR, file, &name("user.a")).0, 0);
                assert_eq!(client.call(SETXATTR, file, &set).0, 0);
            }
            assert_eq!(client.call(STATFS, file, &[]).0, 0);
            // By /proc/self/fd.
            let again = client.open(file, libc::O_RDONLY).unwrap();
            assert_eq!(client.call(READ, file, &read_body(again, 0, 9)).1, b"con");
            for handle in [handle, again] {
                let release = [handle.to_le_bytes().as_slice(), &words(&[0; 4])].concat();
                assert_eq!(client.call(RELEASE, file, &release).0, 0);
            }
            assert_eq!(client.call(GETATTR, file, &[0; 16]).0, libc::ESTALE);
            assert_eq!(client.call(GETXATTR, file, &get).0, libc::ESTALE);
        });
    };
    gone(|client, dir, _| assert_eq!(client.call(UNLINK, dir, &name("file")).0, 0));
    gone(|_, _, path| fs::rename(path.join("file"), path.join("elsewhere")).unwrap());
    gone(|_, _, path| {
        fs::remove_file(path.join("file")).unwrap();
        fs::write(path.join("file"), b"another").unwrap();
    });
}

#[test]
fn a_directory_that_is_open_is_looked_at_when_it_has_gone() {
    below_a_mount(|client, dir, path| {
        fs::create_dir(path.join("dir")).unwrap();
        let number = fs::metadata(path.join("dir")).unwrap().ino();
        let removed = client.lookup(dir, "dir").unwrap();
        assert_eq!(client.call(OPENDIR, removed, &words(&[0, 0])).0, 0);
        assert_eq!(client.call(RMDIR, dir, &name("dir")).0, 0);
        let (error, attr) = client.call(GETATTR, removed, &[0; 16]);
        assert_eq!((error, u64_at(&attr, 16)), (0, number));
    });
}

/// Each subvolume counts its files from the same number on. Only where Btrfs's tools are installed.
#[test]
fn subvolumes_are_file_systems() {
    const ENTRY_FLAGS: usize = 124;
    const SUBMOUNT: u32 = 1;
    if Command::new("mkfs.btrfs").arg("--version").output().is_err() {
        return eprintln!("there is no mkfs.btrfs: nothing is tried");
    }
    apart(|root| {
        let (image, volume) = (root.path().join("image"), root.path().join("volume"));
        fs::create_dir(&volume).unwrap();
        fs::File::create(&image).unwrap().set_len(128 << 20).unwrap();
        let run = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?}");
        run(Command::new("mkfs.btrfs").arg("-q").arg(&image));
        run(Command::new("mount").args(["-o", "loop"]).args([&image, &volume]));
        for name in ["one", "two"] {
            run(Command::new("btrfs").args(["subvolume", "create"]).arg(volume.join(name)));
            fs::write(volume.join(name).join("file"), name).unwrap();
        }
        fs::create_dir(volume.join("dir")).unwrap();
        let (mut client, node) = client(root);
        let names = ["one", "two", "dir", "one", "two", "dir"];
        let entries = names.map(|entry| client.call(LOOKUP, node, &name(entry)).1);
        let flags = entries.each_ref().map(|entry| u32_at(entry, ENTRY_FLAGS));
        assert_eq!(flags, [SUBMOUNT, SUBMOUNT, 0, SUBMOUNT, SUBMOUNT, 0]);
        let files = [0, 1].map(|index| client.call(LOOKUP, u64_at(&entries[index], 0), &name("file")).1);
        // Of one number, and two files.
        assert_eq!(u64_at(&files[0], 40), u64_at(&files[1], 40));
        assert_ne!(u64_at(&files[0], 0), u64_at(&files[1], 0));
        let (error, dir) = client.call(OPENDIR, node, &words(&[0, 0]));
        assert_eq!(error, 0);
        let (_, listed) = client.call(READDIRPLUS, node, &read_body(u64_at(&dir, 0), 0, 4096));
        let (mut rest, mut submounts) = (listed.as_slice(), 0);
        while !rest.is_empty() {
            submounts += u32_at(rest, ENTRY_FLAGS);
            let len = u32_at(rest, ENTRY_BYTES + 16) as usize;
            rest = &rest[ENTRY_BYTES + (24 + len).next_multiple_of(8)..];
        }
        assert_eq!(submounts, 2);
        client
    });
}
