//! One layer as several.

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::{Component, PathBuf};

use anyhow::{Context, Result, ensure};
use tar::{Archive, Builder, EntryType};

use crate::image::Image;

/// The image `name` with the content of an archive's only layer in `count` layers of
/// about equal size.
pub fn archive_of_layers(archive: &[u8], name: &str, count: usize) -> Result<Vec<u8>> {
    // Of the blobs of an image of one layer, that layer is the largest.
    let mut layer = Vec::new();
    for entry in Archive::new(archive).entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        if path.starts_with("blobs") && entry.size() > layer.len() as u64 {
            layer.clear();
            entry.read_to_end(&mut layer).with_context(|| format!("read {}", path.display()))?;
        }
    }
    ensure!(!layer.is_empty(), "the archive has no layer");
    Image::of_tars(name, split(&layer, count)?).archive()
}

/// The entries of a tar archive in `count` archives of about equal size, in their
/// order. A hard link stays with the file it is another name of.
pub fn split(tar: &[u8], count: usize) -> io::Result<Vec<Vec<u8>>> {
    let mut layers: Vec<Builder<Vec<u8>>> = (0..count).map(|_| Builder::new(Vec::new())).collect();
    let mut places: HashMap<PathBuf, usize> = HashMap::new();
    for entry in Archive::new(tar).entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        if path.components().all(|part| part == Component::CurDir) {
            // The root, which every image has.
            continue;
        }
        let target = entry.link_name()?.map(|target| target.into_owned());
        let by_position = entry.raw_header_position() as usize * count / tar.len().max(1);
        let is_hard_link = entry.header().entry_type() == EntryType::Link;
        let place = match &target {
            Some(target) if is_hard_link => places.get(target).copied().unwrap_or(by_position),
            _ => by_position,
        };
        let layer = &mut layers[place];
        // Extended attributes, and whatever else stands in extensions of the header.
        let extensions: Vec<(String, Vec<u8>)> = match entry.pax_extensions()? {
            Some(all) => all
                .map(|one| {
                    one.map(|one| (one.key().unwrap_or_default().to_owned(), one.value_bytes().to_vec()))
                })
                .filter(|one| one.as_ref().map_or(true, |(key, _)| key.starts_with("SCHILY.xattr.")))
                .collect::<io::Result<_>>()?,
            None => Vec::new(),
        };
        layer
            .append_pax_extensions(extensions.iter().map(|(key, value)| (key.as_str(), value.as_slice())))?;
        let mut header = entry.header().clone();
        match target {
            Some(target) => layer.append_link(&mut header, &path, target)?,
            None => layer.append_data(&mut header, &path, &mut entry)?,
        }
        places.insert(path, place);
    }
    layers.into_iter().map(Builder::into_inner).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Layer;

    #[test]
    fn every_entry_is_in_one_layer_and_hard_links_find_their_files() -> Result<()> {
        let mut layer = Layer::new();
        layer.dir("d", 0o755);
        let long = "n".repeat(150);
        for n in 0..20 {
            layer.file(&format!("d/{long}{n}"), 0o644, vec![b'x'; 4096]).xattr("user.n", b"v".to_vec());
        }
        layer.hard_link("d/last", format!("d/{long}0"));
        let layers = split(&layer.tar()?, 5)?;
        assert_eq!(layers.len(), 5);
        let mut names = Vec::new();
        for (n, tar) in layers.iter().enumerate() {
            for entry in Archive::new(tar.as_slice()).entries()? {
                let mut entry = entry?;
                let path = entry.path()?.display().to_string();
                if path == "d/last" {
                    assert_eq!(n, 0);
                } else if path != "d" && path != "d/" {
                    let mut content = Vec::new();
                    entry.read_to_end(&mut content)?;
                    assert_eq!(content.len(), 4096);
                    let extensions = entry.pax_extensions()?.into_iter().flatten();
                    assert_eq!(
                        extensions
                            .filter(|one| one
                                .as_ref()
                                .is_ok_and(|one| one.key() == Ok("SCHILY.xattr.user.n")))
                            .count(),
                        1
                    );
                }
                names.push(path);
            }
        }
        assert_eq!(names.len(), 22);
        Ok(())
    }
}
