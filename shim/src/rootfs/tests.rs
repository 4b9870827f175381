//! What is planned for a snapshot's mounts, and mounted.

use super::*;

fn overlay_of(options: &[&str], upper_is_empty: bool) -> Result<Vec<Step>, RootfsError> {
    let options = options.iter().map(|option| (*option).to_owned()).collect();
    let layer = Layer { kind: "overlay".into(), source: "overlay".into(), options, ..Layer::default() };
    plan(&[layer], Path::new("/unused"), Access::ReadOnly, |_| upper_is_empty)
}

fn bind_of(source: &str) -> Step {
    Step::Bind { source: source.into(), idmap: None }
}

#[test]
fn an_overlay_loses_its_writable_layer() {
    let steps =
        overlay_of(&["index=off", "workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs"], true);
    assert_eq!(
        steps.unwrap(),
        [Step::Overlay {
            written: None,
            lower: vec!["/s/2/fs".into(), "/s/1/fs".into()],
            idmap: None,
            options: vec!["index=off".into()]
        }]
    );
}

#[test]
fn what_is_in_the_writable_layer_already_is_seen() {
    let steps = overlay_of(&["workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/1/fs"], false);
    assert_eq!(
        steps.unwrap(),
        [Step::Overlay {
            written: Some("/s/3/fs".into()),
            lower: vec!["/s/1/fs".into()],
            idmap: None,
            options: vec![]
        }]
    );
}

#[test]
fn a_single_layer_is_bound() {
    let steps = overlay_of(&["workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s\\:x/1/fs"], true);
    assert_eq!(steps.unwrap(), [bind_of("/s:x/1/fs")]);
    let bind = Layer {
        kind: "bind".into(),
        source: "/s/1/fs".into(),
        options: vec!["rbind".into(), "rw".into()],
        ..Layer::default()
    };
    assert_eq!(
        plan(&[bind], Path::new("/unused"), Access::ReadOnly, |_| true).unwrap(),
        [bind_of("/s/1/fs")]
    );
}

#[test]
fn no_mounts_mean_the_bundles_root() {
    assert_eq!(
        plan(&[], Path::new("/b/rootfs"), Access::ReadOnly, |_| true).unwrap(),
        [Step::Mounted("/b/rootfs".into())]
    );
}

#[test]
fn other_file_systems_keep_their_options() {
    let layer = Layer {
        kind: "ext4".into(),
        source: "/dev/mapper/x".into(),
        options: vec!["rw".into(), "nodev".into(), "discard".into(), "noload".into()],
        ..Layer::default()
    };
    assert_eq!(
        plan(&[layer], Path::new("/unused"), Access::ReadOnly, |_| true).unwrap(),
        [Step::FileSystem {
            kind: "ext4".into(),
            source: "/dev/mapper/x".into(),
            flags: MsFlags::MS_NODEV,
            data: "discard,noload".into()
        }]
    );
}

#[test]
fn errors_name_the_mount() {
    let error =
        |layer: Layer| plan(&[layer], Path::new("/"), Access::ReadOnly, |_| true).unwrap_err().to_string();
    assert_eq!(error(Layer::default()), "rootfs[0].type: is missing");
    assert_eq!(
        error(Layer { kind: "bind".into(), ..Layer::default() }),
        "rootfs[0].source: is missing; a bind mount needs a directory"
    );
    assert_eq!(
        error(Layer { kind: "squashfs".into(), options: vec!["loop".into()], ..Layer::default() }),
        "rootfs[0].options: \"loop\" is not supported: a block device is needed"
    );
    assert_eq!(
        error(Layer { kind: "ext4".into(), target: "data".into(), ..Layer::default() }),
        "rootfs[0].target: mounts below the root are not supported"
    );
    assert_eq!(
        overlay_of(&["lowerdir=/a:/b", "uidmap=0:1000:10"], true).unwrap_err().to_string(),
        "rootfs[0].options: uidmap= without gidmap="
    );
}

#[test]
fn owners_in_the_layers_are_mapped_and_what_was_written_is_not() {
    let options = ["lowerdir=/s/2/fs:/s/1/fs", "upperdir=/s/3/fs", "uidmap=0:1000:10,10:5:1", "gidmap=0:7:9"];
    let range = |inside, outside, count| IdRange { inside, outside, count };
    let idmap = IdMap { uids: vec![range(0, 1000, 10), range(10, 5, 1)], gids: vec![range(0, 7, 9)] };
    assert_eq!(
        overlay_of(&options, false).unwrap(),
        [Step::Overlay {
            written: Some("/s/3/fs".into()),
            lower: vec!["/s/2/fs".into(), "/s/1/fs".into()],
            idmap: Some(idmap),
            options: vec![]
        }]
    );
    for wrong in ["uidmap=0:1", "uidmap=0:1:0", "uidmap=0:1:2:3", "uidmap=", "uidmap=0:1:4294967296"] {
        let error = overlay_of(&["lowerdir=/a", wrong, "gidmap=0:7:9"], true).unwrap_err().to_string();
        assert!(error.starts_with(&format!("rootfs[0].options: {wrong}: must be")), "{error}");
    }
}

#[test]
fn what_is_written_to_is_mounted_as_it_is() {
    let options =
        ["index=off", "workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/1/fs", "volatile", "rw"];
    let layer = Layer {
        kind: "overlay".into(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Layer::default()
    };
    assert_eq!(
        plan(&[layer], Path::new("/unused"), Access::Writable, |_| false).unwrap(),
        [Step::Overlay {
            written: None,
            lower: vec!["/s/1/fs".into()],
            idmap: None,
            options: options
                .iter()
                .filter(|o| !["lowerdir=/s/1/fs", "rw"].contains(o))
                .map(|o| (*o).to_owned())
                .collect(),
        }]
    );
}

#[test]
fn many_layers_are_named_from_their_common_directory() {
    let layers: Vec<String> = (0..100).map(|n| format!("/var/lib/snapshots/{n}/fs")).collect();
    let (dir, relative) = relative_to_common(&layers).unwrap();
    assert_eq!(dir, "/var/lib/snapshots");
    assert_eq!(relative[42], "42/fs");
    assert!(relative_to_common(&["/a/fs".into(), "/b/fs".into()]).is_none());
}

#[test]
fn a_snapshot_is_known_by_its_two_directories() {
    let layer = |kind: &str, options: &[&str]| Layer {
        kind: kind.into(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Layer::default()
    };
    let snapshot = layer("overlay", &["workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/1/fs"]);
    assert_eq!(snapshot_dir(std::slice::from_ref(&snapshot)), Some("/s/3".into()));
    assert_eq!(snapshot_upper(std::slice::from_ref(&snapshot)), Some("/s/3/fs".into()));
    assert_eq!(snapshot_dir(&[layer("overlay", &["workdir=/w/3", "upperdir=/s/3/fs"])]), None);
    assert_eq!(snapshot_dir(&[layer("overlay", &["lowerdir=/s/2/fs:/s/1/fs"])]), None);
    assert_eq!(snapshot_dir(&[layer("bind", &["rbind", "rw"])]), None);
    assert_eq!(snapshot_dir(&[snapshot.clone(), snapshot]), None);
    assert_eq!(snapshot_dir(&[]), None);
}

#[test]
fn colons_may_be_escaped() {
    assert_eq!(split_lower("/a\\:b:/c"), ["/a\\:b", "/c"]);
    assert_eq!(split_lower("/a\\\\:/c"), ["/a\\\\", "/c"]);
}
