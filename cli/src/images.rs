//! `rvmctl images`: the image files of this host.

use std::{fs, os::unix::fs::MetadataExt, path::PathBuf};

use rvm_shim::{
    config::Config,
    image::{self, Blob},
};
use serde::Serialize;

/// One line of the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Its name in the guests that have it.
    pub serial: String,
    /// What it is to them: `memory` (virtio-pmem), where they can have that, or a `disk`.
    pub seen_as: &'static str,
    /// What it takes of the host's disk.
    pub bytes: u64,
    /// Where it is.
    pub path: PathBuf,
}

/// The images that are there.
pub fn rows(config: &Config) -> Vec<Row> {
    let row = |Blob { path, serial, as_memory, .. }| {
        let found = fs::metadata(&path).ok()?;
        let seen_as = if as_memory { "memory" } else { "disk" };
        Some(Row { serial, seen_as, bytes: found.blocks() * 512, path })
    };
    image::list(&config.images, &config.host.cache_dir).into_iter().filter_map(row).collect()
}

/// As a table with a line of headings.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!("{:<20}  {:<6}  {:>9}  FILE\n", "SERIAL", "AS", "MIB");
    for Row { serial, seen_as, bytes, path } in rows {
        let mib = *bytes as f64 / f64::from(1 << 20);
        text += &format!("{serial:<20}  {seen_as:<6}  {mib:>9.1}  {}\n", path.display());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_what_is_there() {
        let cache = tempfile::tempdir().unwrap();
        let index = cache.path().join(image::INDEX);
        fs::create_dir(&index).unwrap();
        let file = cache.path().join("rvm-image-1");
        fs::write(&file, [1; 8192]).unwrap();
        for (name, target) in [("img-1", &file), ("img-2", &cache.path().join("gone"))] {
            std::os::unix::fs::symlink(target, index.join(name)).unwrap();
        }
        fs::write(index.join("lock"), "").unwrap();
        let mut config = Config::parse("", "none").unwrap();
        config.host.cache_dir = cache.path().to_owned();
        let listed = rows(&config);
        config.images.memory_limit_bytes = 8191;
        assert_eq!((listed[0].seen_as, rows(&config)[0].seen_as), ("memory", "disk"));
        let rows = listed;
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].serial.as_str(), &rows[0].path), ("img-1", &file));
        assert!(table(&rows).lines().nth(1).is_some_and(|line| line.starts_with("img-1 ")));
    }
}
