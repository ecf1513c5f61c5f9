//! Greedy search and sampling: every sequence goes its own way.

use crate::path::{FinishReason, Hypothesis, Path};
use crate::sample::{argmax, draw, log_sum_exp};
use crate::search::{Emitted, Setup};
use crate::{Error, Result};

/// The sequences of a search without beams.
#[derive(Debug)]
pub(crate) struct Independent {
    /// The open sequences with their numbers, ascending.
    active: Vec<(usize, Path)>,
    /// The closed ones, by number.
    finished: Vec<Option<Hypothesis>>,
}

impl Independent {
    /// `num_return_sequences` sequences for each prompt, all reading the prompt's row first.
    pub(crate) fn new(setup: &Setup) -> Self {
        let per_prompt = setup.options.num_return_sequences;
        let paths = (0..setup.prompts.len()).flat_map(|p| (0..per_prompt).map(move |_| setup.path(p)));
        let active: Vec<_> = paths.enumerate().collect();
        let finished = vec![None; active.len()];
        Self { active, finished }
    }

    /// Chooses one token for each open sequence.
    pub(crate) fn advance(&mut self, setup: &Setup, step: usize, logits: &[f32]) -> Result<Vec<Emitted>> {
        let options = &setup.options;
        let mut emitted = Vec::with_capacity(self.active.len());
        let (mut raw, mut scores, mut normalizer, mut row_read) = (Vec::new(), Vec::new(), 0.0, None);
        for (sequence, path) in &self.active {
            // After the prompt all its sequences share one row and one past, hence one set of scores.
            if row_read != Some(path.row) {
                row_read = Some(path.row);
                setup.read_row(logits, path.row, step, *sequence, &mut raw)?;
                normalizer = log_sum_exp(&raw);
                scores.clone_from(&raw);
                setup.process(path, &[], &mut scores)?;
                if scores.iter().all(|x| *x == f32::NEG_INFINITY) {
                    return Err(Error::Logits { step, sequence: *sequence, problem: setup.all_banned() });
                }
            }
            let token = if options.do_sample {
                let per_prompt = options.num_return_sequences;
                let stream =
                    setup.prompts[path.prompt].first_sequence.wrapping_add((sequence % per_prompt) as u32);
                draw(&scores, options.seed, stream, step)
            } else {
                argmax(&scores)
            };
            let logprob = f64::from(raw[token]) - normalizer;
            emitted.push(Emitted { sequence: *sequence, token: token as u32, logprob });
        }
        self.append(setup, &emitted)?;
        Ok(emitted)
    }

    /// Appends one token to each open sequence and closes those that are over.
    pub(crate) fn append(&mut self, setup: &Setup, tokens: &[Emitted]) -> Result<()> {
        let mut endings = Vec::with_capacity(tokens.len());
        for ((_, path), new) in self.active.iter().zip(tokens) {
            endings.push(setup.ending(path, new.token)?);
        }
        // Only when every row was usable does anything change.
        for (((_, path), new), ending) in self.active.iter_mut().zip(tokens).zip(&endings) {
            path.push(new.token, new.logprob);
            path.reason = ending.unwrap_or(FinishReason::Length);
        }
        let mut endings = endings.into_iter();
        for (sequence, path) in self.active.extract_if(.., |_| endings.next().flatten().is_some()) {
            self.finished[sequence] = Some(path.into_hypothesis(None));
        }
        Ok(())
    }

    /// The open sequences, in order, with their numbers.
    pub(crate) fn open(&mut self) -> impl Iterator<Item = (usize, &mut Path)> {
        self.active.iter_mut().map(|(sequence, path)| (*sequence, path))
    }

    /// The open sequences, in order, with their numbers, as they stand.
    pub(crate) fn active(&self) -> &[(usize, Path)] {
        &self.active
    }

    pub(crate) fn finish(mut self) -> Vec<Hypothesis> {
        for (sequence, path) in self.active {
            self.finished[sequence] = Some(path.into_hypothesis(None));
        }
        self.finished.into_iter().flatten().collect()
    }
}
