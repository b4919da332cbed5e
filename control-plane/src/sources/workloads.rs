//! `duet.v1.Workloads`: replicas that register themselves. A stream that its client closes ends the registration at
//! once; one that breaks leaves it until its lease ends, since the replica may well be alive and on its way back.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use duet_api::proto;
use duet_api::proto::workloads_server::Workloads;
use duet_api::spiffe::SpiffeId;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use super::registry::{Owner, Registry};
use crate::compile::access;
use crate::index::{Replica, ReplicaPort, ServiceKey};
use crate::listen;
use crate::store::Store;
use crate::telemetry::Metrics;

const SERVICE: &str = "workloads";
/// Services, and ports, of one replica.
const MAX_ITEMS: usize = 64;
/// Length of a name.
const MAX_NAME_BYTES: usize = 253;

/// The service.
#[derive(Debug)]
pub struct WorkloadsService {
    /// Where registrations go.
    pub registry: Arc<Registry>,
    /// Who may serve what.
    pub store: Arc<Store>,
    /// Counts refusals.
    pub metrics: Metrics,
    /// Runs the streams.
    pub tracker: TaskTracker,
    /// Ends the streams.
    pub stop: CancellationToken,
    owners: AtomicU64,
}

impl WorkloadsService {
    /// The service on a registry.
    #[must_use]
    pub fn new(
        registry: Arc<Registry>,
        store: Arc<Store>,
        metrics: Metrics,
        tracker: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        Self { registry, store, metrics, tracker, stop, owners: AtomicU64::new(1) }
    }
}

type Answers = mpsc::Sender<Result<proto::RegisterResponse, Status>>;

#[tonic::async_trait]
impl Workloads for WorkloadsService {
    type RegisterStream = ReceiverStream<Result<proto::RegisterResponse, Status>>;

