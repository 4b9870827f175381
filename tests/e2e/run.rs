//! What `ctr run` promises: output, input, exit code, terminal, and nothing left.

use anyhow::{Result, ensure};
use rvm_tests::{
    case,
    job::{Finished, Input, Job},
    scale,
};

#[test]
fn guest_has_a_kernel_of_its_own() {
    case(|world| {
        let guest = world.ctr().container("kernel").run(&["uname", "-r"])?.success()?;
        let host = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
        println!("host {}, guest {}", host.trim(), guest.text().trim());
        ensure!(!guest.text().trim().is_empty(), "{guest}");
        ensure!(host.trim() != guest.text().trim(), "the container runs on the host's kernel: {guest}");
        Ok(())
    });
}

#[test]
fn output_streams_are_apart() {
    case(|world| {
        let finished =
            world.ctr().container("streams").shell("echo out; echo err >&2; echo out2")?.success()?;
        ensure!(finished.text() == "out\nout2\n" && finished.errors() == "err\n", "{finished}");
        Ok(())
    });
}

#[test]
fn a_mebibyte_from_stdin_to_stdout() {
    case(|world| {
        // Every byte value, no short period: a lost or repeated block shows.
        let mut seed = 1u32;
        let bytes: Vec<u8> = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24) as u8
        })
        .take(1 << 20)
        .collect();
        let finished =
            world.ctr().container("cat").run_with(&["cat"], Input::Bytes(bytes.clone()))?.success()?;
        ensure!(finished.stdout.len() == bytes.len(), "{} bytes came back", finished.stdout.len());
        ensure!(finished.stdout == bytes, "the bytes that came back are not the ones sent");
        Ok(())
    });
}

#[test]
fn exit_codes() {
    case(|world| {
        for code in [0, 42, 137] {
            let run = world.ctr().container("code");
            run.shell(&format!("exit {code}"))?.exited(code)?;
            let published = world.events(|events| events.exit_once(&run.id))?;
            ensure!(published == code as u64, "exited {code}, published {published}");
        }
        Ok(())
    });
}

#[test]
fn output_without_a_last_newline_and_of_many_lines() {
    case(|world| {
        let finished = world.ctr().container("lines").shell("seq 1 20000; printf end")?.success()?;
        let expected: String = (1..=20000).map(|n| format!("{n}\n")).collect::<String>() + "end";
        ensure!(finished.text() == expected, "{} bytes, ends {:?}", finished.stdout.len(), tail(&finished));
        Ok(())
    });
}

#[test]
fn terminal() {
    case(|world| {
        let run = world.ctr().container("tty").with(&["--tty"]);
        let mut job = run.start(&["sh"], Input::Terminal(91, 33))?;
        // Sizes travel apart from the input, and the first one only after the start: ask until it is there.
        let ask = |size: &str| {
            format!(
                "until stty size 2>/dev/null | grep -q '^{size}$'; do :; done; echo size=$(stty size) on $(tty)\n"
            )
        };
        job.write(ask("33 91").as_bytes())?;
        job.wait_for("size=33 91 on /dev/", scale::container())?;
        job.resize(120, 40)?;
        job.write(ask("40 120").as_bytes())?;
        job.wait_for("size=40 120 on /dev/", scale::container())?;
        job.write(b"exit 7\n")?;
        let finished = job.finish(scale::container())?.exited(7)?;
        println!("{}", finished.text());
        Ok(())
    });
}

#[test]
fn terminal_interrupts_with_control_c() {
    case(|world| {
        let run = world.ctr().container("intr").with(&["--tty"]);
        let mut job = run.start(
            &["sh", "-c", "trap 'echo trapped; exit 3' INT; echo up; while :; do sleep 1; done"],
            Input::Terminal(80, 24),
        )?;
        job.wait_for("up", scale::container())?;
        job.write(b"\x03")?;
        job.wait_for("trapped", scale::container())?;
        job.finish(scale::container())?.exited(3)?;
        Ok(())
    });
}

