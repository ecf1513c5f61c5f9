//! Byte-pair encoding: a word starts as characters (or bytes) and pairs are merged, the earliest learned first.
//!
//! Source: Sennrich 2016, "Neural Machine Translation of Rare Words with Subword Units", algorithm 1. Ties (the same
//! pair twice in a word) go to the left. Short words scan for the best pair; long ones keep a heap, O(n log n).

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

use crate::bytes::byte_to_char;
use crate::vocab::Vocab;
use crate::{Error, Result, parallel};

/// No id: also the end of a list.
const NONE: u32 = u32::MAX;
/// Words of up to this many symbols are scanned; beyond, the heap wins.
const SCAN: usize = 40;

/// Merges that a thread looks up at a time.
const PART: usize = 1 << 13;

/// A token of a word: its id and the number of bytes it covers.
pub(crate) type Piece = (u32, u32);

/// The settings of a BPE model beside vocabulary and merges, as tokenizer.json names them.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct BpeOptions {
    /// Stands for what has no token.
    pub(crate) unk_token: Option<String>,
    /// Neighbouring unknowns become one.
    pub(crate) fuse_unk: bool,
    /// Characters without a token are written as tokens `<0x00>` … `<0xFF>`.
    pub(crate) byte_fallback: bool,
    /// A word that is a token is that token, whatever the merges say.
    pub(crate) ignore_merges: bool,
}

/// A BPE model.
#[derive(Clone, Debug)]
pub(crate) struct Bpe {
    pub(crate) vocab: Vocab,
    /// The merges in order, as pairs of tokens' ids.
    pub(crate) merges: Vec<(u32, u32)>,
    pub(crate) options: BpeOptions,
    byte_level: bool,
    /// Pair → (rank, id).
    ranks: FxHashMap<u64, (u32, u32)>,
    /// Symbol of each byte (byte-level) or of `<0x..>` (byte fallback), else `NONE`.
    byte_ids: Box<[u32; 256]>,
    /// Symbol of each character, ASCII ones in a table.
    ascii_ids: Box<[u32; 128]>,
    char_ids: FxHashMap<char, u32>,
    unk: Option<u32>,
}

/// Working memory of a merge, kept between words.
#[derive(Default)]
pub(crate) struct BpeScratch {
    symbols: Vec<Symbol>,
    ranks: Vec<u32>,
    heap: BinaryHeap<Reverse<(u32, u32, u32)>>,
    spelled: String,
}

#[derive(Clone, Copy)]
struct Symbol {
    id: u32,
    /// Bytes covered; 0 once merged into the symbol before.
    len: u32,
    prev: u32,
    next: u32,
}

/// Collects the first symbols of a word. Unknown characters wait for what follows, as they may be fused.
struct Start<'a> {
    symbols: &'a mut Vec<Symbol>,
    unk: Option<u32>,
    fuse: bool,
    /// Bytes of the unknown that waits.
    waiting: usize,
}

impl Start<'_> {
    #[inline]
    fn push(&mut self, id: u32, len: usize) {
        self.symbols.push(Symbol { id, len: len as u32, prev: NONE, next: NONE });
    }

    fn flush(&mut self) {
        if let (Some(unk), 1..) = (self.unk, self.waiting) {
            self.push(unk, self.waiting);
        }
        self.waiting = 0;
    }

    /// Adds a symbol of `len` bytes, or an unknown for `NONE`; the reference leaves it out if there is no unknown token.
    #[inline]
    fn add(&mut self, id: u32, len: usize) {
        if id != NONE {
            if self.waiting > 0 {
                self.flush();
            }
            self.push(id, len);
        } else {
            if !self.fuse {
                self.flush();
            }
            self.waiting += len;
        }
    }
}

#[inline]
fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

