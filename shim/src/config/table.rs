//! A user's file laid over the documented one, read key by key with errors
//! that name the key.

use std::path::PathBuf;

use toml::Value;

use super::{ConfigError, DOCUMENTED};

/// The documented file with a user's values in it: every key is there, and has
/// the documented type.
pub(super) struct Table {
    file: String,
    values: toml::Table,
}

impl Table {
    /// Lays `text` over the documented file.
    pub(super) fn parse(text: &str, file: &str) -> Result<Self, ConfigError> {
        let values = parse_toml(DOCUMENTED, "the documented configuration")?;
        Self { file: String::new(), values }.with(text, file)
    }

    /// Lays `text` over what there is; from now on errors name `file`.
    pub(super) fn with(mut self, text: &str, file: &str) -> Result<Self, ConfigError> {
        file.clone_into(&mut self.file);
        for (name, section) in parse_toml(text, file)? {
            self.overlay_section(&name, section)?;
        }
        Ok(self)
    }

    fn overlay_section(&mut self, name: &str, section: Value) -> Result<(), ConfigError> {
        let Some(Value::Table(documented)) = self.values.get_mut(name) else {
            return Err(ConfigError::UnknownKey {
                file: self.file.clone(),
                key: name.to_owned(),
                known: match section_of(&self.values, name) {
                    Some(section) => format!("{name} belongs below [{section}]"),
                    None => format!("there are the sections [{}]", keys(&self.values).join("], [")),
                },
            });
        };
        let Value::Table(given) = section else {
            return Err(ConfigError::WrongValue {
                file: self.file.clone(),
                key: name.to_owned(),
                value: one_line(&section),
                expected: format!("must be a section, [{name}]"),
            });
        };
        for (key, value) in given {
            let Some(slot) = documented.get_mut(&key) else {
                return Err(ConfigError::UnknownKey {
                    file: self.file.clone(),
                    key: format!("{name}.{key}"),
                    known: format!("[{name}] has {}", keys(documented).join(", ")),
                });
            };
            if !slot.same_type(&value) {
                return Err(ConfigError::WrongValue {
                    file: self.file.clone(),
                    key: format!("{name}.{key}"),
                    value: one_line(&value),
                    expected: format!("must be {}, for example {}", article(slot.type_str()), one_line(slot)),
                });
            }
            *slot = value;
        }
        Ok(())
    }

    /// An integer of at least `least` and at most `most`.
    pub(super) fn integer(
        &self,
        section: &str,
        key: &str,
        least: u64,
        most: u64,
    ) -> Result<u64, ConfigError> {
        self.value(section, key)
            .and_then(Value::as_integer)
            .and_then(|value| u64::try_from(value).ok())
            .filter(|value| (least..=most).contains(value))
            .ok_or_else(|| self.wrong(section, key, format!("must be {least} to {most}")))
    }

    /// A yes or no.
    pub(super) fn boolean(&self, section: &str, key: &str) -> Result<bool, ConfigError> {
        self.value(section, key)
            .and_then(Value::as_bool)
            .ok_or_else(|| self.wrong(section, key, "must be true or false".into()))
    }

    /// A string.
    pub(super) fn string(&self, section: &str, key: &str) -> Result<&str, ConfigError> {
        self.value(section, key)
            .and_then(Value::as_str)
            .ok_or_else(|| self.wrong(section, key, "must be a string".into()))
    }

    /// A list of strings.
    pub(super) fn strings(&self, section: &str, key: &str) -> Result<Vec<String>, ConfigError> {
        let strings = self.value(section, key).and_then(Value::as_array).and_then(|values| {
            values.iter().map(|value| value.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
        });
        strings.ok_or_else(|| self.wrong(section, key, "must be an array of strings".into()))
    }

    /// An absolute path: the shim's working directory is containerd's choice.
    pub(super) fn path(&self, section: &str, key: &str) -> Result<PathBuf, ConfigError> {
        let path = PathBuf::from(self.string(section, key)?);
        if !path.is_absolute() || path.as_os_str().as_encoded_bytes().contains(&0) {
            return Err(self.wrong(section, key, "must be an absolute path".into()));
        }
        Ok(path)
    }

    /// Whether a key has the value of the documented file.
    pub(super) fn is_documented(&self, section: &str, key: &str) -> bool {
        let documented = parse_toml(DOCUMENTED, "the documented configuration").unwrap_or_default();
        documented.get(section).and_then(|keys| keys.get(key)) == self.value(section, key)
    }

    /// One of a few strings.
    pub(super) fn one_of(
        &self,
        section: &str,
        key: &str,
        choices: &[&'static str],
    ) -> Result<&'static str, ConfigError> {
        let given = self.string(section, key)?;
        choices
            .iter()
            .find(|choice| **choice == given)
            .copied()
            .ok_or_else(|| self.wrong(section, key, format!("must be one of {}", choices.join(", "))))
    }

    /// The error that refuses a key's value.
    pub(super) fn wrong(&self, section: &str, key: &str, expected: String) -> ConfigError {
        ConfigError::WrongValue {
            file: self.file.clone(),
            key: format!("{section}.{key}"),
            value: self.value(section, key).map(one_line).unwrap_or_default(),
            expected,
        }
    }

    fn value(&self, section: &str, key: &str) -> Option<&Value> {
        self.values.get(section)?.get(key)
    }
}

fn parse_toml(text: &str, file: &str) -> Result<toml::Table, ConfigError> {
    text.parse::<toml::Table>().map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        ConfigError::Syntax {
            file: file.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before.rsplit('\n').next().unwrap_or_default().chars().count() + 1,
            message: error.message().replace('\n', ", "),
        }
    })
}

/// A value as it stands in an error, which is one line.
fn one_line(value: &Value) -> String {
    match value {
        Value::String(text) => format!("{text:?}"),
        other => other.to_string().replace('\n', " "),
    }
}

fn keys(table: &toml::Table) -> Vec<&str> {
    table.keys().map(String::as_str).collect()
}

/// The section that has a key of this name.
fn section_of<'a>(values: &'a toml::Table, key: &str) -> Option<&'a str> {
    values.iter().find(|(_, section)| section.get(key).is_some()).map(|(name, _)| name.as_str())
}

fn article(type_name: &str) -> String {
    let article = if type_name.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {type_name}")
}
