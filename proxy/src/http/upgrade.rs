//! HTTP/1.1 upgrades (RFC 9110 section 7.8), WebSocket above all: the request goes on over HTTP/1.1 with its
//! `Upgrade` header, and after a 101 bytes flow both ways until either side ends.

use std::time::Duration;

use http::header::{self, HeaderValue};
use http::{HeaderMap, Version, request};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio_util::sync::CancellationToken;

/// After the 101, the peer's side must be there within this time.
const SWITCH_TIMEOUT: Duration = Duration::from_secs(5);

/// A wish to upgrade, taken from a request.
#[derive(Debug)]
pub struct Upgrade {
    protocol: HeaderValue,
    client: OnUpgrade,
}

/// The caller's side of a tunnel to be.
#[derive(Debug)]
pub struct Tunnel {
    client: OnUpgrade,
    server: OnUpgrade,
}

impl Upgrade {
    /// Takes the wish out of a request's head, before the hop-by-hop headers go. `h2c` is not passed on: HTTP/2 is
    /// spoken with prior knowledge, or not at all.
    pub fn take(head: &mut request::Parts) -> Option<Self> {
        let named = |value: &HeaderValue| {
            let text = value.to_str().unwrap_or_default();
            text.split(',').any(|name| name.trim().eq_ignore_ascii_case("upgrade"))
        };
        if head.version != Version::HTTP_11
            || !head.headers.get_all(header::CONNECTION).iter().any(named)
        {
            return None;
        }
        let protocol = head.headers.get(header::UPGRADE)?.clone();
        if protocol.as_bytes().eq_ignore_ascii_case(b"h2c") {
            return None;
        }
        let client = head.extensions.remove::<OnUpgrade>()?;
        Some(Self { protocol, client })
    }

    /// Puts the wish into the head of the next hop.
    pub fn ask(&self, headers: &mut HeaderMap) {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, self.protocol.clone());
    }

    /// Both sides, after the server has answered 101 with this `server` side.
    #[must_use]
    pub fn accepted(self, server: OnUpgrade) -> Tunnel {
        Tunnel { client: self.client, server }
    }
}

/// Marks a 101 as such for the caller's hop.
pub fn switched(headers: &mut HeaderMap, protocol: Option<HeaderValue>) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    if let Some(protocol) = protocol {
        headers.insert(header::UPGRADE, protocol);
    }
}

impl Tunnel {
    /// Copies both ways until both sides have ended, or `force`.
    pub async fn run(self, force: CancellationToken) {
        let sides = async { tokio::try_join!(self.client, self.server) };
        let (client, server) = match tokio::time::timeout(SWITCH_TIMEOUT, sides).await {
            Ok(Ok(sides)) => sides,
            Ok(Err(error)) => {
                tracing::debug!(%error, "an upgrade was not completed");
                return;
            }
            Err(_elapsed) => {
                tracing::debug!("an upgrade was not completed in time");
                return;
            }
        };
        let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
        tokio::select! {
            copied = tokio::io::copy_bidirectional(&mut client, &mut server) => {
                if let Err(error) = copied {
                    tracing::debug!(%error, "an upgraded connection broke");
                }
            }
            () = force.cancelled() => {}
        }
    }
}
