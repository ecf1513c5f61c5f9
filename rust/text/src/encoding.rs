//! What encoding a text gives, and its truncation and padding.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A text as tokens: columns of equal length T.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoding {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Segment of each token, what BERT calls `token_type_ids`.
    pub type_ids: Vec<u32>,
    /// Token strings as the vocabulary has them.
    pub tokens: Vec<String>,
    /// Start and end in the original text, counted in Unicode code points; (0, 0) for tokens that were put in.
    pub offsets: Vec<(u32, u32)>,
    /// 1 for tokens that were put in (by the template or padding), 0 for those of the text.
    pub special_tokens_mask: Vec<u32>,
    /// 1 for tokens, 0 for padding.
    pub attention_mask: Vec<u32>,
    /// Which word of its text a token belongs to, if any.
    pub word_ids: Vec<Option<u32>>,
    /// 0 for tokens of the first text, 1 for those of the second, none for those put in.
    pub sequence_ids: Vec<Option<u32>>,
    /// What truncation cut off, in parts of the same length limit.
    pub overflowing: Vec<Encoding>,
}

impl Encoding {
    /// Number of tokens.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    pub(crate) fn push(
        &mut self,
        id: u32,
        token: &str,
        offsets: (u32, u32),
        word: Option<u32>,
        sequence: Option<u32>,
        type_id: u32,
    ) {
        self.ids.push(id);
        self.type_ids.push(type_id);
        self.tokens.push(token.to_owned());
        self.offsets.push(offsets);
        self.special_tokens_mask.push(u32::from(sequence.is_none()));
        self.attention_mask.push(1);
        self.word_ids.push(word);
        self.sequence_ids.push(sequence);
    }

    /// Appends the columns of `other`, without what overflowed.
    pub(crate) fn append(&mut self, other: &Self) {
        self.ids.extend(&other.ids);
        self.type_ids.extend(&other.type_ids);
        self.tokens.extend_from_slice(&other.tokens);
        self.offsets.extend(&other.offsets);
        self.special_tokens_mask.extend(&other.special_tokens_mask);
        self.attention_mask.extend(&other.attention_mask);
        self.word_ids.extend(&other.word_ids);
        self.sequence_ids.extend(&other.sequence_ids);
    }

    fn slice(&self, start: usize, end: usize) -> Self {
        Self {
            ids: self.ids[start..end].to_vec(),
            type_ids: self.type_ids[start..end].to_vec(),
            tokens: self.tokens[start..end].to_vec(),
            offsets: self.offsets[start..end].to_vec(),
            special_tokens_mask: self.special_tokens_mask[start..end].to_vec(),
            attention_mask: self.attention_mask[start..end].to_vec(),
            word_ids: self.word_ids[start..end].to_vec(),
            sequence_ids: self.sequence_ids[start..end].to_vec(),
            overflowing: vec![],
        }
    }

    /// Cuts to `max_length` tokens; the rest goes to `overflowing`, in parts that share `stride` tokens.
    fn truncate(&mut self, max_length: usize, stride: usize, direction: Direction) -> Result<()> {
        let n = self.len();
        if max_length >= n {
            return Ok(());
        }
        if max_length == 0 {
            let all = std::mem::take(self);
            self.overflowing.push(all);
            return Ok(());
        }
        let mut parts = windows(n, max_length, stride, direction)?
            .into_iter()
            .map(|(start, end)| self.slice(start, end))
            .collect::<Vec<_>>()
            .into_iter();
        *self = parts.next().unwrap_or_default();
        self.overflowing = parts.collect();
        Ok(())
    }

    /// Pads to `length` tokens.
    pub(crate) fn pad(&mut self, length: usize, padding: &Padding) {
        for part in &mut self.overflowing {
            part.pad(length, padding);
        }
        let n = length.saturating_sub(self.len());
        fn fill<T: Clone>(column: &mut Vec<T>, n: usize, value: T, direction: Direction) {
            let at = if direction == Direction::Left { 0 } else { column.len() };
            column.splice(at..at, std::iter::repeat_n(value, n));
        }
        let side = padding.direction;
        fill(&mut self.ids, n, padding.pad_id, side);
        fill(&mut self.type_ids, n, padding.pad_type_id, side);
        fill(&mut self.tokens, n, padding.pad_token.clone(), side);
        fill(&mut self.offsets, n, (0, 0), side);
        fill(&mut self.special_tokens_mask, n, 1, side);
        fill(&mut self.attention_mask, n, 0, side);
        fill(&mut self.word_ids, n, None, side);
        fill(&mut self.sequence_ids, n, None, side);
    }
}

/// The ranges of at most `max_length` of `n` tokens that overlap by `stride`, the one that is kept first.
fn windows(n: usize, max_length: usize, stride: usize, direction: Direction) -> Result<Vec<(usize, usize)>> {
    if stride >= max_length {
        return Err(Error::option(
            "encode",
            "stride",
            format!("is {stride} but must be less than the {max_length} tokens that a text keeps"),
        ));
    }
    let mut out = vec![];
    let mut done = 0;
    loop {
        let end = (done + max_length).min(n);
        out.push(match direction {
            Direction::Right => (done, end),
            Direction::Left => (n - end, n - done),
        });
        if end == n {
            return Ok(out);
        }
        done += max_length - stride;
    }
}