#[test]
fn process_settings() {
    case(|world| {
        let run = world.ctr().container("settings").with(&["--cwd", "/etc", "--env", "COLOUR=dark blue"]);
        let script = "pwd; echo \"$COLOUR\"; id -u; id -g; hostname; echo $$; ls -d /proc/1";
        let finished = run.shell(script)?.success()?;
        let text = finished.text();
        let lines: Vec<&str> = text.lines().collect();
        ensure!(lines[..4] == ["/etc", "dark blue", "0", "0"], "{finished}");
        ensure!(lines[5..] == ["1", "/proc/1"], "not pid 1 of its namespace: {finished}");
        Ok(())
    });
}

/// `ctr` has no option for these: a spec of our own, on a plain directory.
#[test]
fn user_groups_and_hostname_of_the_spec() {
    case(|world| {
        let ctr = world.ctr();
        let spec = ctr.run(&["oci", "spec"], scale::command())?.success()?;
        let mut spec: serde_json::Value = serde_json::from_slice(&spec.stdout)?;
        spec["hostname"] = "own-name".into();
        spec["root"]["path"] = world.rootfs()?.to_string_lossy().into_owned().into();
        spec["process"]["user"] = serde_json::json!({"uid": 1234, "gid": 5678, "additionalGids": [7, 8]});
        spec["process"]["cwd"] = "/tmp".into();
        spec["process"]["env"] = serde_json::json!(["PATH=/bin:/usr/bin"]);
        spec["process"]["args"] = serde_json::json!([
            "sh",
            "-c",
            "hostname; id -u; id -g; id -G; pwd; echo x > /tmp/y && cat /tmp/y"
        ]);
        let path = world.write_file("spec.json", spec.to_string())?;
        let run = ctr.container("spec").with(&["--config", &path]);
        let finished = run.run(&[])?.success();
        std::fs::remove_file(path)?;
        let finished = finished?;
        let text = finished.text();
        let lines: Vec<&str> = text.lines().collect();
        ensure!(lines == ["own-name", "1234", "5678", "5678 7 8", "/tmp", "x"], "{finished}");
        Ok(())
    });
}

#[test]
fn namespaces_and_mounts_inside() {
    case(|world| {
        // From the container's init, and from the guest's own through /proc of the container: it must not see it.
        let script = "for n in mnt pid uts ipc net cgroup; do readlink /proc/self/ns/$n; done; \
                      ls /proc | grep -c '^[0-9]'; grep -c . /proc/self/mountinfo; \
                      for m in /proc /sys /dev /dev/pts /dev/shm /dev/mqueue; do grep -q \" $m \" /proc/self/mounts && echo $m; done; \
                      for d in null zero full random urandom tty ptmx; do test -c /dev/$d && echo $d; done; \
                      ls /sys/class/net";
        let finished = world.ctr().container("ns").shell(script)?.success()?;
        let text = finished.text();
        println!("{text}");
        for kind in ["mnt", "pid", "uts", "ipc", "net", "cgroup"] {
            ensure!(text.contains(&format!("{kind}:[")), "{finished}");
        }
        // include/linux/proc_ns.h: what the guest's own first namespaces are called.
        for own in ["pid:[4026531836]", "uts:[4026531838]", "ipc:[4026531839]"] {
            ensure!(!text.contains(own), "the guest's namespace: {finished}");
        }
        let expected = "/proc\n/sys\n/dev\n/dev/pts\n/dev/shm\n/dev/mqueue\n\
                        null\nzero\nfull\nrandom\nurandom\ntty\nptmx\nlo\n";
        ensure!(text.ends_with(expected), "{finished}");
        Ok(())
    });
}

#[test]
fn root_file_system_is_writable_and_forgotten() {
    case(|world| {
        let script = "echo new > /bin/new && cat /bin/new && rm /etc/passwd && test ! -e /etc/passwd && \
                      dd if=/dev/zero of=/tmp/big bs=1M count=20 2>/dev/null && stat -c %s /tmp/big";
        let run = world.ctr().container("write");
        let finished = run.shell(script)?.success()?;
        ensure!(finished.text() == "new\n20971520\n", "{finished}");
        let again = world.ctr().container("write").shell("ls /bin/new /etc/passwd")?;
        ensure!(again.text() == "/etc/passwd\n" && again.code() != 0, "{again}");
        Ok(())
    });
}

