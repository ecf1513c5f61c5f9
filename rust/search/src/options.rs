//! What a caller may ask of a search, under Hugging Face's names.

use crate::{Error, Filters, Result};

/// When beam search stops before the length limit, once `num_beams` hypotheses of a prompt are finished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EarlyStopping {
    /// `False`: when the best open beam, scored at its present length, is no better than the worst finished one.
    #[default]
    Heuristic,
    /// `True`: at once.
    FirstComplete,
    /// `"never"`: when no open beam can become better; with a positive length penalty, scored at the longest length.
    Never,
}

/// Options of one search. Names, meanings and defaults are those of transformers 5.23 `GenerationConfig`, except
/// `top_k` (off unless given) and `seed`.
///
/// Lengths count tokens. `pad_token_id` has no place here since results are not padded, nor have `stop_strings`, which
/// need text: see [`crate::Hooks::ends`].
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationOptions {
    /// How many tokens to add at most, the end token included. Default: 20 if `max_length` is not given either.
    pub max_new_tokens: Option<usize>,
    /// How long prompt and addition together may become; `max_new_tokens` decides if both are given.
    pub max_length: Option<usize>,
    /// How long prompt and addition together must be before an end token is allowed; default 0.
    pub min_length: usize,
    /// How many tokens to add before an end token is allowed; decides over `min_length` if given.
    pub min_new_tokens: Option<usize>,
    /// Draw tokens (true) or take the most probable (false, the default).
    pub do_sample: bool,
    /// Width of the beam; 1, the default, is no beam search.
    pub num_beams: usize,
    /// Results per prompt: that many independent samples, or the best of the beam. Default 1.
    pub num_return_sequences: usize,
    /// Temperature, top-k, top-p and their kin; need `do_sample`.
    pub filters: Filters,
    /// Divides positive logits (multiplies negative ones) of every token of prompt and addition; > 0, default 1.
    /// Source: Keskar et al. 2019, "CTRL", section 4.1.
    pub repetition_penalty: f64,
    /// Divides by 1/x, as above, for the tokens of the prompt: above 1 favours them; > 0, default 1.
    pub encoder_repetition_penalty: f64,
    /// Subtracted from the score of every token of the addition, once each; default 0.
    /// Source: vLLM `SamplingParams`.
    pub presence_penalty: f64,
    /// Subtracted from the score of every token of the addition, as often as it occurs there; default 0.
    pub frequency_penalty: f64,
    /// No n-gram of this size may occur twice, prompt included; 0, the default, is off.
    pub no_repeat_ngram_size: usize,
    /// No n-gram of this size may be taken over from the prompt; 0, the default, is off.
    pub encoder_no_repeat_ngram_size: usize,
    /// Token sequences that must not appear. A sequence that is one end token is passed over.
    pub bad_words_ids: Vec<Vec<u32>>,
    /// Added to the score of a sequence's last token wherever its other tokens precede.
    pub sequence_bias: Vec<(Vec<u32>, f64)>,
    /// Tokens never chosen.
    pub suppress_tokens: Vec<u32>,
    /// Tokens not chosen first.
    pub begin_suppress_tokens: Vec<u32>,
    /// The token that must follow a prompt of one token.
    pub forced_bos_token_id: Option<u32>,
    /// Tokens of which one must stand at the length limit.
    pub forced_eos_token_id: Vec<u32>,
    /// Into how many groups the beams of a prompt are divided; each searches by itself, but avoids the tokens that earlier
    /// groups chose in the same step. Divides `num_beams`; default 1.
    /// Source: Vijayakumar et al. 2018, "Diverse Beam Search", algorithm 1, with Hamming diversity.
    pub num_beam_groups: usize,
    /// Subtracted from a token's score for each beam of an earlier group that chose it in this step; default 0, which is
    /// refused with several groups, since they would all be equal.
    pub diversity_penalty: f64,
    /// How many finished hypotheses beam search waits for and compares, in units of `num_beams`; default 1.
    /// Source: Kasai et al. 2022, "A Call for Clarity in Beam Search", section 2.2.
    pub patience: f64,
    /// Constraints, each a list of alternatives of which one must occur in the addition before an end token may.
    /// Source: Post & Vilar 2018, "Fast Lexically Constrained Decoding with Dynamic Beam Allocation".
    pub force_words_ids: Vec<Vec<Vec<u32>>>,
    /// Constraints must be met in the order in which they are given, without overlap. Default false.
    pub ordered_constraints: bool,
    /// Draw `num_beams` distinct sequences without replacement from the distribution of filters and processors. Needs
    /// `do_sample`; results come in drawing order, their scores are summed log-probabilities. Default false.
    /// Source: Kool et al. 2019, "Stochastic Beams and Where to Find Them".
    pub stochastic_beams: bool,
    /// Exponent of the length by which a beam's summed log-probability is divided; default 1. Positive favours long
    /// results. Needs `num_beams` > 1.
    pub length_penalty: f64,
    /// Needs `num_beams` > 1.
    pub early_stopping: EarlyStopping,
    /// `(start, factor)`: after `start` new tokens the end token's score grows by |score|·(factorⁿ − 1) at the n-th.
    pub exponential_decay_length_penalty: Option<(usize, f64)>,
    /// Renormalise log-probabilities after processors and filters; acts on beam scores only. Default false.
    pub renormalize_logits: bool,
    /// Replace NaN by 0 and ±∞ by the largest finite numbers instead of failing. Default false.
    /// Differs: done before anything else, because one NaN would blank the row in the log-softmax of beam search.
    pub remove_invalid_values: bool,
    /// Tokens that end a sequence; none by default.
    pub eos_token_id: Vec<u32>,
    /// Seed of all draws; default 0.
    pub seed: u64,
}

