//! What a monitor that was taken over would try: each attempt succeeds outside the jail, and
//! fails inside.

use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use super::*;

/// Where an attempt is made.
struct Place {
    /// The share's directory as it is seen there.
    share: PathBuf,
    /// A file beside the share.
    secret: PathBuf,
    /// Open for reading alone.
    lent: File,
    /// A process outside.
    other: i32,
}

type Attempt = (&'static str, fn(&Place) -> io::Result<()>);

const ATTEMPTS: [Attempt; 14] = [
    ("a file by its path", |place| File::open(&place.secret).map(drop)),
    ("a file above the share", |place| {
        let (share, up) = (File::open(&place.share)?, c"../secret");
        // SAFETY: a C string.
        ok(unsafe { libc::openat(share.as_raw_fd(), up.as_ptr(), libc::O_RDONLY) })
    }),
    ("kernel parameters", |_| {
        fs::OpenOptions::new().write(true).open("/proc/sys/kernel/core_pattern").map(drop)
    }),
    ("kernel parameters beside its own /proc", |_| {
        let (own, up) = (procfs::open("fd")?, c"../../sys/kernel/core_pattern");
        // SAFETY: a C string.
        ok(unsafe { libc::openat(own.as_raw_fd(), up.as_ptr(), libc::O_WRONLY) })
    }),
    ("a mount", |place| {
        let target = path(&place.share.join("dir"));
        let (kind, none) = (c"tmpfs".as_ptr(), std::ptr::null());
        // SAFETY: C strings, and no data.
        ok(unsafe { libc::mount(kind, target.as_ptr(), kind, 0, none) })
    }),
    ("another root", |place| {
        let root = path(&place.share);
        // SAFETY: a C string.
        ok(unsafe { libc::chroot(root.as_ptr()) })
    }),
    // SAFETY: takes flags.
    ("a mount namespace", |_| ok(unsafe { libc::unshare(libc::CLONE_NEWNS) })),
    // SAFETY: takes flags.
    ("a user namespace", |_| ok(unsafe { libc::unshare(libc::CLONE_NEWUSER) })),
    ("a block device", |place| {
        let node = path(&place.share.join("node"));
        // SAFETY: a C string.
        ok(unsafe { libc::mknod(node.as_ptr(), libc::S_IFBLK | 0o600, libc::makedev(7, 0)) })
    }),
    ("the host's name", |_| {
        // SAFETY: a name of the length given.
        ok(unsafe { libc::sethostname(c"taken".as_ptr(), 5) })
    }),
    // SAFETY: plain system call.
    ("frames", |_| ok(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) })),
    // SAFETY: takes numbers.
    ("more of the processor", |_| ok(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -1) })),
    // SAFETY: plain system call; signal 0 is none.
    ("a process outside", |place| ok(unsafe { libc::kill(place.other, 0) })),
    ("attributes of the host's root", |place| {
        let (file, name) = (path(&place.share.join("file")), c"trusted.x");
        // SAFETY: C strings, and a value of the length given.
        ok(unsafe { libc::setxattr(file.as_ptr(), name.as_ptr(), c"x".as_ptr().cast(), 1, 0) })
    }),
];

/// Those that only Landlock forbids.
const WITH_LANDLOCK: [Attempt; 1] = [("what is open for reading is opened for writing", |place| {
    let fds = procfs::open("fd")?;
    let name = CString::new(place.lent.as_raw_fd().to_string())?;
    // SAFETY: a C string.
    ok(unsafe { libc::openat(fds.as_raw_fd(), name.as_ptr(), libc::O_WRONLY) })
})];

fn path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

