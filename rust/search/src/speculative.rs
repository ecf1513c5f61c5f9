//! Steps in which something outside has a say: the scores of a row for others to read, tokens chosen elsewhere, and
//! tokens that a cheaper model drafted.
//!
//! A drafted token d with probability q(d) under the draft is kept with probability min(1, p(d)/q(d)); otherwise the
//! token is drawn from max(0, p − q), normalised. Either way it is distributed as p. Where the draft is certain (q = 1
//! for one token) this is the same as drawing from p and comparing, which is what [`Search::advance`] does.
//! Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1 and
//! appendix A.1.
//!
//! Draws of drafts and of decisions are functions of (seed, sequence, step), each under its own purpose. A step's
//! uniforms are used for one kept token at most: drafts behind a refused one decided nothing.

use pyrformer_random::Stream;

use crate::path::Path;
use crate::sample::{DRAFT_PURPOSE, VERIFY_PURPOSE, argmax, coordinate, log_softmax, log_sum_exp, pick};
use crate::search::{Emitted, Search, Strategy, next_step};
use crate::{Error, Result};

/// A token proposed by a cheaper model.
#[derive(Clone, Debug, PartialEq)]
pub struct Draft {
    /// The token.
    pub token: u32,
    /// The distribution `[V]` it was drawn from, processed and filtered; one at the token in greedy search.
    pub probabilities: Vec<f32>,
}

impl Search {
    /// Scores `[V]` of what follows active row `row` with the tokens `after` appended, given the model's logits there:
    /// processed and filtered as the strategy has them (log-probabilities in beam search), before groups of beams
    /// avoid each other's tokens.
    ///
    /// # Errors
    /// [`Error::Shape`] for logits of another length or a row that is not active; [`Error::Logits`] and
    /// [`Error::Hook`] as [`Search::advance`].
    pub fn scores(&self, row: usize, after: &[u32], logits: &[f32]) -> Result<Vec<f32>> {
        let path = self.paths().nth(row).filter(|_| logits.len() == self.setup.vocab_size);
        let path = path.ok_or_else(|| self.shape(logits))?;
        let mut path = path.clone();
        path.ids.extend_from_slice(after);
        let sequence = self.step.sequences[row] as usize;
        let mut scores = Vec::new();
        self.setup.read_row(logits, self.step.index, sequence, &mut scores)?;
        if !matches!(self.strategy, Strategy::Independent(_)) {
            log_softmax(&mut scores);
        }
        self.setup.process(&path, &[], &mut scores)?;
        if scores.iter().all(|x| *x == f32::NEG_INFINITY) {
            let step = self.step.index;
            return Err(Error::Logits { step, sequence, problem: self.setup.all_banned() });
        }
        Ok(scores)
    }

    /// Of each active row, the summed processed log-probability (0 outside beam search) and the model's own
    /// log-probability of the last token (0 before the first).
    #[must_use]
    pub fn path_scores(&self) -> Vec<(f64, f64)> {
        self.paths().map(|path| (path.score, path.token_logprobs.last().copied().unwrap_or(0.0))).collect()
    }

    /// Appends tokens chosen outside to the active rows, one each, with the model's log-probability of each. For
    /// searches without beams whose rows have one sequence each.
    ///
    /// # Errors
    /// [`Error::Outside`] in beam search, for another number of tokens than active sequences, or for a token beyond
    /// the vocabulary; [`Error::Hook`] as [`Search::advance`].
    pub fn choose(&mut self, tokens: &[(u32, f64)]) -> Result<()> {
        let vocab_size = self.setup.vocab_size;
        let Strategy::Independent(sequences) = &mut self.strategy else {
            return Err(Error::Outside("tokens cannot be chosen for beams".to_owned()));
        };
        let active = sequences.active();
        if tokens.len() != active.len() || tokens.iter().any(|(token, _)| *token as usize >= vocab_size) {
            return Err(Error::Outside(format!(
                "{} tokens below {vocab_size} are wanted, got {tokens:?}",
                active.len()
            )));
        }
        let emitted: Vec<_> = active
            .iter()
            .zip(tokens)
            .map(|((sequence, _), &(token, logprob))| Emitted { sequence: *sequence, token, logprob })
            .collect();
        sequences.append(&self.setup, &emitted)?;
        self.emitted = emitted;
        self.step = next_step(self.step.index + 1, sequences.open());
        Ok(())
    }

