//! Learning merges: the most frequent pair of neighbouring symbols becomes a symbol, again and again.
//!
//! Source: Sennrich 2016, "Neural Machine Translation of Rare Words with Subword Units", algorithm 1, with incremental
//! counts: a merge changes only the words that hold its pair, found by an index, and a heap yields the next pair. The
//! heap may hold outdated counts; an entry whose count no longer holds is dropped, since each change pushes its own.
//!
//! Order: the highest count, then the smaller left id, then the smaller right id.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::{FxHashMap, FxHashSet};

use crate::Result;
use crate::train::Progress;
use crate::vocab::Vocab;

/// Merges between two reports.
const REPORT: usize = 256;

/// The tokens so far, ids in the order they were added.
pub(super) struct Symbols {
    tokens: Vec<String>,
    ids: FxHashMap<String, u32>,
    /// What symbols inside a word start with.
    prefix: &'static str,
}

impl Symbols {
    /// The special tokens.
    pub(super) fn new(special: &[String], prefix: &'static str) -> Self {
        let mut symbols = Self { tokens: vec![], ids: FxHashMap::default(), prefix };
        special.iter().for_each(|token| {
            symbols.add(token);
        });
        symbols
    }

    /// The id of `token`, a new one if it is not there.
    pub(super) fn add(&mut self, token: &str) -> u32 {
        if let Some(&id) = self.ids.get(token) {
            return id;
        }
        let id = self.tokens.len() as u32;
        self.tokens.push(token.to_owned());
        self.ids.insert(token.to_owned(), id);
        id
    }

    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The token of a merge.
    fn joined(&self, (left, right): Pair) -> String {
        let right = &self.tokens[right as usize];
        let inside = right.strip_prefix(self.prefix).unwrap_or(right);
        format!("{}{inside}", self.tokens[left as usize])
    }

    pub(super) fn into_vocab(self) -> Result<Vocab> {
        Vocab::new(&self.tokens.into_iter().zip(0..).collect::<Vec<_>>())
    }
}

type Pair = (u32, u32);

/// Learns merges on words (their symbols and counts) until there are `vocab_size` symbols or no pair comes at least
/// `min_frequency` times. Returns them in order, as strings.
pub(super) fn learn(
    words: impl Iterator<Item = (Vec<u32>, u64)>,
    symbols: &mut Symbols,
    vocab_size: usize,
    min_frequency: u64,
    progress: &mut dyn FnMut(Progress),
) -> Vec<(String, String)> {
    let mut words: Vec<(Vec<u32>, u64)> = words.filter(|(word, _)| word.len() > 1).collect();
    let mut counts: FxHashMap<Pair, u64> = FxHashMap::default();
    // Which words hold a pair, or did once.
    let mut places: FxHashMap<Pair, Vec<u32>> = FxHashMap::default();
    for (w, (word, n)) in (0u32..).zip(&words) {
        for pair in word.windows(2).map(|p| (p[0], p[1])) {
            *counts.entry(pair).or_insert(0) += n;
            let at = places.entry(pair).or_default();
            if at.last() != Some(&w) {
                at.push(w);
            }
        }
    }
    let mut heap: BinaryHeap<(u64, Reverse<Pair>)> =
        counts.iter().map(|(&pair, &n)| (n, Reverse(pair))).collect();
    let mut merges = vec![];
    let mut changed: FxHashSet<Pair> = FxHashSet::default();
    while symbols.len() < vocab_size {
        let Some((n, Reverse(pair))) = heap.pop() else { break };
        if counts.get(&pair) != Some(&n) {
            continue;
        }
        if n < min_frequency.max(1) {
            break;
        }
        let merged = symbols.add(&symbols.joined(pair));
        merges.push((symbols.tokens[pair.0 as usize].clone(), symbols.tokens[pair.1 as usize].clone()));
        for w in places.remove(&pair).unwrap_or_default() {
            let (word, n) = &mut words[w as usize];
            merge(word, pair, merged, |changed_pair, more| {
                if more {
                    *counts.entry(changed_pair).or_insert(0) += *n;
                    let at = places.entry(changed_pair).or_default();
                    if at.last() != Some(&w) {
                        at.push(w);
                    }
                } else if let Some(count) = counts.get_mut(&changed_pair) {
                    *count -= *n;
                }
                changed.insert(changed_pair);
            });
        }
        counts.remove(&pair);
        for pair in changed.drain() {
            match counts.get(&pair) {
                Some(0) => {
                    counts.remove(&pair);
                    places.remove(&pair);
                }
                Some(&n) => heap.push((n, Reverse(pair))),
                None => {}
            }
        }
        if merges.len() % REPORT == 0 {
            progress(Progress { stage: "merge", done: symbols.len(), total: vocab_size });
        }
    }
    progress(Progress { stage: "merge", done: symbols.len(), total: symbols.len() });
    merges
}

/// Merges `pair` in `word` from the left, and tells of each neighbouring pair that goes (`false`) or comes (`true`).
fn merge(word: &mut Vec<u32>, pair: Pair, merged: u32, mut change: impl FnMut(Pair, bool)) {
    let mut kept = 0;
    let mut at = 0;
    while at < word.len() {
        let here = at + 1 < word.len() && (word[at], word[at + 1]) == pair;
        if !here {
            word[kept] = word[at];
            (kept, at) = (kept + 1, at + 1);
            continue;
        }
        if kept > 0 {
            change((word[kept - 1], pair.0), false);
            change((word[kept - 1], merged), true);
        }
        if let Some(&next) = word.get(at + 2) {
            change((pair.1, next), false);
            change((merged, next), true);
        }
        word[kept] = merged;
        (kept, at) = (kept + 1, at + 2);
    }
    word.truncate(kept);
}