    async fn register(
        &self,
        request: Request<Streaming<proto::RegisterRequest>>,
    ) -> Result<Response<Self::RegisterStream>, Status> {
        let who = listen::identity(&request, SERVICE, &self.metrics)?;
        let (answers, stream) = mpsc::channel(4);
        let session = Session {
            who,
            owner: self.owners.fetch_add(1, Ordering::Relaxed),
            registry: Arc::clone(&self.registry),
            store: Arc::clone(&self.store),
            metrics: self.metrics.clone(),
            registered: None,
        };
        let run = session.run(request.into_inner(), answers, self.stop.clone());
        self.tracker.spawn(run);
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

struct Session {
    who: SpiffeId,
    owner: Owner,
    registry: Arc<Registry>,
    store: Arc<Store>,
    metrics: Metrics,
    registered: Option<Replica>,
}

impl Session {
    async fn run(
        mut self,
        mut requests: Streaming<proto::RegisterRequest>,
        answers: Answers,
        stop: CancellationToken,
    ) {
        let gone = loop {
            let message = tokio::select! {
                // A stream that ends because this process does is no news of the replica.
                biased;
                () = stop.cancelled() => {
                    // Nobody reads it if the connection is gone too.
                    drop(answers.try_send(Err(Status::unavailable("the control plane is stopping"))));
                    break false;
                }
                message = requests.message() => message,
            };
            match message {
                Ok(Some(request)) => match self.take(request) {
                    Ok(()) => {
                        let lease = prost_types::Duration::try_from(self.registry.lease()).ok();
                        // A client that does not read its answers renews all the same.
                        drop(answers.try_send(Ok(proto::RegisterResponse { lease })));
                    }
                    Err(status) => {
                        tracing::warn!(peer = %self.who, "registration refused: {}", status.message());
                        drop(answers.try_send(Err(status)));
                        break true;
                    }
                },
                Ok(None) => break true,
                Err(status) => {
                    tracing::info!(peer = %self.who, "registration stream broke: {}", status.message());
                    break false;
                }
            }
        };
        if let Some(replica) = self.registered.filter(|_| gone) {
            self.registry.release(self.owner, &replica.key());
        }
    }

    fn take(&mut self, request: proto::RegisterRequest) -> Result<(), Status> {
        let replica = match request.registration {
            Some(registration) => self.replica(registration)?,
            None => self.registered.clone().ok_or_else(|| {
                self.refuse(Status::invalid_argument("nothing is registered yet"))
            })?,
        };
        if let Some(before) = &self.registered
            && before.key() != replica.key()
        {
            let text = "a stream registers one instance; its name cannot change";
            return Err(self.refuse(Status::invalid_argument(text)));
        }
        // Each time, since the Service may have changed whom it allows.
        self.authorize(&replica)?;
        self.registry
            .register(self.owner, replica.clone())
            .map_err(|full| self.refuse(Status::resource_exhausted(full.to_string())))?;
        if self.registered.as_ref().is_none_or(|before| before.ready != replica.ready) {
            let (instance, ready) = (&replica.instance, replica.ready);
            tracing::info!(peer = %self.who, instance, ready, address = %replica.address, "registered");
        }
        self.registered = Some(replica);
        Ok(())
    }

    fn authorize(&self, replica: &Replica) -> Result<(), Status> {
        if replica.namespace != self.who.namespace() {
            let (who, namespace) = (&self.who, &replica.namespace);
            let text = format!("{who} cannot register in namespace {namespace:?}");
            return Err(self.refuse(Status::permission_denied(text)));
        }
        self.store.read(|view| {
            replica.services.iter().try_for_each(|service| {
                let key = ServiceKey::new(&replica.namespace, service);
                access::may_serve(view.index, &self.who, &key)
                    .map_err(|why| self.refuse(Status::permission_denied(why)))
            })
        })
    }

    fn replica(&self, raw: proto::Registration) -> Result<Replica, Status> {
        parse(raw, &self.who)
            .map_err(|why| self.refuse(Status::invalid_argument(format!("registration: {why}"))))
    }

    /// Counts a refusal.
    fn refuse(&self, status: Status) -> Status {
        let reason = if status.code() == tonic::Code::PermissionDenied {
            "permission_denied"
        } else if status.code() == tonic::Code::ResourceExhausted {
            "full"
        } else {
            "invalid"
        };
        self.metrics.refused.with_label_values(&[SERVICE, reason]).inc();
        status
    }
}

fn parse(raw: proto::Registration, who: &SpiffeId) -> Result<Replica, String> {
    let name = |field: &str, value: &str, required: bool| {
        let printable = value.bytes().all(|b| b.is_ascii_graphic());
        match printable && value.len() <= MAX_NAME_BYTES && !(required && value.is_empty()) {
            true => Ok(()),
            false => Err(format!("{field} must be a name of at most {MAX_NAME_BYTES} bytes")),
        }
    };
    name("instance", &raw.instance, true)?;
    name("namespace", &raw.namespace, true)?;
    name("zone", &raw.zone, false)?;
    raw.services.iter().try_for_each(|service| name("services", service, true))?;
    if raw.services.len() > MAX_ITEMS || raw.ports.len() > MAX_ITEMS {
        return Err(format!("at most {MAX_ITEMS} services and {MAX_ITEMS} ports"));
    }
    let address = raw.address.parse::<SocketAddr>().ok();
    let usable = |address: &SocketAddr| !address.ip().is_unspecified() && address.port() != 0;
    let address = address.filter(usable).ok_or_else(|| {
        format!("address {:?} is not an ip:port that peers can reach", raw.address)
    })?;
    let ports = raw.ports.into_iter().map(|port| {
        name("ports.name", &port.name, false)?;
        name("ports.app_protocol", &port.app_protocol, false)?;
        let number = u16::try_from(port.port).ok().filter(|number| *number != 0);
        let number = number.ok_or_else(|| format!("port {} is not 1 to 65535", port.port))?;
        Ok(ReplicaPort { name: port.name, port: number, app_protocol: port.app_protocol })
    });
    Ok(Replica {
        identity: who.clone(),
        namespace: raw.namespace,
        instance: raw.instance,
        services: raw.services,
        address,
        ports: ports.collect::<Result<_, String>>()?,
        zone: raw.zone,
        ready: raw.ready,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw() -> proto::Registration {
        proto::Registration {
            services: vec!["orders".into()],
            namespace: "shop".into(),
            instance: "orders-1".into(),
            address: "10.0.0.1:15006".into(),
            ports: vec![proto::WorkloadPort { port: 8080, ..Default::default() }],
            zone: String::new(),
            ready: true,
        }
    }

    /// Why a registration with this change is refused.
    fn refusal(change: impl FnOnce(&mut proto::Registration)) -> String {
        let who = SpiffeId::new("duet.local", "shop", "orders").unwrap();
        let mut changed = raw();
        change(&mut changed);
        parse(changed, &who).unwrap_err()
    }

    #[test]
    fn a_registration_is_read() {
        let who = SpiffeId::new("duet.local", "shop", "orders").unwrap();
        let replica = parse(raw(), &who).unwrap();
        assert_eq!((replica.ports[0].port, replica.identity), (8080, who));
    }

    #[test]
    fn bad_registrations_name_the_field() {
        assert!(refusal(|r| r.instance.clear()).contains("instance"));
        assert!(refusal(|r| r.instance = "a b".into()).contains("instance"));
        assert!(refusal(|r| r.zone = "z".repeat(300)).contains("zone"));
        assert!(refusal(|r| r.address = "0.0.0.0:1".into()).contains("address"));
        assert!(refusal(|r| r.address = "10.0.0.1:0".into()).contains("address"));
        assert!(refusal(|r| r.address = "host:1".into()).contains("address"));
        assert!(refusal(|r| r.ports[0].port = 0).contains("port 0"));
        assert!(refusal(|r| r.ports[0].port = 70_000).contains("port 70000"));
        assert!(refusal(|r| r.services = vec!["s".into(); 65]).contains("at most 64"));
    }
}
