//! Which subscriptions this replica consumes: those of the control plane, and those that the application answers
//! to `GET /dapr/subscribe`. Starts, stops and replaces their consumers as either changes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use duet_api::proto::{self, Workload};
use duet_events::AnyCase;
use duet_events::bus::SubscriptionSpec;
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Limited};
use serde_json::value::RawValue;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::active::Active;
use super::app::App;
use super::buses::Buses;
use super::consumption::Consumption;
use super::doubts::Doubts;
use super::extend::Extensions;
use super::grpc::{self, Callback};
use super::hand::{Aids, Ties};
use super::in_hand::InHand;
use super::post::Post;
use super::programmatic::Programmatic;
use super::receive::Receiver;
use crate::config::AppProtocol;
use crate::drain::Drain;
use duet_events::sparse::Sparse;

/// Largest answer to `GET /dapr/subscribe`.
const MAX_ANSWER_BYTES: usize = 256 * 1024;
/// Most subscriptions in it. Each has a stream, of which a connection has 1024 for everything.
const MAX_SUBSCRIPTIONS: usize = 512;
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Wait before asking an application again that did not answer.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// The bus forgets the subscription of a replica that did not come back for this long.
const REPLICA_EXPIRY: Duration = Duration::from_secs(600);

#[derive(Debug)]
pub(super) struct Subscriptions {
    pub(super) namespace: String,
    pub(super) services: Vec<String>,
    pub(super) workload: watch::Receiver<Option<Arc<Workload>>>,
    pub(super) app_ready: watch::Receiver<bool>,
    pub(super) buses: Arc<Buses>,
    pub(super) app: App,
    pub(super) aids: Aids,
    /// Told what the application subscribes to in code.
    pub(super) active: Active,
    /// This replica's name: a broadcast has a subscription for each.
    pub(super) instance: String,
    pub(super) drain: Drain,
    /// Reasons to ask the application again.
    pub(super) doubts: Doubts,
    /// What is wrong is found each time that somebody looks.
    pub(super) log: Sparse,
}

type Wanted = BTreeMap<String, SubscriptionSpec>;

struct Running {
    spec: SubscriptionSpec,
    stop: CancellationToken,
}

/// The consumers' tasks.
#[derive(Debug, Default)]
struct Consumers {
    all: TaskTracker,
    /// The newest of each name, which may have ended.
    newest: BTreeMap<String, Newest>,
}

/// A consumer's task.
#[derive(Debug)]
struct Newest {
    bus: String,
    topic: String,
    in_hand: Arc<InHand>,
    task: JoinHandle<()>,
}

/// What came of asking the application.
enum Answered {
    NotAsked,
    Yes(Wanted, Instant),
    /// It is asked again, while what it said before holds.
    No,
}

impl Subscriptions {
    /// Runs until phase one of the drain; returns when what was in flight is finished.
    pub(super) async fn run(mut self) {
        let mut consumers = Consumers::default();
        let mut running: BTreeMap<String, Running> = BTreeMap::new();
        let (mut asked, mut unanswered) = (None, true);
        while !self.drain.inbound.is_cancelled() {
            self.apply(self.wanted(asked.as_ref()), &mut running, &mut consumers);
            let drain = self.drain.inbound.clone();
            let answered = tokio::select! {
                answered = self.answered(unanswered) => answered,
                () = drain.cancelled() => break,
            };
            let mut answered_at = None;
            match answered {
                Answered::Yes(wanted, at) => {
                    (asked, unanswered, answered_at) = (Some(wanted), false, Some(at));
                }
                Answered::No => unanswered = true,
                Answered::NotAsked => {}
            }
            self.apply(self.wanted(asked.as_ref()), &mut running, &mut consumers);
            if let Some(at) = answered_at {
                self.doubts.answered(at);
            }
            if !self.changed(unanswered).await {
                break;
            }
        }
        for running in running.values() {
            running.stop.cancel();
        }
        consumers.all.close();
        tokio::select! {
            () = consumers.all.wait() => {}
            () = self.drain.force.cancelled() => {}
        }
    }

    /// Everything to consume.
    fn wanted(&self, asked: Option<&Wanted>) -> Wanted {
        let mut wanted = asked.cloned().unwrap_or_default();
        let declared = self.declared();
        // A declared one of the same name counts instead.
        let programmatic = wanted.values().filter(|spec| !declared.contains_key(&spec.name));
        self.active.set_programmatic(programmatic.cloned().collect());
        wanted.extend(declared);
        wanted
    }

