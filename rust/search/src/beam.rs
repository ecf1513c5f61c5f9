//! Beam search and beam sampling.
//!
//! Each prompt keeps `num_beams` open paths and its best `num_beams` finished ones. A step scores all continuations of
//! the open paths, takes max(2, 1 + end tokens) × `num_beams` candidates (the best, or drawn without replacement when
//! sampling), so that enough stay open even if every beam ends. Candidates that end, if among the first `num_beams`,
//! compete for the finished list by score/length^length_penalty; the best that do not end stay open.
//! Source: transformers 5.23 `generation/utils.py` (`_beam_search` and its helpers); for groups, transformers 4
//! `_group_beam_search`.
//!
//! With groups, `num_beams` above is a group's share, and the results are the best of all groups. With constraints, a
//! path may not end before it meets them, tokens that bring it on are candidates whatever their score, and the open
//! places are dealt out to the banks (`constraints`) in turn.
//!
//! Differs: a candidate of probability zero does not exist, where the reference gives it a score of −10⁹; a prompt may
//! therefore return fewer than `num_return_sequences` results when bans leave too few.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use crate::constraints::{advancing, progress};
use crate::path::{FinishReason, Hypothesis, Path};
use crate::rows::Row;
use crate::sample::draw_distinct;
use crate::search::Setup;
use crate::{EarlyStopping, Error, Result};

/// The beams of all prompts: `num_beam_groups` of each, which are one search each.
#[derive(Debug)]
pub(crate) struct Beams {
    groups: Vec<Beam>,
}

/// The beams of one group.
#[derive(Clone, Debug)]
struct Beam {
    /// Number of its first sequence.
    first: usize,
    /// Open paths, best first; empty when the group is done.
    open: Vec<Path>,
    /// Finished ones, best first.
    finished: Vec<Finished>,
}

#[derive(Clone, Debug)]
struct Finished {
    /// Whether a constraint is unmet: these come last, and exist only because the length ran out.
    is_unmet: bool,
    score: f64,
    path: Path,
}

/// What a step does to a group: the continuations that end, and the next open ones.
#[derive(Debug, Default)]
struct Choice {
    ended: Vec<(Candidate, FinishReason)>,
    open: Vec<Candidate>,
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
    /// One open path for each group: the first step fans out from it.
    pub(crate) fn new(setup: &Setup) -> Self {
        let (groups, width) = (setup.options.num_beam_groups, setup.options.group_width());
        let beam = |i| Beam { first: i * width, open: vec![setup.path(i / groups)], finished: Vec::new() };
        Self { groups: (0..setup.prompts.len() * groups).map(beam).collect() }
    }

    /// Continues every open path by its row; changes nothing where rows do not suffice, which are added to `missing`.
    pub(crate) fn advance(
        &mut self,
        setup: &Setup,
        step: usize,
        rows: &[Row<'_>],
        missing: &mut Vec<usize>,
    ) -> Result<()> {
        // Read everything before changing anything, so that an error leaves the search as it was.
        let mut choices = Vec::with_capacity(self.groups.len());
        for of_prompt in self.groups.chunks(setup.options.num_beam_groups) {
            let mut taken = Vec::new();
            for group in of_prompt {
                let choice = group.choose(setup, step, rows, &taken, missing)?;
                // At the length limit all end, but those without an end token have been chosen all the same.
                let ended = choice.ended.iter().map(|(candidate, _)| candidate);
                let chosen = choice.open.iter().chain(ended).map(|candidate| candidate.token);
                taken.extend(chosen.filter(|token| !setup.is_end(*token)));
                choices.push(choice);
            }
        }
        if !missing.is_empty() {
            return Ok(());
        }
        for (group, choice) in self.groups.iter_mut().zip(&choices) {
            if !group.open.is_empty() {
                group.update(setup, choice);
            }
        }
        Ok(())
    }

    /// The open paths of all prompts, in order, with their sequence numbers.
    pub(crate) fn open(&mut self) -> impl Iterator<Item = (usize, &mut Path)> {
        self.groups.iter_mut().flat_map(|group| {
            let first = group.first;
            group.open.iter_mut().enumerate().map(move |(slot, path)| (first + slot, path))
        })
    }

    /// The open paths of all prompts, in order, as they stand.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.groups.iter().flat_map(|group| &group.open)
    }

