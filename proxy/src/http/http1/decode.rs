//! What an HTTP/1.1 response says: its head, and where its body ends (RFC 9112 sections 4, 6 and 7.1). Pure.

use bytes::{Buf as _, Bytes, BytesMut};
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Response, StatusCode, Version};

use super::WireError;

/// Most headers in a response, and most trailers.
const MAX_HEADERS: usize = 128;
/// Largest head, largest trailer section, and most that chunk extensions may take.
pub(super) const MAX_HEAD_BYTES: usize = 64 * 1024;

/// Where a response's body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// There is no more.
    Ended,
    /// After this many bytes, at least one.
    Length(u64),
    /// As the chunks say.
    Chunked(Chunk),
    /// With the connection.
    Close,
}

/// Where in the chunked coding we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    /// Before a chunk's size.
    Size,
    /// This much of the chunk is left, at least one byte.
    Data(u64),
    /// Before the line end behind a chunk's data.
    DataEnd,
    /// Before the trailer section's end.
    Trailers,
}

/// A response's head.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) response: Response<()>,
    pub(super) framing: Framing,
    /// Whether the connection may be used again after the body.
    pub(super) keep_alive: bool,
}

/// Ranges in the buffer: name and value.
type Field = (usize, usize, usize, usize);

/// Takes a response's head from the buffer; `None` when there is more to come. Interim responses (1xx) are skipped:
/// nobody here asked for one.
pub(super) fn head(buffer: &mut BytesMut, method: &Method) -> Result<Option<Head>, WireError> {
    while !buffer.is_empty() {
        let Some((status, version, fields, length)) = parse(buffer)? else {
            return match buffer.len() > MAX_HEAD_BYTES {
                true => Err(WireError::Framing("the response's head is too large")),
                false => Ok(None),
            };
        };
        let bytes = buffer.split_to(length).freeze();
        let status =
            StatusCode::from_u16(status).map_err(|_err| WireError::Framing("no status"))?;
        if status == StatusCode::SWITCHING_PROTOCOLS {
            return Err(WireError::Framing("an upgrade that nobody asked for"));
        }
        if status.is_informational() {
            continue;
        }
        let headers = collect(&bytes, &fields)?;
        let (framing, headers) = framing(status, version, method, headers)?;
        let keep_alive = framing != Framing::Close && keeps_alive(version, &headers);
        let mut response = Response::new(());
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        return Ok(Some(Head { response, framing, keep_alive }));
    }
    Ok(None)
}

type Parsed = (u16, Version, Vec<Field>, usize);

fn parse(buffer: &[u8]) -> Result<Option<Parsed>, WireError> {
    let mut headers = [const { std::mem::MaybeUninit::uninit() }; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    let parsed = config.parse_response_with_uninit_headers(&mut response, buffer, &mut headers)?;
    let httparse::Status::Complete(length) = parsed else {
        return Ok(None);
    };
    let version = match response.version {
        Some(0) => Version::HTTP_10,
        _ => Version::HTTP_11,
    };
    let base = buffer.as_ptr() as usize;
    let range = |part: &[u8]| {
        let start = (part.as_ptr() as usize).saturating_sub(base);
        (start, start + part.len())
    };
    let field = |header: &httparse::Header<'_>| {
        let ((a, b), (c, d)) = (range(header.name.as_bytes()), range(header.value));
        (a, b, c, d)
    };
    let fields = response.headers.iter().map(field).collect();
    Ok(Some((response.code.unwrap_or_default(), version, fields, length)))
}

/// The fields as a map whose values share the head's bytes.
fn collect(bytes: &Bytes, fields: &[Field]) -> Result<HeaderMap, WireError> {
    let mut headers = HeaderMap::with_capacity(fields.len());
    for &(a, b, c, d) in fields {
        let name = HeaderName::from_bytes(bytes.get(a..b).unwrap_or_default())
            .map_err(|_err| WireError::Framing("a malformed header name"))?;
        // An empty value has no place in the buffer that could be told.
        let value = if c == d { Bytes::new() } else { bytes.slice(c..d) };
        let value = HeaderValue::from_maybe_shared(value)
            .map_err(|_err| WireError::Framing("a malformed header value"))?;
        headers.try_append(name, value).map_err(|_err| WireError::Framing("too many headers"))?;
    }
    Ok(headers)
}

