use std::{
    fs::{self, OpenOptions},
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    time::Instant,
};

use nix::sys::stat::Mode;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
};

use super::*;
use crate::vsock::{SOCKET, open_dir};

/// What a process's end of its streams looks like behind the agent.
type Process = std::collections::BTreeMap<String, UnixStream>;

struct World {
    dir: tempfile::TempDir,
    vsock: Vsock,
    listener: UnixListener,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let vsock = Vsock::new(open_dir(dir.path()).unwrap());
    let listener = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
    World { dir, vsock, listener }
}

impl World {
    fn fifo(&self, name: &str) -> String {
        let path = self.dir.path().join(name);
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Attaches the streams with an agent that takes `count` of them.
    async fn attach(&self, stdio: &Stdio, count: usize) -> (ProcessIo, Process) {
        let endpoints = Endpoints::open(stdio, "default", "c").await.unwrap();
        let agent = async {
            let mut process = Process::new();
            for _ in 0..count {
                let (stream, _) = self.listener.accept().await.unwrap();
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                stream.read_line(&mut line).await.unwrap();
                assert_eq!(line, "CONNECT 1026\n");
                stream.write_all(b"OK 1\n").await.unwrap();
                line.clear();
                stream.read_line(&mut line).await.unwrap();
                stream.write_all(b"ok\n").await.unwrap();
                let header = StreamHeader::parse(line.trim_end()).unwrap();
                assert_eq!((header.container_id.as_str(), header.exec_id.as_str()), ("c", ""));
                process.insert(header.stream.as_str().to_owned(), stream.into_inner());
            }
            process
        };
        let (io, process) = tokio::join!(ProcessIo::attach(&self.vsock, "c", "", endpoints), agent);
        (io.unwrap(), process)
    }
}

fn client(path: &str, write: bool) -> File {
    OpenOptions::new().read(!write).write(write).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
}

/// Reads on another thread, as a client is another process.
async fn read_all(file: File) -> Vec<u8> {
    tokio::task::spawn_blocking(move || {
        let flags = nix::fcntl::OFlag::empty();
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
        let mut bytes = Vec::new();
        (&file).read_to_end(&mut bytes).unwrap();
        bytes
    })
    .await
    .unwrap()
}

const QUIET: Duration = Duration::from_millis(100);
const LIMIT: Duration = Duration::from_secs(20);

#[tokio::test]
async fn output_arrives_whole_and_ends() {
    let world = world();
    let stdio = Stdio { stdout: world.fifo("out"), stderr: world.fifo("err"), ..Stdio::default() };
    let (out, err) = (client(&stdio.stdout, false), client(&stdio.stderr, false));
    let (io, mut process) = world.attach(&stdio, 2).await;
    let data: Vec<u8> = (0..3_000_000u32).map(|n| n as u8).collect();
    let reading = (tokio::spawn(read_all(out)), tokio::spawn(read_all(err)));
    let (mut stdout, mut stderr) = (process.remove("stdout").unwrap(), process.remove("stderr").unwrap());
    stdout.write_all(&data).await.unwrap();
    stderr.write_all(b"oops").await.unwrap();
    drop((stdout, stderr));
    io.drain(QUIET, LIMIT).await;
    assert!(reading.0.await.unwrap() == data);
    assert_eq!(reading.1.await.unwrap(), b"oops");
}

#[tokio::test]
async fn input_survives_clients_and_ends_with_close_io() {
    let world = world();
    let stdio = Stdio { stdin: world.fifo("in"), ..Stdio::default() };
    let (io, mut process) = world.attach(&stdio, 1).await;
    let mut stdin = process.remove("stdin").unwrap();
    let mut buffer = [0; 16];

    client(&stdio.stdin, true).write_all(b"one").unwrap();
    let count = stdin.read(&mut buffer).await.unwrap();
    assert_eq!(&buffer[..count], b"one");

    // The first client has gone; the process does not notice.
    let mut second = client(&stdio.stdin, true);
    second.write_all(b"two").unwrap();
    io.close_stdin();
    let count = stdin.read(&mut buffer).await.unwrap();
    assert_eq!(&buffer[..count], b"two");
    second.write_all(b"three").unwrap();
    drop(second);
    let mut rest = Vec::new();
    stdin.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"three");
}

