//! Opens a bus by its backend. Imports [`crate::compile`] and [`super::Buses`].

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use duet_api::resource::{BusBackend, NatsBackend, NatsTls as TlsFiles};
use duet_events::bus::ManagedBus;
use duet_events::embedded::EmbeddedBus;
use duet_events::log::LogOptions;
use duet_events::nats::{NatsBus, NatsLogin, NatsOptions, NatsTls};

use super::{BusError, Buses};
use crate::compile;

/// How long opening a bus waits for its cluster. Usually that is there, and then nothing starts by failing.
const CONNECT: Duration = Duration::from_secs(3);

impl Buses {
    /// A bus as its resource says. What it is kept on is decided once; another backend counts from the next start on.
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
        self.backends.write().insert(name.to_owned(), backend);
        Ok(bus)
    }

    /// Says so, once, where a resource has an open bus on something else now: events that are on the old one have to be
    /// handled or moved first, which nobody but an operator can decide.
    pub(super) fn notice_backend(&self, name: &str) {
        let wanted = self.store.read(|view| compile::bus_backend(view.index, name));
        let differs = self.backends.read().get(name).is_some_and(|open| *open != wanted);
        let mut outdated = self.outdated.write();
        if !differs {
            outdated.remove(name);
        } else if outdated.insert(name.to_owned()) {
            tracing::error!(
                bus = name,
                "spec.backend changed; the bus stays on what it was opened with until the control plane restarts"
            );
        }
    }

    /// Whether a bus has another backend from the next start on.
    #[must_use]
    pub fn needs_restart(&self, name: &str) -> bool {
        self.outdated.read().contains(name)
    }

    async fn make_nats(&self, name: &str, nats: Box<NatsBackend>) -> Result<NatsBus, BusError> {
        let error = |reason: String| BusError::Nats { name: name.to_owned(), reason };
        let options = options(&nats).map_err(error)?;
        let bus = NatsBus::open(name, options, &self.registry).await;
        let bus = bus.map_err(|source| error(source.to_string()))?;
        if let Err(away) = bus.connected(CONNECT).await {
            tracing::warn!(bus = name, "{away}; going on without it");
        }
        warn_of_lost_events(name, *nats);
        self.moves.look(name, &self.dir.join(name)).await?;
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
        (Some(file), None, None) => Ok(NatsLogin::Credentials(read("credentialsFile", file)?)),
        (None, Some(file), None) => {
            Ok(NatsLogin::Token(read("tokenFile", file)?.trim().to_owned()))
        }
        (None, None, Some(file)) => match read("userFile", file)?.trim().split_once(':') {
            Some((user, password)) => Ok(NatsLogin::User(user.to_owned(), password.to_owned())),
            None => Err(format!("userFile: {file} does not hold user:password")),
        },
        _ => Err("credentialsFile, tokenFile and userFile: only one can be given".to_owned()),
    }
}

fn tls(files: &TlsFiles) -> Result<NatsTls, String> {
    let there = |field: &str, file: &String| read(field, file).map(|_text| PathBuf::from(file));
    let client = match (&files.cert_file, &files.key_file) {
        (Some(cert), Some(key)) => Some((there("tls.certFile", cert)?, there("tls.keyFile", key)?)),
        (None, None) => None,
        _ => return Err("tls: certFile and keyFile go together".to_owned()),
    };
    let ca_file = files.ca_file.as_ref().map(|file| there("tls.caFile", file)).transpose()?;
    Ok(NatsTls { ca_file, client })
}

fn read(field: &str, file: &str) -> Result<String, String> {
    std::fs::read_to_string(file).map_err(|error| format!("{field}: {file}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nats(extra: &str) -> NatsBackend {
        serde_json::from_str(&format!(r#"{{"servers": ["nats://a:1"] {extra}}}"#)).unwrap()
    }

    #[test]
    fn files_are_read_and_bad_ones_named() {
        let dir = tempfile::TempDir::new().unwrap();
        let file = dir.path().join("user");
        std::fs::write(&file, "ann:secret\n").unwrap();
        let field = format!(r#", "userFile": {file:?}"#);
        let login = options(&nats(&field)).unwrap().login;
        assert!(matches!(login, NatsLogin::User(user, word) if user == "ann" && word == "secret"));
        for (extra, part) in [
            (r#", "tokenFile": "/no/such""#, "tokenFile: /no/such"),
            (r#", "tls": {"certFile": "/a"}"#, "certFile and keyFile"),
            (r#", "tls": {"caFile": "/no/such"}"#, "tls.caFile"),
            (r#", "tokenFile": "/a", "userFile": "/b""#, "only one"),
        ] {
            let error = options(&nats(extra)).unwrap_err();
            assert!(error.contains(part), "{extra}: {error}");
        }
    }
}
