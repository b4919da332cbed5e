//! The sidecar: carries one workload's calls and relays its events.
//!
//! **The life of a call.** The application sends a request to the outbound listener ([`listen`], [`detect`]).
//! [`outbound`] reads for whom it is, asks [`discovery`] (once; then from memory), finds the rule ([`route`]), applies
//! its [`filter`]s, and tries: [`balance`] chooses an endpoint, [`connect`] gives a connection, [`policy`] says
//! whether a failed try is followed by another. At the other side [`inbound`] verifies who calls ([`identity`]) and
//! passes the request to its application. What happened is counted and logged at the end ([`record`]).
//!
//! **The life of an event.** The application posts it to the API ([`relay`]); it is acknowledged when the bus, or the
//! outbox on this disk, has flushed it. The subscribing service's sidecar pulls it from the bus and posts it to its
//! application until that acknowledges.
//!
//! Every module has a rank, and imports only modules of a lower rank; the test `layering` reads the sources and
//! makes sure. From the top: `app` 9, `admin` 8, `outbound` `inbound` `relay` 7, the stages 6 (`listen` `detect`
//! `route` `filter` `policy` `balance` `connect` `record`), `discovery` `register` 5, `http` 4, `identity` 3,
//! `error` `drain` `net` `telemetry` 2, `config` 1.

pub mod admin;
pub mod app;
pub mod balance;
pub mod config;
pub mod connect;
pub mod detect;
pub mod discovery;
pub mod drain;
pub mod error;
pub mod filter;
pub mod http;
pub mod identity;
pub mod inbound;
pub mod listen;
pub mod net;
pub mod outbound;
pub mod policy;
pub mod record;
pub mod register;
pub mod relay;
pub mod route;
pub mod telemetry;

pub use app::run;
pub use config::Args;