impl Bpe {
    /// A model of `vocab` and `merges` (pairs of token strings); `byte_level` if words come as bytes.
    pub(crate) fn new(
        vocab: Vocab,
        merges: &[(impl AsRef<str> + Sync, impl AsRef<str> + Sync)],
        options: BpeOptions,
        byte_level: bool,
    ) -> Result<Self> {
        let id = |token: &str| {
            let missing = || format!("{token:?} of a merge is not in the vocabulary");
            vocab.id(token).ok_or_else(|| Error::format("model", missing()))
        };
        // What the merges of a file make mostly comes in the order of ids: look there before searching.
        let makes = |id: u32, left: &str, right: &str| {
            vocab.token(id).is_some_and(|t| {
                t.len() == left.len() + right.len() && t.starts_with(left) && t.ends_with(right)
            })
        };
        let n_parts = merges.len().div_ceil(PART);
        let parts = parallel::map(n_parts, 0, String::new, |part, joined| {
            let mut last = 0;
            let merges = merges[part * PART..].iter().take(PART);
            let triple = |(left, right): &(_, _)| {
                let (left, right): (&str, &str) = (AsRef::as_ref(left), AsRef::as_ref(right));
                last = match [last, last + 1].into_iter().find(|&id| makes(id, left, right)) {
                    Some(id) => id,
                    None => {
                        joined.clear();
                        joined.push_str(left);
                        joined.push_str(right);
                        id(joined)?
                    }
                };
                Ok((id(left)?, id(right)?, last))
            };
            merges.map(triple).collect::<Result<Vec<_>>>()
        });
        let triples = parts.into_iter().collect::<Result<Vec<_>>>()?.concat();
        Self::with_ids(vocab, triples, options, byte_level)
    }

    /// The same of merges as ids: left, right, and what they make.
    pub(crate) fn with_ids(
        vocab: Vocab,
        merges: Vec<(u32, u32, u32)>,
        options: BpeOptions,
        byte_level: bool,
    ) -> Result<Self> {
        let refuse = |problem: String| Error::format("model", problem);
        let mut pairs = Vec::with_capacity(merges.len());
        let mut ranks = FxHashMap::default();
        ranks.reserve(merges.len());
        for ((left, right, merged), rank) in merges.into_iter().zip(0..) {
            pairs.push((left, right));
            ranks.insert(pair(left, right), (rank, merged));
        }
        let unk = match &options.unk_token {
            Some(unk) => Some(
                vocab.id(unk).ok_or_else(|| refuse(format!("unk_token {unk:?} is not in the vocabulary")))?,
            ),
            None => None,
        };
        let mut byte_ids = Box::new([NONE; 256]);
        let mut ascii_ids = Box::new([NONE; 128]);
        let mut char_ids = FxHashMap::default();
        for byte in 0..=255u8 {
            let token = if byte_level { byte_to_char(byte).to_string() } else { format!("<0x{byte:02X}>") };
            if byte_level || options.byte_fallback {
                byte_ids[byte as usize] = vocab.id(&token).unwrap_or(NONE);
            }
        }
        for (token, id) in vocab.iter() {
            let mut chars = token.chars();
            if let (Some(c), None) = (chars.next(), chars.next()) {
                match ascii_ids.get_mut(c as usize) {
                    Some(slot) => *slot = id,
                    None => {
                        char_ids.insert(c, id);
                    }
                }
            }
        }
        Ok(Self { vocab, merges: pairs, options, byte_level, ranks, byte_ids, ascii_ids, char_ids, unk })
    }

    /// Whether every token is one character: a character-level vocabulary.
    pub(crate) fn is_characters(&self) -> bool {
        self.merges.is_empty() && !self.byte_level && !self.options.byte_fallback
    }

    #[inline]
    fn char_id(&self, c: char) -> Option<u32> {
        let id = match self.ascii_ids.get(c as usize) {
            Some(&id) => id,
            None => self.char_ids.get(&c).copied().unwrap_or(NONE),
        };
        (id != NONE).then_some(id)
    }

    /// Appends the ids of a text of single-character tokens.
    pub(crate) fn characters(&self, text: &str, out: &mut Vec<u32>) -> Result<()> {
        out.reserve(text.len());
        let mut unknown = false;
        for c in text.chars() {
            match (self.char_id(c), self.unk) {
                (Some(id), _) => {
                    out.push(id);
                    unknown = false;
                    continue;
                }
                (None, Some(unk)) if !(unknown && self.options.fuse_unk) => out.push(unk),
                (None, Some(_)) => {}
                (None, None) => return Err(unknown_character(c)),
            }
            unknown = true;
        }
        Ok(())
    }

