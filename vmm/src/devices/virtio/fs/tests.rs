//! The device driven with FUSE messages made by hand.

mod below;
mod client;
mod elsewhere;
mod native;
mod replay;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use rvm_protocol::vmm::{CachePolicy, ShareConfig};

use super::{Fs, FsError, MAX_IO_BYTES};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::test_queue::{DATA, WRITE};

use client::*;

#[test]
fn files_are_found_and_read_with_their_owner_and_mode() {
    let mut client = Client::new(true, CachePolicy::Auto);
    fs::create_dir(client.path("dir")).unwrap();
    fs::write(client.path("dir/file"), b"content").unwrap();
    fs::set_permissions(client.path("dir/file"), fs::Permissions::from_mode(0o640)).unwrap();
    let dir = client.lookup(ROOT, "dir").unwrap();
    let file = client.lookup(dir, "file").unwrap();
    assert_eq!(client.lookup(dir, "file").unwrap(), file);
    assert_eq!(client.lookup(dir, "none"), Err(libc::ENOENT));

    let (error, attr) = client.call(GETATTR, file, &words(&[0, 0, 0, 0]));
    let metadata = fs::metadata(client.path("dir/file")).unwrap();
    assert_eq!((error, u64_at(&attr, 16)), (0, metadata.ino()));
    assert_eq!(u64_at(&attr, 24), 7);
    assert_eq!(u32_at(&attr, 76), 0o100640);
    assert_eq!((u32_at(&attr, 84), u32_at(&attr, 88)), (metadata.uid(), metadata.gid()));

    let handle = client.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(client.call(READ, file, &read_body(handle, 0, 100)).1, b"content");
    assert_eq!(client.call(READ, file, &read_body(handle, 3, 2)).1, b"te");
    assert_eq!(client.call(READ, file, &read_body(handle, 7, 2)).1, b"");
    // A handle belongs to its file, and to nothing once it is closed.
    assert_eq!(client.call(READ, dir, &read_body(handle, 0, 1)).0, libc::EBADF);
    let release = [handle.to_le_bytes().as_slice(), &words(&[0; 4])].concat();
    assert_eq!(client.call(RELEASE, file, &release).0, 0);
    assert_eq!(client.call(READ, file, &read_body(handle, 0, 1)).0, libc::EBADF);
    assert_eq!(client.call(STATFS, ROOT, &[]).0, 0);
    // The second request queue serves the same tree.
    assert_eq!(client.call_on(2, LOOKUP, dir, &name("file")).0, 0);
}

#[test]
fn names_are_one_component_and_links_are_not_followed() {
    let mut client = Client::new(false, CachePolicy::Auto);
    fs::create_dir_all(client.path("a/b")).unwrap();
    symlink("/etc", client.path("etc")).unwrap();
    symlink("/etc/passwd", client.path("passwd")).unwrap();
    let a = client.lookup(ROOT, "a").unwrap();
    let b = client.lookup(a, "b").unwrap();
    for bad in ["..", ".", "", "a/b", "/etc", "../..", "a/"] {
        for node in [ROOT, b] {
            assert_eq!(client.lookup(node, bad), Err(libc::EINVAL), "{bad:?}");
        }
        let prefixed = |prefix: usize| [vec![0; prefix], name(bad)].concat();
        assert_eq!(client.call(MKDIR, b, &prefixed(8)).0, libc::EINVAL, "{bad:?}");
        assert_eq!(client.call(MKNOD, b, &prefixed(16)).0, libc::EINVAL, "{bad:?}");
        assert_eq!(client.call(CREATE, b, &prefixed(16)).0, libc::EINVAL, "{bad:?}");
        assert_eq!(client.call(UNLINK, b, &name(bad)).0, libc::EINVAL, "{bad:?}");
        assert_eq!(client.call(RMDIR, b, &name(bad)).0, libc::EINVAL, "{bad:?}");
        let link = [b.to_le_bytes().to_vec(), name(bad)].concat();
        assert_eq!(client.call(LINK, a, &link).0, libc::EINVAL, "{bad:?}");
        assert_eq!(client.call(SYMLINK, b, &[name(bad), name("x")].concat()).0, libc::EINVAL, "{bad:?}");
        for (from, to) in [(bad, "new"), ("b", bad)] {
            let rename = [ROOT.to_le_bytes().to_vec(), name(from), name(to)].concat();
            assert_eq!(client.call(RENAME, a, &rename).0, libc::EINVAL, "{bad:?}");
        }
    }
    // A link is a link: its target is text, and nothing is behind it.
    let etc = client.lookup(ROOT, "etc").unwrap();
    assert_eq!(client.call(READLINK, etc, &[]).1, b"/etc");
    assert_eq!(client.lookup(etc, "passwd"), Err(libc::ENOTDIR));
    let passwd = client.lookup(ROOT, "passwd").unwrap();
    assert_eq!(client.open(passwd, libc::O_RDONLY), Err(libc::ENXIO));
    let create = [words(&[libc::O_RDWR as u32, 0o644, 0, 0]), name("passwd")].concat();
    assert_eq!(client.call(CREATE, ROOT, &create).0, libc::ENXIO);
}

