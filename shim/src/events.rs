//! Events for containerd's subscribers.
//!
//! They go out one after the other, in the order in which they happened. One
//! that containerd has acknowledged is done; one that it has not is sent again
//! once containerd is back. Who was subscribed to the containerd that went away
//! is gone with it, so nobody sees an event twice.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    api::ForwardRequest,
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed,
        TaskStart,
    },
    shim::event::Envelope,
    shim_async::EventsClient,
    topics,
};
use protobuf::{
    Message,
    well_known_types::{any::Any, timestamp::Timestamp},
};
use tokio::{
    net::UnixStream,
    sync::{Notify, watch},
    time::timeout,
};
use ttrpc::{
    asynchronous::{Client, transport::Socket},
    context,
};

use crate::fault;

/// How many events may wait for a containerd that is away; what must arrive waits
/// beyond that.
const QUEUE_LEN: usize = 1024;
/// Between two attempts to reach containerd, unless somebody says it is back.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How long containerd may take for one event before the connection counts as
/// dead. A containerd that is only stopped for longer may get an event twice.
const FORWARD_LIMIT: Duration = Duration::from_secs(60);

/// An event containerd knows.
pub trait TaskEvent: Message {
    /// Where it is published.
    const TOPIC: &'static str;
}

macro_rules! task_events {
    ($($event:ty => $topic:ident),* $(,)?) => {
        $(impl TaskEvent for $event {
            const TOPIC: &'static str = topics::$topic;
        })*
    };
}

task_events! {
    TaskCreate => TASK_CREATE_EVENT_TOPIC,
    TaskStart => TASK_START_EVENT_TOPIC,
    TaskExit => TASK_EXIT_EVENT_TOPIC,
    TaskDelete => TASK_DELETE_EVENT_TOPIC,
    TaskExecAdded => TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted => TASK_EXEC_STARTED_EVENT_TOPIC,
    TaskPaused => TASK_PAUSED_EVENT_TOPIC,
    TaskResumed => TASK_RESUMED_EVENT_TOPIC,
    TaskOOM => TASK_OOM_EVENT_TOPIC,
}

/// Takes events; clones share one queue.
#[derive(Clone)]
pub struct Events {
    namespace: Arc<str>,
    queue: Option<Arc<Queue>>,
}

/// What waits for containerd.
///
/// An exit and a deletion are never dropped: a client waits for each, and there
/// are no more of them than clients started processes. The rest is bounded.
struct Queue {
    waiting: Mutex<Waiting>,
    /// Something was added.
    added: Notify,
    /// How many have been taken by containerd, or refused.
    done: watch::Sender<u64>,
    /// containerd has been heard of.
    back: Notify,
}

#[derive(Default)]
struct Waiting {
    envelopes: VecDeque<Envelope>,
    /// How many have been added so far.
    added: u64,
}

impl Waiting {
    fn add(&mut self, envelope: Envelope) {
        let topic = envelope.topic.as_str();
        // One says as much as many: what is counted is in the statistics.
        let is_told = |other: &Envelope| other.topic == topic && other.event == envelope.event;
        if topic == TaskOOM::TOPIC && self.envelopes.iter().any(is_told) {
            return;
        }
        let must_arrive = [TaskExit::TOPIC, TaskDelete::TOPIC].contains(&topic);
        if self.envelopes.len() >= QUEUE_LEN && !must_arrive {
            return log::error!("{topic}: dropped, as {QUEUE_LEN} events wait for containerd");
        }
        self.added += 1;
        self.envelopes.push_back(envelope);
    }
}

impl Events {
    /// Publishes to the containerd that listens on `address`, its ttrpc socket,
    /// with or without `unix://`.
    pub fn publish_to(namespace: &str, address: &str) -> Self {
        let queue = Arc::new(Queue {
            waiting: Mutex::default(),
            added: Notify::new(),
            done: watch::Sender::new(0),
            back: Notify::new(),
        });
        let path = address.strip_prefix("unix://").unwrap_or(address).to_owned();
        tokio::spawn(forward_all(path, queue.clone()));
        Self { queue: Some(queue), ..Self::to_nobody(namespace) }
    }

    /// For CRI-O, which waits for each process instead.
    pub fn to_nobody(namespace: &str) -> Self {
        Self { namespace: namespace.into(), queue: None }
    }

    /// Publishes an event after those before it.
    pub fn publish<E: TaskEvent>(&self, event: E) {
        let Some(queue) = &self.queue else { return };
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => return log::error!("encoding {}: {error}", E::NAME),
        };
        // The name a descriptor would give, without building descriptors.
        let type_url = format!("containerd.events.{}", E::NAME);
        queue.waiting().add(Envelope {
            timestamp: Some(Timestamp::from(SystemTime::now())).into(),
            namespace: self.namespace.to_string(),
            topic: E::TOPIC.to_owned(),
            event: Some(Any { type_url, value, ..Default::default() }).into(),
            ..Default::default()
        });
        queue.added.notify_one();
        fault::point(E::TOPIC);
    }

    /// Says that containerd has been heard of: what waits is tried at once.
    pub fn containerd_is_back(&self) {
        if let Some(queue) = &self.queue {
            queue.back.notify_one();
        }
    }

    /// Waits until everything published so far has been taken, at most `limit`.
    pub async fn flush(&self, limit: Duration) {
        let Some(queue) = &self.queue else { return };
        let all = queue.waiting().added;
        let mut done = queue.done.subscribe();
        if timeout(limit, done.wait_for(|done| *done >= all)).await.is_err() {
            log::warn!("containerd did not take all events within {} s", limit.as_secs());
        }
    }
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The moment as events and answers carry it.
pub fn timestamp(at: SystemTime) -> Timestamp {
    Timestamp::from(at)
}

