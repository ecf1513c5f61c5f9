//! The model of a tokenizer: from a word to tokens.

use crate::Result;
use std::ops::Range;

use crate::bpe::{Bpe, BpeScratch, Piece};
use crate::cache::Cache;
use crate::unigram::{Unigram, UnigramScratch};
use crate::vocab::Vocab;
use crate::wordpiece::WordPiece;

/// One of the models.
#[derive(Clone, Debug)]
pub(crate) enum Model {
    Bpe(Bpe),
    WordPiece(WordPiece),
    Unigram(Unigram),
}

/// What a thread keeps between words and texts.
#[derive(Default)]
pub(crate) struct Scratch {
    pub(crate) cache: Cache,
    bpe: BpeScratch,
    unigram: UnigramScratch,
    pieces: Vec<Piece>,
}

impl Model {
    /// The name in tokenizer.json.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Bpe(_) => "BPE",
            Self::WordPiece(_) => "WordPiece",
            Self::Unigram(_) => "Unigram",
        }
    }

    pub(crate) fn vocab(&self) -> &Vocab {
        match self {
            Self::Bpe(m) => &m.vocab,
            Self::WordPiece(m) => &m.vocab,
            Self::Unigram(m) => &m.vocab,
        }
    }

    /// The unknown token, if the model has one.
    pub(crate) fn unk_token(&self) -> Option<&str> {
        match self {
            Self::Bpe(m) => m.options.unk_token.as_deref(),
            Self::WordPiece(m) => Some(&m.unk_token),
            Self::Unigram(m) => m.vocab.token(m.unk_id?),
        }
    }

    /// How a token is shown: the string of its id, but what Unigram does not know as it was read.
    pub(crate) fn shown<'a>(&'a self, id: u32, text: &'a str, read: Range<usize>) -> &'a str {
        match self {
            Self::Unigram(m) if m.unk_id == Some(id) => &text[read],
            _ => self.vocab().token(id).unwrap_or_default(),
        }
    }

    /// The tokens of `word`, in `scratch`.
    pub(crate) fn tokenize<'s>(&self, word: &str, scratch: &'s mut Scratch) -> Result<&'s [Piece]> {
        scratch.pieces.clear();
        match self {
            Self::Bpe(m) => m.tokenize(word, &mut scratch.bpe, &mut scratch.pieces)?,
            Self::WordPiece(m) => m.tokenize(word, &mut scratch.pieces),
            Self::Unigram(m) => m.tokenize(word, &mut scratch.unigram, &mut scratch.pieces)?,
        }
        Ok(&scratch.pieces)
    }

    /// Appends the ids of `word`.
    pub(crate) fn ids(&self, word: &str, scratch: &mut Scratch, out: &mut Vec<u32>) -> Result<()> {
        out.extend(self.tokenize(word, scratch)?.iter().map(|&(id, _)| id));
        Ok(())
    }
}