    /// Appends the tokens of `word`.
    pub(crate) fn tokenize(&self, word: &str, scratch: &mut BpeScratch, out: &mut Vec<Piece>) -> Result<()> {
        if self.options.ignore_merges
            && let Some(id) = self.whole(word, &mut scratch.spelled)
        {
            out.push((id, word.len() as u32));
            return Ok(());
        }
        scratch.symbols.clear();
        self.start(word, &mut scratch.symbols)?;
        if scratch.symbols.len() <= SCAN {
            self.merge_by_scan(scratch);
        } else {
            self.merge_by_heap(scratch);
        }
        out.extend(scratch.symbols.iter().filter(|s| s.len > 0).map(|s| (s.id, s.len)));
        Ok(())
    }

    /// The token that is all of `word`, which is spelled out in `spelled` if that takes the byte alphabet.
    fn whole(&self, word: &str, spelled: &mut String) -> Option<u32> {
        if !self.byte_level {
            return self.vocab.id(word);
        }
        spelled.clear();
        spelled.extend(word.bytes().map(byte_to_char));
        self.vocab.id(spelled)
    }

    /// Where the tokens of `word` stand, as (first byte, last byte), if that is not one after the other: bytes that a
    /// byte-level vocabulary lacks, without an unknown token, are left out.
    ///
    /// The library then counts on as if they had not been there, and in the byte alphabet, where a byte that is no
    /// printable ASCII character takes two; so that is where the tokens are found.
    pub(crate) fn misplaced(&self, word: &[u8], pieces: &[Piece]) -> Option<Vec<(usize, usize)>> {
        let covered: usize = pieces.iter().map(|&(_, len)| len as usize).sum();
        if !self.byte_level || covered == word.len() {
            return None;
        }
        let width = |byte: u8| if byte.is_ascii_graphic() { 1 } else { 2 };
        // The byte that each byte of the word's spelling is of.
        let spelled: Vec<usize> =
            word.iter().enumerate().flat_map(|(i, &byte)| std::iter::repeat_n(i, width(byte))).collect();
        let mut kept = word.iter().filter(|&&byte| self.byte_ids[byte as usize] != NONE);
        let mut at = 0;
        let places = pieces.iter().map(|&(_, len)| {
            let start = at;
            at += kept.by_ref().take(len as usize).map(|&byte| width(byte)).sum::<usize>();
            (spelled[start], spelled[at - 1])
        });
        Some(places.collect())
    }

    /// The symbols that `word` starts as.
    fn start(&self, word: &str, symbols: &mut Vec<Symbol>) -> Result<()> {
        let mut start = Start { symbols, unk: self.unk, fuse: self.options.fuse_unk, waiting: 0 };
        if self.byte_level {
            for &byte in word.as_bytes() {
                start.add(self.byte_ids[byte as usize], 1);
            }
        } else {
            for c in word.chars() {
                let id = self.char_id(c).unwrap_or(NONE);
                if id == NONE {
                    let mut buffer = [0; 4];
                    let bytes = c.encode_utf8(&mut buffer).as_bytes();
                    if bytes.iter().all(|&b| self.byte_ids[b as usize] != NONE) {
                        bytes.iter().for_each(|&b| start.push(self.byte_ids[b as usize], 1));
                        continue;
                    }
                    if self.unk.is_none() && self.is_characters() {
                        return Err(unknown_character(c));
                    }
                }
                start.add(id, c.len_utf8());
            }
        }
        start.flush();
        Ok(())
    }

    #[inline]
    fn rank(&self, left: u32, right: u32) -> u32 {
        self.ranks.get(&pair(left, right)).map_or(NONE, |&(rank, _)| rank)
    }

    /// Finds the best pair by looking at all of them, merges it, and so on.
    fn merge_by_scan(&self, scratch: &mut BpeScratch) {
        let BpeScratch { symbols, ranks, .. } = scratch;
        ranks.clear();
        ranks.extend(symbols.windows(2).map(|w| self.rank(w[0].id, w[1].id)));
        loop {
            let mut best = (NONE, 0);
            for (i, &rank) in ranks.iter().enumerate() {
                if rank < best.0 {
                    best = (rank, i);
                }
            }
            let (rank, i) = best;
            if rank == NONE {
                return;
            }
            symbols[i].id = self.ranks[&pair(symbols[i].id, symbols[i + 1].id)].1;
            symbols[i].len += symbols[i + 1].len;
            symbols.remove(i + 1);
            ranks.remove(i);
            if i > 0 {
                ranks[i - 1] = self.rank(symbols[i - 1].id, symbols[i].id);
            }
            if i + 1 < symbols.len() {
                ranks[i] = self.rank(symbols[i].id, symbols[i + 1].id);
            }
        }
    }

