//! An HTTP/1.1 request on its way out (RFC 9112 sections 3, 6 and 7.1).

use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use http::{HeaderMap, Method, header, request};
use http_body::{Body as _, Frame};
use tokio::io::AsyncWrite as _;
use tokio::net::TcpStream;

use super::WireError;
use crate::http::body::{Body, BodyError};

/// Bodies up to this size are sent with the head in one piece; larger ones are not copied.
const COPY_BYTES: usize = 4 * 1024;

/// A request that is being sent.
#[derive(Debug)]
pub(super) struct Upload {
    body: Body,
    coding: Coding,
    /// Encoded, and not yet taken by the kernel.
    encoded: Vec<u8>,
    written: usize,
    /// Goes behind `encoded`.
    data: Bytes,
    /// Goes behind `data`.
    tail: &'static [u8],
    ended: bool,
    begun: bool,
    failed: bool,
}

/// How the body's end is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Coding {
    /// This much is left.
    Length(u64),
    Chunked,
}

impl Upload {
    pub(super) fn new(head: &request::Parts, body: Body) -> Self {
        let coding = body.size_hint().exact().map_or(Coding::Chunked, Coding::Length);
        Self {
            encoded: encode(head, coding),
            ended: body.is_end_stream() && matches!(coding, Coding::Length(0)),
            body,
            coding,
            written: 0,
            data: Bytes::new(),
            tail: b"",
            begun: false,
            failed: false,
        }
    }

    /// The whole request was taken by the kernel.
    pub(super) fn is_ended(&self) -> bool {
        self.ended && !self.failed && self.is_flushed()
    }

    /// The kernel took some of it.
    pub(super) fn is_begun(&self) -> bool {
        self.begun
    }

    /// More may be encoded without getting before what waits already.
    fn has_room(&self) -> bool {
        self.data.is_empty() && self.tail.is_empty() && self.encoded.len() < COPY_BYTES
    }

    fn is_flushed(&self) -> bool {
        self.written == self.encoded.len() && self.data.is_empty() && self.tail.is_empty()
    }

    /// Sends what can be sent; ready when all of it was, or nothing more can be.
    pub(super) fn poll(
        &mut self,
        stream: &mut TcpStream,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), WireError>> {
        while !self.failed {
            // A small first piece of the body goes with the head.
            while !self.ended && self.has_room() {
                match Pin::new(&mut self.body).poll_frame(cx) {
                    Poll::Ready(frame) => {
                        let taken = self.take(frame);
                        self.failed = taken.is_err();
                        taken?;
                    }
                    Poll::Pending if self.is_flushed() => return Poll::Pending,
                    Poll::Pending => break,
                }
            }
            if self.is_flushed() {
                if self.ended {
                    self.encoded = Vec::new();
                    self.written = 0;
                    return Poll::Ready(Ok(()));
                }
                continue;
            }
            if let Err(error) = ready!(self.write(stream, cx)) {
                self.failed = true;
                return Poll::Ready(Err(error.into()));
            }
        }
        Poll::Ready(Ok(()))
    }

    fn write(&mut self, stream: &mut TcpStream, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        let head = self.encoded.get(self.written..).unwrap_or_default();
        let stream = Pin::new(stream);
        let sent = if self.data.is_empty() && self.tail.is_empty() {
            ready!(stream.poll_write(cx, head))?
        } else {
            let parts = [IoSlice::new(head), IoSlice::new(&self.data), IoSlice::new(self.tail)];
            ready!(stream.poll_write_vectored(cx, &parts))?
        };
        if sent == 0 {
            return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()));
        }
        self.begun = true;
        let of_head = sent.min(head.len());
        let of_data = (sent - of_head).min(self.data.len());
        self.written += of_head;
        self.data.advance(of_data);
        self.tail = self.tail.get(sent - of_head - of_data..).unwrap_or_default();
        if self.is_flushed() {
            self.encoded.clear();
            self.written = 0;
        }
        Poll::Ready(Ok(()))
    }

    fn take(&mut self, frame: Option<Result<Frame<Bytes>, BodyError>>) -> Result<(), WireError> {
        match frame {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => self.take_data(data),
                Err(frame) => self.finish(frame.into_trailers().ok().as_ref()),
            },
            Some(Err(_broken)) => Err(WireError::Request),
            None => self.finish(None),
        }
    }

    fn take_data(&mut self, data: Bytes) -> Result<(), WireError> {
        if data.is_empty() {
            return Ok(());
        }
        match &mut self.coding {
            Coding::Length(left) => {
                // More than was announced would be taken for another request.
                *left = left.checked_sub(data.len() as u64).ok_or(WireError::Request)?;
                self.ended = *left == 0;
            }
            Coding::Chunked => {
                self.encoded.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
                self.tail = b"\r\n";
            }
        }
        if self.encoded.len() + data.len() <= COPY_BYTES {
            self.encoded.extend_from_slice(&data);
            self.encoded.extend_from_slice(std::mem::take(&mut self.tail));
        } else {
            self.data = data;
        }
        Ok(())
    }

    fn finish(&mut self, trailers: Option<&HeaderMap>) -> Result<(), WireError> {
        self.ended = true;
        match self.coding {
            Coding::Length(0) => {}
            Coding::Length(_) => return Err(WireError::Request),
            Coding::Chunked => {
                self.encoded.extend_from_slice(b"0\r\n");
                for (name, value) in trailers.into_iter().flatten() {
                    // Framing fields are not for trailers (RFC 9110 section 6.5.1).
                    if ![header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::HOST]
                        .contains(name)
                    {
                        field(&mut self.encoded, name.as_str(), value.as_bytes());
                    }
                }
                self.encoded.extend_from_slice(b"\r\n");
            }
        }
        Ok(())
    }
}

/// The head, with the framing that `coding` needs, whatever the head says of it. The types of the `http` crate admit
/// neither line ends nor spaces where they would end something.
fn encode(head: &request::Parts, coding: Coding) -> Vec<u8> {
    let mut out = Vec::with_capacity(512);
    out.extend_from_slice(head.method.as_str().as_bytes());
    out.push(b' ');
    let target = head.uri.path_and_query().map_or("/", |target| target.as_str());
    out.extend_from_slice(target.as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
    for (name, value) in &head.headers {
        if *name != header::CONTENT_LENGTH && *name != header::TRANSFER_ENCODING {
            field(&mut out, name.as_str(), value.as_bytes());
        }
    }
    let bodiless =
        matches!(head.method, Method::GET | Method::HEAD | Method::DELETE | Method::OPTIONS);
    match coding {
        Coding::Length(0) if bodiless => {}
        Coding::Length(length) => {
            field(&mut out, "content-length", length.to_string().as_bytes());
        }
        Coding::Chunked => field(&mut out, "transfer-encoding", b"chunked"),
    }
    out.extend_from_slice(b"\r\n");
    out
}

fn field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}
