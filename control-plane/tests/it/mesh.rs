//! The fixture: a control plane and its clients.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use duet_api::proto;
use duet_api::proto::discovery_client::DiscoveryClient;
use duet_api::proto::identity_client::IdentityClient;
use duet_api::proto::watch_request::Kind as Ask;
use duet_api::proto::watch_response::Kind as Tell;
use duet_api::proto::workloads_client::WorkloadsClient;
use duet_api::spiffe::SpiffeId;
use duet_api::tls::{self, Peer, TlsMaterial};
use duet_api::token::JoinClaims;
use duet_control_plane::Args;
use duet_control_plane::app::ControlPlane;
use duet_control_plane::token::{self, TokenRequest};
use rcgen::{CertificateParams, KeyPair};
use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

/// Longest wait for something that must happen.
pub(crate) const SOON: Duration = Duration::from_secs(10);

pub(crate) struct Mesh {
    pub(crate) args: Args,
    pub(crate) control_plane: Option<ControlPlane>,
    dir: tempfile::TempDir,
}

impl Mesh {
    /// Starts with these resources in `all.yaml`.
    pub(crate) async fn start(yaml: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("config")).unwrap();
        let loopback: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let args = Args {
            config: vec![dir.path().join("config")],
            state: dir.path().join("state"),
            trust_domain: "duet.local".into(),
            listen: loopback,
            admin_listen: loopback,
            operator_listen: loopback,
            operator_anywhere: false,
            lease: Duration::from_secs(15),
            ports_file: None,
            workers: 1,
            exit_with_parent: false,
            require_reference_grants: false,
            log_format: None,
            log_level: "info".into(),
        };
        let mut mesh = Self { args, control_plane: None, dir };
        mesh.write("all.yaml", yaml);
        mesh.run().await;
        mesh
    }

    async fn run(&mut self) {
        self.control_plane = Some(Box::pin(ControlPlane::start(&self.args)).await.unwrap());
    }

    /// Stops and starts on the same state.
    pub(crate) async fn restart(&mut self) {
        self.control_plane.take().unwrap().shutdown().await;
        self.run().await;
    }

    pub(crate) fn write(&self, file: &str, yaml: &str) {
        std::fs::write(self.path(file), yaml).unwrap();
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join("config").join(file)
    }

    pub(crate) fn grpc(&self) -> SocketAddr {
        self.control_plane.as_ref().unwrap().grpc
    }

    pub(crate) fn token(&self, namespace: &str, account: &str, single_use: bool) -> String {
        let request = TokenRequest {
            namespace: namespace.into(),
            service_account: account.into(),
            lifetime: Duration::from_secs(600),
            single_use,
            trust_domain: "duet.local".into(),
        };
        token::create(&self.args.state, &request).unwrap()
    }

    /// A sidecar with an identity of its own.
    pub(crate) async fn sidecar(&self, namespace: &str, account: &str) -> Sidecar {
        let token = self.token(namespace, account, true);
        let material = self.join(&token).await.unwrap();
        Sidecar { channel: connect(self.grpc(), mtls(&material)).await, material }
    }

    /// First contact: verifies the server by the token's CA hash and gets a certificate.
    pub(crate) async fn join(&self, token: &str) -> Result<TlsMaterial, tonic::Status> {
        let hash = JoinClaims::read_unverified(token).unwrap().ca_hash().unwrap();
        let config = tls::first_contact_config(hash).unwrap();
        certify(connect(self.grpc(), config).await, token).await
    }

    /// GET of an admin page: status line and body.
    pub(crate) async fn get(&self, path: &str) -> (String, String) {
        let mut stream =
            TcpStream::connect(self.control_plane.as_ref().unwrap().admin).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.lines().next().unwrap().to_owned(), body.to_owned())
    }

    /// The value of a metric, labels included in the name as Prometheus writes them.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let (_, body) = self.get("/metrics").await;
        let line = body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.trim().parse().unwrap())
    }

    pub(crate) async fn wait_for_metric(&self, name: &str, value: f64) {
        let reached = async {
            while (self.metric(name).await - value).abs() > 1e-9 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout(SOON, reached).await.is_err() {
            panic!("{name} is {}, not {value}", self.metric(name).await);
        }
    }
}

/// Asks for a certificate for a fresh key.
pub(crate) async fn certify(channel: Channel, token: &str) -> Result<TlsMaterial, tonic::Status> {
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
    let request = proto::CertifyRequest { csr, token: token.to_owned() };
    let answer = IdentityClient::new(channel).certify(request).await?.into_inner();
    let ders = |ders: Vec<Vec<u8>>| ders.into_iter().map(CertificateDer::from).collect();
    Ok(TlsMaterial {
        chain: ders(answer.chain),
        key: key.into(),
        roots: ders(answer.trust_bundle),
        id: answer.spiffe_id.parse().unwrap(),
    })
}

