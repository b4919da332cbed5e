//! Keeps web pages of other machines away from ports that ask nobody who they are. The browser of whoever sits at this
//! machine carries a page's requests to its loopback too:
//!
//! - under a name of the page's own, which its DNS lets point here once the page is loaded (DNS rebinding). Then `Host`
//!   is that name, and the page may read the answer;
//! - to a loopback name. The page cannot read the answer then, but the request is carried out. `Origin` or
//!   `Sec-Fetch-Site` says where it is from.
//!
//! An application that passes its own visitors' requests on, headers and all, is no page, and tells by a header that a
//! page can send only after a preflight: a preflight from elsewhere is refused like any other request.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::LazyLock;

use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Version};
use tokio::net::TcpStream;

use super::headers::{DESTINATION, FORWARDED_FOR, has_ours};
use duet_events::sparse::Sparse;

const SEC_FETCH_SITE: &str = "sec-fetch-site";
/// What a page cannot send without being asked first, and what passes requests on does.
const PASSED_ON: [HeaderName; 4] =
    [HeaderName::from_static("dapr-app-id"), FORWARDED_FOR, header::FORWARDED, header::VIA];

/// Whether a connection never left this machine. Only then is its `Host` a name of this machine.
#[must_use]
pub fn is_loopback(stream: &TcpStream) -> bool {
    // Fails for no open connection; strict, should it.
    stream.local_addr().map_or(true, |local| local.ip().to_canonical().is_loopback())
}

/// Why a request is refused, if it is.
#[must_use]
pub fn refusal(version: Version, headers: &HeaderMap, loopback: bool) -> Option<&'static str> {
    // Browsers speak no HTTP/2 without TLS, and gRPC clients may choose any authority.
    if loopback && version < Version::HTTP_2 && !has_safe_host(headers) {
        return Some(
            "the Host is a name that DNS may point anywhere, so that a web page could have sent this: \
             say localhost or 127.0.0.1",
        );
    }
    // From afar, a forward proxy of the browser's own may have added such a header.
    let passed_on = loopback && PASSED_ON.iter().any(|name| headers.contains_key(name));
    (!passed_on && is_foreign(headers)).then_some(
        "a web page of another machine cannot use this sidecar; an application that passes its \
         visitors' requests on adds X-Forwarded-For, or takes Origin and Sec-Fetch-Site off",
    )
}

/// Whether a web page may have chosen where a call goes: it says so apart from the `Host`, which is a name that DNS may
/// point anywhere, at our own port. `local` is where the connection came to.
#[must_use]
pub fn chose_destination(version: Version, headers: &HeaderMap, local: SocketAddr) -> bool {
    let port = |host: &str| host.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
    let ours = |host: &HeaderValue| host.to_str().ok().and_then(port) == Some(local.port());
    has_ours(headers)
        && headers.contains_key(DESTINATION)
        && version < Version::HTTP_2
        && local.ip().to_canonical().is_loopback()
        && headers.get_all(header::HOST).iter().any(ours)
        && !has_safe_host(headers)
}

/// Tells the log of a request that was refused.
pub fn log_refusal(method: &Method, headers: &HeaderMap) {
    static LOG: LazyLock<Sparse> = LazyLock::new(Sparse::default);
    if let Some(left_out) = LOG.pass("") {
        let (host, origin) = (headers.get(header::HOST), headers.get(header::ORIGIN));
        tracing::info!(%method, ?host, ?origin, left_out, "a web page's request is refused");
    }
}

/// Where there is none, it is no browser.
fn has_safe_host(headers: &HeaderMap) -> bool {
    let safe = |host: &str| is_local(host) || address(name(host)).is_some();
    headers.get_all(header::HOST).iter().all(|host| host.to_str().is_ok_and(safe))
}

fn is_foreign(headers: &HeaderMap) -> bool {
    if headers.contains_key(header::ORIGIN) {
        return !headers.get_all(header::ORIGIN).iter().all(is_local_origin);
    }
    headers.get(SEC_FETCH_SITE).is_some_and(|site| site == "cross-site")
}

/// Whether an `Origin` is a page that this machine serves.
#[must_use]
pub fn is_local_origin(origin: &HeaderValue) -> bool {
    let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
    origin.is_some_and(|(_scheme, host)| is_local(host))
}

