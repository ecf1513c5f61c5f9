//! Batches for permutation language models: rows of a packed corpus, some tokens of which are predicted in a random
//! order.
//!
//! Source: Yang et al. 2019, "XLNet", sections 2.2 and 2.3; spans as Hugging Face's
//! `DataCollatorForPermutationLanguageModeling` draws them: of 1 to `max_span_length` tokens, each alone in a stretch of
//! length / `plm_probability`. What is not predicted comes first in the order and is seen by all.
//!
//! Spans and order of a row depend on (seed, epoch, block, position) only.

use crate::IGNORED_LABEL;
use crate::corpus::Corpus;
use crate::error::{Error, Result, check_size};
use crate::masker::Draws;
use crate::pack::{Block, CausalBatches, CausalOptions};
use crate::purpose::PERMUTE;

/// The most pairs of tokens of a batch: `perm_mask` takes half a gigabyte.
pub const MOST_PAIRS: usize = 1 << 27;

/// How to cut a corpus into permuted batches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PermutedOptions {
    /// The rows; documents are not kept apart.
    pub rows: CausalOptions,
    /// Share of tokens to predict, above 0 and at most 1; Hugging Face: 1/6.
    pub plm_probability: f64,
    /// The greatest length of a span, at least 1; Hugging Face: 5.
    pub max_span_length: usize,
}

/// One permuted batch; arrays are row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PermutedBatch {
    /// Tokens in a row (T).
    pub seq_len: usize,
    /// Most targets in a row (P).
    pub targets_len: usize,
    /// Token ids `[B, T]`; 0 at padding.
    pub input_ids: Vec<i32>,
    /// 1 where the first token does not see the second `[B, T, T]`. Padding is seen by padding only.
    pub perm_mask: Vec<i32>,
    /// The places of the targets in their row, rising, then −1 `[B, P]`.
    pub targets: Vec<i32>,
    /// The ids there, then −100 `[B, P]`.
    pub labels: Vec<i32>,
    /// How many labels are not −100.
    pub labels_count: usize,
}

/// A corpus of token ids as permuted batches.
#[derive(Clone, Debug)]
pub struct PermutedBatches {
    rows: CausalBatches,
    options: PermutedOptions,
    targets_len: usize,
}

impl PermutedBatches {
    /// Batches of a corpus.
    ///
    /// # Errors
    /// As [`CausalBatches::new`], or if an option is outside the range its documentation gives.
    pub fn new(corpus: Corpus, options: PermutedOptions) -> Result<Self> {
        let PermutedOptions { rows, plm_probability, max_span_length } = options;
        if !(plm_probability > 0.0 && plm_probability <= 1.0) {
            return Err(Error::option("plm_probability", plm_probability, "above 0 and at most 1"));
        }
        if max_span_length == 0 || max_span_length > 1 << 16 {
            return Err(Error::option("max_span_length", max_span_length, "from 1 to 65536"));
        }
        let length = rows.seq_len;
        check_size(rows.batch_size, "seq_len × seq_len", length.saturating_mul(length), MOST_PAIRS)?;
        let rows =
            CausalBatches::new(corpus, CausalOptions { separate_documents: false, prefix: false, ..rows })?;
        // The most tokens that spans of a row can hold, to a multiple of 8.
        let stretches = length.div_ceil(((1.0 / plm_probability) as usize).max(1));
        Ok(Self { rows, options, targets_len: length.min((2 * stretches).next_multiple_of(8)) })
    }

    /// Batches that hold every block once.
    #[must_use]
    pub fn batches_per_pass(&self) -> u64 {
        self.rows.batches_per_pass()
    }

    /// How many of the first batches would be the same for any longer corpus that begins with this one.
    #[must_use]
    pub fn settled_steps(&self) -> u64 {
        self.rows.settled_steps()
    }

    /// The numbers of the documents in each row of batch `step`.
    #[must_use]
    pub fn documents(&self, step: u64) -> Vec<Vec<usize>> {
        self.rows.documents(step)
    }

    /// Batch `step`, a pure function of the options and `step`; its rows are those of [`CausalBatches::batch`].
    #[must_use]
    pub fn batch(&self, step: u64) -> PermutedBatch {
        let (t, p) = (self.options.rows.seq_len, self.targets_len);
        let rows = self.rows.batch(step);
        let mut batch = PermutedBatch {
            seq_len: t,
            targets_len: p,
            input_ids: rows.input_ids,
            perm_mask: vec![0; rows.batch_size * t * t],
            targets: vec![-1; rows.batch_size * p],
            labels: vec![IGNORED_LABEL; rows.batch_size * p],
            labels_count: 0,
        };
        for row in 0..rows.batch_size {
            let Some(block) = self.rows.block(step, row) else { continue };
            let draws = Draws::of(self.options.rows.seed, PERMUTE, block.epoch, block.number as usize);
            let sought = self.sought(draws, &block);
            for (i, &place) in sought.iter().enumerate() {
                batch.targets[row * p + i] = place as i32;
                batch.labels[row * p + i] = batch.input_ids[row * t + place];
            }
            batch.labels_count += sought.len();
            hide(&mut batch.perm_mask[row * t * t..(row + 1) * t * t], &sought, block.len, draws);
        }
        batch
    }

    /// The places of a row to predict, rising.
    fn sought(&self, draws: Draws, block: &Block) -> Vec<usize> {
        let (mut sought, mut at) = (Vec::new(), 0);
        while at < block.len {
            let [length, place, ..] = draws.at(at);
            let span = 1 + below(length, self.options.max_span_length);
            let stretch = (span as f64 / self.options.plm_probability) as usize;
            let start = at + below(place, stretch - span + 1);
            sought.extend(start..block.len.min(start + span));
            at += stretch;
        }
        sought.truncate(self.targets_len);
        sought
    }
}

