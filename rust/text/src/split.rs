//! Splitters: how a text falls into words. The usual rules are hand-written scanners; others look for a pattern.
//!
//! A scanner calls `emit(start, end)` with the byte range of every word, in order, none empty.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::pattern::Pattern;
use crate::unicode::{Flags, LETTER, MARK, NUMBER, PUNCTUATION, SPACE};

/// The pattern of GPT-2 tokenizers. Source: openai/gpt-2 `encoder.py`.
pub(crate) const GPT2_PATTERN: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// The pattern of cl100k and Llama 3: case-blind contractions, up to three digits, line ends kept together.
pub(crate) const LLAMA3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The pattern of Qwen 2: as Llama 3, each digit alone.
pub(crate) const QWEN2_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The pattern of o200k (GPT-4o): a word is capitals then small letters, with its contraction.
pub(crate) const O200K_PATTERN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// One way of splitting.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Splitter {
    /// Words between white space; punctuation alone.
    Bert,
    /// [`GPT2_PATTERN`]; if `digits_alone`, what is between digits, each a word of its own, as if it were a text.
    Gpt2 { digits_alone: bool },
    /// [`LLAMA3_PATTERN`] with at most so many digits together.
    Llama3 { digits: usize },
    /// [`O200K_PATTERN`].
    O200k,
    /// Before each occurrence of the character.
    Before(char),
    /// Words between white space.
    Whitespace,
    /// Numbers apart from the rest, each digit alone if `individual`.
    Digits { individual: bool },
    /// At what is found, or at what lies between if `invert`.
    Found(Box<Found>),
}

/// A search and what becomes of what it finds.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Found {
    find: Find,
    invert: bool,
    behavior: Behavior,
}

/// What to split at.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Find {
    Pattern(Pattern),
    /// Each character that BERT's splitter takes for punctuation.
    Punctuation,
}

impl Find {
    /// Looks for a pattern, which is compiled here.
    pub(crate) fn pattern(pattern: Pattern) -> Result<Self> {
        pattern.check("pre_tokenizer")?;
        Ok(Self::Pattern(pattern))
    }

    fn find(&self, text: &str, mut visit: impl FnMut(usize, usize)) {
        match self {
            Self::Pattern(pattern) => pattern.find(text, visit),
            Self::Punctuation => {
                let flags = Flags::get();
                text.char_indices()
                    .filter(|&(_, c)| flags.has(c, PUNCTUATION))
                    .for_each(|(at, c)| visit(at, at + c.len_utf8()));
            }
        }
    }
}

/// What becomes of a delimiter, with the names of tokenizer.json.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Behavior {
    /// It goes.
    Removed,
    /// It is a word.
    Isolated,
    /// It ends the word before it.
    MergedWithPrevious,
    /// It starts the word after it.
    MergedWithNext,
    /// Neighbouring delimiters are one word.
    Contiguous,
}

impl Found {
    fn split(&self, text: &str, emit: &mut dyn FnMut(usize, usize)) {
        // What is found and what lies between, in order: (start, end, delimiter or not).
        let mut parts: Vec<(usize, usize, bool)> = vec![];
        let mut done = 0;
        self.find.find(text, |start, end| {
            if done < start {
                parts.push((done, start, self.invert));
            }
            parts.push((start, end, !self.invert));
            done = end;
        });
        if done < text.len() {
            parts.push((done, text.len(), self.invert));
        }
        let mut words: Vec<(usize, usize)> = vec![];
        let mut before = None;
        match self.behavior {
            Behavior::Removed => words.extend(parts.iter().filter(|p| !p.2).map(|&(a, b, _)| (a, b))),
            Behavior::Isolated => words.extend(parts.iter().map(|&(a, b, _)| (a, b))),
            Behavior::Contiguous => {
                for &(start, end, delimiter) in &parts {
                    match words.last_mut() {
                        Some(last) if before == Some(delimiter) => last.1 = end,
                        _ => words.push((start, end)),
                    }
                    before = Some(delimiter);
                }
            }
            Behavior::MergedWithPrevious => {
                for &(start, end, delimiter) in &parts {
                    match words.last_mut() {
                        Some(last) if delimiter && before != Some(true) => last.1 = end,
                        _ => words.push((start, end)),
                    }
                    before = Some(delimiter);
                }
            }
            Behavior::MergedWithNext => {
                for &(start, end, delimiter) in parts.iter().rev() {
                    match words.last_mut() {
                        Some(last) if delimiter && before != Some(true) => last.0 = start,
                        _ => words.push((start, end)),
                    }
                    before = Some(delimiter);
                }
                words.reverse();
            }
        }
        words.into_iter().filter(|(start, end)| start < end).for_each(|(start, end)| emit(start, end));
    }
}

