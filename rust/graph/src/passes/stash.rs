//! Keeps in bfloat16 what the forward pass leaves to the backward pass: each such activation is rounded behind its last
//! reader of the forward pass and widened again before the first gradient that reads it, so the loss keeps its bits, and
//! gradients are computed in float32 from rounded activations. Source: Jain et al. 2018, "Gist: Efficient Data Encoding for
//! Deep Neural Network Training", section 3.3 (delayed precision reduction).
//!
//! Kept as they are: what the loss reads, statistics, tables of positions, what is not a matrix, and the queries and keys
//! of attention, since its gradient computes exp(q·k − lse) again with the denominator of the forward pass.

use std::collections::HashMap;

use crate::dtype::DType;
use crate::error::Result;
use crate::graph::{Graph, NodeId, Rewrite, ValueId};
use crate::op::Op;
use crate::passes::recompute::backward;

/// Rounds what is kept. It runs last, so that it sees what is kept after fusion and recomputation.
///
/// # Errors
/// Internal errors only.
pub fn stash(graph: &Graph) -> Result<Graph> {
    let begin = backward(graph);
    let kept = kept(graph, begin);
    // Behind which node of the forward pass each value is read no more there.
    let mut last: HashMap<NodeId, Vec<ValueId>> = HashMap::new();
    for &v in &kept {
        let reads = |at: &usize| graph.nodes()[*at].inputs.iter().any(|&input| source(graph, input) == v);
        let end = (0..begin).rev().find(reads).map_or(graph.value(v).node, |at| NodeId(at as u32));
        last.entry(end).or_default().push(v);
    }
    let mut rounded: HashMap<ValueId, ValueId> = HashMap::new();
    graph.rewrite(|rw, id, node| {
        if id.0 as usize >= begin {
            for &v in &node.inputs {
                widen(graph, rw, &mut rounded, v)?;
            }
            return Ok(None);
        }
        let Some(values) = last.get(&id) else { return Ok(None) };
        let new = rw.copy(node)?;
        for (&old, &new) in node.outputs.iter().zip(&new) {
            rw.replace(old, new);
        }
        for &v in values {
            let full = rw.get(v)?;
            rounded.insert(v, rw.to.add1(Op::Cast(DType::Bf16), &[full])?);
        }
        Ok(Some(new))
    })
}

/// The activations to round: what gradients read of the forward pass, by way of reshapes or directly.
fn kept(graph: &Graph, begin: usize) -> Vec<ValueId> {
    let mut wanted = vec![false; graph.value_count()];
    let mut exact = vec![false; graph.value_count()];
    for node in &graph.nodes()[begin..] {
        for (i, &v) in node.inputs.iter().enumerate() {
            let v = source(graph, v);
            if (graph.value(v).node.0 as usize) < begin {
                wanted[v.0 as usize] = true;
                // The loss is computed beside its gradient.
                exact[v.0 as usize] |= match node.op {
                    Op::AttentionGrad(_) => i == 1 || i == 2,
                    Op::LinearCrossEntropyGrad(_) => true,
                    _ => false,
                };
            }
        }
    }
    graph.ends().for_each(|v| exact[source(graph, v).0 as usize] = true);
    let may = |v: ValueId| !exact[v.0 as usize] && is_activation(graph, v);
    (0..wanted.len() as u32)
        .map(ValueId)
        .filter(|v| wanted[v.0 as usize])
        .filter(|&v| {
            let node = graph.producer(v);
            // Parts of one tensor are one piece of memory: it goes only if nobody waits for any of them.
            let parts = if matches!(node.op, Op::Split { .. }) { &node.outputs[..] } else { &[v] };
            parts.iter().all(|&part| !wanted[part.0 as usize] || may(part))
        })
        .collect()
}

/// Whether the forward pass computed it as a matrix of numbers that bear rounding.
fn is_activation(graph: &Graph, v: ValueId) -> bool {
    let (value, node) = (graph.value(v), graph.producer(v));
    let statistic = matches!(node.op, Op::LayerNorm { .. } | Op::Attention(_)) && value.slot > 0;
    let table = matches!(node.op, Op::RopeTable { .. } | Op::AlibiBias { .. } | Op::Fill { .. });
    value.ty.dtype == DType::F32 && value.ty.shape.rank() > 1 && !node.op.is_leaf() && !statistic && !table
}

/// The value that a reshape is another view of.
fn source(graph: &Graph, v: ValueId) -> ValueId {
    match graph.producer(v) {
        node if node.op == Op::Reshape => source(graph, node.inputs[0]),
        _ => v,
    }
}

/// Widens what a node of the backward pass reads, if it was rounded; from here on, that stands for the value.
fn widen(
    graph: &Graph,
    rw: &mut Rewrite<'_>,
    rounded: &mut HashMap<ValueId, ValueId>,
    v: ValueId,
) -> Result<()> {
    let node = graph.producer(v);
    if node.op == Op::Reshape {
        let from = node.inputs[0];
        widen(graph, rw, rounded, from)?;
        let after = rw.get(from)?;
        if rw.to.producer(rw.get(v)?).inputs != [after] {
            let shaped = rw.to.add_as(Op::Reshape, &[after], graph.ty(v).clone())?;
            rw.replace(v, shaped);
        }
    } else if let Some(narrow) = rounded.remove(&v) {
        let wide = rw.to.add1(Op::Cast(DType::F32), &[narrow])?;
        rw.replace(v, wide);
    }
    Ok(())
}
