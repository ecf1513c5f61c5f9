//! Greedy search and sampling: every sequence goes its own way.

use crate::path::{FinishReason, Hypothesis, Path};
use crate::rows::{Known, Row};
use crate::sample::{argmax, draw};
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

    /// Chooses one token for each open sequence; nothing where rows do not suffice, which are added to `missing`.
    pub(crate) fn advance(
        &mut self,
        setup: &Setup,
        step: usize,
        rows: &[Row<'_>],
        missing: &mut Vec<usize>,
    ) -> Result<Vec<Emitted>> {
        let options = &setup.options;
        let mut emitted = Vec::with_capacity(self.active.len());
        let (mut known, mut scores, mut row_read) = (Known::default(), Vec::new(), None);
        for (sequence, path) in &self.active {
            // After the prompt all its sequences share one row and one past, hence one set of scores.
            if row_read != Some(path.row) {
                row_read = Some(path.row);
                let found = setup.know(rows[path.row], step, *sequence)?;
                known = found.unwrap_or_default();
                scores.clone_from(&known.logits);
                let suffices = match known.rest {
                    Some(rest) => setup.filter_best(rest, &mut scores),
                    None if scores.is_empty() => false,
                    None => {
                        setup.process(path, &[], &mut scores)?;
                        true
                    }
                };
                if !suffices {
                    missing.push(path.row);
                    continue;
                }
                if scores.iter().all(|x| *x == f32::NEG_INFINITY) {
                    return Err(Error::Logits { step, sequence: *sequence, problem: setup.all_banned() });
                }
            }
            if missing.last() == row_read.as_ref() {
                continue;
            }
            let place = if options.do_sample {
                let per_prompt = options.num_return_sequences;
                let stream =
                    setup.prompts[path.prompt].first_sequence.wrapping_add((sequence % per_prompt) as u32);
                draw(&scores, options.seed, stream, step)
            } else {
                argmax(&scores)
            };
            let logprob = f64::from(known.logits[place]) - known.normalizer;
            emitted.push(Emitted { sequence: *sequence, token: known.token(place), logprob });
        }
        if !missing.is_empty() {
            return Ok(Vec::new());
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
