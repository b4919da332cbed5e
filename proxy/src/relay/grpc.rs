//! Dapr's gRPC API: the same operations as over HTTP, and the streaming subscription. Which methods there are is
//! in `api/proto/dapr`; all others of Dapr's are answered with `UNIMPLEMENTED`.

mod callback;
mod counted;
mod down;
mod invoke;
mod labels;
mod publish;
mod sent;
mod stream;
mod topic_event;

use std::sync::Arc;

use duet_api::dapr::common::v1::InvokeResponse;
use duet_api::dapr::runtime::v1::dapr_server::{Dapr, DaprServer};
use duet_api::dapr::runtime::v1::{
    BulkPublishRequest, BulkPublishResponse, GetMetadataRequest, GetMetadataResponse,
    InvokeServiceRequest, PublishEventRequest, PubsubSubscription, PubsubSubscriptionRule,
    PubsubSubscriptionRules, PubsubSubscriptionType, RegisteredComponents, SetMetadataRequest,
    ShutdownRequest, SubscribeTopicEventsRequestAlpha1,
};
use duet_api::health::health_check_response::ServingStatus;
use duet_api::health::health_server::{Health, HealthServer};
use duet_api::health::{HealthCheckRequest, HealthCheckResponse};
use duet_events::bus::SubscriptionSpec;
use hyper::body::Incoming;
use tonic::codegen::Service as _;
use tonic::{Code, Request, Response, Status, Streaming};

use super::active::Kind;
use super::api::{Api, DAPR_APP_ID};
use super::problem::Problem;
use crate::http::body::Body;
use crate::http::grpc;

use counted::Counted;

pub(super) use callback::{Callback, ask};
pub(super) use labels::Labels;

const DAPR: &str = "/dapr.proto.runtime.v1.Dapr/";
const HEALTH: &str = "/grpc.health.v1.Health/";
/// What else a message holds besides a body of the largest size.
const ENVELOPE_BYTES: usize = 64 * 1024;

/// Whether a gRPC call is for the sidecar itself, and not to be carried into the mesh.
pub(super) fn is_own(request: &http::Request<Incoming>) -> bool {
    let path = request.uri().path();
    path.starts_with(DAPR)
        || path.starts_with(HEALTH)
        || !request.headers().contains_key(DAPR_APP_ID)
}

/// Answers a gRPC call to the sidecar itself.
pub(super) async fn answer(
    api: &Arc<Api>,
    request: http::Request<Incoming>,
) -> http::Response<Body> {
    let path = request.uri().path();
    let Some(method) = path.strip_prefix(DAPR) else {
        if path.starts_with(HEALTH) {
            let mut service = HealthServer::new(Server(Arc::clone(api)));
            let Ok(response) = service.call(request).await;
            return response.map(Body::Served);
        }
        return unimplemented(path);
    };
    if !SERVED.contains(&method) {
        return unimplemented(path);
    }
    let limit = api.config.max_body_bytes.saturating_add(ENVELOPE_BYTES);
    let service = DaprServer::new(Server(Arc::clone(api)));
    let mut service = service.max_decoding_message_size(limit).max_encoding_message_size(limit);
    let Ok(response) = service.call(Counted::of(request, &api.publishing)).await;
    response.map(Body::Served)
}

const SERVED: [&str; 8] = [
    "InvokeService",
    "PublishEvent",
    "BulkPublishEvent",
    "BulkPublishEventAlpha1",
    "SubscribeTopicEventsAlpha1",
    "GetMetadata",
    "SetMetadata",
    "Shutdown",
];

fn unimplemented(path: &str) -> http::Response<Body> {
    let path: String = path.chars().take(128).collect();
    let text = format!(
        "{path}: of Dapr's API, Duet serves {}; a call into the mesh names its service with the metadata dapr-app-id",
        SERVED.join(", ")
    );
    Status::unimplemented(text).into_http()
}

impl From<Problem> for Status {
    fn from(problem: Problem) -> Self {
        let meant = grpc::code(problem.status);
        let code = if meant == Code::Cancelled {
            // A body that did not come in time: nobody cancelled anything.
            Code::DeadlineExceeded
        } else if meant == Code::Unknown && problem.status.is_client_error() {
            Code::InvalidArgument
        } else if meant == Code::Unknown {
            Code::Internal
        } else {
            meant
        };
        Self::new(code, format!("{}: {}", problem.code, problem.message))
    }
}

