//! OCI image archives: an image layout (OCI image specification 1.0,
//! image-layout.md) in a tar, as `ctr images import` takes it. Docker's own
//! `manifest.json` beside it makes it one for `docker load` too.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use crate::layer::Layer;

/// An image: layers from the lowest up, and how its containers start.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its reference, such as `example.org/name:tag`.
    pub name: String,
    /// Its layers as uncompressed tar archives, lowest first.
    pub layers: Vec<Vec<u8>>,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Environment, as `NAME=value`.
    pub env: Vec<String>,
    /// User, as `name`, `uid` or `uid:gid`; root when empty.
    pub user: String,
    /// The directory it starts in; `/` when empty.
    pub working_dir: String,
}

impl Image {
    /// An image that starts `sh` as root.
    pub fn new(name: impl Into<String>, layers: Vec<Layer>) -> Result<Self> {
        let tars = layers.iter().map(Layer::tar).collect::<Result<_, _>>()?;
        Ok(Self::of_tars(name, tars))
    }

    /// The same, of layers that are tar archives already.
    pub fn of_tars(name: impl Into<String>, layers: Vec<Vec<u8>>) -> Self {
        Self {
            name: name.into(),
            layers,
            command: vec!["sh".into()],
            env: vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into()],
            user: String::new(),
            working_dir: String::new(),
        }
    }

    /// The archive. The same image gives the same bytes.
    pub fn archive(self) -> Result<Vec<u8>> {
        let mut blobs = Blobs::default();
        let mut layers = Vec::new();
        let mut diff_ids = Vec::new();
        for layer in self.layers {
            let descriptor = blobs.add("application/vnd.oci.image.layer.v1.tar", layer);
            // Uncompressed, so the blob's digest is that of its content.
            diff_ids.push(descriptor["digest"].clone());
            layers.push(descriptor);
        }
        let config = blobs.add_json(
            "application/vnd.oci.image.config.v1+json",
            &json!({
                "created": "1970-01-01T00:00:00Z",
                "architecture": "amd64",
                "os": "linux",
                "config": {
                    "Cmd": self.command,
                    "Env": self.env,
                    "User": self.user,
                    "WorkingDir": self.working_dir,
                },
                "rootfs": { "type": "layers", "diff_ids": diff_ids },
            }),
        )?;
        let docker = json!([{
            "Config": blob_path(&config),
            "RepoTags": [self.name.strip_prefix("docker.io/library/").unwrap_or(&self.name)],
            "Layers": layers.iter().map(blob_path).collect::<Vec<_>>(),
        }]);
        const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
        let mut manifest = blobs.add_json(
            MANIFEST,
            &json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers }),
        )?;
        manifest["platform"] = json!({ "architecture": "amd64", "os": "linux" });
        manifest["annotations"] = json!({
            // containerd takes the whole reference from its own annotation;
            // other tools take a tag from the specification's.
            "io.containerd.image.name": self.name,
            "org.opencontainers.image.ref.name": self.name.rsplit_once(':').map_or("latest", |(_, tag)| tag),
        });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [manifest],
        });

        let mut files: Vec<(String, Vec<u8>)> = vec![
            ("oci-layout".into(), serde_json::to_vec(&json!({ "imageLayoutVersion": "1.0.0" }))?),
            ("index.json".into(), serde_json::to_vec(&index)?),
            ("manifest.json".into(), serde_json::to_vec(&docker)?),
        ];
        files.extend(blobs.0.into_iter().map(|(hash, content)| (format!("blobs/sha256/{hash}"), content)));
        let mut tar = Builder::new(Vec::new());
        for (path, content) in files {
            let mut header = Header::new_ustar();
            header.set_entry_type(EntryType::Regular);
            header.set_mode(0o644);
            header.set_mtime(0);
            header.set_uid(0);
            header.set_gid(0);
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, path, content.as_slice())?;
        }
        Ok(tar.into_inner()?)
    }
}

/// Where the blob of a descriptor is in the archive.
fn blob_path(descriptor: &Value) -> String {
    format!("blobs/{}", descriptor["digest"].as_str().unwrap_or_default().replace(':', "/"))
}

/// Blobs by their SHA-256 in hexadecimal.
#[derive(Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    /// Adds a blob. Returns its descriptor (descriptor.md).
    fn add(&mut self, media_type: &str, content: Vec<u8>) -> Value {
        let hash: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
        let descriptor =
            json!({ "mediaType": media_type, "digest": format!("sha256:{hash}"), "size": content.len() });
        self.0.insert(hash, content);
        descriptor
    }

    fn add_json(&mut self, media_type: &str, value: &Value) -> Result<Value> {
        Ok(self.add(media_type, serde_json::to_vec(value)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::io::Read;

    fn image() -> Image {
        let mut lower = Layer::new();
        lower.file("a", 0o644, "a");
        let mut upper = Layer::new();
        upper.whiteout("a");
        Image::new("example.org/two:1", vec![lower, upper]).unwrap()
    }

    fn files(archive: &[u8]) -> HashMap<String, Vec<u8>> {
        tar::Archive::new(archive)
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let mut content = Vec::new();
                entry.read_to_end(&mut content).unwrap();
                (entry.path().unwrap().display().to_string(), content)
            })
            .collect()
    }

    #[test]
    fn two_builds_one_archive() {
        assert_eq!(image().archive().unwrap(), image().archive().unwrap());
    }

    #[test]
    fn every_digest_names_its_blob() {
        let files = files(&image().archive().unwrap());
        let blob = |descriptor: &Value| {
            let hash = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap().to_owned();
            let content = &files[&format!("blobs/sha256/{hash}")];
            assert_eq!(content.len() as u64, descriptor["size"].as_u64().unwrap());
            let actual: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hash, actual);
            content
        };
        let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        let entry = &index["manifests"][0];
        assert_eq!(entry["annotations"]["io.containerd.image.name"], "example.org/two:1");
        let manifest: Value = serde_json::from_slice(blob(entry)).unwrap();
        let config: Value = serde_json::from_slice(blob(&manifest["config"])).unwrap();
        let layers = manifest["layers"].as_array().unwrap();
        assert_eq!(layers.len(), 2);
        for (layer, diff_id) in layers.iter().zip(config["rootfs"]["diff_ids"].as_array().unwrap()) {
            blob(layer);
            assert_eq!(&layer["digest"], diff_id);
        }
    }
}
