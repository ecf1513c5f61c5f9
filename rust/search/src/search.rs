//! The engine: one interface over all strategies.

use crate::beam::Beams;
use crate::independent::Independent;
use crate::path::{FinishReason, Hypothesis, Path};
use crate::processors::{self, Context, Hooks};
use crate::rows::{Row, wants_best};
use crate::sample::check_row;
use crate::stochastic::Stochastic;
use crate::{Error, GenerationOptions, Result};

/// A prompt to continue. `Vec<u32>` converts into one with no padding.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// Its tokens, without padding; at least one.
    pub ids: Vec<u32>,
    /// How many padding tokens stood before it in a padded batch: they count in `max_length`, `min_length` and for
    /// `forced_bos_token_id`, as the reference counts them. 0 for a prompt that was never padded.
    pub left_padding: usize,
    /// Number of its first sequence in the coordinates of random draws; the next ones follow. By default the position
    /// in the batch times `num_return_sequences`; give it to redraw some samples alone.
    pub first_sequence: Option<u32>,
}

impl From<Vec<u32>> for Prompt {
    fn from(ids: Vec<u32>) -> Self {
        Self { ids, ..Self::default() }
    }
}

/// The forward pass wanted next: one row for each active sequence.
///
/// Step 0 asks for what follows the prompts: row i is prompt i, its last token, and parent i, whether the caller feeds
/// that token or the whole prompt. From step 1 on, `parents` are rows of the step before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Tokens added to every active sequence before this step; the new token's position is the prompt's length plus
    /// this minus one.
    pub index: usize,
    /// The token each row appends.
    pub tokens: Vec<u32>,
    /// The row of the previous step that each row continues.
    pub parents: Vec<u32>,
    /// The sequence of each row: prompt × n + number, with n = `num_beams` if that is above 1, otherwise
    /// `num_return_sequences`. At step 0, the prompt's first sequence stands for all.
    pub sequences: Vec<u32>,
}

/// A token that is certain as soon as it is chosen, for streaming.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Emitted {
    /// The sequence, as in [`Step::sequences`].
    pub sequence: usize,
    /// The token appended.
    pub token: u32,
    /// The model's own log-probability of it, in nats.
    pub logprob: f64,
}

/// What all sequences share.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) options: GenerationOptions,
    pub(crate) prompts: Vec<PromptSetup>,
    hooks: Hooks,
    pub(crate) vocab_size: usize,
}

#[derive(Debug)]
pub(crate) struct PromptSetup {
    ids: Vec<u32>,
    /// Tokens with the padding before them.
    width: usize,
    /// Tokens that may be added.
    pub(crate) limit: usize,
    pub(crate) first_sequence: u32,
}

/// A search over a batch of prompts; see the crate's page for the loop around it.
#[derive(Debug)]
pub struct Search {
    pub(crate) setup: Setup,
    pub(crate) strategy: Strategy,
    pub(crate) step: Step,
    pub(crate) emitted: Vec<Emitted>,
}

#[derive(Debug)]
pub(crate) enum Strategy {
    Independent(Independent),
    Beams(Beams),
    Stochastic(Stochastic),
}

impl Search {
    /// Prepares the search; a model with `vocab_size` logits a row will be asked.
    ///
    /// # Errors
    /// [`Error::Option`] as [`GenerationOptions::validate`]; [`Error::Prompt`] for a prompt that is empty, has a token
    /// outside the vocabulary, or leaves no room under `max_length`.
    pub fn new(
        options: GenerationOptions,
        prompts: impl IntoIterator<Item = Prompt>,
        vocab_size: usize,
    ) -> Result<Self> {
        options.validate(vocab_size)?;
        let prompts = prompts
            .into_iter()
            .enumerate()
            .map(|(index, prompt)| PromptSetup::new(&options, index, prompt, vocab_size))
            .collect::<Result<Vec<_>>>()?;
        let per_prompt = if options.num_beams > 1 { options.num_beams } else { options.num_return_sequences };
        let rows = 0..prompts.len() as u32;
        let step = Step {
            index: 0,
            tokens: prompts.iter().map(|p| *p.ids.last().expect("prompts have a token")).collect(),
            parents: rows.clone().collect(),
            sequences: rows.map(|p| p * per_prompt as u32).collect(),
        };
        let setup = Setup { options, prompts, hooks: Hooks::default(), vocab_size };
        let strategy = if setup.options.stochastic_beams {
            Strategy::Stochastic(Stochastic::new(&setup))
        } else if setup.options.num_beams > 1 {
            Strategy::Beams(Beams::new(&setup))
        } else {
            Strategy::Independent(Independent::new(&setup))
        };
        Ok(Self { setup, strategy, step, emitted: Vec::new() })
    }

