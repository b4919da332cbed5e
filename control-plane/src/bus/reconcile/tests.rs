use tempfile::TempDir;

use super::*;
use crate::telemetry::Metrics;

const SUBSCRIPTION: &str = "
{apiVersion: duet.dev/v1alpha1, kind: Subscription, metadata: {name: read, namespace: shop},
 spec: {topic: news, subscriber: {service: web, path: /news}, bus: BUS}}
";
const OTHER_BUS: &str = "{apiVersion: duet.dev/v1alpha1, kind: EventBus, metadata: {name: other}, spec: {backend: {embedded: {}}}}";

/// A control plane's state folder, and what its resources say.
struct State {
    dir: TempDir,
    buses: Arc<Buses>,
    store: Arc<Store>,
}

impl State {
    async fn start(resources: &str) -> (Self, Reconciler) {
        Self::open(TempDir::new().unwrap(), resources).await
    }

    async fn open(dir: TempDir, resources: &str) -> (Self, Reconciler) {
        let store = Arc::new(Store::default());
        let registry = prometheus::Registry::new();
        let metrics = Metrics::register(&registry).unwrap();
        let (path, shared) = (dir.path().to_owned(), Arc::clone(&store));
        let buses = Buses::open(path, registry, &metrics, shared).await;
        let state = Self { dir, buses: Arc::new(buses.unwrap()), store };
        state.say(resources);
        let (buses, store) = (Arc::clone(&state.buses), Arc::clone(&state.store));
        let reconciler = Reconciler::start(buses, store).await;
        (state, reconciler)
    }

    /// Stops and starts with these resources.
    async fn restart(self, resources: &str) -> (Self, Reconciler) {
        self.buses.close().await;
        Self::open(self.dir, resources).await
    }

    fn say(&self, resources: &str) {
        let parsed = duet_api::resource::parse("a.yaml", resources);
        assert_eq!(parsed.errors, []);
        let resources = parsed.resources.into_iter();
        let resources = resources.map(|located| (located.resource.key(), Arc::new(located)));
        self.store.replace_resources(&resources.collect());
    }

    async fn subscriptions(&self, bus: &str) -> Vec<String> {
        let found = self.buses.get(bus).await.unwrap().subscriptions().await.unwrap();
        found.into_iter().map(|subscription| subscription.name).collect()
    }
}

fn on(bus: &str) -> String {
    SUBSCRIPTION.replace("BUS", bus)
}

fn after_grace() -> Instant {
    Instant::now() + UNDECLARED_GRACE
}

#[tokio::test]
async fn a_subscription_whose_resource_went_while_nobody_looked_is_forgotten_after_the_grace() {
    let (state, reconciler) = State::start(&on("default")).await;
    drop(reconciler);
    let (state, mut reconciler) = state.restart("").await;
    reconciler.forget_undeclared(Instant::now()).await;
    assert_eq!(state.subscriptions("default").await, ["shop/read"], "not at once");
    reconciler.forget_undeclared(after_grace()).await;
    assert_eq!(state.subscriptions("default").await, [""; 0]);
}

#[tokio::test]
async fn nothing_is_forgotten_while_a_file_has_errors() {
    let (state, reconciler) = State::start(&on("default")).await;
    drop(reconciler);
    let (state, mut reconciler) = state.restart("").await;
    state.store.set_incomplete(true);
    reconciler.forget_undeclared(after_grace()).await;
    assert_eq!(state.subscriptions("default").await, ["shop/read"]);
    // From then on the time counts anew.
    state.store.set_incomplete(false);
    reconciler.forget_undeclared(after_grace()).await;
    assert_eq!(state.subscriptions("default").await, ["shop/read"]);
    reconciler.forget_undeclared(after_grace() + UNDECLARED_GRACE).await;
    assert!(state.subscriptions("default").await.is_empty());
}

#[tokio::test]
async fn one_that_is_declared_again_in_time_stays() {
    let (state, reconciler) = State::start(&on("default")).await;
    drop(reconciler);
    let (state, mut reconciler) = state.restart("").await;
    state.say(&on("default"));
    reconciler.look().await;
    reconciler.forget_undeclared(after_grace()).await;
    assert_eq!(state.subscriptions("default").await, ["shop/read"]);
}

#[tokio::test]
async fn one_that_no_resource_ever_declared_stays() {
    let (state, mut reconciler) = State::start("").await;
    let bus = state.buses.get("default").await.unwrap();
    let spec = SubscriptionSpec::new("shop/own", "default", "news").unwrap();
    drop(bus.consume(spec).await.unwrap());
    drop(bus);
    reconciler.forget_undeclared(after_grace()).await;
    drop(reconciler);
    let (state, mut reconciler) = state.restart("").await;
    reconciler.forget_undeclared(after_grace()).await;
    assert_eq!(state.subscriptions("default").await, ["shop/own"]);
}

