//! Image files that guests have as memory (virtio-pmem, DAX): read where they lie, once for all, and
//! by nobody written to.

use std::{
    fs::File,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    case,
    ctr::Run,
    host, images,
    job::{Input, Job},
    sandbox::Sandbox,
    scale,
    world::{World, shell},
};

use super::{LARGE, LOWER, MANY, NAME, large, maker, on_a_disk, run, with_image};

/// What a guest keeps of files, and what of the image's block device.
const CACHED: &str =
    "sed -n 's/^\\(Cached\\|Buffers\\): *\\([0-9]*\\) kB/\\2/p' /proc/meminfo | tr '\\n' ' '";

/// A container that does what it is told, line by line.
struct Told {
    job: Job,
    sandbox: Sandbox,
    seen: usize,
}

impl Told {
    fn start(world: &World, run: &Run) -> Result<Self> {
        let script = "echo ready; while read -r line; do eval \"$line\"; echo \"done $?\"; done";
        let job = run.start(&["sh", "-c", script], Input::Open)?;
        job.wait_for("ready\n", scale::container())?;
        let sandbox = Sandbox::find(world.stage(), &run.id)?;
        Ok(Self { job, sandbox, seen: "ready\n".len() })
    }

    /// What a line of shell says, and how it ends.
    fn tell(&mut self, line: &str) -> Result<(String, i32)> {
        self.job.write(format!("{line}\n").as_bytes())?;
        loop {
            let said = self.job.stdout();
            let new = said.get(self.seen..).unwrap_or_default();
            if let Some((text, code)) = new.trim_end().rsplit_once("done ")
                && new.ends_with('\n')
            {
                let code = code.parse().with_context(|| format!("{line}: {new}"))?;
                let text = text.to_owned();
                self.seen = said.len();
                return Ok((text, code));
            }
            ensure!(!self.job.has_ended(), "{line}: ended with {said} {}", self.job.stderr());
            self.job.wait_for_more(said.len(), scale::container());
        }
    }

    fn does(&mut self, line: &str) -> Result<String> {
        let (said, code) = self.tell(line)?;
        ensure!(code == 0, "{line}: {code}: {said} {}", self.job.stderr());
        Ok(said)
    }

    /// KiB of caches: files' and the block device's.
    fn cached(&mut self) -> Result<(i64, i64)> {
        let said = self.does(CACHED)?;
        let kib: Vec<i64> = said.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [buffers, cached] = kib[..] else { anyhow::bail!("{said}") };
        Ok((cached, buffers))
    }

    fn end(mut self) -> Result<()> {
        self.job.close_input();
        self.job.finish(scale::container())?.success()?;
        Ok(())
    }
}

/// What lines of `maps` have of a file (proc_pid_maps(5)): its device and its number. A monitor's is of a mount of its own,
/// where it has no name.
fn in_maps(file: &Path) -> Result<String> {
    let found = std::fs::metadata(file)?;
    Ok(format!(" {:02x}:{:02x} {} ", libc::major(found.dev()), libc::minor(found.dev()), found.ino()))
}

/// What a monitor's mapping of a file is charged with, in KiB: of it in memory, its share of that, what
/// it has alone, and what is mapped in pages of 2 MiB.
fn mapping(monitor: i32, file: &Path) -> Result<[u64; 4]> {
    let smaps = std::fs::read_to_string(format!("/proc/{monitor}/smaps"))?;
    let of_file = in_maps(file)?;
    let mut lines = smaps.lines().skip_while(|line| !line.contains(&of_file)).skip(1);
    let mut number = |field: &str| -> Result<u64> {
        let line = lines.find(|line| line.starts_with(field)).with_context(|| format!("no {field}"))?;
        Ok(line.split_whitespace().nth(1).context("a number")?.parse()?)
    };
    let [rss, pss, dirty] = [number("Rss:")?, number("Pss:")?, number("Private_Dirty:")?];
    Ok([rss, pss, dirty, number("ShmemPmdMapped:")? + number("FilePmdMapped:")?])
}

