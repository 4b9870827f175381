//! `start`: the socket, the serving process, and the answer to containerd.
//!
//! The socket listens before anybody learns of it, so nobody has to wait for
//! the serving process; and what can go wrong early goes wrong in the process
//! that containerd waits for, which reads the reason. Each of the two removes
//! the socket where the other one dies before it has said that it goes on.

use std::{
    io::{self, IsTerminal, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use nix::{
    errno::Errno,
    sys::{
        socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, getsockname, listen, socket},
        wait::waitpid,
    },
    unistd::{ForkResult, fork, setsid},
};
use protobuf::Message;
use sha2::{Digest, Sha256};

use crate::{
    fault, features,
    flags::Flags,
    own_file,
    spec::{Role, SpecError, role_in},
};

/// Where containerd's shims have their sockets.
const SOCKET_DIR: &str = "/run/containerd/s";
/// The file in the bundle that names the socket.
pub const ADDRESS_FILE: &str = "address";
/// Where containerd takes events, in the environment of older versions.
const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// Set where containerd's administrator wants `sched_core`.
const SCHED_CORE: &str = "SCHED_CORE";
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
    /// Cores of its own.
    #[error("{SCHED_CORE}: {0} (needs CONFIG_SCHED_CORE)")]
    CoreScheduling(#[source] io::Error),
    /// The serving process.
    #[error("starting the serving process: {0}")]
    Fork(#[source] io::Error),
    /// It does not serve.
    #[error("the serving process has ended as it began: {0}")]
    Ended(#[source] io::Error),
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
    let path = socket_path(params.socket_dir.as_deref(), &flags.address, &flags.namespace, sandbox);
    let address = format!("unix://{}", path.display());
    let failed = |source| BootstrapError::Socket { path: path.clone(), source };
    if let Role::Member { sandbox } = &role {
        // Whether the sandbox takes it is for its shim to say.
        UnixStream::connect(&path)
            .map_err(|source| BootstrapError::NoSandbox { sandbox: sandbox.clone(), source })?;
        write_address(&address).map_err(address_failed)?;
        return answer(&address, params.protocol).map(|()| None);
    }
    // Both processes have it, whoever binds it.
    let listener = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|error| failed(error.into()))?;
    let (ours, theirs) = UnixStream::pair().map_err(BootstrapError::Fork)?;
    if std::env::var_os(SCHED_CORE).is_some_and(|value| !value.is_empty()) {
        share_cores_with_nobody().map_err(BootstrapError::CoreScheduling)?;
    }
    let serving = match daemonize()? {
        ForkResult::Child => {
            drop(ours);
            if !takes_over(theirs) {
                remove_bound(&listener, &path);
                return Ok(None);
            }
            return Ok(Some(Serve {
                listener: listener.into(),
                socket: path,
                namespace: flags.namespace.clone(),
                id: flags.id.clone(),
                events_address: params.events_address,
                debug: flags.debug,
            }));
        }
        ForkResult::Parent { child } => child,
    };
    drop(theirs);
    let answered = serve_at(&path, &listener, &address, params.protocol, ours);
    if answered.is_err() {
        remove_bound(&listener, &path);
    }
    if !matches!(answered, Ok(true)) {
        // It ends, as nobody said that it shall serve, and has no listener that the next one could find.
        let _ = waitpid(serving, None);
    }
    answered.map(|_| None)
}

/// What containerd waits for: it is answered, and the serving process has taken over, which is true where
/// none of this name served before.
fn serve_at(
    path: &Path,
    listener: &OwnedFd,
    address: &str,
    protocol: Protocol,
    mut serving: UnixStream,
) -> Result<bool, BootstrapError> {
    let failed = |source| BootstrapError::Socket { path: path.to_owned(), source };
    if !listen_at(path, listener).map_err(failed)? {
        answer(address, protocol)?;
        return Ok(false);
    }
    fault::point("start: listening");
    write_address(address).map_err(address_failed)?;
    fault::point("start: address written");
    answer(address, protocol)?;
    fault::point("start: answered");
    // containerd calls when this process has ended, and tells nobody to remove what it cannot call.
    serving.write_all(&[0]).and_then(|()| serving.read_exact(&mut [0])).map_err(BootstrapError::Ended)?;
    Ok(true)
}

/// Whether containerd was answered, and has heard that this process serves; false where the process that was
/// to say so has ended.
fn takes_over(mut answering: UnixStream) -> bool {
    if answering.read_exact(&mut [0]).is_err() {
        return false;
    }
    fault::point("start: the serving process");
    answering.write_all(&[0]).is_ok()
}

/// Removes the socket at `path` where it is this one.
fn remove_bound(listener: &OwnedFd, path: &Path) {
    let bound = getsockname::<UnixAddr>(listener.as_raw_fd());
    if bound.is_ok_and(|address| address.path() == Some(path)) {
        let _ = std::fs::remove_file(path);
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

/// Has `listener` listen at `path`; false where another one does already.
fn listen_at(path: &Path, listener: &OwnedFd) -> io::Result<bool> {
    if let Some(dir) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o711).create(dir)?;
    }
    let address = UnixAddr::new(path)?;
    match bind(listener.as_raw_fd(), &address) {
        Err(Errno::EADDRINUSE) => {
            if UnixStream::connect(path).is_ok() {
                return Ok(false);
            }
            std::fs::remove_file(path)?;
            bind(listener.as_raw_fd(), &address)?;
        }
        bound => bound?,
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listen(listener, Backlog::MAXCONN)?;
    Ok(true)
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

/// Has no thread of others run beside one of this process's, or of those it starts, on the same core at the same
/// time (Documentation/admin-guide/hw-vuln/core-scheduling.rst): a sandbox is one such group.
fn share_cores_with_nobody() -> io::Result<()> {
    let (this, unused) = (0, 0);
    // SAFETY: PR_SCHED_CORE_CREATE takes numbers and, for this request, no place to write to.
    let made = unsafe {
        libc::prctl(
            libc::PR_SCHED_CORE,
            libc::PR_SCHED_CORE_CREATE,
            this,
            libc::PR_SCHED_CORE_SCOPE_THREAD_GROUP,
            unused,
        )
    };
    match Errno::result(made) {
        // Cores of one thread each are nobody else's anyway.
        Ok(_) | Err(Errno::ENODEV) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn answer(address: &str, protocol: Protocol) -> Result<(), BootstrapError> {
    const TASK_API_VERSION: i32 = 3;
    /// The field `extensions` of the answer, which this version of the protocol's crate does not have.
    const EXTENSIONS: u32 = 6;
    let text = match protocol {
        Protocol::Address => address.as_bytes().to_vec(),
        Protocol::Message => {
            let mut result = BootstrapResult {
                version: TASK_API_VERSION,
                address: address.to_owned(),
                protocol: "ttrpc".into(),
                ..Default::default()
            };
            let encoded = features::mount_capabilities().and_then(|extension| {
                result.special_fields.mut_unknown_fields().add_length_delimited(EXTENSIONS, extension);
                result.write_to_bytes()
            });
            encoded.map_err(|error| BootstrapError::Input(error.into()))?
        }
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

    fn listener() -> OwnedFd {
        socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap()
    }

    #[test]
    fn a_socket_nobody_listens_on_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s/socket");
        let first = listener();
        assert!(listen_at(&path, &first).unwrap());
        assert!(!listen_at(&path, &listener()).unwrap());
        drop(first);
        let second = listener();
        assert!(listen_at(&path, &second).unwrap());
        // Only by who has bound it.
        remove_bound(&listener(), &path);
        assert!(path.exists());
        remove_bound(&second, &path);
        assert!(!path.exists());
    }

    #[test]
    fn who_ends_before_it_has_answered_is_noticed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        assert!(!takes_over(theirs));
        // It has answered, and ends before it hears that anybody serves.
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&[0]).unwrap();
        drop(ours);
        assert!(!takes_over(theirs));
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&[0]).unwrap();
        assert!(takes_over(theirs));
        ours.read_exact(&mut [0]).unwrap();
    }
}
