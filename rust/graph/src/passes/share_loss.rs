//! A loss beside its own gradient is computed once: `linear_cross_entropy_grad` makes the logits anyway and gives the loss
//! too, so the forward node goes and whoever reads the loss waits for the gradient.

use std::collections::HashSet;

use crate::error::Result;
use crate::graph::{Graph, NodeId, ValueId};
use crate::op::Op;

/// Merges each forward loss into its gradient where the gradient does not itself depend on the loss.
///
/// # Errors
/// Internal errors only.
pub fn share_loss(graph: &Graph) -> Result<Graph> {
    let mut graph = graph.clone();
    while let Some(pair) = find(&graph) {
        graph = merge(&graph, &pair)?;
    }
    Ok(graph)
}

struct Pair {
    forward: NodeId,
    gradient: NodeId,
    /// Nodes between the two that depend on the loss, in order.
    waiting: Vec<NodeId>,
}

fn find(graph: &Graph) -> Option<Pair> {
    let nodes = graph.nodes();
    (0..nodes.len()).find_map(|i| {
        let Op::LinearCrossEntropy(spec) = nodes[i].op else { return None };
        let j = (i + 1..nodes.len()).find(|&j| {
            let n = &nodes[j];
            n.op == Op::LinearCrossEntropyGrad(spec) && n.inputs[..n.inputs.len() - 1] == nodes[i].inputs[..]
        })?;
        let mut tainted: HashSet<ValueId> = nodes[i].outputs.iter().copied().collect();
        let mut waiting = Vec::new();
        for (k, node) in nodes.iter().enumerate().take(j).skip(i + 1) {
            if node.inputs.iter().any(|v| tainted.contains(v)) {
                tainted.extend(&node.outputs);
                waiting.push(NodeId(k as u32));
            }
        }
        let independent = !nodes[j].inputs.iter().any(|v| tainted.contains(v));
        independent.then_some(Pair { forward: NodeId(i as u32), gradient: NodeId(j as u32), waiting })
    })
}

fn merge(graph: &Graph, pair: &Pair) -> Result<Graph> {
    let (before, after): (Vec<u32>, Vec<u32>) =
        (0..graph.nodes().len() as u32).partition(|&i| i <= pair.gradient.0);
    let order = before
        .into_iter()
        .map(NodeId)
        .filter(|id| !pair.waiting.contains(id))
        .chain(pair.waiting.iter().copied())
        .chain(after.into_iter().map(NodeId));
    graph.rewrite_in(order, |rw, id, node| {
        if id == pair.forward {
            return Ok(Some(vec![]));
        }
        if id != pair.gradient {
            return Ok(None);
        }
        let new = rw.copy(node)?;
        rw.replace(graph.node(pair.forward).outputs[0], new[0]);
        Ok(Some(new))
    })
}
