//! One gRPC call with one message each way, over whatever carries HTTP/2: framing, status, and the mapping
//! between gRPC codes and HTTP statuses that Dapr has.

use bytes::{BufMut as _, Bytes, BytesMut};
use http::header::{self, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use prost::Message;
use tonic::{Code, Status};

use super::body::Body;

/// Compression flag and length.
const PREFIX_BYTES: usize = 5;

/// A request for `path` (`/package.Service/Method`) with one message.
#[must_use]
pub fn request<M: Message>(path: &'static str, message: &M) -> Request<Bytes> {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(PREFIX_BYTES + length);
    framed.put_u8(0);
    // Messages are bounded far below 4 GiB where they come in.
    framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    framed.put_slice(&message.encode_to_vec());
    let mut request = Request::new(framed.freeze());
    *request.method_mut() = Method::POST;
    *request.uri_mut() = Uri::from_static(path);
    let headers = request.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(header::TE, HeaderValue::from_static("trailers"));
    request
}

/// The answer's metadata and its one message, of at most `limit` bytes.
///
/// # Errors
/// The status of the answer where it is not OK, or what is wrong with the answer.
pub async fn answer<M: Message + Default>(
    response: Response<Body>,
    limit: usize,
) -> Result<(HeaderMap, M), Status> {
    let (head, body) = response.into_parts();
    if head.status != StatusCode::OK {
        let text = format!("the answer has the HTTP status {}", head.status);
        return Err(Status::new(code_without_grpc(head.status), text));
    }
    if let Some(status) = Status::from_header_map(&head.headers)
        && status.code() != Code::Ok
    {
        return Err(status);
    }
    let read = Limited::new(body, limit.saturating_add(PREFIX_BYTES)).collect().await;
    let read = read.map_err(|error| match error.is::<LengthLimitError>() {
        true => Status::resource_exhausted(format!("the answer has more than {limit} bytes")),
        false => Status::unavailable(format!("the answer ended early: {error}")),
    })?;
    let status = read.trailers().and_then(Status::from_header_map);
    match status.or_else(|| Status::from_header_map(&head.headers)) {
        Some(status) if status.code() == Code::Ok => {}
        Some(status) => return Err(status),
        None => return Err(Status::unknown("the answer has no gRPC status")),
    }
    let message = M::decode(unframe(&read.to_bytes())?)
        .map_err(|error| Status::internal(format!("the answer cannot be read: {error}")))?;
    Ok((head.headers, message))
}

fn unframe(framed: &Bytes) -> Result<Bytes, Status> {
    let bad = |text: &str| Status::internal(format!("the answer cannot be read: {text}"));
    let (prefix, message) =
        framed.split_at_checked(PREFIX_BYTES).ok_or_else(|| bad("it has no message"))?;
    let [compressed, length @ ..] = prefix else { return Err(bad("it has no message")) };
    let length: [u8; 4] = length.try_into().unwrap_or_default();
    if *compressed != 0 {
        return Err(bad("it is compressed"));
    }
    if u32::from_be_bytes(length) as usize != message.len() {
        return Err(bad("its length is wrong"));
    }
    Ok(framed.slice(PREFIX_BYTES..))
}

/// The gRPC code of an answer that is HTTP alone, as of a server that does not know the method:
/// <https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md>.
fn code_without_grpc(status: StatusCode) -> Code {
    match status {
        StatusCode::BAD_REQUEST => Code::Internal,
        StatusCode::UNAUTHORIZED => Code::Unauthenticated,
        StatusCode::FORBIDDEN => Code::PermissionDenied,
        StatusCode::NOT_FOUND => Code::Unimplemented,
        StatusCode::TOO_MANY_REQUESTS
        | StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT => Code::Unavailable,
        _ => Code::Unknown,
    }
}

/// The gRPC code that says what an HTTP status does.
#[must_use]
pub fn code(status: StatusCode) -> Code {
    match status {
        StatusCode::BAD_REQUEST => Code::InvalidArgument,
        StatusCode::UNAUTHORIZED => Code::Unauthenticated,
        StatusCode::FORBIDDEN => Code::PermissionDenied,
        StatusCode::NOT_FOUND => Code::NotFound,
        StatusCode::REQUEST_TIMEOUT => Code::Cancelled,
        StatusCode::CONFLICT => Code::AlreadyExists,
        StatusCode::PAYLOAD_TOO_LARGE | StatusCode::TOO_MANY_REQUESTS => Code::ResourceExhausted,
        StatusCode::NOT_IMPLEMENTED => Code::Unimplemented,
        StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE => Code::Unavailable,
        StatusCode::GATEWAY_TIMEOUT => Code::DeadlineExceeded,
        _ => Code::Unknown,
    }
}

/// The HTTP status that says what a gRPC code does.
#[must_use]
pub fn status(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        Code::Cancelled => StatusCode::REQUEST_TIMEOUT,
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => {
            StatusCode::BAD_REQUEST
        }
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Whether a header may travel as gRPC metadata: not the transport's own, and text.
#[must_use]
pub fn is_metadata(name: &header::HeaderName, value: &HeaderValue) -> bool {
    let own = name == header::CONTENT_TYPE
        || name == header::CONTENT_LENGTH
        || name == header::CONTENT_ENCODING
        || name == header::ACCEPT_ENCODING
        || name == header::HOST
        || name == header::TE
        || name == header::TRAILER
        || name == header::USER_AGENT
        || name == header::DATE
        || name == header::EXPECT
        || name.as_str().starts_with("grpc-");
    !own && !name.as_str().ends_with("-bin") && value.to_str().is_ok()
}

#[cfg(test)]
mod tests {
    use duet_api::dapr::common::v1::InvokeResponse;

    use super::*;

    fn response(body: &'static [u8], status: &'static str) -> Response<Body> {
        let mut response = Response::new(Body::Full(Bytes::from_static(body)));
        response.headers_mut().insert("grpc-status", HeaderValue::from_static(status));
        response
    }

    async fn read(body: &'static [u8], status: &'static str) -> Result<String, Status> {
        let answer = answer::<InvokeResponse>(response(body, status), 16).await;
        answer.map(|(_headers, message)| message.content_type)
    }

    #[tokio::test]
    async fn an_answer_is_one_message_of_the_length_that_it_says() {
        assert_eq!(read(b"\0\0\0\0\x03\x12\x01a", "0").await.unwrap(), "a");
        for bad in [
            &b""[..],
            b"\0\0\0",
            b"\0\0\0\0\x04\x12\x01a",
            b"\x01\0\0\0\x03\x12\x01a",
            b"\0\0\0\0\x02\x12\x09",
        ] {
            assert_eq!(read(bad, "0").await.unwrap_err().code(), Code::Internal, "{bad:?}");
        }
        assert_eq!(read(&[0; 32], "0").await.unwrap_err().code(), Code::ResourceExhausted);
        assert_eq!(read(b"", "5").await.unwrap_err().code(), Code::NotFound);
    }

    #[tokio::test]
    async fn a_server_that_answers_in_http_alone_is_understood() {
        for (status, code) in
            [(404, Code::Unimplemented), (503, Code::Unavailable), (418, Code::Unknown)]
        {
            let mut response = Response::new(Body::Empty);
            *response.status_mut() = StatusCode::from_u16(status).unwrap();
            let answer = answer::<InvokeResponse>(response, 16).await;
            assert_eq!(answer.unwrap_err().code(), code, "{status}");
        }
    }

    #[test]
    fn codes_survive_the_way_through_http() {
        for same in [
            Code::InvalidArgument,
            Code::Unauthenticated,
            Code::PermissionDenied,
            Code::NotFound,
            Code::AlreadyExists,
            Code::ResourceExhausted,
            Code::Unimplemented,
            Code::Unavailable,
            Code::DeadlineExceeded,
        ] {
            assert_eq!(code(status(same)), same);
        }
    }
}
