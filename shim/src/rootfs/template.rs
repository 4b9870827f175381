//! The templates in mounts of containerd 2.2 and later: `{{ mount 0 }}/upper`.
//!
//! containerd fills them in with where it has mounted what comes before in the list. Here nothing is
//! mounted: a mount point is [a mark](mark), which no path from outside can contain.

/// Stands for where the mount of this number is. Has a NUL on both sides.
fn mark(index: usize) -> String {
    format!("\0{index}\0")
}

/// A text that was [`filled`] in, as it was before as far as mount points go: for errors.
pub(super) fn shown(text: &str) -> String {
    let mut out = String::new();
    for (number, part) in text.split('\0').enumerate() {
        match number % 2 {
            0 => out.push_str(part),
            _ => out.push_str(&format!("{{{{ mount {part} }}}}")),
        }
    }
    out
}

/// What a text says once it is filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A path of the host's.
    Host(String),
    /// Below a mount of the list: its number, and the path from there, without a slash before it.
    Mount(usize, String),
}

impl Place {
    /// Reads one path of a text that was [`filled`] in; none where a mount point is not at its beginning.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let Some(marked) = text.strip_prefix('\0') else {
            return (!text.contains('\0')).then(|| Self::Host(text.to_owned()));
        };
        let (index, below) = marked.split_once('\0')?;
        let below = match below.strip_prefix('/') {
            Some(below) => below,
            None if below.is_empty() => "",
            None => return None,
        };
        (!below.contains('\0')).then_some(Self::Mount(index.parse().ok()?, below.to_owned()))
    }
}

/// What templates may name of a mount that comes before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Earlier<'a> {
    /// Its source, filled in.
    pub(super) source: &'a str,
    /// Its target, filled in.
    pub(super) target: &'a str,
}

/// Fills in the templates of `text`, as containerd would after `earlier` mounts; what is wrong.
pub(super) fn filled(text: &str, earlier: &[Earlier]) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, template)) = rest.split_once("{{") {
        let Some((template, after)) = template.split_once("}}") else {
            return Err(format!("{text:?}: \"{{{{\" without \"}}}}\""));
        };
        out.push_str(before);
        out.push_str(&value(template.trim(), earlier)?);
        // containerd's templates would not end before all options do.
        if out.len() > MAX_FILLED {
            return Err(format!("{text:?}: is longer than {MAX_FILLED} bytes once it is filled in"));
        }
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

/// More than the names of all mounts of a list.
const MAX_FILLED: usize = 64 << 10;

/// What one template says.
fn value(template: &str, earlier: &[Earlier]) -> Result<String, String> {
    let unknown = || {
        format!(
            "\"{{{{ {template} }}}}\": must be {{{{ mount N }}}}, {{{{ source N }}}}, {{{{ target N }}}} or \
             {{{{ overlay FIRST LAST }}}}"
        )
    };
    let number = |word: &str| -> Result<usize, String> {
        let index: usize = word.parse().map_err(|_| unknown())?;
        match index < earlier.len() {
            true => Ok(index),
            false => Err(format!(
                "\"{{{{ {template} }}}}\": {index} must be below {}, the number of mounts before this one",
                earlier.len()
            )),
        }
    };
    let found = |index: usize| earlier.get(index).copied().ok_or_else(unknown);
    let words: Vec<&str> = template.split_ascii_whitespace().collect();
    match words.as_slice() {
        ["mount", index] => number(index).map(mark),
        ["source", index] => Ok(found(number(index)?)?.source.to_owned()),
        ["target", index] => Ok(found(number(index)?)?.target.to_owned()),
        ["overlay", first, last] => {
            let (first, last) = (number(first)?, number(last)?);
            let marks = |all: &mut dyn Iterator<Item = usize>| all.map(mark).collect::<Vec<_>>().join(":");
            Ok(match first <= last {
                true => marks(&mut (first..=last)),
                false => marks(&mut (last..=first).rev()),
            })
        }
        _ => Err(unknown()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EARLIER: [Earlier; 3] = [
        Earlier { source: "/a", target: "" },
        Earlier { source: "/b", target: "/t" },
        Earlier { source: "/c", target: "" },
    ];

    #[test]
    fn templates_name_what_comes_before() {
        for (text, expected) in [
            ("plain", "plain"),
            ("{{ mount 0 }}/upper", "\x000\0/upper"),
            ("{{mount 2}}", "\x002\0"),
            ("x={{ source 1 }}:{{ target 1 }}", "x=/b:/t"),
            ("lowerdir={{ overlay 0 2 }}", "lowerdir=\x000\0:\x001\0:\x002\0"),
            ("lowerdir={{ overlay 2 1 }}", "lowerdir=\x002\0:\x001\0"),
        ] {
            assert_eq!(filled(text, &EARLIER).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_template_is_said() {
        for (text, expected) in [
            ("{{ mount 0", "\"{{ mount 0\": \"{{\" without \"}}\""),
            ("{{ mount 3 }}", "\"{{ mount 3 }}\": 3 must be below 3, the number of mounts before this one"),
            (
                "{{ overlay 0 9 }}",
                "\"{{ overlay 0 9 }}\": 9 must be below 3, the number of mounts before this one",
            ),
            ("{{ mount -1 }}", "\"{{ mount -1 }}\": must be {{ mount N }}, "),
            ("{{ mount }}", "\"{{ mount }}\": must be "),
            ("{{ .Env }}", "\"{{ .Env }}\": must be "),
            ("{{}}", "\"{{  }}\": must be "),
        ] {
            let said = filled(text, &EARLIER).unwrap_err();
            assert!(said.starts_with(expected), "{text}: {said}");
        }
        assert!(filled(&"{{ overlay 0 2 }}".repeat(10_000), &EARLIER).is_err());
    }

    #[test]
    fn a_place_is_a_path_or_below_a_mount() {
        let mount = |index, below: &str| Some(Place::Mount(index, below.to_owned()));
        assert_eq!(Place::parse("/a/b"), Some(Place::Host("/a/b".into())));
        assert_eq!(Place::parse("\x001\0"), mount(1, ""));
        assert_eq!(Place::parse("\x001\0/upper"), mount(1, "upper"));
        assert_eq!(shown("a=\x001\0/upper:\x002\0"), "a={{ mount 1 }}/upper:{{ mount 2 }}");
        for wrong in ["/a\x001\0", "\x001\0up", "\x001\0/\x002\0", "\0", "\0x\0"] {
            assert_eq!(Place::parse(wrong), None, "{wrong:?}");
        }
    }
}
