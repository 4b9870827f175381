//! Mounts of every kind and with every option.

use std::{fs, path::Path};

use rvm_protocol::agent::{CreateContainerRequest, Mount};

use crate::fixture::{Machine, container, mount_of, shell};

fn share(name: &str) -> std::path::PathBuf {
    let dir = Path::new(rvm_protocol::guest::VOLUMES_DIR).join(name);
    fs::create_dir_all(&dir).unwrap();
    dir
}

fn bind(destination: &str, source: &str, options: &[&str]) -> Mount {
    let mut mount = mount_of(destination, "bind", source, options);
    mount.from_share = true;
    mount
}

fn with_mounts(id: &str, mounts: Vec<Mount>, script: &str) -> CreateContainerRequest {
    let mut request = container(id, shell(script));
    request.mounts.extend(mounts);
    request
}

/// Flags of a mount as `/proc/self/mountinfo` has them, and its propagation.
const FLAGS: &str =
    "flags() { awk -v m=$1 '$5 == m { f = $6; p = $7 } END { print f, p }' /proc/self/mountinfo; }; ";

pub async fn flags_of_mounts(machine: &Machine) {
    share("flags/sub");
    let request = with_mounts(
        "flags",
        vec![
            mount_of("/m1", "tmpfs", "tmpfs", &["nosuid", "nodev", "noexec", "noatime", "size=1m"]),
            mount_of("/m2", "tmpfs", "tmpfs", &["ro", "mode=1750", "uid=7", "gid=8", "nr_inodes=20"]),
            bind("/m3", "flags", &["rbind", "rro", "nosuid"]),
            bind("/m4", "flags", &["bind", "rw", "nodiratime", "rshared"]),
            bind("/m5", "flags", &["bind", "rslave", "strictatime"]),
            // A mount of its own first, then others of its flags.
            mount_of("/m6", "tmpfs", "tmpfs", &["nosuid", "size=1m"]),
            mount_of("/m6", "", "", &["remount", "bind", "noexec"]),
            mount_of("/m7", "tmpfs", "tmpfs", &["size=1m"]),
            mount_of("/m7", "tmpfs", "tmpfs", &["remount", "size=2m", "ro"]),
        ],
        &format!(
            "{FLAGS} for n in 1 2 3 4 5 6 7; do flags /m$n; done; stat -c '%a %u %g' /m2; stat -f -c '%b %S' /m7"
        ),
    );
    let output = machine.run_request(request).await.unwrap();
    let propagation = output.stdout.lines().nth(3).unwrap_or_default().to_owned();
    let rest: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(rest[0], "rw,nosuid,nodev,noexec,noatime -", "{output:?}");
    assert_eq!(rest[1], "ro,relatime -");
    assert_eq!(rest[2], "ro,nosuid,relatime -");
    assert!(propagation.starts_with("rw,nodiratime,relatime shared:"), "{propagation}");
    assert!(rest[4].starts_with("rw"), "{}", rest[4]);
    assert_eq!(rest[5], "rw,noexec,relatime -");
    assert_eq!(rest[6], "ro,relatime -");
    assert_eq!(rest[7..], ["1750 7 8", "512 4096"]);
    fs::remove_dir_all(share("flags")).unwrap();
}

pub async fn tmpfs_that_copies_up(machine: &Machine) {
    let request = with_mounts(
        "copyup",
        vec![mount_of("/etc/default", "tmpfs", "tmpfs", &["tmpcopyup", "size=4m"])],
        "stat -f -c %T /etc/default; ls /etc/default | wc -l; cat /etc/default/useradd | head -c 1 | wc -c; echo x > /etc/default/new",
    );
    let wanted = fs::read_dir("/etc/default").unwrap().count();
    let output = machine.run_request(request).await.unwrap();
    assert_eq!(output.stdout, format!("tmpfs\n{wanted}\n1\n"), "{}", output.stderr);
}

