//! TBD
pub mod devices;
