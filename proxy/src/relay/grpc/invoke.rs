//! `InvokeService`: an HTTP request into the mesh. What a gRPC application gets of it is made by its own sidecar.

use bytes::Bytes;
use duet_api::dapr::common::v1::http_extension::Verb;
use duet_api::dapr::common::v1::{HttpExtension, InvokeResponse};
use duet_api::dapr::runtime::v1::InvokeServiceRequest;
use http::header::{self, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, StatusCode};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use prost_types::Any;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status};

use super::super::api::Api;
use super::super::invoke::aim;
use crate::http::body::{Body, Upload};
use crate::http::grpc;

/// The protobuf type of the data; the called side's sidecar gives it to a gRPC application.
const TYPE_URL: HeaderName = HeaderName::from_static("dapr-data-type-url");
/// Most of an error's body that becomes the status message.
const MAX_MESSAGE_BYTES: usize = 1024;

pub(super) async fn invoke(
    api: &Api,
    request: Request<InvokeServiceRequest>,
) -> Result<Response<InvokeResponse>, Status> {
    let (metadata, _extensions, message) = request.into_parts();
    let request = outgoing(&metadata, message)?;
    let response = (api.invoke)(request).await;
    incoming(response, api.config.max_body_bytes).await
}

fn outgoing(
    metadata: &MetadataMap,
    message: InvokeServiceRequest,
) -> Result<http::Request<Upload>, Status> {
    let InvokeServiceRequest { id, message } = message;
    let message = message.ok_or_else(|| Status::invalid_argument("message is missing"))?;
    let data = message.data.unwrap_or_default();
    let extension = message.http_extension.unwrap_or_default();
    let target = target(&message.method, &extension.querystring)?;
    let mut request = http::Request::new(Upload::Whole(Bytes::from(data.value)));
    *request.method_mut() = method(&extension)?;
    let headers = request.headers_mut();
    let metadata: &HeaderMap = metadata.as_ref();
    for (name, value) in metadata {
        if grpc::is_metadata(name, value) {
            headers.append(name.clone(), value.clone());
        }
    }
    let own = [
        (header::CONTENT_TYPE, "content_type", message.content_type),
        (TYPE_URL, "data.type_url", data.type_url),
    ];
    for (name, field, value) in own {
        if !value.is_empty() {
            let value = HeaderValue::try_from(value)
                .map_err(|error| Status::invalid_argument(format!("{field}: {error}")))?;
            headers.insert(name, value);
        }
    }
    aim(&mut request, &id, target)?;
    Ok(request)
}

fn target(method: &str, query: &str) -> Result<PathAndQuery, Status> {
    let mark = if query.is_empty() { "" } else { "?" };
    let target = format!("/{}{mark}{query}", method.trim_start_matches('/'));
    PathAndQuery::try_from(target)
        .map_err(|error| Status::invalid_argument(format!("method {method:?}: {error}")))
}

fn method(extension: &HttpExtension) -> Result<Method, Status> {
    let verb = Verb::try_from(extension.verb)
        .map_err(|error| Status::invalid_argument(format!("http_extension.verb: {error}")))?;
    Ok(match verb {
        Verb::None | Verb::Post => Method::POST,
        Verb::Get => Method::GET,
        Verb::Head => Method::HEAD,
        Verb::Put => Method::PUT,
        Verb::Delete => Method::DELETE,
        Verb::Options => Method::OPTIONS,
        Verb::Trace => Method::TRACE,
        Verb::Patch => Method::PATCH,
        Verb::Connect => {
            return Err(Status::invalid_argument("http_extension.verb: CONNECT is no call"));
        }
    })
}

async fn incoming(
    response: http::Response<Body>,
    limit: usize,
) -> Result<Response<InvokeResponse>, Status> {
    let (head, body) = response.into_parts();
    let body = Limited::new(body, limit).collect().await.map_err(|error| match error
        .is::<LengthLimitError>(
    ) {
        true => Status::resource_exhausted(format!("the answer has more than {limit} bytes")),
        false => Status::unavailable(format!("the answer ended early: {error}")),
    })?;
    let body = body.to_bytes();
    if !head.status.is_success() {
        return Err(failed(head.status, &head.headers, &body));
    }
    let text = |name: &HeaderName| {
        let value = head.headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let message = InvokeResponse {
        data: Some(Any { type_url: text(&TYPE_URL), value: body.to_vec() }),
        content_type: text(&header::CONTENT_TYPE),
    };
    let mut kept = HeaderMap::with_capacity(head.headers.len());
    for (name, value) in &head.headers {
        if grpc::is_metadata(name, value) && name != TYPE_URL {
            kept.append(name, value.clone());
        }
    }
    let mut response = Response::new(message);
    *response.metadata_mut() = MetadataMap::from_headers(kept);
    Ok(response)
}

/// The called application's own gRPC status where its sidecar passed one on, else the one that says what the HTTP
/// status does.
fn failed(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Status {
    let own = Status::from_header_map(headers).filter(|own| own.code() != Code::Ok);
    own.unwrap_or_else(|| {
        let body = body.get(..MAX_MESSAGE_BYTES).unwrap_or(body);
        let text = String::from_utf8_lossy(body);
        Status::new(grpc::code(status), format!("the service answered {status}: {text}"))
    })
}
