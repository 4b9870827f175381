//! A layer of an OCI image: a tar archive that differs only when its content does.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use tar::{Builder, EntryType, Header};

/// The files of a layer. Paths are relative to the root (`etc/passwd`);
/// directories leading to them are made as needed, root's, mode 0755.
#[derive(Clone, Debug, Default)]
pub struct Layer {
    entries: BTreeMap<String, Entry>,
}

/// One file of a layer.
#[derive(Clone, Debug)]
pub struct Entry {
    kind: Kind,
    mode: u32,
    owner: (u32, u32),
    xattrs: BTreeMap<String, Vec<u8>>,
}

#[derive(Clone, Debug)]
enum Kind {
    Dir,
    File(Vec<u8>),
    Symlink(String),
    HardLink(String),
    Fifo,
    Char(u32, u32),
}

impl Entry {
    /// Sets user and group. Root's otherwise.
    pub fn owner(&mut self, uid: u32, gid: u32) -> &mut Self {
        self.owner = (uid, gid);
        self
    }

    /// Sets an extended attribute, such as `user.comment`.
    pub fn xattr(&mut self, name: impl Into<String>, value: impl Into<Vec<u8>>) -> &mut Self {
        self.xattrs.insert(name.into(), value.into());
        self
    }
}

impl Layer {
    /// A layer with nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// A directory.
    pub fn dir(&mut self, path: &str, mode: u32) -> &mut Entry {
        self.add(path, Kind::Dir, mode)
    }

    /// A regular file.
    pub fn file(&mut self, path: &str, mode: u32, content: impl Into<Vec<u8>>) -> &mut Entry {
        self.add(path, Kind::File(content.into()), mode)
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: impl Into<String>) -> &mut Entry {
        self.add(path, Kind::Symlink(target.into()), 0o777)
    }

    /// A hard link to a file of this layer, named by its path in the layer.
    pub fn hard_link(&mut self, path: &str, target: impl Into<String>) -> &mut Entry {
        self.add(path, Kind::HardLink(target.into()), 0o755)
    }

    /// A named pipe.
    pub fn fifo(&mut self, path: &str, mode: u32) -> &mut Entry {
        self.add(path, Kind::Fifo, mode)
    }

    /// A character device.
    pub fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> &mut Entry {
        self.add(path, Kind::Char(major, minor), mode)
    }

    /// Hides what lower layers have at `path` (OCI image specification, layer.md, "Whiteouts").
    pub fn whiteout(&mut self, path: &str) -> &mut Entry {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        let marker = format!("{dir}/.wh.{name}");
        self.file(marker.trim_start_matches('/'), 0o644, [])
    }

    /// Hides everything lower layers have below the directory `path` (the same, "Opaque Whiteout").
    pub fn opaque(&mut self, path: &str) -> &mut Entry {
        self.file(&format!("{path}/.wh..wh..opq"), 0o644, [])
    }

    fn add(&mut self, path: &str, kind: Kind, mode: u32) -> &mut Entry {
        let mut end = 0;
        while let Some(slash) = path[end..].find('/') {
            end += slash;
            self.entries.entry(path[..end].to_owned()).or_insert_with(|| Entry {
                kind: Kind::Dir,
                mode: 0o755,
                owner: (0, 0),
                xattrs: BTreeMap::new(),
            });
            end += 1;
        }
        let entry = Entry { kind, mode, owner: (0, 0), xattrs: BTreeMap::new() };
        self.entries.entry(path.to_owned()).insert_entry(entry).into_mut()
    }

    /// The layer as an uncompressed tar archive: sorted, times 0, hard links
    /// after everything they may point to.
    pub fn tar(&self) -> io::Result<Vec<u8>> {
        let mut tar = Builder::new(Vec::new());
        let is_link = |entry: &Entry| matches!(entry.kind, Kind::HardLink(_));
        for links in [false, true] {
            for (path, entry) in self.entries.iter().filter(|(_, entry)| is_link(entry) == links) {
                entry.append(path, &mut tar)?;
            }
        }
        tar.into_inner()
    }
}

impl Entry {
    fn append(&self, path: &str, tar: &mut Builder<Vec<u8>>) -> io::Result<()> {
        let mut header = Header::new_ustar();
        header.set_mode(self.mode);
        header.set_uid(self.owner.0.into());
        header.set_gid(self.owner.1.into());
        header.set_mtime(0);
        let (kind, content, link) = match &self.kind {
            Kind::Dir => (EntryType::Directory, &[][..], None),
            Kind::File(content) => (EntryType::Regular, content.as_slice(), None),
            Kind::Symlink(target) => (EntryType::Symlink, &[][..], Some(target)),
            Kind::HardLink(target) => (EntryType::Link, &[][..], Some(target)),
            Kind::Fifo => (EntryType::Fifo, &[][..], None),
            Kind::Char(major, minor) => {
                header.set_device_major(*major)?;
                header.set_device_minor(*minor)?;
                (EntryType::Char, &[][..], None)
            }
        };
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);

        // What the header has no room for goes into a pax record before it.
        let mut pax: Vec<(String, &[u8])> = self
            .xattrs
            .iter()
            .map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.as_slice()))
            .collect();
        if header.set_path(path).is_err() {
            header.set_path("long")?;
            pax.push(("path".into(), path.as_bytes()));
        }
        if let Some(target) = link
            && header.set_link_name_literal(target).is_err()
        {
            header.set_link_name_literal("long")?;
            pax.push(("linkpath".into(), target.as_bytes()));
        }
        tar.append_pax_extensions(pax.iter().map(|(name, value)| (name.as_str(), *value)))?;
        header.set_cksum();
        tar.append(&header, content)
    }
}

