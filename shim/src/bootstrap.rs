//! `start`: the socket, the serving process, and the answer to containerd.
//!
//! The socket listens before anybody learns of it, so nobody has to wait for
//! the serving process; and what can go wrong early goes wrong before the fork,
//! where containerd reads the reason.

use std::{
    io::{self, IsTerminal, Read, Write},
    os::{
        fd::AsFd,
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use nix::unistd::{ForkResult, fork, setsid};
use protobuf::Message;
use sha2::{Digest, Sha256};

use crate::{
    fault,
    flags::Flags,
    mount, own_file,
    spec::{Role, SpecError, role_in},
};

/// Where containerd's shims have their sockets.
const SOCKET_DIR: &str = "/run/containerd/s";
/// The file in the bundle that names the socket.
pub const ADDRESS_FILE: &str = "address";
/// Where containerd takes events, in the environment of older versions.
const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// More than any containerd writes to a shim's standard input.
const MAX_INPUT_LEN: u64 = 10 << 20;

/// Why no shim was started.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// What containerd wrote to the standard input.
    #[error("reading containerd's parameters: {0}")]
    Input(#[source] io::Error),
    /// The socket.
    #[error("{}: {source}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The bundle.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Nothing to join.
    #[error("sandbox {sandbox}, which the container's annotations name, does not run: {source}")]
    NoSandbox {
        /// As the annotations name it.
        sandbox: String,
        /// What its socket says.
        #[source]
        source: io::Error,
    },
    /// The mount namespace.
    #[error("making a mount namespace: {0} (a shim needs root)")]
    Namespace(#[source] io::Error),
    /// The serving process.
    #[error("starting the serving process: {0}")]
    Fork(#[source] io::Error),
}

/// What the serving process begins with.
pub struct Serve {
    /// The Task API's socket.
    pub listener: UnixListener,
    /// Its path, to be removed in the end.
    pub socket: PathBuf,
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub id: String,
    /// Where containerd takes events; empty where nobody does, as with CRI-O.
    pub events_address: String,
    /// Whether containerd logs at debug level.
    pub debug: bool,
}

/// Starts a shim. Returns in the serving process with what it begins with; in
/// the other one, which has answered containerd, with `None`.
pub fn start(flags: &Flags) -> Result<Option<Serve>, BootstrapError> {
    let params = read_params(flags)?;
    fault::point("start: parameters read");
    let role = role_in(Path::new(""))?;
    let sandbox = match &role {
        Role::Alone | Role::Sandbox => &flags.id,
        Role::Member { sandbox } => sandbox,
    };
    let socket = socket_path(params.socket_dir.as_deref(), &flags.address, &flags.namespace, sandbox);
    let address = format!("unix://{}", socket.display());
    let failed = |source| BootstrapError::Socket { path: socket.clone(), source };
    if let Role::Member { sandbox } = &role {
        // Whether the sandbox takes it is for its shim to say.
        UnixStream::connect(&socket)
            .map_err(|source| BootstrapError::NoSandbox { sandbox: sandbox.clone(), source })?;
        write_address(&address).map_err(address_failed)?;
        return answer(&address, params.protocol).map(|()| None);
    }
    let Some(listener) = listen(&socket).map_err(failed)? else {
        // A shim of this name serves already.
        answer(&address, params.protocol)?;
        return Ok(None);
    };
    fault::point("start: listening");
    let serve = Serve {
        listener,
        socket: socket.clone(),
        namespace: flags.namespace.clone(),
        id: flags.id.clone(),
        events_address: params.events_address,
        debug: flags.debug,
    };
    let started = write_address(&address)
        .map_err(address_failed)
        .and_then(|()| mount::isolate().map_err(BootstrapError::Namespace))
        .and_then(|()| daemonize());
    match started {
        Ok(ForkResult::Child) => {
            fault::point("start: the serving process");
            Ok(Some(serve))
        }
        Ok(ForkResult::Parent { .. }) => answer(&address, params.protocol).map(|()| None),
        Err(error) => {
            let _ = std::fs::remove_file(&socket);
            Err(error)
        }
    }
}

fn address_failed(source: io::Error) -> BootstrapError {
    BootstrapError::Socket { path: ADDRESS_FILE.into(), source }
}

/// How containerd speaks to `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    /// Up to 2.2: flags and environment in, the plain address out. Every version
    /// takes that for a shim that serves the Task API under its older name too.
    Address,
    /// From 2.3: messages in and out.
    Message,
}

struct Params {
    protocol: Protocol,
    socket_dir: Option<String>,
    events_address: String,
}

fn read_params(flags: &Flags) -> Result<Params, BootstrapError> {
    let mut input = Vec::new();
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        stdin.lock().take(MAX_INPUT_LEN).read_to_end(&mut input).map_err(BootstrapError::Input)?;
    }
    let environment = std::env::var(TTRPC_ADDRESS).unwrap_or_default();
    Ok(parse_params(&input, flags, environment))
}

/// Older versions write runtime options to the standard input, which may decode
/// as the newer ones' message but then names no sandbox of ours.
fn parse_params(input: &[u8], flags: &Flags, environment: String) -> Params {
    let message = BootstrapParams::parse_from_bytes(input)
        .ok()
        .filter(|params| params.instance_id == flags.id && params.namespace == flags.namespace);
    match message {
        Some(params) => Params {
            protocol: Protocol::Message,
            socket_dir: params.socket_dir.filter(|dir| !dir.is_empty()),
            events_address: match params.containerd_ttrpc_address {
                address if address.is_empty() => environment,
                address => address,
            },
        },
        None => Params { protocol: Protocol::Address, socket_dir: None, events_address: environment },
    }
}

/// Every containerd address, namespace and id has a socket of its own.
fn socket_path(dir: Option<&str>, containerd: &str, namespace: &str, id: &str) -> PathBuf {
    let name = Path::new(containerd).join(namespace).join(id);
    let hash = Sha256::digest(name.as_os_str().as_encoded_bytes());
    let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    Path::new(dir.unwrap_or(SOCKET_DIR)).join(hash)
}

/// Listens on `path`; `None` where somebody does already.
fn listen(path: &Path) -> io::Result<Option<UnixListener>> {
    if let Some(dir) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o711).create(dir)?;
    }
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(None);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        bound => bound?,
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(Some(listener))
}