pub async fn destinations(machine: &Machine) {
    let dir = share("destinations");
    fs::write(dir.join("file"), "a file\n").unwrap();
    // Volumes within a volume, a file where none is, links of the image.
    fs::create_dir_all(dir.join("outer")).unwrap();
    std::os::unix::fs::symlink("/tmp/led/to", dir.join("outer/link")).unwrap();
    let request = with_mounts(
        "destinations",
        vec![
            bind("/outer", "destinations/outer", &["rbind"]),
            mount_of("/outer/inner/deep", "tmpfs", "tmpfs", &["size=1m"]),
            bind("/outer/link/file", "destinations/file", &["bind"]),
            bind("/deep/missing/file", "destinations/file", &["bind", "ro"]),
        ],
        "cat /tmp/led/to/file /deep/missing/file; stat -f -c %T /outer/inner/deep; ls /outer",
    );
    let output = machine.run_request(request).await.unwrap();
    assert_eq!(output.stdout, "a file\na file\ntmpfs\ninner\nlink\n", "{}", output.stderr);
    assert!(dir.join("outer/inner/deep").is_dir(), "made where the volume is");
    fs::remove_dir_all(dir).unwrap();
}

pub async fn mounts_that_are_refused(machine: &Machine) {
    let dir = share("refused");
    fs::create_dir_all(dir.join("d")).unwrap();
    for (name, target) in
        [("to-proc", "/proc/sys"), ("proc-itself", "/proc"), ("loop", "loop"), ("plain", "/tmp/plain")]
    {
        std::os::unix::fs::symlink(target, dir.join(name)).unwrap();
    }
    let inside = |mount: Mount| vec![bind("/v", "refused", &["rbind"]), mount];
    for (mounts, expected) in [
        (
            inside(bind("/v/to-proc/kernel", "refused/d", &["bind"])),
            "\"/proc/sys/kernel\" cannot be mounted because it is inside /proc",
        ),
        (
            inside(mount_of("/v/to-proc", "tmpfs", "tmpfs", &[])),
            "\"/proc/sys\" cannot be mounted because it is inside /proc",
        ),
        (
            inside(bind("/v/proc-itself", "refused/d", &["bind"])),
            "\"/proc\" cannot be mounted because it is not of type proc",
        ),
        (
            inside(mount_of("/v/loop/x", "tmpfs", "tmpfs", &[])),
            "mount \"tmpfs\" at \"/v/loop/x\": too many symbolic links",
        ),
        (
            inside(mount_of("/v/plain", "sysfs", "sysfs", &[])),
            "\"sysfs\" must be mounted on an ordinary directory",
        ),
        (
            vec![mount_of("/x", "tmpfs", "tmpfs", &["sise=1m"])],
            "mount \"tmpfs\" at \"/x\": tmpfs: Unknown parameter 'sise'",
        ),
        (vec![mount_of("/x", "nosuchfs", "x", &[])], "mount \"nosuchfs\" at \"/x\": no such device"),
        (vec![mount_of("/x", "proc", "proc", &["tmpcopyup"])], "\"tmpcopyup\" is for a tmpfs"),
        (vec![mount_of("/x", "tmpfs", "tmpfs", &["idmap"])], "only a bind mount can be idmapped"),
        (vec![mount_of("/x", "", "", &["remount", "ro"])], "remount \"/x\": no such file or directory"),
        (
            vec![Mount { block_serial: "nope".into(), ..mount_of("/x", "ext4", "", &[]) }],
            "no block device has the serial \"nope\"",
        ),
    ] {
        let error =
            machine.run_request(with_mounts("refused", mounts, "true")).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} should contain {expected:?}");
    }
    assert!(!Path::new("/tmp/plain").exists());
    fs::remove_dir_all(dir).unwrap();
}

pub async fn propagation_of_the_root(machine: &Machine) {
    for (name, root, proc) in
        [("", "-", "-"), ("shared", "shared:", "-"), ("rshared", "shared:", "shared:"), ("rslave", "-", "-")]
    {
        let mut request = container("propagation", shell(&format!("{FLAGS} flags /; flags /proc")));
        request.rootfs.mut_or_insert_default().propagation = name.into();
        let output = machine.run_request(request).await.unwrap();
        let found: Vec<&str> = output.stdout.lines().filter_map(|line| line.split(' ').nth(1)).collect();
        assert!(found[0].starts_with(root) && found[1].starts_with(proc), "{name}: {output:?}");
    }
}