#[test]
fn a_read_only_share_refuses_every_change_and_stays_as_it_is() {
    for cache in [CachePolicy::Auto, CachePolicy::Always] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), b"content").unwrap();
        fs::create_dir(dir.path().join("dir")).unwrap();
        let mut client = Client::over(dir, true, cache);
        let file = client.lookup(ROOT, "file").unwrap();
        let prefixed = |prefix: usize, file: &str| [vec![0; prefix], name(file)].concat();
        let two = |prefix: &[u8], a: &str, b: &str| [prefix.to_vec(), name(a), name(b)].concat();
        let root = ROOT.to_le_bytes();
        let requests = [
            (SETATTR, file, vec![0xff; 88]),
            (SYMLINK, ROOT, two(&[], "new", "target")),
            (MKNOD, ROOT, prefixed(16, "new")),
            (MKDIR, ROOT, prefixed(8, "new")),
            (UNLINK, ROOT, name("file")),
            (RMDIR, ROOT, name("dir")),
            (RENAME, ROOT, two(&root, "file", "new")),
            (RENAME2, ROOT, two(&[root.as_slice(), &[0; 8]].concat(), "file", "new")),
            (LINK, ROOT, [file.to_le_bytes().to_vec(), name("new")].concat()),
            (WRITE_OP, file, write_body(0, 0, 0, b"changed")),
            (SETXATTR, file, [words(&[1, 0]), name("user.a"), b"x".to_vec()].concat()),
            (REMOVEXATTR, file, name("user.a")),
            (CREATE, ROOT, prefixed(16, "new")),
            (FALLOCATE, file, vec![0; 32]),
        ];
        for (op, node, body) in requests {
            assert_eq!(client.call(op, node, &body).0, libc::EROFS, "opcode {op}");
        }
        if cache == CachePolicy::Auto {
            for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
                assert_eq!(client.open(file, flags), Err(libc::EROFS));
            }
        }
        assert_eq!(fs::read(client.path("file")).unwrap(), b"content");
        let names: BTreeSet<_> =
            fs::read_dir(client.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["dir", "file"].map(Into::into).into());
    }
}

#[test]
fn a_writable_share_is_changed_as_asked() {
    let mut client = Client::new(false, CachePolicy::Auto);
    let (file, handle) = client.create("file", 0o666, 0o022);
    assert_eq!(fs::metadata(client.path("file")).unwrap().permissions().mode() & 0o7777, 0o644);
    let (error, written) = client.call(WRITE_OP, file, &write_body(handle, 0, 0, b"hello world"));
    assert_eq!((error, u32_at(&written, 0)), (0, 11));
    // Appending is decided by each write, wherever the guest thinks the end is.
    assert_eq!(client.call(WRITE_OP, file, &write_body(handle, 0, libc::O_APPEND, b"!")).0, 0);
    assert_eq!(client.call(WRITE_OP, file, &write_body(handle, 0, 0, b"J")).0, 0);
    assert_eq!(fs::read(client.path("file")).unwrap(), b"Jello world!");
    assert_eq!(client.call(FSYNC, file, &[handle.to_le_bytes(), [0; 8]].concat()).0, 0);

    // Size 5 and mode 0600, set-user-id gone where the guest asks for that.
    let mut setattr = vec![0; 88];
    setattr[..4].copy_from_slice(&(0x8_u32 | 0x1 | 0x800).to_le_bytes());
    setattr[16..24].copy_from_slice(&5_u64.to_le_bytes());
    setattr[68..72].copy_from_slice(&0o4700_u32.to_le_bytes());
    assert_eq!(client.call(SETATTR, file, &setattr).0, 0);
    assert_eq!(fs::read(client.path("file")).unwrap(), b"Jello");
    assert_eq!(fs::metadata(client.path("file")).unwrap().permissions().mode() & 0o7777, 0o700);

    let root = ROOT.to_le_bytes().to_vec();
    assert_eq!(client.call(MKDIR, ROOT, &[words(&[0o777, 0o027]), name("dir")].concat()).0, 0);
    assert_eq!(fs::metadata(client.path("dir")).unwrap().permissions().mode() & 0o777, 0o750);
    let dir = client.lookup(ROOT, "dir").unwrap();
    assert_eq!(client.call(LINK, dir, &[file.to_le_bytes().to_vec(), name("hard")].concat()).0, 0);
    assert_eq!(client.lookup(dir, "hard").unwrap(), file);
    assert_eq!(client.call(SYMLINK, dir, &[name("soft"), name("../file")].concat()).0, 0);
    assert_eq!(fs::read_link(client.path("dir/soft")).unwrap(), Path::new("../file"));
    assert_eq!(client.call(RENAME, dir, &[root, name("hard"), name("moved")].concat()).0, 0);
    assert!(client.path("moved").exists());
    assert_eq!(client.call(RMDIR, ROOT, &name("dir")).0, libc::ENOTEMPTY);
    assert_eq!(client.call(UNLINK, dir, &name("soft")).0, 0);
    assert_eq!(client.call(RMDIR, ROOT, &name("dir")).0, 0);

    // A file without a name is still there for who has it open.
    assert_eq!(client.call(UNLINK, ROOT, &name("file")).0, 0);
    assert_eq!(client.call(UNLINK, ROOT, &name("moved")).0, 0);
    assert_eq!(client.call(READ, file, &read_body(handle, 0, 9)).1, b"Jello");
    assert_eq!(
        client
            .call(FALLOCATE, file, &[handle.to_le_bytes(), [0; 8], 4096_u64.to_le_bytes(), [0; 8]].concat())
            .0,
        0
    );
    let data =
        [handle.to_le_bytes(), 0_u64.to_le_bytes(), u64::from(libc::SEEK_END as u32).to_le_bytes()].concat();
    assert_eq!(client.call(LSEEK, file, &data).0, libc::EINVAL);
}