    /// The best `num_return_sequences` of each prompt. Open paths of a search cut short count as they are.
    pub(crate) fn finish(mut self, setup: &Setup) -> Vec<Hypothesis> {
        let mut results = Vec::new();
        for of_prompt in self.groups.chunks_mut(setup.options.num_beam_groups) {
            let mut finished = Vec::new();
            for group in of_prompt {
                let open = std::mem::take(&mut group.open);
                group.add_finished(setup, open.into_iter().filter(|path| path.added() > 0));
                finished.append(&mut group.finished);
            }
            finished.sort_by(better);
            for Finished { score, path, .. } in finished.into_iter().take(setup.options.num_return_sequences)
            {
                results.push(path.into_hypothesis(Some(score)));
            }
        }
        results
    }
}

/// The better first; of equals the earlier stays ahead in a stable sort.
fn better(a: &Finished, b: &Finished) -> Ordering {
    a.is_unmet.cmp(&b.is_unmet).then(b.score.total_cmp(&a.score))
}

/// The addition of `path` with one token more.
fn extended(path: &Path, token: u32) -> Vec<u32> {
    [&path.ids[path.prompt_len..], &[token]].concat()
}

impl Beam {
    /// What the step does. Sampled candidates come in drawing order, which ranks those that end; the open ones go by
    /// score.
    fn choose(
        &self,
        setup: &Setup,
        step: usize,
        rows: &[Row<'_>],
        taken: &[u32],
        missing: &mut Vec<usize>,
    ) -> Result<Choice> {
        let width = setup.options.group_width();
        let mut choice = Choice::default();
        for (rank, candidate) in self.candidates(setup, step, rows, taken, missing)?.into_iter().enumerate() {
            match setup.ending(&self.open[candidate.beam], candidate.token)? {
                None => choice.open.push(candidate),
                Some(reason) if rank < width || !setup.options.force_words_ids.is_empty() => {
                    choice.ended.push((candidate, reason));
                }
                Some(_) => {}
            }
        }
        choice.open.sort_by(|a, b| b.cmp(a));
        if !setup.options.force_words_ids.is_empty() {
            self.deal(setup, &mut choice.open);
        }
        choice.open.truncate(width);
        choice.open.sort_by(|a, b| b.cmp(a));
        Ok(choice)
    }

    /// Orders `open`, which comes best first: the best of each bank, then the second of each; higher banks first.
    fn deal(&self, setup: &Setup, open: &mut Vec<Candidate>) {
        let mut seen = std::collections::BTreeMap::new();
        let mut ranked: Vec<_> = open
            .iter()
            .map(|candidate| {
                let addition = extended(&self.open[candidate.beam], candidate.token);
                let bank = progress(&setup.options, &addition).bank;
                let rank: &mut usize = seen.entry(bank).or_default();
                *rank += 1;
                (*rank, Reverse(bank), *candidate)
            })
            .collect();
        ranked.sort_by_key(|(rank, bank, _)| (*rank, *bank));
        *open = ranked.into_iter().map(|(_, _, candidate)| candidate).collect();
    }

    /// The continuations to consider, in the order in which they compete; none where a row does not suffice.
    fn candidates(
        &self,
        setup: &Setup,
        step: usize,
        rows: &[Row<'_>],
        taken: &[u32],
        missing: &mut Vec<usize>,
    ) -> Result<Vec<Candidate>> {
        let options = &setup.options;
        let count = options.beam_candidates();
        let mut best = BinaryHeap::with_capacity(count + 1);
        let (mut all, mut forced) = (Vec::new(), Vec::new());
        let (mut scores, before) = (Vec::new(), missing.len());
        // Of each open path, what is above all continuations of it that are not known.
        let mut floors = Vec::with_capacity(self.open.len());
        for (slot, path) in self.open.iter().enumerate() {
            let Some(mut known) = setup.know(rows[path.row], step, self.first + slot)? else {
                missing.push(path.row);
                continue;
            };
            let logprob = |x: f32| (f64::from(x) - known.normalizer) as f32;
            floors.push(known.rest.map(|rest| path.score + f64::from(logprob(rest.lowest))));
            let raw: Vec<f32> = std::mem::take(&mut known.logits).into_iter().map(logprob).collect();
            scores.clone_from(&raw);
            if known.rest.is_none() {
                setup.process(path, taken, &mut scores)?;
            }
            let onward = advancing(options, &path.ids[path.prompt_len..]);
            if !onward.is_empty() {
                wait_with_end(&options.eos_token_id, &mut scores);
            }
            for (place, &score) in scores.iter().enumerate().filter(|(_, s)| **s > f32::NEG_INFINITY) {
                let candidate = Candidate {
                    score: path.score + f64::from(score),
                    beam: slot,
                    token: known.token(place),
                    logprob: f64::from(raw[place]),
                };
                if onward.binary_search(&candidate.token).is_ok() {
                    forced.push(candidate);
                }
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
        if missing.len() > before {
            return Ok(Vec::new());
        }
        let mut chosen = if options.do_sample {
            let scores: Vec<_> = all.iter().map(|c| c.score).collect();
            let stream = self.open.first().map_or(0, |path| setup.prompts[path.prompt].first_sequence);
            draw_distinct(&scores, count, options.seed, stream, step).into_iter().map(|i| all[i]).collect()
        } else {
            best.into_sorted_vec().into_iter().map(|Reverse(candidate)| candidate).collect::<Vec<_>>()
        };
        let unsure = |c: &&Candidate| floors[c.beam].is_some_and(|floor| c.score <= floor);
        missing.extend(chosen.iter().filter(unsure).map(|c| self.open[c.beam].row));
        if missing.len() > before {
            missing.dedup();
            return Ok(Vec::new());
        }
        forced.retain(|candidate| !chosen.contains(candidate));
        chosen.append(&mut forced);
        // A beam without continuations rests on what it has finished; with nothing finished there is no answer.
        if chosen.is_empty() && !self.open.is_empty() && self.finished.is_empty() {
            return Err(Error::Logits { step, sequence: self.first, problem: setup.all_banned() });
        }
        Ok(chosen)
    }

    fn update(&mut self, setup: &Setup, choice: &Choice) {
        let extend = |candidate: &Candidate| {
            let mut path = self.open[candidate.beam].clone();
            path.push(candidate.token, candidate.logprob);
            path.score = candidate.score;
            path.beam_indices.push((self.first + candidate.beam) as u32);
            path
        };
        let end =
            |(candidate, reason): &(Candidate, FinishReason)| Path { reason: *reason, ..extend(candidate) };
        let ended: Vec<_> = choice.ended.iter().map(end).collect();
        let open: Vec<_> = choice.open.iter().map(extend).collect();
        self.add_finished(setup, ended.into_iter());
        self.open = if self.is_done(setup, &open) { Vec::new() } else { open };
    }

    /// Merges paths into the finished list by final score.
    fn add_finished(&mut self, setup: &Setup, paths: impl Iterator<Item = Path>) {
        let options = &setup.options;
        self.finished.extend(paths.map(|path| {
            let score = path.score / (path.added() as f64).powf(options.length_penalty);
            let is_unmet = !progress(options, &path.ids[path.prompt_len..]).met;
            Finished { is_unmet, score, path }
        }));
        self.finished.sort_by(better);
        self.finished.truncate(options.kept());
    }

    /// Whether `open`, the next beam, need not be followed.
    fn is_done(&self, setup: &Setup, open: &[Path]) -> bool {
        let options = &setup.options;
        let Some(best) = open.first() else { return true };
        let Some(worst) = self.finished.get(options.kept() - 1).filter(|f| !f.is_unmet) else { return false };
        let length = match options.early_stopping {
            EarlyStopping::FirstComplete => return true,
            EarlyStopping::Never if options.length_penalty > 0.0 => setup.prompts[best.prompt].limit,
            _ => best.added(),
        };
        best.score / (length as f64).powf(options.length_penalty) <= worst.score
    }
}

/// Bans the end tokens, unless nothing else is left.
fn wait_with_end(eos: &[u32], scores: &mut [f32]) {
    let is_other =
        |(token, score): (usize, &f32)| *score > f32::NEG_INFINITY && !eos.contains(&(token as u32));
    if scores.iter().enumerate().any(is_other) {
        eos.iter().for_each(|&token| scores[token as usize] = f32::NEG_INFINITY);
    }
}
