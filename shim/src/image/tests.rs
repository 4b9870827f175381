//! Which layers have an image, and what is taken for one.

use std::os::unix::fs::symlink;

use super::*;

/// A superblock of so many blocks of 4 KiB.
fn superblock(blocks: u32) -> Vec<u8> {
    let mut bytes = vec![0; 128];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[12] = 12;
    bytes[36..40].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

fn write_image(path: &Path, blocks: u32, length: u64) {
    let file = fs::File::create(path).unwrap();
    file.set_len(length).unwrap();
    file.write_all_at(&superblock(blocks), SUPERBLOCK_AT).unwrap();
}

fn images() -> Images {
    crate::config::Config::parse("", "none").unwrap().images
}

fn found(layers: &[Layer]) -> Found {
    find(layers, images(), Path::new("/var/cache"))
}

/// A container's layers on snapshots 2 and 1 of `root`, with a writable one of its own.
fn layers(root: &Path, more: &[&str]) -> Vec<Layer> {
    for dir in ["1/fs", "2/fs", "3/fs", "3/work"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    let at = root.display();
    let own = [
        format!("workdir={at}/3/work"),
        format!("upperdir={at}/3/fs"),
        format!("lowerdir={at}/2/fs:{at}/1/fs"),
    ];
    let options = own.into_iter().chain(more.iter().map(|option| (*option).to_owned())).collect();
    vec![Layer { kind: "overlay".into(), source: "overlay".into(), options, ..Layer::default() }]
}

#[test]
fn lies_beside_the_top_layer_and_is_found_when_whole() {
    let root = tempfile::tempdir().unwrap();
    let layers = layers(root.path(), &[]);
    let Found::Missing(place) = found(&layers) else { panic!("no place") };
    let path = place.file();
    assert_eq!(path.parent(), Some(root.path().join("2").as_path()));

    write_image(&path, 4, 4 * 4096);
    let Found::Ready(image) = found(&layers) else { panic!("no image") };
    assert_eq!((image.path.as_path(), image.serial.len(), image.as_memory), (path.as_path(), 20, true));
    let small = Images { memory_limit_bytes: 4 * 4096 - 1, ..images() };
    let Found::Ready(image) = find(&layers, small, Path::new("/")) else { panic!("no image") };
    assert!(!image.as_memory);

    // What is no image goes.
    for (blocks, length) in [(4, 3 * 4096), (0, 4096), (4, 1000)] {
        write_image(&path, blocks, length);
        assert!(matches!(found(&layers), Found::Missing(_)), "{blocks} {length}");
        assert!(!path.exists());
    }

    // What is not ours is left alone, and not used.
    let elsewhere = root.path().join("elsewhere");
    write_image(&elsewhere, 4, 4 * 4096);
    symlink(&elsewhere, &path).unwrap();
    assert_eq!(found(&layers), Found::Never);
    assert!(elsewhere.exists());
    fs::remove_file(&path).unwrap();

    fs::write(path.with_added_extension(REFUSED), "too large").unwrap();
    assert_eq!(found(&layers), Found::Never);
}

#[test]
fn other_layers_have_another_or_none() {
    let root = tempfile::tempdir().unwrap();
    let of = |layers: &[Layer]| Place::of(layers, images(), Path::new("/var/cache"));
    let place = of(&layers(root.path(), &[])).unwrap();
    assert_eq!(place.lower.len(), 2);

    let mut swapped = layers(root.path(), &[]);
    swapped[0].options[2] = format!("lowerdir={0}/2/fs:{0}/3/fs", root.path().display());
    assert_ne!(of(&swapped).unwrap().hash, place.hash);

    let mut one = layers(root.path(), &[]);
    one[0].options[2] = format!("lowerdir={}/2/fs", root.path().display());
    assert_eq!(of(&one).unwrap().lower.len(), 1);

    assert_eq!(of(&layers(root.path(), &["index=off"])).unwrap().hash, place.hash);
    // Owners that are mapped, other options, what somebody wrote before the start.
    assert_eq!(of(&layers(root.path(), &["uidmap=0:1:2", "gidmap=0:1:2"])), None);
    assert_eq!(of(&layers(root.path(), &["metacopy=on"])), None);
    fs::write(root.path().join("3/fs/before"), "").unwrap();
    assert_eq!(of(&layers(root.path(), &[])), None);
    fs::remove_file(root.path().join("3/fs/before")).unwrap();
    for options in ["lowerdir=2/fs:1/fs", "lowerdir=/nowhere/fs:/1/fs", "lowerdir=/"] {
        let layer = Layer { kind: "overlay".into(), options: vec![options.into()], ..Layer::default() };
        assert_eq!(of(&[layer]), None, "{options}");
    }
    let bind =
        Layer { kind: "bind".into(), source: "/".into(), options: vec!["ro".into()], ..Layer::default() };
    assert_eq!(of(&[bind]), None);
}

#[test]
fn broken_once_is_made_again_and_twice_is_not() {
    let root = tempfile::tempdir().unwrap();
    let layers = layers(root.path(), &[]);
    let Found::Missing(place) = found(&layers) else { panic!("no place") };
    for time in 1..=2 {
        write_image(&place.file(), 4, 4 * 4096);
        refuse(&place.file(), "no file system");
        assert!(!place.file().exists());
        assert_eq!(matches!(found(&layers), Found::Missing(_)), time == 1);
    }
}
