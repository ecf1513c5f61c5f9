//! Batches for masked language models: pieces of documents between `[CLS]` and `[SEP]`, some of their tokens hidden.
//!
//! Source of the rule: Devlin et al. 2019, "BERT", section 3.1 and appendix A.1, as Hugging Face's
//! `DataCollatorForLanguageModeling` applies it: every token that is not special is chosen independently with
//! `mlm_probability`; a chosen one becomes `[MASK]`, a token drawn from the whole vocabulary, or stays.
//!
//! Spans ([`Spans`], Joshi et al. 2020, "SpanBERT", section 3.1) are runs of neighbouring words. Instead of drawing spans
//! until enough of a row is covered, which makes each draw depend on those before it, a span begins at each word
//! independently, with the one chance under which a word is covered with `mlm_probability`.
//!
//! Whether a token is chosen depends on (seed, epoch, piece, position) only, not on the batch it is in. Training
//! groups pieces of like length: the epoch's shuffled rows are taken in pools, sorted by length within the pool, and
//! the pool's batches are shuffled. To reach any step, only its pool is laid out.

use std::borrow::Cow;
use std::sync::Arc;

use pyrformer_random::{Permutation, Stream, philox, unit_f32};

use crate::IGNORED_LABEL;
use crate::corpus::Corpus;
use crate::error::{Error, Result, check_size};
use crate::order::Order;
use crate::purpose::{MASK, MASKED_ORDER, MASKED_POOL};

/// Batches in a pool.
const POOL: u128 = 32;
/// [`MaskedBatch::positions`] is padded to a multiple of this, to keep the number of distinct shapes small.
const POSITIONS_MULTIPLE: usize = 32;

/// Lengths of masked spans, in words (in tokens where words are not kept whole).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spans {
    /// A length k has a chance proportional to `p (1 - p)^(k - 1)`; above 0 and at most 1. SpanBERT: 0.2.
    pub p: f64,
    /// The greatest length, 1 to 255; SpanBERT: 10.
    pub max_length: usize,
}

/// How to cut and mask a corpus. [`MaskedOptions::new`] sets the defaults.
#[derive(Clone, Debug)]
pub struct MaskedOptions {
    /// Rows in a batch (B).
    pub batch_size: usize,
    /// Most tokens in a row, `[CLS]` and `[SEP]` included; at least 3.
    pub max_length: usize,
    /// Seed of the order and the masks; default 0.
    pub seed: u64,
    /// `true` (default): an endless stream of shuffled epochs, for training; `false`: one pass in order with the masks
    /// of epoch 0, for evaluation.
    pub shuffle: bool,
    /// Chance of a token (or word) to be chosen, above 0 and at most 1; default 0.15.
    pub mlm_probability: f64,
    /// Share of chosen tokens that become `[MASK]`; default 0.8.
    pub mask_rate: f64,
    /// Share of chosen tokens that become a token drawn uniformly from the whole vocabulary; default 0.1. The rest
    /// stay as they are.
    pub random_rate: f64,
    /// Id of `[CLS]`.
    pub cls: u32,
    /// Id of `[SEP]`.
    pub sep: u32,
    /// Id of `[PAD]`.
    pub pad: u32,
    /// Id of `[MASK]`.
    pub mask: u32,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Further ids that are never chosen; `[CLS]`, `[SEP]`, `[PAD]` and `[MASK]` never are.
    pub special_ids: Vec<u32>,
    /// For each id, whether it continues the word of the token before it; `Some` masks whole words: a word is chosen
    /// by its first token's draw. The first token of a piece, or after a special one, always begins a word. Default
    /// `None`. See [`MaskedOptions::with_whole_words`].
    pub whole_word: Option<Arc<[bool]>>,
    /// Choose runs of words and not single ones. All tokens of a run share one draw: they become `[MASK]`, each a
    /// random token, or stay. Runs end at special tokens. Default `None`.
    pub spans: Option<Spans>,
    /// A batch's width is its longest row rounded up to a multiple of this, but at most `max_length`; default 8.
    pub pad_to_multiple_of: usize,
    /// The width of every batch instead, at least `max_length`; default `None`.
    pub fixed_length: Option<usize>,
}

impl MaskedOptions {
    /// BERT's rates for a vocabulary whose special ids are given.
    #[must_use]
    pub fn new(
        batch_size: usize,
        max_length: usize,
        vocab_size: usize,
        [cls, sep, pad, mask]: [u32; 4],
    ) -> Self {
        Self {
            batch_size,
            max_length,
            seed: 0,
            shuffle: true,
            mlm_probability: 0.15,
            mask_rate: 0.8,
            random_rate: 0.1,
            cls,
            sep,
            pad,
            mask,
            vocab_size,
            special_ids: Vec::new(),
            whole_word: None,
            spans: None,
            pad_to_multiple_of: 8,
            fixed_length: None,
        }
    }

