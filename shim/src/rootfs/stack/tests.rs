//! What containerd's EROFS snapshotter sends, as its sources of 2.2 and 2.4 have it, and what is wrong.

use super::*;

fn mount(kind: &str, source: &str, options: &[&str]) -> Layer {
    Layer {
        kind: kind.into(),
        source: source.into(),
        target: String::new(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    }
}

fn erofs_at(number: u32) -> Layer {
    mount("erofs", &format!("/s/{number}/layer.erofs"), &["ro", "loop"])
}

fn file_at(index: usize, number: u32) -> ErofsFile {
    ErofsFile { index, source: format!("/s/{number}/layer.erofs").into(), devices: vec![], verity: None }
}

fn disk() -> Layer {
    mount(
        "mkfs/ext4",
        "/s/9/rwlayer.img",
        &["X-containerd.mkfs.fs=ext4", "X-containerd.mkfs.size=67108864", "rw", "loop"],
    )
}

const ON_DISK: [&str; 4] = [
    "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
    "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
    "workdir={{ mount 0 }}/work",
    "upperdir={{ mount 0 }}/upper",
];
const ON_HOST: [&str; 2] = ["workdir=/s/9/work", "upperdir=/s/9/fs"];

fn overlay(options: &[&[&str]]) -> Layer {
    mount("format/mkdir/overlay", "overlay", &options.concat())
}

fn stack(layers: &[Layer]) -> Stack {
    match read(layers).unwrap() {
        Mounts::Stack(stack) => stack,
        Mounts::Plain(layers) => panic!("{layers:?}"),
    }
}

#[test]
fn a_container_on_one_layer_and_on_two() {
    let upper = || Upper::Dirs { upper: "/s/9/fs".into(), work: "/s/9/work".into() };
    let one = stack(&[erofs_at(1), overlay(&[&ON_HOST, &["lowerdir={{ mount 0 }}"]])]);
    assert_eq!(one, Stack { lower: vec![file_at(0, 1)], upper: upper(), readonly: false });
    let two = stack(&[
        erofs_at(2),
        erofs_at(1),
        overlay(&[&ON_HOST, &["lowerdir={{ overlay 0 1 }}", "index=off"]]),
    ]);
    assert_eq!(two, Stack { lower: vec![file_at(0, 2), file_at(1, 1)], upper: upper(), readonly: false });
}

#[test]
fn a_container_with_a_disk_of_its_own() {
    let found =
        stack(&[disk(), erofs_at(2), erofs_at(1), overlay(&[&ON_DISK, &["lowerdir={{ overlay 1 2 }}"]])]);
    let its = Disk { index: 0, path: "/s/9/rwlayer.img".into(), size_bytes: Some(64 << 20), uuid: None };
    assert_eq!(found.lower, [file_at(1, 2), file_at(2, 1)]);
    assert_eq!((found.upper, found.readonly), (Upper::Disk(its.clone()), false));

    // Of no image at all.
    let bind = mount("format/mkdir/bind", "{{ mount 0 }}/upper", &[ON_DISK[0], "rw", "rbind"]);
    let empty = stack(&[disk(), bind]);
    assert_eq!(empty, Stack { lower: vec![], upper: Upper::Disk(its), readonly: false });
}

#[test]
fn layers_that_are_looked_at_are_read_only() {
    let one = stack(&[erofs_at(1)]);
    assert_eq!(one, Stack { lower: vec![file_at(0, 1)], upper: Upper::None, readonly: true });
    assert_eq!(stack(&[erofs_at(1), mount("format/bind", "{{ mount 0 }}", &["ro", "rbind"])]), one);
    let two = stack(&[erofs_at(2), erofs_at(1), overlay(&[&["lowerdir={{ overlay 0 1 }}"]])]);
    assert_eq!((two.lower.len(), two.upper, two.readonly), (2, Upper::None, true));
}

#[test]
fn a_file_of_names_alone_has_the_layers_as_devices() {
    let merged = mount(
        "erofs",
        "/s/3/fsmeta.erofs",
        &["ro", "loop", "device=/s/1/layer.erofs", "device=/s/2/layer.erofs"],
    );
    let found = stack(&[merged, overlay(&[&ON_HOST, &["lowerdir={{ mount 0 }}"]])]);
    let devices = vec!["/s/1/layer.erofs".into(), "/s/2/layer.erofs".into()];
    assert_eq!(
        found.lower,
        [ErofsFile { index: 0, source: "/s/3/fsmeta.erofs".into(), devices, verity: None }]
    );
    let files: Vec<_> = found.files().map(|path| path.to_str().unwrap()).collect();
    assert_eq!(files, ["/s/3/fsmeta.erofs", "/s/1/layer.erofs", "/s/2/layer.erofs"]);
}

#[test]
fn a_layer_that_is_checked_names_what_says_how() {
    let checked = |value: &str| {
        let option = format!("X-containerd.dmverity={value}");
        stack(&[mount("erofs", "/s/1/layer.erofs", &["ro", "loop", &option])]).lower.remove(0).verity
    };
    assert_eq!(checked("/s/1/layer.erofs.dmverity"), Some("/s/1/layer.erofs.dmverity".into()));
    assert_eq!(checked("off"), None);
}

#[test]
fn mounts_of_the_host_stay_what_they_are() {
    let plain = [mount("overlay", "overlay", &["lowerdir=/s/2/fs:/s/1/fs"])];
    assert_eq!(read(&plain).unwrap(), Mounts::Plain(plain.to_vec()));
    // What containerd has mounted itself, as a block device.
    let device = [mount("erofs", "/dev/dm-1", &["ro"])];
    assert_eq!(read(&device).unwrap(), Mounts::Plain(device.to_vec()));
    assert_eq!(read(&[]).unwrap(), Mounts::Plain(vec![]));

    let bind = mount("bind", "/a:b", &["rbind", "ro"]);
    let formatted = [
        bind,
        mount("format/overlay", "overlay", &["lowerdir={{ mount 0 }}/c:/d", "upperdir=/u", "workdir=/w"]),
    ];
    let expected = mount("overlay", "overlay", &["upperdir=/u", "workdir=/w", "lowerdir=/a\\:b/c:/d"]);
    assert_eq!(read(&formatted).unwrap(), Mounts::Plain(vec![expected]));
}

/// One error for each, which names the mount and what of it is wrong.
#[test]
fn what_is_wrong_is_named() {
    let lower = "lowerdir={{ mount 0 }}";
    let over = |options: &[&str]| vec![erofs_at(1), overlay(&[options])];
    let disk_with = |options: &[&str]| {
        vec![
            mount("mkfs/ext4", "/s/9/rw", options),
            erofs_at(1),
            overlay(&[&ON_DISK, &["lowerdir={{ mount 1 }}"]]),
        ]
    };
    let size = "X-containerd.mkfs.size=64MiB";
    let mut many: Vec<_> = (0..300).map(erofs_at).collect();
    many.push(overlay(&[&["lowerdir={{ overlay 0 299 }}"]]));
    let mut below = vec![erofs_at(1)];
    below[0].target = "/below".into();
    for (layers, expected) in [
        (
            vec![mount("format/fuse/overlay", "", &[])],
            "rootfs[0].type: \"format/fuse/overlay\": \"fuse\" must be \"format\", \"mkdir\" or \"mkfs\"",
        ),
        (
            vec![mount("format/format/overlay", "", &[])],
            "rootfs[0].type: \"format/format/overlay\": has \"format\" twice",
        ),
        (vec![mount("format/", "", &[])], "rootfs[0].type: is missing"),
        (vec![mount("mkfs/xfs", "/f", &[])], "rootfs[0].type: \"xfs\": the last mount must be"),
        (
            vec![mount("mkfs/loop", "/f", &[]), overlay(&[&[lower]])],
            "rootfs[0].type: \"loop\": a mount that others name must be",
        ),
        (below, "rootfs[0].target: mounts below the root are not supported"),
        (many, "rootfs[256].type: 301 mounts; must be 256 at most"),
        (
            vec![mount("erofs", "layer.erofs", &["loop"])],
            "rootfs[0].source: \"layer.erofs\": must be the absolute path of a file",
        ),
        (vec![mount("erofs", "/a\0b", &["loop"])], "rootfs[0].source: \"/a\\0b\": must not contain a NUL"),
        (
            vec![mount("erofs", "{{ mount 0 }}", &["loop"])],
            "rootfs[0].source: \"{{ mount 0 }}\": a template needs \"format/\"",
        ),
        (vec![mount("erofs", "/f", &["loop", "rw"])], "rootfs[0].options: \"rw\": EROFS is read-only"),
        (
            vec![mount("erofs", "/f", &["loop", "domain_id=x"])],
            "rootfs[0].options: \"domain_id=x\": is no option of EROFS here",
        ),
        (
            vec![mount("erofs", "/f", &["loop", "device=f"])],
            "rootfs[0].options: \"f\": must be the absolute path of a file",
        ),
        (
            vec![mount("erofs", "/f", &["X-containerd.dmverity=auto"])],
            "rootfs[0].options: \"auto\": must be the absolute path of a file",
        ),
        (
            vec![mount("erofs", "/f", &["X-containerd.dmverity.signature-digest=sha256:1"])],
            "rootfs[0].options: \"X-containerd.dmverity.signature-digest=sha256:1\": must be X-containerd.dmverity=FILE",
        ),
        (
            vec![mount("erofs", "/f", &["X-containerd.dmverity=/f.dmverity", "device=/d"])],
            "rootfs[0].options: X-containerd.dmverity: not supported of a file with \"device=\"",
        ),
        (over(&[]), "rootfs[1].options: \"lowerdir\" is missing"),
        (over(&["lowerdir={{ mount 1 }}"]), "rootfs[1].options: \"{{ mount 1 }}\": 1 must be below 1"),
        (over(&["lowerdir={{ mount 0"]), "rootfs[1].options: \"lowerdir={{ mount 0\": \"{{\" without \"}}\""),
        (
            over(&["lowerdir=/x/{{ mount 0 }}"]),
            "rootfs[1].options: lowerdir: {{ mount N }} must be at the beginning of a path",
        ),
        (
            over(&["lowerdir={{ mount 0 }}/usr"]),
            "rootfs[1].options: lowerdir: {{ mount 0 }}/usr must be a whole \"erofs\" mount",
        ),
        (
            over(&["lowerdir={{ mount 0 }}:/other"]),
            "rootfs[1].options: lowerdir: EROFS files and directories cannot be mixed",
        ),
        (
            over(&["lowerdir={{ mount 0 }}:{{ mount 0 }}"]),
            "rootfs[1].options: lowerdir: /s/1/layer.erofs is there twice",
        ),
        (
            vec![erofs_at(1), erofs_at(1), overlay(&[&["lowerdir={{ overlay 0 1 }}"]])],
            "rootfs[2].options: lowerdir: /s/1/layer.erofs is there twice",
        ),
        (over(&["lowerdir=/other"]), "rootfs[0].type: no later mount names it as {{ mount 0 }}"),
        (over(&[lower, lower]), "rootfs[1].options: \"lowerdir={{ mount 0 }}\": is there twice"),
        (over(&[lower, "upperdir=/u"]), "rootfs[1].options: \"upperdir\" without \"workdir\""),
        (over(&[lower, "workdir=/w"]), "rootfs[1].options: \"workdir\" without \"upperdir\""),
        (
            over(&[lower, "upperdir=u", "workdir=/w"]),
            "rootfs[1].options: upperdir and workdir must be absolute paths",
        ),
        (
            over(&[lower, "upperdir={{ mount 0 }}/upper", "workdir={{ mount 0 }}/work"]),
            "rootfs[1].options: {{ mount 0 }} is written to, and must be \"ext4\"",
        ),
        (
            over(&[lower, "uidmap=0:1:2"]),
            "rootfs[1].options: \"uidmap=0:1:2\": owners in EROFS files cannot be mapped",
        ),
        (
            over(&[lower, "metacopy=on"]),
            "rootfs[1].options: \"metacopy=on\": is not supported over EROFS files",
        ),
        (
            over(&[lower, "X-containerd.mkdir.path=/etc/x"]),
            "rootfs[1].options: X-containerd.mkdir.path: only {{ mount N }}/upper",
        ),
        (
            over(&[lower, "X-containerd.mkdir.mode=1"]),
            "rootfs[1].options: \"X-containerd.mkdir.mode=1\": must be X-containerd.mkdir.path=",
        ),
        (
            over(&[lower, "X-containerd.mkdir.path={{ mount 0 }}/upper:9"]),
            "rootfs[1].options: \"X-containerd.mkdir.path={{ mount 0 }}/upper:9\": must be",
        ),
        (
            vec![erofs_at(1), mount("format/bind", "{{ mount 0 }}/etc", &["ro"])],
            "rootfs[1].source: {{ mount 0 }}/etc: must be a whole",
        ),
        (
            vec![erofs_at(1), mount("format/bind", "{{ mount 0 }}", &["size=1"])],
            "rootfs[1].options: \"size=1\": is no option of a bind mount",
        ),
        (disk_with(&["loop"]), "rootfs[0].options: X-containerd.mkfs.size= is missing"),
        (disk_with(&[size, "ro"]), "rootfs[0].options: \"ro\": what is written has to go somewhere"),
        (
            disk_with(&[size, "X-containerd.mkfs.fs=xfs"]),
            "rootfs[0].options: \"X-containerd.mkfs.fs=xfs\": must be ext4",
        ),
        (
            disk_with(&[size, "X-containerd.mkfs.uuid=x"]),
            "rootfs[0].options: \"X-containerd.mkfs.uuid=x\": must be a UUID",
        ),
        (
            disk_with(&[size, "X-containerd.mkfs.label=x"]),
            "rootfs[0].options: \"X-containerd.mkfs.label=x\": must be one of size, fs and uuid",
        ),
        (
            disk_with(&["X-containerd.mkfs.size=-1"]),
            "rootfs[0].options: \"X-containerd.mkfs.size=-1\": must be a number of bytes",
        ),
        (
            disk_with(&["X-containerd.mkfs.size=1KiB"]),
            "rootfs[0].options: \"X-containerd.mkfs.size=1KiB\": must be a number of bytes",
        ),
        (
            disk_with(&["X-containerd.mkfs.size=99999999999999999999"]),
            "rootfs[0].options: \"X-containerd.mkfs.size=99999999999999999999\": must be",
        ),
        (
            disk_with(&[size, "errors=panic"]),
            "rootfs[0].options: \"errors=panic\": is no option of ext4 here",
        ),
    ] {
        let said = read(&layers).unwrap_err().to_string();
        assert!(said.starts_with(expected), "{expected}\n{said}");
    }
}

#[test]
fn sizes_are_as_containerd_reads_them() {
    for (text, expected) in [
        ("67108864", Some(64 << 20)),
        ("64MiB", Some(64 << 20)),
        ("20GiB", Some(20 << 30)),
        ("1 g", Some(1 << 30)),
        ("64mb", Some(64 << 20)),
        ("", None),
        ("MiB", None),
        ("64 MiB more", None),
        ("1.5GiB", None),
        ("17TiB", None),
    ] {
        assert_eq!(bytes(text), expected, "{text}");
    }
}