#[test]
fn what_means_something_to_the_host_is_not_the_guests_to_make() {
    let mut client = Client::new(false, CachePolicy::Auto);
    let (file, _) = client.create("file", 0o644, 0);
    let mut set = |attribute: &str| {
        client.call(SETXATTR, file, &[words(&[1, 0]), name(attribute), b"x".to_vec()].concat()).0
    };
    for refused in ["security.selinux", "security.ima", "system.nfs4_acl"] {
        assert_eq!(set(refused), libc::EPERM, "{refused}");
    }
    // Where the host's file system has user attributes at all.
    if set("trusted.overlay.opaque") == 0 {
        let on_host = fs::File::open(client.path("file")).unwrap();
        let has = |attribute: &std::ffi::CStr| {
            use std::os::fd::AsRawFd;
            // SAFETY: a C string; no room is given.
            unsafe { libc::fgetxattr(on_host.as_raw_fd(), attribute.as_ptr(), std::ptr::null_mut(), 0) >= 0 }
        };
        assert!(!has(c"trusted.overlay.opaque") && has(c"user.rvm.guest.overlay.opaque"));
        let asked = [words(&[100, 0]), name("trusted.overlay.opaque")].concat();
        assert_eq!(client.call(GETXATTR, file, &asked).1, b"x");
        let (_, names) = client.call(LISTXATTR, file, &words(&[1000, 0]));
        assert!(String::from_utf8_lossy(&names).contains("trusted.overlay.opaque\0"));
        assert!(!String::from_utf8_lossy(&names).contains("rvm"));
        assert_eq!(client.call(REMOVEXATTR, file, &name("trusted.overlay.opaque")).0, 0);
    }
    let marks = [words(&[100, 0]), name("trusted.overlay.opaque")].concat();
    assert_eq!(client.call(GETXATTR, file, &marks).0, libc::ENODATA);
    let mut set = |attribute: &str| {
        client.call(SETXATTR, file, &[words(&[1, 0]), name(attribute), b"x".to_vec()].concat()).0
    };
    // Where the host's file system has user attributes at all.
    let error = set("user.a");
    assert!([0, libc::EOPNOTSUPP].contains(&error), "{error}");
    if error == 0 {
        assert_eq!(client.call(GETXATTR, file, &[words(&[100, 0]), name("user.a")].concat()).1, b"x");
        assert_eq!(u32_at(&client.call(GETXATTR, file, &[words(&[0, 0]), name("user.a")].concat()).1, 0), 1);
        let (error, names) = client.call(LISTXATTR, file, &words(&[1000, 0]));
        assert_eq!(error, 0);
        assert!(names.windows(7).any(|window| window == b"user.a\0"));
        assert_eq!(client.call(REMOVEXATTR, file, &name("user.a")).0, 0);
    }

    let make = |client: &mut Client, mode: u32, device: u32, file: &str| {
        client.call(MKNOD, ROOT, &[words(&[mode | 0o644, device, 0, 0]), name(file)].concat()).0
    };
    // A device is one to the guest only. 0/0 is none: overlayfs marks deletions by it.
    for (kind, number, file) in [
        (libc::S_IFCHR, 0x103, "null"),
        (libc::S_IFBLK, 0x800, "sda"),
        (libc::S_IFBLK, 0, "zero"),
        (libc::S_IFCHR, 0, "whiteout"),
    ] {
        let error = make(&mut client, kind, number, file);
        if error != 0 && file != "whiteout" {
            // No attributes for this user, or on this file system: nothing is left.
            assert!(error == libc::EPERM && !client.path(file).exists(), "{file}: {error}");
            continue;
        }
        assert_eq!(error, 0, "{file}");
        let on_host = fs::symlink_metadata(client.path(file)).unwrap();
        assert!(on_host.file_type().is_char_device() && on_host.rdev() == 0, "{file}");
        let (error, entry) = client.call(LOOKUP, ROOT, &name(file));
        assert_eq!((error, u32_at(&entry, ENTRY_MODE) & libc::S_IFMT), (0, kind), "{file}");
        assert_eq!(u32_at(&entry, ENTRY_RDEV), number, "{file}");
        let node = u64_at(&entry, 0);
        assert_eq!(client.open(node, libc::O_RDONLY), Err(libc::ENXIO));
        let attribute = [words(&[100, 0]), name("security.capability")].concat();
        assert_eq!(client.call(GETXATTR, node, &attribute).0, libc::ENODATA);
        let forged = [words(&[1, 0]), name("security.capability"), b"x".to_vec()].concat();
        assert_eq!(client.call(SETXATTR, node, &forged).0, libc::EPERM);
        assert_eq!(client.call(LISTXATTR, node, &words(&[1000, 0])).1, b"");
    }
    assert_eq!(make(&mut client, libc::S_IFIFO, 0, "fifo"), 0);
    assert!(fs::metadata(client.path("fifo")).unwrap().file_type().is_fifo());
    // Opening it would wait for the other end.
    let fifo = client.lookup(ROOT, "fifo").unwrap();
    assert_eq!(client.open(fifo, libc::O_RDONLY), Err(libc::ENXIO));
}

