//! Hooks that run in the guest.

use std::{fs, path::Path};

use protobuf::MessageField;
use rvm_protocol::agent::{CreateContainerRequest, Hook, HookState, Process, User};

use crate::{
    confinement::without,
    fixture::{Machine, container, mount_of, program, shell},
};

fn hook(script: &str, timeout_s: u32) -> Hook {
    Hook {
        path: "/bin/sh".into(),
        args: vec!["hook".into(), "-c".into(), script.into()],
        env: vec!["PATH=/bin:/usr/bin".into(), "MARK=yes".into()],
        timeout_s,
        ..Default::default()
    }
}

/// A container with the share's directory `hooks` at `/run/out`.
fn with_volume(id: &str, process: Process) -> (CreateContainerRequest, std::path::PathBuf) {
    let volume = Path::new(rvm_protocol::guest::VOLUMES_DIR).join("hooks");
    fs::create_dir_all(&volume).unwrap();
    fs::set_permissions(&volume, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let mut request = container(id, process);
    let mut mount = mount_of("/run/out", "bind", "hooks", &["rbind", "rw"]);
    mount.from_share = true;
    request.mounts.push(mount);
    request.hook_state = MessageField::some(HookState {
        oci_version: "1.1.0".into(),
        id: id.into(),
        bundle: "/run/bundle".into(),
        annotations: [("a".into(), "b \"c\"".into())].into(),
        ..Default::default()
    });
    (request, volume)
}

pub async fn hooks_inside(machine: &Machine) {
    let process = Process {
        user: MessageField::some(User { uid: 12, gid: 13, ..Default::default() }),
        ..shell("readlink /proc/self/ns/mnt /proc/self/ns/pid; cat /run/out/order; cat /run/added")
    };
    let (mut request, volume) = with_volume("hooked", process);
    request.create_container_hooks = vec![
        hook(
            "cat > /run/out/create; echo from a hook > /run/added; readlink /proc/self/ns/mnt > /run/out/mnt",
            10,
        ),
        hook("test $MARK = yes && id -u > /run/out/create-user; echo create >> /run/out/order", 0),
    ];
    request.create_container_hooks[1].args.push("ignored".into());
    request.start_container_hooks =
        vec![hook("cat > /run/out/start; id -u > /run/out/start-user; echo start >> /run/out/order", 10)];
    let order = volume.join("order");
    let mut running = {
        let created = machine.create(request).await.unwrap();
        // For the user of the container to write on.
        fs::set_permissions(&order, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        assert_eq!(fs::read_to_string(&order).unwrap(), "create\n");
        created.start().await.unwrap();
        created
    };
    let output = running.finish().await;
    running.delete().await.unwrap();
    let read = |name: &str| fs::read_to_string(volume.join(name)).unwrap();
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(lines[0], read("mnt").trim(), "the container's own mount namespace");
    assert_eq!(lines[2..], ["create", "start", "from a hook"], "{output:?}");
    assert_eq!(
        read("create"),
        "{\"ociVersion\":\"1.1.0\",\"id\":\"hooked\",\"status\":\"creating\",\"pid\":1,\
         \"bundle\":\"/run/bundle\",\"annotations\":{\"a\":\"b \\\"c\\\"\"}}"
    );
    assert_eq!(read("start"), read("create").replace("creating", "created"));
    assert_eq!((read("create-user").as_str(), read("start-user").as_str()), ("0\n", "12\n"));
    fs::remove_dir_all(volume).unwrap();
}

pub async fn hooks_that_fail(machine: &Machine) {
    let (request, volume) = with_volume("unhooked", program(&["true"]));
    let cgroup = format!("/sys/fs/cgroup{}", request.cgroup_path);
    for (failing, expected) in [
        (hook("echo no luck >&2; exit 9", 0), "exit status 9: no luck"),
        (hook("sleep 1000 & sleep 1000", 1), "timed out after 1 s"),
        (
            Hook { path: "/no/hook".into(), ..Default::default() },
            "exit status 127: exec /no/hook: no such file or directory",
        ),
    ] {
        let path = failing.path.clone();
        let mut with_create = request.clone();
        with_create.create_container_hooks = vec![hook("exit 0", 0), failing.clone()];
        let error = machine.create(with_create).await.map(|_| ()).unwrap_err().to_string();
        assert_eq!(error, format!("createContainer hook 1 ({path:?}): {expected}"));
        assert!(!Path::new(&cgroup).exists());

        let mut with_start = request.clone();
        with_start.start_container_hooks = vec![failing];
        let running = machine.create(with_start).await.unwrap();
        let error = running.start().await.unwrap_err().to_string();
        assert_eq!(error, format!("startContainer hook 0 ({path:?}): {expected}"));
        assert_eq!(running.wait().await.code, 127);
        running.delete().await.unwrap();
        assert!(!Path::new(&cgroup).exists());
    }
    fs::remove_dir_all(volume).unwrap();
}

/// Filters that do not know a newer call answer as if the kernel did not.
pub async fn hooks_under_a_filter(machine: &Machine) {
    for no_new_privileges in [true, false] {
        let process = Process { no_new_privileges, ..shell("cat /run/out/order") };
        let (mut request, volume) = with_volume("filtered", process);
        request.start_container_hooks = vec![hook("echo hooked > /run/out/order", 10), hook("sleep 1000", 1)];
        request.seccomp = MessageField::some(without(&[
            libc::SYS_clone3,
            libc::SYS_pidfd_open,
            libc::SYS_pidfd_send_signal,
        ]));
        let running = machine.create(request.clone()).await.unwrap();
        let error = running.start().await.unwrap_err().to_string();
        assert_eq!(error, "startContainer hook 1 (\"/bin/sh\"): timed out after 1 s");
        running.wait().await;
        running.delete().await.unwrap();
        request.start_container_hooks.pop();
        let output = machine.run_request(request).await.unwrap();
        assert_eq!(output.stdout, "hooked\n");
        fs::remove_dir_all(volume).unwrap();
    }
}