    /// Lets functions of the caller's act on the scores.
    #[must_use]
    pub fn with_hooks(mut self, hooks: Hooks) -> Self {
        self.setup.hooks = hooks;
        self
    }

    /// The forward pass wanted next, or `None` when all sequences are finished.
    #[must_use]
    pub fn step(&self) -> Option<&Step> {
        if self.step.tokens.is_empty() { None } else { Some(&self.step) }
    }

    /// Takes the logits `[active, V]` that [`Search::step`] asked for and goes on.
    ///
    /// # Errors
    /// [`Error::Shape`] for a slice of another length (an empty one is right once the search is over);
    /// [`Error::Logits`] for a NaN or +∞ unless `remove_invalid_values`, or when every token is banned;
    /// [`Error::Hook`] if one of the caller's functions fails. The search
    /// stays as it was, so other logits may be given.
    pub fn advance(&mut self, logits: &[f32]) -> Result<()> {
        let (step, active, vocab_size) = (self.step.index, self.step.tokens.len(), self.setup.vocab_size);
        if logits.len() != active * vocab_size {
            return Err(Error::Shape { step, active, vocab_size, given: logits.len() });
        }
        let rows: Vec<_> = logits.chunks_exact(vocab_size).map(Row::Whole).collect();
        let missing = self.advance_rows(&rows)?;
        debug_assert!(missing.is_empty(), "whole rows suffice");
        Ok(())
    }

    /// Whether the best `count` logits of each row may do for [`Search::advance_rows`], and the temperature at which it
    /// wants them weighed; `None` if this search looks at whole rows.
    #[must_use]
    pub fn wants_best(&self, count: usize) -> Option<f32> {
        let Hooks { allowed_tokens, processor, .. } = &self.setup.hooks;
        let changed = allowed_tokens.is_some() || processor.is_some();
        if changed { None } else { wants_best(&self.setup.options, count, self.setup.vocab_size) }
    }

    /// As [`Search::advance`], with whole rows or the best of them. Gives the numbers of those whose best do not suffice;
    /// then nothing has changed, and they are to be given whole.
    ///
    /// # Errors
    /// As [`Search::advance`]; [`Error::Outside`] for the best of a row that are not in order, or no tokens.
    pub fn advance_rows(&mut self, rows: &[Row<'_>]) -> Result<Vec<usize>> {
        let (step, active, vocab_size) = (self.step.index, self.step.tokens.len(), self.setup.vocab_size);
        let whole = rows.iter().filter_map(|row| if let Row::Whole(x) = row { Some(x.len()) } else { None });
        if rows.len() != active || whole.clone().any(|length| length != vocab_size) {
            return Err(Error::Shape { step, active, vocab_size, given: whole.sum() });
        }
        let mut missing = Vec::new();
        match &mut self.strategy {
            Strategy::Independent(sequences) => {
                let emitted = sequences.advance(&self.setup, step, rows, &mut missing)?;
                if missing.is_empty() {
                    self.emitted = emitted;
                    self.step = next_step(step + 1, sequences.open());
                }
            }
            Strategy::Beams(beams) => {
                beams.advance(&self.setup, step, rows, &mut missing)?;
                if missing.is_empty() {
                    self.step = next_step(step + 1, beams.open());
                }
            }
            Strategy::Stochastic(nodes) => {
                let best = rows.iter().enumerate().filter(|(_, row)| matches!(row, Row::Best(_)));
                missing.extend(best.map(|(i, _)| i));
                if missing.is_empty() {
                    nodes.advance(&self.setup, step, rows)?;
                    self.step = next_step(step + 1, nodes.open(&self.setup));
                }
            }
        }
        Ok(missing)
    }

    /// The tokens the last [`Search::advance`] made certain, by ascending sequence: one for each active sequence in
    /// greedy search and sampling, none in beam search, where nothing is certain before the end.
    #[must_use]
    pub fn emitted(&self) -> &[Emitted] {
        &self.emitted
    }

    /// The results, by prompt: in beam search the best `num_return_sequences`, best first; otherwise one for each
    /// sequence. What is unfinished counts as cut off by length.
    #[must_use]
    pub fn finish(self) -> Vec<Hypothesis> {
        match self.strategy {
            Strategy::Independent(sequences) => sequences.finish(),
            Strategy::Beams(beams) => beams.finish(&self.setup),
            Strategy::Stochastic(nodes) => nodes.finish(&self.setup),
        }
    }
}

/// Lays the open paths out as the rows of step `index`.
pub(crate) fn next_step<'a>(index: usize, open: impl Iterator<Item = (usize, &'a mut Path)>) -> Step {
    let mut step = Step { index, tokens: Vec::new(), parents: Vec::new(), sequences: Vec::new() };
    for (row, (sequence, path)) in open.enumerate() {
        step.tokens.push(path.last());
        step.parents.push(path.row as u32);
        step.sequences.push(sequence as u32);
        path.row = row;
    }
    step
}