/// A side of a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Direction {
    /// At the start.
    Left,
    /// At the end.
    #[default]
    Right,
}

/// Which of two texts is truncated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TruncationStrategy {
    /// The longer one, then both alike.
    #[default]
    LongestFirst,
    /// The first.
    OnlyFirst,
    /// The second.
    OnlySecond,
}

/// How long texts are cut, with the fields of tokenizer.json.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Truncation {
    /// The side that is cut off; default right.
    #[serde(default)]
    pub direction: Direction,
    /// Most tokens of an encoding, template included.
    pub max_length: usize,
    /// Which of two texts is cut; default the longer.
    #[serde(default)]
    pub strategy: TruncationStrategy,
    /// Tokens that neighbouring parts of a cut text share; default 0.
    #[serde(default)]
    pub stride: usize,
}

impl Truncation {
    /// Cuts one text, or two, to the limit less the `n_added` tokens of the template.
    pub(crate) fn apply(
        &self,
        first: &mut Encoding,
        second: Option<&mut Encoding>,
        n_added: usize,
    ) -> Result<()> {
        let max = self.room(n_added)?;
        let cut = |e: &mut Encoding, to| e.truncate(to, self.stride, self.direction);
        let (n1, n2) = (first.len(), second.as_ref().map_or(0, |e| e.len()));
        if n1 + n2 <= max {
            return Ok(());
        }
        let excess = n1 + n2 - max;
        if max == 0 {
            cut(first, 0)?;
            return second.map_or(Ok(()), |second| cut(second, 0));
        }
        match (self.strategy, second) {
            (TruncationStrategy::LongestFirst, None) => cut(first, max),
            (TruncationStrategy::LongestFirst, Some(second)) => {
                let (short, long) = (n1.min(n2), n1.max(n2));
                // What remains for the longer text once the shorter one is whole; both halves if that is too little.
                let long_kept = if short > max { long } else { short.max(max - short) };
                let (short, long) =
                    if short + long_kept > max { (max / 2, max / 2 + max % 2) } else { (short, long_kept) };
                cut(first, if n1 <= n2 { short } else { long })?;
                cut(second, if n1 <= n2 { long } else { short })
            }
            (TruncationStrategy::OnlySecond, None) => Err(no_second_text()),
            (strategy, second) => {
                let target = match second {
                    Some(second) if strategy == TruncationStrategy::OnlySecond => second,
                    _ => first,
                };
                if target.len() <= excess {
                    return Err(Error::option(
                        "encode",
                        "max_length",
                        format!(
                            "is {}, but the text to truncate has {} tokens and {excess} are too many; truncate \
                             longest_first",
                            self.max_length,
                            target.len()
                        ),
                    ));
                }
                let kept = target.len() - excess;
                cut(target, kept)
            }
        }
    }

    /// Tokens left for the texts.
    pub(crate) fn room(&self, n_added: usize) -> Result<usize> {
        self.max_length.checked_sub(n_added).ok_or_else(|| {
            Error::option(
                "encode",
                "max_length",
                format!("is {} but the template alone adds {n_added} tokens", self.max_length),
            )
        })
    }

    /// Cuts one text's ids in place.
    pub(crate) fn apply_ids(&self, ids: &mut Vec<u32>, start: usize, n_added: usize) -> Result<()> {
        let max = self.room(n_added)?;
        if self.strategy == TruncationStrategy::OnlySecond && ids.len() - start > max {
            return Err(no_second_text());
        }
        match self.direction {
            Direction::Right => ids.truncate(start + max),
            Direction::Left => {
                let excess = (ids.len() - start).saturating_sub(max);
                ids.drain(start..start + excess);
            }
        }
        Ok(())
    }
}

fn no_second_text() -> Error {
    Error::option(
        "encode",
        "strategy",
        "is only_second but there is no second text; give one or truncate longest_first",
    )
}

/// To what length encodings are padded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PaddingStrategy {
    /// The longest of the batch.
    #[default]
    BatchLongest,
    /// This many tokens.
    Fixed(usize),
}

/// How short texts are padded, with the fields of tokenizer.json.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Padding {
    /// To what length.
    pub strategy: PaddingStrategy,
    /// The side that is filled.
    pub direction: Direction,
    /// Rounds the length up to a multiple.
    pub pad_to_multiple_of: Option<usize>,
    /// The id of the padding.
    pub pad_id: u32,
    /// Its type id.
    pub pad_type_id: u32,
    /// Its string.
    pub pad_token: String,
}

impl Padding {
    /// The length that a batch whose longest encoding has `longest` tokens is padded to.
    #[must_use]
    pub fn length(&self, longest: usize) -> usize {
        let length = match self.strategy {
            PaddingStrategy::BatchLongest => longest,
            PaddingStrategy::Fixed(length) => length,
        };
        match self.pad_to_multiple_of {
            Some(multiple @ 1..) => length.next_multiple_of(multiple),
            _ => length,
        }
    }
}
