//! A sandbox's vsock as the monitor presents it: Unix sockets in the sandbox's
//! directory.
//!
//! A connection to the guest is made on `vsock.sock` with `CONNECT <port>`; one
//! the guest makes to host port P arrives on `vsock.sock_P`.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rvm_protocol::guest::{MAX_LINE_LEN, RELAY_PORT, RelayTarget, STDIO_PORT, STREAM_ATTACHED, StreamHeader};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    time::timeout,
};

use crate::{agent::printable, mount::short_path};

/// Name of the socket in the sandbox's directory.
pub const SOCKET: &str = "vsock.sock";

/// How long a monitor and the agent behind it may take for a connection: neither
/// waits for anybody meanwhile.
const LIMIT: Duration = Duration::from_secs(10);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The socket.
    #[error("vsock port {port}: {source}")]
    Io {
        /// The guest's or host's port.
        port: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Nobody answers.
    #[error("vsock port {port}: the monitor or its guest does not answer within {} s", limit.as_secs_f64())]
    TimedOut {
        /// The guest's port.
        port: u32,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The monitor, or the guest behind it, did not take the connection.
    #[error("vsock port {port}: {problem}")]
    Refused {
        /// The guest's port.
        port: u32,
        /// What came instead of the expected answer.
        problem: String,
    },
}

/// Makes connections to one guest.
#[derive(Clone, Debug)]
pub struct Vsock {
    dir: Arc<File>,
    monitor: u32,
    limit: Duration,
}

impl Vsock {
    /// The sockets are in `dir`.
    pub fn new(dir: Arc<File>) -> Self {
        Self { dir, monitor: 0, limit: LIMIT }
    }

    /// To a guest whose monitor is this user of the host's: it connects to what is listened on.
    pub fn of_monitor(self, monitor: u32) -> Self {
        Self { monitor, ..self }
    }

    /// Where connections of the guest to `port` of the host arrive. One that comes
    /// before this is refused.
    pub fn listen(&self, port: u32) -> Result<UnixListener, VsockError> {
        let path = self.path(&format!("{SOCKET}_{port}"));
        // Of an earlier listener; the directory is this guest's alone.
        let bound = match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => UnixListener::bind(&path),
        };
        let bound = bound.and_then(|listener| {
            if self.monitor != 0 {
                std::os::unix::fs::lchown(&path, Some(self.monitor), Some(self.monitor))?;
            }
            Ok(listener)
        });
        bound.map_err(|source| VsockError::Io { port, source })
    }

    /// Connects to a port of the guest.
    pub async fn connect(&self, port: u32) -> Result<UnixStream, VsockError> {
        self.limited(port, self.connect_now(port)).await
    }

    async fn connect_now(&self, port: u32) -> Result<UnixStream, VsockError> {
        let io = |source| VsockError::Io { port, source };
        let mut stream = UnixStream::connect(self.path(SOCKET)).await.map_err(io)?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.map_err(io)?;
        let answer = read_line(&mut stream).await.map_err(io)?;
        if answer.starts_with("OK ") {
            return Ok(stream);
        }
        Err(VsockError::Refused { port, problem: format!("{answer:?} instead of OK") })
    }

    /// Connects one of a process's standard streams.
    pub async fn stream(&self, header: &StreamHeader) -> Result<UnixStream, VsockError> {
        self.limited(STDIO_PORT, self.stream_now(header)).await
    }

    async fn stream_now(&self, header: &StreamHeader) -> Result<UnixStream, VsockError> {
        let io = |source| VsockError::Io { port: STDIO_PORT, source };
        let mut stream = self.connect_now(STDIO_PORT).await?;
        stream.write_all(header.to_line().as_bytes()).await.map_err(io)?;
        let answer = read_line(&mut stream).await.map_err(io)?;
        if answer.as_bytes() == STREAM_ATTACHED.trim_ascii_end() {
            return Ok(stream);
        }
        let name = header.stream.as_str();
        Err(VsockError::Refused { port: STDIO_PORT, problem: format!("{name}: {answer:?}") })
    }

    /// Connects to a loopback address of the sandbox's network namespace.
    pub async fn relay(&self, target: RelayTarget) -> Result<UnixStream, VsockError> {
        self.limited(RELAY_PORT, self.relay_now(target)).await
    }

    async fn relay_now(&self, target: RelayTarget) -> Result<UnixStream, VsockError> {
        let io = |source| VsockError::Io { port: RELAY_PORT, source };
        let mut stream = self.connect_now(RELAY_PORT).await?;
        stream.write_all(target.to_line().as_bytes()).await.map_err(io)?;
        let answer = read_line(&mut stream).await.map_err(io)?;
        if answer.as_bytes() == STREAM_ATTACHED.trim_ascii_end() {
            return Ok(stream);
        }
        let problem = printable(answer.strip_prefix("error ").unwrap_or(&answer).to_owned());
        Err(VsockError::Refused { port: RELAY_PORT, problem })
    }

    async fn limited<T>(
        &self,
        port: u32,
        work: impl Future<Output = Result<T, VsockError>>,
    ) -> Result<T, VsockError> {
        let limit = self.limit;
        timeout(limit, work).await.unwrap_or(Err(VsockError::TimedOut { port, limit }))
    }

    fn path(&self, name: &str) -> PathBuf {
        short_path(&self.dir, name)
    }
}

