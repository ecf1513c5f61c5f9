//! Chooses tokens of rows of a masked language model and replaces them.
//!
//! Source of the rule: Devlin et al. 2019, "BERT", section 3.1 and appendix A.1, as Hugging Face's
//! `DataCollatorForLanguageModeling` applies it: every token that is not special is chosen independently with
//! `mlm_probability`; a chosen one becomes `[MASK]`, a token drawn from the whole vocabulary, or stays.
//!
//! Spans ([`Spans`], Joshi et al. 2020, "SpanBERT", section 3.1) are runs of neighbouring words. Instead of drawing spans
//! until enough of a row is covered, which makes each draw depend on those before it, a span begins at each word
//! independently, with the one chance under which a word is covered with `mlm_probability`.
//!
//! Whether a token is chosen depends on (seed, epoch, unit, position) only, not on the batch it is in; a unit is a piece
//! of a document, or a pair of texts.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use pyrformer_random::{Stream, philox, unit_f32};

use crate::IGNORED_LABEL;
use crate::error::{Error, MOST_TOKENS, Result, check_size};
use crate::purpose::MASK;

/// Lengths of masked spans, in words (in tokens where words are not kept whole).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spans {
    /// A length k has a chance proportional to `p (1 - p)^(k - 1)`; above 0 and at most 1. SpanBERT: 0.2.
    pub p: f64,
    /// The greatest length, 1 to 255; SpanBERT: 10.
    pub max_length: usize,
}

/// Which tokens of a piece begin a word.
#[derive(Clone)]
pub struct Words(Arc<Begins>);

type Begins = dyn Fn(&[u32]) -> Vec<bool> + Send + Sync;

impl Words {
    /// Words as a function says: it gives one value for each id.
    #[must_use]
    pub fn new(begins: impl Fn(&[u32]) -> Vec<bool> + Send + Sync + 'static) -> Self {
        Self(Arc::new(begins))
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Words")
    }
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
    /// Which tokens begin a word; `Some` masks whole words: a word is chosen by its first token's draw. The first token
    /// of a piece, or after a special one, always begins a word. Default `None`.
    /// See [`MaskedOptions::with_whole_words`].
    pub whole_word: Option<Words>,
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
    pub fn with_whole_words(self, words: Words) -> Self {
        Self { whole_word: Some(words), mask_rate: 1.0, random_rate: 0.0, ..self }
    }

    pub(crate) fn check(&self) -> Result<()> {
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
        check_size(
            self.batch_size,
            "the row length",
            self.fixed_length.unwrap_or(self.max_length),
            MOST_TOKENS,
        )?;
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
        Ok(())
    }
}

/// A row to mask.
pub(crate) struct MaskedRow<'a> {
    /// Where its first token stands in the batch's arrays.
    pub(crate) place: usize,
    /// Its tokens, special ones among them where they have some.
    pub(crate) ids: Cow<'a, [u32]>,
    pub(crate) draws: Draws,
}

impl MaskedRow<'_> {
    /// Whether each token begins a word; without whole words, all do.
    fn begins(&self, options: &MaskedOptions) -> Vec<bool> {
        let mut begins = options.whole_word.as_ref().map_or_else(Vec::new, |Words(begins)| begins(&self.ids));
        // A function that gives fewer values says nothing of the rest.
        begins.resize(self.ids.len(), true);
        begins
    }
}

/// Masks rows.
#[derive(Clone, Debug)]
pub(crate) struct Masker {
    pub(crate) options: MaskedOptions,
    /// For each id, whether it is never chosen.
    pub(crate) special: Vec<bool>,
    pub(crate) lengths: SpanLengths,
}

impl Masker {
    /// # Errors
    /// If an option is outside the range its documentation gives.
    pub(crate) fn new(options: MaskedOptions) -> Result<Self> {
        options.check()?;
        let mut special = vec![false; options.vocab_size];
        for &id in [options.cls, options.sep, options.pad, options.mask].iter().chain(&options.special_ids) {
            special[id as usize] = true;
        }
        let lengths = SpanLengths::new(options.spans, options.mlm_probability);
        Ok(Self { options, special, lengths })
    }

    /// Chooses tokens of `rows` and masks them in `input_ids`, which hold them; `labels` get what they were. Where no
    /// token of any row is chosen, the one (or the word) whose draw came nearest is.
    pub(crate) fn mask(&self, rows: &[MaskedRow<'_>], input_ids: &mut [i32], labels: &mut [i32]) {
        let mut nearest: Option<(u32, usize, usize)> = None;
        let mut any = false;
        for (number, row) in rows.iter().enumerate() {
            let words = self.words(row);
            // Words that the run still covers, and where its fate is drawn.
            let (mut left, mut fate) = (self.reaching(row.draws), 0);
            for at in 0..row.ids.len() {
                if self.is_special(row.ids[at]) {
                    left = 0;
                }
                if !words[at] {
                    continue;
                }
                let [begins, _, _, length] = row.draws.at(at);
                if left == 0 {
                    fate = at;
                }
                if f64::from(unit_f32(begins)) < self.lengths.chance {
                    left = left.max(self.lengths.draw(length));
                }
                if left > 0 {
                    (any, left) = (true, left - 1);
                    self.mask_word(row, &words, at, fate, input_ids, labels);
                } else if nearest.is_none_or(|(least, ..)| begins < least) {
                    nearest = Some((begins, number, at));
                }
            }
        }
        if let (false, Some((_, number, at))) = (any, nearest) {
            let row = &rows[number];
            self.mask_word(row, &self.words(row), at, at, input_ids, labels);
        }
    }

    /// Whether an id is never chosen; nor is one outside the vocabulary, which a damaged shard may hold.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).is_none_or(|&special| special)
    }