/// A root file system of one program: Debian's static busybox under the name of
/// each of its applets, with root and an ordinary user. Hard links, since
/// a symbolic link would be followed by tests that put something over a program.
pub fn busybox(program: &Path) -> Result<Layer> {
    let output = Command::new(program).arg("--list").output().context("run busybox")?;
    if !output.status.success() {
        bail!("{} --list failed ({})", program.display(), output.status);
    }
    let mut layer = Layer::new();
    layer.file("bin/busybox", 0o755, std::fs::read(program)?);
    for applet in String::from_utf8(output.stdout)?.split_whitespace().filter(|name| *name != "busybox") {
        layer.hard_link(&format!("bin/{applet}"), "bin/busybox");
    }
    for dir in ["dev", "etc", "home", "mnt", "proc", "run", "sys", "usr/bin", "usr/sbin", "sbin", "var/log"] {
        layer.dir(dir, 0o755);
    }
    layer.dir("root", 0o700);
    layer.dir("tmp", 0o1777);
    layer.dir("home/user", 0o755).owner(1000, 1000);
    layer.file(
        "etc/passwd",
        0o644,
        "root:x:0:0:root:/root:/bin/sh\n\
         user:x:1000:1000:an ordinary user:/home/user:/bin/sh\n\
         nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    );
    layer.file("etc/group", 0o644, "root:x:0:\nuser:x:1000:\nextra:x:2000:user\nnogroup:x:65534:\n");
    layer.file("etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n");
    Ok(layer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// Path, type, mode, uid, size, link of every entry.
    fn listing(tar: &[u8]) -> Vec<(String, EntryType, u32, u64, u64, Option<String>)> {
        tar::Archive::new(tar)
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let header = entry.header();
                assert_eq!(header.mtime().unwrap(), 0);
                (
                    entry.path().unwrap().display().to_string(),
                    header.entry_type(),
                    header.mode().unwrap(),
                    header.uid().unwrap(),
                    header.size().unwrap(),
                    entry.link_name().unwrap().map(|link| link.display().to_string()),
                )
            })
            .collect()
    }

    #[test]
    fn order_of_adding_does_not_matter() {
        let mut one = Layer::new();
        one.file("a/b/c", 0o644, "c");
        one.dir("a", 0o700);
        one.hard_link("a/a", "a/b/c");
        let mut two = Layer::new();
        two.hard_link("a/a", "a/b/c");
        two.dir("a", 0o700);
        two.file("a/b/c", 0o644, "c");
        assert_eq!(one.tar().unwrap(), two.tar().unwrap());

        let expected = [
            ("a".into(), EntryType::Directory, 0o700, 0, 0, None),
            ("a/b".into(), EntryType::Directory, 0o755, 0, 0, None),
            ("a/b/c".into(), EntryType::Regular, 0o644, 0, 1, None),
            ("a/a".into(), EntryType::Link, 0o755, 0, 0, Some("a/b/c".into())),
        ];
        assert_eq!(listing(&one.tar().unwrap()), expected);
    }

    #[test]
    fn a_directory_added_late_keeps_what_it_has() {
        let mut layer = Layer::new();
        layer.file("d/f", 0o644, "x");
        layer.dir("d", 0o711).owner(7, 7);
        let paths = listing(&layer.tar().unwrap());
        assert_eq!(paths[0], ("d".into(), EntryType::Directory, 0o711, 7, 0, None));
        assert_eq!(paths.len(), 2);
    }

    #[test]
    fn whiteouts_have_their_names() {
        let mut layer = Layer::new();
        layer.whiteout("top");
        layer.whiteout("etc/passwd");
        layer.opaque("var/lib");
        let paths: Vec<_> = listing(&layer.tar().unwrap()).into_iter().map(|entry| entry.0).collect();
        assert_eq!(paths, [".wh.top", "etc", "etc/.wh.passwd", "var", "var/lib", "var/lib/.wh..wh..opq"]);
    }

    #[test]
    fn long_paths_and_attributes() {
        let path = format!("{}/{}", "d".repeat(150), "f".repeat(150));
        let mut layer = Layer::new();
        layer.file(&path, 0o644, "content").xattr("user.key", "value");
        let tar = layer.tar().unwrap();
        let mut archive = tar::Archive::new(tar.as_slice());
        let mut file = archive.entries().unwrap().map(Result::unwrap).find(|entry| entry.size() > 0).unwrap();
        assert_eq!(file.path().unwrap().to_str(), Some(path.as_str()));
        let mut content = String::new();
        file.read_to_string(&mut content).unwrap();
        assert_eq!(content, "content");
        let attributes: Vec<_> = file
            .pax_extensions()
            .unwrap()
            .unwrap()
            .map(|pair| pair.map(|pair| (pair.key().unwrap().to_owned(), pair.value().unwrap().to_owned())))
            .collect::<Result<_, _>>()
            .unwrap();
        assert!(attributes.contains(&("SCHILY.xattr.user.key".into(), "value".into())), "{attributes:?}");
    }
}