/// containerd finds the shim again by this file after a restart.
fn write_address(address: &str) -> io::Result<()> {
    let new = format!(".{ADDRESS_FILE}");
    own_file::write(Path::new(&new), address)?;
    std::fs::rename(&new, ADDRESS_FILE)
}

/// Leaves the serving process behind, with no terminal and no streams of
/// containerd's. The process has one thread so far, and forks before the second.
fn daemonize() -> Result<ForkResult, BootstrapError> {
    let null = std::fs::File::options().read(true).write(true).open("/dev/null");
    let null = null.map_err(BootstrapError::Fork)?;
    // SAFETY: there is one thread, so the child may do whatever the parent may.
    let result = unsafe { fork() }.map_err(|error| BootstrapError::Fork(error.into()))?;
    if let ForkResult::Child = result {
        // A new process leads no group, which is all that setsid asks for.
        let _ = setsid();
        let _ = nix::unistd::dup2_stdin(null.as_fd());
        let _ = nix::unistd::dup2_stdout(null.as_fd());
        let _ = nix::unistd::dup2_stderr(null.as_fd());
    }
    Ok(result)
}

fn answer(address: &str, protocol: Protocol) -> Result<(), BootstrapError> {
    const TASK_API_VERSION: i32 = 3;
    let text = match protocol {
        Protocol::Address => address.as_bytes().to_vec(),
        Protocol::Message => BootstrapResult {
            version: TASK_API_VERSION,
            address: address.to_owned(),
            protocol: "ttrpc".into(),
            ..Default::default()
        }
        .write_to_bytes()
        .map_err(|error| BootstrapError::Input(error.into()))?,
    };
    let mut stdout = io::stdout();
    stdout.write_all(&text).and_then(|()| stdout.flush()).map_err(BootstrapError::Input)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::Action;

    fn flags() -> Flags {
        Flags {
            action: Action::Start,
            namespace: "default".into(),
            id: "123".into(),
            address: "/run/containerd/containerd.sock".into(),
            bundle: PathBuf::new(),
            debug: false,
        }
    }

    #[test]
    fn the_socket_is_where_containerd_computes_it() {
        let path = socket_path(None, "/run/containerd/containerd.sock", "default", "123");
        let name = "0ddfbd72d02b3551e75f3a0ed90b9965b533401be618f43a568bc522764e0ad0";
        assert_eq!(path, Path::new("/run/containerd/s").join(name));
    }

    #[test]
    fn older_containerds_get_an_address() {
        let options = protobuf::well_known_types::any::Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: vec![1, 2, 3],
            ..Default::default()
        };
        for input in [Vec::new(), options.write_to_bytes().unwrap()] {
            let params = parse_params(&input, &flags(), "/run/c.sock.ttrpc".into());
            assert_eq!(params.protocol, Protocol::Address);
            assert_eq!(params.events_address, "/run/c.sock.ttrpc");
        }
    }

    #[test]
    fn newer_ones_say_what_they_want() {
        let input = BootstrapParams {
            instance_id: "123".into(),
            namespace: "default".into(),
            containerd_ttrpc_address: "/run/new.sock.ttrpc".into(),
            socket_dir: Some("/run/s".into()),
            ..Default::default()
        };
        let params = parse_params(&input.write_to_bytes().unwrap(), &flags(), String::new());
        assert_eq!(params.protocol, Protocol::Message);
        assert_eq!(params.events_address, "/run/new.sock.ttrpc");
        assert_eq!(params.socket_dir.as_deref(), Some("/run/s"));
    }

    #[test]
    fn a_socket_nobody_listens_on_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s/socket");
        let listener = listen(&path).unwrap().unwrap();
        assert!(listen(&path).unwrap().is_none());
        drop(listener);
        assert!(listen(&path).unwrap().is_some());
    }
}
