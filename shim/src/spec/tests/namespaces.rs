//! `linux.namespaces` and what belongs to one.

use super::*;

fn with_namespace(namespace: Value) -> Value {
    let mut spec = ctr_spec();
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(namespace);
    spec
}

#[test]
fn user_namespaces_come_with_their_mappings() {
    let mut spec = with_namespace(json!({"type": "user"}));
    let error = load(&spec).unwrap_err();
    assert!(error.starts_with("linux.uidMappings: must map id 0"), "{error}");
    spec["linux"]["uidMappings"] = json!([{"hostID": 1000, "containerID": 0, "size": 10}]);
    spec["linux"]["gidMappings"] = json!([{"hostID": 2000, "containerID": 0, "size": 11}]);
    // With its new network it is the sandbox's.
    let bundle = load(&spec).unwrap();
    let Users { uids, gids, .. } = bundle.users.unwrap();
    assert_eq!((uids[0].host_id, gids[0].size), (1000, 11));
    let user = |bundle: &Bundle| {
        let namespaces = &bundle.container.namespaces;
        namespaces.iter().any(|namespace| namespace.type_ == NamespaceType::USER.into() && namespace.sandbox)
    };
    assert!(bundle.container.uid_mappings.is_empty());
    // With a network that somebody has prepared it is its own, as that is not its network's owner.
    let mut prepared = spec.clone();
    for namespace in prepared["linux"]["namespaces"].as_array_mut().unwrap() {
        if namespace["type"] == "network" {
            namespace["path"] = json!("/run/netns/x");
        }
    }
    let prepared = load(&prepared).unwrap();
    assert!(prepared.users.is_none() && !user(&prepared));
    assert_eq!(prepared.container.uid_mappings[0].host_id, 1000);
    spec["process"]["user"]["additionalGids"] = json!([10, 11]);
    assert_eq!(
        load(&spec).unwrap_err(),
        "process.user.additionalGids[1]: 11 is not mapped by linux.gidMappings"
    );
    spec["process"]["user"]["uid"] = json!(10);
    assert_eq!(load(&spec).unwrap_err(), "process.user.uid: 10 is not mapped by linux.uidMappings");
}

