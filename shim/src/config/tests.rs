use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use super::*;

fn error(text: &str) -> String {
    Config::parse(text, "config.toml").expect_err("must be refused").to_string()
}

#[test]
fn defaults_are_what_the_documented_file_says() {
    let defaults = Config::defaults().unwrap();
    assert_eq!(Config::parse(DOCUMENTED, "documented").unwrap(), defaults);
    assert_eq!(defaults.guest.vcpus, 1);
    assert_eq!(defaults.guest.boot_timeout, Duration::from_secs(60));
    assert_eq!(defaults.scratch, Scratch::Block { size_bytes: 10 << 30 });
    assert_eq!(defaults.host.state_dir, Path::new("/run/rvm"));
    assert_eq!(defaults.log_level, log::LevelFilter::Info);
}

#[test]
fn every_key_and_section_is_documented_above_it() {
    let mut comment = false;
    let mut keys = BTreeSet::new();
    let mut section = "";
    for line in DOCUMENTED.lines() {
        if let Some(name) = line.strip_prefix('[') {
            assert!(comment, "no comment above {line}");
            section = name.trim_end_matches(']');
        } else if let Some((key, _)) = line.split_once(" = ").filter(|_| !line.starts_with('#')) {
            assert!(comment, "no comment above {line}");
            keys.insert(format!("{section}.{key}"));
        }
        comment = line.starts_with('#');
    }
    // Every key the file has does something: a wrong type of value is refused
    // by it, and no key is read that the file lacks (`defaults` would fail).
    for key in &keys {
        let (section, name) = key.split_once('.').unwrap();
        let text = format!("[{section}]\n{name} = 1.5\n");
        assert!(
            error(&text).starts_with(&format!("config.toml: {key} = 1.5: must be a")),
            "{}",
            error(&text)
        );
    }
    let read = [
        "compat.ignore_labels",
        "guest.boot_timeout_s",
        "guest.free_page_reporting",
        "guest.host_sysctls",
        "guest.huge_pages",
        "guest.initramfs",
        "guest.kernel",
        "guest.kernel_params",
        "guest.memory_mib",
        "guest.vcpus",
        "host.cache_dir",
        "host.monitor",
        "host.own_ids",
        "host.state_dir",
        "images.enabled",
        "images.free_mib",
        "images.make",
        "images.memory_limit_mib",
        "images.size_limit_mib",
        "log.level",
        "network.receive_bytes_per_s",
        "network.receive_packets_per_s",
        "network.transmit_bytes_per_s",
        "network.transmit_packets_per_s",
        "network.vhost",
        "scratch.backing",
        "scratch.size_mib",
        "scratch.writes",
    ];
    assert_eq!(keys.iter().map(String::as_str).collect::<Vec<_>>(), read);
}

#[test]
fn a_users_file_changes_what_it_names() {
    let config = Config::parse(
        "[guest]\nvcpus = 4\nkernel_params = ' loglevel=7 dyndbg=\"file a.c +p\" '\n[scratch]\nbacking = 'block'\nsize_mib = 1024\n[compat]\nignore_labels = true\n[log]\nlevel = 'debug'\n",
        "config.toml",
    )
    .unwrap();
    let defaults = Config::defaults().unwrap();
    assert_eq!(config.guest.vcpus, 4);
    assert_eq!(config.guest.cmdline(), format!("{DEFAULT_CMDLINE} loglevel=7 dyndbg=\"file a.c +p\""));
    assert_eq!(config.scratch, Scratch::Block { size_bytes: 1 << 30 });
    assert!(config.compat.ignore_labels && !defaults.compat.ignore_labels);
    let tmpfs = Config::parse("[scratch]\nbacking = 'tmpfs'\n", "config.toml").unwrap();
    assert_eq!((tmpfs.scratch, tmpfs.writes), (Scratch::Tmpfs { size_bytes: 0 }, Writes::Guest));
    let host = Config::parse("[scratch]\nwrites = 'host'\n", "config.toml").unwrap();
    assert_eq!(host.writes, Writes::Host);
    assert_eq!(config.log_level, log::LevelFilter::Debug);
    assert_eq!(config.guest.kernel, defaults.guest.kernel);
    assert_eq!(config.host, defaults.host);
    assert_eq!(defaults.guest.cmdline(), DEFAULT_CMDLINE);
}

#[test]
fn longest_command_line_fits_the_kernels_buffer() {
    let params = "x".repeat(MAX_KERNEL_PARAMS);
    let config = Config::parse(&format!("[guest]\nkernel_params = '{params}'\n"), "config.toml").unwrap();
    assert!(config.guest.cmdline().len() < 2048 - 256, "{}", config.guest.cmdline().len());
}

