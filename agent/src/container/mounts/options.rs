//! The `options` of a mount in an OCI spec, understood as runc does.

use nix::mount::MsFlags;

use crate::sys::mount::Attributes;

/// Options sorted by what the kernel does with them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Of the mount itself.
    pub attributes: Attributes,
    /// Of the mount and all below it (`rro` and the like).
    pub recursive: Attributes,
    /// Propagation, after the mount is in place: `MS_*`, and whether of all below too.
    pub propagation: Vec<(u64, bool)>,
    /// For the file system, `key` or `key=value`; a bind mount ignores them.
    pub data: Vec<(String, Option<String>)>,
    /// `Some`: a bind mount; `Some(true)`: with all mounts below.
    pub bind: Option<bool>,
    /// Changes the mount that is there instead of making one.
    pub remount: bool,
    /// A new tmpfs begins with what it covers.
    pub copy_up: bool,
    /// The mount's ids are mapped, which for what comes from the share the host
    /// has done.
    pub idmap: bool,
}

impl Options {
    /// Understands a list of options. The error is the option that is refused
    /// and why.
    pub fn parse(options: &[String]) -> Result<Self, String> {
        let mut parsed = Self::default();
        for option in options {
            if option.contains('\0') {
                return Err(format!("{option:?} must not contain NUL"));
            }
            if !(parsed.keyword(option)? || parsed.attribute(option)) {
                let (key, value) = match option.split_once('=') {
                    Some((key, value)) => (key, Some(value.to_owned())),
                    None => (option.as_str(), None),
                };
                parsed.data.push((key.to_owned(), value));
            }
        }
        Ok(parsed)
    }

    /// Options that are neither attributes nor data.
    fn keyword(&mut self, option: &str) -> Result<bool, String> {
        match option {
            "bind" => self.bind = Some(self.bind.unwrap_or(false)),
            "rbind" => self.bind = Some(true),
            // Nothing to do: the default, or only told to mount(8).
            "" | "defaults" | "async" | "nomand" | "nolazytime" | "loud" | "silent" | "nofail" | "noauto" => {
            }
            // Flags of the file system, spelled as keys by fsconfig(2).
            "sync" | "dirsync" | "lazytime" | "mand" => self.data.push((option.to_owned(), None)),
            "remount" => self.remount = true,
            "tmpcopyup" => self.copy_up = true,
            "idmap" | "ridmap" => self.idmap = true,
            _ => match propagation(option) {
                Some(propagation) => self.propagation.push(propagation),
                None => return Ok(false),
            },
        }
        Ok(true)
    }

    /// Options of the mount; with a leading `r`, of all mounts below as well.
    fn attribute(&mut self, option: &str) -> bool {
        let (change, recursive) = match (attribute(option), option.strip_prefix('r').and_then(attribute)) {
            (Some(change), _) => (change, false),
            (None, Some(change)) => (change, true),
            (None, None) => return false,
        };
        let target = if recursive { &mut self.recursive } else { &mut self.attributes };
        // The last one wins; the access time field is always cleared as a whole.
        target.set = (target.set & !change.clear) | change.set;
        target.clear = (target.clear & (!change.set | libc::MOUNT_ATTR__ATIME)) | change.clear;
        true
    }

    /// Whether the mount is to be read-only.
    pub fn read_only(&self) -> bool {
        (self.attributes.set | self.recursive.set) & libc::MOUNT_ATTR_RDONLY != 0
    }
}

fn propagation(option: &str) -> Option<(u64, bool)> {
    let (name, recursive) = match option {
        "rprivate" | "rshared" | "rslave" | "runbindable" => (&option[1..], true),
        _ => (option, false),
    };
    let flag = match name {
        "private" => MsFlags::MS_PRIVATE,
        "shared" => MsFlags::MS_SHARED,
        "slave" => MsFlags::MS_SLAVE,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    };
    Some((flag.bits(), recursive))
}