    /// Masks whole words as Hugging Face's collator does: each token of a chosen word becomes `[MASK]`, so this also
    /// sets `mask_rate` to 1 and `random_rate` to 0. Set the rates after it for another mixture.
    #[must_use]
    pub fn with_whole_words(self, continues: Arc<[bool]>) -> Self {
        Self { whole_word: Some(continues), mask_rate: 1.0, random_rate: 0.0, ..self }
    }

    fn check(&self) -> Result<()> {
        if self.max_length < 3 {
            let rule = "at least 3: [CLS], one token, [SEP]";
            return Err(Error::option("max_length", self.max_length, rule));
        }
        if let Some(length) = self.fixed_length
            && length < self.max_length
        {
            let rule = format!("at least max_length ({})", self.max_length);
            return Err(Error::option("fixed_length", length, rule));
        }
        check_size(self.batch_size, "the row length", self.fixed_length.unwrap_or(self.max_length))?;
        if self.pad_to_multiple_of == 0 {
            return Err(Error::option("pad_to_multiple_of", 0, "at least 1"));
        }
        if !(self.mlm_probability > 0.0 && self.mlm_probability <= 1.0) {
            return Err(Error::option("mlm_probability", self.mlm_probability, "above 0 and at most 1"));
        }
        for (name, rate) in [("mask_rate", self.mask_rate), ("random_rate", self.random_rate)] {
            if !(0.0..=1.0).contains(&rate) {
                return Err(Error::option(name, rate, "between 0 and 1"));
            }
        }
        if let Some(Spans { p, max_length }) = self.spans {
            if !(p > 0.0 && p <= 1.0) {
                return Err(Error::option("span_p", p, "above 0 and at most 1"));
            }
            if !(1..=255).contains(&max_length) {
                return Err(Error::option("span_max_length", max_length, "from 1 to 255"));
            }
        }
        // Decimal fractions that add up to 1 may exceed it by a rounding.
        if self.mask_rate + self.random_rate > 1.0 + 1e-9 {
            let rule = format!("at most 1 - mask_rate ({})", 1.0 - self.mask_rate);
            return Err(Error::option("random_rate", self.random_rate, rule));
        }
        if self.vocab_size > i32::MAX as usize {
            return Err(Error::option("vocab_size", self.vocab_size, "below 2^31"));
        }
        let named = [("cls", self.cls), ("sep", self.sep), ("pad", self.pad), ("mask", self.mask)];
        let further = self.special_ids.iter().map(|&id| ("special_ids", id));
        if let Some((name, id)) =
            named.into_iter().chain(further).find(|&(_, id)| id as usize >= self.vocab_size)
        {
            return Err(Error::option(name, id, format!("below vocab_size ({})", self.vocab_size)));
        }
        match &self.whole_word {
            Some(table) if table.len() != self.vocab_size => {
                let rule = format!("one entry for each of the {} ids", self.vocab_size);
                Err(Error::option("whole_word", format!("a table of {} entries", table.len()), rule))
            }
            _ => Ok(()),
        }
    }
}

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
    options: MaskedOptions,
    /// Start and length of each piece.
    pieces: Vec<(usize, usize)>,
    /// For each id, whether it is never chosen.
    special: Vec<bool>,
    lengths: SpanLengths,
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
        options.check()?;
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
        let mut special = vec![false; options.vocab_size];
        for &id in [options.cls, options.sep, options.pad, options.mask].iter().chain(&options.special_ids) {
            special[id as usize] = true;
        }
        let lengths = SpanLengths::new(options.spans, options.mlm_probability);
        let (count, tokens) = (pieces.len() as u64, corpus.len() as u64);
        let before = |border| pieces.partition_point(|&(start, _)| (start as u64) < border) as u64;
        let order = Order::new(count, tokens, 0, options.seed, MASKED_ORDER, before);
        Ok(Self { corpus, options, pieces, special, lengths, order })
    }

    /// The number of pieces: the rows of an epoch or of an evaluation.
    #[must_use]
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Batches that hold every piece once: the pass of an evaluation, or an epoch rounded up to whole batches.
    #[must_use]
    pub fn batches_per_pass(&self) -> u64 {
        self.pieces.len().div_ceil(self.options.batch_size) as u64
    }

    /// How many of the first batches would be the same for any longer corpus that begins with this one's documents.
    #[must_use]
    pub fn settled_steps(&self) -> u64 {
        if !self.options.shuffle {
            return 0;
        }
        // Whole pools: the last one's order depends on their number in the epoch.
        let pool = POOL as u64;
        self.order.settled() / (self.options.batch_size as u64 * pool) * pool
    }

    /// Batch `step`, a pure function of the options and `step`.
    ///
    /// Training: every piece once in each epoch; the last batch that begins in an epoch is completed with the next
    /// one's first rows. Evaluation: the pieces in order, the last batch completed with padding rows; after the
    /// pass it starts again. Where no token of a batch is chosen, the one (or the word) whose draw came nearest is.
    #[must_use]
    pub fn batch(&self, step: u64) -> MaskedBatch {
        let rows = self.rows(step);
        let options = &self.options;
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
        for (b, row) in rows.iter().enumerate() {
            let piece = &self.piece(*row);
            let first = b * seq_len;
            batch.input_ids[first] = options.cls as i32;
            for (place, &id) in batch.input_ids[first + 1..].iter_mut().zip(piece.iter()) {
                *place = id as i32;
            }
            batch.input_ids[first + 1 + piece.len()] = options.sep as i32;
            batch.attention_mask[first..first + piece.len() + 2].fill(1);
        }
        self.choose(&rows, &mut batch);
        for (place, &label) in batch.labels.iter().enumerate().filter(|&(_, &label)| label != IGNORED_LABEL) {
            batch.positions.push(place as i32);
            batch.masked_labels.push(label);
        }
        batch.labels_count = batch.positions.len();
        let padded = batch.labels_count.max(1).next_multiple_of(POSITIONS_MULTIPLE);
        batch.positions.resize(padded, 0);
        batch.masked_labels.resize(padded, IGNORED_LABEL);
        batch
    }

    /// The number of the document in each row of batch `step`, padding rows left out.
    #[must_use]
    pub fn documents(&self, step: u64) -> Vec<Vec<usize>> {
        let starts = self.corpus.documents();
        let number = |at: usize| starts.partition_point(|&offset| offset <= at as u64) - 1;
        self.rows(step).iter().map(|row| vec![number(self.pieces[row.piece].0)]).collect()
    }

    fn piece(&self, row: Row) -> Cow<'_, [u32]> {
        let (start, len) = self.pieces[row.piece];
        self.corpus.ids(start..start + len)
    }

    /// Whether an id is never chosen; nor is one outside the vocabulary, which a damaged shard may hold.
    fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).is_none_or(|&special| special)
    }

    /// The rows of a batch.
    fn rows(&self, step: u64) -> Vec<Row> {
        let (count, size) = (self.pieces.len(), self.options.batch_size);
        if !self.options.shuffle {
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
        let order = Permutation::new((end - start) as u64, self.options.seed, MASKED_POOL, start as u32);
        let chosen = order.get((step - start) as u64) as usize * size as usize;
        pool[chosen..chosen + size as usize].to_vec()
    }

    /// Row `index` of the endless stream of shuffled epochs.
    fn shuffled(&self, index: u128) -> Row {
        let count = self.pieces.len() as u128;
        let (epoch, place) = ((index / count) as u64, (index % count) as u64);
        Row { epoch, piece: self.order.get(epoch, place) as usize }
    }

    /// Chooses tokens of `rows` and masks them in `batch`.
    fn choose(&self, rows: &[Row], batch: &mut MaskedBatch) {
        let mut nearest: Option<(u32, usize, usize)> = None;
        let mut any = false;
        for (b, row) in rows.iter().enumerate() {
            let piece = &self.piece(*row);
            let draws = Draws::new(self.options.seed, *row);
            // Words that the run still covers, and where its fate is drawn.
            let (mut left, mut fate) = (self.reaching(draws), 0);
            for at in 0..piece.len() {
                if self.is_special(piece[at]) {
                    left = 0;
                }
                if !self.begins_word(piece, at) {
                    continue;
                }
                let [begins, _, _, length] = draws.at(at);
                if left == 0 {
                    fate = at;
                }
                if f64::from(unit_f32(begins)) < self.lengths.chance {
                    left = left.max(self.lengths.draw(length));
                }
                if left > 0 {
                    (any, left) = (true, left - 1);
                    self.mask_word(batch, b, piece, at, fate, draws);
                } else if nearest.is_none_or(|(least, ..)| begins < least) {
                    nearest = Some((begins, b, at));
                }
            }
        }
        if let (false, Some((_, b, at))) = (any, nearest) {
            self.mask_word(batch, b, &self.piece(rows[b]), at, at, Draws::new(self.options.seed, rows[b]));
        }
    }

    /// How many words of a piece are covered by spans that begin before it: without them its first words would be
    /// chosen less often than the others.
    fn reaching(&self, draws: Draws) -> usize {
        (1..self.lengths.longest())
            .map(|before| {
                let [begins, _, _, length] = draws.at(usize::MAX - before);
                let covers = f64::from(unit_f32(begins)) < self.lengths.chance;
                if covers { self.lengths.draw(length).saturating_sub(before) } else { 0 }
            })
            .max()
            .unwrap_or(0)
    }

    /// Whether the token at `at` can be drawn: it is not special and, with whole words, the first of its word.
    fn begins_word(&self, piece: &[u32], at: usize) -> bool {
        let special = |at: usize| self.is_special(piece[at]);
        let begins = |table: &Arc<[bool]>| at == 0 || special(at - 1) || !table[piece[at] as usize];
        !special(at) && self.options.whole_word.as_ref().is_none_or(begins)
    }

    /// Labels and replaces the word that begins at `start` (a single token unless whole words are masked); with spans,
    /// what becomes of it is drawn at `fate`.
    fn mask_word(
        &self,
        batch: &mut MaskedBatch,
        b: usize,
        piece: &[u32],
        start: usize,
        fate: usize,
        draws: Draws,
    ) {
        let options = &self.options;
        let goes_on = |at: &usize| !self.is_special(piece[*at]) && !self.begins_word(piece, *at);
        for at in std::iter::once(start).chain((start + 1..piece.len()).take_while(goes_on)) {
            let place = b * batch.seq_len + 1 + at;
            batch.labels[place] = piece[at] as i32;
            let [_, own, token, _] = draws.at(at);
            let action = if options.spans.is_some() { draws.at(fate)[1] } else { own };
            let action = f64::from(unit_f32(action));
            if action < options.mask_rate {
                batch.input_ids[place] = options.mask as i32;
            } else if action < options.mask_rate + options.random_rate {
                // The upper word of the product is uniform to within vocab_size / 2^32.
                batch.input_ids[place] = ((u64::from(token) * options.vocab_size as u64) >> 32) as i32;
            }
        }
    }
}

