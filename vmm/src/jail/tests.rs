//! What a monitor that was taken over would try: each attempt succeeds outside the jail, and
//! fails inside.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use libc::c_long;

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
pub(crate) fn apart(work: impl FnOnce() -> String) -> String {
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

/// A mount namespace in which there is a mount of the directory that `share` is in, and `share` there.
fn nothing_but(share: &Path) -> (OwnedFd, OwnedFd) {
    let make = || {
        unshare(libc::CLONE_NEWNS)?;
        let namespace = File::open("/proc/thread-self/ns/mnt")?;
        let (here, above, none) = (c".".as_ptr(), path(share.parent().unwrap()), std::ptr::null());
        let (private, bind) = (libc::MS_REC | libc::MS_PRIVATE, libc::MS_BIND);
        // SAFETY: C strings, and no data.
        ok(unsafe { libc::mount(none, c"/".as_ptr(), none, private, none.cast()) })?;
        // SAFETY: C strings, and no data.
        ok(unsafe { libc::mount(above.as_ptr(), above.as_ptr(), none, bind, none.cast()) })?;
        // SAFETY: a C string.
        ok(unsafe { libc::chdir(above.as_ptr()) })?;
        // SAFETY: C strings.
        ok(unsafe { libc::syscall(libc::SYS_pivot_root, here, here) } as libc::c_int)?;
        // SAFETY: a C string.
        ok(unsafe { libc::umount2(here, libc::MNT_DETACH) })?;
        Ok((namespace.into(), File::open(Path::new("/").join(share.file_name().unwrap()))?.into()))
    };
    std::thread::scope(|scope| scope.spawn(make).join().unwrap()).map_err(|error: io::Error| error).unwrap()
}

/// A user namespace in which every id of the host is.
fn all_users() -> OwnedFd {
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

/// Does `work` in a process that is shut in, without the filter of system calls, with the directory `share` as its root.
/// What is on the caller's stack `work` must not refer to: in that process it is the stack of the next thread there.
pub(crate) fn inside(share: &Path, users: bool, work: impl FnOnce() -> String + Send) -> String {
    let (mount_namespace, root) = nothing_but(share);
    let jail = Jail { mount_namespace, root, user_namespace: users.then(all_users) };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // For this thread's children alone.
            unshare(libc::CLONE_NEWPID).unwrap();
            apart(move || match jail.close() {
                Ok(()) => work(),
                Err(error) => format!("{error}: {:?}", std::error::Error::source(&error)),
            })
        });
        thread.join().unwrap()
    })
}

/// Begins the filter of system calls for the calling thread and those it starts.
pub(crate) fn filter() -> io::Result<()> {
    seccomp::begin()
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
    let in_it = self::inside(&share, users, || work(&inside));
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
    let file = || File::open("/").unwrap().into();
    let error = Jail { mount_namespace: file(), root: file(), user_namespace: None }.enter().unwrap_err();
    assert!(matches!(error, JailError::NotFirst(_)), "{error}");
    let wrong = JailConfig { mount_namespace: 1, root: 1, user_namespace: None };
    let error = Jail::open(&wrong).unwrap_err().to_string();
    assert_eq!(error, "jail.mount_namespace: descriptor 1 must be a mount namespace, and inherited");
}

/// What is called, and whether it is allowed.
type Call = (&'static str, bool, fn() -> io::Result<()>);

/// What a call comes to with the filters of all duties, or of one.
fn filtered(duty: Option<Duty>, call: impl FnOnce() -> io::Result<()>) -> String {
    apart(|| {
        // SAFETY: PR_SET_NO_NEW_PRIVS takes numbers.
        ok(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }).unwrap();
        seccomp::begin().unwrap();
        duty.into_iter().for_each(|duty| seccomp::narrow(duty).unwrap());
        call().map_or_else(|error| error.to_string(), |()| "done".to_owned())
    })
}

fn map(protection: i32) -> io::Result<()> {
    let (flags, none) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, std::ptr::null_mut());
    // SAFETY: a new mapping of nothing, which is never used.
    let at = unsafe { libc::mmap(none, 4096, protection, flags, -1, 0) };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The last call of a kernel of today, and some room.
const CALLS: c_long = 480;
/// uretprobe(2) and uprobe(2), which seccomp passes by, and which end who is no probe.
const PROBES: [c_long; 2] = [335, 336];

