//! Batches of pairs of texts for BERT's pre-training: masked tokens, and whether the second text follows the first.
//!
//! Source: Devlin et al. 2019, section 3.1 and appendix A.2. Sentences that follow each other in a document and fill a
//! row are cut in two at a random place; in half of the rows the second part is replaced by sentences from a random
//! place of another document. Masks are those of [`MaskedOptions`] over the whole row.
//!
//! What becomes of a run of sentences depends on (seed, epoch, run, position) only.

use std::borrow::Cow;

use pyrformer_random::Permutation;

use crate::IGNORED_LABEL;
use crate::corpus::Corpus;
use crate::error::{Error, Result, check_offsets};
use crate::mask::MaskedBatch;
use crate::masker::{Draws, MaskedOptions, MaskedRow, Masker, chosen};
use crate::purpose::{PAIR, PAIR_ORDER};

/// One batch of pairs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PairBatch {
    /// Rows `[CLS] A [SEP] B [SEP]`; `token_type_ids` are 1 behind the first `[SEP]`, 0 at padding.
    pub rows: MaskedBatch,
    /// 0 where the second text follows the first, 1 where it is a random one, −100 in a missing row `[B]`.
    pub sentence_labels: Vec<i32>,
}

/// A corpus of sentences as batches of pairs.
#[derive(Clone, Debug)]
pub struct PairBatches {
    corpus: Corpus,
    /// The first sentence of each document, and the end of the last `[D + 1]`.
    bounds: Vec<usize>,
    masker: Masker,
    runs: Vec<Run>,
    /// Tokens of both texts of a row, at most.
    room: usize,
}

/// Sentences of a document that fill a row: `first..end`.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: usize,
    end: usize,
    document: usize,
}

impl PairBatches {
    /// Batches of a corpus whose documents are sentences, none of them empty; document `d` of the text is the sentences
    /// `bounds[d]..bounds[d + 1]`.
    ///
    /// # Errors
    /// If an option is outside the range its documentation gives, `max_length` is below 5, an id is not below
    /// `vocab_size`, `bounds` do not cut the sentences into documents, no document has two sentences, or there is no
    /// other place to take a second text from.
    pub fn new(corpus: Corpus, bounds: &[u64], options: MaskedOptions) -> Result<Self> {
        let masker = Masker::new(options)?;
        let options = &masker.options;
        if options.max_length < 5 {
            let rule = "at least 5: two texts between [CLS] and two [SEP]";
            return Err(Error::option("seq_len", options.max_length, rule));
        }
        corpus.check_ids(options.vocab_size)?;
        check_offsets(corpus.documents().len().saturating_sub(1), bounds)?;
        let room = options.max_length - 3;
        let bounds: Vec<usize> = bounds.iter().map(|&at| at as usize).collect();
        let mut pairs = Self { corpus, bounds, masker, runs: Vec::new(), room };
        pairs.runs = (0..pairs.bounds.len() - 1).flat_map(|document| pairs.cut(document)).collect();
        if pairs.runs.iter().all(|run| pairs.others(run).1 == 0) {
            return Err(Error::NoPairs);
        }
        Ok(pairs)
    }

    /// Runs of at least two sentences of a document, as many as fit into a row.
    fn cut(&self, document: usize) -> Vec<Run> {
        let (first, end) = (self.bounds[document], self.bounds[document + 1]);
        let starts = self.corpus.documents();
        let (mut at, mut found) = (first, Vec::new());
        while at < end {
            let fits = starts.partition_point(|&start| start <= starts[at] + self.room as u64) - 1;
            let stop = fits.max(at + 2).min(end);
            // The last sentence alone: the one before it is used twice.
            let from = if stop - at == 1 && at > first { at - 1 } else { at };
            if stop - from > 1 {
                found.push(Run { first: from, end: stop, document });
            }
            at = stop;
        }
        found
    }

    /// The sentences that a random second text does not begin with, and how many are left: it begins outside the
    /// document, or, where there is only one, outside the run.
    fn others(&self, run: &Run) -> (std::ops::Range<usize>, usize) {
        let around = if self.bounds.len() > 2 {
            self.bounds[run.document]..self.bounds[run.document + 1]
        } else {
            run.first..run.end
        };
        let count = self.bounds[self.bounds.len() - 1] - around.len();
        (around, count)
    }

    /// Batches that hold every run once: the pass of an evaluation, or an epoch rounded up to whole batches.
    #[must_use]
    pub fn batches_per_pass(&self) -> u64 {
        self.runs.len().div_ceil(self.masker.options.batch_size) as u64
    }

    /// The number of the document that each row of batch `step` begins in; sentences of others may follow.
    #[must_use]
    pub fn documents(&self, step: u64) -> Vec<Vec<usize>> {
        self.rows(step).iter().map(|&(_, run)| vec![self.runs[run].document]).collect()
    }

