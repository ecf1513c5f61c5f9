//! Beam search and beam sampling.
//!
//! Each prompt keeps `num_beams` open paths and its best `num_beams` finished ones. A step scores all continuations of
//! the open paths, takes max(2, 1 + end tokens) × `num_beams` candidates (the best, or drawn without replacement when
//! sampling), so that enough stay open even if every beam ends. Candidates that end, if among the first `num_beams`,
//! compete for the finished list by score/length^length_penalty; the best that do not end stay open.
//! Source: transformers 5.23 `generation/utils.py` (`_beam_search` and its helpers).
//!
//! Differs: a candidate of probability zero does not exist, where the reference gives it a score of −10⁹; a prompt may
//! therefore return fewer than `num_return_sequences` results when bans leave too few.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use crate::path::{Hypothesis, Path};
use crate::sample::{draw_distinct, log_softmax};
use crate::search::Setup;
use crate::{EarlyStopping, Error, Result};

/// The beams of all prompts.
#[derive(Debug)]
pub(crate) struct Beams {
    prompts: Vec<Beam>,
}

/// The beam of one prompt.
#[derive(Clone, Debug)]
struct Beam {
    /// Open paths, best first; empty when the prompt is done.
    open: Vec<Path>,
    /// Finished ones with their final scores, best first.
    finished: Vec<(f64, Path)>,
}

/// One continuation of an open path.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    /// Summed processed log-probability.
    score: f64,
    /// Which open path.
    beam: usize,
    token: u32,
    /// The model's own log-probability of the token.
    logprob: f64,
}

/// Greater is better: by score, then by lower beam and token, so that ties break the same way everywhere.
impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then((other.beam, other.token).cmp(&(self.beam, self.token)))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

impl Beams {
    /// One open path for each prompt: the first step fans out from it.
    pub(crate) fn new(setup: &Setup) -> Self {
        let beam = |p| Beam { open: vec![setup.path(p)], finished: Vec::new() };
        Self { prompts: (0..setup.prompts.len()).map(beam).collect() }
    }

    /// Continues every open path by its row of `logits`.
    pub(crate) fn advance(&mut self, setup: &Setup, step: usize, logits: &[f32]) -> Result<()> {
        // Read everything before changing anything, so that an error leaves the search as it was.
        let candidates: Vec<_> = self
            .prompts
            .iter()
            .enumerate()
            .map(|(prompt, beam)| beam.candidates(setup, prompt, step, logits))
            .collect::<Result<_>>()?;
        for (prompt, (beam, candidates)) in self.prompts.iter_mut().zip(candidates).enumerate() {
            if !beam.open.is_empty() {
                beam.update(setup, prompt, &candidates);
            }
        }
        Ok(())
    }

    /// The open paths of all prompts, in order, with their sequence numbers.
    pub(crate) fn open(&mut self, setup: &Setup) -> impl Iterator<Item = (usize, &mut Path)> {
        let width = setup.options.num_beams;
        self.prompts.iter_mut().enumerate().flat_map(move |(prompt, beam)| {
            beam.open.iter_mut().enumerate().map(move |(slot, path)| (prompt * width + slot, path))
        })
    }

    /// The best `num_return_sequences` of each prompt. Open paths of a search cut short count as they are.
    pub(crate) fn finish(self, setup: &Setup) -> Vec<Hypothesis> {
        let mut results = Vec::new();
        for mut beam in self.prompts {
            let open = std::mem::take(&mut beam.open);
            beam.add_finished(setup, open.into_iter().filter(|path| path.added() > 0));
            for (score, path) in beam.finished.into_iter().take(setup.options.num_return_sequences) {
                let ended = setup.is_end(path.last());
                results.push(path.into_hypothesis(Some(score), ended));
            }
        }
        results
    }
}

