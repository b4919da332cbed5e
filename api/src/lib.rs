//! The contract of Duet: what people write (resources), what sidecar and control plane say to each other
//! (protobuf), and who they are (SPIFFE names, TLS material, join tokens). Nothing here does I/O, and
//! nothing here imports another crate of the workspace.
//!
//! - [`resource`]: the YAML resources, parsed strictly, each error with file, line and field.
//! - [`proto`]: generated from `proto/duet/v1`; [`dapr`] and [`health`]: from Dapr's and gRPC's own contracts.
//! - [`publish`]: the one message of them that is written by hand.
//! - [`spiffe`]: names of workloads; [`tls`]: TLS configurations that verify them; [`token`]: join tokens.
//! - [`duration`] and [`quantity`]: units as people write them.

pub mod duration;
pub mod publish;
pub mod quantity;
pub mod resource;
pub mod spiffe;
pub mod tls;
pub mod token;

/// Generated from `proto/duet/v1`; the comments there are the documentation.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unused_qualifications,
    unreachable_pub,
    clippy::all,
    clippy::doc_markdown,
    clippy::missing_errors_doc,
    clippy::clone_on_ref_ptr,
    clippy::allow_attributes_without_reason,
    clippy::struct_excessive_bools,
    clippy::too_many_lines,
    clippy::wildcard_imports,
    reason = "generated code"
)]
pub mod proto {
    tonic::include_proto!("duet.v1");
    pub use crate::publish::PublishRequest;
}

/// Generated from `proto/dapr`: the part of Dapr's contract that Duet serves.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unused_qualifications,
    unreachable_pub,
    clippy::all,
    clippy::doc_markdown,
    clippy::missing_errors_doc,
    clippy::clone_on_ref_ptr,
    clippy::allow_attributes_without_reason,
    clippy::struct_excessive_bools,
    clippy::too_many_lines,
    clippy::wildcard_imports,
    reason = "generated code"
)]
pub mod dapr {
    /// What calls and events share.
    pub mod common {
        /// `dapr.proto.common.v1`.
        pub mod v1 {
            tonic::include_proto!("dapr.proto.common.v1");
        }
    }
    /// The sidecar's API and the application's callbacks.
    pub mod runtime {
        /// `dapr.proto.runtime.v1`.
        pub mod v1 {
            tonic::include_proto!("dapr.proto.runtime.v1");
        }
    }
}

/// Generated from `proto/grpc/health`: gRPC's health protocol.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unused_qualifications,
    unreachable_pub,
    clippy::all,
    clippy::doc_markdown,
    clippy::missing_errors_doc,
    clippy::clone_on_ref_ptr,
    clippy::allow_attributes_without_reason,
    clippy::struct_excessive_bools,
    clippy::too_many_lines,
    clippy::wildcard_imports,
    reason = "generated code"
)]
pub mod health {
    tonic::include_proto!("grpc.health.v1");
}

/// Namespace of resources and workloads that name none.
pub const DEFAULT_NAMESPACE: &str = "default";
/// Bus that exists without being declared, served by the control plane.
pub const DEFAULT_BUS: &str = "default";
