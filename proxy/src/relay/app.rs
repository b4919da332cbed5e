//! The application, as the receiver of events.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use http::header::{self, HeaderValue};
use http::uri::Authority;
use http::{Request, Response};
use tokio::time::Instant;

use crate::config::AppProtocol;
use crate::connect::{Pool, Transport};
use crate::error::{ErrorType, Failure, Progress};
use crate::http::body::Body;
use crate::http::headers;
use crate::http::taken::Taken;

/// The application is on this machine.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection that was about to be closed is closed within this time.
const AT_ONCE: Duration = Duration::from_millis(250);

/// Connections to the application, and what it speaks.
#[derive(Clone, Debug)]
pub(super) struct App {
    pub(super) pool: Arc<Pool>,
    pub(super) protocol: AppProtocol,
}

impl App {
    /// As [`Self::send`], for a request with a body; calls `taken` once the application may have seen some of that.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub(super) async fn hand(
        &self,
        mut request: Request<Bytes>,
        taken: impl FnOnce() + Send,
    ) -> Result<Response<Body>, Failure> {
        let on_its_way = Taken::default();
        request.extensions_mut().insert(on_its_way.clone());
        let mut sending = pin!(self.send(request));
        let early = tokio::select! {
            biased;
            outcome = &mut sending => Some(outcome),
            () = on_its_way.told() => None,
        };
        match early {
            None => {
                taken();
                sending.await
            }
            Some(outcome) => {
                if on_its_way.told().now_or_never().is_some() {
                    taken();
                }
                outcome
            }
        }
    }

    /// Sends one request, where need be once more: an application may close a connection that it kept open just as the
    /// request comes. Who calls this may say a thing twice.
    ///
    /// # Errors
    /// Where there is no answer, with what is known of the first try, unless the second one tells more.
    pub(super) async fn send(&self, request: Request<Bytes>) -> Result<Response<Body>, Failure> {
        let transport = match self.protocol {
            AppProtocol::H2c | AppProtocol::Grpc => Transport::Http2,
            AppProtocol::Auto | AppProtocol::Http1 => Transport::Http1,
        };
        let request = self.addressed(request, transport)?;
        let mut sender = self.pool.sender(transport, CONNECT_TIMEOUT).await?;
        if transport != Transport::Http2
            && let Some(taken) = request.extensions().get::<Taken>()
        {
            taken.tell();
        }
        let sent = Instant::now();
        let failure = match sender.send(request.clone().map(body)).await {
            Ok(response) => return Ok(response),
            Err(failure) => failure,
        };
        let stale = failure.stale && sent.elapsed() < AT_ONCE;
        if !stale && failure.progress != Progress::Unprocessed {
            return Err(failure);
        }
        tracing::debug!(%failure, "sent to the application once more, on a new connection");
        match self.again(request, transport).await {
            // The first one may have been what the application died of.
            Err(second) if stale && second.progress == Progress::Unprocessed => Err(failure),
            outcome => outcome,
        }
    }

    async fn again(
        &self,
        request: Request<Bytes>,
        transport: Transport,
    ) -> Result<Response<Body>, Failure> {
        let mut sender = self.pool.fresh(transport, CONNECT_TIMEOUT).await?;
        sender.send(request.map(body)).await
    }

    fn addressed(
        &self,
        request: Request<Bytes>,
        transport: Transport,
    ) -> Result<Request<Bytes>, Failure> {
        let authority = self.pool.target().address.to_string().parse::<Authority>();
        let authority = authority
            .map_err(|error| Failure::new(ErrorType::ProxyInternalError, error.to_string()))?;
        let (mut head, body) = request.into_parts();
        match transport {
            Transport::Http1 | Transport::Upgrade => headers::for_http1(&mut head, &authority),
            Transport::Http2 => headers::for_http2(&mut head, &authority),
        }
        let agent = HeaderValue::from_static(concat!("duet/", env!("CARGO_PKG_VERSION")));
        head.headers.insert(header::USER_AGENT, agent);
        Ok(Request::from_parts(head, body))
    }
}

fn body(bytes: Bytes) -> Body {
    if bytes.is_empty() { Body::Empty } else { Body::Full(bytes) }
}
