//! HTTP building blocks: bodies, headers, server and client connections, and the one place that turns a
//! failure into a response. Nothing here knows about routes, endpoints or events.

pub mod body;
pub mod browser;
pub mod client;
pub mod cookie;
pub mod deadline;
pub mod grpc;
pub mod headers;
pub mod http1;
pub mod leftover;
pub mod multiplex;
pub mod reply;
pub mod server;
pub mod taken;
pub mod upgrade;
