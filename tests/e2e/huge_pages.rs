//! Huge pages of pods, as kubelet has them, under runc and under rvm: what is seen has to be the same, and the host's
//! pool has to be what it was.

use std::{fs, time::Instant};

use anyhow::{Context, Result, ensure};
use k8s_cri::v1::{ContainerConfig, HugepageLimit, LinuxContainerResources, Mount, PodSandboxConfig};
use rvm_tests::{
    cri::{Container, Executed, Pod},
    parity::PROBE_ENV,
    scale,
    world::shell,
};

use crate::{
    pod_volumes::{SLEEP, Volumes, mount},
    pods::{limited, plain, same},
};

const PAGE: u64 = 2 << 20;
const COUNT: &str = "/proc/sys/vm/nr_hugepages";

/// The host's pool, for as long as a case runs.
struct Pool {
    before: String,
    pages: u64,
}

impl Pool {
    fn of(pages: u64) -> Result<Self> {
        let pool = Self { before: fs::read_to_string(COUNT)?, pages };
        fs::write(COUNT, pages.to_string())?;
        let has = fs::read_to_string(COUNT)?;
        ensure!(has.trim() == pages.to_string(), "{COUNT} is {has:?}, not {pages}");
        Ok(pool)
    }

    fn used(&self) -> Result<u64> {
        let free = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")?;
        Ok(self.pages - free.trim().parse::<u64>()?)
    }

    /// Waits until so many are used: a machine gives pages back behind the back of who removes a container.
    fn comes_to(&self, used: u64) -> Result<()> {
        let until = Instant::now() + scale::seconds(10.0);
        while self.used()? != used {
            ensure!(Instant::now() < until, "{} huge pages are used, not {used}", self.used()?);
            std::thread::sleep(scale::seconds(0.01));
        }
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Err(error) = fs::write(COUNT, &self.before) {
            println!("{COUNT}: {error}");
        }
    }
}

fn limit(page_size: &str, limit: u64) -> HugepageLimit {
    HugepageLimit { page_size: page_size.into(), limit }
}

/// A container that may use so many pages, and none of the other size, as kubelet says it.
fn with_pages(pages: u64, mounts: &[Mount]) -> impl FnOnce(&mut ContainerConfig) {
    let mounts = mounts.to_vec();
    let resources = LinuxContainerResources {
        hugepage_limits: vec![limit("2MB", pages * PAGE), limit("1GB", 0)],
        ..Default::default()
    };
    move |config| {
        limited(resources)(config);
        config.mounts = mounts;
    }
}

/// The mounts of a container: the pages, and the program that uses them.
fn mounts(volumes: &Volumes) -> Result<[Mount; 2]> {
    let probe = std::env::var(PROBE_ENV).with_context(|| format!("{PROBE_ENV} is not set"))?;
    let programs = volumes.dir("configmap", "programs")?;
    fs::copy(&probe, programs.join("probe"))?;
    Ok([
        mount(&volumes.huge_pages("pages")?, "/huge"),
        Mount { readonly: true, ..mount(&programs, "/programs") },
    ])
}

/// A pod whose cgroup may have so many pages, as kubelet sets it.
fn may_have(pages: u64) -> impl FnOnce(&mut PodSandboxConfig) {
    move |config| {
        let parent = config.linux.as_ref().map_or("", |linux| &linux.cgroup_parent);
        let dir = format!("/sys/fs/cgroup/{}", parent.trim_start_matches('/'));
        let set = shell(&format!(
            "echo +hugetlb > {dir}/../cgroup.subtree_control; \
             for file in max rsvd.max; do echo {} > {dir}/hugetlb.2MB.$file; done",
            pages * PAGE
        ));
        // Without the limit what is compared differs.
        if let Err(error) = set {
            println!("{dir}: {error:#}");
        }
    }
}

/// What the program prints that uses so many pages of a file, or where that is `-` of none.
fn use_pages(container: &Container<'_>, file: &str, pages: &str) -> Result<Executed> {
    container.exec(&["/programs/probe", "huge", file, pages])
}