impl Splitter {
    /// Splits at what is found.
    pub(crate) fn found(find: Find, invert: bool, behavior: Behavior) -> Self {
        Self::Found(Box::new(Found { find, invert, behavior }))
    }

    /// This splitter, then `next` on each of its words, where one scanner does both.
    pub(crate) fn then(&self, next: &Self) -> Option<Self> {
        match (self, next) {
            (Self::Digits { individual: true }, Self::Gpt2 { .. }) => Some(Self::Gpt2 { digits_alone: true }),
            _ => None,
        }
    }

    /// Emits the words of `text`.
    #[inline]
    pub(crate) fn split(&self, text: &str, emit: &mut impl FnMut(usize, usize)) {
        match *self {
            Self::Found(ref found) => found.split(text, emit),
            Self::Bert => bert(text, emit),
            Self::Gpt2 { digits_alone: false } => gpt2::<false>(text, emit),
            Self::Gpt2 { digits_alone: true } => gpt2::<true>(text, emit),
            Self::Llama3 { digits } => llama3(text, digits, emit),
            Self::O200k => o200k(text, emit),
            Self::Before(mark) => {
                let mut start = 0;
                for (i, _) in text.match_indices(mark) {
                    if start < i {
                        emit(start, i);
                    }
                    start = i;
                }
                if start < text.len() {
                    emit(start, text.len());
                }
            }
            Self::Whitespace => {
                let cursor = Cursor::new(text);
                let mut i = 0;
                while i < text.len() {
                    let start = cursor.skip(i, SPACE);
                    i = cursor.skip_without(start, SPACE, usize::MAX);
                    if start < i {
                        emit(start, i);
                    }
                }
            }
            Self::Digits { individual } => {
                let cursor = Cursor::new(text);
                let mut i = 0;
                while i < text.len() {
                    let number = cursor.flags(i) & NUMBER != 0;
                    let end = match (number, individual) {
                        (true, true) => i + cursor.width(i),
                        (true, false) => cursor.skip(i, NUMBER),
                        (false, _) => cursor.skip_without(i, NUMBER, usize::MAX),
                    };
                    emit(i, end);
                    i = end;
                }
            }
        }
    }
}

/// A text and the flag table, addressed by byte position.
#[derive(Clone, Copy)]
struct Cursor<'a> {
    text: &'a str,
    flags: Flags,
}

