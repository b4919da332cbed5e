//! The control plane.
mod ca;
mod compile;
mod config;
mod index;
mod sources { pub mod files; pub mod yaml; }
mod store;
mod telemetry;
pub mod token;