#[test]
fn an_immutable_share_is_read_without_being_opened() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), b"content").unwrap();
    fs::create_dir(dir.path().join("dir")).unwrap();
    for index in 0..300 {
        fs::write(dir.path().join(format!("dir/entry-{index}")), index.to_string()).unwrap();
    }
    let mut client = Client::over(dir, true, CachePolicy::Always);
    let (_, init) = client.call(INIT, 0, &words(&[7, 38, 1 << 17, OFFERED]));
    assert_eq!(u32_at(&init, 12) & (NO_OPEN | NO_OPENDIR), NO_OPEN | NO_OPENDIR);

    let file = client.lookup(ROOT, "file").unwrap();
    assert_eq!(client.open(file, libc::O_RDONLY), Err(libc::ENOSYS));
    assert_eq!(client.call(READ, file, &read_body(0, 0, 100)).1, b"content");
    assert_eq!(client.call(READ, file, &read_body(0, 3, 100)).1, b"tent");
    let dir = client.lookup(ROOT, "dir").unwrap();
    assert_eq!(client.call(OPENDIR, dir, &[0; 8]).0, libc::ENOSYS);
    for (op, size) in [(READDIR, 4096), (READDIRPLUS, 4096), (READDIR, 200), (READDIRPLUS, 1 << 20)] {
        let names = client.names(op, dir, 0, size);
        let distinct: BTreeSet<_> = names.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!((names.len(), distinct.len()), (302, 302), "opcode {op}, {size} bytes");
        assert!(distinct.contains("entry-299") && distinct.contains("."));
    }
    // The guest may remember for long that there is nothing, or what there is.
    let (error, none) = client.call(LOOKUP, dir, &name("none"));
    assert_eq!((error, u64_at(&none, 0)), (0, 0));
    assert!(u64_at(&none, 16) > 3600);
    let (_, entry) = client.call(LOOKUP, dir, &name("entry-1"));
    assert!(u64_at(&entry, 16) > 3600);
    // Not of the root's own entries, which come and go with containers.
    assert_eq!(client.call(LOOKUP, ROOT, &name("none")).0, libc::ENOENT);
    let (_, entry) = client.call(LOOKUP, ROOT, &name("dir"));
    assert_eq!((u64_at(&entry, 16), u32_at(&entry, 32)), (0, 0));
    assert!(u64_at(&entry, 24) > 3600);
}