#[test]
fn wrong_keys_are_refused_by_name() {
    for (text, expected) in [
        (
            "[guest]\nhost_sysctls = ['vm.x', 1]",
            "config.toml: guest.host_sysctls = [\"vm.x\", 1]: must be an array of strings",
        ),
        (
            "[guest]\nhost_sysctls = ['/etc/x']",
            "config.toml: guest.host_sysctls = [\"/etc/x\"]: must be names of kernel parameters, like \"vm.max_map_count\"; \"/etc/x\" is none",
        ),
        ("[guest]\nvcpus = 0", "config.toml: guest.vcpus = 0: must be 1 to 255"),
        ("[guest]\nvcpus = 256", "config.toml: guest.vcpus = 256: must be 1 to 255"),
        ("[guest]\nvcpus = -1", "config.toml: guest.vcpus = -1: must be 1 to 255"),
        ("[guest]\nvcpus = 'two'", "config.toml: guest.vcpus = \"two\": must be an integer, for example 1"),
        ("[guest]\nmemory_mib = 63", "config.toml: guest.memory_mib = 63: must be 64 to 16777216"),
        ("[guest]\nboot_timeout_s = 0", "config.toml: guest.boot_timeout_s = 0: must be 1 to 3600"),
        ("[guest]\nkernel = 'vmlinux'", "config.toml: guest.kernel = \"vmlinux\": must be an absolute path"),
        ("[host]\nstate_dir = ''", "config.toml: host.state_dir = \"\": must be an absolute path"),
        (
            "[guest]\nkernel_params = \"quiet\\nro\"",
            "config.toml: guest.kernel_params = \"quiet\\nro\": must be printable ASCII in one line",
        ),
        (
            "[guest]\nkernel_params = 'a=\"b'",
            "config.toml: guest.kernel_params = \"a=\\\"b\": must close every quotation mark",
        ),
        (
            "[guest]\nkernel_params = 'a -- b'",
            "config.toml: guest.kernel_params = \"a -- b\": must not contain \"--\": what follows it is not a kernel parameter",
        ),
        (
            "[guest]\nvcpu = 2",
            "config.toml: guest.vcpu: unknown; [guest] has boot_timeout_s, free_page_reporting, host_sysctls, huge_pages, initramfs, kernel, kernel_params, memory_mib, vcpus",
        ),
        ("vcpus = 2", "config.toml: vcpus: unknown; vcpus belongs below [guest]"),
        (
            "[gest]\nvcpus = 2",
            "config.toml: gest: unknown; there are the sections [compat], [guest], [host], [images], [log], [network], [scratch]",
        ),
        ("guest = 3", "config.toml: guest = 3: must be a section, [guest]"),
        (
            "[scratch]\nbacking = 'disk'",
            "config.toml: scratch.backing = \"disk\": must be one of tmpfs, block",
        ),
        (
            "[scratch]\nbacking = 'block'\nsize_mib = 63",
            "config.toml: scratch.size_mib = 63: must be 0 or 64 to 16777216 with backing = \"block\"",
        ),
        (
            "[log]\nlevel = 'verbose'",
            "config.toml: log.level = \"verbose\": must be one of off, error, warn, info, debug, trace",
        ),
    ] {
        assert_eq!(error(text), expected, "for {text:?}");
    }
}

#[test]
fn syntax_errors_name_line_and_column() {
    let message = error("[guest]\nvcpus = \n");
    assert!(message.starts_with("config.toml:2:9: "), "{message}");
    assert!(!message.contains('\n'), "{message}");
    let message = error("[guest]\nvcpus = 1\nvcpus = 2\n");
    assert!(message.starts_with("config.toml:3:1: "), "{message}");
}

#[test]
fn a_file_that_was_asked_for_must_be_there() {
    let missing = Path::new("/nonexistent/rvm.toml");
    let message = Config::load(Some(missing)).unwrap_err().to_string();
    assert_eq!(message, "/nonexistent/rvm.toml: No such file or directory (os error 2)");
}

#[test]
fn lookup_order() {
    let (explicit, variable) = (Path::new("/explicit"), PathBuf::from("/variable"));
    let (present, absent) = (Path::new("/"), Path::new("/nonexistent/rvm.toml"));
    assert_eq!(locate(Some(explicit), Some(variable.clone()), present).as_deref(), Some(explicit));
    assert_eq!(locate(None, Some(variable.clone()), present), Some(variable));
    assert_eq!(locate(None, Some(PathBuf::new()), present).as_deref(), Some(present));
    assert_eq!(locate(None, None, present).as_deref(), Some(present));
    assert_eq!(locate(None, None, absent), None);
}
