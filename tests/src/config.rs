//! rvm's configuration file, as a test wants it.

use std::{collections::BTreeMap, fmt};

use crate::{scale, stage::Stage};

/// Keys by section, values as they stand in the file.
#[derive(Clone, Debug, Default)]
pub struct ConfigFile {
    sections: BTreeMap<String, BTreeMap<String, String>>,
}

impl ConfigFile {
    /// Kernel, initramfs and monitor of the stage, and as much longer for a guest to answer as this machine is slower;
    /// every other key at its default.
    pub fn of(stage: &Stage) -> Self {
        let boot_timeout = scale::seconds(10.0).as_secs().clamp(60, 3600);
        Self::default()
            .set("guest", "boot_timeout_s", &boot_timeout.to_string())
            .text("guest", "kernel", &stage.kernel().to_string_lossy())
            .text("guest", "initramfs", &stage.initramfs().to_string_lossy())
            .text("host", "monitor", &stage.monitor().to_string_lossy())
            // What is made in the background is in the way of who counts processes.
            .set("images", "make", "false")
    }

    /// The same with image files, made where there is not much room.
    #[must_use]
    pub fn with_images(self) -> Self {
        self.set("images", "make", "true").set("images", "free_mib", "16")
    }

    /// Sets a key to a literal, right or wrong.
    #[must_use]
    pub fn set(mut self, section: &str, key: &str, literal: &str) -> Self {
        self.sections.entry(section.to_owned()).or_default().insert(key.to_owned(), literal.to_owned());
        self
    }

    /// Sets a key to a string.
    #[must_use]
    pub fn text(self, section: &str, key: &str, value: &str) -> Self {
        self.set(section, key, &format!("{value:?}"))
    }
}

impl fmt::Display for ConfigFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (section, keys) in &self.sections {
            writeln!(f, "[{section}]")?;
            for (key, value) in keys {
                writeln!(f, "{key} = {value}")?;
            }
        }
        Ok(())
    }
}
