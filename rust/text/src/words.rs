//! Where words begin in a sequence of ids, for masks that take whole words.

use crate::bytes::from_alphabet;
use crate::model::Model;
use crate::tokenizer::{Engine, Tokenizer};

impl Tokenizer {
    /// For each token of `ids`, whether a word begins with it, as the pre-tokenizer cuts the text that they stand for:
    /// at spaces and, where it does so, at punctuation and digits. WordPiece's `##` goes on with a word. Without a
    /// pre-tokenizer that splits, words begin at spaces (`▁`). Special tokens, and what follows one, always begin one.
    #[must_use]
    pub fn begins_word(&self, ids: &[u32]) -> Vec<bool> {
        let mut begins = vec![true; ids.len()];
        let mut at = 0;
        for run in ids.split_inclusive(|&id| self.is_special(id)) {
            let inner = run.len() - usize::from(run.last().is_some_and(|&id| self.is_special(id)));
            self.words_of(&run[..inner], &mut begins[at..at + inner]);
            at += run.len();
        }
        begins
    }

    /// The same for ids none of which is special.
    fn words_of(&self, ids: &[u32], begins: &mut [bool]) {
        let token = |id: u32| self.id_to_token(id).unwrap_or_default();
        let (prefix, byte_level) = match &self.engine {
            Engine::Native(native) => match &native.parts.model {
                Model::WordPiece(model) => (Some(model.continuing_subword_prefix.as_str()), false),
                _ => (None, native.words.byte_level),
            },
            Engine::Library(library) => (library.continuing_subword_prefix(), library.is_byte_level()),
        };
        if let Some(prefix) = prefix {
            for (begins, &id) in begins.iter_mut().zip(ids).skip(1) {
                *begins = !token(id).starts_with(prefix);
            }
            return;
        }
        let (mut bytes, mut starts) = (Vec::new(), Vec::with_capacity(ids.len()));
        for &id in ids {
            starts.push(bytes.len());
            match byte_level {
                true => bytes.extend(from_alphabet(token(id))),
                false => bytes.extend_from_slice(token(id).as_bytes()),
            }
        }
        // A character that is cut off at either end counts as U+FFFD; the bytes behind it keep their places.
        let (mut text, mut shifts, mut read) = (String::with_capacity(bytes.len()), vec![(0, 0)], 0);
        for chunk in bytes.utf8_chunks() {
            text.push_str(chunk.valid());
            read += chunk.valid().len() + chunk.invalid().len();
            if !chunk.invalid().is_empty() {
                text.push('\u{FFFD}');
                shifts.push((text.len(), read));
            }
        }
        let place = |at: usize| {
            let (from, to) = shifts[shifts.partition_point(|&(from, _)| from <= at) - 1];
            to + at - from
        };
        let words: Vec<usize> = self.word_starts(&text).into_iter().map(place).collect();
        for (begins, start) in begins.iter_mut().zip(&starts).skip(1) {
            *begins = words.binary_search(start).is_ok();
        }
    }

    /// Where the words of a text begin, rising.
    fn word_starts(&self, text: &str) -> Vec<usize> {
        let words = match &self.engine {
            Engine::Native(native) => native.words.splits().then(|| {
                let mut words = Vec::new();
                native.words.split(text, &mut |start, _| words.push(start));
                words
            }),
            Engine::Library(library) => library.words(text),
        };
        words.unwrap_or_else(|| {
            let space = |&(_, c): &(usize, char)| c == '▁' || c.is_whitespace();
            text.char_indices().filter(space).map(|(at, _)| at).collect()
        })
    }
}