/// The services, for one call.
struct Server(Arc<Api>);

#[tonic::async_trait]
impl Dapr for Server {
    async fn invoke_service(
        &self,
        request: Request<InvokeServiceRequest>,
    ) -> Result<Response<InvokeResponse>, Status> {
        invoke::invoke(&self.0, request).await
    }

    async fn publish_event(
        &self,
        request: Request<PublishEventRequest>,
    ) -> Result<Response<()>, Status> {
        publish::one(&self.0, request).await.map(Response::new)
    }

    async fn bulk_publish_event_alpha1(
        &self,
        request: Request<BulkPublishRequest>,
    ) -> Result<Response<BulkPublishResponse>, Status> {
        publish::bulk(&self.0, request).await.map(Response::new)
    }

    async fn bulk_publish_event(
        &self,
        request: Request<BulkPublishRequest>,
    ) -> Result<Response<BulkPublishResponse>, Status> {
        publish::bulk(&self.0, request).await.map(Response::new)
    }

    type SubscribeTopicEventsAlpha1Stream = stream::Events;

    async fn subscribe_topic_events_alpha1(
        &self,
        request: Request<Streaming<SubscribeTopicEventsRequestAlpha1>>,
    ) -> Result<Response<stream::Events>, Status> {
        stream::open(&self.0, request.into_inner()).await.map(Response::new)
    }

    async fn get_metadata(
        &self,
        _request: Request<GetMetadataRequest>,
    ) -> Result<Response<GetMetadataResponse>, Status> {
        Ok(Response::new(metadata(&self.0)))
    }

    async fn set_metadata(
        &self,
        request: Request<SetMetadataRequest>,
    ) -> Result<Response<()>, Status> {
        let SetMetadataRequest { key, value } = request.into_inner();
        self.0.labels.set(key, value)?;
        Ok(Response::new(()))
    }

    async fn shutdown(&self, _request: Request<ShutdownRequest>) -> Result<Response<()>, Status> {
        self.0.shut_down();
        Ok(Response::new(()))
    }
}

#[tonic::async_trait]
impl Health for Server {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let service = request.into_inner().service;
        if !["", "dapr.proto.runtime.v1.Dapr"].contains(&service.as_str()) {
            return Err(Status::not_found("no such service"));
        }
        let ready = self.0.is_ready(false);
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        Ok(Response::new(HealthCheckResponse { status: status.into() }))
    }
}

fn metadata(api: &Api) -> GetMetadataResponse {
    let component = |name| RegisteredComponents {
        name,
        r#type: "pubsub.duet".to_owned(),
        version: "v1".to_owned(),
        capabilities: Vec::new(),
    };
    let mut extended = api.labels.all();
    extended.extend(api.extended());
    GetMetadataResponse {
        id: api.config.services.first().cloned().unwrap_or_default(),
        registered_components: api.buses.names().into_iter().map(component).collect(),
        extended_metadata: extended.into_iter().collect(),
        subscriptions: api.subscriptions().into_iter().map(subscription).collect(),
        app_connection_properties: None,
        runtime_version: super::api::VERSION.to_owned(),
    }
}

fn subscription((kind, spec): (Kind, SubscriptionSpec)) -> PubsubSubscription {
    let rule = |matches: &str, path: &str| PubsubSubscriptionRule {
        r#match: matches.to_owned(),
        path: path.to_owned(),
    };
    let routes = spec.routes.iter().map(|route| rule(&route.matches, &route.path));
    let main = (!spec.path.is_empty()).then(|| rule("", &spec.path));
    let rules = routes.chain(main).collect();
    let kind = match kind {
        Kind::Declarative => PubsubSubscriptionType::Declarative,
        Kind::Programmatic => PubsubSubscriptionType::Programmatic,
        Kind::Streaming => PubsubSubscriptionType::Streaming,
    };
    PubsubSubscription {
        pubsub_name: spec.bus,
        topic: spec.topic,
        metadata: Default::default(),
        rules: Some(PubsubSubscriptionRules { rules }),
        dead_letter_topic: spec.dead_letter_topic,
        r#type: kind.into(),
    }
}
