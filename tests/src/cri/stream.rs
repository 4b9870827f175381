//! Commands, terminals and ports of a pod as streams: containerd's streaming server over WebSocket, as an API server
//! asks it since Kubernetes 1.31 (`v4.channel.k8s.io`).

use std::{
    collections::BTreeMap,
    net::TcpStream,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use k8s_cri::v1::{AttachRequest, ExecRequest, PortForwardRequest};
use tungstenite::{Message, WebSocket, client::IntoClientRequest, http::HeaderValue};

use super::{Container, Pod};
use crate::scale;

/// Input of a command.
pub const STDIN: u8 = 0;
/// Its output.
pub const STDOUT: u8 = 1;
/// What it says of errors.
pub const STDERR: u8 = 2;
/// How it ended, as a `Status` of the API.
pub const STATUS: u8 = 3;
/// The size of its terminal.
pub const RESIZE: u8 = 4;

/// A connection with several channels, each a stream of bytes.
pub struct Channels {
    socket: WebSocket<TcpStream>,
    received: BTreeMap<u8, Vec<u8>>,
}

impl Channels {
    fn connect(url: &str) -> Result<Self> {
        let address = url.trim_start_matches("http://");
        let host = address.split('/').next().unwrap_or_default();
        let stream = TcpStream::connect(host).with_context(|| format!("connecting to {url}"))?;
        stream.set_read_timeout(Some(scale::container()))?;
        let mut request = format!("ws://{address}").into_client_request()?;
        request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static("v4.channel.k8s.io"));
        let (socket, _) = tungstenite::client(request, stream)
            .map_err(|error| anyhow::anyhow!("WebSocket with {url}: {error}"))?;
        Ok(Self { socket, received: BTreeMap::new() })
    }

    /// Sends bytes into a channel.
    ///
    /// # Errors
    /// When the other side is gone.
    pub fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        Ok(self.socket.send(Message::binary([&[channel], bytes].concat()))?)
    }

    /// What has come out of a channel.
    pub fn text(&self, channel: u8) -> String {
        String::from_utf8_lossy(self.received.get(&channel).map_or(&[], Vec::as_slice)).into_owned()
    }

    /// Receives until `done`.
    ///
    /// # Errors
    /// When the other side goes before, or the limit passes.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) -> Result<()> {
        let until = Instant::now() + scale::container();
        while !done(self) {
            ensure!(Instant::now() < until && self.receive()?, "before {what}: {}", self.all());
        }
        Ok(())
    }

    /// Receives until the other side has sent everything.
    ///
    /// # Errors
    /// When it does not end.
    pub fn to_end(&mut self) -> Result<()> {
        let until = Instant::now() + scale::container();
        while self.receive()? {
            ensure!(Instant::now() < until, "no end: {}", self.all());
        }
        Ok(())
    }

    /// Receives nothing for so long.
    ///
    /// # Errors
    /// When something comes, or the other side goes.
    pub fn quiet(&mut self, time: Duration) -> Result<()> {
        self.socket.get_mut().set_read_timeout(Some(time))?;
        let received = self.socket.read();
        self.socket.get_mut().set_read_timeout(Some(scale::container()))?;
        match received {
            Err(tungstenite::Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
            other => bail!("{other:?}"),
        }
    }

    /// Receives a message; false at the end.
    fn receive(&mut self) -> Result<bool> {
        use tungstenite::{Error, error::ProtocolError::ResetWithoutClosingHandshake};
        match self.socket.read() {
            Ok(Message::Binary(bytes)) => {
                let (channel, bytes) = bytes.split_first().context("a message without a channel")?;
                self.received.entry(*channel).or_default().extend_from_slice(bytes);
                Ok(true)
            }
            Ok(Message::Close(_))
            | Err(Error::ConnectionClosed | Error::Protocol(ResetWithoutClosingHandshake)) => Ok(false),
            Ok(Message::Ping(_) | Message::Pong(_)) => Ok(true),
            Ok(other) => bail!("{other:?}"),
            Err(error) => Err(error).context(self.all()),
        }
    }

    fn all(&self) -> String {
        let all = self.received.keys().map(|channel| format!("{channel}: {:?}", self.text(*channel)));
        all.collect::<Vec<_>>().join(", ")
    }
}

impl Container<'_> {
    /// Runs a command in it, with its input.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn exec_stream(&self, command: &[&str], tty: bool) -> Result<Channels> {
        let request = ExecRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        Channels::connect(&self.cri().wait("Exec", self.cri().client().exec(request))?.url)
    }

    /// Its own process' streams.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn attach(&self, stdin: bool, tty: bool) -> Result<Channels> {
        let request = AttachRequest { container_id: self.id.clone(), tty, stdin, stdout: true, stderr: !tty };
        Channels::connect(&self.cri().wait("Attach", self.cri().client().attach(request))?.url)
    }
}

impl Pod<'_> {
    /// Connections to ports on its loopback: the channel of the Nth is 2N, that of what fails 2N + 1, and each
    /// begins with the port's number in two bytes.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn forward(&self, ports: &[u16]) -> Result<Channels> {
        let request = PortForwardRequest {
            pod_sandbox_id: self.id.clone(),
            port: ports.iter().copied().map(i32::from).collect(),
        };
        let url = self.cri.wait("PortForward", self.cri.client().port_forward(request))?.url;
        let query: Vec<_> = ports.iter().map(|port| format!("port={port}")).collect();
        Channels::connect(&format!("{url}?{}", query.join("&")))
    }
}
