//! What every command does with its arguments: options and operands one by one, values that say
//! what is wrong with them, the nearest known word for an unknown one.

use std::ffi::OsString;
use std::path::PathBuf;

/// Why parsing ends early.
#[derive(Debug, PartialEq, Eq)]
pub enum Stop {
    /// The user asks for help.
    Help,
    /// Wrong usage: one line that names the wrong thing.
    Usage(String),
}

/// Wrong usage.
pub fn usage(message: impl Into<String>) -> Stop {
    Stop::Usage(message.into())
}

/// One argument.
#[derive(Debug, PartialEq, Eq)]
pub enum Arg {
    /// An option, without its dashes.
    Option(String),
    /// Anything else.
    Operand(OsString),
}

/// A command's arguments. Its known options are those that its help text tells of.
#[derive(Debug)]
pub struct Args {
    parser: lexopt::Parser,
    help: &'static str,
}

impl Args {
    /// The arguments that follow a command's name.
    pub fn new(parser: lexopt::Parser, help: &'static str) -> Args {
        Args { parser, help }
    }

    /// The next argument.
    ///
    /// # Errors
    /// [`Stop::Help`] for `-h` and `--help`; wrong usage for other short options and stray values.
    pub fn next_arg(&mut self) -> Result<Option<Arg>, Stop> {
        match self.parser.next().map_err(stray)? {
            None => Ok(None),
            Some(lexopt::Arg::Short('h') | lexopt::Arg::Long("help")) => Err(Stop::Help),
            Some(lexopt::Arg::Short(letter)) => {
                Err(usage(format!("unknown option -{}", letter.escape_default())))
            }
            Some(lexopt::Arg::Long(name)) => Ok(Some(Arg::Option(name.into()))),
            Some(lexopt::Arg::Value(value)) => Ok(Some(Arg::Operand(value))),
        }
    }

    /// The value of an option, as text.
    ///
    /// # Errors
    /// Wrong usage if it is missing or not UTF-8.
    pub fn text(&mut self, option: &str) -> Result<String, Stop> {
        let value = self.parser.value().map_err(|_| usage(format!("--{option} needs a value")))?;
        utf8(value, &format!("--{option}"))
    }

    /// The value of an option that may be given once.
    ///
    /// # Errors
    /// As [`Args::text`], and if `slot` is taken.
    pub fn text_once(&mut self, option: &str, slot: &mut Option<String>) -> Result<(), Stop> {
        set_once(option, slot, self.text(option)?)
    }

    /// The wrong usage of an option that no command knows.
    #[must_use]
    pub fn unknown(&self, option: &str) -> Stop {
        let known = options(self.help);
        let near = nearest(option, known.iter().copied());
        let near = near.map_or_else(String::new, |near| format!(": do you mean --{near}?"));
        usage(format!("unknown option --{option}{near}"))
    }
}

fn stray(error: lexopt::Error) -> Stop {
    match error {
        lexopt::Error::UnexpectedValue { option, .. } => usage(format!("{option} takes no value")),
        other => usage(other.to_string()),
    }
}

/// Fills a slot that must be empty.
///
/// # Errors
/// Wrong usage if it isn't.
pub fn set_once<T>(option: &str, slot: &mut Option<T>, value: T) -> Result<(), Stop> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(usage(format!("--{option} is given twice"))),
    }
}

/// A text that must be UTF-8, as all is that a configuration holds.
///
/// # Errors
/// Wrong usage otherwise.
pub fn utf8(value: OsString, what: &str) -> Result<String, Stop> {
    value
        .into_string()
        .map_err(|value| usage(format!("{what} '{}': it must be UTF-8", value.to_string_lossy())))
}

/// A path as it stands in a configuration: absolute, since the destination of a migration has
/// another working directory.
///
/// # Errors
/// Wrong usage if it is empty, or relative where there is no working directory.
pub fn absolute(what: &str, path: &str) -> Result<PathBuf, Stop> {
    if path.is_empty() {
        return Err(usage(format!("{what}: the path is empty")));
    }
    std::path::absolute(path).map_err(|e| usage(format!("{what} '{path}': {e}")))
}