impl Default for GenerationOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: None,
            max_length: None,
            min_length: 0,
            min_new_tokens: None,
            do_sample: false,
            num_beams: 1,
            num_return_sequences: 1,
            filters: Filters::default(),
            repetition_penalty: 1.0,
            encoder_repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            no_repeat_ngram_size: 0,
            encoder_no_repeat_ngram_size: 0,
            bad_words_ids: Vec::new(),
            sequence_bias: Vec::new(),
            suppress_tokens: Vec::new(),
            begin_suppress_tokens: Vec::new(),
            forced_bos_token_id: None,
            forced_eos_token_id: Vec::new(),
            num_beam_groups: 1,
            diversity_penalty: 0.0,
            patience: 1.0,
            force_words_ids: Vec::new(),
            ordered_constraints: false,
            stochastic_beams: false,
            length_penalty: 1.0,
            early_stopping: EarlyStopping::Heuristic,
            exponential_decay_length_penalty: None,
            renormalize_logits: false,
            remove_invalid_values: false,
            eos_token_id: Vec::new(),
            seed: 0,
        }
    }
}

/// Tokens added when no limit is given. Source: transformers 5.23 `generation/utils.py`.
const DEFAULT_NEW_TOKENS: usize = 20;
/// The most sequences of a prompt: beyond, even their bookkeeping takes gigabytes.
pub const MOST_SEQUENCES: usize = 1 << 20;

impl GenerationOptions {
    /// Checks ranges, contradictions, and that every token id is below `vocab_size`.
    ///
    /// # Errors
    /// [`Error::Option`] naming the first option at fault.
    pub fn validate(&self, vocab_size: usize) -> Result<()> {
        self.filters.validate()?;
        self.validate_counts()?;
        self.validate_tokens(vocab_size)
    }

