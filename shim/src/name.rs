//! Names that clients choose: namespaces, containers, execs. They become parts of
//! paths on the host and in the guest and fields of lines, and are checked once,
//! where they come in.

/// Longest name; containerd's own are at most 76 bytes long.
const MAX_LEN: usize = 128;

/// A name that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what}: {name:?} must be 1 to {MAX_LEN} letters, digits, '.', '_' and '-', starting with a letter or digit"
)]
pub struct NameError {
    what: &'static str,
    name: String,
}

/// Checks a name; `what` is its field in the error.
pub fn check(what: &'static str, name: &str) -> Result<(), NameError> {
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let fits = name.bytes().all(|c| c.is_ascii_alphanumeric() || b"._-".contains(&c));
    if starts_well && fits && name.len() <= MAX_LEN {
        return Ok(());
    }
    // An error is one line, however long the name.
    Err(NameError { what, name: name.chars().take(MAX_LEN).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_names() {
        for name in ["a", "web-1", "k8s.io", "0_a", &"x".repeat(128)] {
            check("id", name).unwrap();
        }
        for name in ["", ".", "..", "/etc", "a/b", "-x", "a b", "a\tb", "a\nb", "\u{e4}", &"x".repeat(129)] {
            let error = check("id", name).unwrap_err().to_string();
            assert!(error.starts_with("id: ") && !error.contains(['\n', '\t']), "{error}");
        }
    }
}
