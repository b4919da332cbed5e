//! Opens a bus by its backend. Imports [`crate::compile`] and [`super::Buses`].

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use duet_api::resource::{BusBackend, NatsBackend, NatsTls as TlsFiles};
use duet_events::bus::ManagedBus;
use duet_events::embedded::EmbeddedBus;
use duet_events::log::LogOptions;
use duet_events::nats::{NatsBus, NatsLogin, NatsOptions, NatsTls};

use super::{BusError, Buses};
use crate::compile;

/// How long opening a bus waits for its cluster. Usually that is there, and then nothing starts by failing.
const CONNECT: Duration = Duration::from_secs(3);
/// Between two tries to move to a cluster that cannot be used.
const TRY_AGAIN: Duration = Duration::from_secs(10);
/// How long a bus that moves waits for its subscribers, and how often it looks.
const SETTLE_DOWN: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(50);

/// Why a bus is not where its resource has it, and when that was tried.
#[derive(Clone, Debug)]
pub(super) struct NotMoved {
    why: String,
    /// None: nothing is tried before a restart.
    tried: Option<Instant>,
}

impl Buses {
    /// A bus as its resource says. [`Self::follow_backend`] tells what becomes of a later change.
    pub(super) async fn make(&self, name: &str) -> Result<Arc<dyn ManagedBus>, BusError> {
        let backend = self.store.read(|view| compile::bus_backend(view.index, name));
        let bus: Arc<dyn ManagedBus> = match backend.clone() {
            BusBackend::Embedded(_) => {
                let dir = self.dir.join(name);
                let bus = EmbeddedBus::open(name, &dir, LogOptions::default(), &self.registry);
                let bus = bus.await;
                Arc::new(bus.map_err(|source| BusError::Open { name: name.to_owned(), source })?)
            }
            BusBackend::Nats(nats) => Arc::new(self.make_nats(name, nats).await?),
        };
        let number = self.openings.fetch_add(1, Ordering::Relaxed);
        self.backends.write().insert(name.to_owned(), (backend, number));
        Ok(bus)
    }

    /// Number of the last opening of a bus; another one means that it may be kept on something else since.
    pub(super) fn opening(&self, name: &str) -> Option<u64> {
        self.backends.read().get(name).map(|(_backend, number)| *number)
    }

    /// Brings an open bus to what its resource has it on now. An embedded one goes to its cluster at once: what is in its
    /// log holds publishes back until it is moved. Every other change waits for a restart: only an operator can know that
    /// nothing is left where it was.
    ///
    /// Returns whether it is there, or waits for that restart.
    ///
    /// # Errors
    /// When the cluster cannot be used, each time that it was tried: the bus goes on as it is, if that was known before.
    pub(super) async fn follow_backend(&self, name: &str) -> Result<bool, BusError> {
        let wanted = self.store.read(|view| compile::bus_backend(view.index, name));
        let now = self.backends.read().get(name).map(|(backend, _number)| backend.clone());
        if now.as_ref().is_none_or(|now| *now == wanted) {
            self.not_moved.write().remove(name);
            return Ok(true);
        }
        if let (Some(BusBackend::Embedded(_)), BusBackend::Nats(nats)) = (now, wanted) {
            let tried = self.not_moved.read().get(name).and_then(|not| not.tried);
            if tried.is_some_and(|tried| tried.elapsed() < TRY_AGAIN) {
                return Ok(false);
            }
            let moved = self.move_to_cluster(name, &nats).await;
            match &moved {
                Ok(()) => drop(self.not_moved.write().remove(name)),
                Err(error) => {
                    let not = NotMoved { why: error.to_string(), tried: Some(Instant::now()) };
                    self.not_moved.write().insert(name.to_owned(), not);
                }
            }
            return moved.map(|()| true);
        }
        let why = "it counts when the control plane is restarted".to_owned();
        let not = NotMoved { why, tried: None };
        if self.not_moved.write().insert(name.to_owned(), not.clone()).is_none() {
            tracing::error!(bus = name, "spec.backend changed; {}", not.why);
        }
        Ok(true)
    }

    /// Why a bus is not where its resource has it.
    #[must_use]
    pub fn not_moved(&self, name: &str) -> Option<String> {
        self.not_moved.read().get(name).map(|not| not.why.clone())
    }

