//! Kernel parameters below `/proc/sys/net` that plugins set in a namespace
//! (CNI's tuning, Docker's `disable_ipv6`).

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

/// What a thread finds there is of the namespace that it is in.
const DIR: &str = "/proc/sys/net";
/// Of the namespace.
const GLOBAL: [&str; 14] = [
    "core/somaxconn",
    "ipv4/icmp_echo_ignore_all",
    "ipv4/icmp_echo_ignore_broadcasts",
    "ipv4/ip_default_ttl",
    "ipv4/ip_local_port_range",
    "ipv4/ip_local_reserved_ports",
    "ipv4/ip_nonlocal_bind",
    "ipv4/ip_unprivileged_port_start",
    "ipv4/ping_group_range",
    "ipv4/tcp_fin_timeout",
    "ipv4/tcp_keepalive_intvl",
    "ipv4/tcp_keepalive_probes",
    "ipv4/tcp_keepalive_time",
    "ipv4/tcp_syncookies",
];
/// What stands for all interfaces, and for those to come; `all` has to be set first.
const EVERY: [&str; 2] = ["all", "default"];
/// Of an interface.
const OF_INTERFACE: [(&str, &[&str]); 2] = [
    (
        "ipv4/conf",
        &[
            "accept_local",
            "accept_redirects",
            "accept_source_route",
            "arp_accept",
            "arp_announce",
            "arp_filter",
            "arp_ignore",
            "arp_notify",
            "forwarding",
            "log_martians",
            "promote_secondaries",
            "proxy_arp",
            "route_localnet",
            "rp_filter",
            "secure_redirects",
            "send_redirects",
            "src_valid_mark",
        ],
    ),
    (
        "ipv6/conf",
        &[
            "accept_dad",
            "accept_ra",
            "accept_redirects",
            "addr_gen_mode",
            "autoconf",
            "dad_transmits",
            "disable_ipv6",
            "forwarding",
            "hop_limit",
            "proxy_ndp",
            "router_solicitations",
            "use_tempaddr",
        ],
    ),
];

/// Their values in the namespace of the calling thread, by their paths below
/// `/proc/sys/net`; what its kernel does not have is left out.
pub(super) fn read<'a>(interfaces: impl Iterator<Item = &'a str>) -> io::Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    let mut take = |path: PathBuf| match fs::read_to_string(Path::new(DIR).join(&path)) {
        Ok(value) => {
            found.insert(path.to_string_lossy().into_owned(), value.trim_end().to_owned());
            Ok(())
        }
        // An interface may go meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    for path in GLOBAL {
        take(path.into())?;
    }
    for interface in EVERY.into_iter().chain(interfaces) {
        for (dir, names) in OF_INTERFACE {
            let dir = Path::new(dir).join(interface);
            for name in names {
                take(dir.join(name))?;
            }
        }
    }
    Ok(found)
}
