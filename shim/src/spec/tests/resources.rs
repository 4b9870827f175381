//! `linux.resources`: limits, devices, cgroups.

use super::*;

fn resources(value: Value) -> Resources {
    let mut spec = ctr_spec();
    spec["linux"]["resources"] = value;
    load(&spec).unwrap().container.resources.unwrap()
}

#[test]
fn limits_are_converted_as_runc_does() {
    let given = resources(json!({
        "memory": {"limit": 1000, "reservation": 500, "swap": 1500},
        "cpu": {"shares": 1024, "quota": 50000, "period": 100000, "burst": 10, "idle": 1, "cpus": "0-1", "mems": "0"},
        "pids": {"limit": 100},
        "blockIO": {"weight": 500},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}],
        "unified": {"memory.high": "1000"}
    }));
    assert_eq!(
        (given.memory_max, given.memory_low, given.memory_swap_max),
        (Some(1000), Some(500), Some(500))
    );
    assert_eq!(
        (given.cpu_weight, given.cpu_quota_us, given.cpu_period_us),
        (Some(100), Some(50000), Some(100000))
    );
    assert_eq!((given.cpu_burst_us, given.cpu_idle), (Some(10), Some(true)));
    assert_eq!((given.cpus.as_str(), given.mems.as_str()), ("0-1", "0"));
    assert_eq!((given.pids_max, given.io_weight), (Some(100), Some(4950)));
    assert_eq!(
        (given.hugepage_limits[0].page_size.as_str(), given.hugepage_limits[0].limit),
        ("2MB", 4194304)
    );
    assert_eq!(given.unified["memory.high"], "1000");

    let unset = resources(json!({
        "memory": {"limit": 0, "reservation": 0, "swap": 0}, "cpu": {"shares": 0, "quota": 0, "period": 0},
        "pids": {"limit": 0}, "blockIO": {"weight": 0}
    }));
    let nothing = Resources { device_rules: unset.device_rules.clone(), ..Default::default() };
    assert_eq!(unset, nothing);

    let unlimited = resources(json!({"memory": {"limit": -1}, "cpu": {"quota": -1}, "pids": {"limit": -1}}));
    assert_eq!((unlimited.memory_max, unlimited.memory_swap_max), (Some(-1), Some(-1)));
    assert_eq!((unlimited.cpu_quota_us, unlimited.pids_max), (Some(-1), Some(-1)));

    for (shares, weight) in [
        (1, 1),
        (2, 1),
        (256, 35),
        (512, 59),
        (1024, 100),
        (2048, 174),
        (262_144, 10_000),
        (u64::MAX, 10_000),
    ] {
        assert_eq!(resources(json!({"cpu": {"shares": shares}})).cpu_weight, Some(weight));
    }
    for (weight, converted) in [(10, 1), (1000, 10_000)] {
        assert_eq!(resources(json!({"blockIO": {"weight": weight}})).io_weight, Some(converted));
    }
    let no_swap = resources(json!({"memory": {"limit": 1000, "swap": 1000}}));
    assert_eq!(no_swap.memory_swap_max, Some(0));
}

#[test]
fn what_only_cgroup_v1_has_is_listed() {
    let mut spec = ctr_spec();
    spec["linux"]["resources"] = json!({
        "memory": {"kernel": 1, "kernelTCP": 1, "swappiness": 10, "disableOOMKiller": true},
        "cpu": {"realtimeRuntime": 1, "realtimePeriod": 1}, "network": {"classID": 1}
    });
    let not_applied = load(&spec).unwrap().not_applied;
    let fields = [
        "memory.kernel",
        "memory.kernelTCP",
        "memory.swappiness",
        "memory.disableOOMKiller",
        "cpu.realtimeRuntime",
        "cpu.realtimePeriod",
        "network",
    ];
    assert_eq!(not_applied, fields.map(|field| format!("linux.resources.{field}")));
}

#[test]
fn several_throttles_of_one_device_are_one_limit() {
    let limits = resources(json!({"blockIO": {
        "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 100}, {"major": 9, "minor": 0, "rate": 50}],
        "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 7}],
        "weightDevice": [{"major": 8, "minor": 0, "weight": 10}]
    }}))
    .io_limits;
    assert_eq!(limits.len(), 1);
    assert_eq!((limits[0].serial.as_str(), limits[0].read_bps, limits[0].write_bps), ("", Some(50), None));
    assert_eq!((limits[0].write_iops, limits[0].weight), (Some(7), Some(1)));
}

#[test]
fn device_rules_are_in_the_guests_terms() {
    let rules = resources(json!({"devices": [
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
        {"allow": true, "type": "b", "major": 8, "minor": 0, "access": "rw"},
        {"allow": true, "type": "b", "major": 8, "minor": -1, "access": "r"}
    ]}))
    .device_rules;
    let text: Vec<_> = rules
        .iter()
        .map(|rule| {
            let number = |number: Option<u32>| number.map_or("*".into(), |number| number.to_string());
            let verb = if rule.allow { "allow" } else { "deny" };
            format!("{verb} {} {}:{} {}", rule.type_, number(rule.major), number(rule.minor), rule.access)
        })
        .collect();
    assert_eq!(
        text,
        ["deny a *:* rwm", "allow c 10:229 rw", "allow b 8:* r"],
        "the disk of the host is not the guest's"
    );
    // What every container may use besides, the agent knows.
    assert!(resources(json!({})).device_rules.is_empty());
}

#[test]
fn updates_change_what_they_name() {
    let (update, not_applied) =
        crate::spec::resources(br#"{"memory": {"limit": 1000, "swappiness": 1}, "devices": []}"#, &[])
            .unwrap();
    assert_eq!(update, Resources { memory_max: Some(1000), ..Default::default() });
    assert_eq!(not_applied, ["resources.memory.swappiness"]);
    let error = crate::spec::resources(br#"{"cpu": {"quota": "half"}}"#, &[]).unwrap_err().to_string();
    assert!(error.starts_with("update: cpu.quota: invalid type"), "{error}");
    let error = crate::spec::resources(br#"{"pids": {"limit": -7}}"#, &[]).unwrap_err().to_string();
    assert_eq!(error, "resources.pids.limit: must be positive, or -1 for no limit, is -7");
}

#[test]
fn systemd_style_cgroups_become_paths() {
    for (given, expected, systemd) in [
        ("system.slice:docker:abc", "/system.slice/docker-abc.scope", true),
        (":cri:abc", "/system.slice/cri-abc.scope", true),
        (
            "kubepods-burstable-podX.slice:cri-containerd:abc",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podX.slice/cri-containerd-abc.scope",
            true,
        ),
        ("-.slice:cri:abc", "/cri-abc.scope", true),
        ("a.slice:cri:a-b.slice", "/a.slice/a-b.slice", true),
        ("kubepods/pod1/abc", "/kubepods/pod1/abc", false),
        ("/", "/web", false),
        ("", "/web", false),
    ] {
        let mut spec = ctr_spec();
        spec["linux"]["cgroupsPath"] = json!(given);
        let bundle = load(&spec).unwrap();
        assert_eq!((bundle.container.cgroup_path.as_str(), bundle.systemd_cgroup), (expected, systemd));
    }
    for wrong in ["a:cri:abc", ".slice:cri:abc", "a--b.slice:cri:abc", "-a.slice:cri:abc", "a.slice:cri:"] {
        let mut spec = ctr_spec();
        spec["linux"]["cgroupsPath"] = json!(wrong);
        let error = load(&spec).unwrap_err().to_string();
        assert!(error.starts_with("linux.cgroupsPath: must be SLICE:PREFIX:NAME"), "{error}");
    }
}
