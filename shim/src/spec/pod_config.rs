//! A pod as the Sandbox API describes it: `runtime.v1.PodSandboxConfig` of Kubernetes' CRI, of which what a machine is made
//! from is read. There is no container's specification beside it.

use std::collections::HashMap;

use oci_spec::runtime::LinuxIdMappingBuilder;
use protobuf::well_known_types::any::Any;
use rvm_protocol::agent::IdMapping;

use super::{Announced, SpecError, Users, linux, namespaces, text};
use crate::{
    cgroup::DEFAULT_PERIOD_US,
    options::{Value, decode},
    sysctl,
};

/// The message's name, whatever is before it.
const NAME: &str = "PodSandboxConfig";
/// `NamespaceMode` of CRI: the sandbox's, and the node's.
const OF_POD: u64 = 0;
const OF_NODE: u64 = 2;
/// Longest host name the kernel takes.
const HOST_NAME_MAX: usize = 64;

/// What a pod asks of its machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodConfig {
    /// Its host name; empty: the host's.
    pub hostname: String,
    /// Its resolv.conf; none: the host's.
    pub resolv_conf: Option<String>,
    /// Where on the host it is accounted for, and whether that was spelt as for systemd.
    pub cgroup: (String, bool),
    /// Whether its containers share a pid namespace.
    pub shared_pid: bool,
    /// The user namespace of its containers, where they have one of their own.
    pub users: Option<Users>,
    /// Kernel parameters of its namespaces.
    pub sysctl: HashMap<String, String>,
    /// What its containers will use.
    pub announced: Announced,
}

impl PodConfig {
    /// Of what came with a sandbox called `id`; without any it is a plain one.
    pub fn parse(id: &str, options: Option<&Any>) -> Result<Self, SpecError> {
        let Some(any) = options.filter(|any| !any.type_url.is_empty()) else {
            return Ok(Self { cgroup: linux::cgroup_path(id, None)?, ..Self::default() });
        };
        if any.type_url.rsplit(['/', '.']).next() != Some(NAME) {
            let problem = format!("must be a runtime.v1.{NAME}, is {:?}", any.type_url);
            return Err(SpecError::field("options", problem));
        }
        let pod = Message::decode("options", &any.value)?;
        let linux = pod.message(8, "linux")?;
        let security = linux.message(2, "security_context")?;
        let namespaces = security.message(1, "namespace_options")?;
        refuse(&namespaces)?;
        let users = users(&namespaces.message(5, "userns_options")?)?;
        let hostname = text("options.hostname", Some(&pod.string(2, "hostname")?))?;
        if hostname.len() > HOST_NAME_MAX {
            let problem = format!("must have at most {HOST_NAME_MAX} bytes, is {hostname:?}");
            return Err(SpecError::field("options.hostname", problem));
        }
        Ok(Self {
            hostname,
            resolv_conf: resolv_conf(&pod.message(4, "dns_config")?)?,
            cgroup: cgroup(id, &linux.string(1, "cgroup_parent")?)?,
            // As CRI has it where nothing is said.
            shared_pid: namespaces.number(2) == OF_POD,
            sysctl: sysctls(&linux, users.is_some())?,
            users,
            announced: announced(&linux.message(5, "resources")?),
        })
    }
}

/// What no microVM can have.
fn refuse(namespaces: &Message) -> Result<(), SpecError> {
    let field = |name: &str| format!("options.linux.{name}");
    for (number, name, kubernetes) in
        [(1, "network", "hostNetwork"), (2, "pid", "hostPID"), (3, "ipc", "hostIPC")]
    {
        if namespaces.number(number) == OF_NODE {
            let reason = format!("a microVM cannot share it with the host (Kubernetes: {kubernetes}: false)");
            return Err(SpecError::unsupported(
                field(&format!("security_context.namespace_options.{name}")),
                reason,
            ));
        }
    }
    Ok(())
}

/// What containerd 2.x has a pause container set (`enable_unprivileged_ports` and `enable_unprivileged_icmp`, both on
/// by default): any user may serve at any port, and ping.
const PORTS: (&str, &str) = ("net.ipv4.ip_unprivileged_port_start", "0");
const PING: (&str, &str) = ("net.ipv4.ping_group_range", "0 2147483647");

/// What the pod sets, and where it says nothing what is set for all. Groups of a user namespace are not all mapped.
fn sysctls(linux: &Message, has_users: bool) -> Result<HashMap<String, String>, SpecError> {
    let unsaid = [Some(PORTS), (!has_users).then_some(PING)];
    let mut all: HashMap<String, String> =
        unsaid.into_iter().flatten().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    for bytes in linux.bytes(3) {
        let entry = Message::decode("options.linux.sysctls", bytes)?;
        let (name, value) = (entry.string(1, "linux.sysctls")?, entry.string(2, "linux.sysctls")?);
        let field = format!("options.linux.sysctls[{name:?}]");
        if !sysctl::is_name(&name) || name.starts_with('-') {
            return Err(SpecError::field(field, "must be a kernel parameter's name, as in sysctl(8)"));
        }
        all.insert(name, text(field, Some(&value))?);
    }
    Ok(all)
}

