//! A plain HTTP request for an application that speaks gRPC: Dapr's `OnInvoke` callback carries it.

use std::time::Duration;

use bytes::Bytes;
use duet_api::dapr::common::v1::http_extension::Verb;
use duet_api::dapr::common::v1::{HttpExtension, InvokeRequest, InvokeResponse};
use http::header::{self, HeaderValue};
use http::{HeaderMap, HeaderName, Method, Response, StatusCode, request};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Incoming;
use prost_types::Any;
use tonic::Status;

use crate::error::{ErrorType, Failure};
use crate::http::body::Body;
use crate::http::{grpc, headers};

/// As gRPC's own limit for messages.
const MAX_BYTES: usize = 4 << 20;
/// The whole body must be here before the application is called.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
const ON_INVOKE: &str = "/dapr.proto.runtime.v1.AppCallback/OnInvoke";

/// The protobuf type of the data, where a gRPC caller gave one.
const TYPE_URL: HeaderName = HeaderName::from_static("dapr-data-type-url");

/// Makes the callback's request of an HTTP request.
///
/// # Errors
/// When the body is too large or does not come.
pub(super) async fn request(
    mut head: request::Parts,
    body: Incoming,
) -> Result<(request::Parts, Body), Failure> {
    let body = read(body).await?;
    let text = |name: &HeaderName| {
        let value = head.headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let invoke = InvokeRequest {
        method: head.uri.path().trim_start_matches('/').to_owned(),
        data: Some(Any { type_url: text(&TYPE_URL), value: body.to_vec() }),
        content_type: text(&header::CONTENT_TYPE),
        http_extension: Some(HttpExtension {
            verb: verb(&head.method).into(),
            querystring: head.uri.query().unwrap_or_default().to_owned(),
        }),
    };
    let (callback, body) = grpc::request(ON_INVOKE, &invoke).into_parts();
    let mut metadata: HeaderMap = HeaderMap::with_capacity(head.headers.len() + 4);
    for (name, value) in &head.headers {
        if grpc::is_metadata(name, value) && name != TYPE_URL {
            metadata.append(name, value.clone());
        }
    }
    headers::replace(&mut metadata, callback.headers);
    head.headers = metadata;
    head.method = callback.method;
    head.uri = callback.uri;
    Ok((head, Body::Full(body)))
}

/// Makes an HTTP response of the callback's answer. A gRPC status stays in the headers beside the HTTP status that it
/// means, for callers that speak gRPC themselves.
pub(super) async fn response(answer: Response<Body>) -> Response<Body> {
    match grpc::answer::<InvokeResponse>(answer, MAX_BYTES).await {
        Ok((metadata, answer)) => {
            let data = answer.data.unwrap_or_default();
            let mut response = Response::new(full(data.value));
            let headers = response.headers_mut();
            for (name, value) in &metadata {
                if grpc::is_metadata(name, value) {
                    headers.append(name, value.clone());
                }
            }
            for (name, value) in
                [(header::CONTENT_TYPE, answer.content_type), (TYPE_URL, data.type_url)]
            {
                if let (false, Ok(value)) = (value.is_empty(), HeaderValue::try_from(value)) {
                    headers.insert(name, value);
                }
            }
            response
        }
        Err(status) => failed(&status),
    }
}

fn failed(status: &Status) -> Response<Body> {
    let text = serde_json::json!({
        "errorCode": "ERR_DIRECT_INVOKE",
        "message": status.message(),
    });
    let mut response = Response::new(full(text.to_string().into()));
    *response.status_mut() = grpc::status(status.code());
    let headers = response.headers_mut();
    // Cannot fail but for details that are no header: then the HTTP status alone has to do.
    if status.add_header(headers).is_err() {
        tracing::debug!(%status, "a gRPC status that cannot be a header");
    }
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn full(data: Vec<u8>) -> Body {
    if data.is_empty() { Body::Empty } else { Body::Full(Bytes::from(data)) }
}

async fn read(body: Incoming) -> Result<Bytes, Failure> {
    let bad = |text: String| Failure::new(ErrorType::HttpRequestError, text);
    match tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, MAX_BYTES).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let text = format!("OnInvoke takes at most {MAX_BYTES} bytes");
            Err(bad(text).with_status(StatusCode::PAYLOAD_TOO_LARGE))
        }
        Ok(Err(error)) => Err(bad(format!("the body ended early: {error}"))),
        Err(_elapsed) => {
            let text = format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs());
            Err(bad(text).with_status(StatusCode::REQUEST_TIMEOUT))
        }
    }
}

fn verb(method: &Method) -> Verb {
    match *method {
        Method::GET => Verb::Get,
        Method::HEAD => Verb::Head,
        Method::POST => Verb::Post,
        Method::PUT => Verb::Put,
        Method::DELETE => Verb::Delete,
        Method::OPTIONS => Verb::Options,
        Method::TRACE => Verb::Trace,
        Method::PATCH => Verb::Patch,
        _ => Verb::None,
    }
}