/// Does `work` in a process of its own; returns what it says.
fn apart(work: impl FnOnce() -> String) -> String {
    let (mut reader, mut writer) = io::pipe().unwrap();
    // SAFETY: the child does its work and exits without returning.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let said = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        let _ = writer.write_all(said.unwrap_or_else(|_| "it panicked".into()).as_bytes());
        // SAFETY: ends the child without running the parent's handlers.
        unsafe { libc::_exit(0) }
    }
    assert!(child > 0);
    drop(writer);
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    let mut status = 0;
    // SAFETY: collects the child just made, and its status.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    if libc::WIFSIGNALED(status) { format!("signal {}", libc::WTERMSIG(status)) } else { said }
}

/// A user namespace in which every id of the host is.
fn all_users() -> std::os::fd::OwnedFd {
    let mut command = std::process::Command::new("sleep");
    // SAFETY: takes flags.
    let leave = || ok(unsafe { libc::unshare(libc::CLONE_NEWUSER) });
    // SAFETY: the closure makes one system call.
    unsafe { command.arg("1000").pre_exec(leave) };
    let mut child = command.spawn().unwrap();
    let proc = PathBuf::from(format!("/proc/{}", child.id()));
    for map in ["uid_map", "gid_map"] {
        fs::write(proc.join(map), format!("0 0 {}\n", u32::MAX)).unwrap();
    }
    let namespace = File::open(proc.join("ns/user")).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    namespace.into()
}

fn attempts() -> impl Iterator<Item = Attempt> {
    ATTEMPTS.into_iter().chain(WITH_LANDLOCK.into_iter().filter(|_| has_landlock()))
}

/// What became of each attempt, a line each.
fn try_all(place: &Place) -> String {
    let line = |(name, attempt): Attempt| {
        // One that succeeds changes what the next one finds.
        apart(|| match attempt(place) {
            Ok(()) => format!("{name}: done\n"),
            Err(error) => format!("{name}: {error}\n"),
        })
    };
    attempts().map(line).collect()
}

/// Makes a jail, without the filter of system calls, which would end the attempts; `work` is done
/// inside and outside.
fn in_and_out(users: bool, work: fn(&Place) -> String) -> (String, String) {
    let dir = tempfile::tempdir().unwrap();
    let share = dir.path().join("share");
    fs::create_dir_all(share.join("dir")).unwrap();
    fs::write(share.join("file"), "").unwrap();
    fs::write(dir.path().join("secret"), "").unwrap();
    let place = |share: PathBuf| Place {
        share,
        secret: dir.path().join("secret"),
        lent: File::open(dir.path().join("secret")).unwrap(),
        other: std::process::id().cast_signed(),
    };
    let outside = place(share.clone());
    let inside = place("/".into());
    let root = fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&share).unwrap();
    let jail = Jail { root, user_namespace: users.then(all_users) };
    let in_it = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // For this thread's children alone.
            // SAFETY: takes flags.
            ok(unsafe { libc::unshare(libc::CLONE_NEWPID) }).unwrap();
            apart(move || match jail.close() {
                Ok(()) => work(&inside),
                Err(error) => format!("{error}: {:?}", std::error::Error::source(&error)),
            })
        });
        thread.join().unwrap()
    });
    let out_of_it = apart(|| {
        // What succeeds changes nothing of the host's.
        // SAFETY: takes flags.
        ok(unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWUTS) }).unwrap();
        work(&outside)
    });
    (in_it, out_of_it)
}

#[test]
fn what_can_be_done_outside_cannot_be_done_inside() {
    for users in [true, false] {
        let (inside, outside) = in_and_out(users, try_all);
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let (inside, outside) = (lines(&inside), lines(&outside));
        assert_eq!((inside.len(), outside.len()), (attempts().count(), attempts().count()), "{inside:?}");
        for (inside, outside) in inside.iter().zip(&outside) {
            assert!(!inside.ends_with(": done"), "users {users}: {inside}");
            assert!(outside.ends_with(": done"), "users {users}: {outside}");
        }
    }
}