/// RFC 9112 section 6.3.
fn framing(
    status: StatusCode,
    version: Version,
    method: &Method,
    mut headers: HeaderMap,
) -> Result<(Framing, HeaderMap), WireError> {
    let bodiless = *method == Method::HEAD
        || status == StatusCode::NO_CONTENT
        || status == StatusCode::NOT_MODIFIED;
    if bodiless {
        return Ok((Framing::Ended, headers));
    }
    // Looking over the few names that are there is cheaper than a hashed look-up.
    if headers.keys().any(|name| *name == header::TRANSFER_ENCODING) {
        let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
        let coding = codings.next().map(HeaderValue::as_bytes).unwrap_or_default();
        // Others were not asked for with `TE`, and would be lost with the header, which is for one hop.
        let is_chunked = coding.trim_ascii().eq_ignore_ascii_case(b"chunked");
        if version == Version::HTTP_10 || !is_chunked || codings.next().is_some() {
            return Err(WireError::Framing("a transfer coding that is not chunked"));
        }
        // The chunks win, and nobody behind us may see another length.
        headers.remove(header::CONTENT_LENGTH);
        return Ok((Framing::Chunked(Chunk::Size), headers));
    }
    let length = content_length(&headers)?;
    Ok((
        match length {
            Some(0) => Framing::Ended,
            Some(length) => Framing::Length(length),
            None => Framing::Close,
        },
        headers,
    ))
}

/// The one length that all `Content-Length` fields agree on.
fn content_length(headers: &HeaderMap) -> Result<Option<u64>, WireError> {
    let bad = WireError::Framing("a malformed Content-Length");
    let mut length = None;
    for value in headers.get_all(header::CONTENT_LENGTH) {
        for part in value.as_bytes().split(|byte| *byte == b',') {
            let digits = part.trim_ascii();
            let number = std::str::from_utf8(digits).ok().filter(|text| !text.starts_with('+'));
            let number = number.and_then(|text| text.parse::<u64>().ok());
            match (number, length) {
                (Some(number), None) => length = Some(number),
                (Some(number), Some(other)) if number == other => {}
                _ => return Err(bad),
            }
        }
    }
    Ok(length)
}

fn keeps_alive(version: Version, headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::CONNECTION);
    // What most servers say, told without taking it apart.
    if version == Version::HTTP_11 && values.iter().all(|value| value == "keep-alive") {
        return true;
    }
    let mut tokens = values
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim);
    if version == Version::HTTP_10 {
        return tokens.any(|token| token.eq_ignore_ascii_case("keep-alive"));
    }
    !tokens.any(|token| token.eq_ignore_ascii_case("close"))
}

/// What came out of a chunked body.
#[derive(Debug, PartialEq)]
pub(super) enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
    End,
}

/// Takes the next piece of a chunked body from the buffer; `None` when there is more to come.
pub(super) fn chunk(buffer: &mut BytesMut, at: &mut Chunk) -> Result<Option<Piece>, WireError> {
    loop {
        match *at {
            // httparse takes a size without digits for 0.
            Chunk::Size if buffer.first().is_some_and(|byte| !byte.is_ascii_hexdigit()) => {
                return Err(WireError::Framing("a malformed chunk size"));
            }
            Chunk::Size => match httparse::parse_chunk_size(buffer) {
                Ok(httparse::Status::Complete((length, size))) => {
                    buffer.advance(length);
                    *at = if size == 0 { Chunk::Trailers } else { Chunk::Data(size) };
                }
                Ok(httparse::Status::Partial) if buffer.len() > MAX_HEAD_BYTES => {
                    return Err(WireError::Framing("a chunk extension is too large"));
                }
                Ok(httparse::Status::Partial) => return Ok(None),
                Err(_invalid) => return Err(WireError::Framing("a malformed chunk size")),
            },
            Chunk::Data(left) => {
                if buffer.is_empty() {
                    return Ok(None);
                }
                let take = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
                let rest = left - take as u64;
                *at = if rest == 0 { Chunk::DataEnd } else { Chunk::Data(rest) };
                return Ok(Some(Piece::Data(buffer.split_to(take).freeze())));
            }
            Chunk::DataEnd => match buffer.get(..2) {
                Some(b"\r\n") => {
                    buffer.advance(2);
                    *at = Chunk::Size;
                }
                Some(_) => return Err(WireError::Framing("a chunk without an end")),
                None => return Ok(None),
            },
            Chunk::Trailers => return trailers(buffer),
        }
    }
}

fn trailers(buffer: &mut BytesMut) -> Result<Option<Piece>, WireError> {
    if buffer.starts_with(b"\r\n") {
        buffer.advance(2);
        return Ok(Some(Piece::End));
    }
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let httparse::Status::Complete((length, found)) =
        httparse::parse_headers(buffer, &mut headers)?
    else {
        return match buffer.len() > MAX_HEAD_BYTES {
            true => Err(WireError::Framing("the trailers are too large")),
            false => Ok(None),
        };
    };
    let mut trailers = HeaderMap::with_capacity(found.len());
    for field in found {
        let name = HeaderName::from_bytes(field.name.as_bytes());
        let value = HeaderValue::from_bytes(field.value);
        let (Ok(name), Ok(value)) = (name, value) else {
            return Err(WireError::Framing("a malformed trailer"));
        };
        trailers.append(name, value);
    }
    buffer.advance(length);
    Ok(Some(Piece::Trailers(trailers)))
}

#[cfg(test)]
#[path = "decode_tests.rs"]
mod tests;