    /// The rows of a batch: epoch and run.
    fn rows(&self, step: u64) -> Vec<(u64, usize)> {
        let MaskedOptions { batch_size, seed, shuffle, .. } = self.masker.options;
        let count = self.runs.len();
        if !shuffle {
            let start = (step % self.batches_per_pass()) as usize * batch_size;
            return (start..count.min(start + batch_size)).map(|run| (0, run)).collect();
        }
        // 128 bits: no step, however large, overflows.
        let first = u128::from(step) * batch_size as u128;
        (first..first + batch_size as u128)
            .map(|index| {
                let (epoch, place) = ((index / count as u128) as u64, (index % count as u128) as u64);
                let order = Permutation::new(count as u64, seed, PAIR_ORDER, epoch as u32);
                (epoch, order.get(place) as usize)
            })
            .collect()
    }

    /// Batch `step`, a pure function of the options and `step`.
    ///
    /// Training: every run once in each epoch; a batch that an epoch leaves incomplete goes on with the next one's first
    /// runs. Evaluation: the runs in order, the last batch completed with padding rows.
    #[must_use]
    pub fn batch(&self, step: u64) -> PairBatch {
        let options = &self.masker.options;
        let rows: Vec<_> = self.rows(step).into_iter().map(|(epoch, run)| self.pair(epoch, run)).collect();
        let longest = rows.iter().map(|(a, b, ..)| a.len() + b.len() + 3).max().unwrap_or(0);
        let rounded = longest.checked_next_multiple_of(options.pad_to_multiple_of).unwrap_or(usize::MAX);
        let seq_len = options.fixed_length.unwrap_or(rounded.min(options.max_length));
        let places = options.batch_size * seq_len;
        let mut input_ids = vec![options.pad as i32; places];
        let (mut attention_mask, mut token_type_ids) = (vec![0; places], vec![0; places]);
        let mut labels = vec![IGNORED_LABEL; places];
        let mut sentence_labels = vec![IGNORED_LABEL; options.batch_size];
        let mut masked = Vec::with_capacity(2 * rows.len());
        for (b, (one, two, label, draws)) in rows.iter().enumerate() {
            let (cls, sep) = ([options.cls], [options.sep]);
            let ids = [&cls[..], one, &sep, two, &sep].concat();
            let place = b * seq_len;
            for (to, &id) in input_ids[place..].iter_mut().zip(&ids) {
                *to = id as i32;
            }
            attention_mask[place..place + ids.len()].fill(1);
            token_type_ids[place + one.len() + 2..place + ids.len()].fill(1);
            sentence_labels[b] = *label;
            let second = place + one.len() + 2;
            masked.push(MaskedRow { place: place + 1, ids: Cow::Borrowed(one), draws: draws[0] });
            masked.push(MaskedRow { place: second, ids: Cow::Borrowed(two), draws: draws[1] });
        }
        self.masker.mask(&masked, &mut input_ids, &mut labels);
        let (positions, masked_labels, labels_count) = chosen(&labels);
        let masked = MaskedBatch {
            batch_size: options.batch_size,
            seq_len,
            rows: rows.len(),
            input_ids,
            attention_mask,
            token_type_ids,
            labels,
            positions,
            masked_labels,
            labels_count,
        };
        PairBatch { rows: masked, sentence_labels }
    }

    /// Both texts of a run in an epoch, whether the second one is random (1), and the draws for their masks.
    fn pair(&self, epoch: u64, number: usize) -> (Vec<u32>, Vec<u32>, i32, [Draws; 2]) {
        let seed = self.masker.options.seed;
        let (run, draws) = (&self.runs[number], Draws::of(seed, PAIR, epoch, number));
        let [middle, random, other, _] = draws.at(0);
        let middle = run.first + 1 + below(middle, run.end - run.first - 1);
        let (one, mut two) = (self.tokens(run.first, middle), self.tokens(middle, run.end));
        let (around, count) = self.others(run);
        let is_random = random < 1 << 31 && count > 0;
        if is_random {
            let at = below(other, count);
            let at = if at >= around.start { at + around.len() } else { at };
            let end = self.bounds[self.bounds.partition_point(|&bound| bound <= at)];
            two = self.tokens(at, end);
            two.truncate(self.room.saturating_sub(one.len()).max(1));
        }
        let (one, two) = self.fitted(one, two, draws);
        (one, two, i32::from(is_random), [0, 1].map(|text| Draws::new(seed, epoch, 2 * number + text)))
    }

    fn tokens(&self, first: usize, end: usize) -> Vec<u32> {
        let starts = self.corpus.documents();
        self.corpus.ids(starts[first] as usize..starts[end] as usize).into_owned()
    }

