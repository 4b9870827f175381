//! Layers that are checked as they are read: dm-verity, as containerd's differ makes it, with its tree of hashes behind
//! the file system in the same file. The tree is what its root hash says it is; so only that one, which lies in another
//! file, and not what the layer's file says of itself, has to be right for nothing wrong to be read.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::Path,
};

use rvm_protocol::agent;
use serde::Deserialize;
use thiserror::Error;

/// More than the file with a root hash ever has.
const MAX_METADATA_BYTES: u64 = 64 << 10;
/// Of veritysetup's superblock, version 1.
const SIGNATURE: &[u8; 8] = b"verity\0\0";
const SUPERBLOCK_BYTES: u64 = 512;
const ALGORITHM: &str = "sha256";
/// Hexadecimal digits of a hash of that.
const HASH_DIGITS: usize = 64;
/// What Linux takes for a block.
const BLOCK_BYTES: std::ops::RangeInclusive<u32> = 512..=4096;

/// How a layer's file is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verity {
    /// In hexadecimal digits.
    pub root_hash: String,
    superblock: Superblock,
    hash_start: u64,
}

/// Why it cannot be.
#[derive(Debug, Error)]
pub enum VerityError {
    /// One of the files cannot be read.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// The root hash is not told as containerd tells it.
    #[error("must have \"roothash\" and \"hashoffset\": {0}")]
    Metadata(#[from] serde_json::Error),
    /// A field of it cannot be used.
    #[error("{field}: must be {expected}")]
    Field {
        /// Which.
        field: &'static str,
        /// What would be right.
        expected: &'static str,
    },
}

/// containerd's `layer.erofs.dmverity`.
#[derive(Deserialize)]
struct Metadata {
    roothash: String,
    hashoffset: u64,
    /// Newer ones name another file that has the hashes.
    #[serde(default)]
    hashdevice: String,
}

/// What the tree says of itself, in front.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Superblock {
    format: u32,
    data_block_bytes: u32,
    hash_block_bytes: u32,
    data_blocks: u64,
    /// In hexadecimal digits.
    salt: String,
}

fn must<T>(field: &'static str, expected: &'static str) -> Result<T, VerityError> {
    Err(VerityError::Field { field, expected })
}

impl Verity {
    /// What `metadata` says of `layer`.
    pub fn read(metadata: &Path, layer: &File) -> Result<Self, VerityError> {
        let mut text = Vec::new();
        File::open(metadata)?.take(MAX_METADATA_BYTES).read_to_end(&mut text)?;
        let Metadata { roothash, hashoffset, hashdevice } = serde_json::from_slice(&text)?;
        if !hashdevice.is_empty() {
            return must("hashdevice", "empty: hashes are in the layer's own file");
        }
        if roothash.len() != HASH_DIGITS || !roothash.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return must("roothash", "the 64 hexadecimal digits of a SHA-256");
        }
        let mut bytes = [0; SUPERBLOCK_BYTES as usize];
        if let Err(error) = layer.read_exact_at(&mut bytes, hashoffset) {
            return match error.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput => {
                    must("hashoffset", "where hashes are in the layer's file")
                }
                _ => Err(error.into()),
            };
        }
        let superblock = Superblock::parse(&bytes)?;
        let hash_block = u64::from(superblock.hash_block_bytes);
        let data = superblock.data_blocks.checked_mul(superblock.data_block_bytes.into());
        if data.is_none_or(|bytes| bytes == 0 || bytes > hashoffset) || !hashoffset.is_multiple_of(hash_block)
        {
            return must("hashoffset", "behind the data, at a block of hashes");
        }
        // The superblock is what it is however large a block is.
        let hash_start = (hashoffset.saturating_add(SUPERBLOCK_BYTES)).div_ceil(hash_block);
        Ok(Self { root_hash: roothash.to_ascii_lowercase(), superblock, hash_start })
    }

    /// The same for a guest.
    pub fn message(&self) -> agent::Verity {
        let Superblock { format, data_block_bytes, hash_block_bytes, data_blocks, salt } = &self.superblock;
        agent::Verity {
            data_block_bytes: *data_block_bytes,
            hash_block_bytes: *hash_block_bytes,
            data_blocks: *data_blocks,
            hash_start: self.hash_start,
            algorithm: ALGORITHM.to_owned(),
            root_hash: self.root_hash.clone(),
            salt: salt.clone(),
            format: *format,
            ..Default::default()
        }
    }
}