    /// Closes the embedded bus and opens the one on the cluster. Publishes to it wait from here on, until
    /// [`Self::hold_back`] says that every subscription is there.
    async fn move_to_cluster(&self, name: &str, nats: &NatsBackend) -> Result<(), BusError> {
        let error = |reason: String| BusError::Nats { name: name.to_owned(), reason };
        self.place_is_free(name)?;
        let options = options(nats).map_err(error)?;
        // Before anything is given up.
        let reached = NatsBus::reach(&options, CONNECT).await;
        let away = |source| error(format!("servers: {}: {source}", nats.servers.join(", ")));
        reached.map_err(away)?;
        tracing::warn!(bus = name, "the bus moves from its embedded log to NATS");
        self.moving.write().insert(name.to_owned());
        self.settle_down(name).await?;
        let place = self.place(name);
        let mut place = place.lock().await;
        if let Some(old) = place.take() {
            old.close().await;
        }
        self.backends.write().remove(name);
        // If this fails, whoever needs the bus tries again.
        let bus = Box::pin(self.make(name)).await?;
        *place = Some(bus);
        Ok(())
    }

    /// Lets subscribers that keep up handle what they have, so that nothing is left to migrate.
    async fn settle_down(&self, name: &str) -> Result<(), BusError> {
        let bus = self.get(name).await?;
        let handled = async {
            while let Ok(subscriptions) = bus.subscriptions().await
                && subscriptions.iter().any(|subscription| subscription.lag > 0)
            {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(SETTLE_DOWN, handled).await.unwrap_or_default();
        Ok(())
    }

    fn place_is_free(&self, name: &str) -> Result<(), BusError> {
        match self.store.read(|view| compile::cluster_taken(view.index, name)) {
            None => Ok(()),
            Some(why) => {
                Err(BusError::Nats { name: name.to_owned(), reason: format!("servers: {why}") })
            }
        }
    }

    async fn make_nats(&self, name: &str, nats: Box<NatsBackend>) -> Result<NatsBus, BusError> {
        let error = |reason: String| BusError::Nats { name: name.to_owned(), reason };
        self.place_is_free(name)?;
        let options = options(&nats).map_err(error)?;
        let bus = NatsBus::open(name, options, &self.registry).await;
        let bus = bus.map_err(|source| error(source.to_string()))?;
        if let Err(away) = bus.connected(CONNECT).await {
            tracing::warn!(bus = name, "{away}; going on without it");
        }
        warn_of_lost_events(name, *nats);
        match self.moves.look(name, &self.dir.join(name)).await {
            // Its subscriptions have to be made first.
            Ok(true) => drop(self.moving.write().insert(name.to_owned())),
            Ok(false) => {}
            Err(error) => {
                bus.close().await;
                return Err(error);
            }
        }
        Ok(bus)
    }
}

/// Says it in the log, once for each start; nothing waits for it.
fn warn_of_lost_events(name: &str, nats: NatsBackend) {
    let name = name.to_owned();
    drop(tokio::task::spawn_blocking(move || {
        for warning in super::monitor::durability(&nats) {
            tracing::warn!(bus = name, "{warning}");
        }
    }));
}

fn options(nats: &NatsBackend) -> Result<NatsOptions, String> {
    Ok(NatsOptions {
        servers: nats.servers.clone(),
        replicas: nats.replicas.into(),
        stream_prefix: nats.stream_prefix.clone(),
        login: login(nats)?,
        tls: nats.tls.as_ref().map(tls).transpose()?,
    })
}

fn login(nats: &NatsBackend) -> Result<NatsLogin, String> {
    match (&nats.credentials_file, &nats.token_file, &nats.user_file) {
        (None, None, None) => Ok(NatsLogin::None),
        (Some(file), None, None) => Ok(NatsLogin::Credentials(file.into())),
        (None, Some(file), None) => Ok(NatsLogin::Token(file.into())),
        (None, None, Some(file)) => Ok(NatsLogin::User(file.into())),
        _ => Err("credentialsFile, tokenFile and userFile: only one can be given".to_owned()),
    }
}

fn tls(files: &TlsFiles) -> Result<NatsTls, String> {
    let there = |field: &str, file: &String| match std::fs::File::open(file) {
        Ok(_readable) => Ok(PathBuf::from(file)),
        Err(error) => Err(format!("{field}: {file}: {error}")),
    };
    let client = match (&files.cert_file, &files.key_file) {
        (Some(cert), Some(key)) => Some((there("tls.certFile", cert)?, there("tls.keyFile", key)?)),
        (None, None) => None,
        _ => return Err("tls: certFile and keyFile go together".to_owned()),
    };
    let ca_file = files.ca_file.as_ref().map(|file| there("tls.caFile", file)).transpose()?;
    Ok(NatsTls { ca_file, client })
}

#[cfg(test)]
mod tests {
    use duet_api::DEFAULT_BUS;
    use duet_events::log::LogError;
    use tempfile::TempDir;

    use super::*;
    use crate::store::Store;
    use crate::telemetry::Metrics;

    #[tokio::test]
    async fn a_default_bus_that_cannot_be_opened_is_tried_again_and_one_in_use_is_not() {
        let dir = TempDir::new().unwrap();
        let open = || async {
            let registry = prometheus::Registry::new();
            let metrics = Metrics::register(&registry).unwrap();
            let (path, store) = (dir.path().to_owned(), Arc::new(Store::default()));
            (Buses::open(path, registry, &metrics, store).await, metrics)
        };
        let file = dir.path().join(DEFAULT_BUS).join("log.redb");
        std::fs::create_dir(dir.path().join(DEFAULT_BUS)).unwrap();
        std::fs::write(&file, "damaged").unwrap();
        let (buses, metrics) = open().await;
        let (buses, is_open) =
            (buses.unwrap(), metrics.open_buses.with_label_values(&[DEFAULT_BUS]));
        assert!(matches!(buses.get(DEFAULT_BUS).await, Err(BusError::Open { .. })));
        assert_eq!(is_open.get(), 0);
        std::fs::remove_file(file).unwrap();
        buses.get(DEFAULT_BUS).await.unwrap();
        assert_eq!(is_open.get(), 1);
        let (taken, _) = open().await;
        let error = taken.unwrap_err();
        assert!(matches!(error, BusError::Open { source: LogError::InUse, .. }), "{error}");
    }

    #[tokio::test]
    async fn a_bus_that_opens_slowly_holds_up_no_other() {
        // It takes connections, and says nothing.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = silent.local_addr().unwrap();
        let bus = |name, backend: &str| {
            format!(
                "{{apiVersion: duet.dev/v1alpha1, kind: EventBus, metadata: {{name: {name}}}, \
                 spec: {{backend: {backend}}}}}"
            )
        };
        let slow = bus("slow", &format!("{{nats: {{servers: ['nats://{server}']}}}}"));
        let resources = format!("{slow}\n---\n{}", bus("quick", "{embedded: {}}"));
        let parsed = duet_api::resource::parse("a.yaml", &resources);
        assert_eq!(parsed.errors, []);
        let resources = parsed.resources.into_iter();
        let resources = resources.map(|located| (located.resource.key(), Arc::new(located)));
        let store = Arc::new(Store::default());
        store.replace_resources(&resources.collect());
        let dir = TempDir::new().unwrap();
        let registry = prometheus::Registry::new();
        let metrics = Metrics::register(&registry).unwrap();
        let buses = Buses::open(dir.path().to_owned(), registry, &metrics, store).await.unwrap();
        let slow = async {
            drop(buses.get("slow").await.unwrap());
            panic!("it was to be slow");
        };
        let quick = async {
            let _connection = silent.accept().await.unwrap();
            buses.get("quick").await.unwrap();
        };
        tokio::select! {
            () = slow => {}
            () = quick => {}
        }
        buses.close().await;
    }

    fn nats(extra: &str) -> NatsBackend {
        serde_json::from_str(&format!(r#"{{"servers": ["nats://a:1"] {extra}}}"#)).unwrap()
    }

    #[test]
    fn bad_fields_are_named() {
        let login = options(&nats(r#", "userFile": "/etc/user""#)).unwrap().login;
        assert_eq!(login, NatsLogin::User("/etc/user".into()));
        for (extra, part) in [
            (r#", "tls": {"certFile": "/a"}"#, "certFile and keyFile"),
            (r#", "tls": {"caFile": "/no/such"}"#, "tls.caFile"),
            (r#", "tokenFile": "/a", "userFile": "/b""#, "only one"),
        ] {
            let error = options(&nats(extra)).unwrap_err();
            assert!(error.contains(part), "{extra}: {error}");
        }
    }
}
