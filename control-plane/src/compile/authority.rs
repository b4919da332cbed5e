//! What an application dialled → one port of one service.

use super::ServicePort;
use crate::index::{Index, ServiceKey};

/// Port of an authority that names none.
const DEFAULT_PORT: u16 = 80;
/// Longest authority: a DNS name and a port.
const MAX_BYTES: usize = 260;

/// Reads an authority: `name`, `name.namespace`, `name.namespace.svc` or `name.namespace.svc.cluster.local`, each with
/// or without a port and a final dot.
///
/// # Errors
/// Why it names no service of the mesh, for the caller to read.
pub fn parse(authority: &str, namespace: &str) -> Result<ServicePort, String> {
    if authority.len() > MAX_BYTES {
        return Err(format!("the name has {} bytes, more than {MAX_BYTES}", authority.len()));
    }
    if authority.starts_with('[') || authority.parse::<std::net::IpAddr>().is_ok() {
        return Err(not_a_service(authority, "it is an IP address"));
    }
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) => {
            let port = port.parse().ok().filter(|port| *port != 0);
            (host, port.ok_or_else(|| not_a_service(authority, "the port is not 1 to 65535"))?)
        }
        None => (authority, DEFAULT_PORT),
    };
    if host.parse::<std::net::IpAddr>().is_ok() {
        return Err(not_a_service(authority, "it is an IP address"));
    }
    let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    let labels: Vec<&str> = host.split('.').collect();
    let (name, namespace) = match labels.as_slice() {
        [name] => (*name, namespace),
        [name, namespace] | [name, namespace, "svc"] => (*name, *namespace),
        [name, namespace, "svc", "cluster", "local"] => (*name, *namespace),
        _ => {
            let form = "services are called <name>, <name>.<namespace> or \
                        <name>.<namespace>.svc.cluster.local";
            return Err(not_a_service(authority, form));
        }
    };
    if !is_label(name) || !is_label(namespace) {
        return Err(not_a_service(authority, "it is not a DNS name"));
    }
    Ok(ServicePort { service: ServiceKey::new(namespace, name), port })
}

fn not_a_service(authority: &str, why: &str) -> String {
    format!("{authority:?} is not a service of the mesh: {why}")
}

fn is_label(text: &str) -> bool {
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    !text.is_empty() && text.len() <= 63 && text.bytes().all(plain)
}

/// Looks a service and its port up.
///
/// # Errors
/// What was looked for and what there is instead, for the caller to read.
pub fn resolve(index: &Index, wanted: &ServicePort) -> Result<(), String> {
    let key = &wanted.service;
    if !index.knows_service(key) {
        let elsewhere = index.namespaces_with(&key.name);
        let mut text = format!("no service {:?} in namespace {:?}", key.name, key.namespace);
        if !elsewhere.is_empty() {
            let elsewhere: Vec<&str> = elsewhere.into_iter().take(5).collect();
            text.push_str(&format!("; there is one in {}", elsewhere.join(", ")));
        }
        return Err(text);
    }
    let ports = ports(index, key);
    if ports.contains(&wanted.port) {
        return Ok(());
    }
    let known: Vec<String> = ports.iter().take(20).map(ToString::to_string).collect();
    Err(match known.is_empty() {
        true => format!("service {key} has no ports"),
        false => format!("service {key} has no port {}; it has {}", wanted.port, known.join(", ")),
    })
}

/// The ports that can be dialled. A service without a resource has its replicas' own ports, and 80.
#[must_use]
pub fn ports(index: &Index, key: &ServiceKey) -> Vec<u16> {
    if let Some(service) = index.service(key) {
        return service.spec.ports.iter().map(|port| port.port).collect();
    }
    let replicas = index.replicas_of(key).filter(|replica| !replica.ports.is_empty());
    let own = replicas.flat_map(|replica| replica.ports.iter().map(|port| port.port));
    let mut ports: Vec<u16> = own.collect();
    if !ports.is_empty() {
        ports.push(DEFAULT_PORT);
    }
    ports.sort_unstable();
    ports.dedup();
    ports
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_form_of_a_name_is_understood() {
        let cases = [
            ("orders", "shop/orders:80"),
            ("Orders:8080", "shop/orders:8080"),
            ("orders.ops", "ops/orders:80"),
            ("orders.ops.svc:1", "ops/orders:1"),
            ("orders.ops.svc.cluster.local", "ops/orders:80"),
            ("orders.ops.svc.cluster.local.:443", "ops/orders:443"),
        ];
        for (authority, expected) in cases {
            assert_eq!(parse(authority, "shop").unwrap().to_string(), expected, "{authority}");
        }
    }

    #[test]
    fn other_names_say_why_not() {
        let cases = [
            ("", "not a DNS name"),
            ("10.0.0.1:80", "IP address"),
            ("10.0.0.1", "IP address"),
            ("[::1]:80", "IP address"),
            ("::1", "IP address"),
            ("orders:0", "port"),
            ("orders:http", "port"),
            ("www.example.com", "services are called"),
            ("a_b", "not a DNS name"),
            ("a..b", "services are called"),
        ];
        for (authority, expected) in cases {
            let why = parse(authority, "shop").unwrap_err();
            assert!(why.contains(expected), "{authority}: {why}");
        }
        assert!(parse(&"a".repeat(300), "shop").unwrap_err().contains("300 bytes"));
    }

    proptest! {
        #[test]
        fn no_name_panics(authority: String, namespace: String) {
            drop(parse(&authority, &namespace));
        }
    }
}
