//! Batches for causal language models: the documents laid end to end and cut into blocks of equal length.
//!
//! For training the corpus is a ring: epoch `e` starts its first block at a phase drawn for it, so that block borders
//! differ between epochs and the remainder that fills no block is not always the same tokens. The number of blocks
//! stays the same, so the place of a step in the stream of blocks is arithmetic, and any batch is reached at once. The
//! first epoch is shuffled in windows, so that it may begin before the end of the corpus is known:
//! [`CausalBatches::settled_steps`].

use pyrformer_random::Stream;
use serde::{Deserialize, Serialize};

use crate::IGNORED_LABEL;
use crate::corpus::Corpus;
use crate::error::{Error, MOST_TOKENS, Result, check_size};
use crate::masker::Draws;
use crate::order::Order;
use crate::purpose::{CAUSAL_ORDER, CAUSAL_PHASE, PREFIX};

/// How to cut a corpus into causal batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CausalOptions {
    /// Tokens in a row (T).
    pub seq_len: usize,
    /// Rows in a batch (B).
    pub batch_size: usize,
    /// Seed of the order and the phases; without effect on evaluation (`shuffle = false`).
    pub seed: u64,
    /// `true`: an endless stream of shuffled epochs, for training; `false`: one pass in order, for evaluation.
    pub shuffle: bool,
    /// Whether documents that share a row are kept apart: by segments, positions from 0 and no label across the
    /// border.
    pub separate_documents: bool,
    /// Whether rows begin with a prefix all of whose tokens see each other, of 1 to T − 1 tokens, each number as
    /// probable; only what follows is predicted. Source: Raffel et al. 2020, section 3.2.1.
    pub prefix: bool,
}

/// One causal batch; arrays are row-major `[B, T]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CausalBatch {
    /// Rows (B).
    pub batch_size: usize,
    /// Tokens in a row (T).
    pub seq_len: usize,
    /// Token ids `[B, T]`; 0 at padding.
    pub input_ids: Vec<i32>,
    /// The id of the next token `[B, T]`, already shifted; −100 where there is none to predict.
    pub labels: Vec<i32>,
    /// `[B, T]`: `0..T` in each row or, with segments, from 0 in each segment (0 at padding).
    pub position_ids: Vec<i32>,
    /// `[B, T]`: 1, 2, … for the documents of a row (0 at padding); `None` where documents are not kept apart or
    /// there is only one.
    pub segment_ids: Option<Vec<i32>>,
    /// Tokens of each row's prefix `[B]`, where there are prefixes; drawn by (seed, epoch, block).
    pub prefix: Option<Vec<i32>>,
    /// How many labels are not −100.
    pub labels_count: usize,
}

/// A block as it stands in a row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) epoch: u64,
    pub(crate) number: u64,
    /// Where it begins in the corpus.
    pub(crate) start: usize,
    /// Its tokens; the last block of an evaluation may have fewer than a row.
    pub(crate) len: usize,
}

/// A corpus of token ids as causal batches.
#[derive(Clone, Debug)]
pub struct CausalBatches {
    corpus: Corpus,
    options: CausalOptions,
    separating: bool,
    blocks: u64,
    order: Order,
}