    /// Shortens the longer text until both fit, each token taken from the front or the back at random.
    fn fitted(&self, mut one: Vec<u32>, mut two: Vec<u32>, draws: Draws) -> (Vec<u32>, Vec<u32>) {
        if one.len() + two.len() <= self.room {
            return (one, two);
        }
        let half = self.room / 2;
        let keep = if one.len() <= half {
            one.len()
        } else {
            self.room.saturating_sub(two.len()).max(self.room - half)
        };
        for (text, keep, first) in [(&mut one, keep, 1), (&mut two, self.room - keep, 1 << 32)] {
            let over = text.len() - keep;
            text.drain(..heads(draws, first, over));
            text.truncate(keep);
        }
        (one, two)
    }
}

/// A uniform integer below `bound`, to within `bound` / 2^32.
fn below(word: u32, bound: usize) -> usize {
    ((u64::from(word) * bound as u64) >> 32) as usize
}

/// How many of `count` coins show heads; they are drawn from position `first` on.
fn heads(draws: Draws, first: usize, count: usize) -> usize {
    (0..count.div_ceil(128))
        .map(|i| {
            let [a, b, c, d] = draws.at(first + i).map(u128::from);
            let bits = a | b << 32 | c << 64 | d << 96;
            let used = (count - 128 * i).min(128) as u32;
            (bits & (u128::MAX >> (128 - used))).count_ones() as usize
        })
        .sum()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::HashMap;

    use super::*;
    use crate::masker::{Spans, Words};
    use proptest::prelude::*;

    const CLS: u32 = 1;
    const SEP: u32 = 2;
    const PAD: u32 = 0;
    const HIDDEN: u32 = 3;

    fn options(batch_size: usize, max_length: usize, seed: u64, shuffle: bool) -> MaskedOptions {
        let options = MaskedOptions::new(batch_size, max_length, 3000, [CLS, SEP, PAD, HIDDEN]);
        MaskedOptions { seed, shuffle, ..options }
    }

    /// Documents of sentences of the given lengths, with ids that rise from 4 on.
    fn pairs(documents: &[Vec<usize>], options: MaskedOptions) -> Result<PairBatches> {
        let (mut starts, mut bounds) = (vec![0], vec![0]);
        for sentences in documents {
            for &len in sentences {
                starts.push(starts[starts.len() - 1] + len as u64);
            }
            bounds.push(starts.len() as u64 - 1);
        }
        let ids: Vec<u32> = (0..starts[starts.len() - 1] as u32).map(|i| 4 + i).collect();
        PairBatches::new(Corpus::held(ids.into(), starts.into())?, &bounds, options)
    }

    proptest! {
        #[test]
        fn rows_are_pairs_and_an_epoch_holds_each_run_once(
            documents in prop::collection::vec(prop::collection::vec(1usize..15, 1..9), 2..8),
            batch_size in 1usize..6, max_length in 5usize..40, seed: u64,
        ) {
            let given = options(batch_size, max_length, seed, true);
            let Ok(pairs) = pairs(&documents, given) else { return Ok(()) };
            let runs = pairs.runs.len();
            let steps = (2 * runs).div_ceil(batch_size) as u64;
            let mut seen = HashMap::new();
            for step in 0..steps {
                let batch = pairs.batch(step);
                let width = batch.rows.seq_len;
                prop_assert!(batch.rows.labels_count > 0);
                for (b, &row) in pairs.rows(step).iter().enumerate() {
                    *seen.entry(row).or_insert(0) += 1;
                    let at = b * width..(b + 1) * width;
                    let real: i32 = batch.rows.attention_mask[at.clone()].iter().sum();
                    // What it was before it was masked.
                    let ids: Vec<i32> = at
                        .clone()
                        .map(|i| if batch.rows.labels[i] == -100 { batch.rows.input_ids[i] } else { batch.rows.labels[i] })
                        .collect();
                    prop_assert_eq!(ids[0], CLS as i32);
                    prop_assert_eq!(ids[real as usize - 1], SEP as i32);
                    let middle = ids.iter().position(|&id| id == SEP as i32).unwrap();
                    let types = &batch.rows.token_type_ids[at];
                    prop_assert!((0..width).all(|i| types[i] == i32::from(i > middle && i < real as usize)));
                    let (one, two) = (&ids[1..middle], &ids[middle + 1..real as usize - 1]);
                    prop_assert!(!one.is_empty() && !two.is_empty() && one.len() + two.len() <= pairs.room);
                    for text in [one, two] {
                        prop_assert!(text.windows(2).all(|pair| pair[1] == pair[0] + 1));
                    }
                    let document = |id: i32| {
                        let sentence = pairs.corpus.documents().partition_point(|&at| at as i32 <= id - 4) - 1;
                        pairs.bounds.partition_point(|&bound| bound <= sentence) - 1
                    };
                    prop_assert_eq!(document(one[0]), pairs.documents(step)[b][0]);
                    prop_assert_eq!(document(one[0]) == document(two[0]), batch.sentence_labels[b] == 0);
                    if batch.sentence_labels[b] == 0 {
                        prop_assert!(two[0] > one[one.len() - 1]);
                    }
                }
            }
            for run in 0..runs {
                prop_assert_eq!(seen.get(&(0, run)), Some(&1));
            }
        }
    }

    #[test]
    fn a_row_is_the_same_in_any_batch() {
        let documents: Vec<Vec<usize>> = (0..40).map(|i| vec![3 + i % 4; 2 + i % 5]).collect();
        let fixed = |size| MaskedOptions { fixed_length: Some(32), ..options(size, 32, 4, true) };
        let (one, four) = (pairs(&documents, fixed(1)).unwrap(), pairs(&documents, fixed(4)).unwrap());
        let mut random = 0;
        for step in 0..60 {
            let batch = four.batch(step);
            random += batch.sentence_labels.iter().sum::<i32>();
            for b in 0..4 {
                let alone = one.batch(step * 4 + b as u64);
                let at = b * 32..(b + 1) * 32;
                if alone.rows.labels_count > 1 {
                    assert_eq!(alone.rows.input_ids, batch.rows.input_ids[at.clone()]);
                    assert_eq!(alone.rows.labels, batch.rows.labels[at]);
                }
                assert_eq!(alone.sentence_labels, batch.sentence_labels[b..=b]);
            }
        }
        assert!((90..150).contains(&random), "{random} of 240 second texts are random");
        assert_ne!(one.batch(0), one.batch(one.runs.len() as u64));
    }

    #[test]
    fn spans_and_words_stay_within_a_text() {
        let documents = vec![vec![7; 6]; 30];
        let words = Words::new(|ids| ids.iter().map(|id| id % 3 == 0).collect());
        let spans = Some(Spans { p: 0.2, max_length: 10 });
        let masked = MaskedOptions { spans, whole_word: Some(words), ..options(8, 48, 1, true) };
        let pairs = pairs(&documents, masked).unwrap();
        let (mut labelled, mut places, mut runs) = (0, 0, 0);
        for step in 0..60 {
            let batch = pairs.batch(step).rows;
            let chosen = |i: usize| batch.labels[i] != -100;
            for i in 0..batch.labels.len() {
                labelled += usize::from(chosen(i));
                places += usize::from(batch.attention_mask[i] == 1);
                runs += usize::from(chosen(i) && !chosen(i - 1));
                let id = if chosen(i) { batch.labels[i] } else { batch.input_ids[i] };
                assert!(!chosen(i) || id >= 4, "special tokens are never chosen");
                // Words: the ids that are no multiples of 3 go with the one before them, within a text.
                if i > 0 && id >= 4 && id % 3 != 0 {
                    let before = if chosen(i - 1) { batch.labels[i - 1] } else { batch.input_ids[i - 1] };
                    assert!(before != id - 1 || chosen(i) == chosen(i - 1));
                }
            }
        }
        let (share, length) = (labelled as f64 / places as f64, labelled as f64 / runs as f64);
        assert!((share - 0.14).abs() < 0.03 && length > 4.0, "{share} in runs of {length}");
    }

    #[test]
    fn an_evaluation_pads_its_last_batch_and_errors_say_what_to_do() {
        let documents = vec![vec![3, 3]; 5];
        let batches = pairs(&documents, options(4, 16, 0, false)).unwrap();
        assert_eq!(batches.batches_per_pass(), 2);
        let last = batches.batch(1);
        assert_eq!((last.rows.rows, &last.sentence_labels[1..]), (1, &[-100; 3][..]));
        assert_eq!(batches.documents(1), [vec![4]]);
        assert_eq!(batches.batch(2), batches.batch(0));
        for few in [vec![vec![3]], vec![vec![3], vec![4]], vec![vec![3, 3]], vec![]] {
            let text = pairs(&few, options(4, 16, 0, true)).unwrap_err().to_string();
            assert!(text.contains("two paragraphs"), "{text}");
        }
        let text = pairs(&documents, options(4, 4, 0, true)).unwrap_err().to_string();
        assert!(text.contains("seq_len is 4"), "{text}");
        let corpus = Corpus::held(vec![4, 5].into(), vec![0, 1, 2].into()).unwrap();
        assert!(PairBatches::new(corpus, &[0, 3], options(4, 16, 0, true)).is_err());
    }
}