#[test]
fn read_only_root() {
    case(|world| {
        let run = world.ctr().container("readonly").with(&["--read-only"]);
        let finished = run.shell("echo x > /x; echo code=$?")?.success()?;
        ensure!(finished.text().contains("code=1"), "{finished}");
        ensure!(finished.errors().contains("Read-only file system"), "{finished}");
        Ok(())
    });
}

#[test]
fn twenty_one_after_another() {
    case(|world| {
        let mut times = Vec::new();
        for n in 0..20 {
            let run = world.ctr().container("turn");
            let finished = run.shell(&format!("echo turn {n}; exit {n}"))?.exited(n)?;
            ensure!(finished.text() == format!("turn {n}\n"), "{finished}");
            let published = world.events(|events| events.exit_once(&run.id))?;
            ensure!(published == n as u64, "exited {n}, published {published}");
            times.push(finished.took.as_millis());
        }
        println!("ms each: {times:?}");
        Ok(())
    });
}

/// As under runc, also below a read-only root.
#[test]
fn a_working_directory_is_made() {
    case(|world| {
        let script = "pwd; stat -c '%a %u %g' . ..";
        for options in [&[][..], &["--read-only"]] {
            let under = |ctr: rvm_tests::ctr::Ctr| -> Result<String> {
                let run = ctr.container("cwd").with(&["--cwd", "/nowhere/at/all"]).with(options);
                Ok(run.run(&["sh", "-c", script])?.success()?.text())
            };
            let runc = under(world.ctr().under("io.containerd.runc.v2"))?;
            rvm_tests::host::remove_runcs_parent();
            let rvm = under(world.ctr())?;
            ensure!(rvm == runc, "{options:?}: runc {runc:?}, rvm {rvm:?}");
            ensure!(rvm == "/nowhere/at/all\n755 0 0\n755 0 0\n", "{options:?}: {rvm:?}");
        }
        Ok(())
    });
}

#[test]
fn eight_at_once() {
    case(|world| {
        let ctr = world.ctr();
        let runs: Vec<_> = (0..8).map(|_| ctr.container("once")).collect();
        let jobs = runs
            .iter()
            .enumerate()
            .map(|(n, run)| {
                let script = format!("cat; echo number {n}; exit {}", 10 + n);
                run.start(&["sh", "-c", &script], Input::Bytes(format!("input {n}\n").into_bytes()))
            })
            .collect::<Result<Vec<Job>>>()?;
        for (n, (job, run)) in jobs.into_iter().zip(&runs).enumerate() {
            // They share two processors with each other.
            let code = 10 + n as i32;
            let finished = job.finish(scale::container() * 4)?.exited(code)?;
            ensure!(finished.text() == format!("input {n}\nnumber {n}\n"), "{finished}");
            let published = world.events(|events| events.exit_once(&run.id))?;
            ensure!(published == code as u64, "exited {code}, published {published}");
            println!("{n}: {} ms", finished.took.as_millis());
        }
        Ok(())
    });
}

/// Order and completeness of the events of one container and one exec.
#[test]
fn events_in_order() {
    case(|world| {
        let ctr = world.ctr();
        let run = ctr.container("events").detached();
        run.run(&["sleep", "1000"])?.success()?;
        ctr.exec(&run.id, &[], &["true"], Input::Nothing)?.finish(scale::container())?.success()?;
        world.end(&run.id)?;
        let events = world.events(|events| {
            events.marker(scale::command())?;
            events.of(&run.id)
        })?;
        let topics: Vec<&str> = events.iter().map(|event| event.topic.as_str()).collect();
        let expected = [
            "/tasks/create",
            "/tasks/start",
            "/tasks/exec-added",
            "/tasks/exec-started",
            "/tasks/exit",
            "/tasks/exit",
            "/tasks/delete",
        ];
        ensure!(topics == expected, "{events:#?}");
        ensure!(events[5].number("exit_status") == 137, "{events:#?}");
        Ok(())
    });
}

fn tail(finished: &Finished) -> String {
    let text = finished.text();
    text.chars().rev().take(40).collect::<String>().chars().rev().collect()
}