/// The law of the lengths of spans. Single words are spans of length 1.
#[derive(Clone, Debug)]
struct SpanLengths {
    /// Chance that a length is at most 1, 2, …; the last is 1.
    up_to: Vec<f64>,
    /// Chance that a span begins at a word.
    chance: f64,
}

impl SpanLengths {
    fn new(spans: Option<Spans>, mlm_probability: f64) -> Self {
        let Some(Spans { p, max_length }) = spans else {
            return Self { up_to: vec![1.0], chance: mlm_probability };
        };
        let shares: Vec<f64> = (0..max_length as i32).map(|k| p * (1.0 - p).powi(k)).collect();
        let total: f64 = shares.iter().sum();
        let up_to: Vec<f64> = shares
            .iter()
            .scan(0.0, |sum, share| {
                *sum += share / total;
                Some(*sum)
            })
            .collect();
        // A word stays uncovered if no span begins at it, and none k words before it that is longer than k.
        let covered = |chance: f64| {
            let longer =
                std::iter::once(1.0).chain(up_to[..max_length - 1].iter().map(|at_most| 1.0 - at_most));
            1.0 - longer.map(|longer| 1.0 - chance * longer).product::<f64>()
        };
        // It rises with the chance; 60 halvings reach the last bit.
        let (mut low, mut high) = (0.0, 1.0);
        for _ in 0..60 {
            let middle = (low + high) / 2.0;
            if covered(middle) < mlm_probability { low = middle } else { high = middle }
        }
        Self { up_to, chance: high }
    }

    fn longest(&self) -> usize {
        self.up_to.len()
    }

    fn draw(&self, draw: u32) -> usize {
        let unit = f64::from(unit_f32(draw));
        1 + self.up_to[..self.longest() - 1].partition_point(|&at_most| at_most <= unit)
    }
}

/// The draws for the tokens of one piece in one epoch: whether one is chosen (or a span begins), what becomes of it,
/// which random token, the length of the span.
#[derive(Clone, Copy)]
struct Draws {
    key: [u32; 2],
    piece: u64,
}

impl Draws {
    fn new(seed: u64, row: Row) -> Self {
        // A key for the epoch leaves the counter to the piece and the position.
        let mut stream = Stream::new(seed, MASK, row.epoch);
        Self { key: [stream.next_u32(), stream.next_u32()], piece: row.piece as u64 }
    }

    fn at(self, position: usize) -> [u32; 4] {
        let position = position as u64;
        let counter =
            [position as u32, (position >> 32) as u32, self.piece as u32, (self.piece >> 32) as u32];
        philox(self.key, counter)
    }
}

#[cfg(test)]
#[path = "mask_tests.rs"]
mod tests;