/// What a file server does is done there as before.
#[test]
fn files_are_served_inside() {
    fn serve(place: &Place) -> String {
        let work = || -> io::Result<String> {
            let file = place.share.join("made");
            fs::write(&file, "x")?;
            std::os::unix::fs::chown(&file, Some(1000), Some(4_000_000_000))?;
            fs::rename(&file, place.share.join("dir/moved"))?;
            let whiteout = path(&place.share.join("whiteout"));
            // SAFETY: a C string.
            ok(unsafe { libc::mknod(whiteout.as_ptr(), libc::S_IFCHR, 0) })?;
            let status = io::read_to_string(procfs::open("status")?)?;
            let field =
                |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("none").trim();
            Ok(format!("{} {} {}", field("Pid:"), field("CapEff:"), field("NoNewPrivs:")))
        };
        work().unwrap_or_else(|error| error.to_string())
    }
    for users in [true, false] {
        assert_eq!(in_and_out(users, serve).0, "1 00000000800000db 1", "users {users}");
    }
}

#[test]
fn who_is_not_the_first_of_its_processes_is_not_shut_in() {
    let root = File::open("/").unwrap();
    let error = Jail { root, user_namespace: None }.enter().unwrap_err();
    assert!(matches!(error, JailError::NotFirst(_)), "{error}");
    let gone = JailConfig { root: "/nowhere".into(), user_namespace: None };
    assert!(Jail::open(&gone).unwrap_err().to_string().starts_with("jail.root: /nowhere"));
    let wrong = JailConfig { root: "/".into(), user_namespace: Some(1) };
    assert!(Jail::open(&wrong).unwrap_err().to_string().starts_with("jail.user_namespace: descriptor 1"));
}

/// What is called, and whether it is allowed.
type Call = (&'static str, bool, fn() -> io::Result<()>);

/// What a call comes to with the filter.
fn filtered(call: impl FnOnce() -> io::Result<()>) -> String {
    apart(|| {
        // SAFETY: PR_SET_NO_NEW_PRIVS takes numbers.
        ok(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }).unwrap();
        seccomp::forbid().unwrap();
        call().map_or_else(|error| error.to_string(), |()| "done".to_owned())
    })
}

fn map(protection: i32) -> io::Result<()> {
    let (flags, none) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, std::ptr::null_mut());
    // SAFETY: a new mapping of nothing, which is never used.
    let at = unsafe { libc::mmap(none, 4096, protection, flags, -1, 0) };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[test]
fn calls_of_no_use_end_the_monitor() {
    let ended = format!("signal {}", libc::SIGSYS);
    for (what, calls) in seccomp::NEVER {
        for &call in calls {
            // SAFETY: it is ended before the kernel looks at the arguments.
            let called = filtered(|| ok(unsafe { libc::syscall(call, 0, 0, 0, 0, 0) } as libc::c_int));
            assert_eq!(called, ended, "{what}: {call}");
        }
    }
    let calls: [Call; 9] = [
        // SAFETY: takes flags.
        ("a mount namespace", false, || ok(unsafe { libc::unshare(libc::CLONE_NEWNS) })),
        // SAFETY: takes flags.
        ("a working directory", true, || ok(unsafe { libc::unshare(libc::CLONE_FS) })),
        // SAFETY: plain system call.
        ("a network's socket", false, || ok(unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) })),
        // SAFETY: plain system call.
        ("netlink", false, || ok(unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, 0) })),
        // SAFETY: plain system call.
        ("a Unix socket", true, || ok(unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) })),
        ("code", false, || map(libc::PROT_READ | libc::PROT_EXEC)),
        ("memory", true, || map(libc::PROT_READ | libc::PROT_WRITE)),
        // SAFETY: the child would exit at once.
        ("a process", false, || ok(unsafe { libc::fork() })),
        ("a thread", true, || std::thread::Builder::new().spawn(|| {}).map(drop)),
    ];
    for (what, is_allowed, call) in calls {
        assert_eq!(filtered(call), if is_allowed { "done" } else { &ended }, "{what}");
    }
}