impl<'a> Cursor<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, flags: Flags::get() }
    }

    /// The character at `i`, if any.
    #[inline(always)]
    fn char(self, i: usize) -> Option<char> {
        match self.text.as_bytes().get(i) {
            Some(&b) if b < 128 => Some(b as char),
            Some(_) => self.text[i..].chars().next(),
            None => None,
        }
    }

    /// The flags of the character at `i`; 0 at the end.
    #[inline(always)]
    fn flags(self, i: usize) -> u8 {
        self.char(i).map_or(0, |c| self.flags.of(c))
    }

    /// The length in bytes of the character at `i`; 0 at the end.
    #[inline(always)]
    fn width(self, i: usize) -> usize {
        self.char(i).map_or(0, char::len_utf8)
    }

    /// The end of the run of characters from `i` on that have one of `flags`.
    #[inline(always)]
    fn skip(self, mut i: usize, flags: u8) -> usize {
        while let Some(c) = self.char(i) {
            if self.flags.of(c) & flags == 0 {
                break;
            }
            i += c.len_utf8();
        }
        i
    }

    /// The end of the run of letters from `i` on: eight ASCII letters at a time, where there are so many bytes.
    #[inline(always)]
    fn skip_letters(self, mut i: usize) -> usize {
        while let Some(eight) = self.text.as_bytes()[i..].first_chunk() {
            let n = leading_letters(u64::from_le_bytes(*eight));
            i += n;
            if n < 8 {
                // Most words end here; others go on with a letter that is not ASCII.
                return if eight[n] < 128 { i } else { self.skip(i, LETTER) };
            }
        }
        self.skip(i, LETTER)
    }

    /// The end of the run of at most `limit` characters from `i` on that have none of `flags`.
    #[inline(always)]
    fn skip_without(self, mut i: usize, flags: u8, limit: usize) -> usize {
        let mut left = limit;
        while let (Some(c), 1..) = (self.char(i), left) {
            if self.flags.of(c) & flags != 0 {
                break;
            }
            i += c.len_utf8();
            left -= 1;
        }
        i
    }

    /// The end of what is no word of letters at `i`: up to `digits` numbers, signs with those of `tail` after them, or
    /// white space, all of it up to its last line end.
    #[inline(always)]
    fn no_word(self, i: usize, digits: usize, tail: &[u8]) -> usize {
        let bytes = self.text.as_bytes();
        if self.flags(i) & NUMBER != 0 {
            let mut end = i;
            for _ in 0..digits {
                if self.flags(end) & NUMBER != 0 {
                    end += self.width(end);
                }
            }
            return end;
        }
        let start = i + usize::from(bytes[i] == b' ');
        let signs = self.skip_without(start, WORD | SPACE, usize::MAX);
        if signs > start {
            return signs + bytes[signs..].iter().take_while(|b| tail.contains(b)).count();
        }
        let end = self.skip(i, SPACE);
        match bytes[i..end].iter().rposition(|&b| b == b'\r' || b == b'\n') {
            Some(last) => i + last + 1,
            None => self.space_word(i, end),
        }
    }

    /// The end of letters and marks from `i` on that are not `forbidden`.
    fn letters(self, mut i: usize, forbidden: fn(char) -> bool) -> usize {
        while let Some(c) = self.char(i).filter(|&c| self.flags.of(c) & (LETTER | MARK) != 0 && !forbidden(c))
        {
            i += c.len_utf8();
        }
        i
    }

    /// The end of `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+` at `i`, if it is there.
    fn cased_word(self, i: usize) -> Option<usize> {
        let capitals = self.letters(i, is_small);
        let end = self.letters(capitals, is_capital);
        if end > capitals {
            return Some(end);
        }
        // No small letter follows: what is allowed among both and stands last takes their part.
        let last = self.text[i..capitals].char_indices().rev().find(|&(_, c)| !is_capital(c));
        last.map(|(at, c)| i + at + c.len_utf8())
    }

    /// The end of `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*` at `i`, if it is there.
    fn capital_word(self, i: usize) -> Option<usize> {
        let capitals = self.letters(i, is_small);
        (capitals > i).then(|| self.letters(capitals, is_capital))
    }

    /// The end of the white space at `i` that is a word of its own: all of it before the end of the text, else all
    /// but the last character, which the next word may take; that one alone if it is alone.
    #[inline(always)]
    fn space_word(self, i: usize, end: usize) -> usize {
        if end == self.text.len() {
            return end;
        }
        let last = self.text[..end].char_indices().next_back().map_or(i, |(at, _)| at);
        if last > i { last } else { end }
    }
}

/// How many of the bytes, from the lowest on, are ASCII letters.
#[inline(always)]
fn leading_letters(bytes: u64) -> usize {
    const EACH: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x80 * EACH;
    // Small letters, without the highest bits: no byte carries into the next one.
    let small = (bytes | (0x20 * EACH)) & !HIGH;
    let from_a = small + (0x80 - b'a' as u64) * EACH;
    let beyond_z = small + (0x80 - b'z' as u64 - 1) * EACH;
    let letters = from_a & !beyond_z & !bytes & HIGH;
    (!letters & HIGH).trailing_zeros() as usize / 8
}

fn bert(text: &str, emit: &mut impl FnMut(usize, usize)) {
    let cursor = Cursor::new(text);
    let mut i = 0;
    while let Some(c) = cursor.char(i) {
        let flags = cursor.flags.of(c);
        let end = if flags & SPACE != 0 {
            i += c.len_utf8();
            continue;
        } else if flags & PUNCTUATION != 0 {
            i + c.len_utf8()
        } else {
            cursor.skip_without(i, SPACE | PUNCTUATION, usize::MAX)
        };
        emit(i, end);
        i = end;
    }
}

const WORD: u8 = LETTER | NUMBER;