impl PromptSetup {
    fn new(options: &GenerationOptions, index: usize, prompt: Prompt, vocab_size: usize) -> Result<Self> {
        let fail = |problem: String| Err(Error::Prompt { prompt: index, problem });
        let Prompt { ids, left_padding, first_sequence } = prompt;
        if ids.is_empty() {
            return fail("is empty; begin it with the model's begin token".to_owned());
        }
        if let Some(token) = ids.iter().find(|t| **t as usize >= vocab_size) {
            return fail(format!("has token {token}, but the vocabulary ends at {vocab_size}"));
        }
        let width = ids.len().saturating_add(left_padding);
        let limit = options.new_token_limit(width);
        if limit == 0 {
            let length = options.max_length.unwrap_or_default();
            return fail(format!(
                "has {width} tokens, max_length is {length}: raise it, or give max_new_tokens"
            ));
        }
        let first_sequence = first_sequence.unwrap_or((index * options.num_return_sequences) as u32);
        Ok(Self { ids, width, limit, first_sequence })
    }
}

impl Setup {
    /// A path that holds nothing but prompt `prompt`.
    pub(crate) fn path(&self, prompt: usize) -> Path {
        let ids = self.prompts[prompt].ids.clone();
        Path {
            prompt,
            prompt_len: ids.len(),
            ids,
            token_logprobs: Vec::new(),
            beam_indices: Vec::new(),
            score: 0.0,
            row: prompt,
            reason: FinishReason::Length,
        }
    }

    /// Copies a row of logits into `out`, repaired or refused if it holds invalid values.
    pub(crate) fn read_row(
        &self,
        row: &[f32],
        step: usize,
        sequence: usize,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        out.clear();
        out.extend_from_slice(row);
        if self.options.remove_invalid_values {
            for x in out.iter_mut() {
                *x = if x.is_nan() { 0.0 } else { x.clamp(f32::MIN, f32::MAX) };
            }
        }
        check_row(out).map_err(|problem| Error::Logits { step, sequence, problem })
    }

    /// Applies processors and filters to the scores of what follows `path`; `taken` are the tokens that earlier groups
    /// took in this step.
    pub(crate) fn process(&self, path: &Path, taken: &[u32], scores: &mut [f32]) -> Result<()> {
        let Path { ids, prompt_len, prompt, .. } = path;
        let width = self.prompts[*prompt].width;
        let context = Context { ids, prompt_len: *prompt_len, width, prompt: *prompt, taken };
        processors::process(&self.options, &self.hooks, context, scores)
    }

    pub(crate) fn is_end(&self, token: u32) -> bool {
        self.options.eos_token_id.contains(&token)
    }

    /// Why `path` is over once `token` follows it, if it is.
    pub(crate) fn ending(&self, path: &Path, token: u32) -> Result<Option<FinishReason>> {
        if self.is_end(token) {
            return Ok(Some(FinishReason::Stop));
        }
        if let Some(function) = &self.hooks.ends {
            let ids = [&path.ids[..], &[token]].concat();
            let ends = function(path.prompt_len, &ids)
                .map_err(|problem| Error::Hook { name: "stopping_criteria", problem })?;
            if ends {
                return Ok(Some(FinishReason::Stop));
            }
        }
        let is_full = path.added() + 1 >= self.prompts[path.prompt].limit;
        Ok(is_full.then_some(FinishReason::Length))
    }

    /// The message for a row on which nothing is allowed.
    pub(crate) fn all_banned(&self) -> String {
        "the options ban every token; loosen bad_words_ids, suppress_tokens, no_repeat_ngram_size or min_length"
            .to_owned()
    }
}