    fn validate_counts(&self) -> Result<()> {
        for (name, value) in [
            ("max_new_tokens", self.max_new_tokens),
            ("max_length", self.max_length),
            ("num_beams", Some(self.num_beams)),
            ("num_beam_groups", Some(self.num_beam_groups)),
            ("num_return_sequences", Some(self.num_return_sequences)),
        ] {
            if value == Some(0) {
                return Error::option(name, "is 0; it must be at least 1");
            }
        }
        for (name, value) in
            [("num_beams", self.num_beams), ("num_return_sequences", self.num_return_sequences)]
        {
            if value > MOST_SEQUENCES {
                return Error::option(name, format!("is {value}; it must be at most {MOST_SEQUENCES}"));
            }
        }
        for (name, penalty) in [
            ("repetition_penalty", self.repetition_penalty),
            ("encoder_repetition_penalty", self.encoder_repetition_penalty),
            ("exponential_decay_length_penalty", self.exponential_decay_length_penalty.map_or(1.0, |p| p.1)),
        ] {
            if !(penalty as f32 > 0.0 && (penalty as f32).is_finite()) {
                return Error::option(
                    name,
                    format!("is {penalty}; it must be positive and finite (1 is neutral)"),
                );
            }
        }
        for (name, value) in [
            ("length_penalty", self.length_penalty),
            ("diversity_penalty", self.diversity_penalty),
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
            ("patience", self.patience),
        ] {
            if !(value as f32).is_finite() {
                return Error::option(name, format!("is {value}; it must be finite"));
            }
        }
        self.validate_beams()?;
        if let (Some(least), Some(most)) = (self.min_new_tokens, self.max_new_tokens)
            && least > most
        {
            return Error::option(
                "min_new_tokens",
                format!("is {least}, above max_new_tokens, which is {most}"),
            );
        }
        let unused = |name, needs: &str| {
            Error::option(name, format!("is set but needs {needs}; set that or leave it out"))
        };
        if !self.do_sample
            && let Some(name) = self.filters.first_set()
        {
            return unused(name, "do_sample");
        }
        if self.num_beams == 1 {
            if self.length_penalty != 1.0 {
                return unused("length_penalty", "num_beams above 1");
            }
            if self.early_stopping != EarlyStopping::Heuristic {
                return unused("early_stopping", "num_beams above 1");
            }
            if !self.do_sample && self.num_return_sequences > 1 {
                let problem = "is above 1, but greedy search has one result; set do_sample or num_beams";
                return Error::option("num_return_sequences", problem);
            }
        } else if self.num_return_sequences > self.num_beams {
            let (given, beams) = (self.num_return_sequences, self.num_beams);
            return Error::option(
                "num_return_sequences",
                format!("is {given}, above num_beams, which is {beams}"),
            );
        }
        Ok(())
    }

    fn validate_beams(&self) -> Result<()> {
        let (beams, groups) = (self.num_beams, self.num_beam_groups);
        let set = [
            ("num_beam_groups", groups > 1),
            ("force_words_ids", !self.force_words_ids.is_empty()),
            ("patience", self.patience != 1.0),
            ("stochastic_beams", self.stochastic_beams),
        ];
        if let Some((name, _)) = set.iter().find(|(_, set)| *set && beams == 1) {
            return Error::option(name, "is set but needs num_beams above 1; set that or leave it out");
        }
        if self.diversity_penalty < 0.0 || (groups > 1 && self.diversity_penalty == 0.0) {
            let problem = format!("is {}; groups differ only if it is above 0", self.diversity_penalty);
            return Error::option("diversity_penalty", problem);
        }
        if groups == 1 && self.diversity_penalty != 0.0 {
            return Error::option("diversity_penalty", "is set but needs num_beam_groups above 1");
        }
        if !beams.is_multiple_of(groups) {
            return Error::option(
                "num_beam_groups",
                format!("is {groups}; it must divide num_beams, {beams}"),
            );
        }
        if self.patience <= 0.0 || self.patience * (beams as f64) < 0.5 {
            let problem = format!("is {}; times num_beams it must be at least one", self.patience);
            return Error::option("patience", problem);
        }
        if self.ordered_constraints && self.force_words_ids.is_empty() {
            return Error::option("ordered_constraints", "is set but needs force_words_ids");
        }
        if groups > 1 && !self.force_words_ids.is_empty() {
            return Error::option("force_words_ids", "cannot be combined with num_beam_groups above 1");
        }
        if self.do_sample
            && let Some((name, _)) = set[..2].iter().find(|(_, set)| *set)
        {
            return Error::option(name, "cannot be combined with do_sample; leave one of them out");
        }
        if self.stochastic_beams {
            if !self.do_sample {
                return Error::option("stochastic_beams", "is set but needs do_sample");
            }
            let ranked = [
                ("length_penalty", self.length_penalty != 1.0),
                ("early_stopping", self.early_stopping != EarlyStopping::Heuristic),
                ("patience", self.patience != 1.0),
            ];
            if let Some((name, _)) = ranked.iter().find(|(_, set)| *set) {
                return Error::option(name, "has no meaning with stochastic_beams; leave it out");
            }
        }
        Ok(())
    }

