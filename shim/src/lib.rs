//! TBD
pub mod config;