impl CausalBatches {
    /// Batches of a corpus.
    ///
    /// # Errors
    /// If an id does not fit an `i32`, `seq_len` or `batch_size` is 0 or too large, or the corpus has fewer than
    /// `seq_len + 1` tokens.
    pub fn new(corpus: Corpus, options: CausalOptions) -> Result<Self> {
        let CausalOptions { seq_len, batch_size, .. } = options;
        if seq_len == 0 || seq_len > i32::MAX as usize {
            return Err(Error::option("seq_len", seq_len, "at least 1 and below 2^31"));
        }
        check_size(batch_size, "seq_len", seq_len, MOST_TOKENS)?;
        corpus.check_ids(i32::MAX as usize)?;
        let tokens = corpus.len();
        if tokens <= seq_len {
            return Err(Error::ShortCorpus { tokens, seq_len });
        }
        let with_tokens = corpus.documents().windows(2).filter(|pair| pair[0] < pair[1]).count();
        let blocks = if options.shuffle { tokens / seq_len } else { (tokens - 1).div_ceil(seq_len) } as u64;
        // Behind a window: the phase of its last block, and the label of that one's last token.
        let margin = seq_len as u64 + 1;
        let before = |border| border / seq_len as u64;
        let order = Order::new(blocks, tokens as u64, margin, options.seed, CAUSAL_ORDER, before);
        let separating = options.separate_documents && with_tokens > 1;
        Ok(Self { separating, blocks, order, corpus, options })
    }

    /// Blocks in an epoch or, for evaluation, in the pass.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Batches that hold every block once: the pass of an evaluation, or an epoch rounded up to whole batches.
    #[must_use]
    pub fn batches_per_pass(&self) -> u64 {
        self.blocks.div_ceil(self.options.batch_size as u64)
    }

    /// How many of the first batches would be the same for any longer corpus that begins with this one.
    #[must_use]
    pub fn settled_steps(&self) -> u64 {
        let CausalOptions { batch_size, shuffle, separate_documents, .. } = self.options;
        // One document alone has no segments; a second one may follow.
        let open = !shuffle || separate_documents && !self.separating;
        if open { 0 } else { self.order.settled() / batch_size as u64 }
    }

    /// Batch `step`, a pure function of the options and `step`.
    ///
    /// Training: the blocks of epoch 0, then of epoch 1, …, each epoch in its own order; a batch that an epoch leaves
    /// incomplete goes on with the next one's first blocks. Evaluation: the blocks in order, every token but the
    /// first (of the corpus or, kept apart, of its document) is a label once; the last block is padded, missing rows
    /// are padding only, and after the pass it starts again.
    #[must_use]
    pub fn batch(&self, step: u64) -> CausalBatch {
        let CausalOptions { seq_len, batch_size, prefix, .. } = self.options;
        let places = batch_size * seq_len;
        let mut batch = CausalBatch {
            batch_size,
            seq_len,
            input_ids: vec![0; places],
            labels: vec![IGNORED_LABEL; places],
            position_ids: (0..places)
                .map(|i| if self.separating { 0 } else { (i % seq_len) as i32 })
                .collect(),
            segment_ids: self.separating.then(|| vec![0; places]),
            prefix: prefix.then(|| vec![1; batch_size]),
            labels_count: 0,
        };
        for row in 0..batch_size {
            if let Some(block) = self.block(step, row) {
                self.fill(&mut batch, row, block.start);
                if self.options.prefix {
                    self.hide_prefix(&mut batch, row, &block);
                }
            }
        }
        batch.labels_count = batch.labels.iter().filter(|&&label| label != IGNORED_LABEL).count();
        batch
    }

    /// The numbers of the documents in each row of batch `step`, in their order; none for a missing row.
    #[must_use]
    pub fn documents(&self, step: u64) -> Vec<Vec<usize>> {
        let row = |row| {
            let Some(mut at) = self.block(step, row).map(|block| block.start) else { return Vec::new() };
            let mut left = self.options.seq_len;
            let mut found = Vec::new();
            while left > 0 {
                let end = self.document_end(at);
                found.push(self.document(at));
                left -= left.min(end - at);
                at = end;
                if at == self.corpus.len() {
                    if !self.options.shuffle {
                        break;
                    }
                    at = 0;
                }
            }
            found
        };
        (0..self.options.batch_size).map(row).collect()
    }

    /// The number of the document that holds token `at`.
    fn document(&self, at: usize) -> usize {
        self.corpus.documents().partition_point(|&offset| offset <= at as u64) - 1
    }

