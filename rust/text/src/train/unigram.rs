//! Learning Unigram: many pieces to begin with, then expectation-maximisation with pruning down to the vocabulary.
//!
//! Source: Kudo 2018, "Subword Regularization", section 3.2; the steps and their constants are those of SentencePiece
//! (`unigram_model_trainer.cc`): pieces of up to 16 characters that repeat, two EM rounds between prunings, a Bayesian
//! M-step (digamma), three quarters of the pieces kept by each pruning, those whose loss would lower the likelihood most.
//!
//! The pieces come from a suffix array, and so does, once and for all, where each of them occurs: a round only walks
//! lists of occurrences, which shrink with the vocabulary. Expected counts are sums of fixed-point numbers, whose order
//! does not matter: any number of threads gives the same bits.

use std::cmp::Reverse;

use crate::parallel;
use crate::train::Progress;

/// Longest piece, in characters.
const MAX_PIECE: usize = 16;
/// Longer words are cut into parts of so many characters, over which products of probabilities stay in range.
const MAX_PART: usize = 32;
/// Most pieces to begin with, and most words to learn from, the most frequent ones.
const MAX_SEEDS: usize = 1_000_000;
const MAX_WORDS: usize = 1_000_000;
/// EM rounds between prunings, what a pruning keeps, and the expected count below which a piece goes.
const ROUNDS: usize = 2;
const KEPT: f64 = 0.75;
const LEAST: f64 = 0.5;
/// One, as an expected count in fixed point.
const ONE: f64 = (1u64 << 24) as f64;
/// Bits of an occurrence that hold the length.
const LENGTH_BITS: u32 = 5;
/// Words of one piece of work.
const RUN: usize = 1 << 12;

/// The words as one string of character numbers, and where pieces occur in it.
struct Corpus {
    /// Character numbers from 1 on, word after word.
    text: Vec<u16>,
    /// Where each word starts, and the end of the last.
    starts: Vec<u32>,
    counts: Vec<u64>,
    /// Where the occurrences that start at each character are in `edges`, and the end.
    at: Vec<u32>,
    /// Piece and its length: `piece << LENGTH_BITS | length`.
    edges: Vec<u32>,
}

struct Piece {
    /// One place where it stands.
    place: u32,
    length: u32,
    /// Log probability.
    score: f64,
}

/// An edge's piece and its length.
#[inline(always)]
fn unpack(edge: u32) -> (usize, usize) {
    ((edge >> LENGTH_BITS) as usize, (edge & ((1 << LENGTH_BITS) - 1)) as usize)
}

/// Learns at most `size` pieces of `words`, made of the characters of `alphabet` (sorted); all of these are among them.
/// Returns pieces with log probabilities, the likeliest first.
pub(super) fn learn(
    words: &[(String, u64)],
    alphabet: &[char],
    size: usize,
    threads: usize,
    progress: &mut dyn FnMut(Progress),
) -> Vec<(String, f64)> {
    let (mut corpus, mut pieces) = seed(words, alphabet);
    let n_chars = alphabet.len();
    // Slightly more than wanted: the last cut is by score.
    let target = (size.saturating_mul(11) / 10).max(n_chars);
    let total = pieces.len();
    let mut tell = |n: usize| {
        // Prunings take away shares, so that progress goes by the logarithm.
        let done = (total as f64 / n as f64).ln() / (total as f64 / target as f64).max(1.001).ln();
        progress(Progress { stage: "prune", done: (done.clamp(0.0, 1.0) * 1000.0) as usize, total: 1000 });
    };
    loop {
        tell(pieces.len());
        for _ in 0..ROUNDS {
            let expected = expect(&corpus, &pieces, threads);
            maximise(&mut corpus, &mut pieces, &expected, n_chars);
        }
        if pieces.len() <= target {
            break;
        }
        let keep = target.max((pieces.len() as f64 * KEPT) as usize);
        prune(&mut corpus, &mut pieces, n_chars, keep, threads);
    }
    tell(target.min(pieces.len()));
    let string = |p: &Piece| -> String {
        let chars = &corpus.text[p.place as usize..][..p.length as usize];
        chars.iter().map(|&c| alphabet[c as usize - 1]).collect()
    };
    // Characters stay, then the likeliest others.
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    let by_score = |&i: &usize| (Reverse(Total(pieces[i].score)), i);
    order[n_chars..].sort_unstable_by_key(by_score);
    order.truncate(size.max(n_chars));
    order.sort_unstable_by_key(by_score);
    order.into_iter().map(|i| (string(&pieces[i]), pieces[i].score)).collect()
}

