//! One package from Debian by an apt of our own: its lists and archives are
//! below the cache, its sources are the machine's Debian mirrors.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Error, command, io_error};

/// The keyring of `debian-archive-keyring`, by the names it has had.
const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"];

/// A repository and one of its suites.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Suite {
    uri: String,
    name: String,
}

/// Downloads `package` into `dir` and returns the file's path.
///
/// apt checks the index against Debian's archive key, and the package against the index.
pub fn download(dir: &Path, package: &str, progress: &dyn Fn(f64)) -> Result<PathBuf, Error> {
    let codename = release_codename()?;
    let targets = command::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE) $(COMPONENT)",
    ]))?;
    let suites = debian_suites(&targets, &codename);
    let Some(main) = suites.iter().find(|suite| !suite.name.contains('-')) else {
        return Err(Error::NoMirror { codename });
    };
    // Not every mirror has the backports, and not every release needs them: only where it is not found without.
    let backports = Suite { uri: main.uri.clone(), name: format!("{codename}-backports") };
    let with_backports = suites.iter().cloned().chain([backports]).collect();

    let mut result = download_from(dir, &suites, package, progress);
    if result.is_err() {
        result = download_from(dir, &with_backports, package, progress);
    }
    result
}

fn download_from(
    dir: &Path,
    suites: &BTreeSet<Suite>,
    package: &str,
    progress: &dyn Fn(f64),
) -> Result<PathBuf, Error> {
    let archives = dir.join("archives");
    for part in [dir.join("lists/partial"), archives.join("partial")] {
        fs::create_dir_all(&part).map_err(io_error("create", &part))?;
    }
    let sources = dir.join("sources.list");
    fs::write(&sources, sources_list(suites)).map_err(io_error("write", &sources))?;
    let conf = dir.join("apt.conf");
    fs::write(&conf, configuration(dir)).map_err(io_error("write", &conf))?;
    command::output(apt(dir).arg("update"))?;
    let uri = command::output(apt(dir).args(["download", "--print-uris", package]))?;
    let name = uri.split_whitespace().nth(1).unwrap_or_default().to_owned();
    if name.is_empty() || name.contains('/') {
        let problem = format!("apt names its file {name:?}");
        return Err(Error::BadPackage { package: package.into(), problem });
    }
    let mut download = apt(dir);
    download.args(["-o", "APT::Status-Fd=1", "download", package]).current_dir(&archives);
    command::watch(&mut download, |line| {
        if let Some(fraction) = status_fraction(line) {
            progress(fraction);
        }
    })?;
    Ok(archives.join(name))
}

/// apt-get on our directories.
fn apt(dir: &Path) -> Command {
    let mut apt = Command::new("apt-get");
    apt.arg("-q").arg("-c").arg(dir.join("apt.conf")).env("LC_ALL", "C");
    apt
}

/// What is read after the machine's `apt.conf.d`, which stays in force: its proxies are needed.
/// The commands that are to run around an update are not: they work on the machine's own lists.
fn configuration(dir: &Path) -> String {
    let mut text = String::new();
    for hooks in ["Pre-Invoke", "Post-Invoke", "Post-Invoke-Success"] {
        text += &format!("#clear APT::Update::{hooks};\n");
    }
    for (key, value) in [
        ("Dir::State::lists", dir.join("lists")),
        ("Dir::Cache", dir.to_owned()),
        ("Dir::Etc::sourcelist", dir.join("sources.list")),
        ("Dir::Etc::sourceparts", "/dev/null".into()),
        ("Dir::Etc::preferences", "/dev/null".into()),
        ("Dir::Etc::preferencesparts", "/dev/null".into()),
        // Run by root, apt would download as a user who cannot write here.
        ("APT::Sandbox::User", "root".into()),
        // Without this, a suite that cannot be read is a warning and its packages just are not there.
        ("APT::Update::Error-Mode", "any".into()),
        ("Acquire::Languages", "none".into()),
        ("Acquire::IndexTargets::deb::DEP-11::DefaultEnabled", "false".into()),
        ("Acquire::IndexTargets::deb::CNF::DefaultEnabled", "false".into()),
    ] {
        text += &format!("{key} \"{}\";\n", value.display());
    }
    text
}