/// `UserNamespace` of CRI; none where the pod has the node's users.
fn users(options: &Message) -> Result<Option<Users>, SpecError> {
    if options.0.is_empty() || options.number(1) == OF_NODE {
        return Ok(None);
    }
    let ids = |number, name: &str| -> Result<Vec<IdMapping>, SpecError> {
        let field = format!("options.linux.security_context.namespace_options.userns_options.{name}");
        let mapping = |bytes: &[u8]| {
            let found = Message::decode(&field, bytes)?;
            let id = |number| {
                let wrong = |_| SpecError::field(&field, "must be numbers of 32 bits");
                u32::try_from(found.number(number)).map_err(wrong)
            };
            let mapping = LinuxIdMappingBuilder::default().host_id(id(1)?).container_id(id(2)?).size(id(3)?);
            mapping.build().map_err(|error| SpecError::field(&field, error.to_string()))
        };
        let found = options.bytes(number).map(mapping).collect::<Result<Vec<_>, SpecError>>()?;
        let found = namespaces::mappings(&field, &Some(found))?;
        if !namespaces::is_mapped(&found, 0) {
            return Err(SpecError::field(field, "must map id 0 of the pod"));
        }
        Ok(found)
    };
    Ok(Some(Users { uids: ids(2, "uids")?, gids: ids(3, "gids")?, host: None }))
}

/// As containerd's CRI plugin puts a sandbox below the pod's cgroup.
fn cgroup(id: &str, parent: &str) -> Result<(String, bool), SpecError> {
    let path = match parent.rsplit('/').next() {
        _ if parent.is_empty() => return linux::cgroup_path(id, None),
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:cri-containerd:{id}"),
        _ => format!("{parent}/{id}"),
    };
    linux::cgroup_path(id, Some(path.as_ref()))
}

fn announced(resources: &Message) -> Announced {
    // They are signed, and of nothing and less nothing is said.
    let positive =
        |number| Some(resources.number(number)).filter(|value| (1..=i64::MAX as u64).contains(value));
    let period = positive(1).unwrap_or(DEFAULT_PERIOD_US);
    Announced { memory: positive(4), cpus: positive(2).map(|quota| quota.div_ceil(period)) }
}

fn resolv_conf(dns: &Message) -> Result<Option<String>, SpecError> {
    let [servers, searches, options] = [dns.strings(1)?, dns.strings(2)?, dns.strings(3)?];
    if dns.0.is_empty() {
        return Ok(None);
    }
    // In the order in which CRI writes them for a pause container.
    let line = |word: &str, values: &[String]| match values {
        [] => String::new(),
        values => format!("{word} {}\n", values.join(" ")),
    };
    let servers: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    Ok(Some(line("search", &searches) + &servers + &line("options", &options)))
}

/// The fields of a message, whatever they mean.
struct Message(Vec<(u32, Value)>);

impl Message {
    fn decode(field: &str, bytes: &[u8]) -> Result<Self, SpecError> {
        decode(bytes).map(Self).ok_or_else(|| SpecError::field(field, "cannot be decoded"))
    }

    fn bytes(&self, number: u32) -> impl Iterator<Item = &[u8]> {
        self.0.iter().filter_map(move |(found, value)| match value {
            Value::Bytes(bytes) if *found == number => Some(bytes.as_slice()),
            _ => None,
        })
    }

    /// A message in it; empty where there is none.
    fn message(&self, number: u32, name: &str) -> Result<Self, SpecError> {
        self.bytes(number)
            .last()
            .map_or(Ok(Self(Vec::new())), |bytes| Self::decode(&format!("options.{name}"), bytes))
    }

    fn string(&self, number: u32, name: &str) -> Result<String, SpecError> {
        let bytes = self.bytes(number).last().unwrap_or_default();
        let utf8 = str::from_utf8(bytes);
        utf8.map(str::to_owned).map_err(|_| SpecError::field(format!("options.{name}"), "must be UTF-8"))
    }

    fn strings(&self, number: u32) -> Result<Vec<String>, SpecError> {
        let line = |bytes: &[u8]| {
            let text = str::from_utf8(bytes).ok().filter(|text| !text.contains(char::is_control));
            let wrong = || SpecError::field("options.dns_config", "must be words without control characters");
            text.map(str::to_owned).ok_or_else(wrong)
        };
        self.bytes(number).map(line).collect()
    }

