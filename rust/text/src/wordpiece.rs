//! WordPiece: a word is cut into the longest tokens from the left; pieces inside a word carry a prefix (`##`).
//!
//! Source: google-research/bert `tokenization.py` (`WordpieceTokenizer`). A word that cannot be covered, or is longer
//! than `max_input_chars_per_word`, is one unknown token. The longest token is found in one walk through a trie.

use crate::bpe::Piece;
use crate::trie::Trie;
use crate::vocab::Vocab;
use crate::{Error, Result};

/// A WordPiece model.
#[derive(Clone, Debug)]
pub(crate) struct WordPiece {
    pub(crate) vocab: Vocab,
    pub(crate) unk_token: String,
    pub(crate) continuing_subword_prefix: String,
    pub(crate) max_input_chars_per_word: usize,
    unk: u32,
    trie: Trie,
    /// Where the trie holds the pieces inside a word.
    inside: Option<u32>,
}

impl WordPiece {
    /// A model of `vocab`; the fields are named as in tokenizer.json.
    pub(crate) fn new(
        vocab: Vocab,
        unk_token: String,
        continuing_subword_prefix: String,
        max_input_chars_per_word: usize,
    ) -> Result<Self> {
        let unk = vocab.id(&unk_token).ok_or_else(|| {
            Error::format("model", format!("unk_token {unk_token:?} is not in the vocabulary"))
        })?;
        let mut trie = Trie::default();
        for (token, id) in vocab.iter() {
            trie.insert(token.as_bytes(), id);
        }
        let inside = trie.walk(continuing_subword_prefix.as_bytes());
        Ok(Self { vocab, unk_token, continuing_subword_prefix, max_input_chars_per_word, unk, trie, inside })
    }

    /// Appends the tokens of `word`.
    pub(crate) fn tokenize(&self, word: &str, out: &mut Vec<Piece>) {
        let before = out.len();
        let long = word.len() > self.max_input_chars_per_word
            && word.chars().count() > self.max_input_chars_per_word;
        let mut rest = if long { "" } else { word };
        let mut node = Some(Trie::ROOT);
        while let Some((len, id)) = node.and_then(|node| self.trie.longest(node, rest.as_bytes())) {
            out.push((id, len as u32));
            rest = &rest[len..];
            node = self.inside;
        }
        if long || !rest.is_empty() {
            out.truncate(before);
            out.push((self.unk, word.len() as u32));
        }
    }
}
