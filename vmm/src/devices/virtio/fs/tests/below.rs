//! Files below a mount of the host's within a volume, which are known by their places.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rvm_protocol::vmm::CachePolicy;

use super::Fs;
use super::client::*;

/// Has `run` talk to a share in which a file system is mounted below another one, as the host may do below a volume;
/// it is given the node of that mount and the host's path of it. They are the calling thread's own.
fn below_a_mount(run: impl FnOnce(&mut Client, u64, &Path) + Send) {
    let mount = |kind: &CStr, at: &Path, flags| {
        let at = CString::new(at.as_os_str().as_bytes()).unwrap();
        // SAFETY: C strings, and no data.
        let done = unsafe { libc::mount(kind.as_ptr(), at.as_ptr(), kind.as_ptr(), flags, std::ptr::null()) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
    };
    let apart = move || {
        // SAFETY: takes flags.
        if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
            return eprintln!("not root: nothing is tried");
        }
        mount(c"none", Path::new("/"), libc::MS_REC | libc::MS_PRIVATE);
        let root = tempfile::tempdir().unwrap();
        let (volume, below) = (root.path().join("volume"), root.path().join("volume/below"));
        fs::create_dir(&volume).unwrap();
        mount(c"tmpfs", &volume, 0);
        fs::create_dir(&below).unwrap();
        mount(c"tmpfs", &below, 0);
        let device = Fs::new(&share(root.path(), false, CachePolicy::Auto)).unwrap();
        let mut client = Client::with(device, root);
        let node = client.lookup(ROOT, "volume").unwrap();
        let node = client.lookup(node, "below").unwrap();
        run(&mut client, node, &below);
        client.queue.stop();
        let volume = CString::new(volume.as_os_str().as_bytes()).unwrap();
        // SAFETY: a C string.
        unsafe { libc::umount2(volume.as_ptr(), libc::MNT_DETACH) };
    };
    std::thread::scope(|scope| scope.spawn(apart).join().unwrap());
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