#[tokio::test]
async fn a_subscription_that_changes_its_bus_leaves_the_old_one() {
    let both = |bus: &str| format!("{OTHER_BUS}\n---\n{}", on(bus));
    let (state, mut reconciler) = State::start(&both("default")).await;
    state.say(&both("other"));
    reconciler.look().await;
    assert_eq!(state.subscriptions("other").await, ["shop/read"]);
    assert_eq!(state.subscriptions("default").await, ["shop/read"], "for ten minutes");
    reconciler.forget_undeclared(after_grace()).await;
    assert_eq!(state.subscriptions("default").await, [""; 0]);
    // The same while no control plane runs.
    drop(reconciler);
    let (state, mut reconciler) = state.restart(&both("default")).await;
    reconciler.forget_undeclared(after_grace()).await;
    assert_eq!(state.subscriptions("default").await, ["shop/read"]);
    assert_eq!(state.subscriptions("other").await, [""; 0]);
}

/// Nobody listens there.
#[tokio::test]
async fn one_that_changed_its_bus_while_nobody_looked_is_followed_on_the_new_one() {
    let with = |bus: &str| format!("{OTHER_BUS}\n---\n{}", on(bus));
    let (state, reconciler) = State::start(&with("other")).await;
    drop(reconciler);
    let (state, mut reconciler) = state.restart(&with("default")).await;
    state.say(OTHER_BUS);
    reconciler.look().await;
    reconciler.forget_undeclared(after_grace()).await;
    for bus in ["default", "other"] {
        assert_eq!(state.subscriptions(bus).await, [""; 0], "{bus}");
    }
}

fn on_no_cluster() -> String {
    OTHER_BUS.replace("embedded: {}", "nats: {servers: ['nats://127.0.0.1:1']}")
}

#[tokio::test]
async fn a_bus_stays_embedded_while_its_cluster_does_not_answer() {
    let both = |bus: &str| format!("{bus}\n---\n{}", on("other"));
    let (state, mut reconciler) = State::start(&both(OTHER_BUS)).await;
    let bus = state.buses.get("other").await.unwrap();
    state.say(&both(&on_no_cluster()));
    reconciler.look().await;
    assert!(!reconciler.settled, "it tries again");
    let why = state.buses.not_moved("other").unwrap();
    assert!(why.contains("the NATS cluster is away"), "{why}");
    assert!(Arc::ptr_eq(&bus, &state.buses.get("other").await.unwrap()), "it works as it did");
    assert_eq!(state.buses.holds_back("other", "orders"), None);
    assert_eq!(state.subscriptions("other").await, ["shop/read"]);
    state.say(&both(OTHER_BUS));
    reconciler.look().await;
    assert!(reconciler.settled && state.buses.not_moved("other").is_none());
}

#[tokio::test]
async fn a_backend_that_waits_for_a_restart_is_noticed_until_it_is_changed_back() {
    let (state, mut reconciler) = State::start(&on_no_cluster()).await;
    assert_eq!(state.buses.not_moved("other"), None);
    state.say(OTHER_BUS);
    reconciler.look().await;
    assert!(state.buses.not_moved("other").unwrap().contains("restarted"));
    assert_eq!(state.buses.not_moved("default"), None);
    state.say(&on_no_cluster());
    reconciler.look().await;
    assert_eq!(state.buses.not_moved("other"), None);
}

#[tokio::test]
async fn a_topic_whose_resource_went_gets_the_defaults_after_the_grace() {
    let topic = "{apiVersion: duet.dev/v1alpha1, kind: Topic, metadata: {name: news}, spec: {retention: {age: 1h}}}";
    let declared = async |state: &State| {
        let topics = state.buses.get("default").await.unwrap().topics().await.unwrap();
        topics.iter().find(|topic| topic.name == "news").unwrap().declared
    };
    let (state, mut reconciler) = State::start(topic).await;
    state.say("");
    reconciler.look().await;
    assert!(declared(&state).await, "for ten minutes");
    drop(reconciler);
    // The time begins anew: nobody knows how long nobody looked.
    let (state, mut reconciler) = state.restart("").await;
    assert!(declared(&state).await);
    reconciler.forget_undeclared(after_grace()).await;
    assert!(!declared(&state).await);
}

#[tokio::test]
async fn a_bus_that_opens_slowly_holds_up_no_other() {
    // It takes connections, and says nothing. By its name it is the first.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = silent.local_addr().unwrap();
    let slow = OTHER_BUS.replace("other", "a-slow");
    let slow = slow.replace("embedded: {}", &format!("nats: {{servers: ['nats://{server}']}}"));
    let (state, mut reconciler) = State::start("").await;
    state.say(&format!("{slow}\n---\n{OTHER_BUS}\n---\n{}", on("other")));
    let declared = async {
        let bus = state.buses.get("other").await.unwrap();
        while bus.subscriptions().await.unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        assert_eq!(state.buses.opening("a-slow"), None, "it is still being opened");
    };
    tokio::select! {
        biased;
        () = declared => {}
        () = reconciler.look() => panic!("it was to be slow"),
    }
}