/// KiB of a file that are in the host's page cache.
fn in_page_cache(path: &Path) -> Result<u64> {
    let file = File::open(path)?;
    let length = usize::try_from(file.metadata()?.len())?;
    let mut pages = vec![0u8; length.div_ceil(4096)];
    // SAFETY: a new mapping of an open file.
    let mapped = unsafe {
        libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    ensure!(mapped != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
    // SAFETY: the mapping is as long, and there is a byte for each of its pages.
    let looked = unsafe { libc::mincore(mapped, length, pages.as_mut_ptr()) };
    // SAFETY: it was made above, and nobody uses it.
    unsafe { libc::munmap(mapped, length) };
    ensure!(looked == 0, "mincore: {}", std::io::Error::last_os_error());
    Ok(4 * pages.iter().filter(|page| **page & 1 != 0).count() as u64)
}

/// KiB of the host's memory that a process is charged with: what it has alone, and its share of the rest.
fn share_kib(pid: libc::pid_t) -> Result<u64> {
    host::kib(&format!("{pid}/smaps_rollup"), "Pss")
}

/// What each of so many sandboxes takes that have read the same file of an image, on average, in KiB; where it is memory
/// and where it is a disk.
pub fn each_of(count: usize) {
    with_image(|world| {
        run(world).shell("true")?.success()?;
        images::wait_for(world, 1)?;
        let mut takes = Vec::new();
        for (kind, limit) in [("memory", "1024"), ("disk", "0")] {
            world.set_config(&world.config().set("images", "memory_limit_mib", limit))?;
            let mut sandboxes =
                (0..count).map(|_| Told::start(world, &run(world))).collect::<Result<Vec<_>>>()?;
            let (mut idle, mut read) = (0, 0);
            for told in &mut sandboxes {
                idle += share_kib(told.sandbox.monitor.pid)?;
                told.does("cat /large | md5sum")?;
            }
            for told in &sandboxes {
                read += share_kib(told.sandbox.monitor.pid)?;
            }
            let each = [idle, read].map(|kib| kib / count as u64);
            println!("{count} sandboxes, the image as {kind}: {each:?} KiB each, before and after reading");
            takes.push(each);
            sandboxes.into_iter().try_for_each(Told::end)?;
        }
        let grown = |[idle, read]: [u64; 2]| read.saturating_sub(idle);
        ensure!(grown(takes[0]) * 2 < grown(takes[1]), "{takes:?}");
        Ok(())
    });
}

/// So many sandboxes of one image: the host has what they read of it once.
pub fn share_one(count: usize) {
    with_image(|world| {
        run(world).shell("true")?.success()?;
        let file = images::wait_for(world, 1)?.remove(0);
        let listed = world.rvmctl(&["images"]).output()?;
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        ensure!(listed.contains(" memory "), "{listed}");

        let mut sandboxes =
            (0..count).map(|_| Told::start(world, &run(world))).collect::<Result<Vec<_>>>()?;
        let sum = shell(&format!("sha256sum {}", file.display()))?;
        for told in &mut sandboxes {
            let lower = told.does(LOWER)?;
            ensure!(lower.starts_with("/run/rvm/images/img-"), "{lower}");
            let disks =
                told.does("cd /sys/block; for disk in pmem*; do cat $disk/queue/dax $disk/ro; done; cd /")?;
            ensure!(disks == "1\n1\n", "{disks}");
            // The programs it takes are in the image, too.
            told.does("cat /top > /dev/null")?;
            let (cached, buffers) = told.cached()?;
            told.does("cat /large > /dev/null; cat /large | md5sum")?;
            let (more_cached, more_buffers) = told.cached()?;
            let (cached, buffers) = (more_cached - cached, more_buffers - buffers);
            println!(
                "after {} KiB were read: {cached} KiB in the guest's cache, {buffers} of its disk",
                LARGE >> 10
            );
            ensure!(cached.max(buffers) < LARGE as i64 / 1024 / 8, "{cached} and {buffers} KiB");
        }
        let charged = sandboxes
            .iter()
            .map(|told| mapping(told.sandbox.monitor.pid, &file))
            .collect::<Result<Vec<_>>>()?;
        let cached = in_page_cache(&file)?;
        println!(
            "mapped, share, alone, in huge pages, in KiB: {charged:?}; {cached} in the host's page cache"
        );
        let least = LARGE as u64 / 1024;
        ensure!(charged.iter().all(|[rss, _, dirty, _]| *rss >= least && *dirty == 0), "{charged:?}");
        // All but what is in one with the file's end. Every kernel can do that for a tmpfs and XFS; whether for ext4, its
        // version says, which another case is about.
        let huge = |[.., huge]: &[u64; 4]| *huge + (2 << 10) >= least;
        let ext4 = world.stage().file_system.as_deref() == Some("ext4");
        ensure!(ext4 || charged.iter().all(huge), "{charged:?}");
        let shares: u64 = charged.iter().map(|[_, pss, ..]| pss).sum();
        ensure!(
            shares <= cached && cached <= std::fs::metadata(&file)?.len().div_ceil(1024),
            "{shares} of {cached}"
        );
        ensure!(sum == shell(&format!("sha256sum {}", file.display()))?, "the image has changed");
        sandboxes.into_iter().try_for_each(Told::end)
    });
}

#[test]
fn the_hosts_pages_are_the_only_ones() {
    share_one(3);
}

/// A file of the host's, mapped by this process as a monitor does.
fn mapped_here(file: &Path) -> Result<[u64; 4]> {
    const HUGE_PAGE: usize = 2 << 20;
    let open = File::open(file)?;
    let length = usize::try_from(open.metadata()?.len())?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, of which the second call takes a part.
    let range =
        unsafe { libc::mmap(std::ptr::null_mut(), length + HUGE_PAGE, libc::PROT_NONE, flags, -1, 0) };
    ensure!(range != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
    let address = range as usize;
    let start = range.wrapping_byte_add(address.next_multiple_of(HUGE_PAGE) - address);
    let (protection, flags) = (libc::PROT_READ, libc::MAP_SHARED | libc::MAP_FIXED);
    // SAFETY: it replaces part of the range above.
    let mapped = unsafe { libc::mmap(start, length, protection, flags, open.as_raw_fd(), 0) };
    ensure!(mapped == start, "mmap: {}", std::io::Error::last_os_error());
    // SAFETY: an advice on what was just mapped.
    ensure!(unsafe { libc::madvise(start, length, libc::MADV_POPULATE_READ) } == 0, "not read");
    let seen = mapping(i32::try_from(std::process::id())?, file);
    // SAFETY: the range of the first call, which nobody refers to.
    unsafe { libc::munmap(range, length + HUGE_PAGE) };
    seen
}

/// Of a disk whose file system has large folios the host has an image in pages of 2 MiB, as of a tmpfs; of another one it has it
/// as it has every file. Which ext4 is, its version says.
#[test]
fn pages_are_as_large_as_the_hosts_file_system_has_them() {
    case(|world| {
        if !world.stage().is_rvm() {
            return Ok(());
        }
        let whole = LARGE as u64 / 1024;
        for (mkfs, least) in [("xfs -q", whole - (2 << 10)), ("ext4 -q -F", 0)] {
            on_a_disk(world, mkfs, |dir| {
                let layers = ["2/fs", "1/fs"].map(|layer| dir.join(layer));
                layers.iter().try_for_each(std::fs::create_dir_all)?;
                std::fs::write(layers[1].join("large"), large())?;
                let file = dir.join("2/rvm-image-large");
                let made = maker(world, (MANY, 0), &file, &layers).output()?;
                ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
                let [mapped, .., huge] = mapped_here(&file)?;
                println!("{mkfs}: {mapped} KiB mapped, {huge} of them in huge pages");
                ensure!(mapped >= whole && huge >= least, "{mkfs}: {mapped}, {huge}");
                Ok(())
            })?;
        }
        Ok(())
    });
}

/// A guest's root, with every capability and every device, writes to the memory an image is.
#[test]
fn nobody_writes_to_an_image() {
    with_image(|world| {
        run(world).shell("true")?.success()?;
        let file = images::wait_for(world, 1)?.remove(0);
        let sum = || shell(&format!("sha256sum {}", file.display()));
        let before = sum()?;
        let mut told = Told::start(world, &run(world).with(&["--privileged"]))?;
        let device = "mknod /memory b $(tr : ' ' < /sys/class/block/pmem0/dev)";
        told.does(device)?;
        let write = "dd if=/dev/zero of=/memory bs=4096 seek=256 count=4 conv=fsync 2>&1";
        // The guest's kernel refuses it ...
        let (said, code) = told.tell(write)?;
        ensure!(code != 0 && said.contains("not permitted"), "{code}: {said}");
        // ... until it is told not to, and then it is written nowhere.
        let at = told.does("readlink -f /sys/class/block/pmem0/device")?;
        let region = Path::new(at.trim()).parent().context("a region")?.display().to_string();
        told.does(&format!("mount -o remount,rw /sys 2>/dev/null; echo 0 > {region}/read_only"))?;
        let (said, code) = told.tell(write)?;
        println!("written: {code}: {said}");
        told.does("cat /large | md5sum; cat /top")?;
        ensure!(sum()? == before, "the image has changed");
        told.end()?;
        run(world).shell("cat /large | md5sum")?.success()?;
        ensure!(sum()? == before, "the image has changed");
        Ok(())
    });
}

/// A file that somebody cuts off under a guest ends that guest, which says why, and nobody else.
#[test]
fn an_image_that_is_cut_off_ends_who_reads_it() {
    with_image(|world| {
        run(world).shell("true")?.success()?;
        let file = images::wait_for(world, 1)?.remove(0);
        let log = world.log_length();
        let mut told = Told::start(world, &run(world))?;
        File::options().write(true).open(&file)?.set_len(8192)?;
        told.job.write(b"cat /large | md5sum\n")?;
        let sandbox = told.sandbox.clone();
        let finished = told.job.finish(scale::container())?;
        ensure!(finished.code() == 137, "{finished}");
        sandbox.wait_until_gone(scale::container())?;
        let said = world.log_tail(log, 1000);
        let lines: Vec<_> = said.lines().filter(|line| line.contains("an image's shrunk")).collect();
        ensure!(!lines.is_empty(), "{said}");
        println!("{}", lines[0]);
        // What is left of it is not taken for one.
        let finished = run(world).shell(LOWER)?.success()?;
        ensure!(finished.text().starts_with("/run/rvm/layers/"), "{finished}");
        images::wait_for(world, 1).map(drop)
    });
}

/// Above the limit an image is a disk.
#[test]
fn a_larger_image_is_a_disk() {
    with_image(|world| {
        world.set_config(&world.config().with_images().set("images", "memory_limit_mib", "4"))?;
        run(world).shell("true")?.success()?;
        images::wait_for(world, 1)?;
        let script =
            format!("{LOWER}; ls /sys/block | grep -c pmem; cat /sys/block/vd*/serial; cat /large | md5sum");
        let finished = run(world).shell(&script)?.success()?;
        let text = finished.text();
        ensure!(text.starts_with("/run/rvm/images/img-") && text.contains("\n0\n"), "{finished}");
        ensure!(text.lines().any(|line| line.starts_with("img-")), "{finished}");
        Ok(())
    });
}

/// One that joins a machine brings its image, which goes with the last that has it.
#[test]
fn an_image_comes_and_goes_with_its_containers() {
    with_image(|world| {
        run(world).shell("true")?.success()?;
        let file = images::wait_for(world, 1)?.remove(0);
        world.set_config(&world.config().with_images().set("images", "make", "false"))?;
        let ctr = world.ctr();
        let annotated = |run: Run, kind: &str, pod: &str| {
            let kind = format!("io.kubernetes.cri.container-type={kind}");
            let pod = format!("io.kubernetes.cri.sandbox-id={pod}");
            run.with(&["--annotation", &kind, "--annotation", &pod])
        };
        let pod = ctr.container("pod").detached();
        let pod = annotated(pod.clone(), "sandbox", &pod.id);
        pod.run(&["sleep", "100000"])?.success()?;
        let sandbox = Sandbox::find(world.stage(), &pod.id)?;
        let maps = || std::fs::read_to_string(format!("/proc/{}/maps", sandbox.monitor.pid));
        let of_file = in_maps(&file)?;
        let exec = |id: &str, script: &str| -> Result<String> {
            let job = ctr.exec(id, &[], &["sh", "-c", script], Input::Nothing)?;
            Ok(job.finish(scale::container())?.success()?.text())
        };
        const MEMORIES: &str = "ls /sys/block | grep -c pmem || true";
        for _ in 0..2 {
            let members = ["one", "two"]
                .map(|name| annotated(ctr.container(name).with_image(NAME), "container", &pod.id).detached());
            for member in &members {
                member.run(&["sleep", "100000"])?.success()?;
                ensure!(exec(&member.id, LOWER)?.starts_with("/run/rvm/images/img-"));
                exec(&member.id, "md5sum /large")?;
            }
            ensure!(exec(&pod.id, MEMORIES)? == "1\n" && maps()?.contains(&of_file), "not one of both");
            for member in &members {
                ensure!(maps()?.contains(&of_file), "gone with the first");
                ctr.remove(&member.id)?;
            }
            ensure!(exec(&pod.id, MEMORIES)? == "0\n" && !maps()?.contains(&of_file), "still there");
        }
        world.end(&pod.id)?;
        sandbox.wait_until_gone(scale::container())
    });
}