#[test]
fn a_user_namespace_of_the_hosts_has_one_of_the_guests_in_its_place() {
    let mut spec = with_namespace(json!({"type": "user", "path": "/proc/self/ns/user"}));
    let error = load(&spec).unwrap_err();
    assert!(error.starts_with("linux.uidMappings: must map id 0"), "{error}");
    let ids = json!([{"hostID": 1000, "containerID": 0, "size": 20}]);
    spec["linux"]["uidMappings"] = ids.clone();
    spec["linux"]["gidMappings"] = ids;
    spec["annotations"] = json!({"io.kubernetes.cri.container-type": "sandbox"});
    let held = load(&spec).unwrap();
    let users = held.users.unwrap();
    assert!(users.host.is_some() && users.uids[0].host_id == 1000 && held.container.uid_mappings.is_empty());

    // Those that join it say the same again.
    spec["annotations"] =
        json!({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod"});
    let join = |spec: &Value, users: Option<Users>| {
        let pod = Pod { monitor: Some(1), users, ..Pod::default() };
        translate(
            Path::new("/bundle"),
            "web",
            &serde_json::from_value(spec.clone()).unwrap(),
            &Compat::default(),
            &pod,
        )
        .map_err(|error| error.to_string())
    };
    let joined = join(&spec, Some(users.clone())).unwrap().container;
    let user = joined.namespaces.iter().find(|found| found.type_ == NamespaceType::USER.into()).unwrap();
    assert!(user.sandbox && joined.uid_mappings.is_empty() && joined.gid_mappings.is_empty());
    let error = join(&spec, None).unwrap_err();
    assert!(error.contains("the sandbox was made without one"), "{error}");
    let other = Users { host: Some((0, 0)), ..users.clone() };
    assert!(join(&spec, Some(other)).unwrap_err().contains("is not the user namespace of the sandbox"));
    spec["linux"]["gidMappings"][0]["size"] = json!(9);
    let error = join(&spec, Some(users)).unwrap_err();
    assert_eq!(error, "linux.gidMappings: must be those of the sandbox, 0:1000:20");
}

#[test]
fn time_namespaces_come_with_their_offsets() {
    let mut spec = with_namespace(json!({"type": "time"}));
    spec["linux"]["timeOffsets"] = json!({"monotonic": {"secs": -5, "nanosecs": 7}, "boottime": {"secs": 9}});
    let offsets = load(&spec).unwrap().container.time_offsets;
    assert_eq!((offsets[0].clock.as_str(), offsets[0].secs), ("boottime", 9));
    assert_eq!((offsets[1].clock.as_str(), offsets[1].secs, offsets[1].nanosecs), ("monotonic", -5, 7));
}

#[test]
fn namespaces_of_processes_in_the_guest_can_be_joined() {
    let pid = crate::container::GUEST_PIDS_FROM + 42;
    let container =
        request_with("/linux/namespaces/1", json!({"type": "ipc", "path": format!("/proc/{pid}/ns/ipc")}));
    let joined =
        Namespace { type_: NamespaceType::IPC.into(), path: "/proc/42/ns/ipc".into(), ..Default::default() };
    assert_eq!(container.namespaces[1], joined);
    let error =
        error_with("/linux/namespaces/1", json!({"type": "ipc", "path": format!("/proc/{pid}/ns/net")}));
    assert!(error.contains("must end in /ns/ipc"), "{error}");
}

#[test]
fn a_network_of_the_host_is_the_sandbox_s() {
    let with = |network: Value, pod: &Pod, user: bool| {
        let mut spec = ctr_spec();
        spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "uts"}, network]);
        if user {
            spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
            spec["linux"]["uidMappings"] = json!([{"hostID": 1000, "containerID": 0, "size": 99}]);
            spec["linux"]["gidMappings"] = spec["linux"]["uidMappings"].clone();
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), spec.to_string()).unwrap();
        Bundle::load_in(pod, dir.path(), "c", &Compat::default()).map_err(|error| error.to_string())
    };
    let alone = Pod::default();
    let prepared = with(json!({"type": "network", "path": "/run/netns/x"}), &alone, false).unwrap();
    let network = prepared.network.unwrap();
    assert_eq!(
        (network.field.as_str(), network.path.as_path()),
        ("linux.namespaces[2].path", Path::new("/run/netns/x"))
    );
    let shared = |bundle: &Bundle| bundle.container.namespaces[2].sandbox;
    let new = with(json!({"type": "network", "path": ""}), &alone, false).unwrap();
    assert_eq!((new.network.as_ref(), shared(&new)), (None, true));
    // In a user namespace of its own as well.
    assert!(shared(&with(json!({"type": "network"}), &alone, true).unwrap()));

    // In a sandbox that runs, it is that one's or refused.
    let own = std::fs::metadata("/proc/self/ns/net").unwrap();
    use std::os::unix::fs::MetadataExt;
    let pod = Pod { network: Some((own.dev(), own.ino())), ..Default::default() };
    assert!(shared(&with(json!({"type": "network", "path": "/proc/self/ns/net"}), &pod, false).unwrap()));
    let error = with(json!({"type": "network", "path": "/proc/self/ns/uts"}), &pod, false).unwrap_err();
    assert!(error.contains("is not the network namespace of the sandbox"), "{error}");
}

#[test]
fn a_host_network_is_refused() {
    let mut spec = ctr_spec();
    spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "pid"}]);
    let error = load(&spec).unwrap_err();
    assert!(error.starts_with("linux.namespaces: not supported: without a \"network\""), "{error}");
}

