//! What lies around a container's volumes in its machine's shares: none of it is
//! the guest's to change, and nothing the guest makes in a volume may lead the host
//! anywhere.
//!
//! Runs in a privileged container, whose shares it takes away from its kernel:
//! `skeleton DIRECTORY`, a directory of the host that links are made to.

use crate::Result;
use crate::fuse::{self, ROOT, Share, opcode, words};
use crate::memory::{self, Memory};
use crate::out::say;

/// How deep the skeleton is: the share's root, a container's directory, its volumes.
const DEPTH: usize = 3;

pub fn run(arguments: &[String]) -> Result<()> {
    let [host] = arguments else { return Err("which directory of the host?".into()) };
    memory::keep_all()?;
    let mut memory = Memory::new()?;
    let mut said = Vec::new();
    for (tag, mut share) in fuse::shares(&mut memory)? {
        said.push(format!("tag {tag}"));
        walk(&mut share, ROOT, "", host, DEPTH, &mut said)?;
    }
    say(&said.join("\n"));
    Ok(())
}

/// Tries everything in a directory, then in those below it.
fn walk(
    share: &mut Share,
    node: u64,
    path: &str,
    host: &str,
    depth: usize,
    said: &mut Vec<String>,
) -> Result<()> {
    let names = share.list(node)?;
    let what = if names.iter().any(|name| name == "rw-marker") {
        "volume"
    } else if names.iter().any(|name| name == "ro-marker") {
        "read-only"
    } else {
        "skeleton"
    };
    for (name, request) in requests(host, &names) {
        let answer = match request {
            Request::Plain(opcode, body) => share.ask(opcode, node, &body)?,
            Request::Link(target) => {
                let target = share.look_up(node, &target)?.unwrap_or(ROOT);
                let body = [target.to_le_bytes().as_slice(), b"linked\0"].concat();
                share.ask(opcode::LINK, node, &body)?
            }
        };
        if answer.is_ok() {
            said.push(format!("did {name} in a {what}"));
        }
    }
    // Names that are paths.
    for name in ["..", "../..", "../../../../etc", "/etc", "./x", "mounts/"] {
        if share.look_up(node, name)?.is_ok() {
            said.push(format!("found {name} in a {what}"));
        }
    }
    if depth > 1 && what == "skeleton" {
        for name in names {
            if let Ok(child) = share.look_up(node, &name)? {
                // A file that is a mount has no entries.
                let _ = walk(share, child, &format!("{path}/{name}"), host, depth - 1, said);
            }
        }
    }
    Ok(())
}

enum Request {
    Plain(u32, Vec<u8>),
    /// A hard link to what has this name.
    Link(String),
}

/// All that changes a directory.
fn requests(host: &str, names: &[String]) -> Vec<(&'static str, Request)> {
    let name = |name: &str| [name.as_bytes(), b"\0"].concat();
    let with = |numbers: &[u32], of: &str| [words(numbers), name(of)].concat();
    let mut requests = vec![
        ("MKDIR", Request::Plain(opcode::MKDIR, with(&[0o777, 0], "x"))),
        ("SYMLINK", Request::Plain(opcode::SYMLINK, [name("mounts"), name(host)].concat())),
        ("MKNOD", Request::Plain(opcode::MKNOD, with(&[0o100_666, 0, 0, 0], "node"))),
        ("CREATE", Request::Plain(opcode::CREATE, with(&[0o102, 0o666, 0, 0], "file"))),
        ("TMPFILE", Request::Plain(opcode::TMPFILE, with(&[0o20_200_002, 0o666, 0, 0], ""))),
        ("SETXATTR", Request::Plain(opcode::SETXATTR, [words(&[1, 0]), name("user.x"), vec![1]].concat())),
        ("SETATTR", Request::Plain(opcode::SETATTR, mode(0o40_777))),
    ];
    if let Some(first) = names.iter().find(|name| !name.ends_with("-marker")) {
        let moved = [ROOT.to_le_bytes().to_vec(), name(first), name("moved")].concat();
        requests.push(("LINK", Request::Link(first.clone())));
        requests.push(("RENAME", Request::Plain(opcode::RENAME, moved)));
        requests.push(("UNLINK", Request::Plain(opcode::UNLINK, name(first))));
        requests.push(("RMDIR", Request::Plain(opcode::RMDIR, name(first))));
    }
    requests
}

/// The body of a SETATTR of the mode.
fn mode(mode: u32) -> Vec<u8> {
    const FATTR_MODE: u32 = 1;
    let mut body = vec![0; 88];
    body[..4].copy_from_slice(&FATTR_MODE.to_le_bytes());
    body[68..72].copy_from_slice(&mode.to_le_bytes());
    body
}