impl Superblock {
    /// `struct verity_sb` of cryptsetup: signature, version, format, UUID, algorithm, sizes, blocks, salt.
    fn parse(bytes: &[u8; SUPERBLOCK_BYTES as usize]) -> Result<Self, VerityError> {
        let word = |at: usize| {
            bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes)
        };
        if !bytes.starts_with(SIGNATURE) || word(8) != 1 {
            return must("superblock", "veritysetup's, of version 1, at hashoffset");
        }
        let algorithm = bytes.get(32..64).unwrap_or_default().split(|byte| *byte == 0).next();
        if algorithm != Some(ALGORITHM.as_bytes()) {
            return must("algorithm", "sha256");
        }
        let [data_block_bytes, hash_block_bytes] = [word(64), word(68)];
        for bytes in [data_block_bytes, hash_block_bytes] {
            if !bytes.is_power_of_two() || !BLOCK_BYTES.contains(&bytes) {
                return must("block size", "a power of two from 512 to 4096");
            }
        }
        let format = word(12);
        if format > 1 {
            return must("hash type", "0 or 1");
        }
        let data_blocks = u64::from(word(72)) | u64::from(word(76)) << 32;
        let salt_bytes = (word(80) & 0xffff) as usize;
        let Some(salt) = bytes.get(88..344).and_then(|salt| salt.get(..salt_bytes)) else {
            return must("salt", "256 bytes at most");
        };
        let salt = salt.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { format, data_block_bytes, hash_block_bytes, data_blocks, salt })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// What `veritysetup format --data-blocks 3 --hash-offset 12288` makes of nothing but its superblock.
    fn superblock(change: impl FnOnce(&mut [u8])) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        bytes[..8].copy_from_slice(SIGNATURE);
        for (at, word) in [(8, 1_u32), (12, 1), (64, 4096), (68, 4096), (72, 3), (80, 2)] {
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes[32..38].copy_from_slice(b"sha256");
        bytes[88..90].copy_from_slice(&[0xab, 0x01]);
        change(&mut bytes);
        bytes
    }

    fn read(metadata: &str, superblock: &[u8]) -> Result<Verity, String> {
        let dir = tempfile::tempdir().unwrap();
        let (layer, beside) = (dir.path().join("layer"), dir.path().join("layer.dmverity"));
        fs::write(&layer, [&[7; 12288], superblock].concat()).unwrap();
        fs::write(&beside, metadata).unwrap();
        Verity::read(&beside, &File::open(&layer).unwrap()).map_err(|error| error.to_string())
    }

    const HASH: &str = "0123456789abcdef0123456789abcdef0123456789ABCDEF0123456789abcdef";

    fn metadata(offset: u64) -> String {
        format!("{{\"roothash\": \"{HASH}\", \"hashoffset\": {offset}}}")
    }

    #[test]
    fn a_layer_has_its_hashes_behind_it() {
        let message = read(&metadata(12288), &superblock(|_| ())).unwrap().message();
        let sizes = (message.data_block_bytes, message.hash_block_bytes, message.data_blocks);
        assert_eq!((sizes, message.hash_start, message.format), ((4096, 4096, 3), 4, 1));
        assert_eq!((message.salt.as_str(), message.algorithm.as_str()), ("ab01", "sha256"));
        assert_eq!(message.root_hash, HASH.to_ascii_lowercase());
        // The next block of hashes, whatever its size.
        let small = superblock(|bytes| bytes[68..72].copy_from_slice(&512_u32.to_le_bytes()));
        assert_eq!(read(&metadata(12288), &small).unwrap().hash_start, 25);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let whole = || superblock(|_| ());
        let with =
            |at: usize, value: &[u8]| superblock(|bytes| bytes[at..at + value.len()].copy_from_slice(value));
        let elsewhere = metadata(12288).replace('}', ", \"hashdevice\": \"hashes\"}");
        for (metadata, superblock, expected) in [
            ("{}".to_owned(), whole(), "must have \"roothash\" and \"hashoffset\""),
            (metadata(12288).replace("0123", "012g"), whole(), "roothash: must be"),
            (metadata(12288).replace("0123", "01"), whole(), "roothash: must be"),
            (elsewhere, whole(), "hashdevice: must be empty"),
            (metadata(u64::MAX), whole(), "hashoffset: must be where"),
            (metadata(12300), whole(), "hashoffset: must be where"),
            (metadata(12288), with(0, b"V"), "superblock: must be veritysetup's"),
            (metadata(12288), with(8, &[2]), "superblock: must be veritysetup's"),
            (metadata(12288), with(12, &[2]), "hash type: must be 0 or 1"),
            (metadata(12288), with(32, b"md5"), "algorithm: must be sha256"),
            (metadata(12288), with(64, &[1]), "block size: must be a power of two"),
            (metadata(12288), with(68, &[0, 0x20]), "block size: must be a power of two"),
            (metadata(12288), with(72, &[0]), "hashoffset: must be behind the data"),
            (metadata(12288), with(72, &[4]), "hashoffset: must be behind the data"),
            (metadata(12288), with(72, &[255; 8]), "hashoffset: must be behind the data"),
            (metadata(12288), with(80, &[1, 1]), "salt: must be 256 bytes"),
        ] {
            let error = read(&metadata, &superblock).unwrap_err();
            assert!(error.starts_with(expected), "{error:?}, not {expected:?}");
        }
    }
}
