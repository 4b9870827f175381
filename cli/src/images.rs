//! `rvmctl images`: the image files of this host.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rvm_shim::image::{self, Image};
use serde::Serialize;

/// One line of the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Of its disk in the guests that have it.
    pub serial: String,
    /// What it takes of the host's disk.
    pub bytes: u64,
    /// Where it is.
    pub path: PathBuf,
}

/// The images that are there.
pub fn rows(cache_dir: &Path) -> Vec<Row> {
    let row = |Image { path, serial }| {
        let found = fs::metadata(&path).ok()?;
        Some(Row { serial, bytes: found.blocks() * 512, path })
    };
    image::list(cache_dir).into_iter().filter_map(row).collect()
}

/// As a table with a line of headings.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!("{:<20}  {:>9}  FILE\n", "SERIAL", "MIB");
    for Row { serial, bytes, path } in rows {
        text += &format!("{serial:<20}  {:>9.1}  {}\n", *bytes as f64 / f64::from(1 << 20), path.display());
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
        let rows = rows(cache.path());
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].serial.as_str(), &rows[0].path), ("img-1", &file));
        assert!(table(&rows).lines().nth(1).is_some_and(|line| line.starts_with("img-1 ")));
    }
}
