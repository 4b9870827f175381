//! When each step of a start was done.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::fault;

/// One step of a start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// What was done.
    pub name: String,
    /// Milliseconds from the request until it was.
    pub ms: f64,
}

/// The steps of one start so far.
#[derive(Debug)]
pub struct Timeline {
    begin: Instant,
    steps: Mutex<Vec<Step>>,
}

impl Timeline {
    /// Begins now.
    pub fn begin() -> Self {
        Self { begin: Instant::now(), steps: Mutex::new(Vec::new()) }
    }

    /// Time since the beginning.
    pub fn elapsed(&self) -> Duration {
        self.begin.elapsed()
    }

    /// Notes that a step is done now.
    pub fn mark(&self, name: &str) {
        self.mark_at(name, self.begin.elapsed());
        fault::point(name);
    }

    /// Notes that a step was done `after` the beginning.
    pub fn mark_at(&self, name: &str, after: Duration) {
        let step = Step { name: name.to_owned(), ms: (after.as_secs_f64() * 1e6).round() / 1e3 };
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let place = steps.partition_point(|other| other.ms <= step.ms);
        steps.insert(place, step);
    }

    /// The steps, in the order they were done.
    pub fn steps(&self) -> Vec<Step> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_learnt_late_stand_where_they_belong() {
        let timeline = Timeline::begin();
        timeline.mark_at("monitor", Duration::from_millis(2));
        timeline.mark_at("ready", Duration::from_millis(9));
        timeline.mark_at("first KVM_RUN", Duration::from_micros(3500));
        let names: Vec<_> = timeline.steps().into_iter().map(|step| (step.name, step.ms)).collect();
        assert_eq!(names, [("monitor".into(), 2.0), ("first KVM_RUN".into(), 3.5), ("ready".into(), 9.0)]);
    }
}