async fn forward_all(path: String, queue: Arc<Queue>) {
    let mut client = None;
    loop {
        let next = queue.waiting().envelopes.pop_front();
        match next {
            Some(envelope) => {
                forward(&path, &mut client, envelope, &queue.back).await;
                queue.done.send_modify(|done| *done += 1);
            }
            None => queue.added.notified().await,
        }
    }
}

/// Sends one event until containerd takes or refuses it.
async fn forward(path: &str, client: &mut Option<EventsClient>, envelope: Envelope, back: &Notify) {
    let topic = envelope.topic.clone();
    let request = ForwardRequest { envelope: Some(envelope).into(), ..Default::default() };
    let mut told = false;
    loop {
        let connected = match client.take() {
            Some(connected) => Ok(connected),
            None => connect(path).await,
        };
        match connected {
            Ok(connected) => match connected.forward(context::with_duration(FORWARD_LIMIT), &request).await {
                Ok(_) => {
                    *client = Some(connected);
                    return;
                }
                Err(ttrpc::Error::RpcStatus(status)) if status.code() != ttrpc::Code::DEADLINE_EXCEEDED => {
                    log::error!("{topic}: containerd refuses it: {}", status.message);
                    *client = Some(connected);
                    return;
                }
                // An old connection to a containerd that was restarted, or that
                // answers no more: the next one is new.
                Err(error) => log::debug!("{topic}: {error}"),
            },
            Err(error) if !told => {
                log::warn!("{topic}: waiting for containerd at {path}: {error}");
                told = true;
            }
            Err(_) => {}
        }
        if told {
            let _ = timeout(RETRY_AFTER, back.notified()).await;
        }
    }
}

async fn connect(path: &str) -> io::Result<EventsClient> {
    let stream = UnixStream::connect(path).await?;
    Ok(EventsClient::new(Client::new(Socket::new(stream))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use containerd_shim_protos::shim_async::{Events as EventsService, create_events};
    use protobuf::well_known_types::empty::Empty;
    use std::path::Path;
    use tokio::sync::mpsc;
    use ttrpc::asynchronous::{Server, TtrpcContext};

    struct Containerd(mpsc::UnboundedSender<Envelope>);

    #[async_trait]
    impl EventsService for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            self.0.send(request.envelope.unwrap()).unwrap();
            Ok(Empty::new())
        }
    }

    async fn containerd(path: &Path) -> (Server, mpsc::UnboundedReceiver<Envelope>) {
        let _ = std::fs::remove_file(path);
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(create_events(Arc::new(Containerd(sender))));
        server.start().await.unwrap();
        (server, receiver)
    }

    fn start(pid: u32) -> TaskStart {
        TaskStart { container_id: "c".into(), pid, ..Default::default() }
    }

    fn pid(envelope: &Envelope) -> u32 {
        TaskStart::parse_from_bytes(&envelope.event.value).unwrap().pid
    }

    #[tokio::test]
    async fn events_arrive_once_and_in_order_across_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("containerd.sock.ttrpc");
        let (mut server, mut received) = containerd(&path).await;
        let events = Events::publish_to("default", &format!("unix://{}", path.display()));
        events.publish(start(1));
        events.flush(Duration::from_secs(10)).await;
        let first = received.recv().await.unwrap();
        assert_eq!(
            (pid(&first), first.topic.as_str(), first.namespace.as_str()),
            (1, "/tasks/start", "default")
        );
        assert_eq!(first.event.type_url, "containerd.events.TaskStart");

        server.shutdown().await.unwrap();
        std::fs::remove_file(&path).unwrap();
        events.publish(start(2));
        events.publish(start(3));
        events.flush(Duration::from_millis(50)).await;

        let (_server, mut received) = containerd(&path).await;
        events.containerd_is_back();
        events.flush(Duration::from_secs(10)).await;
        assert_eq!(pid(&received.recv().await.unwrap()), 2);
        assert_eq!(pid(&received.recv().await.unwrap()), 3);
        assert!(received.try_recv().is_err());
    }
    #[tokio::test]
    async fn exits_arrive_however_much_else_happened_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("containerd.sock.ttrpc");
        let events = Events::publish_to("default", &format!("unix://{}", path.display()));
        let oom = |id: &str| TaskOOM { container_id: id.into(), ..Default::default() };
        for n in 0..2000 {
            events.publish(oom("c"));
            events.publish(start(n));
        }
        events.publish(oom("d"));
        for n in 0..2000 {
            events.publish(TaskExit { id: n.to_string(), ..Default::default() });
        }
        events.publish(TaskDelete { container_id: "c".into(), ..Default::default() });

        let (_server, mut received) = containerd(&path).await;
        events.containerd_is_back();
        events.flush(Duration::from_secs(30)).await;
        let (mut exits, mut ooms, mut last) = (0, 0, String::new());
        while let Ok(envelope) = received.try_recv() {
            exits += usize::from(envelope.topic == TaskExit::TOPIC);
            ooms += usize::from(envelope.topic == TaskOOM::TOPIC);
            last = envelope.topic;
        }
        assert_eq!((exits, last.as_str()), (2000, TaskDelete::TOPIC));
        // The one that was on its way already, and one more.
        assert!((1..=2).contains(&ooms), "{ooms}");
    }
}