    fn validate_tokens(&self, vocab_size: usize) -> Result<()> {
        let forced_bos = self.forced_bos_token_id.as_slice();
        let mut lists: Vec<(&'static str, &[u32])> = vec![
            ("suppress_tokens", &self.suppress_tokens),
            ("begin_suppress_tokens", &self.begin_suppress_tokens),
            ("forced_bos_token_id", forced_bos),
            ("forced_eos_token_id", &self.forced_eos_token_id),
            ("eos_token_id", &self.eos_token_id),
        ];
        lists.extend(self.bad_words_ids.iter().map(|words| ("bad_words_ids", words.as_slice())));
        lists.extend(self.sequence_bias.iter().map(|(words, _)| ("sequence_bias", words.as_slice())));
        lists
            .extend(self.force_words_ids.iter().flatten().map(|words| ("force_words_ids", words.as_slice())));
        for (name, tokens) in lists {
            if let Some(token) = tokens.iter().find(|t| **t as usize >= vocab_size) {
                return Error::option(
                    name,
                    format!("has token {token}, but the vocabulary ends at {vocab_size}"),
                );
            }
        }
        if self.bad_words_ids.iter().any(Vec::is_empty) {
            return Error::option("bad_words_ids", "has an empty sequence; remove it");
        }
        for alternatives in &self.force_words_ids {
            if alternatives.is_empty() || alternatives.iter().any(Vec::is_empty) {
                return Error::option("force_words_ids", "has an empty list; remove it");
            }
            if alternatives.iter().flatten().any(|token| self.eos_token_id.contains(token)) {
                return Error::option("force_words_ids", "has an end token, after which nothing can follow");
            }
        }
        for (sequence, bias) in &self.sequence_bias {
            if sequence.is_empty() || bias.is_nan() || *bias as f32 == f32::INFINITY {
                return Error::option(
                    "sequence_bias",
                    format!("has {sequence:?}: {bias}; it needs tokens and a number"),
                );
            }
        }
        Ok(())
    }

    /// Beams of one group.
    pub(crate) fn group_width(&self) -> usize {
        self.num_beams / self.num_beam_groups
    }

    /// How many continuations of a group's beams are considered in a step.
    pub(crate) fn beam_candidates(&self) -> usize {
        self.group_width() * (1 + self.eos_token_id.len()).max(2)
    }

    /// How many finished hypotheses of a group are kept, and awaited before it may stop.
    pub(crate) fn kept(&self) -> usize {
        ((self.group_width() as f64 * self.patience).round() as usize).max(1)
    }

    /// How many tokens may follow a prompt of `width` tokens, padding included.
    pub(crate) fn new_token_limit(&self, width: usize) -> usize {
        match (self.max_new_tokens, self.max_length) {
            (Some(limit), _) => limit,
            (None, Some(length)) => length.saturating_sub(width),
            (None, None) => DEFAULT_NEW_TOKENS,
        }
    }

    /// How many tokens must follow a prompt of `width` tokens before an end token may.
    pub(crate) fn new_token_minimum(&self, width: usize) -> usize {
        self.min_new_tokens.unwrap_or_else(|| self.min_length.saturating_sub(width))
    }
}
