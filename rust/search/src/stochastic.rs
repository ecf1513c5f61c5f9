//! Stochastic beam search: distinct sequences drawn without replacement from the model's distribution.
//!
//! A leaf of the tree of sequences has a Gumbel-perturbed log-probability; the k largest of all leaves are a draw
//! without replacement. They are found top-down: a node's perturbed value is the maximum of its children's, so children
//! are drawn under that condition and only the k best nodes of each depth are kept, finished ones among them.
//! Source: Kool et al. 2019, "Stochastic Beams and Where to Find Them", algorithm 1 and appendix B.3.

use pyrformer_random::Stream;

use crate::path::{FinishReason, Hypothesis, Path};
use crate::rows::Row;
use crate::sample::{GUMBEL_PURPOSE, coordinate, log_softmax};
use crate::search::Setup;
use crate::{Error, Result};

/// A node that the search holds.
#[derive(Clone, Debug)]
struct Node {
    /// Its log-probability with Gumbel noise, given its ancestors'.
    perturbed: f64,
    path: Path,
    is_over: bool,
}

/// The nodes of all prompts, best first.
#[derive(Debug)]
pub(crate) struct Stochastic {
    prompts: Vec<Vec<Node>>,
}

/// One draw from Gumbel(0, 1).
fn gumbel(stream: &mut Stream) -> f64 {
    // In (0, 1): zero would be −∞.
    let uniform = stream.next_f64().max(f64::MIN_POSITIVE);
    -(-uniform.ln()).ln()
}

/// Shifts `value`, one of several Gumbel draws of which `largest` is the maximum, to what it is if that maximum is
/// `wanted`.
fn condition(value: f64, largest: f64, wanted: f64) -> f64 {
    let v = wanted - value + (-(value - largest).exp()).ln_1p();
    wanted - v.max(0.0) - (-v.abs()).exp().ln_1p()
}

impl Stochastic {
    pub(crate) fn new(setup: &Setup) -> Self {
        let root = |p| vec![Node { perturbed: 0.0, path: setup.path(p), is_over: false }];
        Self { prompts: (0..setup.prompts.len()).map(root).collect() }
    }

    /// Continues every open node by its row, given whole.
    pub(crate) fn advance(&mut self, setup: &Setup, step: usize, rows: &[Row<'_>]) -> Result<()> {
        let next = |(prompt, nodes): (usize, &Vec<Node>)| children(setup, prompt, nodes, step, rows);
        self.prompts = self.prompts.iter().enumerate().map(next).collect::<Result<_>>()?;
        Ok(())
    }

    /// The open paths of all prompts, in order, with their sequence numbers.
    pub(crate) fn open(&mut self, setup: &Setup) -> impl Iterator<Item = (usize, &mut Path)> {
        let width = setup.options.num_beams;
        self.prompts.iter_mut().enumerate().flat_map(move |(prompt, nodes)| {
            let slots = nodes.iter_mut().enumerate().filter(|(_, node)| !node.is_over);
            slots.map(move |(slot, node)| (prompt * width + slot, &mut node.path))
        })
    }

    /// The open paths of all prompts, in order, as they stand.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.prompts.iter().flatten().filter(|node| !node.is_over).map(|node| &node.path)
    }

    /// The first `num_return_sequences` of each prompt, in the order in which they were drawn.
    pub(crate) fn finish(self, setup: &Setup) -> Vec<Hypothesis> {
        let count = setup.options.num_return_sequences;
        let drawn = self.prompts.into_iter().flat_map(|nodes| nodes.into_iter().take(count));
        let added = drawn.filter(|node| node.path.added() > 0);
        added
            .map(|node| {
                let score = node.path.score;
                node.path.into_hypothesis(Some(score))
            })
            .collect()
    }
}

/// The `num_beams` best of the finished nodes and all children of the open ones.
fn children(
    setup: &Setup,
    prompt: usize,
    nodes: &[Node],
    step: usize,
    rows: &[Row<'_>],
) -> Result<Vec<Node>> {
    let options = &setup.options;
    let width = options.num_beams;
    let mut stream =
        Stream::new(options.seed, GUMBEL_PURPOSE, coordinate(setup.prompts[prompt].first_sequence, step));
    // Perturbed value, node, token (none for a finished node), its log-probability and the model's own.
    let mut all: Vec<(f64, usize, Option<u32>, f64, f64)> = Vec::new();
    let (mut raw, mut scores, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for (slot, node) in nodes.iter().enumerate() {
        if node.is_over {
            all.push((node.perturbed, slot, None, 0.0, 0.0));
            continue;
        }
        let sequence = prompt * width + slot;
        if let Row::Whole(row) = rows[node.path.row] {
            setup.read_row(row, step, sequence, &mut raw)?;
        }
        log_softmax(&mut raw);
        scores.clone_from(&raw);
        setup.process(&node.path, &[], &mut scores)?;
        if scores.iter().all(|x| *x == f32::NEG_INFINITY) {
            return Err(Error::Logits { step, sequence, problem: setup.all_banned() });
        }
        log_softmax(&mut scores);
        values.clear();
        values.extend(scores.iter().map(|&s| node.path.score + f64::from(s) + gumbel(&mut stream)));
        let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        for (token, &value) in values.iter().enumerate().filter(|(_, v)| **v > f64::NEG_INFINITY) {
            let perturbed = condition(value, largest, node.perturbed);
            all.push((perturbed, slot, Some(token as u32), f64::from(scores[token]), f64::from(raw[token])));
        }
    }
    // A stable sort: equal ones stay by node and token.
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    all.truncate(width);
    let kept = all.into_iter().map(|(perturbed, slot, token, score, logprob)| {
        let mut node = nodes[slot].clone();
        if let Some(token) = token {
            let ending = setup.ending(&node.path, token)?;
            node.perturbed = perturbed;
            node.path.push(token, logprob);
            node.path.score += score;
            node.path.beam_indices.push((prompt * width + slot) as u32);
            node.is_over = ending.is_some();
            node.path.reason = ending.unwrap_or(FinishReason::Length);
        }
        Ok(node)
    });
    kept.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditioning_moves_the_largest_onto_the_target_and_keeps_the_order() {
        let values = [0.3, 2.0, -5.0, f64::NEG_INFINITY];
        let moved = values.map(|v| condition(v, 2.0, -1.0));
        assert!((moved[1] + 1.0).abs() < 1e-12, "{moved:?}");
        assert!(moved[1] > moved[0] && moved[0] > moved[2] && moved[3] == f64::NEG_INFINITY, "{moved:?}");
    }
}
