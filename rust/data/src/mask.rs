//! Batches for masked language models: pieces of documents between `[CLS]` and `[SEP]`, some of their tokens hidden (see
//! [`MaskedOptions`]).
//!
//! Training groups pieces of like length: the epoch's shuffled rows are taken in pools, sorted by length within the
//! pool, and the pool's batches are shuffled. To reach any step, only its pool is laid out.

use std::borrow::Cow;

use pyrformer_random::Permutation;

use crate::IGNORED_LABEL;
use crate::corpus::Corpus;
use crate::error::{Error, Result};
use crate::masker::{Draws, MaskedOptions, MaskedRow, Masker, chosen};
use crate::order::Order;
use crate::purpose::{MASKED_ORDER, MASKED_POOL};

/// Batches in a pool.
const POOL: u128 = 32;

/// One masked batch; arrays are row-major `[B, T]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaskedBatch {
    /// Rows (B), padding rows included.
    pub batch_size: usize,
    /// Tokens in a row (T).
    pub seq_len: usize,
    /// Rows that hold a piece; the others, at the end of an evaluation, are padding only (`attention_mask` 0).
    pub rows: usize,
    /// Token ids after masking `[B, T]`.
    pub input_ids: Vec<i32>,
    /// 1 at tokens, 0 at padding `[B, T]`.
    pub attention_mask: Vec<i32>,
    /// All 0: there is one sentence in a row `[B, T]`.
    pub token_type_ids: Vec<i32>,
    /// The original id at chosen places, −100 elsewhere `[B, T]`.
    pub labels: Vec<i32>,
    /// The chosen places as `b * T + t`, rising, then padded with 0 `[M]`; M is `labels_count` rounded up to a
    /// multiple of 32, and at least 32.
    pub positions: Vec<i32>,
    /// The labels at `positions`, padded with −100 `[M]`.
    pub masked_labels: Vec<i32>,
    /// How many labels are not −100.
    pub labels_count: usize,
}

/// A corpus of token ids as masked batches.
#[derive(Clone, Debug)]
pub struct MaskedBatches {
    corpus: Corpus,
    masker: Masker,
    /// Start and length of each piece.
    pieces: Vec<(usize, usize)>,
    order: Order,
}

/// A piece as it appears in one epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Row {
    epoch: u64,
    piece: usize,
}

impl MaskedBatches {
    /// Batches of a corpus of ids without special tokens.
    ///
    /// Each document is cut into pieces of `max_length - 2` tokens, the last one shorter; empty documents give none.
    ///
    /// # Errors
    /// If an option is outside the range its documentation gives, an id is not below `vocab_size`, or no document has
    /// a token.
    pub fn new(corpus: Corpus, options: MaskedOptions) -> Result<Self> {
        let masker = Masker::new(options)?;
        let options = &masker.options;
        corpus.check_ids(options.vocab_size)?;
        let longest = options.max_length - 2;
        let mut pieces = Vec::new();
        for pair in corpus.documents().windows(2) {
            let (start, end) = (pair[0] as usize, pair[1] as usize);
            pieces.extend((start..end).step_by(longest).map(|at| (at, longest.min(end - at))));
        }
        if pieces.is_empty() {
            return Err(Error::NoTokens { documents: corpus.documents().len().saturating_sub(1) });
        }
        let (count, tokens) = (pieces.len() as u64, corpus.len() as u64);
        let before = |border| pieces.partition_point(|&(start, _)| (start as u64) < border) as u64;
        let order = Order::new(count, tokens, 0, options.seed, MASKED_ORDER, before);
        Ok(Self { corpus, masker, pieces, order })
    }

    /// The number of pieces: the rows of an epoch or of an evaluation.
    #[must_use]
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Batches that hold every piece once: the pass of an evaluation, or an epoch rounded up to whole batches.
    #[must_use]
    pub fn batches_per_pass(&self) -> u64 {
        self.pieces.len().div_ceil(self.masker.options.batch_size) as u64
    }

    /// How many of the first batches would be the same for any longer corpus that begins with this one's documents.
    #[must_use]
    pub fn settled_steps(&self) -> u64 {
        if !self.masker.options.shuffle {
            return 0;
        }
        // Whole pools: the last one's order depends on their number in the epoch.
        let pool = POOL as u64;
        self.order.settled() / (self.masker.options.batch_size as u64 * pool) * pool
    }

