//! A file system of the host's with one file, whose server stops answering when it is told to.

use std::{
    ffi::CString,
    fs::File,
    io::{Read, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::world::World;

/// What its file holds.
const CONTENT: &str = "answered\n";
/// Its file's name and number; the root's is 1.
const NAME: &[u8] = b"file\0";
const FILE: u64 = 2;

/// The file system, mounted; unmounted with the value.
pub struct Hanging {
    dir: PathBuf,
    state: Arc<State>,
    server: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    inner: Mutex<Inner>,
    asked: Condvar,
}

#[derive(Default)]
struct Inner {
    hangs: bool,
    ends: bool,
    /// Requests that were taken and not answered.
    kept: Vec<Vec<u8>>,
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hanging {
    /// Mounts it.
    ///
    /// # Errors
    /// Where there is no FUSE.
    pub fn mount(world: &World) -> Result<Self> {
        let dir = world.dir().join("hanging");
        std::fs::create_dir_all(&dir)?;
        let device = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/fuse")
            .context("/dev/fuse")?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let options = CString::new(options)?;
        mount(Some("hanging"), &dir, Some("fuse"), MsFlags::empty(), Some(options.as_c_str()))
            .context("mounting it")?;
        let state = Arc::new(State::default());
        let serves = Arc::clone(&state);
        let server =
            std::thread::Builder::new().name("hanging".into()).spawn(move || serve(device, &serves))?;
        Ok(Self { dir, state, server: Some(server) })
    }

    /// Where it is mounted; its file is `file`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What its file holds.
    pub fn content(&self) -> &'static str {
        CONTENT
    }

    /// From now on it takes requests and does not answer them.
    pub fn hang(&self) {
        self.state.lock().hangs = true;
    }

    /// Waits until it has been asked something that it does not answer.
    ///
    /// # Errors
    /// When the limit passes.
    pub fn wait_until_asked(&self, limit: Duration) -> Result<()> {
        let waiting =
            self.state.asked.wait_timeout_while(self.state.lock(), limit, |inner| inner.kept.is_empty());
        let (_inner, result) = waiting.unwrap_or_else(PoisonError::into_inner);
        ensure!(!result.timed_out(), "nobody asked within {limit:?}");
        Ok(())
    }

    /// It answers again, also what it was asked meanwhile.
    pub fn answer(&self) {
        self.state.lock().hangs = false;
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        self.answer();
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
        self.state.lock().ends = true;
        if let Some(server) = self.server.take() {
            // Whoever still waits for it is told that there is no server.
            let _ = server.join();
        }
        let _ = std::fs::remove_dir(&self.dir);
    }
}

/// Answers until it is over, or nothing of it is mounted any more.
fn serve(mut device: File, state: &State) {
    const ROUND: u16 = 20;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let mut ready = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
        let count = poll(&mut ready, PollTimeout::from(ROUND)).unwrap_or(0);
        let mut inner = state.lock();
        if inner.ends {
            return;
        }
        if count > 0 {
            match device.read(&mut buffer) {
                Ok(len) => inner.kept.push(buffer[..len].to_vec()),
                // Nothing of it is mounted any more.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return,
                // Who asked was killed before it was read.
                Err(_) => {}
            }
        }
        if inner.hangs {
            state.asked.notify_all();
            continue;
        }
        for request in std::mem::take(&mut inner.kept) {
            if let Some(answer) = answer(&request) {
                // Who asked may have been killed meanwhile.
                let _ = device.write(&answer);
            }
        }
    }
}

/// The answer to a message (`linux/fuse.h`); none where none is due.
fn answer(request: &[u8]) -> Option<Vec<u8>> {
    const HEADER: usize = 40;
    let word =
        |at: usize| request.get(at..at + 4).map(|bytes| u32::from_le_bytes(bytes.try_into().expect("four")));
    let long =
        |at: usize| request.get(at..at + 8).map(|bytes| u64::from_le_bytes(bytes.try_into().expect("eight")));
    let (opcode, unique, node) = (word(4)?, long(8)?, long(16)?);
    let body = request.get(HEADER..)?;
    let done = |body: Vec<u8>| Ok(body);
    let result: Result<Vec<u8>, i32> = match opcode {
        // LOOKUP
        1 if body == NAME => done([longs(&[FILE, 0, 0, 0]), longs(&[0]), attributes(FILE)].concat()),
        1 => Err(libc::ENOENT),
        // FORGET, INTERRUPT, BATCH_FORGET
        2 | 36 | 42 => return None,
        // GETATTR
        3 => done([longs(&[0, 0]), attributes(node)].concat()),
        // OPEN, with FOPEN_DIRECT_IO; OPENDIR
        14 => done(words(&[0, 0, 1, 0])),
        27 => done(words(&[0; 4])),
        // READ
        15 => {
            let from = usize::try_from(long(HEADER + 8)?).ok()?.min(CONTENT.len());
            done(CONTENT.as_bytes()[from..].to_vec())
        }
        // STATFS: the length of names is its last but one number.
        17 => done([longs(&[0; 5]), words(&[4096, 255, 4096, 0]), words(&[0; 6])].concat()),
        // RELEASE, FLUSH, RELEASEDIR; READDIR, READDIRPLUS of none
        18 | 25 | 28 | 29 | 44 => done(Vec::new()),
        // INIT, version 7.31
        26 => done([words(&[7, 31, 0, 0, 0, 4096, 1, 0]), vec![0; 32]].concat()),
        _ => Err(libc::ENOSYS),
    };
    let (error, body) = match result {
        Ok(body) => (0, body),
        Err(error) => (-error, Vec::new()),
    };
    let len = u32::try_from(16 + body.len()).ok()?;
    Some([words(&[len, error.cast_unsigned()]), longs(&[unique]), body].concat())
}

fn attributes(node: u64) -> Vec<u8> {
    let (mode, len) = if node == FILE { (0o100_644, CONTENT.len() as u64) } else { (0o040_755, 0) };
    [longs(&[node, len, 0, 0, 0, 0]), words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0])].concat()
}

fn words(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn longs(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}