/// A float by its total order.
#[derive(PartialEq)]
struct Total(f64);

impl Eq for Total {}

impl PartialOrd for Total {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Total {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// The words as character numbers; a character outside the alphabet ends a part.
fn parts(words: &[(String, u64)], alphabet: &[char]) -> (Vec<u16>, Vec<u32>, Vec<u64>) {
    let mut frequent: Vec<usize> = (0..words.len()).collect();
    if words.len() > MAX_WORDS {
        frequent.sort_unstable_by_key(|&i| (Reverse(words[i].1), i));
        frequent.truncate(MAX_WORDS);
        frequent.sort_unstable();
    }
    let (mut text, mut starts, mut counts) = (vec![], vec![0u32], vec![]);
    for i in frequent {
        let (word, n) = &words[i];
        let number = |c: char| alphabet.binary_search(&c).ok().map(|i| i as u16 + 1);
        for number in word.chars().map(number).chain([None]) {
            let length = text.len() - *starts.last().unwrap_or(&0) as usize;
            if length > 0 && (number.is_none() || length == MAX_PART) {
                starts.push(text.len() as u32);
                counts.push(*n);
            }
            text.extend(number);
        }
    }
    (text, starts, counts)
}

/// The first pieces: all characters, then the substrings that repeat and cannot be made longer without becoming rarer,
/// the highest product of count and length first; with all their occurrences.
fn seed(words: &[(String, u64)], alphabet: &[char]) -> (Corpus, Vec<Piece>) {
    let (text, starts, counts) = parts(words, alphabet);
    let mut ends = vec![0u32; text.len()];
    let mut weights = vec![0u64; text.len()];
    for (w, &count) in counts.iter().enumerate() {
        let range = starts[w] as usize..starts[w + 1] as usize;
        ends[range.clone()].fill(starts[w + 1]);
        weights[range].fill(count);
    }
    let suffix = |i: u32| &text[i as usize..(ends[i as usize] as usize).min(i as usize + MAX_PIECE)];
    let mut suffixes: Vec<(u64, u32)> = (0..text.len() as u32)
        .map(|i| ((0..4).fold(0u64, |key, k| key << 16 | u64::from(*suffix(i).get(k).unwrap_or(&0))), i))
        .collect();
    let rest = |i: u32| suffix(i).get(4..).unwrap_or(&[]);
    suffixes.sort_unstable_by(|a, b| (a.0, rest(a.1), a.1).cmp(&(b.0, rest(b.1), b.1)));
    let order: Vec<u32> = suffixes.into_iter().map(|(_, i)| i).collect();
    let mut sums = vec![0u64];
    sums.extend(order.iter().scan(0u64, |sum, &i| {
        *sum += weights[i as usize];
        Some(*sum)
    }));
    let nodes = nodes(&order, &suffix, &sums);
    let mut pieces: Vec<Piece> = vec![];
    let mut totals = vec![0u64; alphabet.len()];
    let mut places = vec![0u32; alphabet.len()];
    for (i, &c) in text.iter().enumerate() {
        totals[c as usize - 1] += weights[i];
        places[c as usize - 1] = i as u32;
    }
    let weight = nodes.iter().map(|n| n.weight as f64).chain(totals.iter().map(|&n| n as f64));
    let log_sum = weight.sum::<f64>().ln();
    for (&n, &place) in totals.iter().zip(&places) {
        pieces.push(Piece { place, length: 1, score: (n.max(1) as f64).ln() - log_sum });
    }
    for node in &nodes {
        let score = (node.weight as f64).ln() - log_sum;
        pieces.push(Piece { place: order[node.first as usize], length: node.length, score });
    }
    // Occurrences: counted, then placed.
    let mut at = vec![0u32; text.len() + 1];
    for i in 0..text.len() {
        at[i + 1] = 1;
    }
    for node in &nodes {
        order[node.first as usize..=node.last as usize].iter().for_each(|&i| at[i as usize + 1] += 1);
    }
    for i in 0..text.len() {
        at[i + 1] += at[i];
    }
    let mut edges = vec![0u32; at[text.len()] as usize];
    let mut next = at.clone();
    let mut place = |i: usize, piece: usize, length: u32| {
        edges[next[i] as usize] = (piece as u32) << LENGTH_BITS | length;
        next[i] += 1;
    };
    for (i, &c) in text.iter().enumerate() {
        place(i, c as usize - 1, 1);
    }
    for (k, node) in nodes.iter().enumerate() {
        for &i in &order[node.first as usize..=node.last as usize] {
            place(i as usize, alphabet.len() + k, node.length);
        }
    }
    (Corpus { text, starts, counts, at, edges }, pieces)
}

/// A substring: the suffixes `first..=last` in order start with it.
struct Node {
    first: u32,
    last: u32,
    length: u32,
    /// Count times length.
    weight: u64,
}

/// The substrings to begin with, by walking the sorted suffixes with a stack of open ones.
fn nodes<'t>(order: &[u32], suffix: &impl Fn(u32) -> &'t [u16], sums: &[u64]) -> Vec<Node> {
    let mut nodes = vec![];
    let mut close = |first: usize, last: usize, length: usize| {
        let count = sums[last + 1] - sums[first];
        if length > 1 && count > 1 {
            let weight = count.saturating_mul(length as u64);
            nodes.push(Node { first: first as u32, last: last as u32, length: length as u32, weight });
        }
    };
    // (length, first suffix) of the substrings that are open, ever longer.
    let mut open: Vec<(usize, usize)> = vec![];
    for i in 0..order.len() {
        let here = suffix(order[i]);
        let common = match order.get(i + 1) {
            Some(&next) => here.iter().zip(suffix(next)).take_while(|(a, b)| a == b).count(),
            None => 0,
        };
        // The whole of a suffix that no other continues; else it is open already, or is opened below.
        if here.len() > common && open.last().is_none_or(|&(length, _)| length < here.len()) {
            close(i, i, here.len());
        }
        let mut first = i;
        while let Some(&(length, start)) = open.last().filter(|&&(length, _)| length > common) {
            close(start, i, length);
            first = start;
            open.pop();
        }
        if common > 0 && open.last().is_none_or(|&(length, _)| length < common) {
            open.push((common, first));
        }
    }
    nodes.sort_unstable_by_key(|n| (Reverse(n.weight), n.first, n.length));
    nodes.truncate(MAX_SEEDS);
    nodes
}

impl Corpus {
    /// Runs `work` on runs of words on several threads; what the threads gather comes in no particular order.
    fn each<T: Send>(
        &self,
        threads: usize,
        state: impl Fn() -> T + Sync,
        work: impl Fn(usize, &mut T) + Sync,
    ) -> Vec<T> {
        let n = self.counts.len();
        parallel::run(n.div_ceil(RUN), threads, |queue| {
            let mut state = state();
            for run in queue.take() {
                (run * RUN..n.min((run + 1) * RUN)).for_each(|word| work(word, &mut state));
            }
            state
        })
    }