fn attribute(option: &str) -> Option<Attributes> {
    let set = |set| Attributes { set, ..Attributes::default() };
    let clear = |clear| Attributes { clear, ..Attributes::default() };
    // The kernel wants the whole access time field cleared to set any of it.
    let atime = |set| Attributes { set, clear: libc::MOUNT_ATTR__ATIME, ..Attributes::default() };
    Some(match option {
        "ro" => set(libc::MOUNT_ATTR_RDONLY),
        "rw" => clear(libc::MOUNT_ATTR_RDONLY),
        "nosuid" => set(libc::MOUNT_ATTR_NOSUID),
        "suid" => clear(libc::MOUNT_ATTR_NOSUID),
        "nodev" => set(libc::MOUNT_ATTR_NODEV),
        "dev" => clear(libc::MOUNT_ATTR_NODEV),
        "noexec" => set(libc::MOUNT_ATTR_NOEXEC),
        "exec" => clear(libc::MOUNT_ATTR_NOEXEC),
        "nodiratime" => set(libc::MOUNT_ATTR_NODIRATIME),
        "diratime" => clear(libc::MOUNT_ATTR_NODIRATIME),
        "nosymfollow" => set(libc::MOUNT_ATTR_NOSYMFOLLOW),
        "symfollow" => clear(libc::MOUNT_ATTR_NOSYMFOLLOW),
        "relatime" | "atime" | "nostrictatime" => atime(libc::MOUNT_ATTR_RELATIME),
        "noatime" => atime(libc::MOUNT_ATTR_NOATIME),
        "strictatime" | "norelatime" => atime(libc::MOUNT_ATTR_STRICTATIME),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Options {
        Options::parse(&options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn the_options_of_a_default_spec() {
        let dev = parse(&["nosuid", "strictatime", "mode=755", "size=65536k"]);
        assert_eq!(dev.attributes.set, libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_STRICTATIME);
        assert_eq!(dev.attributes.clear, libc::MOUNT_ATTR__ATIME);
        assert_eq!(dev.data, [("mode".into(), Some("755".into())), ("size".into(), Some("65536k".into()))]);

        let pts = parse(&["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]);
        assert_eq!(pts.data[0], ("newinstance".into(), None));
        assert_eq!(pts.bind, None);

        let hosts = parse(&["rbind", "rprivate", "ro"]);
        assert_eq!(hosts.bind, Some(true));
        assert_eq!(hosts.propagation, [(MsFlags::MS_PRIVATE.bits(), true)]);
        assert!(hosts.read_only() && hosts.data.is_empty());
        assert_eq!(hosts.recursive, Attributes::default());
    }

    #[test]
    fn the_last_of_two_opposites_wins() {
        let options = parse(&["ro", "rw", "nodev", "dev", "nodev"]);
        assert_eq!(options.attributes.set, libc::MOUNT_ATTR_NODEV);
        assert_eq!(options.attributes.clear, libc::MOUNT_ATTR_RDONLY);
        let options = parse(&["noatime", "relatime"]);
        assert_eq!(options.attributes.set, libc::MOUNT_ATTR_RELATIME);
        let options = parse(&["relatime", "noatime"]);
        assert_eq!(
            (options.attributes.set, options.attributes.clear),
            (libc::MOUNT_ATTR_NOATIME, libc::MOUNT_ATTR__ATIME)
        );
    }

    #[test]
    fn a_leading_r_means_everything_below_except_where_it_is_a_name() {
        let options = parse(&["rro", "rnosuid", "relatime", "rw"]);
        assert_eq!(options.recursive.set, libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID);
        assert_eq!(options.attributes.clear & libc::MOUNT_ATTR_RDONLY, libc::MOUNT_ATTR_RDONLY);
        assert!(options.data.is_empty());
    }

    #[test]
    fn what_is_neither_attribute_nor_data() {
        let options = parse(&["remount", "tmpcopyup", "ridmap", "nofail"]);
        assert!(options.remount && options.copy_up && options.idmap && options.data.is_empty());
        assert!(Options::parse(&["a\0b".to_owned()]).is_err());
    }
}
