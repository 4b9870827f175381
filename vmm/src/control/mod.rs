//! How others reach the running machine (`rvm_protocol::vmm`): its owner through
//! a descriptor that the monitor inherits ([`channel`]), anybody who may open a
//! path, to look only, through a socket ([`socket`]).

pub mod channel;
pub mod socket;

/// What is to be done about a connection after it was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// Nothing.
    Open,
    /// It has ended; its descriptor is closed or of no further use.
    Closed,
}
