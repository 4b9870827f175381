//! Lines `key = value` on standard output.

use std::{
    fmt::{Display, Write as _},
    io::Write as _,
};

/// Lines not yet written: one write for many, since each may cross a guest's border.
#[derive(Default)]
pub struct Out {
    text: String,
    prefix: String,
}

impl Out {
    /// Adds a line. Whatever would not fit on one is escaped.
    pub fn put(&mut self, key: impl Display, value: impl Display) {
        let value = value.to_string().replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r");
        let _ = writeln!(self.text, "{}{key} = {}", self.prefix, value.trim_end());
    }

    /// Starts every key from now on with `prefix` and a dot; with nothing where it is empty.
    pub fn section(&mut self, prefix: &str) {
        self.prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}.") };
    }

    /// The lines so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Writes what there is.
    pub fn flush(&mut self) {
        let mut stdout = std::io::stdout().lock();
        // Nobody is left to tell when standard output is closed.
        let _ = stdout.write_all(self.text.as_bytes()).and_then(|()| stdout.flush());
        self.text.clear();
    }

    /// Writes one line at once.
    pub fn line(text: &str) {
        let mut stdout = std::io::stdout().lock();
        let _ = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
    }
}
