//! Policies of a call, one file each: pure state machines.

pub mod budget;
pub mod retry;
