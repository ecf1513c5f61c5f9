//! Token strings and their ids.

use rustc_hash::FxHashMap;

use crate::{Error, Result};

/// A two-way table of tokens and ids; ids may have holes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Vocab {
    tokens: Vec<Option<Box<str>>>,
    ids: FxHashMap<Box<str>, u32>,
}

impl Vocab {
    /// Takes `(token, id)` pairs; an id or a token given twice is an error.
    pub(crate) fn new(entries: Vec<(String, u32)>) -> Result<Self> {
        let size = entries.iter().map(|&(_, id)| id as usize + 1).max().unwrap_or(0);
        if size > 2 * entries.len() + (1 << 20) {
            return Err(Error::format(
                "model",
                format!("the highest id is {} with {} tokens", size - 1, entries.len()),
            ));
        }
        let mut vocab = Self { tokens: vec![None; size], ids: FxHashMap::default() };
        vocab.ids.reserve(entries.len());
        for (token, id) in entries {
            let token: Box<str> = token.into();
            if let Some(other) = vocab.tokens[id as usize].replace(token.clone()) {
                return Err(Error::format("model", format!("tokens {other:?} and {token:?} share id {id}")));
            }
            if let Some(other) = vocab.ids.insert(token.clone(), id) {
                return Err(Error::format("model", format!("token {token:?} has two ids, {other} and {id}")));
            }
        }
        Ok(vocab)
    }

    /// One more than the highest id.
    pub(crate) fn id_bound(&self) -> usize {
        self.tokens.len()
    }

    /// The id of `token`.
    pub(crate) fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// The token of `id`.
    pub(crate) fn token(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize)?.as_deref()
    }

    /// Tokens and ids in the order of ids.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, u32)> {
        self.tokens.iter().enumerate().filter_map(|(id, token)| Some((token.as_deref()?, id as u32)))
    }
}