/// One line a suite, as `sources.list(5)` has it.
fn sources_list(suites: &BTreeSet<Suite>) -> String {
    let keyring = KEYRINGS.iter().find(|keyring| Path::new(keyring).exists()).unwrap_or(&KEYRINGS[0]);
    suites
        .iter()
        .map(|Suite { uri, name }| format!("deb [arch=amd64 signed-by={keyring}] {uri} {name} main\n"))
        .collect()
}

/// The machine's suites that belong to this release of Debian and have the component main.
///
/// `targets`: a repository, a suite, a component and, where apt knows it already, the suite's code
/// name a line, as `apt-get indextargets` prints them. A suite may be called `stable`.
fn debian_suites(targets: &str, codename: &str) -> BTreeSet<Suite> {
    let of_release = |name: &str| {
        let suffix = name.strip_prefix(codename);
        suffix.is_some_and(|suffix| matches!(suffix, "" | "-updates" | "-security" | "-backports"))
    };
    targets
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let (uri, name, component) = (fields.next()?, fields.next()?, fields.next()?);
            let ours = component == "main" && (of_release(name) || fields.next().is_some_and(of_release));
            ours.then(|| Suite { uri: uri.into(), name: name.into() })
        })
        .collect()
}

/// The percentage in a line of apt's status: `dlstatus:1:12.5:Retrieving file 1 of 1`.
fn status_fraction(line: &str) -> Option<f64> {
    let percent: f64 = line.strip_prefix("dlstatus:")?.split(':').nth(1)?.parse().ok()?;
    Some((percent / 100.0).clamp(0.0, 1.0))
}

/// `VERSION_CODENAME` of this machine's Debian.
fn release_codename() -> Result<String, Error> {
    let path = Path::new("/etc/os-release");
    let text = fs::read_to_string(path).map_err(io_error("read", path))?;
    let value = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(value.unwrap_or_default().trim_matches('"').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_suites_of_this_release_of_debian_are_taken() {
        let targets = "http://m/debian/ bookworm main\nhttp://m/debian/ bookworm-updates main\n\
            http://m/debian/ bookworm main\nhttp://m/debian/ bookworm contrib\nhttp://s/ bookworm-security main\n\
            http://x/ nodistro main\nhttp://y/ cloud-sdk-bookworm main\nhttp://m/debian/ trixie main\nodd\n\n";
        let suites: Vec<_> =
            debian_suites(targets, "bookworm").into_iter().map(|s| format!("{} {}", s.uri, s.name)).collect();
        assert_eq!(
            suites,
            ["http://m/debian/ bookworm", "http://m/debian/ bookworm-updates", "http://s/ bookworm-security"]
        );
        assert!(debian_suites(targets, "sid").is_empty());
        let stable = "http://m/debian/ stable main bookworm\nhttp://m/debian/ testing main trixie\n";
        let suites: Vec<_> = debian_suites(stable, "bookworm").into_iter().map(|s| s.name).collect();
        assert_eq!(suites, ["stable"]);
    }

    #[test]
    fn sources_are_signed() {
        let suites = debian_suites("http://m/debian/ bookworm main", "bookworm");
        let list = sources_list(&suites);
        assert!(
            list.starts_with("deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring."),
            "{list}"
        );
        assert!(list.ends_with("] http://m/debian/ bookworm main\n"), "{list}");
    }

    #[test]
    fn progress_is_read_from_apts_status() {
        assert_eq!(status_fraction("dlstatus:1:12.5:Retrieving file 1 of 1"), Some(0.125));
        assert_eq!(status_fraction("dlstatus:1:250:x"), Some(1.0));
        for line in ["", "Get:1 http://m bookworm", "dlstatus:1", "pmstatus:x:1:y"] {
            assert_eq!(status_fraction(line), None, "{line:?}");
        }
    }
}
