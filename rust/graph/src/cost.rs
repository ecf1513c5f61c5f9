//! What a step costs: arithmetic and unique bytes, from shapes alone.

use serde::{Deserialize, Serialize};

use crate::dtype::TensorType;
use crate::op::{AttentionSpec, Op};

/// Arithmetic and traffic of one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cost {
    /// Floating-point operations; a multiply-add counts as two, an elementary function as one.
    pub flops: u64,
    /// Bytes read and written if every operand moves once.
    pub bytes: u64,
}

/// The cost of an operation on operands of these types.
#[must_use]
pub fn cost(op: &Op, inputs: &[&TensorType], outputs: &[&TensorType]) -> Cost {
    let elements = |t: &TensorType| t.shape.elements() as u64;
    let bytes = |ts: &[&TensorType]| ts.iter().map(|t| t.bytes() as u64).sum::<u64>();
    let moved = bytes(inputs) + bytes(outputs);
    let flops = match op {
        Op::MatMul { ta, .. } => {
            let inner = if *ta { inputs[0].shape.rows() } else { inputs[0].shape.cols() };
            2 * elements(outputs[0]) * inner as u64
        }
        Op::LinearCrossEntropy(_) | Op::LinearTokenLosses { .. } => {
            2 * elements(inputs[1]) * inputs[0].shape.rows() as u64
        }
        // Logits, their gradient times W, and times x.
        Op::LinearCrossEntropyGrad(_) => 6 * elements(inputs[1]) * inputs[0].shape.rows() as u64,
        Op::Attention(spec) => 4 * pairs(spec, inputs[0]) * (inputs[0].shape.cols() as u64),
        // Scores again, then dv, dp, dq, dk.
        Op::AttentionGrad(spec) => 10 * pairs(spec, inputs[1]) * (inputs[1].shape.cols() as u64),
        Op::CachedAttention(_) => {
            let slots = inputs[1].shape.0[1] as u64;
            4 * elements(inputs[0]) * slots
        }
        // Two products of width C a pair for scores, one for values; backward, seven.
        Op::RelativeAttention(_) => 6 * elements(inputs[0]) * inputs[3].shape.0[1] as u64,
        Op::RelativeAttentionGrad(_) => 18 * elements(inputs[0]) * inputs[4].shape.0[1] as u64,
        // Differences, quotients, exponentials and sums.
        Op::Best { .. } => 7 * elements(inputs[0]),
        Op::LayerNorm { .. } => 8 * elements(inputs[0]),
        Op::LayerNormGrad { .. } => 14 * elements(inputs[1]),
        Op::AdamW { .. } => 14 * elements(inputs[0]),
        Op::GlobalNorm => inputs.iter().map(|t| 2 * elements(t)).sum(),
        Op::Unary(_) | Op::UnaryGrad(_) | Op::Binary(_) => elements(outputs[0]),
        // The residual is a sum of its own.
        Op::Dropout(_) => (inputs.len() as u64 - 1) * elements(outputs[0]),
        Op::Gated(_) => 2 * elements(outputs[0]),
        Op::GatedGrad(_) => 4 * elements(outputs[0]),
        Op::Rope { .. } => 3 * elements(outputs[0]),
        Op::RopeTable { .. } | Op::AlibiBias { .. } => elements(outputs[0]),
        Op::SumTo => elements(inputs[0]),
        Op::ScatterAdd { .. } => elements(inputs[0]),
        _ => 0,
    };
    let traffic = match op {
        // Only the rows that are asked for move.
        Op::Gather => 2 * bytes(outputs) + inputs[1].bytes() as u64,
        Op::CacheWrite => 2 * inputs[1].bytes() as u64,
        // The old copy is not read.
        Op::AdamW { .. } if outputs.len() == 4 => moved - outputs[3].bytes() as u64,
        Op::ScatterAdd { .. } if inputs.len() == 3 => 3 * inputs[0].bytes() as u64,
        _ => moved,
    };
    Cost { flops, bytes: traffic }
}

/// (query, key) pairs per head and batch that are not masked by position, times the batch.
fn pairs(spec: &AttentionSpec, q: &TensorType) -> u64 {
    let (b, t) = (q.shape.0[0] as u64, q.shape.0[1] as u64);
    let seen = if spec.causal { t * (t + 1) / 2 } else { t * t };
    let sides = if spec.causal { 1 } else { 2 };
    let seen = spec.window.map_or(seen, |w| seen.min(t * (sides * w as u64 - (sides - 1))));
    b * seen
}
