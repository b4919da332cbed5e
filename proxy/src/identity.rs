//! Who this sidecar is: gets a certificate on first contact, keeps it on disk, renews it at half its life, and
//! hands it to everybody who needs it through a `watch`.
//!
//! Imports nothing but `error`, `drain`, `net` and lower. The private key never leaves this process but for the
//! state folder, where it lies in a file of mode 0600.

mod store;
pub mod uplink;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use duet_api::proto::identity_client::IdentityClient;
use duet_api::proto::{CertifyRequest, CertifyResponse};
use duet_api::tls::{TlsMaterial, first_contact_config};
use duet_api::token::JoinClaims;
use prometheus::{IntCounterVec, IntGauge, Opts, Registry};
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

pub use store::Store;

/// A certificate with its end.
#[derive(Debug)]
pub struct Svid {
    /// For TLS.
    pub material: TlsMaterial,
    /// Seconds since the Unix epoch.
    pub not_before: i64,
    /// Seconds since the Unix epoch.
    pub not_after: i64,
}

/// The current certificate; `None` until first contact.
pub type SvidWatch = watch::Receiver<Option<Arc<Svid>>>;

const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// What it takes to get and keep an identity.
#[derive(Debug)]
pub struct Identity {
    control_plane: String,
    token: Option<String>,
    store: Store,
    current: watch::Sender<Option<Arc<Svid>>>,
    metrics: Metrics,
}

#[derive(Debug)]
struct Metrics {
    expiry: IntGauge,
    requests: IntCounterVec,
}

impl Identity {
    /// Loads what the state folder has. A stored certificate that is expired, or not what the token would give
    /// (another name, another CA), is not used.
    ///
    /// # Errors
    /// When the folder cannot be used, the token cannot be read, or there is neither certificate nor token.
    pub fn load(
        control_plane: &str,
        token: Option<String>,
        store: Store,
        registry: &Registry,
    ) -> anyhow::Result<(Self, SvidWatch)> {
        let claims = token.as_deref().map(JoinClaims::read_unverified).transpose();
        let claims = claims.context("join token")?;
        let stored = store.load().filter(|svid| {
            claims.as_ref().is_none_or(|claims| store::fits(svid, claims))
                && svid.not_after > jiff::Timestamp::now().as_second()
        });
        if stored.is_none() && token.is_none() {
            bail!(
                "no join token was given (--token-file) and {} holds no valid certificate; \
                 make a token with `duet token create`",
                store.folder().display()
            );
        }
        let metrics = Metrics::register(registry)?;
        if let Some(svid) = &stored {
            metrics.expiry.set(svid.not_after);
            tracing::info!(id = %svid.material.id, "using the stored certificate");
        }
        let (current, receiver) = watch::channel(stored.map(Arc::new));
        let control_plane = control_plane.to_owned();
        Ok((Self { control_plane, token, store, current, metrics }, receiver))
    }

