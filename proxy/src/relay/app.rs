//! The application, as the receiver of events.

use std::sync::Arc;
use std::time::Duration;

use http::header::{self, HeaderValue};
use http::uri::Authority;
use http::{Request, Response};

use crate::config::AppProtocol;
use crate::connect::{Pool, Transport};
use crate::error::{ErrorType, Failure};
use crate::http::body::Body;
use crate::http::headers;

/// The application is on this machine.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Connections to the application, and what it speaks.
#[derive(Clone, Debug)]
pub(super) struct App {
    pub(super) pool: Arc<Pool>,
    pub(super) protocol: AppProtocol,
}

impl App {
    /// Sends one request.
    pub(super) async fn send(&self, request: Request<Body>) -> Result<Response<Body>, Failure> {
        let authority = self.pool.target().address.to_string().parse::<Authority>();
        let authority = authority
            .map_err(|error| Failure::new(ErrorType::ProxyInternalError, error.to_string()))?;
        let transport = match self.protocol {
            AppProtocol::H2c | AppProtocol::Grpc => Transport::Http2,
            AppProtocol::Auto | AppProtocol::Http1 => Transport::Http1,
        };
        let mut sender = self.pool.sender(transport, CONNECT_TIMEOUT).await?;
        let (mut head, body) = request.into_parts();
        match transport {
            Transport::Http1 | Transport::Upgrade => headers::for_http1(&mut head, &authority),
            Transport::Http2 => headers::for_http2(&mut head, &authority),
        }
        let agent = HeaderValue::from_static(concat!("duet/", env!("CARGO_PKG_VERSION")));
        head.headers.insert(header::USER_AGENT, agent);
        sender.send(Request::from_parts(head, body)).await
    }
}