fn gpt2<const DIGITS_ALONE: bool>(text: &str, emit: &mut impl FnMut(usize, usize)) {
    let cursor = Cursor::new(text);
    let bytes = text.as_bytes();
    let mut i = 0;
    while let Some(c) = cursor.char(i) {
        let contraction = if c == '\'' { contraction(&bytes[i + 1..], false) } else { 0 };
        // A space belongs to the word after it.
        let start = i + usize::from(c == ' ');
        let flags = cursor.flags(start);
        let end = if contraction > 0 {
            i + 1 + contraction
        } else if flags & LETTER != 0 {
            cursor.skip_letters(start)
        } else if flags & NUMBER != 0 {
            match DIGITS_ALONE {
                true if c == ' ' => start,
                true => i + cursor.width(i),
                false => cursor.skip(start, NUMBER),
            }
        } else if flags & SPACE == 0 && start < bytes.len() {
            cursor.skip_without(start, WORD | SPACE, usize::MAX)
        } else {
            match cursor.skip(i, SPACE) {
                // Before a digit the text ends, as it were.
                end if DIGITS_ALONE && cursor.flags(end) & NUMBER != 0 => end,
                end => cursor.space_word(i, end),
            }
        };
        emit(i, end);
        i = end;
    }
}

fn llama3(text: &str, digits: usize, emit: &mut impl FnMut(usize, usize)) {
    let cursor = Cursor::new(text);
    let bytes = text.as_bytes();
    let mut i = 0;
    while let Some(c) = cursor.char(i) {
        let contraction = if c == '\'' { contraction(&bytes[i + 1..], true) } else { 0 };
        let flags = cursor.flags.of(c);
        let after = i + c.len_utf8();
        let line_end = c == '\r' || c == '\n';
        let end = if contraction > 0 {
            i + 1 + contraction
        } else if flags & LETTER != 0
            || (!line_end && flags & NUMBER == 0 && cursor.flags(after) & LETTER != 0)
        {
            cursor.skip_letters(after)
        } else {
            cursor.no_word(i, digits, b"\r\n")
        };
        emit(i, end);
        i = end;
    }
}

fn o200k(text: &str, emit: &mut impl FnMut(usize, usize)) {
    let cursor = Cursor::new(text);
    let bytes = text.as_bytes();
    let mut i = 0;
    while let Some(c) = cursor.char(i) {
        let after = i + c.len_utf8();
        let prefix = !matches!(c, '\r' | '\n') && cursor.flags.of(c) & WORD == 0;
        // A sign before the word belongs to it, where that makes one.
        let cased = prefix.then(|| cursor.cased_word(after)).flatten().or_else(|| cursor.cased_word(i));
        let capital =
            || prefix.then(|| cursor.capital_word(after)).flatten().or_else(|| cursor.capital_word(i));
        let end = match cased.or_else(capital) {
            Some(end) if bytes.get(end) == Some(&b'\'') => match contraction(&bytes[end + 1..], true) {
                0 => end,
                n => end + 1 + n,
            },
            Some(end) => end,
            None => cursor.no_word(i, 3, b"\r\n/"),
        };
        emit(i, end);
        i = end;
    }
}

/// Whether a letter or mark is lowercase (Ll): what may not stand among the capitals of a word.
fn is_small(c: char) -> bool {
    // Letters with the property Lowercase that are modifiers (Lm) or have no case of their own (Lo), and a mark.
    c.is_lowercase()
        && !matches!(c as u32, 0xaa | 0xba | 0x2b0..=0x2b8 | 0x2c0..=0x2c1 | 0x2e0..=0x2e4 | 0x345 | 0x37a
            | 0x10fc | 0x1d2c..=0x1d6a | 0x1d78 | 0x1d9b..=0x1dbf | 0x2071 | 0x207f | 0x2090..=0x209c
            | 0x2c7c..=0x2c7d | 0xa69c..=0xa69d | 0xa770 | 0xa7f1..=0xa7f4 | 0xa7f8..=0xa7f9
            | 0xab5c..=0xab5f | 0xab69 | 0x10780 | 0x10783..=0x10785 | 0x10787..=0x107b0
            | 0x107b2..=0x107ba | 0x1e030..=0x1e06d)
}

/// Whether a letter is a capital (Lu) or a titlecase digraph (Lt).
fn is_capital(c: char) -> bool {
    c.is_uppercase()
        || matches!(c as u32, 0x1c5 | 0x1c8 | 0x1cb | 0x1f2 | 0x1f88..=0x1f8f | 0x1f98..=0x1f9f
            | 0x1fa8..=0x1faf | 0x1fbc | 0x1fcc | 0x1ffc)
}

