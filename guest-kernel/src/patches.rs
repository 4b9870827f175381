//! What we change in the kernel's source (`patches/*.patch`): exits and pages that no configuration saves, and a fault.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::{Error, Flavour, command, io_error};

/// A patch: its name, and a unified diff.
type Patch = (&'static str, &'static str);

const PATCHES: [Patch; 27] = [
    ("pci-remember-configuration", include_str!("../patches/pci-remember-configuration.patch")),
    ("virtiofs-tag-in-words", include_str!("../patches/virtiofs-tag-in-words.patch")),
    ("initramfs-keep-pages", include_str!("../patches/initramfs-keep-pages.patch")),
    ("no-clearing-of-bss", include_str!("../patches/no-clearing-of-bss.patch")),
    ("no-poison-in-freed-init", include_str!("../patches/no-poison-in-freed-init.patch")),
    ("bpf-smaller-packs", include_str!("../patches/bpf-smaller-packs.patch")),
    ("percpu-chunks-of-their-size", include_str!("../patches/percpu-chunks-of-their-size.patch")),
    ("overlay-no-attributes-in-layers", include_str!("../patches/overlay-no-attributes-in-layers.patch")),
    ("fuse-truncate-after-access", include_str!("../patches/fuse-truncate-after-access.patch")),
    ("fuse-create-first", include_str!("../patches/fuse-create-first.patch")),
    ("fuse-server-drops-privileges", include_str!("../patches/fuse-server-drops-privileges.patch")),
    ("fuse-directory-keeps-its-owner", include_str!("../patches/fuse-directory-keeps-its-owner.patch")),
    ("fuse-more-entries-at-once", include_str!("../patches/fuse-more-entries-at-once.patch")),
    ("virtiofs-nobody-waits", include_str!("../patches/virtiofs-nobody-waits.patch")),
    ("fuse-end-of-directory", include_str!("../patches/fuse-end-of-directory.patch")),
    ("fuse-open-with-content", include_str!("../patches/fuse-open-with-content.patch")),
    ("fuse-own-writes", include_str!("../patches/fuse-own-writes.patch")),
    ("virtiofs-look-for-answers", include_str!("../patches/virtiofs-look-for-answers.patch")),
    ("usemap-beside-all-else", include_str!("../patches/usemap-beside-all-else.patch")),
    ("functions-in-order-of-a-start", include_str!("../patches/functions-in-order-of-a-start.patch")),
    ("init-text-beside-text", include_str!("../patches/init-text-beside-text.patch")),
    ("static-calls-by-trampoline", include_str!("../patches/static-calls-by-trampoline.patch")),
    ("msix-same-message", include_str!("../patches/msix-same-message.patch")),
    ("cpu-features-by-test", include_str!("../patches/cpu-features-by-test.patch")),
    ("pmem-without-claims", include_str!("../patches/pmem-without-claims.patch")),
    ("dax-map-around", include_str!("../patches/dax-map-around.patch")),
    ("free-pages-told-at-once", include_str!("../patches/free-pages-told-at-once.patch")),
];

/// The flavour's, in the order in which they are applied. The baseline of benchmarks is Linux as it is.
pub fn of(flavour: Flavour) -> &'static [Patch] {
    match flavour {
        Flavour::Rvm | Flavour::Full | Flavour::Peer => &PATCHES,
        Flavour::Trial => &[],
    }
}

/// Applies them to the unpacked source. Where a point release has moved the lines around one it applies all the same; one
/// that does not fit any more is an error.
pub fn apply(patches: &[Patch], tree: &Path) -> Result<(), Error> {
    for (name, text) in patches {
        let file = tree.join(format!("{name}.patch"));
        fs::write(&file, text).map_err(io_error("write", &file))?;
        let mut patch = Command::new("patch");
        patch.args(["--strip=1", "--forward", "--batch", "--input"]).arg(&file).arg("--directory").arg(tree);
        command::output(&mut patch)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATCH: Patch =
        ("a-patch", "Why.\n\n--- a/dir/file\n+++ b/dir/file\n@@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n");

    fn tree(file: &str) -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        fs::create_dir(tree.path().join("dir")).unwrap();
        fs::write(tree.path().join("dir/file"), file).unwrap();
        tree
    }

    #[test]
    fn lines_that_have_moved_are_found() {
        let tree = tree("zero\none\ntwo\nthree\n");
        apply(&[PATCH], tree.path()).unwrap();
        assert_eq!(fs::read_to_string(tree.path().join("dir/file")).unwrap(), "zero\none\n2\nthree\n");
    }

    #[test]
    fn a_source_they_do_not_fit_is_refused() {
        for file in ["one\nzwei\nthree\n", "one\n2\nthree\n", ""] {
            let error = apply(&[PATCH], tree(file).path()).unwrap_err().to_string();
            assert!(error.contains("dir/file") && error.contains("a-patch"), "{error}");
        }
    }

    #[test]
    fn every_patch_says_what_it_is_for() {
        for (name, text) in PATCHES {
            let (why, diff) = text.split_once("\n--- a/").unwrap_or_default();
            assert!(!why.trim().is_empty() && diff.contains("\n+++ b/"), "{name}");
        }
    }
}