/// A uniform integer below `bound`, to within `bound` / 2^32.
fn below(word: u32, bound: usize) -> usize {
    ((u64::from(word) * bound as u64) >> 32) as usize
}

/// Hides from each of the first `len` tokens of a row what is sought and not before it in the order, and what is padding.
fn hide(mask: &mut [i32], sought: &[usize], len: usize, draws: Draws) {
    let order = |place: usize| {
        let [_, _, high, low] = draws.at(place);
        (u64::from(high) << 32 | u64::from(low), place)
    };
    let mut turns: Vec<Option<(u64, usize)>> = vec![None; len];
    for &place in sought {
        turns[place] = Some(order(place));
    }
    let width = mask.len().isqrt();
    for (row, turn) in mask.chunks_exact_mut(width).zip(&turns) {
        // Without a turn, a token is before all that have one.
        for &place in sought {
            row[place] = i32::from(*turn <= turns[place]);
        }
        row[len..].fill(1);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn batches(tokens: u32, options: PermutedOptions) -> PermutedBatches {
        let ids: Vec<u32> = (0..tokens).collect();
        let corpus = Corpus::held(ids.into(), vec![0, u64::from(tokens)].into()).unwrap();
        PermutedBatches::new(corpus, options).unwrap()
    }

    fn options(seq_len: usize, batch_size: usize, seed: u64, shuffle: bool) -> PermutedOptions {
        let rows =
            CausalOptions { seq_len, batch_size, seed, shuffle, separate_documents: false, prefix: false };
        PermutedOptions { rows, plm_probability: 1.0 / 6.0, max_span_length: 5 }
    }

    proptest! {
        #[test]
        fn targets_have_an_order_and_padding_is_hidden(
            tokens in 2u32..400, seq_len in 1usize..60, batch_size in 1usize..5, seed: u64, shuffle: bool, step in 0u64..99,
            plm_probability in 0.01f64..1.0, max_span_length in 1usize..9,
        ) {
            prop_assume!(tokens as usize > seq_len);
            let options = PermutedOptions { plm_probability, max_span_length, ..options(seq_len, batch_size, seed, shuffle) };
            let batches = batches(tokens, options);
            let (batch, plain) = (batches.batch(step), batches.rows.batch(step));
            prop_assert_eq!(&batch.input_ids, &plain.input_ids);
            let (t, p) = (seq_len, batch.targets_len);
            let mut count = 0;
            for row in 0..batch_size {
                let len = batches.rows.block(step, row).map_or(0, |block| block.len);
                let places: Vec<usize> =
                    batch.targets[row * p..(row + 1) * p].iter().filter(|&&at| at >= 0).map(|&at| at as usize).collect();
                count += places.len();
                prop_assert!(places.windows(2).all(|pair| pair[0] < pair[1]));
                prop_assert!(places.iter().all(|&place| place < len));
                for (i, &label) in batch.labels[row * p..(row + 1) * p].iter().enumerate() {
                    let expected = places.get(i).map_or(-100, |&place| batch.input_ids[row * t + place]);
                    prop_assert_eq!(label, expected);
                }
                let hidden = |i: usize, j: usize| batch.perm_mask[row * t * t + i * t + j] == 1;
                for i in 0..t {
                    for j in 0..t {
                        let expected = if i >= len { Some(false) }
                            else if j >= len { Some(true) }
                            else if !places.contains(&j) { Some(false) }
                            else if !places.contains(&i) || i == j { Some(true) }
                            else { None };
                        // Of two targets exactly one sees the other.
                        let expected = expected.unwrap_or_else(|| !hidden(j, i));
                        prop_assert_eq!(hidden(i, j), expected, "{} {} of {}", i, j, len);
                    }
                }
            }
            prop_assert_eq!(batch.labels_count, count);
        }
    }

    #[test]
    fn a_row_is_the_same_in_any_batch_and_other_in_any_epoch() {
        let (one, four) = (batches(900, options(30, 1, 7, true)), batches(900, options(30, 4, 7, true)));
        for step in 0..20 {
            let batch = four.batch(step);
            for row in 0..4 {
                let alone = one.batch(step * 4 + row as u64);
                assert_eq!(
                    alone.targets,
                    batch.targets[row * alone.targets_len..(row + 1) * alone.targets_len]
                );
                assert_eq!(alone.perm_mask, batch.perm_mask[row * 900..(row + 1) * 900]);
            }
        }
        assert_ne!(one.batch(0).perm_mask, one.batch(30).perm_mask);
        let share = (0..600).map(|step| one.batch(step).labels_count).sum::<usize>() as f64 / 18_000.0;
        assert!((share - 1.0 / 6.0).abs() < 0.02, "{share}");
    }

    #[test]
    fn errors_say_what_to_do() {
        let of = |change: &dyn Fn(&mut PermutedOptions)| {
            let mut options = options(8, 2, 0, true);
            change(&mut options);
            let corpus = Corpus::held((0..99).collect(), vec![0, 99].into()).unwrap();
            PermutedBatches::new(corpus, options).unwrap_err().to_string()
        };
        assert!(of(&|o| o.plm_probability = 0.0).contains("plm_probability is 0"));
        assert!(of(&|o| o.max_span_length = 0).contains("max_span_length"));
        assert!(of(&|o| o.rows.seq_len = 1 << 20).contains("batch_size"));
        assert!(of(&|o| o.rows.seq_len = 100).contains("99 tokens"));
    }
}
