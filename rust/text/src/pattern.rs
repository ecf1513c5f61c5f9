//! What `Split` and `Replace` look for: a string, or a regular expression.
//!
//! Expressions run on the engine that the `tokenizers` library has in pure Rust (`fancy-regex`); the usual ones of
//! tokenizers never get there, as `split` has scanners of its own for them.

use std::sync::OnceLock;

use fancy_regex::Regex;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What to look for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Pattern {
    String(String),
    Regex(Expression),
}

/// A regular expression, compiled where it is used.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub(crate) struct Expression {
    source: String,
    compiled: OnceLock<Regex>,
}

impl From<String> for Expression {
    fn from(source: String) -> Self {
        Self { source, compiled: OnceLock::new() }
    }
}

impl From<Expression> for String {
    fn from(expression: Expression) -> Self {
        expression.source
    }
}

impl PartialEq for Expression {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl Pattern {
    /// A regular expression.
    pub(crate) fn regex(source: &str) -> Self {
        Self::Regex(source.to_owned().into())
    }

    /// The regular expression as it is written.
    pub(crate) fn source(&self) -> Option<&str> {
        match self {
            Self::String(_) => None,
            Self::Regex(expression) => Some(&expression.source),
        }
    }

    /// Compiles it; `component` is named if that fails.
    pub(crate) fn check(&self, component: &'static str) -> Result<()> {
        let Self::Regex(expression) = self else { return Ok(()) };
        if expression.compiled.get().is_none() {
            let compiled = Regex::new(&expression.source).map_err(|e| {
                let problem = format!("{:?} is no regular expression known here: {e}", expression.source);
                Error::format(component, problem)
            })?;
            // Another thread's would be the same.
            drop(expression.compiled.set(compiled));
        }
        Ok(())
    }

    /// Visits the byte ranges of what is found, in order and none in another. The pattern must have been checked.
    pub(crate) fn find(&self, text: &str, mut visit: impl FnMut(usize, usize)) {
        match self {
            Self::String(string) if string.is_empty() => {}
            Self::String(string) => {
                text.match_indices(string.as_str()).for_each(|(at, found)| visit(at, at + found.len()));
            }
            Self::Regex(expression) => {
                let regex = expression.compiled.get().expect("a pattern is checked when its file is read");
                // A search that gives up ends, as in the library.
                regex
                    .find_iter(text)
                    .map_while(Result::ok)
                    .for_each(|found| visit(found.start(), found.end()));
            }
        }
    }
}