/// Reads a line and not a byte beyond it, as what follows is another
/// protocol's; returns it without its newline.
pub(crate) async fn read_line(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<String> {
    let mut line = Vec::new();
    loop {
        match stream.read_u8().await? {
            b'\n' => break,
            byte => line.push(byte),
        }
        if line.len() > MAX_LINE_LEN {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a line without end"));
        }
    }
    String::from_utf8(line).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a line that is not text"))
}

/// Opens a sandbox's directory for [`Vsock::new`].
pub fn open_dir(path: &Path) -> io::Result<Arc<File>> {
    File::open(path).map(Arc::new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rvm_protocol::guest::Stream;
    use tokio::io::{AsyncBufReadExt, BufReader};

    /// Accepts one connection as a monitor would and answers its lines.
    async fn peer(listener: UnixListener, answers: &'static [&'static str]) -> Vec<String> {
        let (stream, _) = listener.accept().await.unwrap();
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::new(read).lines();
        let mut seen = Vec::new();
        for answer in answers {
            match lines.next_line().await.unwrap() {
                Some(line) => seen.push(line),
                None => break,
            }
            write.write_all(answer.as_bytes()).await.unwrap();
        }
        seen
    }

    fn dir() -> (tempfile::TempDir, Vsock, UnixListener) {
        let dir = tempfile::tempdir().unwrap();
        let vsock = Vsock::new(open_dir(dir.path()).unwrap());
        let listener = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        (dir, vsock, listener)
    }

    #[tokio::test]
    async fn handshake_leaves_what_follows_to_the_caller() {
        let (_dir, vsock, listener) = dir();
        let peer = tokio::spawn(peer(listener, &["OK 1073741824\nfirst bytes"]));
        let mut stream = vsock.connect(1024).await.unwrap();
        assert_eq!(peer.await.unwrap(), ["CONNECT 1024"]);
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "first bytes");
    }

    #[tokio::test]
    async fn stream_header_is_acknowledged() {
        let (_dir, vsock, listener) = dir();
        let peer = tokio::spawn(peer(listener, &["OK 1\n", "ok\nhello"]));
        let header =
            StreamHeader { container_id: "c".into(), exec_id: String::new(), stream: Stream::Stdout };
        let mut stream = vsock.stream(&header).await.unwrap();
        assert_eq!(peer.await.unwrap(), ["CONNECT 1026", "c\t\tstdout"]);
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "hello");
    }

    #[tokio::test]
    async fn a_monitor_that_stands_still_is_told_by_how_long() {
        let (_dir, mut vsock, _listener) = dir();
        vsock.limit = Duration::from_millis(20);
        let error = vsock.connect(1024).await.unwrap_err().to_string();
        assert_eq!(error, "vsock port 1024: the monitor or its guest does not answer within 0.02 s");
    }

    #[tokio::test]
    async fn refusals_say_what_came() {
        let (_dir, vsock, listener) = dir();
        tokio::spawn(peer(listener, &["OK 1\n", "error no such container\n"]));
        let header = StreamHeader { container_id: "c".into(), exec_id: "e".into(), stream: Stream::Stdin };
        let error = vsock.stream(&header).await.unwrap_err().to_string();
        assert_eq!(error, "vsock port 1026: stdin: \"error no such container\"");
    }

    #[tokio::test]
    async fn a_peer_that_hangs_up_or_never_ends_its_line_is_an_error() {
        let (_dir, vsock, listener) = dir();
        tokio::spawn(async move { drop(listener.accept().await) });
        assert!(vsock.connect(1024).await.is_err());
        let endless = vec![b'x'; MAX_LINE_LEN + 2];
        assert!(read_line(&mut endless.as_slice()).await.is_err());
    }
}