    /// Batch `step`, a pure function of the options and `step`.
    ///
    /// Training: every piece once in each epoch; the last batch that begins in an epoch is completed with the next
    /// one's first rows. Evaluation: the pieces in order, the last batch completed with padding rows; after the
    /// pass it starts again. Where no token of a batch is chosen, the one (or the word) whose draw came nearest is.
    #[must_use]
    pub fn batch(&self, step: u64) -> MaskedBatch {
        let rows = self.rows(step);
        let options = &self.masker.options;
        let longest = rows.iter().map(|row| self.pieces[row.piece].1 + 2).max().unwrap_or(0);
        let multiple = options.pad_to_multiple_of;
        let rounded =
            longest.checked_next_multiple_of(multiple).unwrap_or(usize::MAX).min(options.max_length);
        let seq_len = options.fixed_length.unwrap_or(rounded);
        let places = options.batch_size * seq_len;
        let mut batch = MaskedBatch {
            batch_size: options.batch_size,
            seq_len,
            rows: rows.len(),
            input_ids: vec![options.pad as i32; places],
            attention_mask: vec![0; places],
            token_type_ids: vec![0; places],
            labels: vec![IGNORED_LABEL; places],
            positions: Vec::new(),
            masked_labels: Vec::new(),
            labels_count: 0,
        };
        let rows: Vec<MaskedRow<'_>> =
            rows.iter().enumerate().map(|(b, row)| self.row(b, *row, seq_len)).collect();
        for row in &rows {
            let (first, len) = (row.place - 1, row.ids.len());
            batch.input_ids[first] = options.cls as i32;
            for (place, &id) in batch.input_ids[row.place..].iter_mut().zip(row.ids.iter()) {
                *place = id as i32;
            }
            batch.input_ids[row.place + len] = options.sep as i32;
            batch.attention_mask[first..first + len + 2].fill(1);
        }
        self.masker.mask(&rows, &mut batch.input_ids, &mut batch.labels);
        (batch.positions, batch.masked_labels, batch.labels_count) = chosen(&batch.labels);
        batch
    }

    /// The number of the document in each row of batch `step`, padding rows left out.
    #[must_use]
    pub fn documents(&self, step: u64) -> Vec<Vec<usize>> {
        let starts = self.corpus.documents();
        let number = |at: usize| starts.partition_point(|&offset| offset <= at as u64) - 1;
        self.rows(step).iter().map(|row| vec![number(self.pieces[row.piece].0)]).collect()
    }

    /// Row `b` of a batch, without `[CLS]` and `[SEP]`.
    fn row(&self, b: usize, row: Row, seq_len: usize) -> MaskedRow<'_> {
        let draws = Draws::new(self.masker.options.seed, row.epoch, row.piece);
        MaskedRow { place: b * seq_len + 1, ids: self.piece(row), draws }
    }

    fn piece(&self, row: Row) -> Cow<'_, [u32]> {
        let (start, len) = self.pieces[row.piece];
        self.corpus.ids(start..start + len)
    }

    /// The rows of a batch.
    fn rows(&self, step: u64) -> Vec<Row> {
        let (count, size) = (self.pieces.len(), self.masker.options.batch_size);
        if !self.masker.options.shuffle {
            let start = (step % self.batches_per_pass()) as usize * size;
            return (start..count.min(start + size)).map(|piece| Row { epoch: 0, piece }).collect();
        }
        // Row r of the endless stream is in epoch r / count; a batch counts to the epoch of its first row, and an
        // epoch's batches are divided into pools. 128 bits: no step, however large, overflows.
        let (count, size, step) = (count as u128, size as u128, u128::from(step));
        let epoch = step * size / count;
        let epoch_start = (epoch * count).div_ceil(size);
        let epoch_end = ((epoch + 1) * count).div_ceil(size);
        let start = step - (step - epoch_start) % POOL;
        let end = epoch_end.min(start + POOL);
        let mut pool: Vec<Row> = (start * size..end * size).map(|index| self.shuffled(index)).collect();
        pool.sort_by_key(|row| self.pieces[row.piece].1);
        let order =
            Permutation::new((end - start) as u64, self.masker.options.seed, MASKED_POOL, start as u32);
        let chosen = order.get((step - start) as u64) as usize * size as usize;
        pool[chosen..chosen + size as usize].to_vec()
    }

    /// Row `index` of the endless stream of shuffled epochs.
    fn shuffled(&self, index: u128) -> Row {
        let count = self.pieces.len() as u128;
        let (epoch, place) = ((index / count) as u64, (index % count) as u64);
        Row { epoch, piece: self.order.get(epoch, place) as usize }
    }
}

#[cfg(test)]
#[path = "mask_tests.rs"]
mod tests;