/// Whether a host, which may have a port, is this machine whatever anybody's DNS says (RFC 6761 section 6.3).
#[must_use]
pub fn is_local(host: &str) -> bool {
    let name = name(host);
    let (rest, last) = name.rsplit_once('.').unwrap_or(("localhost", name));
    (last.eq_ignore_ascii_case("localhost") && !rest.is_empty())
        || address(name).is_some_and(|ip| ip.to_canonical().is_loopback())
}

fn name(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|digit| digit.is_ascii_digit()) => name,
        _ => host,
    }
}

fn address(name: &str) -> Option<IpAddr> {
    match name.strip_prefix('[').and_then(|name| name.strip_suffix(']')) {
        Some(name) => name.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
        None => name.parse().ok().filter(IpAddr::is_ipv4),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passes(loopback: bool, pairs: &[(&'static str, &'static str)]) -> bool {
        let pairs =
            pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        let headers: HeaderMap = pairs.collect();
        refusal(Version::HTTP_11, &headers, loopback).is_none()
    }

    #[test]
    fn local_names_are_told_from_others() {
        for host in [
            "localhost",
            "LocalHost:3500",
            "shop.localhost:3500",
            "127.0.0.1",
            "127.9.9.9:80",
            "[::1]",
            "[::1]:3500",
            "[::ffff:127.0.0.1]:1",
        ] {
            assert!(is_local(host), "{host}");
        }
        for host in [
            "",
            ":80",
            ".localhost",
            "evil.example:3500",
            "localhost.evil.example",
            "notlocalhost",
            "127.0.0.1.evil.example:80",
            "10.0.0.1",
            "[fe80::1]:1",
            "::1",
            "user@localhost",
        ] {
            assert!(!is_local(host), "{host}");
        }
    }

    #[test]
    fn a_name_of_somebody_elses_dns_is_refused_on_loopback_only() {
        assert!(!passes(true, &[("host", "evil.example:3500")]));
        assert!(!passes(true, &[("host", "evil.example"), ("dapr-app-id", "orders")]));
        assert!(!passes(true, &[("host", "localhost"), ("host", "evil.example")]));
        assert!(passes(false, &[("host", "sidecar:3500")]));
        assert!(passes(true, &[("host", "localhost:3500")]));
        // No name, so nobody's DNS.
        assert!(passes(true, &[("host", "0.0.0.0:3500")]));
        assert!(passes(true, &[]), "HTTP/1.0");
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, "dapr.internal".parse().unwrap());
        assert_eq!(refusal(Version::HTTP_2, &headers, true), None);
    }

    #[test]
    fn pages_of_other_machines_are_refused_and_those_of_this_one_are_not() {
        for loopback in [true, false] {
            for page in ["https://evil.example", "http://localhost.evil.example:80", "null", ""] {
                assert!(!passes(loopback, &[("origin", page)]), "{page}");
            }
            for page in ["http://localhost:3000", "http://127.0.0.1", "http://[::1]:80"] {
                assert!(passes(loopback, &[("origin", page), (SEC_FETCH_SITE, "cross-site")]));
            }
            assert!(!passes(loopback, &[(SEC_FETCH_SITE, "cross-site")]));
            assert!(passes(loopback, &[(SEC_FETCH_SITE, "same-site")]));
            assert!(passes(loopback, &[(SEC_FETCH_SITE, "none")]));
        }
    }

    #[test]
    fn a_page_cannot_choose_the_destination_of_a_call() {
        let local = "127.0.0.1:15001".parse().unwrap();
        let chose = |host: &'static str, names: &[&'static str]| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_static(host));
            for name in names {
                headers.insert(*name, HeaderValue::from_static("payments.shop:80"));
            }
            chose_destination(Version::HTTP_11, &headers, local)
        };
        assert!(chose("evil.example:15001", &["duet-destination"]));
        assert!(!chose("evil.example:15001", &[]), "goes nowhere");
        assert!(!chose("api.example", &["duet-destination"]), "redirected by the kernel");
        assert!(!chose("127.0.0.1:15001", &["duet-destination"]), "needs a preflight");
    }

    #[test]
    fn an_application_may_pass_its_visitors_requests_on() {
        let visitor = [("origin", "https://shop.example"), (SEC_FETCH_SITE, "cross-site")];
        for mark in ["x-forwarded-for", "forwarded", "via", "dapr-app-id"] {
            let passed_on = [visitor[0], visitor[1], (mark, "x")];
            assert!(passes(true, &passed_on), "{mark}");
            // May be the browser's own proxy.
            assert!(!passes(false, &passed_on), "{mark}");
        }
    }
}