    /// Gets the first certificate where there is none, then renews it for ever. `channel` is the mTLS channel
    /// that uses the certificate itself.
    pub async fn run(self, channel: Channel, stop: CancellationToken) {
        let mut backoff = FIRST_BACKOFF;
        loop {
            let wait = self.until_renewal();
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stop.cancelled() => return,
            }
            let attempt =
                tokio::time::timeout(CALL_TIMEOUT, Box::pin(self.certify(channel.clone()))).await;
            let outcome = attempt.unwrap_or_else(|_elapsed| bail_timeout());
            match outcome {
                Ok(svid) => {
                    backoff = FIRST_BACKOFF;
                    self.metrics.requests.with_label_values(&["issued"]).inc();
                    self.publish(svid);
                }
                Err(error) => {
                    self.metrics.requests.with_label_values(&["failed"]).inc();
                    tracing::warn!(
                        error = format!("{error:#}"),
                        "no certificate from {}",
                        self.control_plane
                    );
                    let jittered = backoff.mul_f64(0.5 + rand::random::<f64>() / 2.0);
                    tokio::select! {
                        () = tokio::time::sleep(jittered) => {}
                        () = stop.cancelled() => return,
                    }
                    backoff = (backoff * 2).min(LONGEST_BACKOFF);
                }
            }
        }
    }

    fn publish(&self, svid: Svid) {
        tracing::info!(id = %svid.material.id, not_after = svid.not_after, "certificate issued");
        if let Err(error) = self.store.save(&svid) {
            tracing::warn!(error = format!("{error:#}"), "the certificate cannot be stored");
        }
        self.metrics.expiry.set(svid.not_after);
        self.current.send_replace(Some(Arc::new(svid)));
    }

    /// Half of the certificate's life, less up to a tenth, so that a fleet does not renew at once.
    fn until_renewal(&self) -> Duration {
        let current = self.current.borrow();
        let Some(svid) = current.as_ref() else {
            return Duration::ZERO;
        };
        let life = u64::try_from(svid.not_after - svid.not_before).unwrap_or(0);
        let age = jiff::Timestamp::now().as_second() - svid.not_before;
        let age = u64::try_from(age).unwrap_or(0);
        let due = Duration::from_secs(life).mul_f64(0.5 - rand::random::<f64>() / 20.0);
        due.saturating_sub(Duration::from_secs(age))
    }

    /// One round: by certificate while there is a valid one, else by token.
    async fn certify(&self, channel: Channel) -> anyhow::Result<Svid> {
        let key = KeyPair::generate().context("generating a key")?;
        let params = CertificateParams::default();
        let csr = params.serialize_request(&key).context("making the request")?;
        let now = jiff::Timestamp::now().as_second();
        let valid = self.current.borrow().as_ref().is_some_and(|svid| svid.not_after > now);
        let (channel, token) = if valid {
            (channel, String::new())
        } else {
            let token =
                self.token.clone().context("the certificate expired and there is no join token")?;
            let hash = JoinClaims::read_unverified(&token)?.ca_hash()?;
            let channel = uplink::connect_once(&self.control_plane, first_contact_config(hash)?);
            (channel.await?, token)
        };
        let request = CertifyRequest { csr: csr.der().to_vec(), token };
        let mut client = IdentityClient::new(channel);
        let response = client
            .certify(request)
            .await
            .map_err(|status| anyhow::anyhow!("{}: {}", status.code(), uplink::message(&status)))?;
        accept(response.into_inner(), &key)
    }
}

fn bail_timeout() -> anyhow::Result<Svid> {
    bail!("no answer within {} s", CALL_TIMEOUT.as_secs())
}

fn accept(response: CertifyResponse, key: &KeyPair) -> anyhow::Result<Svid> {
    let chain: Vec<CertificateDer<'static>> = response.chain.into_iter().map(Into::into).collect();
    let leaf = chain.first().context("the control plane sent an empty chain")?;
    let id =
        duet_api::tls::spiffe_id(leaf).context("the control plane sent a wrong certificate")?;
    if id.to_string() != response.spiffe_id {
        bail!("the certificate names {id}, the answer {}", response.spiffe_id);
    }
    let (not_before, not_after) = store::validity(leaf)?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let roots = response.trust_bundle.into_iter().map(Into::into).collect();
    let material = TlsMaterial { chain, key, roots, id };
    // Fails when key, certificate and bundle do not belong together.
    duet_api::tls::server_config(&material, false).context("the certificate cannot be used")?;
    Ok(Svid { material, not_before, not_after })
}

/// How long a certificate is still valid; not at all, where that cannot be read.
#[must_use]
pub fn remaining(certificate: &CertificateDer<'_>) -> Duration {
    let until = store::validity(certificate).map_or(0, |(_from, until)| until);
    let left = until.saturating_sub(jiff::Timestamp::now().as_second());
    Duration::from_secs(u64::try_from(left).unwrap_or(0))
}

impl Metrics {
    fn register(registry: &Registry) -> prometheus::Result<Self> {
        let expiry = IntGauge::new(
            "duet_identity_certificate_expiry_timestamp_seconds",
            "When this sidecar's certificate ends, seconds since the Unix epoch.",
        )?;
        let requests = IntCounterVec::new(
            Opts::new("duet_identity_requests_total", "Requests for a certificate, by outcome."),
            &["outcome"],
        )?;
        registry.register(Box::new(expiry.clone()))?;
        registry.register(Box::new(requests.clone()))?;
        Ok(Self { expiry, requests })
    }
}
