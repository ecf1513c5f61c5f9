//! What inputs must satisfy so that no kernel meets an index out of range.
//!
//! A kernel cannot raise an error, and reading indices back would stall the device: the executor checks inputs on the CPU
//! before it uploads them. Which input is an index, and into what, follows from the steps that read it.

use pyrformer_graph::{Op, Operand, Plan, Space};
use serde::Serialize;

/// The range of an integer input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Limit {
    /// The input's name.
    pub input: String,
    /// The operation that wants it.
    pub op: String,
    /// Smallest value; none where negative values mean nothing: labels, places of queries.
    pub least: Option<usize>,
    /// All values are smaller.
    pub below: usize,
}

/// The index operands of an operation: (operand, smallest, bound).
fn indices(op: &Op, inputs: &[Operand]) -> Vec<(usize, Option<usize>, usize)> {
    let dim = |i: usize, axis: usize| inputs[i].ty.shape.0[axis];
    match op {
        Op::Gather => vec![(1, Some(0), dim(0, 0))],
        Op::ScatterAdd { rows } => vec![(1, Some(0), *rows)],
        Op::LinearCrossEntropy(spec) | Op::LinearCrossEntropyGrad(spec) => {
            vec![(2 + usize::from(spec.bias), None, dim(1, 0))]
        }
        Op::LinearTokenLosses { bias } => vec![(2 + usize::from(*bias), None, dim(1, 0))],
        // A query at −1 stands nowhere.
        Op::RelativeAttention(_) => vec![(7, None, dim(8, 1))],
        Op::RelativeAttentionGrad(_) => vec![(8, None, dim(9, 1))],
        Op::CacheWrite => vec![(2, Some(0), dim(0, 0)), (3, Some(0), dim(0, 1) + 1)],
        Op::CachedAttention(_) => vec![(3, Some(0), dim(1, 0)), (4, Some(0), dim(1, 1) + 1)],
        _ => vec![],
    }
}

/// The limits that a plan sets to its inputs.
#[must_use]
pub fn limits(plan: &Plan) -> Vec<Limit> {
    let mut found: Vec<Limit> = Vec::new();
    // Inputs whose memory still holds them.
    let mut alive: Vec<_> = plan.inputs.iter().collect();
    for step in &plan.steps {
        for (i, least, below) in indices(&step.op, &step.inputs) {
            let o = &step.inputs[i];
            let place = |x: &Operand| (x.space, x.offset);
            if let Some(port) = alive.iter().find(|p| place(&p.operand) == place(o)) {
                let op = step.op.name().to_owned();
                let limit = Limit { input: port.name.clone(), op, least, below };
                let same = |l: &&Limit| l.input == limit.input && (l.least, l.below) == (least, below);
                if !found.iter().any(|l| same(&l)) {
                    found.push(limit);
                }
            }
        }
        for o in step.outputs.iter().chain(&step.scratch).filter(|o| o.space == Space::Arena) {
            alive.retain(|p| p.operand.offset >= o.end() || o.offset >= p.operand.end());
        }
    }
    found
}