    /// The same with a heap of (rank, position, merged id); an entry is stale once its pair is no longer there.
    fn merge_by_heap(&self, scratch: &mut BpeScratch) {
        let BpeScratch { symbols, heap, .. } = scratch;
        heap.clear();
        let n = symbols.len();
        for i in 0..n {
            symbols[i].prev = if i == 0 { NONE } else { i as u32 - 1 };
            symbols[i].next = if i + 1 == n { NONE } else { i as u32 + 1 };
            if i + 1 < n
                && let Some(&(rank, id)) = self.ranks.get(&pair(symbols[i].id, symbols[i + 1].id))
            {
                heap.push(Reverse((rank, i as u32, id)));
            }
        }
        while let Some(Reverse((rank, i, merged))) = heap.pop() {
            let left = symbols[i as usize];
            if left.len == 0 || left.next == NONE {
                continue;
            }
            let right = symbols[left.next as usize];
            if self.ranks.get(&pair(left.id, right.id)) != Some(&(rank, merged)) {
                continue;
            }
            symbols[left.next as usize].len = 0;
            symbols[i as usize] =
                Symbol { id: merged, len: left.len + right.len, prev: left.prev, next: right.next };
            if right.next != NONE {
                symbols[right.next as usize].prev = i;
                if let Some(&(rank, id)) = self.ranks.get(&pair(merged, symbols[right.next as usize].id)) {
                    heap.push(Reverse((rank, i, id)));
                }
            }
            if left.prev != NONE
                && let Some(&(rank, id)) = self.ranks.get(&pair(symbols[left.prev as usize].id, merged))
            {
                heap.push(Reverse((rank, left.prev, id)));
            }
        }
    }
}

fn unknown_character(c: char) -> Error {
    Error::Encode(format!(
        "character {c:?} (U+{:04X}) is not in the vocabulary and there is no unknown token; train with unk_token, or \
         on text that has it",
        c as u32
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn model(merges: &[(&str, &str)]) -> Bpe {
        let mut tokens: Vec<String> = "abc".chars().map(String::from).collect();
        let merges: Vec<(String, String)> = merges.iter().map(|&(l, r)| (l.into(), r.into())).collect();
        tokens.extend(merges.iter().map(|(l, r)| format!("{l}{r}")));
        let vocab = Vocab::new(&tokens.into_iter().zip(0..).collect::<Vec<_>>()).unwrap();
        Bpe::new(vocab, &merges, BpeOptions::default(), true).unwrap()
    }

    proptest! {
        #[test]
        fn heap_and_scan_agree(word in "[abc]{0,60}") {
            let model = model(&[("a", "b"), ("c", "a"), ("a", "a"), ("ab", "ab"), ("aa", "b"), ("b", "c"), ("ca", "b")]);
            let mut both = [BpeScratch::default(), BpeScratch::default()];
            for scratch in &mut both {
                model.start(&word, &mut scratch.symbols).unwrap();
            }
            model.merge_by_scan(&mut both[0]);
            model.merge_by_heap(&mut both[1]);
            let [scan, heap] = both.map(|s| {
                s.symbols.iter().filter(|s| s.len > 0).map(|s| (s.id, s.len)).collect::<Vec<_>>()
            });
            prop_assert_eq!(scan, heap);
        }
    }

    #[test]
    fn the_earliest_merge_goes_first_and_from_the_left() {
        let model = model(&[("a", "a"), ("aa", "b")]);
        let mut out = vec![];
        model.tokenize("aaab", &mut BpeScratch::default(), &mut out).unwrap();
        // aa|a|b: the left pair is taken, so that aab is not to be had.
        assert_eq!(out, [(3, 2), (0, 1), (1, 1)]);
    }
}
