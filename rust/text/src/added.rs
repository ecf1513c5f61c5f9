//! Added tokens: strings that are one token wherever they stand in a text, found before anything else happens to it.

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use crate::trie::Trie;
use crate::unicode::{Flags, LETTER, MARK, NUMBER};

/// An added token, with the fields of tokenizer.json.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddedToken {
    /// Its id.
    pub id: u32,
    /// The string.
    pub content: String,
    /// Found only where no letter, digit or underscore touches it.
    #[serde(default)]
    pub single_word: bool,
    /// Takes the white space before it.
    #[serde(default)]
    pub lstrip: bool,
    /// Takes the white space after it.
    #[serde(default)]
    pub rstrip: bool,
    /// Looked for in the normalized text, in its normalized form.
    #[serde(default)]
    pub normalized: bool,
    /// Left out of decoded text on request.
    #[serde(default)]
    pub special: bool,
}

impl AddedToken {
    /// A special token as tokenizers are trained with: not normalized, no white space taken.
    #[must_use]
    pub fn special(content: &str, id: u32) -> Self {
        Self {
            id,
            content: content.into(),
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special: true,
        }
    }
}

/// A part of a text: an added token, or what lies between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) token: Option<u32>,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// Finds some added tokens: leftmost first, the longest of those.
#[derive(Clone, Debug, Default)]
pub(crate) struct Finder {
    trie: Trie,
    /// First bytes of the tokens.
    first: Vec<u8>,
    tokens: FxHashMap<u32, AddedToken>,
}

impl Finder {
    /// A finder of `(string to look for, token)`.
    pub(crate) fn new(tokens: impl Iterator<Item = (String, AddedToken)>) -> Self {
        let mut finder = Self::default();
        for (pattern, token) in tokens {
            if let Some(&byte) = pattern.as_bytes().first() {
                finder.trie.insert(pattern.as_bytes(), token.id);
                finder.first.push(byte);
                finder.tokens.insert(token.id, token);
            }
        }
        finder.first.sort_unstable();
        finder.first.dedup();
        finder
    }

    /// Whether there is nothing to find.
    pub(crate) fn is_empty(&self) -> bool {
        self.first.is_empty()
    }

    /// Where the next token may start, from `at` on.
    fn candidate(&self, bytes: &[u8], at: usize) -> Option<usize> {
        let rest = &bytes[at..];
        let found = match self.first.as_slice() {
            [] => None,
            [a] => rest.iter().position(|b| b == a),
            [a, b] => rest.iter().position(|x| x == a || x == b),
            many => rest.iter().position(|x| many.contains(x)),
        };
        found.map(|i| at + i)
    }

    /// Cuts `text` into added tokens and the parts between, none of them empty.
    pub(crate) fn split(&self, text: &str) -> Vec<Part> {
        let bytes = text.as_bytes();
        let mut parts = vec![];
        let mut done = 0;
        let mut at = 0;
        while let Some(found) = self.candidate(bytes, at) {
            let Some((len, id)) = self.trie.longest(Trie::ROOT, &bytes[found..]) else {
                at = found + 1;
                continue;
            };
            let (mut start, mut end) = (found, found + len);
            at = end;
            let token = &self.tokens[&id];
            if token.single_word
                && !(word_edge(text[..start].chars().next_back()) && word_edge(text[end..].chars().next()))
            {
                continue;
            }
            if token.lstrip {
                start = text[..start].trim_end().len().max(done);
            }
            if token.rstrip {
                end = text.len() - text[end..].trim_start().len();
            }
            // White space taken by a token may hold the start of the next one found.
            if end <= done {
                continue;
            }
            if done < start {
                parts.push(Part { token: None, start: done, end: start });
            }
            parts.push(Part { token: Some(id), start, end });
            done = end;
        }
        if done < text.len() {
            parts.push(Part { token: None, start: done, end: text.len() });
        }
        parts
    }
}

/// Whether a word can end at `neighbour`, the character beside it.
fn word_edge(neighbour: Option<char>) -> bool {
    // What `\w` matches: letters, marks, decimal digits, connecting punctuation; here all numbers and the underscore.
    neighbour.is_none_or(|c| c != '_' && !Flags::get().has(c, LETTER | MARK | NUMBER))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finder(tokens: &[AddedToken]) -> Finder {
        Finder::new(tokens.iter().map(|t| (t.content.clone(), t.clone())))
    }

    fn parts(finder: &Finder, text: &str) -> Vec<(Option<u32>, String)> {
        finder.split(text).iter().map(|p| (p.token, text[p.start..p.end].to_owned())).collect()
    }

    #[test]
    fn longest_token_wins_and_covers() {
        let f = finder(&[AddedToken::special("[A]", 1), AddedToken::special("[A]B", 2)]);
        assert_eq!(
            parts(&f, "x[A]B[A]"),
            [(None, "x".into()), (Some(2), "[A]B".into()), (Some(1), "[A]".into())]
        );
        assert_eq!(parts(&f, "[[A"), [(None, "[[A".into())]);
        assert_eq!(parts(&f, ""), []);
    }

    #[test]
    fn white_space_and_word_edges() {
        let f = finder(&[AddedToken { lstrip: true, rstrip: true, ..AddedToken::special("<m>", 1) }]);
        assert_eq!(
            parts(&f, "a  <m> <m> b"),
            [(None, "a".into()), (Some(1), "  <m> ".into()), (Some(1), "<m> ".into()), (None, "b".into())]
        );
        let f = finder(&[AddedToken { single_word: true, ..AddedToken::special("no", 1) }]);
        assert_eq!(parts(&f, "nono no").len(), 2);
    }
}