impl Beam {
    /// The continuations to consider, in the order in which they compete.
    fn candidates(
        &self,
        setup: &Setup,
        prompt: usize,
        step: usize,
        logits: &[f32],
    ) -> Result<Vec<Candidate>> {
        let options = &setup.options;
        let count = options.num_beams * (1 + options.eos_token_id.len()).max(2);
        let mut best = BinaryHeap::with_capacity(count + 1);
        let mut all = Vec::new();
        let (mut raw, mut scores) = (Vec::new(), Vec::new());
        for (slot, path) in self.open.iter().enumerate() {
            setup.read_row(logits, path.row, step, prompt * options.num_beams + slot, &mut raw)?;
            log_softmax(&mut raw);
            scores.clone_from(&raw);
            setup.process(path, &mut scores);
            for (token, &score) in scores.iter().enumerate().filter(|(_, s)| **s > f32::NEG_INFINITY) {
                let candidate = Candidate {
                    score: path.score + f64::from(score),
                    beam: slot,
                    token: token as u32,
                    logprob: f64::from(raw[token]),
                };
                if options.do_sample {
                    all.push(candidate);
                } else if best.len() < count {
                    best.push(Reverse(candidate));
                } else if best.peek().is_some_and(|worst: &Reverse<Candidate>| candidate > worst.0) {
                    best.pop();
                    best.push(Reverse(candidate));
                }
            }
        }
        let chosen = if options.do_sample {
            let scores: Vec<_> = all.iter().map(|c| c.score).collect();
            let stream = setup.prompts[prompt].first_sequence;
            draw_distinct(&scores, count, options.seed, stream, step).into_iter().map(|i| all[i]).collect()
        } else {
            best.into_sorted_vec().into_iter().map(|Reverse(candidate)| candidate).collect::<Vec<_>>()
        };
        // A beam without continuations rests on what it has finished; with nothing finished there is no answer.
        if chosen.is_empty() && !self.open.is_empty() && self.finished.is_empty() {
            let sequence = prompt * options.num_beams;
            return Err(Error::Logits { step, sequence, problem: setup.all_banned() });
        }
        Ok(chosen)
    }

    fn update(&mut self, setup: &Setup, prompt: usize, candidates: &[Candidate]) {
        let options = &setup.options;
        let (mut ended, mut open) = (Vec::new(), Vec::new());
        // Sampled candidates come in drawing order, which ranks those that end; the open ones go by score.
        for (rank, candidate) in candidates.iter().enumerate() {
            let parent = &self.open[candidate.beam];
            let is_over = setup.is_end(candidate.token) || parent.added() + 1 >= setup.prompts[prompt].limit;
            if !is_over {
                open.push(*candidate);
            } else if rank < options.num_beams {
                ended.push(*candidate);
            }
        }
        open.sort_by(|a, b| b.cmp(a));
        open.truncate(options.num_beams);
        let extend = |candidate: &Candidate| {
            let mut path = self.open[candidate.beam].clone();
            path.push(candidate.token, candidate.logprob);
            path.score = candidate.score;
            path.beam_indices.push((prompt * options.num_beams + candidate.beam) as u32);
            path
        };
        let ended: Vec<_> = ended.iter().map(extend).collect();
        let open: Vec<_> = open.iter().map(extend).collect();
        self.add_finished(setup, ended.into_iter());
        self.open = if self.is_done(setup, &open) { Vec::new() } else { open };
    }

    /// Merges paths into the finished list by final score; of equals the earlier stays ahead.
    fn add_finished(&mut self, setup: &Setup, paths: impl Iterator<Item = Path>) {
        let options = &setup.options;
        self.finished.extend(paths.map(|path| {
            let score = path.score / (path.added() as f64).powf(options.length_penalty);
            (score, path)
        }));
        self.finished.sort_by(|a, b| b.0.total_cmp(&a.0));
        self.finished.truncate(options.num_beams);
    }

    /// Whether `open`, the next beam, need not be followed.
    fn is_done(&self, setup: &Setup, open: &[Path]) -> bool {
        let options = &setup.options;
        let Some(best) = open.first() else { return true };
        if self.finished.len() < options.num_beams {
            return false;
        }
        let worst = self.finished[options.num_beams - 1].0;
        let length = match options.early_stopping {
            EarlyStopping::FirstComplete => return true,
            EarlyStopping::Never if options.length_penalty > 0.0 => setup.prompts[best.prompt].limit,
            _ => best.added(),
        };
        best.score / (length as f64).powf(options.length_penalty) <= worst
    }
}
