//! The errors a caller of the agent can see, and how errors are worded.

use nix::errno::Errno;
use rvm_protocol::{guest::MAX_ID_LEN, netlink::Refusal};

/// What a request can fail with. The variant decides the ttrpc status code.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of the request is wrong.
    #[error("{field}: {reason}")]
    Invalid {
        /// Name of the field as in `agent.proto`.
        field: String,
        /// What is wrong with it and what would be right.
        reason: String,
    },
    /// What the request names does not exist (any more).
    #[error("{0}")]
    NotFound(String),
    /// What the request makes exists already.
    #[error("{0}")]
    AlreadyExists(String),
    /// The request does not fit the state the object is in.
    #[error("{0}")]
    Precondition(String),
    /// An image of layers that is no file system.
    #[error("{0}")]
    Image(StepError),
    /// A step in the guest failed.
    #[error(transparent)]
    Step(#[from] StepError),
}

impl Error {
    /// An [`Error::Invalid`].
    pub fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), reason: reason.into() }
    }
}

/// One step that failed. Steps run in children too, where an error crosses a
/// process boundary as its number and its text; so there is one type for all of them.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The kernel refused.
    #[error("{step}: {}", describe(*.errno))]
    Kernel {
        /// What was tried, e.g. `mount "proc" at "/proc"`.
        step: String,
        /// Why not.
        #[source]
        errno: Errno,
    },
    /// The step cannot be taken as asked, or a child reported why it failed.
    #[error("{0}")]
    Refused(String),
}

/// Result of one step.
pub type StepResult<T> = Result<T, StepError>;

/// Names the step a failed system call belongs to.
pub trait Step<T> {
    /// `step` is only evaluated on failure.
    fn step<S: Into<String>>(self, step: impl FnOnce() -> S) -> StepResult<T>;
}

impl<T> Step<T> for nix::Result<T> {
    fn step<S: Into<String>>(self, step: impl FnOnce() -> S) -> StepResult<T> {
        self.map_err(|errno| StepError::Kernel { step: step().into(), errno })
    }
}

impl<T> Step<T> for std::io::Result<T> {
    fn step<S: Into<String>>(self, step: impl FnOnce() -> S) -> StepResult<T> {
        self.map_err(|error| match error.raw_os_error() {
            Some(errno) => StepError::Kernel { step: step().into(), errno: Errno::from_raw(errno) },
            None => StepError::Refused(format!("{}: {error}", step().into())),
        })
    }
}

impl<T> Step<T> for Result<T, Refusal> {
    fn step<S: Into<String>>(self, step: impl FnOnce() -> S) -> StepResult<T> {
        self.map_err(|Refusal { errno, text }| match text.is_empty() {
            true => StepError::Kernel { step: step().into(), errno },
            false => StepError::Refused(format!("{}: {} ({text})", step().into(), describe(errno))),
        })
    }
}

/// The error in the words users of runc know: `no such file or directory`.
pub fn describe(errno: Errno) -> String {
    let text = errno.desc();
    let mut chars = text.chars();
    // Names such as "RFS specific error" keep their capitals.
    match (chars.next(), chars.clone().next()) {
        (Some(first), Some(second)) if !second.is_uppercase() => first.to_lowercase().chain(chars).collect(),
        _ => text.to_owned(),
    }
}

/// The error and everything that caused it, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Checks a container or exec id: it becomes the name of directories.
pub fn check_id(field: &str, id: &str) -> Result<(), Error> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if id.is_empty() || id.len() > MAX_ID_LEN {
        return Err(Error::invalid(
            field,
            format!("must have 1 to {MAX_ID_LEN} characters, has {}", id.len()),
        ));
    }
    if !id.chars().all(allowed) || !id.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Err(Error::invalid(
            field,
            format!(
                "{id:?} must consist of letters, digits, '_', '.' and '-' and start with a letter or digit"
            ),
        ));
    }
    Ok(())
}

/// Longest host name the kernel takes (`__NEW_UTS_LEN`).
const HOST_NAME_MAX: usize = 64;

/// Checks a host or domain name, which may be empty.
pub fn check_name(field: &str, name: &str) -> Result<(), Error> {
    if name.len() > HOST_NAME_MAX || name.contains('\0') {
        return Err(Error::invalid(
            field,
            format!("{name:?} must have at most {HOST_NAME_MAX} bytes and no NUL"),
        ));
    }
    Ok(())
}

/// Checks a path that must stay below a directory: relative, without `..`.
pub fn check_relative(field: &str, path: &str) -> Result<(), Error> {
    if path.is_empty() || path.starts_with('/') || path.contains('\0') {
        return Err(Error::invalid(field, format!("{path:?} must be a relative path")));
    }
    if path.split('/').any(|part| part == "..") {
        return Err(Error::invalid(field, format!("{path:?} must not contain \"..\"")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_read_as_runc_words_them() {
        assert_eq!(describe(Errno::ENOENT), "no such file or directory");
        assert_eq!(describe(Errno::EPERM), "operation not permitted");
        assert_eq!(describe(Errno::ENOEXEC), "exec format error");
        let error: StepResult<()> = Err(Errno::EISDIR).step(|| "open \"/etc\"");
        let error = Error::from(error.unwrap_err());
        assert_eq!(error.to_string(), "open \"/etc\": is a directory");
        assert_eq!(chain(&error), "open \"/etc\": is a directory: EISDIR: Is a directory");
    }

    #[test]
    fn ids_name_directories_and_nothing_else() {
        let longest = "x".repeat(MAX_ID_LEN);
        for id in ["a", "web-1", "A.b_c", "0", longest.as_str()] {
            assert!(check_id("container_id", id).is_ok(), "{id}");
        }
        let too_long = "x".repeat(MAX_ID_LEN + 1);
        for id in ["", ".", "..", "a/b", "../a", "a b", "-a", "ä", "a\0", "a\tb", too_long.as_str()] {
            let error = check_id("container_id", id).unwrap_err().to_string();
            assert!(error.starts_with("container_id: "), "{error}");
        }
    }

    #[test]
    fn relative_paths_stay_below() {
        for path in ["a", "a/b", "a..b/c", "a/./b"] {
            assert!(check_relative("source", path).is_ok(), "{path}");
        }
        for path in ["", "/a", "..", "a/../b", "a/..", "a\0b"] {
            assert!(check_relative("source", path).is_err(), "{path}");
        }
    }
}
