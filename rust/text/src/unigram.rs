//! Unigram: the split of a word whose tokens' log probabilities add up highest, found by dynamic programming.
//!
//! Source: Kudo 2018, "Subword Regularization", section 3.2 (Viterbi), with the unknown character's penalty and the
//! joining of neighbouring unknowns as in SentencePiece (`unigram_model.cc`) and the `tokenizers` library. Of two splits
//! that score the same, the one whose last token starts earlier wins.

use crate::bpe::Piece;
use crate::trie::Trie;
use crate::vocab::Vocab;
use crate::{Error, Result};

/// How much less likely than the least likely token an unknown character is, in nats.
const UNKNOWN_PENALTY: f64 = 10.0;

/// A Unigram model.
#[derive(Clone, Debug)]
pub(crate) struct Unigram {
    pub(crate) vocab: Vocab,
    /// Log probability of each token, in nats.
    pub(crate) scores: Vec<f64>,
    pub(crate) unk_id: Option<u32>,
    pub(crate) byte_fallback: bool,
    unknown_score: f64,
    trie: Trie,
    /// Tokens `<0x00>` … `<0xFF>` if there is byte fallback.
    byte_ids: Vec<Option<u32>>,
}

/// The best split of a text that ends at some byte.
#[derive(Clone, Copy)]
struct Best {
    score: f64,
    /// Where its last token starts; `u32::MAX` if no split is known.
    start: u32,
    known: bool,
}

/// Working memory of a search.
#[derive(Default)]
pub(crate) struct UnigramScratch {
    best: Vec<Best>,
    spans: Vec<(usize, usize, bool)>,
}

impl Unigram {
    /// A model of `(token, log probability)` in the order of ids.
    pub(crate) fn new<S: AsRef<str>>(
        entries: &[(S, f64)],
        unk_id: Option<u32>,
        byte_fallback: bool,
    ) -> Result<Self> {
        if unk_id.is_some_and(|id| id as usize >= entries.len()) {
            return Err(Error::format("model", "unk_id is outside the vocabulary"));
        }
        let mut trie = Trie::default();
        for ((token, _), id) in entries.iter().zip(0..) {
            trie.insert(token.as_ref().as_bytes(), id);
        }
        let scores: Vec<f64> = entries.iter().map(|(_, score)| *score).collect();
        let lowest = scores.iter().copied().fold(f64::INFINITY, f64::min);
        let vocab = Vocab::new(&entries.iter().map(|(token, _)| token).zip(0..).collect::<Vec<_>>())?;
        let byte_id = |byte: u8| vocab.id(&format!("<0x{byte:02X}>")).filter(|_| byte_fallback);
        let byte_ids = (0..=255).map(byte_id).collect();
        Ok(Self {
            vocab,
            scores,
            unk_id,
            byte_fallback,
            unknown_score: lowest - UNKNOWN_PENALTY,
            trie,
            byte_ids,
        })
    }

    /// Appends the tokens of `word`.
    pub(crate) fn tokenize(
        &self,
        word: &str,
        scratch: &mut UnigramScratch,
        out: &mut Vec<Piece>,
    ) -> Result<()> {
        let UnigramScratch { best, spans } = scratch;
        let bytes = word.as_bytes();
        best.clear();
        best.resize(bytes.len() + 1, Best { score: 0.0, start: u32::MAX, known: false });
        let offer = |best: &mut Best, score: f64, start: usize, known: bool| {
            if best.start == u32::MAX || score > best.score {
                *best = Best { score, start: start as u32, known };
            }
        };
        for (start, c) in word.char_indices() {
            let so_far = best[start].score;
            let width = c.len_utf8();
            let mut alone = false;
            let mut node = Trie::ROOT;
            for (end, &byte) in (start + 1..).zip(&bytes[start..]) {
                let Some(next) = self.trie.step(node, byte) else { break };
                node = next;
                if let Some(id) = self.trie.value(node) {
                    offer(&mut best[end], so_far + self.scores[id as usize], start, true);
                    alone |= end == start + width;
                }
            }
            if !alone {
                offer(&mut best[start + width], so_far + self.unknown_score, start, false);
            }
        }
        spans.clear();
        let mut end = bytes.len();
        while end > 0 {
            let Best { start, known, .. } = best[end];
            match spans.last_mut() {
                // Walking back, the unknown before an unknown is joined to it.
                Some((later, _, false)) if !known => *later = start as usize,
                _ => spans.push((start as usize, end, known)),
            }
            end = start as usize;
        }
        for &(start, end, _) in spans.iter().rev() {
            let token = &word[start..end];
            if let Some(id) = self.vocab.id(token) {
                out.push((id, token.len() as u32));
            } else if token.bytes().all(|b| self.byte_ids[b as usize].is_some()) {
                out.extend(token.bytes().filter_map(|b| Some((self.byte_ids[b as usize]?, 1))));
            } else if let Some(unk) = self.unk_id {
                out.push((unk, token.len() as u32));
            } else {
                return Err(Error::Encode(format!("{token:?} is unknown and the vocabulary has no unk_id")));
            }
        }
        Ok(())
    }
}
