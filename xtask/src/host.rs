//! What this machine is: hardware virtualization or not.
