//! Plugins of the Container Network Interface, called as its specification says.

use std::{
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    job::{self, Input},
    scale,
    world::shell,
};

/// Directory with the plugins; unset: [`INSTALLED`].
const DIR_ENV: &str = "RVM_CNI_DIR";
/// Where Debian has them.
const INSTALLED: &str = "/usr/lib/cni";

/// Where the plugins are.
pub fn plugins() -> PathBuf {
    std::env::var_os(DIR_ENV).map_or_else(|| PathBuf::from(INSTALLED), PathBuf::from)
}

/// Where ip(8) has names for network namespaces.
const NAMED: &str = "/run/netns";

/// A network namespace with a name, which is removed with the value.
pub struct Namespace(String);

impl Namespace {
    /// Makes one with its `lo` up.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn new(name: &str) -> Result<Self> {
        shell(&format!("ip netns add {name} && ip -n {name} link set lo up"))?;
        Ok(Self(name.to_owned()))
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        Path::new(NAMED).join(&self.0)
    }

    /// As `--with-ns` of `ctr` names it.
    pub fn option(&self) -> String {
        format!("network:{}", self.path().display())
    }

    /// Runs a shell script in it, and returns what it prints.
    ///
    /// # Errors
    /// When the script fails.
    pub fn run(&self, script: &str) -> Result<String> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0, "sh", "-ec", script]);
        let finished = job::run(command, Input::Nothing, scale::command())?;
        ensure!(finished.code() == 0, "in {}: {script}: {finished}", self.0);
        Ok(finished.text())
    }

    /// What of a sandbox's is in it: taps, and filters on interfaces.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn left(&self) -> Result<String> {
        self.run(
            "ip -o link | grep rvm-tap || true
             for link in $(ip -o link | sed 's/^[0-9]*: //; s/[:@].*//'); do
                 tc qdisc show dev $link | grep -e clsact -e ingress || true
             done",
        )
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // ip(8) has made the directory a mount of its own with the first.
        let _ = shell(&format!(
            "ip netns delete {}; [ -n \"$(ls {NAMED})\" ] || {{ umount {NAMED}; rmdir {NAMED}; }}",
            self.0
        ));
    }
}

/// The network of `ctr run --cni`, where ctr looks for it in this mount namespace alone; it
/// goes with the value.
pub struct ForCtr(());

impl ForCtr {
    /// Directories in which ctr looks for plugins and for networks.
    const LOOKS: [&str; 2] = ["/opt/cni/bin", "/etc/cni/net.d"];
    const CONFIGURED: &str = "/run/rvm-tests/net.d";

    /// A network of a chain of plugins.
    ///
    /// # Errors
    /// When its description does not get there.
    pub fn new(plugins: &Value) -> Result<Self> {
        let [programs, networks] = Self::LOOKS;
        let configured = Self::CONFIGURED;
        shell(&format!(
            "mkdir -p {programs} {networks} {configured}
             mount --bind {} {programs}; mount --bind {configured} {networks}",
            self::plugins().display()
        ))?;
        let there = Self(());
        let list = json!({"cniVersion": "0.4.0", "name": "rvm", "plugins": plugins});
        std::fs::write(Path::new(configured).join("10-rvm.conflist"), list.to_string())?;
        Ok(there)
    }
}

impl Drop for ForCtr {
    fn drop(&mut self) {
        let [programs, networks] = Self::LOOKS;
        let _ = shell(&format!("umount {programs} {networks}; rm -rf {}", Self::CONFIGURED));
    }
}

/// A network: a chain of plugins.
pub struct Network {
    name: String,
    plugins: Vec<Value>,
}

impl Network {
    /// A network whose interfaces the `plugins` make, one after the other.
    pub fn new(name: &str, plugins: Value) -> Self {
        let plugins = plugins.as_array().cloned().unwrap_or_default();
        Self { name: name.to_owned(), plugins }
    }

    /// Adds the interface `interface` to a namespace; `runtime` is what plugins with
    /// that capability are told. Returns the result.
    ///
    /// # Errors
    /// What a plugin says.
    pub fn add(&self, id: &str, namespace: &Namespace, interface: &str, runtime: &Value) -> Result<Value> {
        let mut result = Value::Null;
        for plugin in &self.plugins {
            result = self.call("ADD", plugin, (id, namespace, interface), runtime, &result)?;
        }
        Ok(result)
    }

    /// Whether all is as when it was added, as the plugins say that look into the
    /// namespace (portmap's own check fails under iptables-nft, whoever the container is).
    ///
    /// # Errors
    /// What a plugin says.
    pub fn check(
        &self,
        id: &str,
        namespace: &Namespace,
        interface: &str,
        (runtime, added): (&Value, &Value),
    ) -> Result<()> {
        let looks_inside = |plugin: &&Value| matches!(plugin["type"].as_str(), Some("bridge" | "tuning"));
        for plugin in self.plugins.iter().filter(looks_inside) {
            self.call("CHECK", plugin, (id, namespace, interface), runtime, added)?;
        }
        Ok(())
    }

    /// Takes away what was added.
    ///
    /// # Errors
    /// What a plugin says.
    pub fn delete(
        &self,
        id: &str,
        namespace: &Namespace,
        interface: &str,
        (runtime, added): (&Value, &Value),
    ) -> Result<()> {
        for plugin in self.plugins.iter().rev() {
            self.call("DEL", plugin, (id, namespace, interface), runtime, added)?;
        }
        Ok(())
    }

    fn call(
        &self,
        command: &str,
        plugin: &Value,
        (id, namespace, interface): (&str, &Namespace, &str),
        runtime: &Value,
        previous: &Value,
    ) -> Result<Value> {
        let kind = plugin["type"].as_str().context("a plugin without a type")?;
        let mut config = plugin.clone();
        config["cniVersion"] = json!("0.4.0");
        config["name"] = json!(self.name);
        let wants =
            |(capability, _): &(&String, &Value)| plugin["capabilities"][capability.as_str()] == json!(true);
        let told: serde_json::Map<_, _> = runtime
            .as_object()
            .into_iter()
            .flatten()
            .filter(wants)
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        if !told.is_empty() {
            config["runtimeConfig"] = Value::Object(told);
        }
        if !previous.is_null() {
            config["prevResult"] = previous.clone();
        }
        let dir = plugins();
        let mut called = Command::new(dir.join(kind));
        called
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", namespace.path())
            .env("CNI_IFNAME", interface)
            .env("CNI_PATH", &dir)
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .arg0(kind);
        let finished = job::run(called, Input::Bytes(config.to_string().into_bytes()), scale::command())?;
        ensure!(finished.code() == 0, "{kind} {command}: {finished}");
        Ok(serde_json::from_str(&finished.text()).unwrap_or(Value::Null))
    }
}