pub(crate) fn mtls(material: &TlsMaterial) -> ClientConfig {
    let control_plane = SpiffeId::control_plane("duet.local").unwrap();
    tls::client_config(material, Peer::Exactly(control_plane)).unwrap()
}

/// A channel that connects when it is first used.
pub(crate) async fn connect(address: SocketAddr, config: ClientConfig) -> Channel {
    try_connect(address, config).await.unwrap()
}

pub(crate) async fn try_connect(
    address: SocketAddr,
    mut config: ClientConfig,
) -> Result<Channel, tonic::transport::Error> {
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let connect = tower::service_fn(move |_: http::Uri| {
        let connector = connector.clone();
        async move {
            let stream = TcpStream::connect(address).await?;
            let name = ServerName::try_from("duet.invalid").unwrap();
            let stream = connector.connect(name, stream).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    Endpoint::from_static("http://duet.invalid").connect_with_connector(connect).await
}

pub(crate) struct Sidecar {
    pub(crate) channel: Channel,
    pub(crate) material: TlsMaterial,
}

/// A registration, renewed whenever something is sent.
pub(crate) struct Registered {
    pub(crate) requests: mpsc::Sender<proto::RegisterRequest>,
    pub(crate) answers: Streaming<proto::RegisterResponse>,
}

impl Registered {
    pub(crate) async fn send(
        &mut self,
        registration: proto::Registration,
    ) -> Result<proto::RegisterResponse, tonic::Status> {
        let request = proto::RegisterRequest { registration: Some(registration) };
        self.requests.send(request).await.unwrap();
        Ok(self.answers.message().await?.expect("the stream ended"))
    }
}

pub(crate) fn registration(service: &str, instance: &str, port: u16) -> proto::Registration {
    proto::Registration {
        services: vec![service.into()],
        namespace: "shop".into(),
        instance: instance.into(),
        address: format!("127.0.0.1:{port}"),
        ports: vec![proto::WorkloadPort { port: 8080, ..Default::default() }],
        zone: String::new(),
        ready: true,
    }
}

pub(crate) struct Watch {
    requests: mpsc::Sender<proto::WatchRequest>,
    updates: Streaming<proto::WatchResponse>,
}

impl Sidecar {
    pub(crate) async fn open_registration(&self) -> Registered {
        let (requests, stream) = mpsc::channel(4);
        let mut client = WorkloadsClient::new(self.channel.clone());
        let answers = client.register(ReceiverStream::new(stream)).await.unwrap().into_inner();
        Registered { requests, answers }
    }

    pub(crate) async fn register(&self, registration: proto::Registration) -> Registered {
        let mut registered = self.open_registration().await;
        registered.send(registration).await.unwrap();
        registered
    }

    /// A watch of a node of the sidecar's namespace, without its first answer.
    pub(crate) async fn watch(&self, services: &[&str]) -> Watch {
        let (requests, stream) = mpsc::channel(16);
        let mut client = DiscoveryClient::new(self.channel.clone());
        let updates = client.watch(ReceiverStream::new(stream)).await.unwrap().into_inner();
        let node = proto::Node {
            services: services.iter().map(|&service| service.into()).collect(),
            namespace: self.material.id.namespace().into(),
            instance: "a-node".into(),
            software_version: "test".into(),
        };
        let watch = Watch { requests, updates };
        watch.ask(Ask::Node(node)).await;
        watch
    }
}

impl Watch {
    pub(crate) async fn ask(&self, ask: Ask) {
        self.requests.send(proto::WatchRequest { kind: Some(ask) }).await.unwrap();
    }

    pub(crate) async fn subscribe(&self, authority: &str) {
        self.ask(Ask::Subscribe(proto::Subscribe { authority: authority.into() })).await;
    }

    pub(crate) async fn next(&mut self) -> Result<Tell, tonic::Status> {
        let message = tokio::time::timeout(SOON, self.updates.message()).await;
        Ok(message.expect("an update in time")?.expect("the stream ended").kind.unwrap())
    }

    pub(crate) async fn workload(&mut self) -> proto::Workload {
        match self.next().await.unwrap() {
            Tell::Workload(workload) => workload,
            Tell::Destination(update) => panic!("{update:?}"),
        }
    }

    pub(crate) async fn destination(&mut self) -> proto::DestinationUpdate {
        match self.next().await.unwrap() {
            Tell::Destination(update) => update,
            Tell::Workload(workload) => panic!("{workload:?}"),
        }
    }

    /// Whether nothing comes for a while.
    pub(crate) async fn is_quiet(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(300), self.updates.message()).await.is_err()
    }
}
