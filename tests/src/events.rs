//! What containerd published, from `ctr events`.
//!
//! A line is `DATE TIME +0000 UTC NAMESPACE TOPIC JSON`.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    ctr::{Ctr, unique_id},
    job::{Input, Job},
    scale,
};

/// The topic of the end of a process.
const EXIT: &str = "/tasks/exit";

/// One subscription, from containerd's start on.
pub struct Events {
    ctr: Ctr,
    job: Job,
}

/// One published event.
#[derive(Clone, Debug)]
pub struct Event {
    /// For example `/tasks/exit`.
    pub topic: String,
    /// The message's fields.
    pub fields: Value,
    /// When it was published, by containerd's clock: seconds since midnight, UTC.
    pub at: f64,
}

impl Event {
    /// Whether it tells of the end of a container's first process.
    pub fn is_end_of(&self, container: &str) -> bool {
        self.topic == EXIT && self.text("id") == container
    }

    /// A text field, empty where it is not set.
    pub fn text(&self, name: &str) -> &str {
        self.fields[name].as_str().unwrap_or_default()
    }

    /// A number field, 0 where it is not set, as protobuf says.
    pub fn number(&self, name: &str) -> u64 {
        self.fields[name].as_u64().unwrap_or_default()
    }
}

impl Events {
    /// Subscribes; returns once events arrive.
    ///
    /// # Errors
    /// When none arrives.
    pub(crate) fn subscribe(ctr: &Ctr) -> Result<Self> {
        let mut events =
            Self { ctr: ctr.clone(), job: Job::start(ctr.command(&["events"]), Input::Nothing)? };
        // `ctr events` does not say when it has subscribed; until then a marker is lost.
        for _ in 0..50 {
            if events.marker(scale::seconds(0.1)).is_ok() {
                return Ok(events);
            }
        }
        events.marker(scale::command()).context("no event arrives")?;
        Ok(events)
    }

    /// Process id of the subscriber.
    pub fn pid(&self) -> libc::pid_t {
        self.job.pid()
    }

    /// Publishes an event and waits for it: what was published before has arrived.
    ///
    /// # Errors
    /// When it does not arrive.
    pub fn marker(&mut self, limit: std::time::Duration) -> Result<()> {
        let name = unique_id("marker");
        self.ctr.run(&["namespaces", "create", &name], scale::command())?.success()?;
        let arrived = self.job.wait_for(&format!("{name:?}"), limit);
        self.ctr.run(&["namespaces", "rm", &name], scale::command())?.success()?;
        arrived
    }

    /// The events so far of one container.
    ///
    /// # Errors
    /// When a line is not an event.
    pub fn of(&self, container: &str) -> Result<Vec<Event>> {
        let text = self.job.stdout();
        // The last line may still be on its way.
        let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        let events = whole.lines().map(parse).collect::<Result<Vec<_>>>()?;
        Ok(events.into_iter().filter(|event| event.text("container_id") == container).collect())
    }

    /// Checks that the end of `container`'s first process was published once, and returns its exit code.
    ///
    /// # Errors
    /// When it was published never or more than once.
    pub fn exit_once(&mut self, container: &str) -> Result<u64> {
        self.marker(scale::command())?;
        let exits: Vec<Event> =
            self.of(container)?.into_iter().filter(|event| event.is_end_of(container)).collect();
        ensure!(exits.len() == 1, "{} TaskExit events of {container}: {exits:?}", exits.len());
        Ok(exits[0].number("exit_status"))
    }

    /// Waits until an event of `topic` about `container` has arrived; an exit is that of its first
    /// process.
    ///
    /// # Errors
    /// When the limit passes.
    pub fn wait_for(&self, topic: &str, container: &str, limit: std::time::Duration) -> Result<()> {
        let until = std::time::Instant::now() + limit;
        let mut seen = 0;
        loop {
            let is_it = |event: &Event| match topic {
                EXIT => event.is_end_of(container),
                topic => event.topic == topic,
            };
            if self.of(container)?.iter().any(is_it) {
                return Ok(());
            }
            let left = until.saturating_duration_since(std::time::Instant::now());
            ensure!(!left.is_zero(), "no {topic} of {container} within {limit:?}");
            seen = self.job.wait_for_more(seen, left);
        }
    }
}

fn parse(line: &str) -> Result<Event> {
    let json = line.find('{').with_context(|| format!("not an event: {line:?}"))?;
    let topic = line[..json].split_whitespace().last().unwrap_or_default().to_owned();
    let fields = serde_json::from_str(&line[json..]).with_context(|| format!("not an event: {line:?}"))?;
    let at = seconds(line.split(' ').nth(1).unwrap_or_default());
    Ok(Event { topic, fields, at: at.with_context(|| format!("no time: {line:?}"))? })
}

/// `10:00:00.1` in seconds.
fn seconds(time: &str) -> Option<f64> {
    time.split(':').try_fold(0.0, |sum, part| Some(sum * 60.0 + part.parse::<f64>().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_ctr_events() -> Result<()> {
        let line = "2026-01-01 10:00:00.1 +0000 UTC default /tasks/exit \
                    {\"container_id\":\"c1\",\"id\":\"c1\",\"pid\":7,\"exit_status\":42}";
        let event = parse(line)?;
        assert_eq!(
            (event.topic.as_str(), event.text("id"), event.number("exit_status")),
            ("/tasks/exit", "c1", 42)
        );
        assert_eq!(event.number("unset"), 0);
        assert_eq!(event.at, 36000.1);
        Ok(())
    }
}