    /// Proposes what follows the one active sequence with the tokens `after` appended, from a cheaper model's logits
    /// `[V]`, with this search's processors and filters.
    ///
    /// # Errors
    /// As [`Search::scores`].
    pub fn draft(&self, after: &[u32], logits: &[f32]) -> Result<Draft> {
        let scores = self.scores(0, after, logits)?;
        if !self.setup.options.do_sample {
            let token = argmax(&scores);
            let mut probabilities = vec![0.0; scores.len()];
            probabilities[token] = 1.0;
            return Ok(Draft { token: token as u32, probabilities });
        }
        let probabilities = softmax(&scores);
        let mut stream = self.stream(DRAFT_PURPOSE, self.step.index + after.len());
        let weights: Vec<_> = probabilities.iter().map(|&q| f64::from(q)).collect();
        Ok(Draft { token: pick(&weights, stream.next_f64()) as u32, probabilities })
    }

    /// One step of the one active sequence, given the model's logits `[V]` and a proposal; says whether it was kept.
    ///
    /// # Errors
    /// As [`Search::advance`]; [`Error::Outside`] for a distribution of another size.
    pub fn advance_drafted(&mut self, logits: &[f32], draft: &Draft) -> Result<bool> {
        if self.step.tokens.len() != 1 {
            return Err(self.shape(logits));
        }
        if draft.probabilities.len() != self.setup.vocab_size || draft.token as usize >= self.setup.vocab_size
        {
            let problem = format!("a draft needs {} probabilities", self.setup.vocab_size);
            return Err(Error::Outside(problem));
        }
        let scores = self.scores(0, &[], logits)?;
        let token = draft.token as usize;
        let chosen = if self.setup.options.do_sample {
            let p = softmax(&scores);
            let q = &draft.probabilities;
            let mut stream = self.stream(VERIFY_PURPOSE, self.step.index);
            if stream.next_f64() * f64::from(q[token]) < f64::from(p[token]) {
                token
            } else {
                let rest: Vec<_> = p.iter().zip(q).map(|(p, q)| f64::from(p - q).max(0.0)).collect();
                pick(&rest, stream.next_f64())
            }
        } else {
            argmax(&scores)
        };
        let mut raw = Vec::new();
        self.setup.read_row(logits, self.step.index, self.step.sequences[0] as usize, &mut raw)?;
        self.choose(&[(chosen as u32, f64::from(raw[chosen]) - log_sum_exp(&raw))])?;
        Ok(chosen == token)
    }

    /// The active rows' paths, in order.
    pub(crate) fn paths(&self) -> Box<dyn Iterator<Item = &Path> + '_> {
        match &self.strategy {
            // Before the first choice, the sequences of a prompt share its row.
            Strategy::Independent(sequences) if self.step.index == 0 => {
                let per_prompt = self.setup.options.num_return_sequences;
                Box::new(sequences.active().iter().step_by(per_prompt).map(|(_, path)| path))
            }
            Strategy::Independent(sequences) => Box::new(sequences.active().iter().map(|(_, path)| path)),
            Strategy::Beams(beams) if self.step.index == 0 => {
                Box::new(beams.paths().step_by(self.setup.options.num_beam_groups))
            }
            Strategy::Beams(beams) => Box::new(beams.paths()),
            Strategy::Stochastic(nodes) => Box::new(nodes.paths()),
        }
    }

    fn shape(&self, logits: &[f32]) -> Error {
        let (step, active) = (self.step.index, self.step.tokens.len());
        Error::Shape { step, active, vocab_size: self.setup.vocab_size, given: logits.len() }
    }

    /// The draws of the one active sequence at a step.
    fn stream(&self, purpose: u32, step: usize) -> Stream {
        let first = self.setup.prompts.first().map_or(0, |prompt| prompt.first_sequence);
        Stream::new(self.setup.options.seed, purpose, coordinate(first, step))
    }
}

/// Probabilities `[V]` of scores `[V]` that hold a finite one.
fn softmax(scores: &[f32]) -> Vec<f32> {
    let normalizer = log_sum_exp(scores);
    scores.iter().map(|&x| (f64::from(x) - normalizer).exp() as f32).collect()
}
