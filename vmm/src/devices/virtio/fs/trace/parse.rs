//! A trace is read.

use std::str::FromStr;

use thiserror::Error;

use super::{Request, SHAPES, Was, fixed_bytes};

/// A whole trace.
#[derive(Debug, Default)]
pub(in super::super) struct Trace {
    pub readonly: bool,
    pub constant: bool,
    pub files: Vec<Was>,
    pub requests: Vec<Request>,
}

/// What is wrong with a trace.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("line {line}: {what}")]
pub(in super::super) struct TraceError {
    pub line: usize,
    pub what: String,
}

impl Trace {
    pub(in super::super) fn parse(text: &str) -> Result<Self, TraceError> {
        let mut trace = Self::default();
        let (mut begun, mut user) = (false, (0, 0));
        for (line, text) in
            (1..).zip(text.lines()).filter(|(_, text)| !text.is_empty() && !text.starts_with('#'))
        {
            let mut words = text.split(' ');
            let parsed = match words.next() {
                Some("share") if !begun => trace.share(words),
                _ if !begun => Err("the first line must be `share [readonly] [constant]`".to_owned()),
                Some("was") => was(words).map(|was| trace.files.push(was)),
                Some("as") => ids(words).map(|ids| user = ids),
                word => request(word.unwrap_or_default(), words)
                    .map(|asked| trace.requests.push(Request { uid: user.0, gid: user.1, ..asked })),
            };
            parsed.map_err(|what| TraceError { line, what })?;
            begun = true;
        }
        if trace.requests.is_empty() {
            return Err(TraceError {
                line: text.lines().count(),
                what: "the trace has no requests".to_owned(),
            });
        }
        Ok(trace)
    }

    fn share<'a>(&mut self, words: impl Iterator<Item = &'a str>) -> Result<(), String> {
        for word in words {
            match word {
                "readonly" => self.readonly = true,
                "constant" => self.constant = true,
                _ => return Err(format!("a share is readonly and constant, or neither, not {word:?}")),
            }
        }
        Ok(())
    }
}

fn was<'a>(mut words: impl Iterator<Item = &'a str>) -> Result<Was, String> {
    let mut word = |what: &str| words.next().ok_or_else(|| format!("a file that was there needs its {what}"));
    let mode = word("mode")?;
    let was = if mode == "=" {
        Was::Link { path: bytes(word("path")?)?, other: bytes(word("other path")?)? }
    } else {
        let mode = u32::from_str_radix(mode, 8).map_err(|_| format!("mode {mode:?} is no octal number"))?;
        let (uid, gid) = (number(word("uid")?)?, number(word("gid")?)?);
        Was::File { mode, uid, gid, size: number(word("size")?)?, path: bytes(word("path")?)? }
    };
    words.next().map_or(Ok(was), |more| Err(format!("{more:?} is too much")))
}

fn ids<'a>(mut words: impl Iterator<Item = &'a str>) -> Result<(u32, u32), String> {
    match (words.next(), words.next(), words.next()) {
        (Some(uid), Some(gid), None) => Ok((number(uid)?, number(gid)?)),
        _ => Err("who asks is a uid and a gid".to_owned()),
    }
}

fn request<'a>(op: &str, mut words: impl Iterator<Item = &'a str>) -> Result<Request, String> {
    let known = SHAPES.iter().find(|(_, name, ..)| *name == op).map(|(op, ..)| *op);
    let op = known.map_or_else(|| op.parse().map_err(|_| format!("{op:?} is no opcode")), Ok)?;
    let file = number(words.next().ok_or("a request needs the number of its file")?)?;
    let mut asked = Request { op, file, ..Request::default() };
    let mut words = words.peekable();
    let fixed = fixed_bytes(op);
    if fixed > 0 {
        let given = words.next().ok_or("the fixed part of the body is not there")?;
        for word in given.split(',') {
            let word =
                u32::from_str_radix(word, 16).map_err(|_| format!("{word:?} is no hexadecimal word"))?;
            asked.fixed.extend(word.to_le_bytes());
        }
        if asked.fixed.len() > fixed {
            return Err(format!("the body has {} bytes of {fixed}", asked.fixed.len()));
        }
        asked.fixed.resize(fixed, 0);
    }
    if let Some(tail) = words.peek().and_then(|word| word.strip_prefix(':')) {
        asked.tail = bytes(tail)?;
        words.next();
    }
    for word in words {
        match word.split_at_checked(1) {
            Some(("~", "")) => asked.unanswered = true,
            Some(("!", error)) => asked.error = number(error)?,
            Some(("=", file)) => asked.gave = number(file)?,
            Some(("@", handle)) => asked.handle = number(handle)?,
            Some(("+", entry)) => {
                let (file, name) = entry.split_once(':').ok_or_else(|| format!("{word:?} has no name"))?;
                asked.entries.push((number(file)?, bytes(name)?));
            }
            _ => return Err(format!("{word:?} is no result of a request")),
        }
    }
    Ok(asked)
}

fn number<T: FromStr>(word: &str) -> Result<T, String> {
    word.parse().map_err(|_| format!("{word:?} is no number, or too large"))
}

fn bytes(word: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'/' => 0,
            b'%' => {
                let digits = [rest.next(), rest.next()]
                    .map(|digit| char::from(digit.unwrap_or_default()).to_digit(16));
                match digits {
                    [Some(high), Some(low)] => (high << 4 | low) as u8,
                    _ => return Err(format!("{word:?}: two hexadecimal digits follow a %")),
                }
            }
            _ => byte,
        });
    }
    Ok(bytes)
}