    fn number(&self, number: u32) -> u64 {
        let value = |(found, value): &(u32, Value)| match value {
            Value::Number(value) if *found == number => Some(*value),
            _ => None,
        };
        self.0.iter().rev().find_map(value).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One field of a message or a string.
    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, u8::try_from(content.len()).unwrap()], content].concat()
    }

    fn parse(message: &[u8]) -> Result<PodConfig, String> {
        let any = Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: message.into(),
            ..Default::default()
        };
        PodConfig::parse("pod", Some(&any)).map_err(|error| error.to_string())
    }

    #[test]
    fn what_a_pod_asks_for_is_read() {
        let dns =
            [field(1, b"192.0.2.1"), field(1, b"192.0.2.2"), field(2, b"a.b"), field(3, b"ndots:5")].concat();
        // A period of 100000, a quota of 150000, shares, 1 GiB.
        let resources = b"\x08\xa0\x8d\x06\x10\xf0\x93\x09\x18\x02\x20\x80\x80\x80\x80\x04";
        let namespaces = b"\x10\x01";
        let linux =
            [field(1, b"/kubepods/burstable/pod1"), field(2, &field(1, namespaces)), field(5, resources)];
        let pod = [field(1, b""), field(2, b"web-0"), field(4, &dns), field(8, &linux.concat())].concat();
        let expected = PodConfig {
            hostname: "web-0".into(),
            resolv_conf: Some(
                "search a.b\nnameserver 192.0.2.1\nnameserver 192.0.2.2\noptions ndots:5\n".into(),
            ),
            cgroup: ("/kubepods/burstable/pod1/pod".into(), false),
            shared_pid: false,
            users: None,
            sysctl: HashMap::from([PORTS, PING].map(|(name, value)| (name.into(), value.into()))),
            announced: Announced { memory: Some(1 << 30), cpus: Some(2) },
        };
        assert_eq!(parse(&pod).unwrap(), expected);
        // Of an enumeration nothing is said where it is 0.
        assert!(parse(&field(8, &field(2, &field(1, b"")))).unwrap().shared_pid);
        let systemd = parse(&field(8, &field(1, b"/kubepods.slice/kubepods-pod1.slice"))).unwrap();
        assert_eq!(
            systemd.cgroup,
            ("/kubepods.slice/kubepods-pod1.slice/cri-containerd-pod.scope".into(), true)
        );
        assert_eq!(PodConfig::parse("pod", None).unwrap().cgroup.0, "/pod");
    }

    fn namespaces(bytes: &[u8]) -> Vec<u8> {
        field(8, &field(2, &field(1, bytes)))
    }

    #[test]
    fn what_a_pod_sets_goes_before_what_is_set_for_all() {
        let set = |name: &[u8], value: &[u8]| field(3, &[field(1, name), field(2, value)].concat());
        let linux =
            [set(b"net.ipv4.ip_unprivileged_port_start", b"80"), set(b"kernel.shm_rmid_forced", b"1")];
        let pod = parse(&field(8, &linux.concat())).unwrap();
        let expected = [("net.ipv4.ip_unprivileged_port_start", "80"), ("kernel.shm_rmid_forced", "1"), PING];
        assert_eq!(pod.sysctl, expected.map(|(name, value)| (name.into(), value.into())).into());
        let ids = b"\x08\xa0\x8d\x06\x18\x80\x80\x04";
        let pod = parse(&namespaces(&field(5, &[field(2, ids), field(3, ids)].concat()))).unwrap();
        assert_eq!(pod.sysctl.into_keys().collect::<Vec<_>>(), [PORTS.0]);
    }

    #[test]
    fn users_of_a_pod_are_mapped_as_it_says() {
        // 65536 of the host's from 100000 on.
        let ids = b"\x08\xa0\x8d\x06\x18\x80\x80\x04";
        let users = |uids: &[u8], gids: &[u8]| {
            parse(&namespaces(&field(5, &[field(2, uids), field(3, gids)].concat()))).map(|pod| pod.users)
        };
        let Users { uids, gids, host } = users(ids, ids).unwrap().unwrap();
        assert_eq!((uids[0].container_id, uids[0].host_id, uids[0].size), (0, 100_000, 65536));
        assert_eq!((uids.len(), gids, host), (1, uids, None));
        assert_eq!(parse(&namespaces(&field(5, b"\x08\x02"))).unwrap().users, None, "the node's");
        let at = "options.linux.security_context.namespace_options.userns_options";
        let error = users(ids, b"\x10\x01\x18\x01").unwrap_err();
        assert_eq!(error, format!("{at}.gids: must map id 0 of the pod"));
        assert_eq!(users(b"", ids).unwrap_err(), format!("{at}.uids[0].size: must be at least 1, is 0"));
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_name() {
        for (message, field) in [
            (namespaces(b"\x08\x02"), "options.linux.security_context.namespace_options.network"),
            (namespaces(b"\x10\x02"), "options.linux.security_context.namespace_options.pid"),
            (namespaces(b"\x18\x02"), "options.linux.security_context.namespace_options.ipc"),
            (field(8, &field(3, b"")), "options.linux.sysctls[\"\"]"),
            (field(8, &field(3, &field(1, b"net/../x"))), "options.linux.sysctls[\"net/../x\"]"),
            (field(2, &[b'x'; 65]), "options.hostname"),
            (field(2, b"\xff"), "options.hostname"),
            (field(4, &field(1, b"1\nnameserver 2")), "options.dns_config"),
            (b"\x0a\x7f".to_vec(), "options"),
        ] {
            let error = parse(&message).unwrap_err();
            assert!(error.starts_with(&format!("{field}: ")), "{error}");
        }
        let other = Any { type_url: "runtime.v1.Other".into(), ..Default::default() };
        assert!(PodConfig::parse("pod", Some(&other)).is_err());
    }
}
