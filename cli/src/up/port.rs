//! Free ports for applications that leave theirs to `duet up`.
//!
//! They are outside of the range that the kernel gives to connections, and to listeners that leave the choice to it:
//! a port of that range which is free now may be a sidecar's or a connection's by the time that the application starts,
//! or starts again after a crash.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::RangeInclusive;

use anyhow::Context as _;
use socket2::{Domain, Socket, Type};

/// Below are the usual ports of servers.
const LOWEST: u16 = 15_000;
/// What Linux gives to connections, unless it is configured.
const USUAL: RangeInclusive<u16> = 32_768..=60_999;

/// A port of 127.0.0.1 that nobody else can have as long as this lives.
#[derive(Debug)]
pub(crate) struct Reserved {
    pub(crate) port: u16,
    _socket: Socket,
}

impl Reserved {
    /// Takes a free port, none of `but`.
    pub(crate) fn free(but: &[u16]) -> anyhow::Result<Self> {
        let candidates = candidates(&for_connections());
        // Not always the first: what runs on them then differs between two meshes, and between two runs.
        let start = rand::random_range(..candidates.len().max(1));
        let (before, after) = candidates.split_at(start);
        let new = after.iter().chain(before).copied().filter(|port| !but.contains(port));
        // The last resort, where all ports are for connections, is the kernel's choice.
        let reserved = new.chain([0]).find_map(|port| Self::take(port).ok());
        reserved.context("no free port on 127.0.0.1")
    }

    /// Takes the port that a service asks for. `None`: nobody listens there, but connections of before have not ended
    /// yet (`TIME_WAIT`), which an application is not kept from listening by.
    pub(crate) fn fixed(service: &str, port: u16) -> anyhow::Result<Option<Self>> {
        TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map(drop).with_context(|| {
            format!("apps.{service}.port: {port} is taken; choose another, or `auto`")
        })?;
        Ok(Self::take(port).ok())
    }

    /// Without listening, and without `SO_REUSEADDR`, so that nobody who has it can take the port as well.
    fn take(port: u16) -> std::io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into())?;
        let bound = socket.local_addr()?.as_socket();
        Ok(Self { port: bound.map_or(port, |address| address.port()), _socket: socket })
    }
}

/// The ports of [`LOWEST`] and above that no connection gets.
fn candidates(for_connections: &RangeInclusive<u16>) -> Vec<u16> {
    (LOWEST..=u16::MAX).filter(|port| !for_connections.contains(port)).collect()
}

fn for_connections() -> RangeInclusive<u16> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    text.ok().and_then(|text| range(&text)).unwrap_or(USUAL)
}

fn range(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.trim().split_once(char::is_whitespace)?;
    Some(first.parse().ok()?..=last.trim().parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserved_port_is_nobody_elses_until_it_is_given_back() {
        let reserved: Vec<Reserved> = (0..50).map(|_| Reserved::free(&[]).unwrap()).collect();
        let for_connections = for_connections();
        for Reserved { port, .. } in &reserved {
            assert!(!for_connections.contains(port), "{port}");
            Reserved::fixed("web", *port).unwrap_err();
        }
        let ports: Vec<u16> = reserved.iter().map(|reserved| reserved.port).collect();
        drop(reserved);
        for port in ports {
            assert!(Reserved::fixed("web", port).unwrap().is_some(), "{port}");
        }
    }

    #[test]
    fn the_ports_of_connections_are_what_the_kernel_says() {
        assert_eq!(range("32768\t60999\n"), Some(32_768..=60_999));
        assert_eq!(range("1024 65535"), Some(1_024..=65_535));
        assert_eq!(range("none"), None);
        let some = candidates(&(32_768..=60_999));
        assert_eq!((some[0], some[some.len() - 1]), (LOWEST, u16::MAX));
        assert_eq!(some.len(), 17_768 + 4_536);
        assert!(candidates(&(1_024..=65_535)).is_empty());
    }

    #[test]
    fn ports_that_are_asked_for_are_left_alone() {
        let but = candidates(&for_connections());
        let reserved = Reserved::free(&but).unwrap();
        assert!(!but.contains(&reserved.port));
        assert_ne!(reserved.port, 0);
    }
}
