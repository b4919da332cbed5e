//! Every socket of the sidecar, bound before anything is served, and what is told of them.

use std::net::{IpAddr, SocketAddr, TcpListener as StdListener, ToSocketAddrs as _, UdpSocket};

use anyhow::Context as _;
use duet_api::proto::{Registration, WorkloadPort};
use serde::Serialize;
use tokio::net::TcpListener;

use crate::config::{AppProtocol, Config};
use crate::net;

/// The chosen ports, as the ports file has them.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Ports {
    pid: u32,
    outbound: SocketAddr,
    inbound: SocketAddr,
    api: SocketAddr,
    grpc_api: SocketAddr,
    admin: SocketAddr,
    metrics: SocketAddr,
}

/// Listeners of one worker.
#[derive(Debug)]
pub(super) struct WorkerSockets {
    pub(super) outbound: StdListener,
    pub(super) inbound: StdListener,
}

#[derive(Debug)]
pub(super) struct Sockets {
    pub(super) workers: Vec<WorkerSockets>,
    pub(super) ports: Ports,
    api: StdListener,
    grpc_api: StdListener,
    admin: StdListener,
    metrics: StdListener,
}

impl Sockets {
    pub(super) fn bind(config: &Config) -> anyhow::Result<Self> {
        let args = &config.args;
        let first = WorkerSockets {
            outbound: bind("--outbound-listen", args.outbound_listen)?,
            inbound: bind("--inbound-listen", args.inbound_listen)?,
        };
        let api = bind("--api-listen", args.api_listen)?;
        let grpc_api = bind("--grpc-api-listen", args.grpc_api_listen)?;
        let admin = bind("--admin-listen", args.admin_listen)?;
        let metrics = bind("--metrics-listen", args.metrics_listen)?;
        let ports = Ports {
            pid: std::process::id(),
            outbound: first.outbound.local_addr()?,
            inbound: first.inbound.local_addr()?,
            api: api.local_addr()?,
            grpc_api: grpc_api.local_addr()?,
            admin: admin.local_addr()?,
            metrics: metrics.local_addr()?,
        };
        let mut workers = vec![first];
        for _ in 1..config.workers {
            workers.push(WorkerSockets {
                outbound: net::listen(ports.outbound)?,
                inbound: net::listen(ports.inbound)?,
            });
        }
        Ok(Self { workers, ports, api, grpc_api, admin, metrics })
    }

    /// What is left once the API and the admin pages are served. Closes ours of their listeners: whoever serves one closes
    /// it, and nobody connects to a port that is not answered any more.
    pub(super) fn rest(self) -> (Vec<WorkerSockets>, Ports) {
        (self.workers, self.ports)
    }

    pub(super) fn api(&self) -> anyhow::Result<TcpListener> {
        Ok(net::adopt(self.api.try_clone()?)?)
    }

    pub(super) fn grpc_api(&self) -> anyhow::Result<TcpListener> {
        Ok(net::adopt(self.grpc_api.try_clone()?)?)
    }

    pub(super) fn admin(&self) -> anyhow::Result<TcpListener> {
        Ok(net::adopt(self.admin.try_clone()?)?)
    }

    pub(super) fn metrics(&self) -> anyhow::Result<TcpListener> {
        Ok(net::adopt(self.metrics.try_clone()?)?)
    }
}

fn bind(flag: &str, address: SocketAddr) -> anyhow::Result<StdListener> {
    net::check_free(address)
        .and_then(|()| net::listen(address))
        .with_context(|| format!("{flag} {address}"))
}

/// What the control plane is told of this replica.
pub(super) fn registration(config: &Config, sockets: &Sockets) -> anyhow::Result<Registration> {
    let inbound = sockets.ports.inbound;
    let (ip, port) = match config.advertise {
        Some((ip, port)) => (ip, port.unwrap_or(inbound.port())),
        None if inbound.ip().is_unspecified() => {
            (local_ip(&config.args.control_plane)?, inbound.port())
        }
        None => (inbound.ip(), inbound.port()),
    };
    let ports = config.app_ports.iter().map(|port| WorkloadPort {
        name: port.name.clone(),
        port: u32::from(port.port),
        app_protocol: match port.protocol {
            AppProtocol::Auto => String::new(),
            AppProtocol::Http1 => "http".to_owned(),
            AppProtocol::H2c => "kubernetes.io/h2c".to_owned(),
            AppProtocol::Grpc => "grpc".to_owned(),
        },
    });
    Ok(Registration {
        services: config.args.service.clone(),
        namespace: config.args.namespace.clone(),
        instance: config.instance.clone(),
        address: SocketAddr::new(ip, port).to_string(),
        ports: ports.collect(),
        zone: config.args.zone.clone(),
        ready: false,
    })
}

/// Our address on the way to the control plane. Connecting a UDP socket sends nothing: it only asks the
/// kernel for the route.
fn local_ip(control_plane: &str) -> anyhow::Result<IpAddr> {
    let find = || {
        let to = control_plane.to_socket_addrs()?.next();
        let to = to.ok_or_else(|| std::io::Error::other("no address"))?;
        let any: SocketAddr = match to {
            SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
            SocketAddr::V6(_) => ([0_u16; 8], 0).into(),
        };
        let socket = UdpSocket::bind(any)?;
        socket.connect(to)?;
        socket.local_addr()
    };
    let address = find().with_context(|| {
        format!("cannot find this host's address towards {control_plane}: give --advertise")
    })?;
    Ok(address.ip())
}

/// Logs the ports and writes the ports file.
pub(super) fn announce(config: &Config, ports: &Ports) -> anyhow::Result<()> {
    tracing::info!(
        instance = config.instance,
        outbound = %ports.outbound,
        inbound = %ports.inbound,
        api = %ports.api,
        grpc_api = %ports.grpc_api,
        admin = %ports.admin,
        metrics = %ports.metrics,
        workers = config.workers,
        "sidecar started"
    );
    let Some(file) = &config.args.ports_file else {
        return Ok(());
    };
    let temporary = file.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&temporary, serde_json::to_vec(ports)?)
        .and_then(|()| std::fs::rename(&temporary, file))
        .with_context(|| format!("--ports-file {}", file.display()))
}
