//! Policies of a call, one file each: pure state machines.

pub mod budget;
pub mod concurrency;
pub mod fault;
pub mod hedge;
pub mod outlier;
pub mod rate;
pub mod retry;
