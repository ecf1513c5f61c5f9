//! Token strings and their ids.
//!
//! All strings lie in one allocation, and a table of open addresses leads from a hash to an id: a vocabulary of 100,000
//! tokens is there in milliseconds, and gone at once.

use std::hash::BuildHasher;

use rustc_hash::FxBuildHasher;

use crate::{Error, Result};

/// No id.
const NONE: u32 = u32::MAX;

/// A table from hashes to numbers below `u32::MAX`; what the numbers stand for is compared by the caller.
#[derive(Clone, Debug, Default)]
pub(crate) struct Index {
    /// High half of the hash, and the number or `NONE`. A power of two of them, at most half filled.
    slots: Vec<(u32, u32)>,
}

impl Index {
    /// Room for `n` numbers.
    pub(crate) fn with_capacity(n: usize) -> Self {
        Self { slots: vec![(0, NONE); (2 * n).next_power_of_two().max(2)] }
    }

    /// The number with this hash of which `same` says that it is meant.
    #[inline]
    pub(crate) fn find(&self, hash: u64, same: impl Fn(u32) -> bool) -> Option<u32> {
        let mask = self.slots.len().checked_sub(1)?;
        let mut at = hash as usize & mask;
        loop {
            let (tag, number) = self.slots[at];
            if number == NONE {
                return None;
            }
            if tag == (hash >> 32) as u32 && same(number) {
                return Some(number);
            }
            at = (at + 1) & mask;
        }
    }

    /// Adds a number that is not there.
    pub(crate) fn insert(&mut self, hash: u64, number: u32) {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        while self.slots[at].1 != NONE {
            at = (at + 1) & mask;
        }
        self.slots[at] = ((hash >> 32) as u32, number);
    }
}

/// A two-way table of tokens and ids; ids may have holes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Vocab {
    /// All tokens, one after the other.
    text: String,
    /// By id: start and end in `text`; start is `NONE` where there is no token.
    places: Vec<(u32, u32)>,
    ids: Index,
}

fn hash(token: &str) -> u64 {
    // The low bits choose the slot: mix the high ones in.
    let hash = FxBuildHasher.hash_one(token.as_bytes());
    hash ^ hash.rotate_left(32)
}

impl Vocab {
    /// Takes `(token, id)` pairs; an id or a token given twice is an error.
    pub(crate) fn new<S: AsRef<str>>(entries: &[(S, u32)]) -> Result<Self> {
        let refuse = |problem: String| Err(Error::format("model", problem));
        let size = entries.iter().map(|&(_, id)| id as usize + 1).max().unwrap_or(0);
        if size > 2 * entries.len() + (1 << 20) {
            return refuse(format!("the highest id is {} with {} tokens", size - 1, entries.len()));
        }
        let bytes: usize = entries.iter().map(|(token, _)| token.as_ref().len()).sum();
        if u32::try_from(bytes).is_err() {
            return refuse(format!("its tokens have {bytes} bytes, more than 4 GB"));
        }
        let mut vocab = Self {
            text: String::with_capacity(bytes),
            places: vec![(NONE, NONE); size],
            ids: Index::with_capacity(entries.len()),
        };
        for (token, id) in entries {
            let (token, id) = (token.as_ref(), *id);
            if let Some(other) = vocab.token(id) {
                return refuse(format!("tokens {other:?} and {token:?} share id {id}"));
            }
            let hash = hash(token);
            if let Some(other) = vocab.ids.find(hash, |id| vocab.token(id) == Some(token)) {
                return refuse(format!("token {token:?} has two ids, {other} and {id}"));
            }
            let start = vocab.text.len() as u32;
            vocab.text.push_str(token);
            vocab.places[id as usize] = (start, vocab.text.len() as u32);
            vocab.ids.insert(hash, id);
        }
        Ok(vocab)
    }

    /// One more than the highest id.
    pub(crate) fn id_bound(&self) -> usize {
        self.places.len()
    }

    /// The id of `token`.
    pub(crate) fn id(&self, token: &str) -> Option<u32> {
        self.ids.find(hash(token), |id| self.token(id) == Some(token))
    }

    /// The token of `id`.
    pub(crate) fn token(&self, id: u32) -> Option<&str> {
        let &(start, end) = self.places.get(id as usize)?;
        (start != NONE).then(|| &self.text[start as usize..end as usize])
    }

    /// Tokens and ids in the order of ids.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, u32)> {
        (0..self.places.len() as u32).filter_map(|id| Some((self.token(id)?, id)))
    }
}