    fn range(&self, word: usize) -> (usize, usize) {
        (self.starts[word] as usize, self.starts[word + 1] as usize)
    }

    /// The occurrences that start at `i`.
    #[inline(always)]
    fn edges_at(&self, i: usize) -> &[u32] {
        &self.edges[self.at[i] as usize..self.at[i + 1] as usize]
    }

    /// Drops the occurrences of pieces without a `number` and gives the others theirs.
    fn renumber(&mut self, numbers: &[Option<u32>]) {
        let (mut kept, mut from) = (0, 0);
        for i in 0..self.text.len() {
            let to = self.at[i + 1] as usize;
            for k in from..to {
                let (piece, length) = unpack(self.edges[k]);
                if let Some(number) = numbers[piece] {
                    self.edges[kept] = number << LENGTH_BITS | length as u32;
                    kept += 1;
                }
            }
            from = to;
            self.at[i + 1] = kept as u32;
        }
        self.edges.truncate(kept);
    }

    /// The likeliest split of `start..end`, as pieces from the end; without the piece that is all of it if `parted`.
    fn best_split(&self, pieces: &[Piece], (start, end): (usize, usize), parted: bool, out: &mut Vec<u32>) {
        let n = end - start;
        let mut best = [(f64::NEG_INFINITY, 0u32); MAX_PART + 1];
        best[0].0 = 0.0;
        for i in 0..n {
            let so_far = best[i].0;
            for &edge in self.edges_at(start + i) {
                let (piece, length) = unpack(edge);
                if i + length > n || (parted && length == n) {
                    continue;
                }
                let score = so_far + pieces[piece].score;
                if score > best[i + length].0 {
                    best[i + length] = (score, edge);
                }
            }
        }
        out.clear();
        let mut i = n;
        while i > 0 && best[i].0 > f64::NEG_INFINITY {
            let (piece, length) = unpack(best[i].1);
            out.push(piece as u32);
            i -= length;
        }
        if i > 0 {
            out.clear();
        }
    }
}

/// How often each piece is expected, over all splits by their probability; in fixed point.
fn expect(corpus: &Corpus, pieces: &[Piece], threads: usize) -> Vec<u64> {
    // Every split of a word covers it once, so a factor for each character changes no share; it keeps products in range.
    const PER_CHARACTER: f64 = 3.0;
    let weights: Vec<f64> =
        pieces.iter().map(|p| (p.score + PER_CHARACTER * f64::from(p.length)).exp()).collect();
    let sums = corpus.each(
        threads,
        || vec![0u64; pieces.len()],
        |word, sums| {
            let (start, end) = corpus.range(word);
            let n = end - start;
            let mut before = [0f64; MAX_PART + 1];
            let mut after = [0f64; MAX_PART + 1];
            (before[0], after[n]) = (1.0, 1.0);
            for i in 0..n {
                for &edge in corpus.edges_at(start + i) {
                    let (piece, length) = unpack(edge);
                    before[i + length] += before[i] * weights[piece];
                }
            }
            let all = before[n];
            if !(all > 0.0 && all.is_finite()) {
                return;
            }
            let scale = corpus.counts[word] as f64 * ONE / all;
            for i in (0..n).rev() {
                let mut sum = 0.0;
                for &edge in corpus.edges_at(start + i) {
                    let (piece, length) = unpack(edge);
                    let onward = weights[piece] * after[i + length];
                    sum += onward;
                    sums[piece] = sums[piece].saturating_add((before[i] * onward * scale) as u64);
                }
                after[i] = sum;
            }
        },
    );
    add(sums)
}

/// Adds up what threads gathered; integers, so that their order does not show.
fn add(sums: Vec<Vec<u64>>) -> Vec<u64> {
    let mut sums = sums.into_iter();
    let mut all = sums.next().unwrap_or_default();
    for sum in sums {
        all.iter_mut().zip(sum).for_each(|(a, b)| *a = a.saturating_add(b));
    }
    all
}

/// Drops the pieces that are hardly expected, characters excepted, and gives the others their probabilities.
fn maximise(corpus: &mut Corpus, pieces: &mut Vec<Piece>, expected: &[u64], n_chars: usize) {
    let mut numbers = vec![None; pieces.len()];
    let mut counts = vec![];
    for (i, &n) in expected.iter().enumerate() {
        let n = n as f64 / ONE;
        if i < n_chars || n >= LEAST {
            numbers[i] = Some(counts.len() as u32);
            counts.push(n.max(LEAST));
        }
    }
    retain(corpus, pieces, &numbers);
    let log_sum = digamma(counts.iter().sum());
    for (piece, n) in pieces.iter_mut().zip(counts) {
        piece.score = digamma(n) - log_sum;
    }
}

fn retain(corpus: &mut Corpus, pieces: &mut Vec<Piece>, numbers: &[Option<u32>]) {
    if numbers.iter().any(Option::is_none) {
        corpus.renumber(numbers);
        let mut number = numbers.iter();
        pieces.retain(|_| number.next().is_some_and(Option::is_some));
    }
}

/// Keeps the `keep` pieces whose loss would cost most: what the likeliest splits lose if a piece is replaced by its own
/// likeliest split. A piece that no likeliest split has goes first.
fn prune(corpus: &mut Corpus, pieces: &mut Vec<Piece>, n_chars: usize, keep: usize, threads: usize) {
    let counts = add(corpus
        .each(
            threads,
            || (vec![0u64; pieces.len()], vec![]),
            |word, (counts, split)| {
                corpus.best_split(pieces, corpus.range(word), false, split);
                split.iter().for_each(|&p| counts[p as usize] += corpus.counts[word]);
            },
        )
        .into_iter()
        .map(|(counts, _)| counts)
        .collect());
    let total: f64 = counts.iter().map(|&n| n as f64).sum();
    let log_total = total.ln();
    let losses = parallel::map(pieces.len().div_ceil(RUN), threads, Vec::new, |run, split| {
        let loss = |i: usize, split: &mut Vec<u32>| {
            let n = counts[i] as f64;
            if i < n_chars || n == 0.0 {
                return if i < n_chars { f64::INFINITY } else { f64::NEG_INFINITY };
            }
            let place = pieces[i].place as usize;
            corpus.best_split(pieces, (place, place + pieces[i].length as usize), true, split);
            let log_sum = (total + n * (split.len() as f64 - 1.0)).ln();
            let parted: f64 = split.iter().map(|&p| (counts[p as usize] as f64 + n).ln() - log_sum).sum();
            n / total * (n.ln() - log_total - parted)
        };
        (run * RUN..pieces.len().min((run + 1) * RUN)).map(|i| loss(i, split)).collect::<Vec<f64>>()
    })
    .concat();
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    order.sort_unstable_by_key(|&i| (Reverse(Total(losses[i])), i));
    let mut kept = vec![false; pieces.len()];
    order.iter().take(keep).for_each(|&i| kept[i] = true);
    let mut n = 0;
    let numbers: Vec<Option<u32>> = kept
        .into_iter()
        .map(|kept| {
            n += u32::from(kept);
            kept.then(|| n - 1)
        })
        .collect();
    retain(corpus, pieces, &numbers);
}

/// The derivative of the logarithm of the gamma function: the recurrence up to 7, then the asymptotic series
/// (Abramowitz and Stegun, 6.3.18).
fn digamma(mut x: f64) -> f64 {
    let mut result = 0.0;
    while x < 7.0 {
        result -= 1.0 / x;
        x += 1.0;
    }
    let y = 1.0 / (x * x);
    result + x.ln()
        - 0.5 / x
        - y * (1.0 / 12.0 - y * (1.0 / 120.0 - y * (1.0 / 252.0 - y * (1.0 / 240.0 - y / 132.0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digamma_at_known_places() {
        // -γ, 1 - γ, and Γ'/Γ at one half: -γ - 2 ln 2.
        let gamma = 0.577_215_664_901_532_9;
        for (x, expected) in [(1.0, -gamma), (2.0, 1.0 - gamma), (0.5, -gamma - 2.0 * 2f64.ln())] {
            assert!((digamma(x) - expected).abs() < 1e-10, "{x}");
        }
    }

    #[test]
    fn occurrences_are_where_the_pieces_stand() {
        let words: Vec<(String, u64)> =
            [("▁banana", 3), ("▁bandana", 2), ("▁an", 1), ("▁🙂", 1)].map(|(w, n)| (w.to_owned(), n)).into();
        let alphabet = ['a', 'b', 'd', 'n', '▁'];
        let (corpus, pieces) = seed(&words, &alphabet);
        let string = |place: usize, length: usize| corpus.text[place..place + length].to_vec();
        let mut found = vec![];
        for i in 0..corpus.text.len() {
            for &edge in corpus.edges_at(i) {
                let (piece, length) = unpack(edge);
                assert_eq!(pieces[piece].length as usize, length);
                assert_eq!(string(i, length), string(pieces[piece].place as usize, length));
                found.push((i, length));
            }
        }
        let n = found.len();
        found.sort_unstable();
        found.dedup();
        assert_eq!(found.len(), n, "a substring is one piece");
        // "ana" stands in three places, in words that come five times.
        let ana = pieces.iter().position(|p| string(p.place as usize, p.length as usize) == [1, 4, 1]);
        let ana = ana.expect("it repeats");
        assert_eq!(corpus.edges.iter().filter(|&&e| unpack(e).0 == ana).count(), 3);
    }
}