#[test]
fn namespaces_of_a_sandbox_s_tasks_are_known_by_their_pids() {
    let own = |kind: NamespaceType| Namespace { type_: kind.into(), ..Default::default() };
    let held = |kind: NamespaceType| Namespace { sandbox: true, ..own(kind) };
    let first = Neighbour {
        pid: 100,
        guest_pid: 7,
        namespaces: vec![held(NamespaceType::NETWORK), held(NamespaceType::IPC), own(NamespaceType::PID)],
    };
    let pod = Pod { monitor: Some(99), neighbours: vec![first], ..Pod::default() };
    let at = |pid: u32, kind: &str, link: &str| {
        let mut spec = ctr_spec();
        let path = format!("/proc/{pid}/ns/{link}");
        spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "uts"}, {"type": "network"}]);
        let namespace = json!({"type": kind, "path": path});
        match kind {
            "network" => spec["linux"]["namespaces"][2] = namespace,
            _ => spec["linux"]["namespaces"].as_array_mut().unwrap().push(namespace),
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), spec.to_string()).unwrap();
        let loaded = Bundle::load_in(&pod, dir.path(), "c", &Compat::default());
        loaded.map(|bundle| bundle.container.namespaces.last().cloned().unwrap()).map_err(|e| e.to_string())
    };
    assert_eq!(at(100, "network", "net").unwrap(), held(NamespaceType::NETWORK));
    assert_eq!(at(99, "ipc", "ipc").unwrap(), held(NamespaceType::IPC));
    assert_eq!(at(100, "pid", "pid").unwrap().path, "/proc/7/ns/pid");
    assert!(at(100, "ipc", "net").unwrap_err().contains("must end in /ns/ipc"));
    for (pid, kind) in [(98, "ipc"), (1, "ipc"), (99, "pid")] {
        let error = at(pid, kind, kind).unwrap_err();
        assert!(error.contains(&format!("/proc/{pid}/ns/{kind} is a namespace of the host")), "{error}");
    }
}

#[test]
fn what_holds_a_sandbox_shares_its_namespaces() {
    let mut spec = ctr_spec();
    spec["annotations"] = json!({"io.kubernetes.cri.container-type": "sandbox"});
    let bundle = load(&spec).unwrap();
    assert_eq!(bundle.role, Role::Sandbox);
    for namespace in bundle.container.namespaces {
        let kind = namespace.type_.enum_value().unwrap();
        let shared = [NamespaceType::NETWORK, NamespaceType::IPC, NamespaceType::UTS].contains(&kind);
        assert_eq!(namespace.sandbox, shared, "{kind:?}");
    }
}

#[test]
fn namespaces_made_for_a_pod_are_the_sandboxs() {
    use std::os::unix::fs::MetadataExt;
    let load = |pod: &Pod, kind: &str, ipc: &str| {
        let mut spec = ctr_spec();
        spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "network"}, {"type": "pid"}, {"type": "ipc", "path": ipc}, {"type": "uts"}]);
        spec["annotations"] = json!({
            "io.kubernetes.cri-o.ContainerType": kind,
            "io.kubernetes.cri-o.SandboxID": "pod",
        });
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), spec.to_string()).unwrap();
        Bundle::load_in(pod, dir.path(), "c", &Compat::default()).map_err(|error| error.to_string())
    };
    // Any namespace stands for one that was pinned; the type is not looked at.
    let stands_for = "/proc/self/ns/mnt";
    let first = load(&Pod::default(), "sandbox", stands_for).unwrap();
    let ipc = Namespace { type_: NamespaceType::IPC.into(), sandbox: true, ..Default::default() };
    assert_eq!(first.container.namespaces[3], ipc);
    let found = std::fs::metadata(stands_for).unwrap();
    let identity = (found.dev(), found.ino());
    assert_eq!(first.pinned, [HostNamespace { kind: NamespaceType::IPC, identity }]);

    let pod = Pod { monitor: Some(99), pinned: Pinned::Those(first.pinned), ..Pod::default() };
    assert_eq!(load(&pod, "container", stands_for).unwrap().container.namespaces[3], ipc);
    let error = load(&pod, "container", "/proc/self/ns/net").unwrap_err();
    assert!(error.contains("is not the namespace that the pod was made with"), "{error}");
    // A pod that was made without any.
    let pod = Pod { pinned: Pinned::Those(Vec::new()), ..pod };
    let error = load(&pod, "container", stands_for).unwrap_err();
    assert!(error.contains("is a namespace of the host's kernel"), "{error}");
    let error = load(&Pod::default(), "sandbox", "/proc/self/ns/ipc").unwrap_err();
    assert!(
        error.starts_with("linux.namespaces[3].path: not supported") && error.contains("hostIPC"),
        "{error}"
    );
    let error = load(&Pod::default(), "sandbox", "/run/nobody/made/it").unwrap_err();
    assert!(error.starts_with("linux.namespaces[3].path: No such file"), "{error}");
}
