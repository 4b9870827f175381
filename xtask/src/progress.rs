//! Progress of long steps: a bar each on a terminal, plain lines elsewhere.

use std::fmt::Display;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Resolution of a bar.
const TICKS: u64 = 1000;

/// A step under way. Dropped without [`Step::done`], it counts as failed.
pub struct Step {
    name: String,
    bar: ProgressBar,
    plain: bool,
    started: Instant,
    finished: bool,
}

impl Step {
    /// Starts a step of unknown length.
    pub fn start(name: impl Into<String>) -> Self {
        let name = name.into();
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let plain = bar.is_hidden();
        if plain {
            eprintln!("{name} ...");
        }
        bar.set_style(style("{spinner} {prefix} [{elapsed}] {wide_msg}"));
        bar.set_prefix(name.clone());
        bar.enable_steady_tick(Duration::from_millis(120));
        Self { name, bar, plain, started: Instant::now(), finished: false }
    }

    /// Sets how far the step is, from 0 to 1, and what it is doing.
    pub fn at(&self, fraction: f64, doing: impl Display) {
        if self.bar.length().is_none() {
            self.bar.set_length(TICKS);
            self.bar.set_style(style("{spinner} {prefix} [{elapsed}] [{bar:30}] {percent:>3}% {wide_msg}"));
        }
        self.bar.set_position((fraction.clamp(0.0, 1.0) * TICKS as f64) as u64);
        self.doing(doing);
    }

    /// Sets what the step is doing.
    pub fn doing(&self, doing: impl Display) {
        self.bar.set_message(doing.to_string());
    }

    /// The step has ended well.
    pub fn done(mut self, result: impl Display) {
        self.finished = true;
        let seconds = self.started.elapsed().as_secs_f64();
        let result = result.to_string();
        let separator = if result.is_empty() { "" } else { ": " };
        if self.plain {
            eprintln!("{}{separator}{result} ({seconds:.1} s)", self.name);
        } else {
            self.bar.set_style(style("{prefix} {wide_msg}"));
            self.bar.set_prefix("✓");
            self.bar.finish_with_message(format!("{}{separator}{result} ({seconds:.1} s)", self.name));
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.finished {
            self.bar.abandon();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}