#[test]
fn a_pod_has_as_many_as_its_cgroup_may_have() {
    same(|cri, seen| {
        let pool = Pool::of(16)?;
        let volumes = Volumes::new("huge")?;
        if cri.is_rvm() {
            let error = Pod::refused(cri, "greedy", may_have(17))?;
            let names = ["hugetlb.2MB.max", "17 more huge pages", "16 of the host's 16 are free"];
            ensure!(names.iter().all(|name| error.contains(name)), "{error}");
        }
        let pod = Pod::run(cri, "huge", may_have(6))?;
        let mounts = mounts(&volumes)?;
        let one = pod.start("one", &SLEEP, with_pages(4, &mounts))?;
        let two = pod.start("two", &SLEEP, with_pages(2, &mounts))?;
        let any = pod.start("any", &SLEEP, |config| config.mounts = mounts.to_vec())?;
        seen.add("four pages", use_pages(&one, "/huge/a", "4")?);
        seen.add("as another has them", use_pages(&two, "/huge/a", "4")?);
        seen.add("more than two may have", use_pages(&two, "/huge/b", "3")?);
        seen.add("more than the pod has", use_pages(&any, "/huge/c", "3")?);
        seen.add("what is left", use_pages(&any, "/huge/d", "2")?);
        seen.add("files", one.sh("ls -l /huge | awk '{ print $1, $5, $9 }'; stat -f -c '%t %s %b' /huge")?);
        seen.add("the mount", one.sh("awk '$5 == \"/huge\" { print $6 }' /proc/self/mountinfo")?);
        for container in [&one, &two] {
            let files = "cd /sys/fs/cgroup; cat hugetlb.2MB.max hugetlb.2MB.current";
            seen.add("limits", container.sh(files)?);
        }
        if cri.is_rvm() {
            let total = one.sh("awk '/^HugePages_(Total|Free)/ { print $2 }' /proc/meminfo")?;
            ensure!(total == "6\n0\n", "{total:?}");
            let charged = pod.cgroup_file("hugetlb.2MB.current")?;
            let limit = pod.cgroup_file(&format!("{}/hugetlb.2MB.max", pod.id))?;
            ensure!(
                [&charged, &limit].iter().all(|file| file.trim() == (6 * PAGE).to_string()),
                "{charged}{limit}"
            );
        }
        ensure!(pool.used()? == 6, "{} pages are used", pool.used()?);
        // What a container has left in a volume is there when it comes back.
        one.stop(1)?;
        one.remove()?;
        let one = pod.start("one", &SLEEP, with_pages(4, &mounts))?;
        seen.add("after it came back", use_pages(&one, "/huge/a", "4")?);
        seen.add("freed", one.sh("rm /huge/*; ls /huge")?);
        seen.add("and used again", use_pages(&one, "/huge/e", "4")?);
        seen.add("without a file", use_pages(&two, "-", "2")?);
        pod.remove()?;
        drop(volumes);
        pool.comes_to(0)
    });
}

#[test]
fn pages_come_and_go_with_containers() {
    same(|cri, seen| {
        let pool = Pool::of(16)?;
        let volumes = Volumes::new("claims")?;
        let pod = Pod::run(cri, "claims", plain)?;
        let mounts = mounts(&volumes)?;
        let one = pod.start("one", &SLEEP, with_pages(4, &mounts))?;
        seen.add("four pages", use_pages(&one, "/huge/a", "4")?);
        for _ in 0..3 {
            let two = pod.start("two", &SLEEP, with_pages(5, &mounts))?;
            seen.add("five", use_pages(&two, "/huge/b", "5")?);
            ensure!(pool.used()? == 9, "{} pages are used", pool.used()?);
            seen.add("gone", two.sh("rm /huge/b; ls /huge")?);
            two.stop(1)?;
            two.remove()?;
            pool.comes_to(4)?;
        }
        if cri.is_rvm() {
            let refused = pod.start("three", &SLEEP, with_pages(13, &mounts)).map(|container| container.id);
            let error = format!("{:#}", refused.err().context("it is started")?);
            let names =
                ["linux.resources.hugepageLimits", "13 more huge pages", "12 of the host's 16 are free"];
            ensure!(names.iter().all(|name| error.contains(name)), "{error}");
            ensure!(pool.used()? == 4, "{} pages are used", pool.used()?);
            let large = LinuxContainerResources {
                hugepage_limits: vec![limit("1GB", 1 << 30)],
                ..Default::default()
            };
            let refused = pod.start("four", &SLEEP, limited(large)).map(|container| container.id);
            let error = format!("{:#}", refused.err().context("it is started")?);
            ensure!(error.contains("linux.resources.hugepageLimits[0]: "), "{error}");
        }
        seen.add("the first one's", use_pages(&one, "/huge/a", "4")?);
        pod.remove()?;
        drop(volumes);
        pool.comes_to(0)
    });
}
