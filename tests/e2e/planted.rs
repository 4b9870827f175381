//! Links that somebody has put where a shim makes, reads or deletes something: nothing they lead to is read, changed or gone.

use std::{os::unix::fs::PermissionsExt, path::PathBuf};

use anyhow::{Result, ensure};
use rvm_tests::{
    case,
    world::{World, shell},
};

/// What nobody may touch: a directory with files, one of them an ext4 file system.
struct Victim {
    dir: PathBuf,
    before: String,
}

impl Victim {
    fn new(world: &World) -> Result<Self> {
        let dir = world.dir().join("victim");
        shell(&format!(
            "mkdir -p {0}/members {0}/share; cd {0}; echo precious > file; echo precious > members/file; \
             echo precious > share/file; truncate -s 64M disk; /sbin/mkfs.ext4 -q -F -L victim disk",
            dir.display()
        ))?;
        let before = Self::look(&dir)?;
        Ok(Self { dir, before })
    }

    fn look(dir: &std::path::Path) -> Result<String> {
        shell(&format!(
            "cd {}; find . -printf '%p %i %m %U %s %T@\\n' | sort; find . -type f | sort | xargs sha256sum",
            dir.display()
        ))
    }

    fn is_whole(&self) -> Result<()> {
        let now = Self::look(&self.dir)?;
        ensure!(now == self.before, "before:\n{}\nafter:\n{now}", self.before);
        Ok(())
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A container of this id runs, whatever is in its way.
fn runs(world: &World, id: &str, options: &[&str]) -> Result<()> {
    let finished =
        world.ctr().container("planted").named(id).with(options).run(&["echo", "runs"])?.success()?;
    ensure!(finished.text() == "runs\n", "{finished}");
    Ok(())
}

#[test]
fn where_a_sandbox_keeps_what_it_has() {
    case(|world| {
        let victim = Victim::new(world)?;
        let place = PathBuf::from("/run/rvm/default/planted");
        for plant in ["ln -s", "ln"] {
            let to = if plant == "ln" { "file" } else { "" };
            shell(&format!(
                "mkdir -p /run/rvm/default; {plant} {}/{to} {}",
                victim.dir.display(),
                place.display()
            ))?;
            runs(world, "planted", &[])?;
            victim.is_whole()?;
            ensure!(!place.exists(), "{} stays", place.display());
        }
        // What containerd calls for a shim that is gone deletes nothing behind a link either.
        shell(&format!("mkdir -p /run/rvm/default; ln -s {} {}", victim.dir.display(), place.display()))?;
        let bundle = world.dir().join("planted-bundle");
        std::fs::create_dir(&bundle)?;
        let deleted = shell(&format!(
            "cd {}; RVM_CONFIG={} {} -namespace default -address /run/containerd/containerd.sock -id planted -bundle {} delete",
            bundle.display(),
            world.config_path().display(),
            world.stage().shim().display(),
            bundle.display()
        ));
        std::fs::remove_dir_all(&bundle)?;
        deleted?;
        victim.is_whole()?;
        shell(&format!("rm -f {}; rmdir /run/rvm/default /run/rvm || true", place.display())).map(drop)
    });
}

/// containerd makes the bundle, so a shim of our own name plants them on the way.
#[test]
fn in_the_bundle() {
    case(|world| {
        let victim = Victim::new(world)?;
        let wrapper = world.wrapper_dir().join("containerd-shim-rvmplanted-v2");
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in *start*) for name in address .address rvm-sandbox; do ln -s {0}/file $name; done;; esac\n\
             exec {1} \"$@\"\n",
            victim.dir.display(),
            world.stage().shim().display()
        );
        std::fs::write(&wrapper, script)?;
        std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755))?;
        let result = runs(world, "planted", &["--runtime", "io.rvmplanted.v2"]);
        std::fs::remove_file(wrapper)?;
        result?;
        victim.is_whole()
    });
}

#[test]
fn in_the_cache() {
    case(|world| {
        let victim = Victim::new(world)?;
        let cache = world.dir().join("planted-cache");
        // A template that is another's file would be what the container finds on its disk.
        shell(&format!(
            "mkdir {0}; for version in $(seq 0 9); do ln -s {1}/disk {0}/scratch-64m-v$version.ext4; done; \
             ln -s {1}/file {0}/ids",
            cache.display(),
            victim.dir.display()
        ))?;
        let config = world.config().text("scratch", "backing", "block").set("scratch", "size_mib", "64");
        let path = world.write_file(
            "case.toml",
            config.text("host", "cache_dir", &cache.to_string_lossy()).to_string(),
        )?;
        let result = runs(world, "planted", &["--runtime-config-path", &path]);
        let left = shell(&format!("find {} -type f | wc -l", cache.display()));
        std::fs::remove_file(path)?;
        std::fs::remove_dir_all(cache)?;
        result?;
        ensure!(left?.trim() == "1", "no template of its own was made");
        victim.is_whole()
    });
}