#[test]
fn directories_of_a_changing_share_are_read_by_handle_and_entries_are_known_files() {
    let mut client = Client::new(false, CachePolicy::Auto);
    for index in 0..100 {
        fs::write(client.path(&format!("entry-{index}")), b"x").unwrap();
    }
    let (error, open) = client.call(OPENDIR, ROOT, &[0; 8]);
    assert_eq!(error, 0);
    let handle = u64_at(&open, 0);
    // Our guest kernel is told that an answer with room for any name is the last one, and it is.
    assert_ne!(u32_at(&open, 8) & 1 << 30, 0);
    for (op, longest) in [(READDIRPLUS, 408), (READDIR, 280)] {
        let (mut answers, mut offset) = (Vec::new(), 0);
        loop {
            let (error, bytes) = client.call(op, ROOT, &read_body(handle, offset, 1000));
            assert_eq!(error, 0);
            let Some((_, next)) = entries(op, &bytes).last().cloned() else { break };
            answers.push(bytes.len());
            offset = next;
        }
        answers.pop();
        assert!(answers.iter().all(|len| len + longest > 1000), "{answers:?}");
    }
    let names = client.names(READDIRPLUS, ROOT, handle, 1000);
    assert_eq!(names.len(), 102);
    for (entry, node) in names.iter().filter(|(entry, _)| entry.starts_with("entry")) {
        assert_eq!(client.lookup(ROOT, entry), Ok(*node));
    }
    assert!(names.iter().filter(|(entry, _)| entry.starts_with('.')).all(|(_, node)| *node == 0));
    // From the start again: a new file is seen.
    fs::write(client.path("late"), b"x").unwrap();
    assert!(client.names(READDIR, ROOT, handle, 4096).iter().any(|(entry, _)| entry == "late"));
}

#[test]
fn files_the_guest_knows_hold_no_descriptors_and_are_forgotten() {
    const FILES: usize = 3000;
    let dir = tempfile::tempdir().unwrap();
    for index in 0..FILES {
        fs::write(dir.path().join(index.to_string()), b"x").unwrap();
    }
    let mut client = Client::over(dir, true, CachePolicy::Always);
    let nodes: Vec<u64> = (0..FILES).map(|index| client.lookup(ROOT, &index.to_string()).unwrap()).collect();
    assert!(descriptors_below(client.dir.path()) < 5);

    let mut batch = words(&[FILES as u32, 0]);
    for node in &nodes {
        batch.extend(node.to_le_bytes());
        batch.extend(1_u64.to_le_bytes());
    }
    client.call(BATCH_FORGET, 0, &batch);
    assert_eq!(client.call(GETATTR, nodes[0], &[0; 16]).0, libc::EBADF);
    // The root stays, however often it is forgotten.
    client.call_on(0, FORGET, ROOT, &u64::MAX.to_le_bytes());
    let again = client.lookup(ROOT, "7").unwrap();
    assert!(again > *nodes.last().unwrap());
    client.call(DESTROY, 0, &[]);
    assert_eq!(client.call(GETATTR, again, &[0; 16]).0, libc::EBADF);
    assert_eq!(client.call(GETATTR, ROOT, &[0; 16]).0, 0);
}

#[test]
fn files_without_handles_are_found_by_name_and_hold_no_descriptors() {
    // procfs has no file handles.
    let config = share(Path::new("/proc/sys"), true, CachePolicy::Always);
    let mut client = Client::with(Fs::new(&config).unwrap(), tempfile::tempdir().unwrap());
    let kernel = client.lookup(ROOT, "kernel").unwrap();
    // One directory that was used last is kept open, a bounded number of them.
    client.lookup(kernel, "ostype").unwrap();
    let before = descriptors_below(Path::new("/proc/sys/kernel"));
    assert_eq!(before, 1);
    for _ in 0..2 {
        let ostype = client.lookup(kernel, "ostype").unwrap();
        assert_eq!(client.call(GETATTR, ostype, &[0; 16]).0, 0);
        client.call_on(0, FORGET, ostype, &1_u64.to_le_bytes());
    }
    assert_eq!(descriptors_below(Path::new("/proc/sys/kernel")), before);
    let ostype = client.lookup(kernel, "ostype").unwrap();
    assert_eq!(client.call(READ, ostype, &read_body(0, 0, 100)).1, b"Linux\n");
}

/// Descriptors of this process that are open below `dir`.
fn descriptors_below(dir: &Path) -> usize {
    let entries = fs::read_dir("/proc/self/fd").unwrap();
    entries
        .filter(|fd| fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|path| path.starts_with(dir)))
        .count()
}