#[test]
fn calls_that_are_of_no_use_end_the_monitor() {
    let ended = format!("signal {}", libc::SIGSYS);
    let allowed = |duty: Option<Duty>| -> BTreeSet<c_long> {
        let all = Duty::ALL.into_iter().filter(|&one| duty.is_none_or(|duty| duty == one));
        let early = calls::building().filter(|_| duty.is_none()).chain([calls::LOOKED_FOR]);
        all.flat_map(Duty::calls).chain(early).map(|call| call.number).collect()
    };
    for duty in [None, Some(Duty::Vcpu)] {
        let allowed = allowed(duty);
        for call in (0..CALLS).filter(|call| !allowed.contains(call) && !PROBES.contains(call)) {
            // SAFETY: it is ended before the kernel looks at the arguments.
            let called = filtered(duty, || ok(unsafe { libc::syscall(call, 0, 0, 0, 0, 0) } as libc::c_int));
            assert_eq!(called, ended, "{duty:?}: {call}");
        }
    }
}

#[test]
fn calls_are_as_few_as_they_are_said_to_be() {
    let count = |duty: Duty| duty.calls().map(|call| call.number).collect::<BTreeSet<_>>().len();
    assert_eq!(
        Duty::ALL.map(|duty| (duty, count(duty))),
        [
            (Duty::Control, 57),
            (Duty::Vcpu, 27),
            (Duty::Files, 58),
            (Duty::Disk, 31),
            (Duty::Net, 30),
            (Duty::Vsock, 35),
            (Duty::Memory, 26),
            (Duty::Balloon, 26),
            (Duty::Pmem, 25),
        ]
    );
}

#[test]
fn of_a_call_only_what_a_duty_takes_is_allowed() {
    let ended = format!("signal {}", libc::SIGSYS);
    let calls: [(Duty, Call); 14] = [
        (Duty::Files, ("a mount namespace", false, || unshare(libc::CLONE_NEWNS))),
        (Duty::Files, ("a working directory", true, || unshare(libc::CLONE_FS))),
        (Duty::Files, ("a file", true, || File::open("/dev/null").map(drop))),
        (Duty::Vcpu, ("a VM", false, || kvm(0xae01))),
        (Duty::Control, ("a VM", false, || kvm(0xae01))),
        (Duty::Vcpu, ("memory for its VM", false, || kvm(0x4020_ae46))),
        (Duty::Vsock, ("a network's socket", false, || socket(libc::AF_INET))),
        (Duty::Vsock, ("a Unix socket", true, || socket(libc::AF_UNIX))),
        (Duty::Net, ("code", false, || map(libc::PROT_READ | libc::PROT_EXEC))),
        (Duty::Net, ("memory", true, || map(libc::PROT_READ | libc::PROT_WRITE))),
        // SAFETY: the child would exit at once.
        (Duty::Control, ("a process", false, || ok(unsafe { libc::fork() }))),
        (Duty::Control, ("a thread", true, || std::thread::Builder::new().spawn(|| {}).map(drop))),
        (Duty::Disk, ("a thread", false, || std::thread::Builder::new().spawn(|| {}).map(drop))),
        (
            Duty::Control,
            ("another's signal", false, || {
                // SAFETY: plain system call; signal 0 is none.
                ok(unsafe { libc::syscall(libc::SYS_tgkill, 2, 2, 0) } as libc::c_int)
            }),
        ),
    ];
    for (duty, (what, is_allowed, call)) in calls {
        assert_eq!(filtered(Some(duty), call), if is_allowed { "done" } else { &ended }, "{duty:?}: {what}");
    }
    for duty in Duty::ALL.into_iter().filter(|duty| *duty != Duty::Files) {
        let opened = filtered(Some(duty), || File::open("/dev/null").map(drop));
        assert!(opened.starts_with("No such file"), "{duty:?}: {opened}");
    }
}

fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: takes flags.
    ok(unsafe { libc::unshare(flags) })
}

fn socket(family: libc::c_int) -> io::Result<()> {
    // SAFETY: plain system call.
    ok(unsafe { libc::socket(family, libc::SOCK_STREAM, 0) })
}

/// A request to what is no VM.
fn kvm(request: libc::Ioctl) -> io::Result<()> {
    // SAFETY: nothing is passed.
    ok(unsafe { libc::ioctl(0, request, 0) })
}
