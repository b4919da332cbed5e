//! Where the index gets its content: YAML files ([`yaml`]) and the replicas' own registrations ([`workloads`]).
//! Imports [`crate::compile`], [`crate::store`] and below; the sources do not know each other.

pub mod files;
pub mod registry;
pub mod workloads;
pub mod yaml;