/// The length of the English ending that `rest`, what follows an apostrophe, starts with: s, t, re, ve, m, ll, d.
///
/// Case-blind, the long s (U+017F) counts as s: that is its case folding.
#[inline]
fn contraction(rest: &[u8], any_case: bool) -> usize {
    let at = |i: usize| match rest.get(i) {
        Some(b) if any_case => b.to_ascii_lowercase(),
        Some(&b) => b,
        None => 0,
    };
    match (at(0), at(1)) {
        (b'r', b'e') | (b'v', b'e') | (b'l', b'l') => 2,
        (b's' | b't' | b'm' | b'd', _) => 1,
        (0xc5, 0xbf) if any_case => 2,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(splitter: Splitter, text: &str) -> Vec<&str> {
        let mut out = vec![];
        splitter.split(text, &mut |a, b| out.push(&text[a..b]));
        out
    }

    #[test]
    fn gpt2_words() {
        let w = |t| words(Splitter::Gpt2 { digits_alone: false }, t);
        assert_eq!(w("I'm  you'LL 12ab  "), ["I", "'m", " ", " you", "'", "LL", " 12", "ab", "  "]);
        assert_eq!(w("a\n\n b\u{3000}c ...!'s"), ["a", "\n\n", " b", "\u{3000}", "c", " ...!'", "s"]);
        assert_eq!(w(" "), [" "]);
        assert_eq!(w("x \t"), ["x", " \t"]);
    }

    #[test]
    fn digits_alone_are_two_splitters_in_one() {
        let parts = ["a", "Z", "'s", "'", " ", "  ", "\n", "1", "٣", "é", "中", "!", "abcdefgh", "ijklmnopq"];
        let alone = Splitter::Digits { individual: true };
        let gpt2 = Splitter::Gpt2 { digits_alone: false };
        let both = alone.then(&gpt2).unwrap();
        let mut state = 1u32;
        for _ in 0..20_000 {
            let mut text = String::new();
            for _ in 0..12 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                text.push_str(parts[(state >> 8) as usize % parts.len()]);
            }
            let nested: Vec<&str> =
                words(alone.clone(), &text).into_iter().flat_map(|part| words(gpt2.clone(), part)).collect();
            assert_eq!(words(both.clone(), &text), nested, "{text:?}");
        }
    }

    #[test]
    fn letters_are_counted_by_eights() {
        for at in 0..8 {
            for byte in 0..=255u8 {
                let mut bytes = *b"aZbYcXzA";
                bytes[at] = byte;
                let n = bytes.iter().take_while(|b| b.is_ascii_alphabetic()).count();
                assert_eq!(leading_letters(u64::from_le_bytes(bytes)), n, "{bytes:?}");
            }
        }
    }

    #[test]
    fn llama3_words() {
        let w = |t| words(Splitter::Llama3 { digits: 3 }, t);
        assert_eq!(w("I'M 12345 a.\n\n b"), ["I", "'M", " ", "123", "45", " a", ".\n\n", " b"]);
        assert_eq!(w("x \n \n  y\t-z"), ["x", " \n \n", " ", " y", "\t", "-z"]);
        assert_eq!(words(Splitter::Llama3 { digits: 1 }, "12"), ["1", "2"]);
    }

    #[test]
    fn o200k_words() {
        let w = |t| words(Splitter::O200k, t);
        assert_eq!(w("helloWorld HTTPServer's x"), ["hello", "World", " HTTPServer's", " x"]);
        assert_eq!(w("ABC中 中AB -Ab/\n/ 1234"), ["ABC中", " 中", "AB", " -", "Ab", "/\n/", " ", "123", "4"]);
    }

    #[test]
    fn other_words() {
        assert_eq!(words(Splitter::Bert, " don't  stop"), ["don", "'", "t", "stop"]);
        assert_eq!(words(Splitter::Before('▁'), "▁▁a▁b"), ["▁", "▁a", "▁b"]);
        assert_eq!(words(Splitter::Whitespace, " a b\n"), ["a", "b"]);
        assert_eq!(words(Splitter::Digits { individual: true }, "a12b"), ["a", "1", "2", "b"]);
        assert_eq!(words(Splitter::Digits { individual: false }, "12b"), ["12", "b"]);
    }
}
