//! A request's body, and what becomes of the part that nobody wanted to read: of a request that was refused, for example.
//! While it lies on an HTTP/1 connection, no other request can come by that.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http::header::{self, HeaderMap, HeaderValue};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt as _;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

/// This much is read and thrown away, within this time, so that the connection can carry the next request.
const SMALL_BYTES: u64 = 64 * 1024;
const SMALL_TIME: Duration = Duration::from_millis(500);
/// Where there is more, the connection ends; but for this long it is read from. Closed with bytes unread it would be reset,
/// and the client might lose the answer with it (RFC 9112 section 9.6).
const LINGER: Duration = Duration::from_secs(5);

/// Throws away what is left of a body. `false` when it is too much for that: the connection has to end with the answer. What
/// is on its way then is read by a task of `tasks`.
pub async fn discard<B>(mut body: B, tasks: &TaskTracker) -> bool
where
    B: HttpBody<Data = Bytes> + Unpin + Send + 'static,
{
    let small = is_small(&body.size_hint());
    if small && timeout(SMALL_TIME, read(&mut body, SMALL_BYTES)).await.unwrap_or(false) {
        return true;
    }
    tasks.spawn(linger(body));
    false
}

/// Reads what is on its way on a connection that ends.
pub async fn linger<B: HttpBody<Data = Bytes> + Unpin>(mut body: B) {
    // Whether it came to its end makes no difference any more.
    timeout(LINGER, read(&mut body, u64::MAX)).await.unwrap_or_default();
}

/// Whether it may be little enough to be thrown away.
#[must_use]
pub fn is_small(left: &SizeHint) -> bool {
    left.lower() <= SMALL_BYTES
}

/// Says that the next request has to take another connection (RFC 9112 section 9.6): the client must know before it sends
/// one.
pub fn close(headers: &mut HeaderMap) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
}

/// Reads to the end, or until there was more than `most`. Whether the end came.
async fn read<B: HttpBody<Data = Bytes> + Unpin>(body: &mut B, most: u64) -> bool {
    let mut read = 0;
    while read <= most && !body.is_end_stream() {
        match body.frame().await {
            None => return true,
            Some(Err(_broken)) => return false,
            Some(Ok(frame)) => read += frame.data_ref().map_or(0, |data| data.len() as u64),
        }
    }
    body.is_end_stream()
}

/// A request's body, read as far as somebody likes.
#[derive(Debug)]
pub struct Coming<B> {
    body: B,
    /// The client sends it once it is told to, which the first read does.
    expects: bool,
    begun: bool,
    ended: bool,
}

impl<B: HttpBody<Data = Bytes> + Unpin + Send + 'static> Coming<B> {
    /// The request with its body so.
    pub fn of(request: Request<B>) -> Request<Self> {
        let expects = request.headers().contains_key(header::EXPECT);
        request.map(|body| Self { ended: body.is_end_stream(), body, expects, begun: false })
    }

    /// For somebody who wants all of it.
    pub fn whole(self) -> B {
        self.body
    }

    /// Throws the rest away, as [`discard`] does.
    pub async fn discard(self, tasks: &TaskTracker) -> bool {
        // Nothing is on its way, and nothing should be.
        if self.expects && !self.begun {
            return self.ended;
        }
        discard(self, tasks).await
    }
}

impl<B: HttpBody<Data = Bytes> + Unpin> HttpBody for Coming<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.begun = true;
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        self.ended = matches!(frame, Poll::Ready(None)) || self.body.is_end_stream();
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }

    fn size_hint(&self) -> SizeHint {
        if self.ended { SizeHint::with_exact(0) } else { self.body.size_hint() }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body_util::StreamBody;

    use super::*;

    /// Pieces of this size, then the end, or silence.
    async fn discarded(sizes: &[usize], silent: bool, expect: bool) -> bool {
        let pieces: Vec<_> = sizes.iter().map(|size| Bytes::from(vec![0; *size])).collect();
        let pieces = futures::stream::iter(pieces);
        let rest = futures::stream::once(async move {
            if silent {
                std::future::pending::<()>().await;
            }
            Bytes::new()
        });
        let pieces = futures::StreamExt::chain(pieces, rest);
        let frame = |piece| Ok::<_, Infallible>(Frame::data(piece));
        let body = StreamBody::new(Box::pin(futures::StreamExt::map(pieces, frame)));
        let mut request = Request::new(body);
        if expect {
            request.headers_mut().insert(header::EXPECT, "100-continue".parse().unwrap());
        }
        Coming::of(request).into_body().discard(&TaskTracker::new()).await
    }

    #[tokio::test(start_paused = true)]
    async fn little_is_read_and_thrown_away_and_much_ends_the_connection() {
        assert!(discarded(&[], false, false).await);
        assert!(discarded(&[1, 60_000], false, false).await);
        assert!(!discarded(&[60_000, 60_000], false, false).await, "too much");
        assert!(!discarded(&[1], true, false).await, "too slow");
        assert!(!discarded(&[1], false, true).await, "nobody asked for it");
    }
}