    /// The block of `row`; `None` for a missing row of an evaluation.
    pub(crate) fn block(&self, step: u64, row: usize) -> Option<Block> {
        let CausalOptions { seq_len, batch_size, seed, shuffle, .. } = self.options;
        if !shuffle {
            let number = step % self.batches_per_pass() * batch_size as u64 + row as u64;
            let start = number as usize * seq_len;
            return (number < self.blocks).then(|| Block {
                epoch: 0,
                number,
                start,
                len: seq_len.min(self.corpus.len() - start),
            });
        }
        // 128 bits: no step, however large, overflows.
        let index = u128::from(step) * batch_size as u128 + row as u128;
        let blocks = u128::from(self.blocks);
        let (epoch, place) = ((index / blocks) as u64, (index % blocks) as u64);
        let number = self.order.get(epoch, place);
        let phase = Stream::new(seed, CAUSAL_PHASE, epoch).below(seq_len as u32);
        let start = (number as usize * seq_len + phase as usize) % self.corpus.len();
        Some(Block { epoch, number, start, len: seq_len })
    }

    /// Writes the block that begins at `start`: around the ring in training, up to the corpus end in evaluation.
    fn fill(&self, batch: &mut CausalBatch, row: usize, start: usize) {
        let len = self.corpus.len();
        // One token more than a row holds: the label of its last one.
        let within = (len - start).min(batch.seq_len + 1);
        let mut ids = self.corpus.ids(start..start + within);
        if within <= batch.seq_len && self.options.shuffle {
            let rest = self.corpus.ids(0..batch.seq_len + 1 - within);
            ids.to_mut().extend_from_slice(&rest);
        }
        let mut at = start;
        let mut end = self.document_end(at);
        let (mut segment, mut position) = (1, 0);
        for (i, &id) in ids.iter().take(batch.seq_len).enumerate() {
            let place = row * batch.seq_len + i;
            let next = at + 1;
            batch.input_ids[place] = id as i32;
            if next < len && !(self.separating && next == end) {
                batch.labels[place] = ids[i + 1] as i32;
            }
            if let Some(segments) = &mut batch.segment_ids {
                segments[place] = segment;
                batch.position_ids[place] = position;
            }
            at = next % len;
            position += 1;
            if next == end {
                end = self.document_end(at);
                (segment, position) = (segment + 1, 0);
            }
        }
    }

    /// Draws the length of a row's prefix; its last token does not see the next one, those before it do and have no label.
    fn hide_prefix(&self, batch: &mut CausalBatch, row: usize, block: &Block) {
        let draws = Draws::of(self.options.seed, PREFIX, block.epoch, block.number as usize);
        let lengths = batch.seq_len.saturating_sub(1).max(1) as u64;
        let length = 1 + ((u64::from(draws.at(0)[0]) * lengths) >> 32) as usize;
        let first = row * batch.seq_len;
        batch.labels[first..first + length - 1].fill(IGNORED_LABEL);
        if let Some(prefix) = &mut batch.prefix {
            prefix[row] = length as i32;
        }
    }