#[tokio::test]
async fn a_terminal_is_one_stream_both_ways() {
    let world = world();
    let stdio =
        Stdio { stdin: world.fifo("in"), stdout: world.fifo("out"), stderr: String::new(), terminal: true };
    let out = client(&stdio.stdout, false);
    let (io, mut process) = world.attach(&stdio, 1).await;
    let mut terminal = process.remove("terminal").unwrap();
    client(&stdio.stdin, true).write_all(b"ls\n").unwrap();
    let mut buffer = [0; 16];
    let count = terminal.read(&mut buffer).await.unwrap();
    assert_eq!(&buffer[..count], b"ls\n");
    // The end of input is not the end of the terminal.
    io.close_stdin();
    terminal.write_all(b"a b\r\n").await.unwrap();
    drop(terminal);
    io.drain(QUIET, LIMIT).await;
    drop(io);
    assert_eq!(read_all(out).await, b"a b\r\n");
}

#[tokio::test]
async fn output_nobody_reads_or_somebody_holds_open_is_not_waited_for() {
    let world = world();
    let stdio = Stdio { stdout: world.fifo("out"), ..Stdio::default() };
    let (io, mut process) = world.attach(&stdio, 1).await;
    let mut stdout = process.remove("stdout").unwrap();
    stdout.write_all(&vec![b'x'; 100_000]).await.unwrap();
    let begin = Instant::now();
    io.drain(QUIET, LIMIT).await;
    assert!(begin.elapsed() < LIMIT / 2);
    // What was written is still there for a client that comes late.
    let out = client(&stdio.stdout, false);
    drop(stdout);
    assert_eq!(read_all(out).await.len(), 100_000);
}

#[tokio::test]
async fn files_are_appended_to() {
    let world = world();
    let log = world.dir.path().join("logs/c.log");
    let stdio = Stdio { stdout: format!("file://{}", log.display()), ..Stdio::default() };
    for text in ["one\n", "two\n"] {
        let (io, mut process) = world.attach(&stdio, 1).await;
        let mut stdout = process.remove("stdout").unwrap();
        stdout.write_all(text.as_bytes()).await.unwrap();
        drop(stdout);
        io.drain(QUIET, LIMIT).await;
    }
    assert_eq!(fs::read_to_string(&log).unwrap(), "one\ntwo\n");
}

#[tokio::test]
async fn a_logging_program_gets_both_outputs() {
    let world = world();
    let (script, log) = (world.dir.path().join("logger"), world.dir.path().join("log"));
    let text = "#!/bin/sh\nexec 5>&-\n{ cat <&3; cat <&4; echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $*\"; } >\"$2.new\"\nmv \"$2.new\" \"$2\"\n";
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let uri = format!("binary://{}?log={}", script.display(), log.display());
    let stdio = Stdio { stdout: uri.clone(), stderr: uri, ..Stdio::default() };
    let (io, mut process) = world.attach(&stdio, 2).await;
    for (name, text) in [("stdout", "out\n"), ("stderr", "err\n")] {
        let mut stream = process.remove(name).unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
    }
    io.drain(QUIET, LIMIT).await;
    drop(io);
    let begin = Instant::now();
    while !log.exists() && begin.elapsed() < LIMIT {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let written = fs::read_to_string(&log).unwrap();
    assert!(written.starts_with("out\nerr\ndefault/c log "), "{written}");
}

#[tokio::test]
async fn other_schemes_are_refused_by_name() {
    for (stdio, expected) in [
        (Stdio { stdout: "npipe:////x".into(), ..Stdio::default() }, "stdout: npipe:////x: must be"),
        (Stdio { stdin: "file:///x".into(), ..Stdio::default() }, "stdin: file:///x: must be"),
        (
            Stdio { stderr: "/nonexistent/fifo".into(), ..Stdio::default() },
            "stderr: /nonexistent/fifo: No such",
        ),
        (Stdio { stdout: "binary://logger".into(), ..Stdio::default() }, "binary://logger: must be"),
    ] {
        let error = Endpoints::open(&stdio, "default", "c").await.err().unwrap().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}
