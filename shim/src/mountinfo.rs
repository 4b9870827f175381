//! What is mounted where, as this process sees it: proc_pid_mountinfo(5).

use std::{
    ffi::OsString,
    fs,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// A mount.
#[derive(Debug, PartialEq, Eq)]
pub struct Mounted {
    /// `MAJOR:MINOR` of its file system.
    pub device: String,
    /// What of that is mounted.
    pub root: PathBuf,
    /// Where.
    pub place: PathBuf,
    /// Its flags, separated by commas.
    pub flags: String,
}

/// All mounts, in the order they were made in.
#[derive(Debug, Default)]
pub struct MountTable(Vec<Mounted>);

impl MountTable {
    /// As it is now; empty where it cannot be read.
    pub fn read() -> Self {
        Self::parse(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
    }

    /// Lines that are none are passed over.
    pub fn parse(mountinfo: &str) -> Self {
        let mounted = |line: &str| {
            let mut fields = line.trim_start().split(' ').skip(2);
            let (device, root, place, flags) =
                (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
            Some(Mounted {
                device: device.to_owned(),
                root: unescape(root),
                place: unescape(place),
                flags: flags.to_owned(),
            })
        };
        Self(mountinfo.lines().filter_map(mounted).collect())
    }

    /// All of them.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Mounted> {
        self.0.iter()
    }

    /// Those at and below `dir`.
    pub fn within(&self, dir: &Path) -> impl DoubleEndedIterator<Item = &Mounted> {
        self.iter().filter(move |mounted| mounted.place.starts_with(dir))
    }

    /// The mount that `path`, which is canonical, is on, and its path in that file system.
    pub fn holding(&self, path: &Path) -> Option<(&Mounted, PathBuf)> {
        // Of two at one place the later covers the earlier.
        let mounted = self
            .iter()
            .filter(|mounted| path.starts_with(&mounted.place))
            .max_by_key(|mounted| mounted.place.components().count())?;
        let inside = mounted.root.join(path.strip_prefix(&mounted.place).ok()?);
        // A trailing slash comes of joining nothing.
        Some((mounted, inside.components().collect()))
    }
}

/// Spaces and the like are octal there: a backslash and three digits.
fn unescape(field: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((first, others)) = rest.split_first() {
        let code = others
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = others.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = others;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_on_the_innermost_and_latest_mount() {
        let table = MountTable::parse(
            "30 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
             31 30 8:1 /srv/data /v rw - ext4 /dev/sda1 rw\n\
             32 31 0:41 / /v/with\\040space ro - tmpfs tmpfs rw\n\
             33 31 0:42 / /v/with\\040space ro - tmpfs tmpfs rw\n\
             torn\n",
        );
        let of = |path: &str| {
            let (mounted, inside) = table.holding(Path::new(path)).unwrap();
            format!("{} {}", mounted.device, inside.display())
        };
        assert_eq!(of("/v"), "8:1 /srv/data");
        assert_eq!(of("/v/a/b"), "8:1 /srv/data/a/b");
        assert_eq!(of("/vv"), "8:1 /vv");
        assert_eq!(of("/v/with space/x"), "0:42 /x");
        let within: Vec<_> = table.within(Path::new("/v")).map(|mounted| mounted.device.as_str()).collect();
        assert_eq!(within, ["8:1", "0:41", "0:42"]);
    }
}