#[test]
fn a_file_without_a_name_gets_one() {
    let mut client = Client::new(false, CachePolicy::Auto);
    let body = [words(&[(libc::O_TMPFILE | libc::O_RDWR) as u32, 0o666, 0o022, 0]), name("/")].concat();
    let (error, made) = client.call(TMPFILE, ROOT, &body);
    if error == libc::EOPNOTSUPP {
        return; // The host's file system has none.
    }
    assert_eq!(error, 0);
    let (file, handle) = (u64_at(&made, 0), u64_at(&made, ENTRY_BYTES));
    assert_eq!(client.call(WRITE_OP, file, &write_body(handle, 0, 0, b"content")).0, 0);
    assert_eq!(fs::read_dir(client.dir.path()).unwrap().count(), 0);
    assert_eq!(client.call(LINK, ROOT, &[file.to_le_bytes().to_vec(), name("named")].concat()).0, 0);
    assert_eq!(fs::read(client.path("named")).unwrap(), b"content");
    assert_eq!(fs::metadata(client.path("named")).unwrap().permissions().mode() & 0o7777, 0o644);
    assert_eq!(client.lookup(ROOT, "named"), Ok(file));
    assert_eq!(client.call(SYNCFS, ROOT, &[0; 8]).0, 0);
}

/// Our guest kernel sends it to the queue that carries what nobody waits for.
#[test]
fn what_is_closed_needs_no_answer() {
    const OPEN_FLAGS: usize = 8;
    let mut client = Client::new(false, CachePolicy::Auto);
    let (file, handle) = client.create("file", 0o644, 0);
    let (error, opened) = client.call(OPEN, file, &words(&[libc::O_RDONLY as u32, 0]));
    assert_eq!((error, u32_at(&opened, OPEN_FLAGS) >> 31), (0, 1), "the guest is told");
    for (told, handle) in [(true, u64_at(&opened, 0)), (false, handle)] {
        let body = [handle.to_le_bytes().as_slice(), &words(&[0; 4])].concat();
        let message = [client.header(RELEASE, file, body.len()), body].concat();
        let at = DATA + 0x1000;
        client.queue.write(at, &message);
        let chain = [(at, message.len() as u32, 0)];
        if told {
            client.queue.send(0, &chain);
            assert_eq!(client.queue.wait_used(0), 0);
        } else {
            client.queue.send_quietly(0, &chain);
        }
        // It comes before what is asked next.
        assert_eq!(client.call(READ, file, &read_body(handle, 0, 1)).0, libc::EBADF);
    }
    assert_eq!(client.call(GETATTR, file, &[0; 16]).0, 0, "what is closed is known as before");
}

#[test]
fn a_small_file_comes_when_it_is_opened() {
    let mut client = Client::new(false, CachePolicy::Auto);
    let long: Vec<u8> = (0..40_000_u32).map(|n| n as u8).collect();
    fs::write(client.path("small"), b"content").unwrap();
    fs::write(client.path("empty"), b"").unwrap();
    fs::write(client.path("long"), &long).unwrap();
    let [small, empty, long_file] = ["small", "empty", "long"].map(|name| client.lookup(ROOT, name).unwrap());
    let mut content = |node, flags, room| client.open_with(node, flags, room).unwrap().1;
    assert_eq!(content(small, libc::O_RDONLY, 4096), b"content");
    // Other guests leave no room.
    assert_eq!(content(small, libc::O_RDONLY, 0), b"");
    assert_eq!(content(small, libc::O_RDONLY, 4095), b"");
    assert_eq!(content(empty, libc::O_RDONLY, 8192), b"");
    assert_eq!(content(small, libc::O_WRONLY, 8192), b"");
    // As much as there is room for, and no more than is ever asked for.
    assert_eq!(content(long_file, libc::O_RDONLY, 8192), long[..8192]);
    assert_eq!(content(long_file, libc::O_RDONLY, 100_000), long[..32 << 10]);
    let (handle, _) = client.open_with(small, libc::O_RDONLY, 4096).unwrap();
    assert_eq!(client.call(READ, small, &read_body(handle, 3, 2)).1, b"te");
    // Nothing stays open for who cannot be told.
    let before = descriptors_below(client.dir.path());
    let message = [client.header(OPEN, small, 8), words(&[libc::O_RDONLY as u32, 0])].concat();
    client.queue.write(DATA, &message);
    client.queue.send(1, &[(DATA, message.len() as u32, 0), (ANSWER, 20, WRITE)]);
    assert_eq!(client.queue.wait_used(1), 16);
    assert_eq!(client.answer(16).0, libc::EINVAL);
    assert_eq!(descriptors_below(client.dir.path()), before);
}

