//! Volumes: what host and guest see of each other's changes, and how a volume
//! is held.

use std::{
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use rvm_tests::{
    case,
    ctr::Run,
    job::{Input, Job},
    parity::PROBE_ENV,
    sandbox::Sandbox,
    scale,
    world::{World, shell},
};

/// A directory of the host that is gone with its value.
pub struct Volume(pub PathBuf);

impl Volume {
    /// A new one, called so.
    pub fn new(world: &World, name: &str) -> Result<Self> {
        let dir = world.dir().join(name);
        std::fs::create_dir_all(&dir)?;
        Ok(Self(dir))
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// `ctr run --mount` of a bind.
pub fn bind(source: &Path, destination: &str, options: &str) -> String {
    format!("type=bind,src={},dst={destination},options={options}", source.display())
}

/// A shell in the container that takes commands.
struct Shell {
    job: Job,
    said: usize,
}

impl Shell {
    fn start(run: &Run) -> Result<Self> {
        Ok(Self { job: run.start(&["sh"], Input::Open)?, said: 0 })
    }

    /// Runs a command there; returns what it printed.
    fn run(&mut self, command: &str) -> Result<String> {
        self.said += 1;
        let end = format!("=={}==", self.said);
        self.job.write(format!("{{ {command}; }} 2>&1; echo {end}\n").as_bytes())?;
        self.job.wait_for(&end, scale::container())?;
        let all = self.job.stdout();
        let before = format!("=={}==\n", self.said - 1);
        let from = all.find(&before).map_or(0, |at| at + before.len());
        Ok(all[from..].split(&end).next().unwrap_or_default().to_owned())
    }

    /// Runs a command that loops until it sees what the host has changed: within the second that attributes and
    /// names may be kept, and what the round trip takes on this machine.
    fn sees(&mut self, command: &str) -> Result<String> {
        let started = std::time::Instant::now();
        let said = self.run(command)?;
        let took = started.elapsed();
        let limit = std::time::Duration::from_secs(1) + scale::seconds(0.2);
        ensure!(took < limit, "{command}: seen after {took:?}");
        Ok(said)
    }

    fn end(mut self) -> Result<()> {
        self.job.close_input();
        self.job.finish(scale::container())?.success().map(drop)
    }
}

/// Whether a process has a file of that name open so that it can be read.
fn open_for_reading(pid: libc::pid_t, name: &str) -> Result<bool> {
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let fd = fd?;
        // It may close it meanwhile.
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", fd.file_name().display()));
        let (Ok(path), Ok(info)) = (std::fs::read_link(fd.path()), info) else { continue };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).context("flags")?;
        let flags = i32::from_str_radix(flags.trim(), 8)?;
        if path.ends_with(name) && flags & libc::O_PATH == 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// They work in the guest, and are nothing on the host that anybody could open.
#[test]
fn device_nodes_are_the_guests_own() {
    case(|world| {
        let volume = Volume::new(world, "volume")?;
        let run = world.ctr().container("nodes").with(&["--mount", &bind(&volume.0, "/v", "rbind:rw")]);
        let script = "mknod -m 640 /v/null c 1 3 && mknod /v/disk b 8 16 && mv /v/disk /v/moved && \
                      stat -c '%F %a %t:%T' /v/null /v/moved && echo lost > /v/null && cat /v/null && \
                      cat /v/moved; ls /v";
        let finished = run.shell(script)?.success()?;
        ensure!(
            finished.text() == "character special file 640 1:3\nblock special file 644 8:10\nmoved\nnull\n"
                && finished.errors().contains("/v/moved"),
            "{finished}"
        );
        // The next container finds what the first one made.
        let again = run.shell("stat -c '%F %t:%T' /v/moved; echo lost > /v/null && rm /v/null")?.success()?;
        ensure!(again.text() == "block special file 8:10\n", "{again}");
        let on_host = shell(&format!("cd {} && stat -c '%F %t:%T' *", volume.0.display()))?;
        let expected = match world.stage().is_rvm() {
            true => "character special file 0:0\n",
            false => "block special file 8:10\n",
        };
        ensure!(on_host == expected, "{on_host}");
        Ok(())
    });
}

#[test]
fn changes_are_seen_on_both_sides() {
    case(|world| {
        let volume = Volume::new(world, "volume")?;
        let (inner, other) = (Volume::new(world, "inner")?, Volume::new(world, "other")?);
        std::fs::write(volume.path("file"), "first")?;
        std::fs::write(volume.path("single"), "single")?;
        std::fs::write(inner.path("deep"), "deep")?;
        let run = world.ctr().container("volumes").with(&[
            "--mount",
            &bind(&volume.0, "/v", "rbind:rw"),
            "--mount",
            &bind(&volume.0, "/ro", "rbind:ro"),
            "--mount",
            &bind(&inner.0, "/v/inner", "rbind:rw"),
            "--mount",
            &bind(&volume.path("single"), "/etc/single", "bind:ro"),
            "--mount",
            &bind(&volume.path("file"), "/etc/file", "bind:rw"),
            "--mount",
            &bind(&other.0, "/other", "rbind:rw"),
        ]);
        let mut guest = Shell::start(&run)?;
        ensure!(guest.run("cat /v/file /etc/file /etc/single /v/inner/deep")? == "firstfirstsingledeep");

        // Host to guest: new, changed, grown, removed. Seen within the second
        // that attributes and names may be kept.
        std::fs::write(volume.path("new"), "from the host")?;
        ensure!(guest.sees("until test -s /v/new; do :; done; cat /v/new")? == "from the host");
        std::fs::write(volume.path("file"), "second, longer")?;
        ensure!(
            guest.sees(
                "until grep -q longer /v/file && grep -q longer /etc/file; do :; done; cat /etc/file"
            )? == "second, longer"
        );
        std::fs::remove_file(volume.path("new"))?;
        guest.sees("while test -e /v/new; do :; done")?;
        ensure!(guest.run("ls /v/new")?.contains("No such file"));

        // Guest to host: at once.
        guest.run("echo -n from the guest > /v/back; mkdir /v/dir; ln -s back /v/link; chmod 640 /v/back; chown 12:34 /v/back")?;
        ensure!(std::fs::read_to_string(volume.path("link"))? == "from the guest");
        let stat = shell(&format!("stat -c '%a %u %g' {}", volume.path("back").display()))?;
        ensure!(stat == "640 12 34\n", "{stat}");
        guest.run("echo -n third > /etc/file; mv /v/back /v/dir/moved; echo x > /v/inner/made")?;
        ensure!(std::fs::read_to_string(volume.path("file"))? == "third");
        ensure!(volume.path("dir/moved").exists() && !volume.path("back").exists());
        ensure!(inner.path("made").exists() && !volume.path("inner/made").exists());

        // It keeps nothing open: what it has written can be executed at once, and what it has read is soon let go of.
        let script = volume.path("script");
        shell(&format!("install -m 755 /dev/null {}", script.display()))?;
        guest.run("echo 'echo ran' > /v/script")?;
        ensure!(shell(&script.display().to_string())? == "ran\n");
        guest.run("exec 3< /v/script; read -r line <&3")?;
        let monitor = Sandbox::find(world.stage(), &run.id)?.monitor.pid;
        ensure!(open_for_reading(monitor, "script")?, "not open for who reads it");
        guest.run("exec 3<&-")?;
        let until = std::time::Instant::now() + scale::seconds(1.0);
        while open_for_reading(monitor, "script")? {
            ensure!(std::time::Instant::now() < until, "still open for reading");
        }

        // What may not be written may not, and is seen as it changes.
        for path in ["/ro/file", "/etc/single", "/ro/new"] {
            let said = guest.run(&format!("echo x > {path}"))?;
            ensure!(said.contains("Read-only file system"), "{path}: {said}");
        }
        std::fs::write(volume.path("single"), "changed")?;
        ensure!(
            guest.sees(
                "until grep -q changed /etc/single && grep -q changed /ro/single; do :; done; cat /ro/single"
            )? == "changed"
        );

        // They are mounts of their own.
        ensure!(guest.run("mv /v/file /other/")?.is_empty(), "moved by copying, as between file systems");
        ensure!(std::fs::read_to_string(other.path("file"))? == "third");
        guest.end()
    });
}

#[test]
fn a_file_of_its_own_is_read_whole() {
    case(|world| {
        let volume = Volume::new(world, "configuration")?;
        let file = volume.path("resolv.conf");
        std::fs::write(&file, "")?;
        let run = world
            .ctr()
            .container("configuration")
            .with(&["--mount", &bind(&file, "/etc/resolv.conf", "rbind:rw")]);
        let mut guest = Shell::start(&run)?;
        // As Docker 28 does between Create and Start, and any release when a network is
        // connected: what the guest was told of it a moment ago is out of date.
        let mut whole = String::new();
        for line in 0..5 {
            ensure!(guest.run("cat /etc/resolv.conf")? == whole, "before line {line}");
            whole += &format!("nameserver 192.0.2.{line}\n");
            std::fs::write(&file, &whole)?;
            let read = guest.run("cat /etc/resolv.conf")?;
            ensure!(read == whole, "{read:?} of {whole:?}");
        }
        guest.end()
    });
}

/// File systems of the host, at directories of a volume; off again with their value.
struct Mounts(Vec<PathBuf>);

impl Mounts {
    fn tmpfs(dirs: &[PathBuf]) -> Result<Self> {
        let mut mounts = Self(Vec::new());
        for dir in dirs {
            std::fs::create_dir_all(dir)?;
            shell(&format!("mount -t tmpfs tmpfs {}", dir.display()))?;
            mounts.0.push(dir.clone());
        }
        Ok(mounts)
    }
}

impl Mounts {
    /// An ext4 of its own.
    fn ext4(dir: &Path) -> Result<Self> {
        let image = dir.with_extension("image");
        // Once it is mounted it needs no name.
        shell(&format!(
            "truncate -s 32M {image} && mkfs.ext4 -q {image} && mount -o loop {image} {}; rm {image}; \
             mountpoint -q {0}",
            dir.display(),
            image = image.display()
        ))?;
        Ok(Self(vec![dir.to_owned()]))
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for dir in self.0.iter().rev() {
            let _ = shell(&format!("umount {}", dir.display()));
        }
    }
}

/// Each mount of the host is a file system of its own in the guest: two files
/// with one number are not taken for one.
#[test]
fn equal_inode_numbers_are_not_hard_links() {
    case(|world| {
        let volume = Volume::new(world, "numbers")?;
        let dirs = [volume.path("a"), volume.path("b"), volume.path("a/below")];
        let _mounts = Mounts::tmpfs(&dirs[..2]).and_then(|mut mounts| {
            // After the files: the next directory would take a file's number.
            for (dir, content) in dirs.iter().zip(["one", "two"]) {
                std::fs::write(dir.join("file"), content)?;
                std::fs::hard_link(dir.join("file"), dir.join("linked"))?;
            }
            let mut below = Mounts::tmpfs(&dirs[2..])?;
            std::fs::write(dirs[2].join("file"), "three")?;
            mounts.0.append(&mut below.0);
            Ok(mounts)
        })?;
        let numbers =
            shell(&format!("cd {}; stat -c %i a/file b/file a/below/file | uniq", volume.0.display()))?;
        ensure!(numbers.lines().count() == 1, "they are meant to be equal: {numbers}");
        let run = world.ctr().container("numbers").with(&[
            "--mount",
            &bind(&dirs[0], "/a", "rbind:rw"),
            "--mount",
            &bind(&dirs[1], "/b", "rbind:rw"),
            "--mount",
            &bind(&dirs[0].join("file"), "/etc/one", "bind:rw"),
            "--mount",
            &bind(&dirs[1].join("file"), "/etc/two", "bind:rw"),
        ]);
        let script = "stat -c %d /a /b /a/below /etc/one /etc/two | sort -u | wc -l; \
                      stat -c %i /a/file /b/file | uniq | wc -l; \
                      cp /a/below/file /a/file && cat /a/file; cp /a/file /b/file && cat /b/file; \
                      echo four > /etc/one; cp /etc/one /etc/two && cat /etc/two; cat /a/file; \
                      test /a/file -ef /a/linked && echo linked; test /a/file -ef /b/file || echo apart; \
                      echo five > /b/file; mkdir /out && tar cf - /a /b 2>/dev/null | tar xf - -C /out && cat /out/a/file /out/b/file; \
                      head -c 8192 /dev/zero > /a/file; head -c 8192 /dev/zero > /b/file; \
                      du -k -d 0 /a/file /b/file | cut -f1";
        let finished = run.shell(script)?.success()?;
        // The directory and the file of one mount are one file system under runc.
        let devices = if world.stage().is_rvm() { 5 } else { 3 };
        ensure!(
            finished.text()
                == format!("{devices}\n1\nthreethreefour\nfour\nlinked\napart\nfour\nfive\n8\n8\n"),
            "{finished}"
        );
        Ok(())
    });
}

/// `sync` in a container writes what the host holds of its volumes to the host's disk, while the
/// container runs.
#[test]
fn a_sync_reaches_the_hosts_disk() {
    case(|world| {
        let volume = Volume::new(world, "synced")?;
        let (image, dir) = (volume.path("image"), volume.path("mounted"));
        let make = "truncate -s 64M $image; mkfs.ext4 -q $image; mkdir $dir; mount -o loop $image $dir";
        let places = format!("image={}; dir={}; ", image.display(), dir.display());
        shell(&format!("{places}{make}"))?;
        let result = (|| {
            let run = world.ctr().container("synced").with(&["--mount", &bind(&dir, "/v", "rbind:rw")]);
            let mut inside = Shell::start(&run)?;
            // The words are on the disk in one piece only where the file's content is.
            inside.run("printf %s%s written- to-the-disk > /v/file; sync")?;
            let found = shell(&format!("{places}grep -c written-to-the-disk $image || true"))?;
            ensure!(found.trim() != "0", "it is not on the disk");
            inside.end()
        })();
        shell(&format!("{places}umount $dir"))?;
        result
    });
}

/// What a guest has read of its image it keeps, whatever else it sees of the host.
#[test]
fn the_image_stays_cached_beside_a_volume() {
    case(|world| {
        let volume = Volume::new(world, "beside")?;
        let script = "/bin/true; s=$(cut -d' ' -f1 /proc/uptime); i=0; \
                      while test $i -lt 100; do /bin/true; i=$((i+1)); done; \
                      e=$(cut -d' ' -f1 /proc/uptime); echo $s $e";
        let seconds = |options: &[&str]| -> Result<f64> {
            let finished = world.ctr().container("cached").with(options).shell(script)?.success()?;
            let text = finished.text();
            let mut times = text.split_whitespace().map(str::parse::<f64>);
            let mut next = || Ok::<f64, anyhow::Error>(times.next().context("a time")??);
            let (start, end) = (next()?, next()?);
            Ok(end - start)
        };
        let without = seconds(&[])?;
        let with = seconds(&["--mount", &bind(&volume.0, "/v", "rbind:rw")])?;
        println!("100 x /bin/true: {without:.2} s without a volume, {with:.2} s with one");
        // It was fifteen times as long when every execve asked the host again.
        ensure!(with < 2.0 * without + 0.5, "{with:.2} s instead of {without:.2} s");
        Ok(())
    });
}

/// Between processes of the guest; a process of the host has no part in the locks.
#[test]
fn locks_and_shared_mappings() {
    case(|world| {
        let volume = Volume::new(world, "shared")?;
        let probe = std::env::var(PROBE_ENV).with_context(|| format!("{PROBE_ENV} is not set"))?;
        std::fs::copy(&probe, volume.path("probe"))?;
        let run = world.ctr().container("shared").with(&["--mount", &bind(&volume.0, "/v", "rbind:rw")]);
        let finished = run.run(&["/v/probe", "volume", "/v/file"])?.success()?;
        let expected = "flock = ok\nflock again = EAGAIN\nflock shared = EAGAIN\nunlock = ok\nflock freed = ok\n\
                        range = ok\nrange again = EAGAIN\nrange beside = ok\nmapped then read = m\n\
                        written then mapped = w\nmsync = ok\nnamed = ok\nexecuted = refused\nvolume = complete\n";
        ensure!(finished.text() == expected, "{finished}");
        let sizes = shell(&format!("stat -Lc %s {probe} {}", volume.path("probe").display()))?;
        ensure!(sizes.lines().next() == sizes.lines().nth(1), "sizes of the program: {sizes}");
        let file = std::fs::read(volume.path("file"))?;
        ensure!(file.len() == 8192 && file[4096] == b'm' && file[1] == b'w', "on the host");
        let named = shell(&format!("cd {}; cat file.named; stat -c ' %a' file.named", volume.0.display()))?;
        ensure!(named == "whole 640\n", "{named}");
        Ok(())
    });
}

/// What a container has read of a file it writes to stays in its guest's cache, and is not believed for longer than anything else:
/// of what the host writes and denies it hears too.
#[test]
fn what_a_container_writes_to_stays_cached() {
    case(|world| {
        let volume = Volume::new(world, "held")?;
        let probe = std::env::var(PROBE_ENV).with_context(|| format!("{PROBE_ENV} is not set"))?;
        std::fs::copy(&probe, volume.path("probe"))?;
        let (old, new) = ([vec![b'-'; 4096], vec![b'o'; 4096]].concat(), [b'h'; 4096]);
        let path = volume.path("file");
        std::fs::write(&path, &old)?;
        let file = std::fs::File::options().write(true).open(&path)?;
        let run = world.ctr().container("held").with(&["--mount", &bind(&volume.0, "/v", "rbind:rw")]);
        let mut job = run.start(&["/v/probe", "held", "/v/file"], Input::Open)?;
        let mut count = 0;
        let mut ask = |job: &mut Job, what: &str| -> Result<char> {
            job.write(format!("{what}\n").as_bytes())?;
            let mark = format!("{count} = ");
            count += 1;
            job.wait_for(&mark, scale::container())?;
            let answer = job.stdout().lines().find_map(|line| line.strip_prefix(&mark)?.chars().next());
            answer.with_context(|| job.stdout())
        };
        let until = |job: &mut Job, ask: &mut dyn FnMut(&mut Job, &str) -> Result<char>, wanted, limit| {
            let started = std::time::Instant::now();
            while ask(job, "r")? != wanted {}
            let took = started.elapsed();
            ensure!(took < limit, "{wanted} is seen after {took:?}");
            Ok(())
        };
        let seconds = |count| std::time::Duration::from_secs(count) + scale::seconds(0.2);
        // That the container starts is not what is timed.
        ask(&mut job, "r")?;
        let mut stayed = false;
        // What takes longer than a second here has shown nothing.
        for _ in 0..10 {
            file.write_all_at(&old[4096..], 4096)?;
            until(&mut job, &mut ask, 'o', seconds(1))?;
            ensure!(ask(&mut job, "w")? == 'w');
            ensure!(std::fs::read(&path)?.starts_with(b"w-"), "at once on the host");
            let modified = file.metadata()?.modified()?;
            file.write_all_at(&new, 4096)?;
            file.set_modified(modified)?;
            stayed |= ask(&mut job, "r")? == 'o';
            until(&mut job, &mut ask, 'h', seconds(2))?;
            if stayed {
                break;
            }
        }
        job.close_input();
        job.finish(scale::container())?.success()?;
        ensure!(stayed == world.stage().is_rvm(), "nothing was kept of a file that was written to");
        Ok(())
    });
}

#[test]
fn sources_no_guest_can_use() {
    case(|world| {
        let volume = Volume::new(world, "useless")?;
        let _socket = std::os::unix::net::UnixListener::bind(volume.path("socket"))?;
        let huge = volume.path("huge");
        shell(&format!(
            "mkfifo {}; mkdir {huge}; mount -t hugetlbfs none {huge}",
            volume.path("pipe").display(),
            huge = huge.display()
        ))?;
        for (name, words) in [
            ("socket", "is a socket of the host"),
            ("pipe", "is a named pipe of the host"),
            ("missing", "No such file or directory"),
            ("huge", "is a hugetlbfs of the host"),
        ] {
            let run =
                world.ctr().container("useless").with(&["--mount", &bind(&volume.path(name), "/v", "bind")]);
            let finished = run.run(&["true"])?;
            let errors = finished.errors();
            ensure!(finished.code() != 0 && errors.contains(words), "{finished}");
            ensure!(errors.contains("].source"), "the field is named: {finished}");
        }
        shell(&format!("umount {}", huge.display())).map(drop)
    });
}

/// An ext4 file system of the host: tmpfs has no idmapped mounts before Linux 6.3.
#[test]
fn a_volume_with_other_owners() {
    case(|world| {
        let ctr = world.ctr();
        let volume = Volume::new(world, "idmapped")?;
        let (image, dir) = (volume.path("image"), volume.path("mounted"));
        shell(&format!(
            "truncate -s 32M {0}; /sbin/mkfs.ext4 -q -F {0}; mkdir {1}; mount -o loop {0} {1}; \
             echo x > {1}/root; echo x > {1}/seven; chown 7:8 {1}/seven; chmod 777 {1}",
            image.display(),
            dir.display()
        ))?;
        let result = (|| {
            let spec = ctr.run(&["oci", "spec"], scale::command())?.success()?;
            let mut spec: serde_json::Value = serde_json::from_slice(&spec.stdout)?;
            spec["root"]["path"] = world.rootfs()?.to_string_lossy().into_owned().into();
            spec["process"]["args"] = serde_json::json!([
                "/bin/sh",
                "-c",
                "PATH=/bin; stat -c '%u:%g' /v/root /v/seven; echo x > /v/new && chown 1007:2008 /v/new && stat -c '%u:%g' /v/new"
            ]);
            if let Some(mounts) = spec["mounts"].as_array_mut() {
                mounts.push(serde_json::json!({
                    "destination": "/v", "type": "bind", "source": dir, "options": ["rbind", "rw", "idmap"],
                    "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 100}, {"containerID": 100, "hostID": 0, "size": 1}],
                    "gidMappings": [{"containerID": 0, "hostID": 2000, "size": 100}, {"containerID": 100, "hostID": 0, "size": 1}],
                }));
            }
            let path = world.write_file("spec.json", spec.to_string())?;
            let finished = ctr.container("idmap").with(&["--config", &path]).run(&[]);
            std::fs::remove_file(path)?;
            let finished = finished?.success()?;
            ensure!(finished.text() == "1000:2000\n1007:2008\n1007:2008\n", "{finished}");
            let stored = shell(&format!("stat -c %u:%g {}/new", dir.display()))?;
            ensure!(stored == "7:8\n", "on the host: {stored}");
            Ok(())
        })();
        shell(&format!("umount {}", dir.display()))?;
        result
    });
}

/// Docker in Docker, buildkit and the like keep their layers on a volume.
#[test]
fn an_overlay_on_a_volume() {
    case(|world| {
        let volume = Volume::new(world, "overlay")?;
        // Its files' extended attributes are a file system's that has them.
        let _mounts = Mounts::ext4(&volume.0)?;
        let run = world.ctr().container("overlay").with(&[
            "--privileged",
            "--mount",
            &bind(&volume.0, "/v", "rbind:rw"),
        ]);
        let script = "mkdir -p /m /v/upper /v/work /v/lower/dir /v/lower/tree; \
                      for f in kept gone moved; do echo $f > /v/lower/$f; done; \
                      echo low > /v/lower/dir/low; echo leaf > /v/lower/tree/leaf; \
                      over() { mount -t overlay overlay -o lowerdir=/v/lower,upperdir=/v/upper,workdir=/v/work /m; }; \
                      over || exit 3; rm /m/gone; rm -r /m/dir; mkdir /m/dir; echo high > /m/dir/high; \
                      mv /m/moved /m/there; rm -r /m/tree; echo new > /m/new; mkfifo /m/fifo; \
                      look() { ls /m; ls /m/dir; cat /m/kept /m/there /m/new; }; look > /first; cat /first; \
                      umount /m && over && look | cmp - /first && echo same; stat -c %F /v/upper/gone; umount /m";
        let finished = run.shell(script)?.success()?;
        let expected = "dir\nfifo\nkept\nnew\nthere\nhigh\nkept\nmoved\nnew\nsame\ncharacter special file\n";
        ensure!(finished.text() == expected, "{finished}");
        if world.stage().is_rvm() {
            // To an overlay of the host it says nothing.
            let attributes =
                shell(&format!("getfattr -d -m - {}/upper/dir 2>/dev/null || true", volume.0.display()))?;
            ensure!(!attributes.contains("trusted.overlay"), "{attributes}");
        }
        Ok(())
    });
}

/// `ro` is said of the volume, not of what is mounted below it; `rro` is.
#[test]
fn read_only_with_and_without_what_is_below() {
    case(|world| {
        let volume = Volume::new(world, "sealed")?;
        let _mounts = Mounts::tmpfs(&[volume.path("below"), volume.path("below/deep")])?;
        for (options, expected) in
            [("rbind:ro", "refused\nbelow\ndeep\n"), ("rbind:rro", "refused\nrefused\nrefused\n")]
        {
            let run = world.ctr().container("sealed").with(&["--mount", &bind(&volume.0, "/v", options)]);
            let script = "try() { touch $1/new 2>/dev/null && echo ${1##*/} || echo refused; }; \
                          try /v; try /v/below; try /v/below/deep";
            let finished = run.shell(script)?.success()?;
            ensure!(finished.text() == expected, "{options}: {finished}");
        }
        ensure!(volume.path("below/deep/new").exists() && !volume.path("new").exists(), "on the host");
        Ok(())
    });
}

/// Flags the administrator gave the mount a volume is of.
#[test]
fn flags_of_the_hosts_mount_are_kept() {
    case(|world| {
        let volume = Volume::new(world, "flags")?;
        let _mounts = Mounts::tmpfs(std::slice::from_ref(&volume.0))?;
        shell(&format!("mount -o remount,nosuid,nodev,noexec {}", volume.0.display()))?;
        std::fs::write(volume.path("program"), "#!/bin/sh\necho ran\n")?;
        shell(&format!("chmod 755 {}", volume.path("program").display()))?;
        let run = world.ctr().container("flags").with(&["--mount", &bind(&volume.0, "/v", "rbind:rw")]);
        let script = "/v/program 2>/dev/null || echo refused; \
                      grep ' /v ' /proc/self/mounts | cut -d' ' -f4 | tr , '\\n' | grep '^no[sde]' | sort";
        let finished = run.shell(script)?.success()?;
        ensure!(finished.text() == "refused\nnodev\nnoexec\nnosuid\n", "{finished}");
        Ok(())
    });
}

/// The host's words, not "input/output error"; and the volume goes on.
#[test]
fn a_full_file_system_of_the_host_says_so() {
    case(|world| {
        let volume = Volume::new(world, "full")?;
        let _mounts = Mounts::tmpfs(std::slice::from_ref(&volume.0))?;
        shell(&format!("mount -o remount,size=1m {}", volume.0.display()))?;
        let run = world.ctr().container("full").with(&["--mount", &bind(&volume.0, "/v", "rbind:rw")]);
        // What is reserved is the host's, too.
        let script = "dd if=/dev/zero of=/v/big bs=64k; echo code=$?; rm /v/big; echo x > /v/more; sync; cat /v/more; \
                      fallocate -l 65536 /v/reserved; stat -c '%s %b' /v/reserved; fallocate -l 2M /v/much || echo full";
        let finished = run.shell(script)?.success()?;
        ensure!(finished.text() == "code=1\nx\n65536 128\nfull\n", "{finished}");
        ensure!(finished.errors().contains("No space left on device"), "{finished}");
        Ok(())
    });
}

/// What the host mounts below a volume that follows it is there, and gone again.
#[test]
fn mounts_of_the_host_come_and_go() {
    case(|world| {
        let volume = Volume::new(world, "followed")?;
        std::fs::create_dir(volume.path("late"))?;
        let dir = volume.0.display().to_string();
        shell(&format!("mount --bind {dir} {dir} && mount --make-shared {dir}"))?;
        let result = (|| {
            let run = world.ctr().container("followed").with(&[
                "--mount",
                &bind(&volume.0, "/v", "rbind:rslave:rw"),
                "--mount",
                &bind(&volume.0, "/own", "rbind:rprivate:rw"),
            ]);
            let mut guest = Shell::start(&run)?;
            ensure!(guest.run("ls /v /v/late")? == "/v:\nlate\n\n/v/late:\n");
            shell(&format!("mount -t tmpfs tmpfs {dir}/late && echo below > {dir}/late/file"))?;
            ensure!(
                guest.run("until test -e /v/late/file; do :; done; cat /v/late/file; ls /own/late")?
                    == "below\n"
            );
            ensure!(guest.run("echo more > /v/late/new; stat -c %d /v /v/late | sort -u | wc -l")? == "2\n");
            ensure!(std::fs::read_to_string(volume.path("late/new"))? == "more\n");
            // As under runc nothing but an open file keeps it.
            shell(&format!("umount {dir}/late"))?;
            guest.run("while test -e /v/late/file; do :; done")?;
            ensure!(guest.run("ls /v/late; echo x > /v/late/own")?.is_empty());
            ensure!(volume.path("late/own").exists(), "below it");
            guest.end()
        })();
        shell(&format!("umount -l {dir}/late 2>/dev/null || true; umount -l {dir}"))?;
        result
    });
}