    /// The end of the document that holds token `at`.
    fn document_end(&self, at: usize) -> usize {
        // Empty documents share their offset with the next one: the first offset beyond `at` is the end.
        let documents = self.corpus.documents();
        documents[documents.partition_point(|&offset| offset <= at as u64)] as usize
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const OPTIONS: CausalOptions = CausalOptions {
        seq_len: 4,
        batch_size: 2,
        seed: 3,
        shuffle: false,
        separate_documents: false,
        prefix: false,
    };

    /// A corpus whose ids are 10, 11, 12, …
    fn batches(documents: &[u64], options: CausalOptions) -> Result<CausalBatches> {
        let tokens: Vec<u32> = (0..*documents.last().unwrap_or(&0)).map(|i| i as u32 + 10).collect();
        CausalBatches::new(Corpus::held(tokens.into(), documents.into())?, options)
    }

    #[test]
    fn an_evaluation_runs_in_order_and_pads_the_tail() {
        let corpus = batches(&[0, 11], OPTIONS).unwrap();
        assert_eq!((corpus.blocks(), corpus.batches_per_pass()), (3, 2));
        let batch = corpus.batch(0);
        assert_eq!(batch.input_ids, [10, 11, 12, 13, 14, 15, 16, 17]);
        assert_eq!(batch.labels, [11, 12, 13, 14, 15, 16, 17, 18]);
        assert_eq!((batch.position_ids, batch.segment_ids), (vec![0, 1, 2, 3, 0, 1, 2, 3], None));
        let batch = corpus.batch(1);
        assert_eq!(batch.input_ids, [18, 19, 20, 0, 0, 0, 0, 0]);
        assert_eq!(batch.labels, [19, 20, -100, -100, -100, -100, -100, -100]);
        assert_eq!(batch.labels_count, 2);
        assert_eq!(corpus.batch(2), corpus.batch(0));
        assert_eq!(corpus.documents(1), [vec![0], vec![]]);
        // The last token is only a label where the blocks end right before it.
        let corpus = batches(&[0, 5], OPTIONS).unwrap();
        assert_eq!(corpus.batch(0).input_ids, [10, 11, 12, 13, 0, 0, 0, 0]);
        assert_eq!(corpus.batch(0).labels_count, 4);
    }

    #[test]
    fn separated_documents_have_segments_positions_and_no_label_across() {
        let options = CausalOptions { seq_len: 6, batch_size: 2, separate_documents: true, ..OPTIONS };
        // Documents of 3, 0, 1 and 6 tokens.
        let batch = batches(&[0, 3, 3, 4, 10], options).unwrap().batch(0);
        assert_eq!(batch.input_ids, [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 0, 0]);
        assert_eq!(batch.labels, [11, 12, -100, -100, 15, 16, 17, 18, 19, -100, -100, -100]);
        assert_eq!(batch.segment_ids.unwrap(), [1, 1, 1, 2, 3, 3, 1, 1, 1, 1, 0, 0]);
        assert_eq!(batch.position_ids, [0, 1, 2, 0, 0, 1, 0, 1, 2, 3, 0, 0]);
        assert_eq!(
            batches(&[0, 3, 3, 4, 10], options).unwrap().documents(0),
            [vec![0, 2, 3], vec![3]],
            "document 1 is empty"
        );
        // Empty neighbours do not make one document two.
        assert!(batches(&[0, 0, 10, 10], options).unwrap().batch(0).segment_ids.is_none());
        let joined = CausalOptions { separate_documents: false, ..options };
        assert_eq!(batches(&[0, 3, 10], joined).unwrap().batch(0).labels[2], 13);
    }

    #[test]
    fn prefixes_hide_the_labels_before_their_end() {
        let plain = CausalOptions { seq_len: 10, batch_size: 16, shuffle: true, ..OPTIONS };
        let documents = [0, 400, 1000];
        let (rows, prefixed) = (
            batches(&documents, plain).unwrap(),
            batches(&documents, CausalOptions { prefix: true, ..plain }).unwrap(),
        );
        let alone = batches(&documents, CausalOptions { prefix: true, batch_size: 1, ..plain }).unwrap();
        let mut seen = [0; 11];
        for step in 0..200 {
            let (whole, batch) = (rows.batch(step), prefixed.batch(step));
            let lengths = batch.prefix.clone().unwrap();
            for (row, &length) in lengths.iter().enumerate() {
                seen[length as usize] += 1;
                for (i, &label) in batch.labels[row * 10..(row + 1) * 10].iter().enumerate() {
                    let before = (i as i32) < length - 1;
                    assert_eq!(label, if before { -100 } else { whole.labels[row * 10 + i] });
                }
                assert_eq!(alone.batch(step * 16 + row as u64).prefix, Some(vec![length]));
            }
            assert_eq!(batch.labels_count, batch.labels.iter().filter(|&&label| label != -100).count());
        }
        assert!(seen[1..10].iter().all(|&count| (250..460).contains(&count)) && seen[10] == 0, "{seen:?}");
        let short = CausalOptions { prefix: true, seq_len: 1, ..OPTIONS };
        assert_eq!(batches(&[0, 9], short).unwrap().batch(0).prefix, Some(vec![1, 1]));
    }

    #[test]
    fn batches_differ_by_seed_and_epoch() {
        let of = |seed, step| {
            batches(&[0, 4000], CausalOptions { shuffle: true, seed, ..OPTIONS })
                .unwrap()
                .batch(step)
                .input_ids
        };
        assert_eq!(of(1, 7), of(1, 7));
        assert_ne!(of(1, 7), of(2, 7));
        assert_ne!(of(1, 7), of(1, 507));
        assert_eq!(of(1, u64::MAX).len(), 8);
    }

    proptest! {
        #[test]
        fn an_epoch_holds_each_block_once(
            len in 2u64..200, seq_len in 1usize..20, batch_size in 1usize..9, seed: u64, separate_documents: bool,
        ) {
            prop_assume!(len > seq_len as u64);
            let options = CausalOptions { seq_len, batch_size, seed, shuffle: true, separate_documents, ..OPTIONS };
            let corpus = batches(&[0, len / 3, len / 2, len], options).unwrap();
            let blocks = corpus.blocks() as usize;
            // Three epochs, read from the last batch to the first.
            let count = (3 * blocks).div_ceil(batch_size) as u64;
            let mut rows: Vec<(Vec<i32>, Vec<i32>)> = Vec::new();
            for step in (0..count).rev() {
                let batch = corpus.batch(step);
                let pairs = batch.input_ids.chunks(seq_len).zip(batch.labels.chunks(seq_len));
                rows.splice(0..0, pairs.map(|(i, l)| (i.to_vec(), l.to_vec())));
            }
            for epoch in rows[..3 * blocks].chunks(blocks) {
                let mut seen = vec![0; len as usize];
                for (input, labels) in epoch {
                    for (id, label) in input.iter().zip(labels) {
                        seen[*id as usize - 10] += 1;
                        let last = *id as u64 == len + 9;
                        prop_assert!(*label != -100 || last || separate_documents);
                        prop_assert!(*label == -100 || !last && *label == id + 1);
                    }
                    for pair in input.windows(2) {
                        let follows = (pair[0] - 10 + 1) as u64 % len + 10;
                        prop_assert_eq!(pair[1] as u64, follows);
                    }
                }
                prop_assert!(seen.iter().all(|&count| count <= 1));
                prop_assert_eq!(seen.iter().sum::<usize>(), blocks * seq_len);
            }
        }

        #[test]
        fn settled_batches_are_those_of_a_longer_corpus(
            lengths in prop::collection::vec(1u64..90_000, 20..60), cut in 0.1f64..1.0, seq_len in 100usize..3000,
            batch_size in 1usize..20, seed: u64, separate_documents: bool,
        ) {
            let mut offsets = vec![0];
            lengths.iter().for_each(|len| offsets.push(offsets[offsets.len() - 1] + len));
            let options = CausalOptions { seq_len, batch_size, seed, shuffle: true, separate_documents, ..OPTIONS };
            let whole = batches(&offsets, options).unwrap();
            let Ok(part) = batches(&offsets[..2 + (cut * lengths.len() as f64) as usize - 1], options) else {
                return Ok(());
            };
            prop_assert!(part.settled_steps() <= whole.settled_steps());
            prop_assert!(part.settled_steps() < part.batches_per_pass());
            let settled = part.settled_steps();
            for step in (0..settled).step_by(1 + settled as usize / 9).chain(settled.checked_sub(1)) {
                prop_assert_eq!(part.batch(step), whole.batch(step));
                prop_assert_eq!(part.documents(step), whole.documents(step));
            }
        }

        #[test]
        fn segments_follow_the_documents_around_the_ring(
            lengths in prop::collection::vec(0u64..9, 2..12), seq_len in 1usize..20, seed: u64, step: u64,
        ) {
            let mut offsets = vec![0];
            lengths.iter().for_each(|len| offsets.push(offsets[offsets.len() - 1] + len));
            let len = offsets[lengths.len()];
            prop_assume!(len > seq_len as u64 && lengths.iter().filter(|&&len| len > 0).count() > 1);
            let options = CausalOptions { seq_len, seed, shuffle: true, separate_documents: true, ..OPTIONS };
            let batch = batches(&offsets, options).unwrap().batch(step);
            let segments = batch.segment_ids.unwrap();
            let documents = batches(&offsets, options).unwrap().documents(step);
            for row in 0..2 {
                let mut seen: Vec<usize> = Vec::new();
                for t in 0..seq_len {
                    let at = batch.input_ids[row * seq_len + t] as u64 - 10;
                    if t == 0 || offsets.contains(&at) {
                        seen.push(offsets.partition_point(|&offset| offset <= at) - 1);
                    }
                }
                prop_assert_eq!(&seen, &documents[row]);
                let (mut segment, mut position) = (1, 0);
                for t in 0..seq_len {
                    let place = row * seq_len + t;
                    // Each id occurs once and tells its place in the corpus.
                    let at = batch.input_ids[place] as u64 - 10;
                    if t > 0 && offsets.contains(&at) {
                        (segment, position) = (segment + 1, 0);
                    }
                    prop_assert_eq!(segments[place], segment);
                    prop_assert_eq!(batch.position_ids[place], position);
                    let label = if offsets.contains(&(at + 1)) { -100 } else { at as i32 + 11 };
                    prop_assert_eq!(batch.labels[place], label);
                    position += 1;
                }
            }
        }

        #[test]
        fn an_evaluation_predicts_each_token_once_in_order(
            len in 2u64..200, seq_len in 1usize..20, batch_size in 1usize..9,
        ) {
            prop_assume!(len > seq_len as u64);
            let corpus = batches(&[0, len], CausalOptions { seq_len, batch_size, ..OPTIONS }).unwrap();
            let all: Vec<_> = (0..corpus.batches_per_pass()).map(|step| corpus.batch(step)).collect();
            let labels: Vec<i32> =
                all.iter().flat_map(|b| &b.labels).copied().filter(|&label| label != -100).collect();
            prop_assert_eq!(labels, (11..len as i32 + 10).collect::<Vec<_>>());
            prop_assert_eq!(all.iter().map(|b| b.labels_count as u64).sum::<u64>(), len - 1);
        }
    }

    #[test]
    fn errors_say_what_to_do() {
        let text = batches(&[0, 4], OPTIONS).unwrap_err().to_string();
        assert!(
            text.contains("4 tokens") && text.contains("at least 5") && text.contains("lower seq_len"),
            "{text}"
        );
        let of = |options| batches(&[0, 40], options).unwrap_err().to_string();
        assert!(of(CausalOptions { seq_len: 0, ..OPTIONS }).contains("seq_len is 0"));
        assert!(of(CausalOptions { batch_size: 0, ..OPTIONS }).contains("batch_size is 0"));
        assert!(of(CausalOptions { batch_size: usize::MAX, ..OPTIONS }).contains("16777216"));
        for offsets in [&[][..], &[1, 9], &[0, 5, 4, 9], &[0, 8]] {
            let error = Corpus::held(vec![1; 9].into(), offsets.into()).unwrap_err();
            assert!(matches!(error, Error::Offsets { .. }), "{error}");
        }
        let error =
            CausalBatches::new(Corpus::held(vec![u32::MAX; 9].into(), [0, 9].into()).unwrap(), OPTIONS)
                .unwrap_err();
        assert!(matches!(error, Error::TokenId { position: 0, .. }));
    }
}