#[test]
fn who_writes_hears_what_the_file_was_and_is() {
    let mut client = Client::new(false, CachePolicy::Auto);
    fs::write(client.path("file"), b"content").unwrap();
    let file = client.lookup(ROOT, "file").unwrap();
    let handle = client.open(file, libc::O_RDWR).unwrap();
    // Of that time the host has modified it.
    let at = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    fs::File::options().write(true).open(client.path("file")).unwrap().set_modified(at).unwrap();
    let (error, said) = client.call(WRITE_OP, file, &write_body(handle, 7, 0, b" and more"));
    let seen = &said[8..];
    assert_eq!((error, said.len(), u32_at(&said, 0)), (0, 8 + 16 + 16 + 88, 9));
    assert_eq!((u64_at(seen, 0), u32_at(seen, 8)), (1_000_000_000, 123_456_789));
    // Kept for a second, as attributes are that were asked for.
    assert_eq!((u64_at(seen, 16), u32_at(seen, 24)), (1, 0));
    let metadata = fs::metadata(client.path("file")).unwrap();
    let attr = &seen[32..];
    assert_eq!((u64_at(attr, 0), u64_at(attr, 8)), (metadata.ino(), 16));
    assert_eq!((u64_at(attr, 32), u32_at(attr, 52)), (metadata.mtime() as u64, metadata.mtime_nsec() as u32));
    let asked = client.call(GETATTR, file, &[words(&[1, 0]), handle.to_le_bytes().to_vec()].concat());
    assert_eq!(asked, (0, seen[16..].to_vec()));
    // What comes next finds what was said.
    let (_, again) = client.call(WRITE_OP, file, &write_body(handle, 0, 0, b"C"));
    assert_eq!((u64_at(&again, 8), u32_at(&again, 16)), (u64_at(attr, 32), u32_at(attr, 52)));
    // Other guests leave no room, and some leave too little.
    for room in [24, 24 + 8, 24 + 119] {
        let body = write_body(handle, 0, 0, b"c");
        let (error, said) = client.call_with_room(1, WRITE_OP, file, &body, room);
        assert_eq!((error, said.len(), u32_at(&said, 0)), (0, 8, 1));
    }
    // Without any nothing can be said, and what was asked for is done all the same.
    let body = write_body(handle, 0, 0, b"k");
    assert_eq!(client.call_with_room(1, WRITE_OP, file, &body, 16).0, libc::EINVAL);
    assert_eq!(fs::read(client.path("file")).unwrap(), b"kontent and more");
}

#[test]
fn a_name_stands_for_what_is_there_now() {
    let mut client = Client::new(false, CachePolicy::Auto);
    fs::write(client.path("one"), b"1").unwrap();
    fs::write(client.path("two"), b"2").unwrap();
    let [one, two] = ["one", "two"].map(|file| client.lookup(ROOT, file).unwrap());
    fs::hard_link(client.path("one"), client.path("link")).unwrap();
    assert_eq!(client.lookup(ROOT, "link"), Ok(one));
    fs::rename(client.path("two"), client.path("one")).unwrap();
    assert_eq!(client.lookup(ROOT, "one"), Ok(two));
    assert_eq!(client.lookup(ROOT, "two"), Err(libc::ENOENT));
    fs::remove_file(client.path("one")).unwrap();
    fs::write(client.path("one"), b"3").unwrap();
    let third = client.lookup(ROOT, "one").unwrap();
    assert!(third != one && third != two, "the number of a file that the guest knows is given to no other");
    let handle = client.open(two, libc::O_RDONLY).unwrap();
    assert_eq!(client.call(READ, two, &read_body(handle, 0, 9)).1, b"2");
    let dir = client.root_dir();
    let known = client.names(READDIRPLUS, ROOT, dir, 4096);
    assert!(
        known.contains(&("link".to_owned(), one)) && known.contains(&("one".to_owned(), third)),
        "{known:?}"
    );
}