/// Splits `a,b=c` at its commas; `,,` stands for a comma within an item.
#[must_use]
pub fn split_list(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, items.last_mut()) {
            (',', Some(item)) if chars.next_if_eq(&',').is_some() => item.push(','),
            (',', _) => items.push(String::new()),
            (c, Some(item)) => item.push(c),
            (_, None) => unreachable!("there is always one item"),
        }
    }
    items
}

/// The `key=value` and `key` items of one option, to be taken one by one.
#[derive(Debug)]
pub struct Keys {
    option: &'static str,
    items: Vec<(String, Option<String>)>,
}

impl Keys {
    /// Reads the items. `known` holds each key, with `=WHAT` where it takes a value.
    ///
    /// # Errors
    /// Wrong usage for an unknown key, one that is given twice, or a value where none belongs.
    pub fn new(option: &'static str, items: &[String], known: &[&str]) -> Result<Keys, Stop> {
        let mut keys = Keys { option, items: Vec::new() };
        for item in items {
            let (key, value) = match item.split_once('=') {
                Some((key, value)) => (key, Some(value.to_owned())),
                None => (item.as_str(), None),
            };
            let name = |known: &str| known.split('=').next().unwrap_or("") == key;
            let Some(form) = known.iter().find(|known| name(known)) else {
                let known = known.join(", ");
                return Err(usage(format!("--{option}: unknown key '{key}': it takes {known}")));
            };
            match (form.contains('='), &value) {
                (true, None) => {
                    return Err(usage(format!("--{option}: '{key}' needs a value: {form}")));
                }
                (false, Some(_)) => {
                    return Err(usage(format!("--{option}: '{key}' takes no value")));
                }
                _ => {}
            }
            if keys.items.iter().any(|(other, _)| other == key) {
                return Err(usage(format!("--{option}: '{key}' is given twice")));
            }
            keys.items.push((key.to_owned(), value));
        }
        Ok(keys)
    }

    /// Whether a key without a value is there.
    #[must_use]
    pub fn flag(&self, key: &str) -> bool {
        self.items.iter().any(|(other, _)| other == key)
    }

    /// A key's value, parsed.
    ///
    /// # Errors
    /// Wrong usage with the value and the parser's words.
    pub fn value<T, E: std::fmt::Display>(
        &self,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<Option<T>, Stop> {
        let item = self.items.iter().find(|(other, _)| other == key);
        let Some(value) = item.and_then(|(_, value)| value.as_ref()) else { return Ok(None) };
        let option = self.option;
        parse(value).map(Some).map_err(|e| usage(format!("--{option}: {key}={value}: {e}")))
    }
}

/// The options that a help text tells of, without their dashes.
#[must_use]
pub fn options(help: &str) -> Vec<&str> {
    let is_name = |c: char| c.is_ascii_lowercase() || c == '-';
    let mut found: Vec<_> = help
        .split(|c: char| c.is_whitespace() || "[](),|'`".contains(c))
        .filter_map(|word| word.strip_prefix("--"))
        .filter(|name| !name.is_empty() && name.chars().all(is_name))
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// The known word that is meant, if one is near: at most a third of its letters are wrong.
pub fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|known| (distance(word, known), known))
        .filter(|(distance, known)| *distance <= 1 + known.len() / 4)
        .min()
        .map(|(_, known)| known)
}

/// How many letters must be added, removed or changed (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()] + a.chars().count().saturating_sub(64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_is_near() {
        let known = ["mem", "kernel", "cmdline", "cpus", "cpu-model"];
        for (word, near) in [
            ("memory", None),
            ("men", Some("mem")),
            ("kernal", Some("kernel")),
            ("cmd-line", Some("cmdline")),
            ("cpu", Some("cpus")),
            ("x", None),
        ] {
            assert_eq!(nearest(word, known.into_iter()), near, "{word}");
        }
        assert!(distance(&"x".repeat(100_000), "mem") > 90_000);
    }

    #[test]
    fn lists_split_at_single_commas() {
        assert_eq!(split_list("a,b=c,,d,"), ["a", "b=c,d", ""]);
        assert_eq!(split_list(""), [""]);
    }

    #[test]
    fn options_are_found_in_help() {
        let help =
            "usage: vmm x [--force] [--on-reboot exit|reset] --\n  --json  as JSON (see --force)";
        assert_eq!(options(help), ["force", "json", "on-reboot"]);
    }
}