    /// What the application subscribes to. Asked each time that it comes up, or may have come up unseen: the next version
    /// of it may subscribe to something else. While it is away, what it last said holds.
    async fn answered(&mut self, unanswered: bool) -> Answered {
        let came_up = self.app_ready.has_changed().unwrap_or(false);
        let ready = *self.app_ready.borrow_and_update();
        if !ready || !(unanswered || came_up || self.doubts.any()) {
            return Answered::NotAsked;
        }
        let now = Instant::now();
        self.ask().await.map_or(Answered::No, |wanted| Answered::Yes(wanted, now))
    }

    /// Waits for a reason to look again. `false` at shutdown.
    async fn changed(&mut self, unanswered: bool) -> bool {
        let ready = *self.app_ready.borrow();
        // A clone: the change stays unseen here, for `answered` to see.
        let mut app_ready = self.app_ready.clone();
        tokio::select! {
            () = self.drain.inbound.cancelled() => false,
            changed = self.workload.changed() => changed.is_ok(),
            changed = app_ready.changed() => changed.is_ok(),
            () = tokio::time::sleep(ASK_AGAIN), if ready && unanswered => true,
            () = self.doubts.due(), if ready && !unanswered => true,
        }
    }

    fn apply(
        &self,
        wanted: Wanted,
        running: &mut BTreeMap<String, Running>,
        consumers: &mut Consumers,
    ) {
        running.retain(|name, running| {
            let same = wanted.get(name) == Some(&running.spec);
            if !same {
                running.stop.cancel();
            }
            same
        });
        for (name, spec) in wanted {
            if running.contains_key(&name) {
                continue;
            }
            let stop = CancellationToken::new();
            let own = self.own(spec.clone());
            consumers.start(&own.clone(), |in_hand| {
                let unwanted = (!spec.declared).then(|| stop.clone());
                let (doubts, leaving) = (self.doubts.clone(), self.drain.inbound.clone());
                let ties = Ties { in_hand, doubts, unwanted, leaving };
                let consumption = Consumption::new(
                    own,
                    self.buses.bus(&spec.bus),
                    receiver(spec.clone(), self.app.clone(), self.aids.extensions.clone()),
                    self.app_ready.clone(),
                    (&self.aids, ties),
                );
                consumption.run(stop.clone())
            });
            running.insert(name, Running { spec, stop });
        }
    }

    /// What this replica consumes for a subscription: with broadcast, one of its own.
    fn own(&self, mut spec: SubscriptionSpec) -> SubscriptionSpec {
        if spec.broadcast {
            spec.name = format!("{}@{}", spec.name, self.instance);
            spec.idle_expiry = spec.idle_expiry.or(Some(REPLICA_EXPIRY));
        }
        spec
    }

    /// What the control plane wants.
    fn declared(&self) -> Wanted {
        let workload = self.workload.borrow().clone();
        let subscriptions = workload.iter().flat_map(|workload| &workload.subscriptions);
        let checked = subscriptions.filter_map(|raw| self.check(raw.clone()));
        checked.map(|(name, spec)| (name, SubscriptionSpec { declared: true, ..spec })).collect()
    }

