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
    find(layers, images(), Path::new("/var/cache")).unwrap()
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
    let Found::Ready(ready) = found(&layers) else { panic!("no image") };
    let image = &ready[0].blobs[0];
    assert_eq!((image.path.as_path(), image.serial.len(), image.as_memory), (path.as_path(), 20, true));
    let small = Images { memory_limit_bytes: 4 * 4096 - 1, ..images() };
    let Ok(Found::Ready(ready)) = find(&layers, small, Path::new("/")) else { panic!("no image") };
    assert!(!ready[0].blobs[0].as_memory);

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

/// Whoever has taken over a guest says that it cannot mount what all others have too.
#[test]
fn a_guests_word_removes_nothing_that_is_whole() {
    let root = tempfile::tempdir().unwrap();
    let layers = layers(root.path(), &[]);
    let Found::Missing(place) = found(&layers) else { panic!("no place") };
    fs::write(root.path().join("1/fs/file"), [7; 10_000]).unwrap();
    let made = Command::new(maker::MKFS).arg(place.file()).arg(root.path().join("1/fs")).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    for _ in 1..=3 {
        refuse(&place.file(), "no file system");
        assert!(matches!(found(&layers), Found::Ready(_)));
    }
    fs::File::options()
        .write(true)
        .open(place.file())
        .unwrap()
        .write_all_at(&[0xff; 4], SUPERBLOCK_AT + 80)
        .unwrap();
    refuse(&place.file(), "no file system");
    assert!(matches!(found(&layers), Found::Missing(_)));
}

fn erofs(root: &Path, name: &str, options: &[&str]) -> Layer {
    let options = options.iter().map(|option| (*option).to_owned()).collect();
    let source = root.join(name).to_string_lossy().into_owned();
    Layer { kind: "erofs".into(), source, options, ..Layer::default() }
}

#[test]
fn a_clients_files_are_taken_as_they_are() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    write_image(&at("layer"), 4, 5 * 4096);
    fs::write(at("blob"), "what another one names").unwrap();
    symlink(at("layer"), at("link")).unwrap();
    let named = format!("device={}", at("blob").display());
    let Found::Ready(ready) = found(&[erofs(root.path(), "layer", &["ro", "loop", &named])]) else {
        panic!()
    };
    let [image] = ready.as_slice() else { panic!("{ready:?}") };
    let [layer, blob] = image.blobs.as_slice() else { panic!("{image:?}") };
    assert_eq!((image.origin.clone(), image.shared, image.bytes()), (Origin::Mount(0), false, 5 * 4096 + 22));
    assert_eq!((&layer.path, &blob.path, layer.serial.len()), (&at("layer"), &at("blob"), 20));
    assert_ne!(layer.serial, blob.serial);

    // The same file as what another one names is another device of a guest's.
    let other = format!("device={}", at("layer").display());
    let Found::Ready(others) = found(&[erofs(root.path(), "link", &["loop", &other])]) else { panic!() };
    assert_ne!(others[0].blobs[1].serial, layer.serial);

    // It is nobody's to switch off: the host's kernel is not to mount it.
    let off = Images { enabled: false, ..images() };
    assert!(matches!(
        find(&[erofs(root.path(), "layer", &["loop"])], off, Path::new("/")),
        Ok(Found::Ready(_))
    ));
}

#[test]
fn a_clients_file_that_is_none_is_named_and_left() {
    let root = tempfile::tempdir().unwrap();
    write_image(&root.path().join("layer"), 4, 4 * 4096);
    write_image(&root.path().join("short"), 4, 3 * 4096);
    fs::write(root.path().join("empty"), "").unwrap();
    let nowhere = "device=/nowhere";
    for (name, options, expected) in [
        ("gone", ["ro", "loop"], "No such file or directory (os error 2)"),
        (".", ["ro", "loop"], "must be a regular file"),
        ("empty", ["ro", "loop"], "is empty"),
        ("short", ["ro", "loop"], "is no whole EROFS file system"),
    ] {
        let layer = erofs(root.path(), name, &options);
        let said = find(std::slice::from_ref(&layer), images(), Path::new("/")).unwrap_err().to_string();
        assert_eq!(said, format!("rootfs[0].source: {}: {expected}", layer.source));
    }
    let layer = erofs(root.path(), "layer", &["loop", nowhere]);
    let said = find(&[layer], images(), Path::new("/")).unwrap_err().to_string();
    assert!(said.starts_with("rootfs[0].options: /nowhere: device=: No such file"), "{said}");
    assert!(root.path().join("short").exists());
}

/// Only where the host's kernel says that EROFS is mounted there are the files behind it used.
#[test]
fn a_file_beside_layers_that_are_directories_is_nothing() {
    let root = tempfile::tempdir().unwrap();
    let layers = layers(root.path(), &[]);
    write_image(&root.path().join("1/layer.erofs"), 4, 4 * 4096);
    write_image(&root.path().join("2/layer.erofs"), 4, 4 * 4096);
    assert_eq!(mounted_files(&layers, &images()), None);
    assert!(matches!(found(&layers), Found::Missing(_)));
}
