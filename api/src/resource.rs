//! The resources that people write, in YAML or in a cluster: Kubernetes `Service` and `EndpointSlice`, Gateway
//! API `HTTPRoute`, `GRPCRoute`, `ReferenceGrant` and `XBackendTrafficPolicy`, and our own group `duet.dev/v1alpha1`.
//!
//! [`parse`] reads a multi-document file strictly: unknown fields, unknown kinds of our group, wrong units and
//! malformed names are errors with file, line, column and field. Whether references hold is not decided here:
//! that takes all resources together.

mod authorize;
mod core;
mod events;
mod gateway;
mod grant;
mod meta;
mod parse;
mod policy;

pub use self::core::{
    Endpoint, EndpointConditions, EndpointPort, EndpointSlice, IgnoredEq, IntOrName, Service,
    ServicePort, ServiceSpec,
};
pub use authorize::{
    AuthorizationAction, AuthorizationPolicy, AuthorizationPolicySpec, AuthorizationRule,
    AuthorizedFrom, AuthorizedTo, Operation, ProtectedKind, ProtectedRef,
};
pub use events::{
    AfterRelay, Bulk, BusBackend, Database, Delivery, EmbeddedBackend, EventBus, EventBusSpec,
    EventRetry, EventRoute, NatsBackend, NatsTls, OutboxColumns, OutboxSource, OutboxSourceSpec,
    Retention, Start, Subscriber, Subscription, SubscriptionSpec, Topic, TopicSpec,
    is_database_url,
};
pub use gateway::{
    BackendPolicySpec, BackendRef, BackendTarget, Budget, CookieConfig, CookieLifetime, CorsFilter,
    ExtensionRef, FilterType, Fraction, GrpcMatch, GrpcMethodMatch, GrpcRoute, GrpcRule,
    HeaderModifier, HttpFilter, HttpHeader, HttpMatch, HttpRoute, HttpRule, MatchType,
    MirrorFilter, ParentRef, PathMatch, PathMatchType, PathModifier, PathModifierType,
    RedirectFilter, RetryConstraint, RetryRate, RouteRetry, RouteSpec, RouteTimeouts,
    SessionPersistence, SessionType, UrlRewriteFilter, ValueMatch, XBackendTrafficPolicy,
};
pub use grant::{GrantFrom, GrantTo, ReferenceGrant, ReferenceGrantSpec};
pub use meta::{Metadata, ObjectKey};
pub use parse::{Field, Located, Origin, ParseError, Parsed, parse};
pub use policy::{
    Abort, Concurrency, Connections, Delay, Fault, GrpcCode, HashOn, Hedge, HedgeAfter,
    LoadBalancer, LoadBalancerType, OutlierDetection, Rate, RateLimit, Retry, RetryBudget,
    TargetKind, TargetRef, Timeouts, TrafficPolicy, TrafficPolicySpec, ZonePreference,
};

/// API group of Duet's own kinds.
pub const GROUP: &str = "duet.dev";
/// `apiVersion` of Duet's own kinds.
pub const API_VERSION: &str = "duet.dev/v1alpha1";

/// One parsed resource.
#[derive(Clone, Debug, PartialEq)]
pub enum Resource {
    /// `v1` `Service`.
    Service(Service),
    /// `discovery.k8s.io/v1` `EndpointSlice`.
    EndpointSlice(EndpointSlice),
    /// `gateway.networking.k8s.io/v1` `HTTPRoute`.
    HttpRoute(HttpRoute),
    /// `gateway.networking.k8s.io/v1` `GRPCRoute`.
    GrpcRoute(GrpcRoute),
    /// `gateway.networking.x-k8s.io/v1alpha1` `XBackendTrafficPolicy`.
    BackendPolicy(XBackendTrafficPolicy),
    /// `gateway.networking.k8s.io` `ReferenceGrant`.
    ReferenceGrant(ReferenceGrant),
    /// `duet.dev/v1alpha1` `TrafficPolicy`.
    TrafficPolicy(TrafficPolicy),
    /// `duet.dev/v1alpha1` `EventBus`.
    EventBus(EventBus),
    /// `duet.dev/v1alpha1` `Topic`.
    Topic(Topic),
    /// `duet.dev/v1alpha1` `Subscription`.
    Subscription(Subscription),
    /// `duet.dev/v1alpha1` `OutboxSource`.
    OutboxSource(Box<OutboxSource>),
    /// `duet.dev/v1alpha1` `AuthorizationPolicy`.
    AuthorizationPolicy(AuthorizationPolicy),
}

impl Resource {
    /// Kind, namespace and name. Buses and topics are mesh-wide: their namespace is empty.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        match self {
            Self::Service(r) => r.metadata.key("Service"),
            Self::EndpointSlice(r) => r.metadata.key("EndpointSlice"),
            Self::HttpRoute(r) => r.metadata.key("HTTPRoute"),
            Self::GrpcRoute(r) => r.metadata.key("GRPCRoute"),
            Self::BackendPolicy(r) => r.metadata.key("XBackendTrafficPolicy"),
            Self::ReferenceGrant(r) => r.metadata.key("ReferenceGrant"),
            Self::TrafficPolicy(r) => r.metadata.key("TrafficPolicy"),
            Self::EventBus(r) => r.metadata.mesh_wide_key("EventBus"),
            Self::Topic(r) => r.metadata.mesh_wide_key("Topic"),
            Self::Subscription(r) => r.metadata.key("Subscription"),
            Self::OutboxSource(r) => r.metadata.key("OutboxSource"),
            Self::AuthorizationPolicy(r) => r.metadata.key("AuthorizationPolicy"),
        }
    }

    /// What the resource is called and where.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        match self {
            Self::Service(r) => &r.metadata,
            Self::EndpointSlice(r) => &r.metadata,
            Self::HttpRoute(r) => &r.metadata,
            Self::GrpcRoute(r) => &r.metadata,
            Self::BackendPolicy(r) => &r.metadata,
            Self::ReferenceGrant(r) => &r.metadata,
            Self::TrafficPolicy(r) => &r.metadata,
            Self::EventBus(r) => &r.metadata,
            Self::Topic(r) => &r.metadata,
            Self::Subscription(r) => &r.metadata,
            Self::OutboxSource(r) => &r.metadata,
            Self::AuthorizationPolicy(r) => &r.metadata,
        }
    }
}