/// A chain may name one buffer over and over: nothing is allocated for that.
#[test]
fn a_message_is_no_larger_than_any_that_is_right() {
    const PIECE: u32 = 1 << 20;
    const PIECES: usize = 240;
    let most_resident = || -> u64 {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    let mut client = Client::new(false, CachePolicy::Auto);
    let before = most_resident();
    // Each says that all of it belongs to the request.
    let size = PIECE * PIECES as u32;
    let ioctl = [vec![0; 24], words(&[size, 0])].concat();
    let attribute = words(&[size, 0]);
    for (op, body, expected) in [
        (IOCTL, ioctl, libc::ENOSYS),
        (SETXATTR, attribute, libc::EINVAL),
        (LOOKUP, Vec::new(), libc::EINVAL),
    ] {
        let message = [client.header(op, ROOT, size as usize), body].concat();
        client.queue.write(DATA, &message);
        let mut chain = vec![(DATA, message.len() as u32, 0)];
        chain.extend([(DATA, PIECE, 0); PIECES]);
        chain.push((ANSWER, 4096, WRITE));
        client.queue.send(1, &chain);
        let len = client.queue.wait_used(1) as usize;
        assert_eq!(client.answer(len).0, expected, "opcode {op}");
    }
    // The kernel's sum of its counters is late by some pages: the most can have become less.
    let grown = most_resident().saturating_sub(before);
    assert!(grown < 64 << 10, "{grown} KiB");
    assert_eq!(client.call(GETATTR, ROOT, &[0; 16]).0, 0);
}

#[test]
fn nonsense_is_answered_and_the_device_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), b"content").unwrap();
    let mut client = Client::over(dir, false, CachePolicy::Auto);
    let file = client.lookup(ROOT, "file").unwrap();
    let handle = client.open(file, libc::O_RDWR).unwrap();

    // Every opcode, known or not, with a body too short, of zeroes, of ones.
    for op in (0..60).chain([4096, u32::MAX]).filter(|op| *op != DESTROY && *op != INIT) {
        for node in [0, ROOT, file, 999, u64::MAX] {
            for body in [vec![], vec![0; 7], vec![0; 64], vec![0xff; 64], vec![b'a'; 300]] {
                client.call(op, node, &body);
            }
        }
    }
    // The message claims to be longer than it is, or shorter than its header.
    for claimed in [0, 39, 41, 1 << 20, u32::MAX] {
        let mut message = [client.header(LOOKUP, ROOT, 5), name("file")].concat();
        message[..4].copy_from_slice(&claimed.to_le_bytes());
        client.queue.write(DATA, &message);
        client.queue.send(1, &[(DATA, message.len() as u32, 0), (ANSWER, 4096, WRITE)]);
        let len = client.queue.wait_used(1) as usize;
        assert_ne!(client.answer(len).0, 0, "length {claimed}");
    }
    // No terminator, nothing but terminators.
    assert_eq!(client.call(LOOKUP, ROOT, b"file").0, libc::EINVAL);
    assert_eq!(client.call(LOOKUP, ROOT, &[0; 4096]).0, libc::EINVAL);
    assert_eq!(client.call(RENAME, ROOT, &[1; 64]).0, libc::EINVAL);
    // More than anybody has room for.
    assert_eq!(client.call(READ, file, &read_body(handle, 0, u32::MAX)).1, b"content");
    assert_eq!(client.call(READ, file, &read_body(handle, u64::MAX, 1)).0, libc::EINVAL);
    assert_ne!(client.call(READDIR, ROOT, &read_body(handle, 0, u32::MAX)).0, 0);
    client.call(GETXATTR, file, &[words(&[u32::MAX, 0]), name("user.none")].concat());
    client.call(LISTXATTR, file, &words(&[u32::MAX, 0]));
    client.call(BATCH_FORGET, 0, &words(&[u32::MAX, 0]));
    assert_ne!(client.call(WRITE_OP, file, &write_body(handle, u64::MAX - 2, 0, b"beyond")).0, 0);

    // Chains: no room for an answer, no request, outside memory, loops.
    let message = [client.header(GETATTR, ROOT, 16), vec![0; 16]].concat();
    client.queue.write(DATA, &message);
    for chain in [
        vec![(DATA, 56, 0)],
        vec![(DATA, 56, 0), (ANSWER, 15, WRITE)],
        vec![(DATA, 39, 0), (ANSWER, 4096, WRITE)],
        vec![(ANSWER, 4096, WRITE)],
        vec![(u64::MAX - 8, 56, 0), (ANSWER, 4096, WRITE)],
        vec![(DATA, 56, 0), (u64::MAX - 8, 4096, WRITE)],
        vec![(DATA, u32::MAX, 0), (ANSWER, 4096, WRITE)],
    ] {
        client.queue.send(1, &chain);
        client.queue.wait_used(1);
    }
    client.queue.send_loop(1, DATA, 0);
    client.queue.wait_used(1);
    client.queue.send_loop(1, ANSWER, WRITE);
    client.queue.wait_used(1);

    assert!(client.lookup(ROOT, "file").is_ok());
    client.queue.stop();
}

#[test]
fn configuration_errors_name_the_field_and_the_guest_reads_the_tag() {
    let dir = tempfile::tempdir().unwrap();
    let config = |tag: &str, path: &Path| ShareConfig {
        tag: tag.to_owned(),
        ..share(path, true, CachePolicy::Always)
    };
    for tag in ["", "a\0b", &"x".repeat(37)] {
        assert!(matches!(Fs::new(&config(tag, dir.path())), Err(FsError::Tag(_))));
    }
    fs::write(dir.path().join("file"), b"").unwrap();
    for path in ["file", "none"] {
        let error = Fs::new(&config("t", &dir.path().join(path))).unwrap_err();
        assert!(error.to_string().contains("shares: dir"), "{error}");
    }
    let device = Fs::new(&config("rvm", dir.path())).unwrap().with_request_queues(3);
    let mut bytes = [0xff; 40];
    device.read_config(0, &mut bytes);
    assert_eq!(&bytes[..4], b"rvm\0");
    assert_eq!(u32_at(&bytes, 36), 3);
    assert_eq!(device.queue_sizes().len(), 4);
}