    /// How many words of a row are covered by spans that begin before it: without them its first words would be
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

    /// Whether each token can be drawn: it is not special and, with whole words, the first of its word.
    fn words(&self, row: &MaskedRow<'_>) -> Vec<bool> {
        let mut words = row.begins(&self.options);
        let mut after_special = true;
        for (word, &id) in words.iter_mut().zip(row.ids.iter()) {
            let special = self.is_special(id);
            *word = !special && (*word || after_special);
            after_special = special;
        }
        words
    }

    /// Labels and replaces the word that begins at `start` (a single token unless whole words are masked); with spans,
    /// what becomes of it is drawn at `fate`.
    fn mask_word(
        &self,
        row: &MaskedRow<'_>,
        words: &[bool],
        start: usize,
        fate: usize,
        input_ids: &mut [i32],
        labels: &mut [i32],
    ) {
        let (options, ids) = (&self.options, &row.ids);
        let goes_on = |at: &usize| !self.is_special(ids[*at]) && !words[*at];
        for at in std::iter::once(start).chain((start + 1..ids.len()).take_while(goes_on)) {
            let place = row.place + at;
            labels[place] = ids[at] as i32;
            let [_, own, token, _] = row.draws.at(at);
            let action = if options.spans.is_some() { row.draws.at(fate)[1] } else { own };
            let action = f64::from(unit_f32(action));
            if action < options.mask_rate {
                input_ids[place] = options.mask as i32;
            } else if action < options.mask_rate + options.random_rate {
                // The upper word of the product is uniform to within vocab_size / 2^32.
                input_ids[place] = ((u64::from(token) * options.vocab_size as u64) >> 32) as i32;
            }
        }
    }
}

/// The places of labels that are not ignored, rising, padded with 0 to a multiple of [`POSITIONS_MULTIPLE`]; the labels
/// there, padded likewise; and how many there are.
pub(crate) fn chosen(labels: &[i32]) -> (Vec<i32>, Vec<i32>, usize) {
    let all = labels.iter().enumerate().filter(|&(_, &label)| label != IGNORED_LABEL);
    let (mut positions, mut found): (Vec<i32>, Vec<i32>) =
        all.map(|(place, &label)| (place as i32, label)).unzip();
    let count = positions.len();
    let padded = count.max(1).next_multiple_of(POSITIONS_MULTIPLE);
    positions.resize(padded, 0);
    found.resize(padded, IGNORED_LABEL);
    (positions, found, count)
}

/// Places of labels are padded to a multiple of this, to keep the number of distinct shapes small.
const POSITIONS_MULTIPLE: usize = 32;

/// The law of the lengths of spans. Single words are spans of length 1.
#[derive(Clone, Debug)]
pub(crate) struct SpanLengths {
    /// Chance that a length is at most 1, 2, …; the last is 1.
    up_to: Vec<f64>,
    /// Chance that a span begins at a word.
    chance: f64,
}

impl SpanLengths {
    pub(crate) fn new(spans: Option<Spans>, mlm_probability: f64) -> Self {
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

    pub(crate) fn draw(&self, draw: u32) -> usize {
        let unit = f64::from(unit_f32(draw));
        1 + self.up_to[..self.longest() - 1].partition_point(|&at_most| at_most <= unit)
    }
}

/// The draws for the tokens of one unit in one epoch: whether one is chosen (or a span begins), what becomes of it,
/// which random token, the length of the span.
#[derive(Clone, Copy)]
pub(crate) struct Draws {
    key: [u32; 2],
    unit: u64,
}

impl Draws {
    /// Those of a unit in an epoch.
    pub(crate) fn new(seed: u64, epoch: u64, unit: usize) -> Self {
        Self::of(seed, MASK, epoch, unit)
    }

    /// Those of another purpose.
    pub(crate) fn of(seed: u64, purpose: u32, epoch: u64, unit: usize) -> Self {
        // A key for the epoch leaves the counter to the unit and the position.
        let mut stream = Stream::new(seed, purpose, epoch);
        Self { key: [stream.next_u32(), stream.next_u32()], unit: unit as u64 }
    }

    /// Four words at a position.
    pub(crate) fn at(self, position: usize) -> [u32; 4] {
        let position = position as u64;
        let counter = [position as u32, (position >> 32) as u32, self.unit as u32, (self.unit >> 32) as u32];
        philox(self.key, counter)
    }
}
