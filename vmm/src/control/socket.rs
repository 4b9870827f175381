//! The socket at a path, for those who only look: one line of JSON per request
//! and per answer, several clients at a time.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rvm_protocol::vmm::{Request, Response};

use super::Served;
use crate::process;

/// Longest request.
const MAX_LINE: usize = 4096;
/// Most clients at a time; more are turned away.
const MAX_CLIENTS: usize = 16;
/// How long nobody is accepted when the host has no descriptor left at all.
const MOMENT: Duration = Duration::from_millis(20);

/// The listening socket and its clients. Dropping it removes the socket.
pub struct ReadOnlySocket {
    listener: UnixListener,
    path: PathBuf,
    clients: HashMap<RawFd, Client>,
    /// Closed to make room for a client that has to be turned away.
    reserve: Option<UnixListener>,
}

struct Client {
    stream: UnixStream,
    line: Vec<u8>,
}

impl ReadOnlySocket {
    /// Creates the socket at `path`.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        let reserve = Some(listener.try_clone()?);
        Ok(Self { listener, path: path.to_owned(), clients: HashMap::new(), reserve })
    }

    /// The listening descriptor; readable when a client waits.
    pub fn listener_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    /// Takes a waiting client; its descriptor is to be watched for reading. `None`
    /// where there is none, or there is no room for it.
    pub fn accept(&mut self) -> Option<RawFd> {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {
                return None;
            }
            Err(e) => {
                self.refuse_one(&e);
                return None;
            }
        };
        if self.clients.len() >= MAX_CLIENTS {
            log::warn!("control socket: more than {MAX_CLIENTS} clients");
            return None;
        }
        if let Err(e) = stream.set_nonblocking(true) {
            log::warn!("control socket: {e}");
            return None;
        }
        let fd = stream.as_raw_fd();
        self.clients.insert(fd, Client { stream, line: Vec::new() });
        Some(fd)
    }

    /// Drops a client that cannot be served.
    pub fn turn_away(&mut self, fd: RawFd) {
        self.clients.remove(&fd);
    }

    /// No descriptor is left for who waits, and as long as he waits the listener
    /// stays readable: he is taken with the one kept for this, and dropped. Where
    /// that does not help either, the host is out of them, and there is nothing to
    /// do but to wait a moment.
    fn refuse_one(&mut self, cause: &io::Error) {
        log::warn!("control socket: a client is turned away: {cause}");
        self.reserve = None;
        if self.listener.accept().is_err() {
            std::thread::sleep(MOMENT);
        }
        self.reserve = self.listener.try_clone().ok();
    }

    /// Reads what client `fd` has sent and answers each whole line: a request for
    /// the counters with what `metrics` says. A client that breaks the protocol or
    /// does not read its answers is dropped.
    pub fn serve(&mut self, fd: RawFd, metrics: &mut dyn FnMut() -> Response) -> Served {
        let Some(client) = self.clients.get_mut(&fd) else { return Served::Closed };
        match client.serve(metrics) {
            Ok(true) => Served::Open,
            Ok(false) => {
                self.clients.remove(&fd);
                Served::Closed
            }
            Err(e) => {
                log::warn!("control socket: {e}");
                self.clients.remove(&fd);
                Served::Closed
            }
        }
    }
}

impl Drop for ReadOnlySocket {
    fn drop(&mut self) {
        process::remove_socket(&self.path);
    }
}

impl Client {
    /// False once the client has gone.
    fn serve(&mut self, metrics: &mut dyn FnMut() -> Response) -> io::Result<bool> {
        let mut buffer = [0; MAX_LINE];
        let count = match self.stream.read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(count) => count,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(true);
            }
            Err(e) => return Err(e),
        };
        for byte in &buffer[..count] {
            if *byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                let response = match serde_json::from_slice(&line) {
                    Ok(Request::Metrics) => metrics(),
                    Ok(_) => Response::Error {
                        message: "only metrics are told here; the rest is its owner's (--control-fd)".into(),
                    },
                    Err(e) => Response::Error { message: format!("not a request: {e}") },
                };
                self.answer(&response)?;
            } else if self.line.len() == MAX_LINE {
                self.answer(&Response::Error { message: format!("a request has at most {MAX_LINE} bytes") })?;
                return Ok(false);
            } else {
                self.line.push(*byte);
            }
        }
        Ok(true)
    }

    fn answer(&mut self, response: &Response) -> io::Result<()> {
        let mut line = serde_json::to_vec(response)?;
        line.push(b'\n');
        self.stream.write_all(&line)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use rvm_protocol::vmm::Metrics;

    use super::*;

    struct Fixture {
        server: ReadOnlySocket,
        dir: tempfile::TempDir,
    }

    impl Fixture {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            Self { server: ReadOnlySocket::bind(&dir.path().join("s")).unwrap(), dir }
        }

        fn connect(&mut self) -> (UnixStream, Option<RawFd>) {
            let stream = UnixStream::connect(self.dir.path().join("s")).unwrap();
            (stream, self.server.accept())
        }

        fn serve(&mut self, fd: RawFd) -> bool {
            self.server.serve(fd, &mut || Response::Metrics(Metrics::default())) == Served::Open
        }
    }

    fn answer(stream: &UnixStream) -> Response {
        let mut line = String::new();
        BufReader::with_capacity(1, stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    #[test]
    fn the_counters_are_told_however_the_lines_arrive_and_nothing_else_is_done() {
        let mut fixture = Fixture::new();
        let (mut client, fd) = fixture.connect();
        let (other, other_fd) = fixture.connect();
        let fd = fd.unwrap();
        client.write_all(br#"{"request":"#).unwrap();
        assert!(fixture.serve(fd));
        client.write_all(b"\"metrics\"}\n{\"request\":\"stop\"}\nnonsense\n").unwrap();
        assert!(fixture.serve(fd));
        assert_eq!(answer(&client), Response::Metrics(Metrics::default()));
        assert!(matches!(answer(&client), Response::Error { message } if message.contains("its owner's")));
        assert!(matches!(answer(&client), Response::Error { message } if message.contains("not a request")));
        drop(client);
        assert!(!fixture.serve(fd));
        drop(other);
        assert!(!fixture.serve(other_fd.unwrap()));
    }

    #[test]
    fn endless_line_is_cut_off() {
        let mut fixture = Fixture::new();
        let (mut client, fd) = fixture.connect();
        client.write_all(&[b'x'; MAX_LINE]).unwrap();
        assert!(fixture.serve(fd.unwrap()));
        client.write_all(b"x").unwrap();
        assert!(!fixture.serve(fd.unwrap()));
        assert!(matches!(answer(&client), Response::Error { .. }));
    }

    #[test]
    fn clients_are_bounded_and_the_socket_goes_with_the_server() {
        let mut fixture = Fixture::new();
        let clients: Vec<_> = (0..MAX_CLIENTS + 1).map(|_| fixture.connect()).collect();
        assert_eq!(clients.iter().filter(|(_, fd)| fd.is_some()).count(), MAX_CLIENTS);
        let path = fixture.dir.path().join("s");
        assert!(path.exists());
        drop(fixture.server);
        assert!(!path.exists());
    }
}
