//! Debian packages the tasks need.