    fn check(&self, raw: proto::Subscription) -> Option<(String, SubscriptionSpec)> {
        let routes = raw.routes.iter().map(|route| route.path.as_str());
        // Without a path, only what matches a route is delivered.
        let main = Some(raw.path.as_str()).filter(|path| !path.is_empty() || raw.routes.is_empty());
        let path = routes.chain(main).try_for_each(|path| match path.parse::<Uri>() {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("path {path:?}: {error}")),
        });
        let spec = SubscriptionSpec::try_from(raw).map_err(|error| error.to_string());
        match path.and(spec) {
            Ok(spec) => Some((spec.name.clone(), spec)),
            Err(error) => {
                self.wrong("invalid", &format!("a subscription cannot be used: {error}"));
                None
            }
        }
    }

    /// What the application wants; `None` when it did not answer.
    async fn ask(&self) -> Option<Wanted> {
        let Some(service) = self.services.first() else {
            return Some(Wanted::new());
        };
        let answer = match tokio::time::timeout(ASK_TIMEOUT, get(&self.app)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(reason)) => {
                tracing::debug!(reason, "GET /dapr/subscribe");
                return None;
            }
            Err(_elapsed) => return None,
        };
        let Some(answer) = answer else {
            return Some(Wanted::new());
        };
        let entries: Vec<&RawValue> = match serde_json::from_slice(&answer) {
            Ok(entries) => entries,
            Err(error) => {
                let text = "the application's answer to GET /dapr/subscribe is not valid";
                self.wrong("invalid", &format!("{text}: {error}"));
                return Some(Wanted::new());
            }
        };
        let read = |entry: &RawValue| match serde_json::from_str(entry.get()) {
            Ok(AnyCase(entry)) => self.programmatic(service, entry),
            Err(error) => {
                let text =
                    "an entry of the application's answer to GET /dapr/subscribe is not valid";
                self.wrong("invalid", &format!("{text}: {error}"));
                None
            }
        };
        if entries.len() > MAX_SUBSCRIPTIONS {
            let text = format!(
                "the application has {} subscriptions; only the first {MAX_SUBSCRIPTIONS} are used",
                entries.len()
            );
            self.wrong("invalid", &text);
        }
        Some(entries.into_iter().take(MAX_SUBSCRIPTIONS).filter_map(read).collect())
    }

    fn programmatic(
        &self,
        service: &str,
        entry: Programmatic,
    ) -> Option<(String, SubscriptionSpec)> {
        let topic = entry.topic.clone();
        match entry.subscription(&self.namespace, service) {
            Ok(raw) => self.check(raw),
            Err(reason) => {
                let text = "a subscription of the application cannot be used";
                self.wrong("unsupported", &format!("{text}: topic {topic:?}: {reason}"));
                None
            }
        }
    }

    fn wrong(&self, kind: &str, text: &str) {
        self.aids.metrics.refused.with_label_values(&[kind]).inc();
        if let Some(left_out) = self.log.pass(text) {
            tracing::error!(left_out, "{text}");
        }
    }
}

impl Consumers {
    /// Starts one. What the one before it has in hand is in hand here as well: the bus hands it out again if the
    /// subscription changed there first, and the application gets it once. Where order is kept, it starts when the one before
    /// it has ended: what follows an event that is in hand is not for here before.
    fn start<T: Future<Output = ()> + Send + 'static>(
        &mut self,
        spec: &SubscriptionSpec,
        consume: impl FnOnce(Arc<InHand>) -> T,
    ) {
        self.newest.retain(|_, newest| !newest.task.is_finished());
        let before = self.newest.remove(&spec.name);
        // On another topic, positions are those of other events.
        let same =
            before.as_ref().filter(|last| (&last.bus, &last.topic) == (&spec.bus, &spec.topic));
        let in_hand = same.map(|last| Arc::clone(&last.in_hand)).unwrap_or_default();
        let task = consume(Arc::clone(&in_hand));
        let before = before.filter(|_| spec.ordered).map(|last| last.task);
        let task = self.all.spawn(async move {
            if let Some(before) = before {
                // One that panicked has ended, too.
                before.await.unwrap_or_default();
            }
            task.await;
        });
        let (bus, topic) = (spec.bus.clone(), spec.topic.clone());
        self.newest.insert(spec.name.clone(), Newest { bus, topic, in_hand, task });
    }
}

fn receiver(spec: SubscriptionSpec, app: App, extensions: Extensions) -> Arc<dyn Receiver> {
    match app.protocol {
        AppProtocol::Grpc => Arc::new(Callback::new(spec, app, extensions)),
        AppProtocol::Auto | AppProtocol::Http1 | AppProtocol::H2c => {
            Arc::new(Post::new(spec, app, extensions))
        }
    }
}

/// The application's answer; `None` when it does not know the path, and so subscribes to nothing.
async fn get(app: &App) -> Result<Option<Bytes>, String> {
    if app.protocol == AppProtocol::Grpc {
        return grpc::ask(app).await.map(Some);
    }
    let mut request = Request::new(Bytes::new());
    *request.uri_mut() = Uri::from_static("/dapr/subscribe");
    let response = app.send(request).await.map_err(|error| error.to_string())?;
    match response.status() {
        StatusCode::OK => {
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
            let body = body.map_err(|error| error.to_string())?.to_bytes();
            Ok(Some(body))
        }
        status if status.is_client_error() => Ok(None),
        status => Err(format!("status {status}")),
    }
}
